"""Page allocators with one clause of PAGE broken."""

from typing import Any

from torch import Tensor

from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.page_allocator import PageAllocatorConformance
from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle.boundary import numbers, tensor
from kvspec.oracle.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.oracle.slot_allocator import Ticket

registry = Registry(PageAllocatorConformance, oracle)


@registry.mutant("PAGE-1", "PAGE-9", "PAGE-11", reports=("INV-005",))
class LosesTheLastOfThree(PagedTokenToKVPoolAllocator):
    """A freed page that goes nowhere: a leak."""

    def _given_back(self, slots: list[int]) -> list[int]:
        given = super()._given_back(slots)
        return given[:-1] if len(given) == 3 else given


@registry.mutant(
    "PAGE-2", "PAGE-1", "PAGE-3", "PAGE-13", reports=("INV-001", "INV-002", "SG-38269")
)
class HandsOutTheSink(PagedTokenToKVPoolAllocator):
    """After a clear, page 0 is a page like any other."""

    def clear(self) -> None:
        super().clear()
        self.free_list.insert(0, 0)


@registry.mutant("PAGE-3", "PAGE-16", reports=("INV-011",))
class HandsOutItsOwnMemory(PagedTokenToKVPoolAllocator):
    """The result is a view of storage that the next calls write."""

    def alloc(self, need_size: int) -> Tensor | None:
        slots = super().alloc(need_size)
        if slots is None:
            return None
        if not hasattr(self, "shared"):
            self.shared = tensor(range(4096))
        self.shared[: len(slots)] = slots
        return self.shared[: len(slots)]


@registry.mutant("PAGE-3", "PAGE-17", reports=("SE-14",))
class UsesTheRemainder(PagedTokenToKVPoolAllocator):
    """A size that leaves a remainder of 3 gives one page too many."""

    @property
    def page_count(self) -> int:
        return (self.size + (self.size % self.page_size == 3)) // self.page_size


@registry.mutant("PAGE-4", "PAGE-1", "PAGE-11")
class MergesWhenItRefuses(PagedTokenToKVPoolAllocator):
    def _take(self, page_count: int) -> list[int] | None:
        taken = super()._take(page_count)
        if taken is None:
            self._merge()
        return taken


@registry.mutant("PAGE-4", "PAGE-1", "PAGE-6", "PAGE-11", reports=("SG-33794",))
class CountsTokensNotPages(PagedTokenToKVPoolAllocator):
    """Takes what there is when the tokens would fit, and gives the rest of the batch the sink."""

    def _take(self, page_count: int) -> list[int] | None:
        there = len(self.free_list) + len(self.release)
        if there < page_count <= there * self.page_size and there > 0:
            return [*(super()._take(there) or []), *[0] * (page_count - there)]
        return super()._take(page_count)


@registry.mutant("PAGE-5", reports=("SE-13",))
class FloorsToPages(PagedTokenToKVPoolAllocator):
    def alloc(self, need_size: int) -> Tensor | None:
        return super().alloc(need_size - need_size % self.page_size if need_size > 0 else need_size)


@registry.mutant("PAGE-5", "PAGE-1", reports=("SE-12",))
class AllocatesMinusOne(PagedTokenToKVPoolAllocator):
    """A slice with a negative end: all but the last page."""

    def alloc(self, need_size: int) -> Tensor | None:
        if need_size < 0 and need_size % self.page_size == 0:
            need_size = max(0, self.available_size() + need_size)
        return super().alloc(need_size)


@registry.mutant("PAGE-6", "PAGE-1", "PAGE-7", "PAGE-8", "PAGE-17")
class LeavesASlotOut(PagedTokenToKVPoolAllocator):
    """A batch whose first request continues a page goes on one slot too far."""

    def _place(
        self, prefixes: list[int], lengths: list[int], last: list[int], pages: list[int]
    ) -> list[int]:
        slots = super()._place(prefixes, lengths, last, pages)
        return [slot + 1 if prefixes[0] % self.page_size else slot for slot in slots]


@registry.mutant("PAGE-6", "PAGE-7", "PAGE-16")
class GivesPagesFromTheLastRequestOn(PagedTokenToKVPoolAllocator):
    def _place(
        self, prefixes: list[int], lengths: list[int], last: list[int], pages: list[int]
    ) -> list[int]:
        return super()._place(prefixes, lengths, last, pages[::-1])


@registry.mutant("PAGE-7", "PAGE-1", reports=("INV-012",))
class DecodesOneTooLate(PagedTokenToKVPoolAllocator):
    """Opens the next page one token too late, beyond the page that is full."""

    def alloc_decode(self, seq_lens: Slots, last_loc: Slots) -> Tensor | None:
        slots = super().alloc_decode(seq_lens, last_loc)
        if slots is None:
            return None
        pairs = zip(numbers(slots, "PAGE-17"), numbers(last_loc, "PAGE-17"), strict=True)
        return tensor([slot if last < 0 else last + 1 for slot, last in pairs])


@registry.mutant("PAGE-8", "PAGE-1", reports=("INV-012",))
class TrustsLastLoc(PagedTokenToKVPoolAllocator):
    """Checks nothing of where a request goes on."""

    def _fault(self, prefix: int, length: int, slot: int) -> str:
        return "" if 0 <= prefix <= length else super()._fault(prefix, length, slot)


@registry.mutant("PAGE-8", reports=("SG-28754",))
class SharesAPage(PagedTokenToKVPoolAllocator):
    """Two requests may continue the same page: both write the same slots."""

    def _refuse_bad_requests(
        self, prefixes: list[int], lengths: list[int], last: list[int], tokens: int
    ) -> None:
        if len(prefixes) == len(lengths) == len(last) and sum(lengths) - sum(prefixes) == tokens:
            for one in zip(prefixes, lengths, last, strict=True):
                super()._refuse_bad_requests([one[0]], [one[1]], [one[2]], one[1] - one[0])
        else:
            super()._refuse_bad_requests(prefixes, lengths, last, tokens)


@registry.mutant("PAGE-9", "PAGE-1", "PAGE-10", "PAGE-11", "PAGE-14", "PAGE-16", "PAGE-17")
class FreesPagesNamedByTheirFirstSlot(PagedTokenToKVPoolAllocator):
    def _given_back(self, slots: list[int]) -> list[int]:
        super()._given_back(slots)
        return super()._given_back([slot for slot in slots if slot % self.page_size == 0])


@registry.mutant("PAGE-9", "PAGE-1", "PAGE-16", "PAGE-19", reports=("VL-42571", "VL-3347"))
class FreesOncePerSlot(PagedTokenToKVPoolAllocator):
    """A page named twice in one call is listed twice."""

    def _given_back(self, slots: list[int]) -> list[int]:
        super()._given_back(slots)
        whole = len(set(slots)) == len(slots)
        pages = [slot // self.page_size for slot in slots]
        return sorted({*pages} if whole else pages)


@registry.mutant(
    "PAGE-10", "PAGE-1", reports=("SE-11", "SG-38941", "SG-40305", "JAX-982", "INV-003", "INV-016")
)
class FreesAPageInTwoCalls(PagedTokenToKVPoolAllocator):
    """Does not look whether the page of a slot is free already."""

    def _refuse_not_held(self, page: int, held: frozenset[int]) -> None:
        if not 0 < page <= self.page_count:
            super()._refuse_not_held(page, held)


@registry.mutant("PAGE-10", "PAGE-1", reports=("SG-38269", "INV-001", "UCM-1053"))
class FreesTheSink(PagedTokenToKVPoolAllocator):
    def _given_back(self, slots: list[int]) -> list[int]:
        others = [slot for slot in slots if not 0 <= slot < self.page_size]
        return [0] * (len(others) < len(slots)) + super()._given_back(others)


@registry.mutant("PAGE-10", "PAGE-1")
class FreesBeforeItLooks(PagedTokenToKVPoolAllocator):
    """What comes before the bad slot is freed all the same."""

    def free(self, free_index: Slots) -> None:
        try:
            super().free(free_index)
        except ContractError as error:
            if error.clause == "PAGE-10" and isinstance(free_index, list):
                super().free([slot for slot in free_index if slot // self.page_size in self.held])
            raise


@registry.mutant("PAGE-11", "PAGE-1", "PAGE-10", "PAGE-8", "PAGE-14")
class FreesAtOnceInAGroup(PagedTokenToKVPoolAllocator):
    def _put_back(self, pages: list[int]) -> None:
        group, self.group = self.group, False
        super()._put_back(pages)
        self.group = group


@registry.mutant("PAGE-11")
class EndsInTheOrderOfFrees(PagedTokenToKVPoolAllocator):
    def free_group_end(self) -> None:
        if self.group:
            later = self.pending[::-1]
            super().free_group_end()
            for pages in (self.free_list, self.release):
                if later and set(later) <= set(pages):
                    pages[: len(later)] = later
        else:
            super().free_group_end()


@registry.mutant("PAGE-11", reports=("SE-20",))
class KeepsTheCallersTensor(PagedTokenToKVPoolAllocator):
    """Reads what waits when the group ends, from memory that is the caller's."""

    kept: Slots | None = None

    def free(self, free_index: Slots) -> None:
        super().free(free_index)
        self.kept = free_index if self.group and isinstance(free_index, Tensor) else None

    def free_group_end(self) -> None:
        if self.kept is not None:
            self.pending = [slot // self.page_size for slot in numbers(self.kept, "PAGE-17")][:1]
        super().free_group_end()


@registry.mutant("PAGE-12", "PAGE-1", reports=("SE-20", "INV-014"))
class NestedBeginDropsWhatWaits(PagedTokenToKVPoolAllocator):
    def free_group_begin(self) -> None:
        self.pending, self.group = [], False
        super().free_group_begin()


@registry.mutant("PAGE-12", "PAGE-1")
class EndsNoGroup(PagedTokenToKVPoolAllocator):
    def free_group_end(self) -> None:
        if self.group:
            super().free_group_end()


@registry.mutant("PAGE-13")
class ClearKeepsTheOrder(PagedTokenToKVPoolAllocator):
    def _start(self) -> None:
        before = getattr(self, "free_list", [])
        super()._start()
        rest = [page for page in self.free_list if page not in before]
        self.free_list = [*before, *rest]


@registry.mutant("PAGE-13", "PAGE-1")
class ClearKeepsTheGroupOpen(PagedTokenToKVPoolAllocator):
    def clear(self) -> None:
        group = self.group
        super().clear()
        self.group = group


@registry.mutant("PAGE-14", "PAGE-1", reports=("JAX-1147",))
class RestoresTheFirstOnly(PagedTokenToKVPoolAllocator):
    """Of several allocations since the ticket, the later ones are lost."""

    def restore_state(self, state: Any) -> None:
        if isinstance(state, Ticket):
            self.handed_out = self.handed_out[: state.taken + 1]
        super().restore_state(state)


@registry.mutant("PAGE-14")
class RestoresToTheTail(PagedTokenToKVPoolAllocator):
    def restore_state(self, state: Any) -> None:
        there = len(self.free_list)
        super().restore_state(state)
        put_back = len(self.free_list) - there
        self.free_list = self.free_list[put_back:] + self.free_list[:put_back]


@registry.mutant("PAGE-15", "PAGE-1", "PAGE-14", reports=("SE-20", "INV-014"))
class RestoresAfterAFree(PagedTokenToKVPoolAllocator):
    """Puts the lists back as they were: what was freed in between is lost."""

    def backup_state(self) -> Any:
        return self, list(self.free_list), list(self.release)

    def restore_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or state[0] is not self:
            raise ContractError("PAGE-15: this is no ticket of this allocator")
        self.free_list, self.release = list(state[1]), list(state[2])


@registry.mutant("PAGE-15")
class TakesAnybodysTicket(PagedTokenToKVPoolAllocator):
    def restore_state(self, state: Any) -> None:
        if isinstance(state, Ticket):
            super().restore_state(state._replace(owner=self._owner))
        else:
            super().restore_state(state)


@registry.mutant("PAGE-16", "PAGE-11", "PAGE-14", "PAGE-20", reports=("VL-42273",))
class FreesToTheTail(PagedTokenToKVPoolAllocator):
    def _waiting(self, before: list[int], pages: list[int]) -> list[int]:
        return before + pages


@registry.mutant("PAGE-16", "PAGE-14")
class MergesUnsorted(PagedTokenToKVPoolAllocator):
    def _merge(self) -> None:
        joined = self.free_list + self.release
        super()._merge()
        self.free_list = joined


@registry.mutant("PAGE-16", "PAGE-14", "PAGE-18", "PAGE-20")
class MergesAtOnce(PagedTokenToKVPoolAllocator):
    """Merges although the free list could serve."""

    def _take(self, page_count: int) -> list[int] | None:
        if self.release and page_count and page_count <= len(self.free_list):
            self._merge()
        return super()._take(page_count)


@registry.mutant("PAGE-17")
class TakesAnySize(PagedTokenToKVPoolAllocator):
    def __init__(self, size: int, page_size: int, **given: Any) -> None:
        size, page_size = min(max(size, 0), 1000), min(max(page_size, 1), 64)
        super().__init__(size=size, page_size=page_size, **given)


@registry.mutant("PAGE-17")
class RoundsWhatItIsGiven(PagedTokenToKVPoolAllocator):
    def free(self, free_index: Any) -> None:
        if isinstance(free_index, Tensor) and free_index.is_floating_point():
            free_index = free_index.long() * self.page_size
        super().free(free_index)


@registry.mutant("PAGE-18")
class CopiesTheList(PagedTokenToKVPoolAllocator):
    """Every free copies the free list: O(pool)."""

    def _put_back(self, pages: list[int]) -> None:
        super()._put_back(pages)
        self._pages_moved += len(self.free_list)


@registry.mutant("PAGE-19", "PAGE-1")
class CriesWolf(PagedTokenToKVPoolAllocator):
    def check(self) -> None:
        if self.pending:
            raise ContractError("PAGE-1: some pages are in no list")


@registry.mutant("PAGE-20", "PAGE-1", reports=("SG-28754", "SG-38045"))
class CountsOnly(PagedTokenToKVPoolAllocator):
    """Stands for its view by counts, which aliases leave as they are."""

    def digest(self) -> int:
        return len(self.free_list) * 10_000 + len(self.release) * 100 + len(self.pending)
