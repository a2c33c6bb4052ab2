"""Slot allocators with one clause of SLOT broken."""

from torch import Tensor

from allocator_mutants import plant
from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.slot_allocator import SlotAllocatorConformance
from kvspec.oracle.slot_allocator import TokenToKVPoolAllocator

registry = Registry(SlotAllocatorConformance, oracle)
plant(
    registry,
    TokenToKVPoolAllocator,
    SlotAllocatorConformance.law,
    LosesTheLastOfThree=("INV-005",),
    HandsOutTheSink=("INV-001", "INV-002", "INV-004"),
    AllocatesMinusOne=("SE-12",),
    KeepsTheCallersTensor=("SE-20",),
    NestedBeginDropsWhatWaits=("SE-20", "INV-014"),
    RestoresAfterAFree=("SE-20", "INV-014"),
    FreesToTheOtherEnd=("VL-42273",),
    CountsOnly=("SG-28754",),
)


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


@registry.mutant("SLOT-5", "SLOT-1", reports=("SG-40305", "SE-12", "TRT-12667", "INV-003"))
class TrustsTheCaller(TokenToKVPoolAllocator):
    """No detection where the users are: a slot freed twice is listed twice."""

    def _given_back(self, slots: list[int]) -> list[int]:
        return slots


@registry.mutant("SLOT-5", reports=("VL-42571", "UCM-1053"))
class TakesRepeatsForOne(TokenToKVPoolAllocator):
    def _given_back(self, slots: list[int]) -> list[int]:
        return super()._given_back(list(dict.fromkeys(slots)))
