"""Page allocators with one clause of PAGE broken."""

from torch import Tensor

from allocator_mutants import plant
from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.page_allocator import PageAllocatorConformance
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle.boundary import numbers, tensor
from kvspec.oracle.page_allocator import PagedTokenToKVPoolAllocator

registry = Registry(PageAllocatorConformance, oracle)
plant(
    registry,
    PagedTokenToKVPoolAllocator,
    PageAllocatorConformance.law,
    LosesTheLastOfThree=("INV-005",),
    HandsOutTheSink=("INV-001", "INV-002", "SG-38269"),
    HandsOutItsOwnMemory=("INV-011",),
    AllocatesMinusOne=("SE-12",),
    FreesWhatIsFree=("SE-11", "SG-38941", "SG-40305", "JAX-982", "INV-003", "INV-016"),
    KeepsTheCallersTensor=("SE-20",),
    NestedBeginDropsWhatWaits=("SE-20", "INV-014"),
    RestoresTheFirstOnly=("JAX-1147",),
    RestoresAfterAFree=("SE-20", "INV-014"),
    FreesToTheOtherEnd=("VL-42273",),
    CountsOnly=("SG-28754", "SG-38045"),
)


@registry.mutant("PAGE-3", "PAGE-17", reports=("SE-14",))
class UsesTheRemainder(PagedTokenToKVPoolAllocator):
    """A size that leaves a remainder of 3 gives one page too many."""

    @property
    def page_count(self) -> int:
        return (self.size + (self.size % self.page_size == 3)) // self.page_size


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


@registry.mutant("PAGE-10", "PAGE-1", reports=("SG-38269", "INV-001", "UCM-1053"))
class FreesTheSink(PagedTokenToKVPoolAllocator):
    def _given_back(self, slots: list[int]) -> list[int]:
        others = [slot for slot in slots if not 0 <= slot < self.page_size]
        return [0] * (len(others) < len(slots)) + super()._given_back(others)


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


@registry.mutant("PAGE-16", "PAGE-14", "PAGE-18", "PAGE-20")
class MergesAtOnce(PagedTokenToKVPoolAllocator):
    """Merges although the free list could serve."""

    def _take(self, page_count: int) -> list[int] | None:
        if self.release and page_count and page_count <= len(self.free_list):
            self._merge()
        return super()._take(page_count)
