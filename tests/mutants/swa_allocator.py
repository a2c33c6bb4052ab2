"""Allocators of two pools with one clause of SWA broken."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from allocator_mutants import plant
from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.swa_allocator import SWAAllocatorConformance
from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle.boundary import numbers, tensor
from kvspec.oracle.digest import mix
from kvspec.oracle.swa_allocator import SWATokenToKVPoolAllocator

registry = Registry(SWAAllocatorConformance, oracle)
plant(
    registry,
    SWATokenToKVPoolAllocator,
    SWAAllocatorConformance.law,
    HandsOutTheSink=("SG-38269",),
)


@registry.mutant(
    "SWA-1", "SWA-2", "SWA-8", "SWA-10", "SWA-14", "SWA-22", "SWA-23", reports=("INV-005",)
)
class LosesAWindowPage(SWATokenToKVPoolAllocator):
    """Of three pairs given back at once, the last goes nowhere: a leak."""

    def _give_back(self, call: str, pages: list[int], alone: list[int]) -> None:
        last = (pages + alone)[2:3]
        for page in last:
            self.pairs.pop(page, None)
        super()._give_back(call, pages, alone)


@registry.mutant(
    *("SWA-2", "SWA-1", "SWA-3", "SWA-8", "SWA-17", "SWA-20", "SWA-22", "SWA-24"),
    reports=("SG-25805", "SEED-25", "INV-009"),
)
class KeepsThePairsOfFreePages(SWATokenToKVPoolAllocator):
    """A full page, freed alone, still says whose window page it had when it is reused."""

    def _give_back(self, call: str, pages: list[int], alone: list[int]) -> None:
        stale = {page: self.pairs[page] for page in pages[:1] if page in self.pairs}
        if len(pages) > 1 or self.group:
            stale = {}
        super()._give_back(call, pages, alone)
        self.pairs.update(stale)


@registry.mutant("SWA-3", "SWA-1", "SWA-17", "SWA-22", "SWA-24")
class PairsFromTheTail(SWATokenToKVPoolAllocator):
    """Pairs a page that is taken alone with the window page that the free list ends with."""

    def _take(self, page_count: int) -> list[int] | None:
        if page_count == 1:
            free = self.window.free_list
            self.window.free_list = free[-1:] + free[:-1]
        return super()._take(page_count)


@registry.mutant("SWA-4", "SWA-1")
class TakesFromOnePoolFirst(SWATokenToKVPoolAllocator):
    """What was taken from the full pool is lost when the window pool has too little."""

    def _take(self, page_count: int) -> list[int] | None:
        if page_count * self.page_size > self.swa_available_size():
            super(SWATokenToKVPoolAllocator, self)._take(page_count)
            return None
        return super()._take(page_count)


@registry.mutant("SWA-4", "SWA-1", "SWA-6", "SWA-14", reports=("SG-33794",))
class CountsTokensNotPages(SWATokenToKVPoolAllocator):
    """Takes what there is when the tokens would fit, and gives the rest of the batch the sink."""

    def _take(self, page_count: int) -> list[int] | None:
        there = self.available_size() // self.page_size
        if there < page_count <= there * self.page_size:
            return [*(super()._take(there) or []), *[0] * (page_count - there)]
        return super()._take(page_count)


@registry.mutant("SWA-5", reports=("SE-13",))
class FloorsToPages(SWATokenToKVPoolAllocator):
    def alloc(self, need_size: int) -> Tensor | None:
        return super().alloc(need_size - need_size % self.page_size if need_size > 0 else need_size)


@registry.mutant("SWA-6", "SWA-1", "SWA-2", "SWA-4", "SWA-7", "SWA-17")
class PairsTheFirstRequestAlone(SWATokenToKVPoolAllocator):
    """Of several pages that a batch begins, all but one give their window pages back."""

    def _extend(self, name: str, *given: Any) -> Tensor | None:
        before = self.pairs.keys() | set()
        slots = super()._extend(name, *given)
        for page in sorted(self.pairs.keys() - before)[1:]:
            self.window._put_back([self.pairs.pop(page)])
        return slots

    def _take_back(self, taken: int) -> list[int]:
        self.pairs.update((page, 0) for page in self.handed_out if page not in self.pairs)
        return super()._take_back(taken)


@registry.mutant("SWA-7", "SWA-1")
class ContinuesPagesWithoutAPair(SWATokenToKVPoolAllocator):
    """Window layers write through a pair that is not there: into the sink."""

    def _fault(self, prefix: int, length: int, slot: int) -> str:
        return super(SWATokenToKVPoolAllocator, self)._fault(prefix, length, slot)


@registry.mutant("SWA-7", "SWA-1", "SWA-6")
class AsksForAPairOfWholePages(SWATokenToKVPoolAllocator):
    """A request whose last page is full cannot go on once the window has left it."""

    def _fault(self, prefix: int, length: int, slot: int) -> str:
        page = slot // self.page_size
        without = f"goes on after page {page}" if prefix and page not in self.pairs else ""
        return super()._fault(prefix, length, slot) or without


@registry.mutant("SWA-8", "SWA-1", "SWA-14", "SWA-17", "SWA-18", "SWA-22")
class FreesOneListAlone(SWATokenToKVPoolAllocator):
    """Does not look at the pairs that are named beside the pages."""

    def free(self, free_index: Slots, swa_index: Slots = ()) -> None:
        self._paired("free", numbers(swa_index, "SWA-21"), "SWA-9", taken=self._held_of(free_index))
        super().free(free_index)

    def _held_of(self, slots: Slots) -> list[int]:
        return [slot // self.page_size for slot in numbers(slots, "SWA-21")]


@registry.mutant("SWA-8", "SWA-1", "SWA-14", "SWA-17", "SWA-22")
class FreesThePairsNamedAlone(SWATokenToKVPoolAllocator):
    """The pairs of the pages are lost when those of others are named beside them."""

    def _give_back(self, call: str, pages: list[int], alone: list[int]) -> None:
        for page in pages if alone else ():
            self.pairs.pop(page, None)
        super()._give_back(call, pages, alone)


@registry.mutant(
    "SWA-8", "SWA-1", "SWA-2", "SWA-14", "SWA-17", "SWA-22", reports=("SEED-25", "SG-27586")
)
class KeepsThePairsNamedAlone(SWATokenToKVPoolAllocator):
    """Still maps to window pages that it gave back: the next free takes them from others."""

    def free(self, free_index: Slots, swa_index: Slots = ()) -> None:
        before = dict(self.pairs)
        super().free(free_index, swa_index)
        self.pairs = {page: before[page] for page in before if page in self.held} | self.pairs


@registry.mutant("SWA-9", "SWA-1", "SWA-18", "SWA-21", "SWA-22")
class FreesTheFirstListFirst(SWATokenToKVPoolAllocator):
    """The pages are gone when the pairs are found bad."""

    def free(self, free_index: Slots, swa_index: Slots = ()) -> None:
        super().free(free_index)
        super().free([], swa_index)


@registry.mutant("SWA-9", "SWA-1", reports=("INV-010",))
class TakesAPageForItsPair(SWATokenToKVPoolAllocator):
    """A page may be named in both lists."""

    def _paired(self, call: str, slots: list[int], clause: str, **given: Any) -> list[int]:
        taken = given.pop("taken", ())
        pages = super()._paired(call, slots, clause, **given)
        return [page for page in pages if page not in taken]


@registry.mutant("SWA-10", "SWA-1")
class FreesTheWholePage(SWATokenToKVPoolAllocator):
    """A page of which every slot is named is given back as well."""

    def free_swa(self, free_index: Slots) -> None:
        super().free_swa(free_index)
        named = [slot // self.page_size for slot in numbers(free_index, "SWA-21")]
        if not self.queue:
            self._put_back([page for page in self.held if named.count(page) == self.page_size])


@registry.mutant("SWA-10", "SWA-1", "SWA-22", reports=("VL-42571", "INV-008"))
class FreesOncePerSlot(SWATokenToKVPoolAllocator):
    """A page of which two slots are named gives its pair back twice."""

    def free_swa(self, free_index: Slots) -> None:
        slots = [] if self.queue else numbers(free_index, "SWA-21")
        named = [slot // self.page_size for slot in slots]
        twice = [self.pairs[page] for page in self.pairs if named.count(page) > 1]
        super().free_swa(free_index)
        self.window._put_back(twice)


@registry.mutant("SWA-11", "SWA-1", reports=("SG-38269", "INV-010", "UCM-1053"))
class FreesTheSinkForAMissingPair(SWATokenToKVPoolAllocator):
    """What has no pair is mapped to the sink, and so the sink is given back."""

    def free_swa(self, free_index: Slots) -> None:
        slots = numbers(free_index, "SWA-21")
        paired = [slot for slot in slots if slot // self.page_size in self.pairs]
        missing = [slot for slot in slots if slot // self.page_size in self.held]
        if len(missing) < len(slots) or len(paired) == len(slots):
            super().free_swa(free_index)
        else:
            super().free_swa(paired)
            self.window._put_back([0])


@registry.mutant("SWA-11", "SWA-1")
class FreesPairsOnce(SWATokenToKVPoolAllocator):
    """A second call says nothing, like the first: who called it twice does not hear of it."""

    def free_swa(self, free_index: Slots) -> None:
        slots = numbers(free_index, "SWA-21")
        if not all(slot // self.page_size in self.held for slot in slots):
            super().free_swa(free_index)
        else:
            super().free_swa([slot for slot in slots if slot // self.page_size in self.pairs])


@registry.mutant("SWA-12", "SWA-1", "SWA-2", "SWA-20", "SWA-23", "SWA-24", reports=("INV-009",))
class CopiesThePair(SWATokenToKVPoolAllocator):
    """After a move both pages have it: the first to be freed takes it from the other."""

    def move_swa(self, tgt_loc: Slots, src_loc: Slots) -> None:
        before = dict(self.pairs)
        super().move_swa(tgt_loc, src_loc)
        self.pairs = before | self.pairs


@registry.mutant("SWA-12", "SWA-1", "SWA-2", "SWA-20", "SWA-24", "SWA-23")
class MovesThroughTheFreeList(SWATokenToKVPoolAllocator):
    """The target gets the next free window page, and the source gives its own back."""

    def move_swa(self, tgt_loc: Slots, src_loc: Slots) -> None:
        super().move_swa(tgt_loc, src_loc)
        for slot in numbers(tgt_loc, "SWA-21"):
            page = slot // self.page_size
            self.window._put_back([self.pairs[page]])
            self.pairs[page] = (self.window._take(1) or [0])[0]


@registry.mutant("SWA-13", "SWA-1")
class MovesOntoPairs(SWATokenToKVPoolAllocator):
    """The window page that the target had is no one's."""

    def _pair_of(self, page: int) -> str:
        return ""


@registry.mutant("SWA-13", "SWA-1")
class MovesAsFarAsItCan(SWATokenToKVPoolAllocator):
    """What comes before the bad page is moved all the same."""

    def move_swa(self, tgt_loc: Slots, src_loc: Slots) -> None:
        targets, sources = numbers(tgt_loc, "SWA-21"), numbers(src_loc, "SWA-21")
        if len(targets) != len(sources) or len({*targets}) < len(targets):
            super().move_swa(tgt_loc, src_loc)
        else:
            for target, source in zip(targets, sources, strict=True):
                super().move_swa([target], [source])


@registry.mutant("SWA-14", "SWA-1", "SWA-22", "SWA-17", "SWA-25")
class WindowPagesDoNotWait(SWATokenToKVPoolAllocator):
    """Inside a group the window pool has its pages back at once."""

    def _open_group(self) -> None:
        self.group = True

    def _close_group(self) -> list[int]:
        return super(SWATokenToKVPoolAllocator, self)._close_group()


@registry.mutant("SWA-14", "SWA-1", "SWA-2", "SWA-12", "SWA-17", "SWA-22", "SWA-24")
class PairsLastAsLongAsTheGroup(SWATokenToKVPoolAllocator):
    """What waits is still mapped to window pages that wait as well."""

    def _give_back(self, call: str, pages: list[int], alone: list[int]) -> None:
        before = dict(self.pairs) if self.group else {}
        super()._give_back(call, pages, alone)
        self.pairs = before | self.pairs

    def _close_group(self) -> list[int]:
        waiting = {*self.window.pending}
        self.pairs = {page: pair for page, pair in self.pairs.items() if pair not in waiting}
        return super()._close_group()


@registry.mutant("SWA-16", "SWA-1", "SWA-22")
class ClearKeepsThePairs(SWATokenToKVPoolAllocator):
    def clear(self) -> None:
        pairs = self.pairs
        super().clear()
        self.pairs = pairs


@registry.mutant("SWA-16", "SWA-1", "SWA-22")
class ClearKeepsTheWindow(SWATokenToKVPoolAllocator):
    """Only the full pool is cleared: the window pages that were held are lost."""

    def _start(self) -> None:
        super(SWATokenToKVPoolAllocator, self)._start()
        self.pairs = {}


@registry.mutant("SWA-17", "SWA-1", "SWA-22", "SWA-24", "SWA-18")
class RestoresOnePool(SWATokenToKVPoolAllocator):
    """The window pages handed out since are lost."""

    def _take_back(self, taken: int) -> list[int]:
        self.window.handed_out = []
        return super()._take_back(taken)


@registry.mutant("SWA-17", "SWA-1", "SWA-24", "SWA-18")
class RestoreKeepsThePairs(SWATokenToKVPoolAllocator):
    def _take_back(self, taken: int) -> list[int]:
        pairs = dict(self.pairs)
        pages = super()._take_back(taken)
        self.pairs = pairs
        return pages


@registry.mutant("SWA-18", "SWA-1", reports=("INV-014", "SE-20"))
class TicketsOutliveTheWindow(SWATokenToKVPoolAllocator):
    """Only what happens to full pages ends a ticket: the order of window pages is not theirs."""

    def _end_epoch(self, reason: str) -> None:
        if not reason.startswith("window"):
            super()._end_epoch(reason)

    def _take_back(self, taken: int) -> list[int]:
        self.pairs.update((page, 0) for page in self.handed_out if page not in self.pairs)
        return super()._take_back(taken)


@registry.mutant("SWA-18", "SWA-17", "SWA-1")
class EmptyCallsEndTickets(SWATokenToKVPoolAllocator):
    def free_swa(self, free_index: Slots) -> None:
        super().free_swa(free_index)
        self._end_epoch("window slots were freed")


@registry.mutant("SWA-19", "SWA-1", "SWA-4", "SWA-14")
class PromisesTheFullPool(SWATokenToKVPoolAllocator):
    """Says what the full pool has, and refuses what the window pool has not."""

    def available_size(self) -> int:
        return self.full_available_size()

    def _take(self, page_count: int) -> list[int] | None:
        enough = page_count * self.page_size <= self.swa_available_size()
        return super()._take(page_count) if enough else None


@registry.mutant("SWA-25")
class CountsTheFullPoolTwice(SWATokenToKVPoolAllocator):
    """Takes what waits in the full pool for what waits in the window pool."""

    def swa_pending_size(self) -> int:
        return self.pending_size()


@registry.mutant("SWA-20")
class TranslatesToTheFirstSlot(SWATokenToKVPoolAllocator):
    """Loses the offset in the page."""

    def _window_slot(self, slot: int) -> int:
        return super()._window_slot(slot - slot % self.page_size if slot > 0 else slot)


@registry.mutant("SWA-20", reports=("INV-009",))
class TakesMinusOneForASlot(SWATokenToKVPoolAllocator):
    """-1 is the last entry of the mapping."""

    def _window_slot(self, slot: int) -> int:
        return super()._window_slot(slot if slot >= 0 else 0)


@registry.mutant("SWA-21")
class TakesAnyWindow(SWATokenToKVPoolAllocator):
    def __init__(self, size: int, size_swa: int, **given: Any) -> None:
        in_range = 0 <= size < 2**31 - given.get("page_size", 1)
        super().__init__(size, min(max(size_swa, 0), 1000) if in_range else size_swa, **given)


@registry.mutant("SWA-21")
class TranslatesAnything(SWATokenToKVPoolAllocator):
    def translate_loc_from_full_to_swa(self, kv_indices: Slots) -> Tensor:
        slots = numbers(kv_indices, "SWA-21")
        return tensor([max(self._window_slot(slot), -1) for slot in slots]).int()


@registry.mutant("SWA-22", "SWA-1", "SWA-14", "SWA-17")
class GivesPairsBackBackwards(SWATokenToKVPoolAllocator):
    def _give_back(self, call: str, pages: list[int], alone: list[int]) -> None:
        in_order = self.window._in_order

        def backwards(pages: Sequence[int]) -> list[int]:
            return in_order(pages)[::-1]

        self.window.__dict__["_in_order"] = backwards
        super()._give_back(call, pages, alone)
        del self.window.__dict__["_in_order"]


@registry.mutant("SWA-23")
class CopiesTheMapping(SWATokenToKVPoolAllocator):
    """Every free_swa writes the pairs of the whole pool."""

    def free_swa(self, free_index: Slots) -> None:
        super().free_swa(free_index)
        self._pages_moved += self.page_count


@registry.mutant("SWA-24", "SWA-1")
class DigestLeavesThePairsOut(SWATokenToKVPoolAllocator):
    def digest(self) -> int:
        return mix(super(SWATokenToKVPoolAllocator, self).digest(), 1, self.window.digest())


@registry.mutant("SWA-24", "SWA-1")
class PoolsCancelOut(SWATokenToKVPoolAllocator):
    """Where both pools are alike, only the pairs are seen."""

    def digest(self) -> int:
        pairs = [page for pair in sorted(self.pairs.items()) for page in pair]
        full = super(SWATokenToKVPoolAllocator, self).digest()
        return mix(full, self.window.digest(), len(self.pairs), *pairs)


@registry.mutant("SWA-24", "SWA-1")
class ForbidsPagesWithoutAPair(SWATokenToKVPoolAllocator):
    """Takes a page whose pair was given back for a fault."""

    def check(self) -> None:
        super().check()
        if self.held != self.pairs.keys():
            raise ContractError("SWA-2: a page is held without a pair")
