"""Slot allocators with one clause of SLOT broken."""

from typing import Any

from torch import Tensor

from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.slot_allocator import SlotAllocatorConformance
from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle.boundary import numbers, tensor
from kvspec.oracle.slot_allocator import Ticket, TokenToKVPoolAllocator

registry = Registry(SlotAllocatorConformance, oracle)


@registry.mutant("SLOT-1", "SLOT-9", reports=("INV-001", "INV-002", "INV-004"))
class ListsTheSink(TokenToKVPoolAllocator):
    """After a clear, slot 0 is a slot like any other."""

    def clear(self) -> None:
        super().clear()
        self.free_list.append(0)


@registry.mutant("SLOT-1", reports=("INV-005",))
class LosesTheLastOfThree(TokenToKVPoolAllocator):
    """A freed slot that goes nowhere: a leak."""

    def _given_back(self, slots: list[int]) -> list[int]:
        given = super()._given_back(slots)
        return given[:-1] if len(given) == 3 else given


@registry.mutant("SLOT-2", "SLOT-1", "SLOT-11")
class RefusesToTakeNothing(TokenToKVPoolAllocator):
    def alloc(self, need_size: int) -> Tensor | None:
        return super().alloc(need_size) if need_size else None


@registry.mutant(
    "SLOT-3", "SLOT-1", "SLOT-6", "SLOT-7", "SLOT-9", "SLOT-12", "SLOT-13", reports=("INV-011",)
)
class RefusesWhatItHas(TokenToKVPoolAllocator):
    """Counts the free list alone, although the release list would do."""

    def _take(self, page_count: int) -> list[int] | None:
        return None if page_count > len(self.free_list) else super()._take(page_count)


@registry.mutant("SLOT-3", "SLOT-1")
class MergesWhenItRefuses(TokenToKVPoolAllocator):
    def _take(self, page_count: int) -> list[int] | None:
        taken = super()._take(page_count)
        if taken is None:
            self._merge()
        return taken


@registry.mutant("SLOT-4", "SLOT-1", reports=("SE-12",))
class AllocatesMinusOne(TokenToKVPoolAllocator):
    """A slice with a negative end: all but the last."""

    def alloc(self, need_size: int) -> Tensor | None:
        return super().alloc(need_size if need_size >= 0 else len(self.free_list) + need_size)


@registry.mutant("SLOT-5", "SLOT-1", reports=("SG-40305", "SE-12", "TRT-12667", "INV-003"))
class TrustsTheCaller(TokenToKVPoolAllocator):
    """No detection where the users are: a slot freed twice is listed twice."""

    def _given_back(self, slots: list[int]) -> list[int]:
        return slots


@registry.mutant("SLOT-5", reports=("VL-42571", "UCM-1053"))
class TakesRepeatsForOne(TokenToKVPoolAllocator):
    def _given_back(self, slots: list[int]) -> list[int]:
        return super()._given_back(list(dict.fromkeys(slots)))


@registry.mutant("SLOT-5", "SLOT-1")
class FreesBeforeItLooks(TokenToKVPoolAllocator):
    """What comes before the bad slot is freed all the same."""

    def free(self, free_index: Slots) -> None:
        if isinstance(free_index, list) and len(free_index) > 1:
            for slot in free_index:
                super().free([slot])
        else:
            super().free(free_index)


@registry.mutant("SLOT-6", "SLOT-7", "SLOT-13", reports=("VL-42273",))
class FreesToTheHead(TokenToKVPoolAllocator):
    def _waiting(self, before: list[int], pages: list[int]) -> list[int]:
        return pages + before


@registry.mutant("SLOT-6", "SLOT-9", "SLOT-7")
class MergesUnsorted(TokenToKVPoolAllocator):
    def _merge(self) -> None:
        joined = self.free_list + self.release
        super()._merge()
        self.free_list = joined


@registry.mutant("SLOT-7", "SLOT-1", "SLOT-5")
class FreesAtOnceInAGroup(TokenToKVPoolAllocator):
    def _put_back(self, pages: list[int]) -> None:
        group, self.group = self.group, False
        super()._put_back(pages)
        self.group = group


@registry.mutant("SLOT-7", reports=("SE-20",))
class KeepsTheCallersTensor(TokenToKVPoolAllocator):
    """Reads what waits when the group ends, from memory that is the caller's."""

    kept: Slots | None = None

    def free(self, free_index: Slots) -> None:
        super().free(free_index)
        self.kept = free_index if self.group and isinstance(free_index, Tensor) else None

    def free_group_end(self) -> None:
        if self.kept is not None:
            self.pending = numbers(self.kept, "SLOT-11")
        super().free_group_end()


@registry.mutant("SLOT-8", "SLOT-1", reports=("SE-20", "INV-014"))
class NestedBeginDropsWhatWaits(TokenToKVPoolAllocator):
    def free_group_begin(self) -> None:
        self.pending, self.group = [], False
        super().free_group_begin()


@registry.mutant("SLOT-8", "SLOT-1")
class EndsNoGroup(TokenToKVPoolAllocator):
    def free_group_end(self) -> None:
        if self.group:
            super().free_group_end()


@registry.mutant("SLOT-9", "SLOT-1")
class RestoresTheFirstOnly(TokenToKVPoolAllocator):
    def restore_state(self, state: Any) -> None:
        if isinstance(state, Ticket):
            self.handed_out = self.handed_out[: state.taken + 1]
        super().restore_state(state)


@registry.mutant("SLOT-9")
class ClearKeepsTheOrder(TokenToKVPoolAllocator):
    def _start(self) -> None:
        before = getattr(self, "free_list", [])
        super()._start()
        rest = [slot for slot in self.free_list if slot not in before]
        self.free_list = [*before, *rest]


@registry.mutant("SLOT-10", "SLOT-1", "SLOT-9", reports=("SE-20", "INV-014"))
class RestoresAfterAFree(TokenToKVPoolAllocator):
    """Puts the lists back as they were: what was freed in between is lost."""

    def backup_state(self) -> Any:
        return self, list(self.free_list), list(self.release)

    def restore_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or state[0] is not self:
            raise ContractError("SLOT-10: this is no ticket of this allocator")
        self.free_list, self.release = list(state[1]), list(state[2])


@registry.mutant("SLOT-10")
class TakesAnybodysTicket(TokenToKVPoolAllocator):
    def restore_state(self, state: Any) -> None:
        if isinstance(state, Ticket):
            super().restore_state(state._replace(owner=self._owner))
        else:
            super().restore_state(state)


@registry.mutant("SLOT-11")
class TakesAnySize(TokenToKVPoolAllocator):
    def __init__(self, size: int, **given: Any) -> None:
        super().__init__(size=min(max(size, 0), 100), **given)


@registry.mutant("SLOT-11")
class RoundsWhatItIsGiven(TokenToKVPoolAllocator):
    def free(self, free_index: Any) -> None:
        if isinstance(free_index, Tensor) and free_index.is_floating_point():
            free_index = free_index.long()
        super().free(free_index)


@registry.mutant("SLOT-12")
class CopiesTheList(TokenToKVPoolAllocator):
    """Every free copies the free list: O(pool)."""

    def _put_back(self, pages: list[int]) -> None:
        super()._put_back(pages)
        self._pages_moved += len(self.free_list)


@registry.mutant("SLOT-13", "SLOT-1")
class CriesWolf(TokenToKVPoolAllocator):
    def check(self) -> None:
        if self.pending:
            raise ContractError("SLOT-1: some slots are in no list")


@registry.mutant("SLOT-13", "SLOT-1", reports=("SG-28754",))
class CountsOnly(TokenToKVPoolAllocator):
    """Stands for its view by counts, which aliases leave as they are."""

    def digest(self) -> int:
        return len(self.free_list) * 10_000 + len(self.release) * 100 + len(self.pending)


@registry.mutant("SLOT-2", "SLOT-7")
class HandsOutItsOwnMemory(TokenToKVPoolAllocator):
    """The result is a view of storage that the next calls write."""

    def alloc(self, need_size: int) -> Tensor | None:
        slots = super().alloc(need_size)
        if slots is None:
            return None
        if not hasattr(self, "shared"):
            self.shared = tensor(range(64))
        self.shared[: len(slots)] = slots
        return self.shared[: len(slots)]
