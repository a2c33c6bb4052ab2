"""What is wrong with an allocator in any room: faults in its books, planted in each of them.

A fault is declared with the names of laws; `plant` makes it a mutant of a room's oracle.
"""

from typing import Any, NamedTuple

from torch import Tensor

from kvspec.conformance.allocator_laws import Law
from kvspec.conformance.mutants import Registry
from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle.boundary import numbers, tensor
from kvspec.oracle.slot_allocator import BaseTokenToKVPoolAllocator, Ticket

__all__ = ["plant"]


class Fault(NamedTuple):
    broken: type[BaseTokenToKVPoolAllocator]
    laws: tuple[str, ...]
    """The one that is broken, then those whose tests cannot help failing with it."""


FAULTS: list[Fault] = []


def fault(*laws: str) -> Any:
    """Declare a class as one that breaks a law."""

    def declare(broken: type[BaseTokenToKVPoolAllocator]) -> type[BaseTokenToKVPoolAllocator]:
        FAULTS.append(Fault(broken, laws))
        return broken

    return declare


def plant(
    registry: Registry,
    oracle: type[BaseTokenToKVPoolAllocator],
    law: Law,
    **reports: tuple[str, ...],
) -> None:
    """Plant every fault into a room's oracle; `reports` says what it stands for there."""
    names = {planted.broken.__name__ for planted in FAULTS}
    assert reports.keys() <= names, f"no fault is called {reports.keys() - names}"
    for broken, laws in FAULTS:
        ids = dict.fromkeys(id_ for name in laws if (id_ := getattr(law, name)))
        mutant = type(broken.__name__, (broken, oracle), {})
        registry.mutant(*ids, reports=reports.get(broken.__name__, ()))(mutant)


@fault("books", "free", "pending")
class LosesTheLastOfThree(BaseTokenToKVPoolAllocator):
    """A freed page that goes nowhere: a leak."""

    def _given_back(self, slots: list[int]) -> list[int]:
        given = super()._given_back(slots)
        return given[:-1] if len(given) == 3 else given


@fault("sink", "books", "alloc", "clear")
class HandsOutTheSink(BaseTokenToKVPoolAllocator):
    """After a clear, page 0 is a page like any other."""

    def clear(self) -> None:
        super().clear()
        self.free_list.insert(0, 0)


@fault("alloc", "order", "pending", "digest")
class HandsOutItsOwnMemory(BaseTokenToKVPoolAllocator):
    """The result is a view of storage that the next calls write."""

    def alloc(self, need_size: int) -> Tensor | None:
        slots = super().alloc(need_size)
        if slots is None:
            return None
        if not hasattr(self, "shared"):
            self.shared = tensor(range(4096))
        self.shared[: len(slots)] = slots
        return self.shared[: len(slots)]


@fault("short", "books", "pending")
class MergesWhenItRefuses(BaseTokenToKVPoolAllocator):
    def _take(self, page_count: int) -> list[int] | None:
        taken = super()._take(page_count)
        if taken is None:
            self._merge()
        return taken


@fault("amount", "books")
class AllocatesMinusOne(BaseTokenToKVPoolAllocator):
    """A slice with a negative end: all but the last page."""

    def alloc(self, need_size: int) -> Tensor | None:
        if need_size < 0 and need_size % self.page_size == 0:
            need_size = max(0, self.available_size() + need_size)
        return super().alloc(need_size)


@fault("given_back", "books")
class FreesWhatIsFree(BaseTokenToKVPoolAllocator):
    """No detection where the users are: a page freed in two calls is listed twice."""

    def _given_back(self, slots: list[int]) -> list[int]:
        pages = dict.fromkeys(slot // self.page_size for slot in slots)
        if all(0 < page <= self.page_count for page in pages):
            return self._in_order(pages)
        return super()._given_back(slots)


@fault("given_back", "books")
class FreesBeforeItLooks(BaseTokenToKVPoolAllocator):
    """What comes before the bad slot is freed all the same."""

    def _given_back(self, slots: list[int]) -> list[int]:
        try:
            return super()._given_back(slots)
        except ContractError:
            for index, slot in enumerate(slots):
                page = slot // self.page_size
                if page not in self.held or slot in slots[:index]:
                    break
                self._put_back([page])
            raise


@fault("pending", "books", "given_back", "requests", "restore", "waiting")
class FreesAtOnceInAGroup(BaseTokenToKVPoolAllocator):
    def _put_back(self, pages: list[int]) -> None:
        group, self.group = self.group, False
        super()._put_back(pages)
        self.group = group


@fault("pending")
class KeepsTheCallersTensor(BaseTokenToKVPoolAllocator):
    """Reads what waits when the group ends, from memory that is the caller's."""

    kept: Slots | None = None

    def free(self, free_index: Slots, *pairs: Slots) -> None:
        super().free(free_index, *pairs)
        self.kept = free_index if self.group and isinstance(free_index, Tensor) else None

    def free_group_end(self) -> None:
        if self.kept is not None:
            slots = numbers(self.kept, self.clauses.argument)
            self.pending = list(dict.fromkeys(slot // self.page_size for slot in slots))
        super().free_group_end()


@fault("waiting")
class ForgetsWhatWaits(BaseTokenToKVPoolAllocator):
    """Inside a group the sums of a checker show a leak that is none."""

    def pending_size(self) -> int:
        return super().pending_size() - self.page_size * (len(self.pending) > 1)


@fault("waiting")
class CountsPagesThatWait(BaseTokenToKVPoolAllocator):
    """In pages where it should be slots; at page size 1, each twice."""

    def pending_size(self) -> int:
        return len(self.pending) if self.page_size > 1 else 2 * len(self.pending)


@fault("group", "books")
class NestedBeginDropsWhatWaits(BaseTokenToKVPoolAllocator):
    def free_group_begin(self) -> None:
        self.pending, self.group = [], False
        super().free_group_begin()


@fault("group", "books")
class EndsNoGroup(BaseTokenToKVPoolAllocator):
    def free_group_end(self) -> None:
        if self.group:
            super().free_group_end()


@fault("clear", "order")
class ClearKeepsTheOrder(BaseTokenToKVPoolAllocator):
    def _start(self) -> None:
        before = getattr(self, "free_list", [])
        super()._start()
        rest = [page for page in self.free_list if page not in before]
        self.free_list = [*before, *rest]


@fault("clear", "books")
class ClearKeepsTheGroupOpen(BaseTokenToKVPoolAllocator):
    def clear(self) -> None:
        group = self.group
        super().clear()
        self.group = group


@fault("restore", "books")
class RestoresTheFirstOnly(BaseTokenToKVPoolAllocator):
    """Of several allocations since the ticket, the later ones are lost."""

    def restore_state(self, state: Any) -> None:
        if isinstance(state, Ticket):
            self.handed_out = self.handed_out[: state.taken + 1]
        super().restore_state(state)


@fault("restore", "order", "digest")
class RestoresToTheTail(BaseTokenToKVPoolAllocator):
    def _take_back(self, taken: int) -> list[int]:
        there = self.free_list
        pages = super()._take_back(taken)
        self.free_list = there + pages
        return pages


@fault("ticket", "books", "restore", "digest")
class RestoresAfterAFree(BaseTokenToKVPoolAllocator):
    """Puts the lists back as they were: what was freed in between is lost."""

    def backup_state(self) -> Any:
        return self, list(self.free_list), list(self.release)

    def restore_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or state[0] is not self:
            raise ContractError(f"{self.clauses.ticket}: this is no ticket of this allocator")
        self.free_list, self.release = list(state[1]), list(state[2])


@fault("ticket")
class TakesAnybodysTicket(BaseTokenToKVPoolAllocator):
    def restore_state(self, state: Any) -> None:
        if isinstance(state, Ticket):
            super().restore_state(state._replace(owner=self._owner))
        else:
            super().restore_state(state)


@fault("order", "pending", "restore", "digest")
class FreesToTheOtherEnd(BaseTokenToKVPoolAllocator):
    def _waiting(self, before: list[int], pages: list[int]) -> list[int]:
        return pages + before if self.queue else before + pages


@fault("order", "pending", "restore")
class MergesUnsorted(BaseTokenToKVPoolAllocator):
    def _merge(self) -> None:
        joined = self.free_list + self.release
        super()._merge()
        self.free_list = joined


@fault("argument")
class TakesAnySize(BaseTokenToKVPoolAllocator):
    def __init__(self, size: int, **given: Any) -> None:
        if "page_size" in given:
            given["page_size"] = min(max(given["page_size"], 1), 64)
        super().__init__(size=min(max(size, 0), 1000), **given)


@fault("argument")
class RoundsWhatItIsGiven(BaseTokenToKVPoolAllocator):
    def free(self, free_index: Any, *pairs: Slots) -> None:
        if isinstance(free_index, Tensor) and free_index.is_floating_point():
            free_index = free_index.long() * self.page_size
        super().free(free_index, *pairs)


@fault("cost")
class CopiesTheList(BaseTokenToKVPoolAllocator):
    """Every free copies the free list: O(pool)."""

    def _put_back(self, pages: list[int]) -> None:
        super()._put_back(pages)
        self._pages_moved += len(self.free_list)


@fault("check", "books")
class CriesWolf(BaseTokenToKVPoolAllocator):
    def check(self) -> None:
        if self.pending:
            raise ContractError(f"{self.clauses.books}: some pages are in no list")


@fault("digest", "books")
class CountsOnly(BaseTokenToKVPoolAllocator):
    """Stands for its view by counts, which aliases leave as they are."""

    def digest(self) -> int:
        return len(self.free_list) * 10_000 + len(self.release) * 100 + len(self.pending)
