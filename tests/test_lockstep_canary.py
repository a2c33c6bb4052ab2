"""Does lockstep find what it is for? A planted difference is found soon, and its history is short.

Each canary stands in the place of the core: the oracle with one thing wrong, of the kind that a
fast implementation gets wrong.
"""

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import kvspec.oracle
from kvspec.conformance.lockstep import (
    Failure,
    configuration,
    explore,
    reproducer,
    run,
    shrink,
)
from kvspec.conformance.lockstep.__main__ import app
from kvspec.conformance.lockstep.ownership import BrokenLaw
from kvspec.interfaces.prefix_cache import EvictResult
from kvspec.oracle import (
    PagedTokenToKVPoolAllocator,
    RadixCache,
    SWAChunkCache,
    SWARadixCache,
    SWATokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
)
from kvspec.oracle.trie import NodeHandle, TrieCache

MOST_OPERATIONS = 4000
EACH_SEED = 250
LONGEST_REPRODUCER = 15

canaries: list[SimpleNamespace] = []
lawless: list[SimpleNamespace] = []


def oracle_with(memory: str, changed: type[Any]) -> SimpleNamespace:
    """The oracle with a subclass in the place of its base, and the memory that shows it."""
    names = {name: getattr(kvspec.oracle, name) for name in kvspec.oracle.__all__}
    names[changed.__bases__[0].__name__] = changed
    return SimpleNamespace(**{**names, "__name__": changed.__name__, "memory": memory})


def canary(changed: type[Any], memory: str = "full") -> None:
    """Something that the core could get wrong."""
    canaries.append(oracle_with(memory, changed))


def outlaw(changed: type[Any]) -> None:
    """Something that oracle and core could both get wrong."""
    lawless.append(oracle_with("swa", changed))


class FreeGoesToTheOtherEnd(TokenToKVPoolAllocator):
    """Of slots freed in one call, the last one comes first."""

    def _given_back(self, slots: list[int]) -> list[int]:
        return super()._given_back(slots)[::-1]


class PagesInOrderOfTheirNaming(PagedTokenToKVPoolAllocator):
    """Pages freed in one call are not sorted."""

    def _given_back(self, slots: list[int]) -> list[int]:
        super()._given_back(slots)
        return list(dict.fromkeys(slot // self.page_size for slot in slots))


class RefusedAllocMerges(PagedTokenToKVPoolAllocator):
    """An allocation that is refused has merged the release list already."""

    def _take(self, page_count: int) -> list[int] | None:
        if page_count > len(self.free_list) and self.release:
            self._merge()
        return super()._take(page_count)


class TieGoesToTheNewest(RadixCache):
    """Among leaves that were hit equally often, the one used last is evicted."""

    def _order(self, page: Any) -> tuple[int, ...]:
        first, *rest = super()._order(page)
        return (first, *(-number for number in rest))


class SplitLeaksALock(RadixCache):
    """A locked run that is left in its middle keeps one lock too many above."""

    def _adopt(self, claim: Any, priority: int) -> Any:
        if claim.resident and len(claim.resident) < len(claim.pages):
            above = claim.resident[-1]
            if any(page.before is above and page in self._locks for page in self._tree.values()):
                self._locks[above] += 1
        return super()._adopt(claim, priority)


class SplitLosesHits(RadixCache):
    """What lies below the place where a match left a run is counted anew."""

    def _hit(self, path: Any) -> None:
        super()._hit(path)
        below = [page for page in self._tree.values() if path and page.before is path[-1]]
        if len(below) == 1:
            below[0].hits = 0


class StaleHandleRevives(RadixCache):
    """A handle is live again when its path has been inserted again."""

    def _is_live(self, node: Any) -> bool:
        known = {page.name for page in self._tree.values()}
        return super()._is_live(node) or node.name in known


class ResetForgetsReceipts(RadixCache):
    """A reset while a receipt is open is carried out."""

    def reset(self) -> None:
        self._open.clear()
        self._locks.clear()
        super().reset()


class FreeIsReportedInPieces(TokenToKVPoolAllocator):
    """What is freed in one call is reported slot by slot."""

    def _report_moved(self, name: str, pages: Sequence[int]) -> None:
        for part in [[page] for page in pages] if name == "free" else [pages]:
            super()._report_moved(name, part)


class EvictFallsOver(RadixCache):
    """An empty tree is evicted from with an IndexError."""

    def evict(self, num_tokens: int) -> int:
        if not self._tree:
            raise IndexError("pop from empty heap")
        return super().evict(num_tokens)


canary(FreeGoesToTheOtherEnd)
canary(PagesInOrderOfTheirNaming)
canary(RefusedAllocMerges)
canary(TieGoesToTheNewest)
canary(SplitLeaksALock)
canary(SplitLosesHits)
canary(StaleHandleRevives)
canary(ResetForgetsReceipts)
canary(FreeIsReportedInPieces)
canary(EvictFallsOver)


class RefusedForTheWindowMerges(SWATokenToKVPoolAllocator):
    """The full pool has merged its lists when the window pool is found to be short."""

    def _take(self, page_count: int) -> list[int] | None:
        enough = page_count * self.page_size <= self.full_available_size()
        if enough and page_count > len(self.free_list):
            self._merge()
        return super()._take(page_count)


class StalePairIsRead(SWATokenToKVPoolAllocator):
    """The mapping of a page that was given back is left as it was."""

    def _give_back(self, call: str, pages: list[int], alone: list[int]) -> None:
        self.stale = {**vars(self).get("stale", {}), **{p: self.pairs.get(p, 0) for p in pages}}
        super()._give_back(call, pages, alone)

    def _window_slot(self, slot: int) -> int:
        page, offset = divmod(slot, self.page_size)
        stale = vars(self).get("stale", {}).get(page, 0)
        return super()._window_slot(slot) or (stale and stale * self.page_size + offset)


class PageInBothListsIsAccepted(SWATokenToKVPoolAllocator):
    """A page that `free` names for itself and for its pair is given back."""

    def _paired(self, call: str, slots: list[int], clause: str, **how: Any) -> list[int]:
        taken = how.pop("taken", ())
        others = [slot for slot in slots if slot // self.page_size not in taken]
        return super()._paired(call, others, clause, **how)


class PairsAloneGoFirst(SWATokenToKVPoolAllocator):
    """What `swa_index` names goes into the list before the pairs of the pages."""

    def _give_back(self, call: str, pages: list[int], alone: list[int]) -> None:
        self.pairs = dict(sorted(self.pairs.items()))
        if pages and alone:
            super()._give_back(call, [], alone)
            alone = []
        super()._give_back(call, pages, alone)


class WindowGoesFromItsEnd(SWARadixCache):
    """Of pages walked at once, the window slots of the deepest go first."""

    def _window_order(self, page: Any) -> tuple[int, int]:
        last, depth = super()._window_order(page)
        return last, -depth


class WindowEvictionIsByAge(SWARadixCache):
    """Window slots go in the order in which pages were inserted."""

    def _window_order(self, page: Any) -> tuple[int, int]:
        return page.born, super()._window_order(page)[1]


class RevivalForgotten(SWARadixCache):
    """A duplicate of a tombstone takes its window slot along."""

    def _revivals(self, claim: Any) -> list[tuple[int, int]]:
        return []


class WindowUnlocksTooMuch(SWARadixCache):
    """A window lock that is released takes one of the page above along, if that has more."""

    def _unlock(self, receipt: Any) -> list[Any]:
        path = self._path(self._open[receipt])
        place = len(path) - len(self._window_of(path)) - 1
        if place >= 0 and self._window_locks.get(path[place], 0) > 1:
            self._window_locks[path[place]] -= 1
        return super()._unlock(receipt)


class LastPageIsEnough(SWARadixCache):
    """A handle can be locked as long as its last page is live."""

    def inc_lock_ref(self, node: Any) -> Any:
        if isinstance(node, NodeHandle) and node.node not in self._tombstones:
            return TrieCache.inc_lock_ref(self, node)
        return super().inc_lock_ref(node)


class ReachOnePageTooLong(SWARadixCache):
    """The page after the last live one enters too."""

    def _claim(self, frame: bytes, tokens: Sequence[int], slots: Sequence[int]) -> Any:
        claim, whole = super()._claim(frame, tokens, slots), TrieCache._claim
        longer = whole(self, frame, tokens, slots)
        stop = len(claim.pages) + 1
        return longer._replace(
            pages=longer.pages[:stop],
            numbers=longer.numbers[:stop],
            resident=longer.resident[:stop],
            windows=claim.windows,
        )


class FallbackRenews(SWARadixCache):
    """A match renews what it compared, also where it fell back from."""

    def _usable(self, path: list[Any]) -> list[Any]:
        for page in path:
            page.last = self._tick + 1
        return super()._usable(path)


class CascadeCountsTwice(SWARadixCache):
    """A tombstone that leaves is counted as if it had a window slot."""

    def evict(self, full_num_tokens: int, swa_num_tokens: int = 0) -> EvictResult:
        full, window = super().evict(full_num_tokens, swa_num_tokens)
        return EvictResult(full, max(full, window))


class LeavesDoNotCountForTheWindow(SWARadixCache):
    """What leaves give back to the window pool is asked for once more."""

    def evict(self, full_num_tokens: int, swa_num_tokens: int = 0) -> EvictResult:
        first = super().evict(full_num_tokens)
        second = super().evict(0, swa_num_tokens)
        return EvictResult(*map(sum, zip(first, second, strict=True)))


class RevivedIsCalledDuplicate(SWARadixCache):
    """The result does not say that a window slot revived a tombstone."""

    def _window_ranges(self, claim: Any, kinds: Sequence[str]) -> Any:
        return super()._window_ranges(claim._replace(numbers=[]), kinds)


class FrontierOutlivesTheRow(SWAChunkCache):
    """How far a row has been given back is remembered with the row, also for the next request."""

    def evict_swa(self, req: Any, prelen: int, *sizes: Any, **named: Any) -> int:
        seen: dict[int, int] = vars(self).setdefault("seen", {})
        super().evict_swa(req, 0, *sizes, **named)
        if prelen < seen.get(req.req_pool_idx, 0):
            return 0
        given = super().evict_swa(req, prelen, *sizes, **named)
        seen[req.req_pool_idx] = prelen
        return given


class FrontierOneTokenEarly(SWAChunkCache):
    """The window is taken to be one token longer."""

    def _first_read(self, prelen: int, chunk: int | None, window: int | None) -> int:
        begin = super()._first_read(prelen, chunk, window)
        return begin if window is None else max(begin - 1, 0)


canary(RefusedForTheWindowMerges, "swachunk")
canary(StalePairIsRead, "swachunk")
canary(PageInBothListsIsAccepted, "swachunk")
canary(PairsAloneGoFirst, "swa")
canary(WindowGoesFromItsEnd, "swa")
canary(WindowEvictionIsByAge, "swa")
canary(RevivalForgotten, "swa")
canary(WindowUnlocksTooMuch, "swa")
canary(LastPageIsEnough, "swa")
canary(ReachOnePageTooLong, "swa")
canary(FallbackRenews, "swa")
canary(CascadeCountsTwice, "swa")
canary(LeavesDoNotCountForTheWindow, "swa")
canary(RevivedIsCalledDuplicate, "swa")
canary(FrontierOutlivesTheRow, "swachunk")
canary(FrontierOneTokenEarly, "swachunk")


class WindowLocksAreIgnored(SWARadixCache):
    """Eviction takes what a window lock covers, but for the end of a path."""

    def _victims(self, *counts: int) -> Any:
        locks, ends = self._window_locks, set(self._open.values())
        self._window_locks = {page: count for page, count in locks.items() if page in ends}
        victims = super()._victims(*counts)
        self._window_locks = locks
        return victims


class DuplicateIsLost(SWARadixCache):
    """Of several duplicates the first is not given back."""

    def _exchange(self, req: Any, row: Any, shared: Any, duplicates: Any) -> None:
        super()._exchange(req, row, shared, duplicates[len(duplicates) > 1 :])


class MovesOnInTheTree(SWARadixCache):
    """evict_swa gives back what is protected, too."""

    def evict_swa(self, req: Any, prelen: int, *sizes: Any, **named: Any) -> int:
        protected, req.cache_protected_len = req.cache_protected_len, 0
        try:
            return super().evict_swa(req, prelen, *sizes, **named)
        finally:
            req.cache_protected_len = protected


class PairOfTheNextPageEndsToo(SWATokenToKVPoolAllocator):
    """A full page that is given back takes the pair of the next page along."""

    def _give_back(self, call: str, pages: list[int], alone: list[int]) -> None:
        named = {*pages, *alone}
        alone = alone + [p + 1 for p in pages if p + 1 in self.pairs and p + 1 not in named]
        super()._give_back(call, pages, alone)


class WindowLockStays(SWARadixCache):
    """A window lock is never taken off the first page that it covers."""

    def _unlock(self, receipt: Any) -> list[Any]:
        for page in self._window_of(self._path(self._open[receipt]))[:1]:
            self._window_locks[page] += 1
        return super()._unlock(receipt)


outlaw(WindowLocksAreIgnored)
outlaw(DuplicateIsLost)
outlaw(MovesOnInTheTree)
outlaw(PairOfTheNextPageEndsToo)
outlaw(ReachOnePageTooLong)
outlaw(WindowLockStays)


def first_failure(oracle: Any, broken: SimpleNamespace) -> Failure:
    """The first divergence, over short runs of the first seeds."""
    for seed in range(MOST_OPERATIONS // EACH_SEED):
        config = configuration(seed, broken.memory)
        history = explore(seed, EACH_SEED, oracle, broken, config)
        if history.failure:
            return history.failure
    raise AssertionError(f"{broken.__name__} survives {MOST_OPERATIONS} operations")


@pytest.mark.parametrize("broken", canaries, ids=lambda broken: broken.__name__)
def test_planted_difference_is_found_and_shrinks(broken: SimpleNamespace) -> None:
    failure = first_failure(kvspec.oracle, broken)

    small = shrink(failure, kvspec.oracle, broken)

    assert len(small.operations) <= LONGEST_REPRODUCER, reproducer(small)
    assert run(small.config, small.operations, kvspec.oracle, kvspec.oracle) is None
    assert run(small.config, small.operations, kvspec.oracle, broken) is not None


@pytest.mark.parametrize("broken", lawless, ids=lambda broken: broken.__name__)
def test_what_both_get_wrong_breaks_a_law(broken: SimpleNamespace) -> None:
    failure = first_failure(broken, broken)

    small = shrink(failure, broken, broken)

    assert isinstance(small.divergence, BrokenLaw)
    assert len(small.operations) <= LONGEST_REPRODUCER, reproducer(small)
    assert run(small.config, small.operations, kvspec.oracle, kvspec.oracle) is None


def pasted(text: str, core: object) -> Callable[[], None]:
    """The test in a reproducer, with `core` for kvspec's own."""
    names: dict[str, Any] = {}
    exec(text, names)
    attributes = {**vars(core), "oracle": kvspec.oracle}
    names["kvspec"] = SimpleNamespace(**attributes)
    test: Callable[[], None] = next(names[name] for name in names if name.startswith("test_"))
    return test


def test_reproducer_can_be_pasted() -> None:
    broken = oracle_with("full", EvictFallsOver)
    text = reproducer(shrink(first_failure(kvspec.oracle, broken), kvspec.oracle, broken))

    with pytest.raises(AssertionError, match="IndexError: pop from empty heap"):
        pasted(text, broken)()
    pasted(text, kvspec.oracle)()


def test_command_line_fails_with_a_reproducer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "canary", oracle_with("full", EvictFallsOver))

    options = ["--core", "canary", "--operations", "600", "--seeds", "0:2"]
    result = CliRunner().invoke(app, options)

    assert result.exit_code == 1
    assert "seed 0, operation" in result.output
    assert "def test_lockstep_seed_0() -> None:" in result.output
