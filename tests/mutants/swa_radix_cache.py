"""Radix caches with windows with one clause broken each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.swa_radix_cache import SWARadixCacheConformance
from kvspec.errors import ContractError
from kvspec.interfaces.prefix_cache import EvictResult, InsertRanges, LockReceipt
from kvspec.oracle import SWARadixCache
from kvspec.oracle.swa_radix_cache import Eviction
from kvspec.oracle.trie import Claim, Page, Root, TrieCache

registry = Registry(SWARadixCacheConformance, oracle)

GROWN = ("SWARADIX-7", "SWARADIX-8", "SWARADIX-10", "SWARADIX-21")
"""What is looked at while a whole cache grows: a fault anywhere in it is seen there."""
REVIVED = ("SWARADIX-9", "SWARADIX-10", "SWARADIX-14", "SWARADIX-18")
"""What is looked at after a revival."""
LOCKED = ("SWARADIX-10", "SWARADIX-13", "SWARADIX-15", "SWARADIX-18")
"""What is looked at under a window lock."""


class SeesNothingItself(SWARadixCache):
    """A fault that the cache's own `check` does not find: the tests must."""

    def check(self) -> None:
        """Nothing is wrong."""

    @contextmanager
    def _with_window(self, size: int) -> Iterator[None]:
        """Inside, windows have another size."""
        given, self.sliding_window_size = self.sliding_window_size, size
        try:
            yield
        finally:
            self.sliding_window_size = given


# Match


@registry.mutant(
    *("SWARADIX-1", "SWARADIX-2", "SWARADIX-5", "SWARADIX-11", "SWARADIX-14"), reports=("INV-061",)
)
class FindsAPathWhoseLastPageIsLive(SWARadixCache):
    def _usable(self, path: list[Page]) -> list[Page]:
        while path and path[-1] in self._tombstones:
            path = path[:-1]
        return path


@registry.mutant("SWARADIX-1", "SWARADIX-2", "SWARADIX-11", "SWARADIX-14", reports=("INV-061",))
class RoundsTheWindowOfAMatchDown(SeesNothingItself):
    def _usable(self, path: list[Page]) -> list[Page]:
        with self._with_window(max(self.sliding_window_size - self.page_size + 1, 1)):
            return super()._usable(path)


@registry.mutant(
    *("SWARADIX-1", "SWARADIX-11", "SWARADIX-14", "SWARADIX-15", "SWARADIX-18"),
    *("CACHE-19", "RADIX-17"),
)
class FindsNothingBeyondATombstone(SWARadixCache):
    def _usable(self, path: list[Page]) -> list[Page]:
        stop = next((n for n, page in enumerate(path) if page in self._tombstones), len(path))
        return path[:stop]


class RemembersWhatItCompared(SWARadixCache):
    compared: Sequence[Page] = ()

    def _usable(self, path: list[Page]) -> list[Page]:
        self.compared = path
        return super()._usable(path)


@registry.mutant("SWARADIX-2", reports=("SE-03",))
class RenewsWhatItComparedInVain(RemembersWhatItCompared):
    def _hit(self, path: Sequence[Page]) -> None:
        super()._hit(path)
        for page in self.compared:
            page.last = self._tick


@registry.mutant("SWARADIX-2")
class CountsAHitOnWhatItComparedInVain(RemembersWhatItCompared):
    def _hit(self, path: Sequence[Page]) -> None:
        super()._hit(path)
        for page in self.compared[len(path) :]:
            page.hits += 1


# Insert


@registry.mutant("SWARADIX-3", "SWARADIX-6", "SWARADIX-18", reports=("INV-060",))
class TakesEveryWholePage(SeesNothingItself):
    def _claim(self, frame: bytes, tokens: Sequence[int], slots: Sequence[int]) -> Claim:
        whole = TrieCache._claim(self, frame, tokens, slots)
        return whole._replace(windows=self._have_windows(slots))


@registry.mutant("SWARADIX-3", "SWARADIX-4")
class StopsAtTheFirstNewPageWithoutAPair(SWARadixCache):
    """Of a path that it has the beginning of."""

    def _claim(self, frame: bytes, tokens: Sequence[int], slots: Sequence[int]) -> Claim:
        claim = super()._claim(frame, tokens, slots)
        paired, stop = claim.windows[:: self.page_size], len(claim.resident)
        if not stop:
            return claim
        while stop < len(claim.pages) and paired[stop]:
            stop += 1
        return claim._replace(pages=claim.pages[:stop], numbers=claim.numbers[:stop])


@registry.mutant("SWARADIX-4", "SWARADIX-3", "SWARADIX-8", "SWARADIX-18", reports=("INV-062",))
class AdoptsThePageAfterALiveOneAsLive(SWARadixCache):
    """Of a path that it has the beginning of."""

    def _adopt(self, claim: Claim, priority: int) -> Page | Root:
        known = len(claim.resident)
        live = known and claim.resident[-1] not in self._tombstones
        node = super()._adopt(claim, priority)
        if live:
            self._tombstones -= set(self._path(node)[known : known + 1])
        return node


@registry.mutant(
    *("SWARADIX-5", "SWARADIX-6", "SWARADIX-8", "SWARADIX-11", *REVIVED), reports=("JAX-989",)
)
class RevivesNothing(SWARadixCache):
    """The next two revive some."""

    def _of(self, found: list[tuple[int, int]], claim: Claim) -> list[tuple[int, int]]:
        return []

    def _revivals(self, claim: Claim) -> list[tuple[int, int]]:
        return self._of(super()._revivals(claim), claim)

    def _adopt(self, claim: Claim, priority: int) -> Page | Root:
        before, revived = set(self._tombstones), {page for page, _ in self._revivals(claim)}
        node = super()._adopt(claim, priority)
        self._tombstones |= {page for page in before if page.number not in revived}
        return node


@registry.mutant("SWARADIX-5", "SWARADIX-6", reports=("JAX-989",))
class RevivesARunAsAWholeOrNot(RevivesNothing):
    def _of(self, found: list[tuple[int, int]], claim: Claim) -> list[tuple[int, int]]:
        gone = sum(page in self._tombstones for page in claim.resident)
        return found if len(found) == gone else []


@registry.mutant("SWARADIX-5", "SWARADIX-6", "SWARADIX-8", *REVIVED, reports=("JAX-989",))
class KeepsAPageOfMarginWhenItRevives(RevivesNothing):
    def _of(self, found: list[tuple[int, int]], claim: Claim) -> list[tuple[int, int]]:
        return found[1:] if len(found) > 1 else found


@registry.mutant("SWARADIX-5", reports=("INV-063",))
class MixesUpThePairsThatItMoves(SWARadixCache):
    def _move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        super()._move(targets, sources[::-1])


@registry.mutant("SWARADIX-5", *GROWN, *REVIVED, reports=("SG-27789",))
class RevivesWhileTheCallerKeepsThePair(SWARadixCache):
    def _move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Forgotten."""


class Sorts(SWARadixCache):
    """Sorts the caller's window slots in its own way."""

    def _sorted(self, claim: Claim, found: InsertRanges) -> InsertRanges:
        return found

    def _window_ranges(self, claim: Claim, kinds: Sequence[str]) -> InsertRanges:
        return self._sorted(claim, super()._window_ranges(claim, kinds))


@registry.mutant("SWARADIX-6")
class CallsWhatRevivesADuplicate(SWARadixCache):
    def _window_ranges(self, claim: Claim, kinds: Sequence[str]) -> InsertRanges:
        return super()._window_ranges(claim._replace(resident=[]), kinds)


@registry.mutant("SWARADIX-6")
class LosesTheTailOfTheWindowSlots(Sorts):
    def _sorted(self, claim: Claim, found: InsertRanges) -> InsertRanges:
        return found._replace(tail=[])


@registry.mutant("SWARADIX-6")
class SortsWindowSlotsThatAreNotThere(SWARadixCache):
    def _window_ranges(self, claim: Claim, kinds: Sequence[str]) -> InsertRanges:
        return super()._window_ranges(claim._replace(windows=[True] * len(kinds)), kinds)


# Tombstones and window locks


class LeavesTombstonesBehind(SeesNothingItself):
    """Evicts leaves without the tombstones above them."""

    phase: int

    def _victims(self, full_num_tokens: int, swa_num_tokens: int) -> Eviction:
        eviction = super()._victims(full_num_tokens, swa_num_tokens)
        if (full_num_tokens if self.phase == 2 else swa_num_tokens) == 0:
            stays: dict[Page, None] = {}
            for page in eviction.gone:
                below = any(other.before is page for other in stays)
                if below or page in self._tombstones or page in eviction.made:
                    stays[page] = None
            eviction.gone = [page for page in eviction.gone if page not in stays]
            eviction.left.update(stays)
        return eviction


@registry.mutant("SWARADIX-7", "SWARADIX-12", "SWARADIX-18", reports=("INV-060", "FKV-195"))
class LeavesTombstonesBehindForTheFullPool(LeavesTombstonesBehind):
    phase = 1


@registry.mutant(
    *("SWARADIX-7", "SWARADIX-13", "SWARADIX-15", "SWARADIX-16", "SWARADIX-20"),
    *(*GROWN, *REVIVED),
    reports=("INV-060", "FKV-195"),
)
class LeavesTombstonesBehindForTheWindowPool(LeavesTombstonesBehind):
    phase = 2


@registry.mutant("SWARADIX-8", "SWARADIX-16", "SWARADIX-18", *GROWN, reports=("SG-27586",))
class KeepsThePairOfATombstone(SeesNothingItself):
    """When pages leave in the same call."""

    def _give_back(self, pages: Sequence[int], windows: Sequence[int] = ()) -> None:
        super()._give_back(pages, () if pages else windows)


class LocksOtherwise(SeesNothingItself):
    """Has window locks on other pages than the last ones."""

    def _locked_window(self, path: Sequence[Page]) -> Sequence[Page]:
        return self._window_of(path)

    def _window_lock(self, path: Sequence[Page]) -> int | None:
        for page in self._locked_window(path):
            self._window_locks[page] = self._window_locks.get(page, 0) + 1
        return len(self._open) if len(self._window_of(path)) < len(path) else None

    def _unlock(self, receipt: LockReceipt) -> list[Page]:
        for page in self._locked_window(self._path(self._open[receipt])):
            self._window_locks[page] = self._window_locks.get(page, 0) - 1
        self._window_locks = {page: n for page, n in self._window_locks.items() if n > 0}
        return TrieCache._unlock(self, receipt)


@registry.mutant("SWARADIX-9", "SWARADIX-10", reports=("SG-27147", "SEED-6"))
class UnlocksTheWindowThatItWouldLockNow(LocksOtherwise):
    """A tombstone has no window lock: one revived since loses another's."""

    def _locked_window(self, path: Sequence[Page]) -> Sequence[Page]:
        return [page for page in self._window_of(path) if page not in self._tombstones]


@registry.mutant(
    *("SWARADIX-9", "SWARADIX-5", "SWARADIX-8", "RADIX-17", *LOCKED), reports=("INV-036",)
)
class LocksAPageLessThanTheWindow(LocksOtherwise):
    def _locked_window(self, path: Sequence[Page]) -> Sequence[Page]:
        window = self._window_of(path)
        return window[1:] if 1 < len(window) < len(path) else window


@registry.mutant(
    *("SWARADIX-9", "SWARADIX-5", "SWARADIX-8", "RADIX-17", *LOCKED), reports=("INV-036",)
)
class LocksTheWholePathInTheWindowPool(LocksOtherwise):
    def _locked_window(self, path: Sequence[Page]) -> Sequence[Page]:
        return path


@registry.mutant("SWARADIX-9", reports=("INV-035",))
class KeepsTheWindowLockOfATombstone(LocksOtherwise):
    """It has no lock any more, but a window lock."""

    def _unlock(self, receipt: LockReceipt) -> list[Page]:
        path, locks = self._path(self._open[receipt]), self._window_locks
        kept = {page: locks[page] for page in self._window_of(path) if page in self._tombstones}
        unlocked = super()._unlock(receipt)
        self._window_locks.update(kept)
        return unlocked


@registry.mutant("SWARADIX-10", reports=("INV-007",))
class CountsTombstonesUnderAWindowLock(SeesNothingItself):
    def swa_protected_size(self) -> int:
        return len(self._window_locks) * self.page_size


@registry.mutant("SWARADIX-10", reports=("INV-007",))
class CountsARevivedPageTwice(SeesNothingItself):
    drift = 0

    def _move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        super()._move(targets, sources)
        self.drift += self.page_size * (len(targets) > 1)

    def swa_evictable_size(self) -> int:
        return super().swa_evictable_size() + self.drift


@registry.mutant("SWARADIX-11")
class LocksWhatAMatchWouldNotGive(SWARadixCache):
    def inc_lock_ref(self, node: Any) -> Any:
        return TrieCache.inc_lock_ref(self, node)


@registry.mutant("SWARADIX-11")
class LooksAtTheEndOfAPathAlone(SWARadixCache):
    """Whose window has gone since it was found, all but its last page."""

    def inc_lock_ref(self, node: Any) -> Any:
        if not self.disable and self._live(node) in self._tombstones:
            raise ContractError("SWARADIX-11: the handle's last page is a tombstone")
        return TrieCache.inc_lock_ref(self, node)


# Evict


@registry.mutant("SWARADIX-12", "SWARADIX-2", "SWARADIX-16", "RADIX-11")
class EvictsTheMostRecentLeaf(SWARadixCache):
    def _victims(self, full_num_tokens: int, swa_num_tokens: int) -> Eviction:
        self._turn()
        eviction = super()._victims(full_num_tokens, swa_num_tokens)
        self._turn()
        return eviction

    def _turn(self) -> None:
        for page in self._tree.values():
            page.last = -page.last

    def _window_order(self, page: Page) -> tuple[int, int]:
        last, depth = super()._window_order(page)
        return -last, depth


@registry.mutant("SWARADIX-12", "SWARADIX-13", "SWARADIX-18")
class CountsLeavesAlone(SWARadixCache):
    def evict(self, full_num_tokens: int, swa_num_tokens: int = 0) -> EvictResult:
        before = self._leaves_evicted
        result = super().evict(full_num_tokens, swa_num_tokens)
        return result._replace(full_num_tokens=(self._leaves_evicted - before) * self.page_size)


@registry.mutant("SWARADIX-13", "SWARADIX-16")
class EvictsWindowsOnTopOfLeaves(SWARadixCache):
    def _victims(self, full_num_tokens: int, swa_num_tokens: int) -> Eviction:
        more = super()._victims(full_num_tokens, 0).window_count * self.page_size
        return super()._victims(full_num_tokens, swa_num_tokens + more if swa_num_tokens else 0)


@registry.mutant(
    *("SWARADIX-13", "SWARADIX-14", "SWARADIX-15", "SWARADIX-16", "SWARADIX-20"),
    reports=("INV-064",),
)
class EvictsAWindowPageLess(SWARadixCache):
    def _victims(self, full_num_tokens: int, swa_num_tokens: int) -> Eviction:
        more_than_one = swa_num_tokens > self.page_size
        return super()._victims(full_num_tokens, swa_num_tokens - more_than_one * self.page_size)


@registry.mutant("SWARADIX-14", "SWARADIX-13", "SWARADIX-16", reports=("SG-35515",))
class TakesTheEndOfAPathFirst(SWARadixCache):
    def _window_order(self, page: Page) -> tuple[int, int]:
        last, depth = super()._window_order(page)
        return last, -depth


@registry.mutant("SWARADIX-14", reports=("FKV-195",))
class HitsRenewLeavesAlone(SWARadixCache):
    def _window_order(self, page: Page) -> tuple[int, int]:
        return page.born, super()._window_order(page)[1]


@registry.mutant("SWARADIX-14", "SWARADIX-16", reports=("INV-051",))
class TakesPagesOfOneAgeByTheirNumber(SWARadixCache):
    def _window_order(self, page: Page) -> tuple[int, int]:
        return page.last, page.number


@registry.mutant(
    *("SWARADIX-15", "SWARADIX-5", "SWARADIX-9", "SWARADIX-13", "SWARADIX-16", "SWARADIX-18"),
    reports=("VL-42273",),
)
class EvictsUnderAWindowLock(SeesNothingItself):
    """The end of a path that is locked stays, as it must to be one."""

    def _victims(self, full_num_tokens: int, swa_num_tokens: int) -> Eviction:
        locks = self._window_locks
        ends = set(self._open.values())
        self._window_locks = {page: count for page, count in locks.items() if page in ends}
        eviction = super()._victims(full_num_tokens, swa_num_tokens)
        self._window_locks = locks
        return eviction


@registry.mutant("SWARADIX-16")
class GivesBackBothPoolsApart(SWARadixCache):
    def _give_back(self, pages: Sequence[int], windows: Sequence[int] = ()) -> None:
        super()._give_back(pages)
        super()._give_back([], windows)


@registry.mutant("SWARADIX-16")
class GivesBackInOrderOfPages(SWARadixCache):
    def _in_order(self, pages: Sequence[int]) -> list[int]:
        return sorted(pages)


@registry.mutant("SWARADIX-17")
class TakesANegativeAmountForNothing(SWARadixCache):
    def evict(self, full_num_tokens: int, swa_num_tokens: int = 0) -> EvictResult:
        return super().evict(max(full_num_tokens, 0), max(swa_num_tokens, 0))


# Whose slots


@registry.mutant("SWARADIX-18", "SWARADIX-5", "SWARADIX-6", *REVIVED)
class RevivesByTakingTheCallersPage(SeesNothingItself):
    """The tree's page goes, which a row may name, and the caller's takes its place."""

    def _claim(self, frame: bytes, tokens: Sequence[int], slots: Sequence[int]) -> Claim:
        claim = super()._claim(frame, tokens, slots)
        revived = dict(self._revivals(claim))
        self._give_back(list(revived))
        for page in claim.resident:
            if page.number in revived:
                del self._held[page.number]
                page.number = revived[page.number]
                self._held[page.number] = page
                self._tombstones.remove(page)
        return claim


@registry.mutant("SWARADIX-18", "SWARADIX-10", "CACHE-2", reports=("SG-40681", "SEED-3"))
class LocksWhatAMatchWouldFind(SWARadixCache):
    def _lock(self, node: Page | Root) -> Any:
        if self._busy == "cache_unfinished_req":
            found = self._usable(self._path(node))
            node = found[-1] if found else self._root_of(node)
        return super()._lock(node)


@registry.mutant("SWARADIX-18", "SWARADIX-8", reports=("VL-42273",))
class GivesBackWindowSlotsThatTheTreeHas(SWARadixCache):
    def evict_swa(self, req: Any, prelen: int, *args: Any, **kwargs: Any) -> int:
        protected, req.cache_protected_len = req.cache_protected_len, 0
        try:
            return super().evict_swa(req, prelen, *args, **kwargs)
        finally:
            req.cache_protected_len = protected


# Options and reading


@registry.mutant("SWARADIX-19")
class TakesAWindowOfNothing(SWARadixCache):
    def __init__(self, sliding_window_size: int, **options: Any) -> None:
        super().__init__(sliding_window_size=max(sliding_window_size, 1), **options)


@registry.mutant("SWARADIX-19")
class TakesAnAllocatorWithoutAWindowPool(SWARadixCache):
    def _require_window_pool(self, clause: str) -> None:
        """Forgotten."""


@registry.mutant("SWARADIX-21", "SWARADIX-18")
class CriesWolf(SWARadixCache):
    def check(self) -> None:
        if self._tombstones & self._locks.keys():
            raise ContractError("SWARADIX-9: a tombstone is locked")
