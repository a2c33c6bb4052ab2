"""The abstract state of SWARADIX as a dict from paths to pages and a set of tombstones, for
fuzzing."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvspec.conformance.prefix_cache.system import numbers, refused
from kvspec.conformance.radix_cache.paths import Paths
from kvspec.conformance.swa_radix_cache.windows import (
    WindowConformance,
    intervals,
    usable,
    window_locks,
    window_pages,
)
from kvspec.interfaces.prefix_cache import CacheView, EvictResult, Path

__all__ = ["WindowPaths", "Windows"]


class WindowPaths(Paths):
    """What a client may know of a radix cache with windows, and of its allocator's pairs."""

    def __init__(self, page_size: int, window: int) -> None:
        super().__init__(page_size, "lru", "page")
        self.length = window_pages(page_size, window)
        self.tombstones: set[Path] = set()
        self.pairs: dict[int, int] = {}

    def found(self, path: Path) -> list[Path]:
        """What a match covers (SWARADIX-1)."""
        resident = self.resident(path)
        gone = [prefix in self.tombstones for prefix in resident]
        return resident[: usable(gone, self.length)]

    def reach(self, path: Path, pages: Sequence[int]) -> list[Path]:
        """The pages up to the last one that is live after the insert (SWARADIX-3)."""
        prefixes = self.prefixes(path)
        live = self.entries.keys() - self.tombstones
        while prefixes and prefixes[-1] not in live and pages[len(prefixes) - 1] not in self.pairs:
            prefixes.pop()
        return prefixes

    def window_kinds(self, path: Path, pages: Sequence[int]) -> list[str]:
        """What would become of the window slots of each page, "" where there are none
        (SWARADIX-6)."""
        reach, kinds = self.reach(path, pages), []
        for prefix, page in zip(self.prefixes(path), pages, strict=True):
            entry = self.entries.get(prefix)
            if page not in self.pairs:
                kinds.append("")
            elif prefix not in reach:
                kinds.append("tail")
            elif entry is None or prefix in self.tombstones:
                kinds.append("adopted")
            else:
                kinds.append("shared" if entry.page == page else "duplicate")
        return kinds

    def insert(self, path: Path, pages: list[int], priority: int) -> list[str]:
        """What becomes of each page; the pairs move (SWARADIX-3, SWARADIX-4, SWARADIX-5)."""
        reach = self.reach(path, pages)
        windows = self.window_kinds(path, pages)
        new = [prefix for prefix in reach if prefix not in self.entries]
        stop = reach[-1] if reach else (path[0], ())
        kinds = super().insert(stop, pages[: len(reach)], priority)
        for prefix, page, window in zip(reach, pages, windows, strict=False):
            if prefix in new and not window:
                self.tombstones.add(prefix)
            elif prefix in self.tombstones and window:
                self.tombstones.remove(prefix)
                self.pairs[self.entries[prefix].page] = self.pairs.pop(page)
        return kinds + ["tail"] * (len(pages) - len(kinds))

    def evict_windows(self, full: int, swa: int) -> tuple[list[int], list[int], EvictResult]:
        """The pages that leave, in order, those that lose their pair alone, and how many tokens
        of each pool that is (SWARADIX-12 to SWARADIX-15)."""
        size = self.page_size
        gone: list[int] = []
        made: list[Path] = []
        windows = 0
        while len(gone) * size < full and (leaves := self.free_leaves()):
            windows += 1
            gone += self._leave(min(leaves, key=self.order))
        while windows * size < swa and (path := self._next_live()) is not None:
            windows += 1
            if self._extended(path):
                self.tombstones.add(path)
                made.append(path)
            else:
                gone += self._leave(path)
        left = [self.entries[path].page for path in made if path in self.entries]
        for page in gone + left:
            self.pairs.pop(page, None)
        return gone, left, EvictResult(len(gone) * size, windows * size)

    def _next_live(self) -> Path | None:
        """The next live page without a window lock (SWARADIX-14)."""
        locked = window_locks(self.view(), self.page_size, self.length)
        live = [p for p in self.entries if p not in self.tombstones and not locked[p]]
        return min(live, key=lambda p: (self.entries[p].last, len(p[1])), default=None)

    def _leave(self, leaf: Path) -> list[int]:
        """A leaf goes, with the tombstones that this makes leaves."""
        pages = [self.entries.pop(leaf).page]
        above = leaf[0], leaf[1][: -self.page_size]
        while above in self.tombstones and not self._extended(above):
            pages.append(self.entries.pop(above).page)
            self.tombstones.remove(above)
            above = above[0], above[1][: -self.page_size]
        return pages

    def _extended(self, path: Path) -> bool:
        return any((key, tokens[: -self.page_size]) == path for key, tokens in self.entries)

    def view(self) -> CacheView:
        """As the cache ought to tell it."""
        view = super().view()
        locked = window_locks(view, self.page_size, self.length)
        pages = {
            path: page._replace(tombstone=path in self.tombstones, swa_locks=locked[path])
            for path, page in view.pages.items()
        }
        return view._replace(pages=pages)


class Windows(RuleBasedStateMachine):
    """A cache over an allocator, beside the dict of paths; between calls the test has no page."""

    suite: WindowConformance
    symbols = st.lists(st.sampled_from([1, 1, 1, 2]), max_size=6)
    spaces = st.sampled_from([None, None, None, "a"])
    all_or_some = st.one_of(st.just(63), st.integers(0, 63))
    none_or_some = st.one_of(st.just(0), st.just(0), st.integers(0, 63))

    @classmethod
    def of(cls, suite: WindowConformance) -> "type[Windows]":
        """The machine for an implementation."""
        return type(cls.__name__, (cls,), {"suite": suite})

    @initialize(page_size=st.sampled_from([1, 2, 4]), window=st.sampled_from([1, 2, 3, 4, 5, 5, 9]))
    def start(self, page_size: int, window: int) -> None:
        self.paths = WindowPaths(page_size, window)
        self.system = self.suite.windows(
            page_size, window, page_count=300, handed_out=False, spy=True
        )
        self.cache, self.allocator = self.system.cache, self.system.allocator
        self.nodes: list[tuple[Any, Path]] = []
        self.receipts: list[Any] = []

    def key(self, symbols: list[int], tail: int) -> list[int]:
        """A page of each symbol, and a part of one more."""
        size = self.paths.page_size
        return [symbol for symbol in symbols for _ in range(size)] + [1] * (tail % size)

    def whole(self, symbols: list[int], space: Any) -> Path:
        return space, tuple(self.key(symbols, 0))

    @rule(symbols=symbols, tail=st.integers(0, 3), space=spaces)
    def match(self, symbols: list[int], tail: int, space: Any) -> None:
        key, path = self.key(symbols, tail), self.whole(symbols, space)
        silent = self.cache.match_prefix(key, extra_key=space, touch=False)
        found = self.cache.match_prefix(key, extra_key=space)
        slots = self.system.slots(*self.paths.match(path))
        assert numbers(silent.device_indices) == numbers(found.device_indices) == slots
        covered = space, path[1][: len(slots)]
        assert self.cache.resolve(found.last_device_node) == covered
        self.nodes.append((found.last_device_node, covered))

    @rule(
        symbols=symbols,
        tail=st.integers(0, 3),
        space=spaces,
        priority=st.integers(-1, 2),
        own=all_or_some,
        lost=none_or_some,
    )
    def insert(
        self, symbols: list[int], tail: int, space: Any, priority: int, own: int, lost: int
    ) -> None:
        """With pages of its own, some without a pair, or with the tree's where it has some."""
        size, path = self.paths.page_size, self.whole(symbols, space)
        key, prefixes = self.key(symbols, tail), self.paths.prefixes(path)
        fresh = self._take(len(symbols) + 1, lost)
        pages = [
            self.paths.entries[prefix].page
            if prefix in self.paths.entries and not own >> index & 1
            else fresh[index]
            for index, prefix in enumerate(prefixes)
        ]
        resident = len(self.paths.resident(path))
        windows = self.paths.window_kinds(path, pages)
        node = self.paths.reach(path, pages)[-1:] or [(space, ())]

        slots = self.system.slots(*pages, fresh[-1])[: len(key)]
        reach = len(self.paths.reach(path, pages))
        if any(page not in fresh for page in pages[reach:]):
            refused(self.system, "CACHE-10", self.cache.insert, key, slots, extra_key=space)
            self._give_back(fresh)
            return
        result = self.cache.insert(key, slots, extra_key=space, priority=priority)

        partial = [(len(path[1]), len(key))] if len(path[1]) < len(key) else []
        with_pair = partial if fresh[-1] in self.paths.pairs else []
        kinds = self.paths.insert(path, pages, priority)
        self._compare(result, kinds, partial)
        self._compare(result.swa, windows, with_pair)
        assert result.prefix_len == min(resident, reach) * size
        assert self.cache.resolve(result.last_device_node) == node[0]
        self.nodes.append((result.last_device_node, node[0]))
        self._give_back(fresh)

    def _take(self, count: int, lost: int) -> list[int]:
        """Pages of the allocator, some of which have lost their pair."""
        slots = numbers(self.allocator.alloc(count * self.paths.page_size))
        pages = self.system.pages(slots)
        gone = [page for index, page in enumerate(pages) if lost >> index & 1]
        self.allocator.free_swa(self.system.slots(*gone))
        pairs = dict(self.allocator.view().pairs)
        self.paths.pairs.update({page: pairs[page] for page in pages if page in pairs})
        return pages

    def _give_back(self, pages: list[int]) -> None:
        """What the tree has not adopted."""
        held = {entry.page for entry in self.paths.entries.values()}
        spare = [page for page in pages if page not in held]
        self.allocator.free(self.system.slots(*spare))
        for page in spare:
            self.paths.pairs.pop(page, None)

    def _compare(self, found: Any, kinds: list[str], partial: list[tuple[int, int]]) -> None:
        size = self.paths.page_size
        for kind in ("shared", "adopted", "duplicate"):
            assert getattr(found, kind) == intervals(kinds, kind, size)
        tail = intervals(kinds, "tail", size)
        if tail and partial and tail[-1][1] == partial[0][0]:
            tail[-1], partial = (tail[-1][0], partial[0][1]), []
        assert found.tail == tail + partial

    @rule(which=st.integers(0, 30))
    def lock(self, which: int) -> None:
        live = [(node, path) for node, path in self.nodes if self.cache.resolve(node) is not None]
        if not live:
            return
        node, path = live[which % len(live)]
        prefixes = self.paths.prefixes(path)
        if self.paths.found(path) != prefixes:
            refused(self.system, "SWARADIX-11", self.cache.inc_lock_ref, node)
            return
        free = sum(not self.paths.locks(prefix) for prefix in prefixes)
        self.receipts.append(self.cache.inc_lock_ref(node))
        self.paths.receipts.append(path)
        assert self.receipts[-1].delta == -free * self.paths.page_size
        assert (self.receipts[-1].swa_uuid is None) == (len(prefixes) <= self.paths.length)

    @precondition(lambda self: self.receipts)
    @rule(which=st.integers(0, 30))
    def unlock(self, which: int) -> None:
        index = which % len(self.receipts)
        path = self.paths.receipts.pop(index)
        free = sum(not self.paths.locks(prefix) for prefix in self.paths.prefixes(path))
        assert self.cache.dec_lock_ref(self.receipts.pop(index)) == free * self.paths.page_size

    @rule(full=st.sampled_from([0, 0, 0, 1, 5]), swa=st.integers(0, 16))
    def evict(self, full: int, swa: int) -> None:
        """All that goes, goes in one `free`, in its order."""
        frees, swa_frees = self.allocator.frees, self.allocator.swa_frees
        frees.clear()
        swa_frees.clear()
        gone, left, expected = self.paths.evict_windows(full, swa)
        assert self.cache.evict(full, swa) == expected
        if self.paths.page_size > 1:
            gone, left = sorted(gone), sorted(left)
        assert [self.system.pages(slots) for slots in frees] == ([gone] if gone or left else [])
        assert [self.system.pages(slots) for slots in swa_frees] == ([left] if gone or left else [])

    @precondition(lambda self: not self.receipts)
    @rule(rarely=st.integers(0, 4))
    def reset(self, rarely: int) -> None:
        if not rarely:
            self.cache.reset()
            self.paths.entries.clear()
            self.paths.tombstones.clear()
            self.paths.pairs.clear()

    @invariant()
    def views_are_equal(self) -> None:
        expected, size = self.paths.view(), self.paths.page_size
        assert self.cache.view() == expected
        pages = expected.pages.values()
        live = [page for page in pages if not page.tombstone]
        locked = sum(page.locks > 0 for page in pages)
        window_locked = sum(page.swa_locks > 0 for page in live)
        assert self.cache.full_evictable_size() == (len(pages) - locked) * size
        assert self.cache.full_protected_size() == locked * size
        assert self.cache.swa_evictable_size() == (len(live) - window_locked) * size
        assert self.cache.swa_protected_size() == window_locked * size
        self.cache.check()

    @invariant()
    def tree_has_all_that_is_held(self) -> None:
        view, pages = self.allocator.view(), self.cache.view().pages
        assert view.held == {page.page for page in pages.values()}
        assert dict(view.pairs) == self.paths.pairs
        assert set(self.paths.pairs) == {p.page for p in pages.values() if not p.tombstone}

    @invariant()
    def no_leaf_is_a_tombstone(self) -> None:
        size, pages = self.paths.page_size, self.cache.view().pages
        extended = {(key, tokens[:-size]) for key, tokens in pages}
        assert all(path in extended for path, page in pages.items() if page.tombstone)
