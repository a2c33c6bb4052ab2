"""What holds of windows between calls. Spec: SWARADIX-7 to SWARADIX-11."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import Request, System, numbers, refused
from kvspec.conformance.swa_radix_cache.windows import (
    WindowConformance,
    drained,
    drop,
    evicted,
    page_sizes,
    shed,
    sizes,
    tombstones,
    usable,
    window_locks,
    window_pages,
)

__all__ = ["WindowLockConformance"]


class WindowLockConformance(WindowConformance):
    """Leaves, pairs, window locks and sizes."""

    # Tombstones

    @clause("SWARADIX-7")
    @page_sizes
    @pytest.mark.parametrize("pool", ["full", "swa"])
    def test_leaf_leaves_with_the_tombstones_above_it(self, page_size: int, pool: str) -> None:
        system = self.windows(page_size)
        tokens = list(range(5 * page_size))
        drop(system, 2, 3, 4)
        system.insert(tokens, 1, 2, 3, 4, 5)
        system.cache.inc_lock_ref(system.cache.match_prefix(tokens[:page_size]).last_device_node)
        amounts = (1, 0) if pool == "full" else (0, 1)
        assert evicted(system, *amounts) == ([2, 3, 4, 5], [])
        assert list(system.cache.view().pages) == [(None, tuple(tokens[:page_size]))]

    @clause("SWARADIX-7")
    @pytest.mark.parametrize("pool", ["full", "swa"])
    def test_tombstone_below_which_a_leaf_is_left_stays(self, pool: str) -> None:
        system = self.windows()
        drop(system, 1, 2)
        system.insert([1, 2, 3], 1, 2, 3)
        system.insert([1, 2, 4], 1, 2, 4)
        amounts = (1, 0) if pool == "full" else (0, 1)
        first = evicted(system, *amounts)
        assert first in (([3], []), ([4], []))
        assert evicted(system, *amounts) == ([1, 2, 7 - first[0][0]], [])

    @clause("SWARADIX-7")
    @sizes
    @pytest.mark.parametrize("step", [(1, 0), (0, 1), (1, 2), (0, 3)])
    def test_leaves_are_live_to_the_end(
        self, page_size: int, window: int, step: tuple[int, int]
    ) -> None:
        for system in self._grown(page_size, window):
            _no_leaf_is_a_tombstone(system)
        for _ in drained(system, *step):
            _no_leaf_is_a_tombstone(system)
        allocator = system.allocator
        assert allocator.full_available_size() + system.page_size * 30 == allocator.size_full

    @clause("SWARADIX-8")
    @sizes
    def test_page_is_live_while_it_has_a_pair(self, page_size: int, window: int) -> None:
        for system in self._grown(page_size, window):
            _live_pages_have_pairs(system)
        for _ in drained(system, 0, 1):
            _live_pages_have_pairs(system)

    @clause("SWARADIX-8")
    @page_sizes
    def test_pair_of_a_tombstone_is_nobodys_until_it_is_handed_out(self, page_size: int) -> None:
        """A window page that is used again is the pair of its new page alone."""
        system = self.windows(page_size, page_count=8, swa_page_count=3)
        tokens = list(range(3 * page_size))
        system.insert(tokens, 1, 2, 3)
        shed(system, tokens)
        slots = system.allocator.alloc(2 * page_size)
        assert slots is not None
        new = system.pages(numbers(slots))

        pairs = dict(system.allocator.view().pairs)
        assert sorted(pairs[page] for page in new) == [1, 2]
        assert not {1, 2} & set(pairs)
        system.insert(tokens, *new, 3)
        assert tombstones(system, tokens) == [False] * 3
        _live_pages_have_pairs(system)

    # Locks

    @clause("SWARADIX-9")
    @sizes
    def test_window_lock_is_on_the_last_pages_of_the_path(
        self, page_size: int, window: int
    ) -> None:
        length = window_pages(page_size, window)
        system = self.windows(page_size, window)
        tokens = list(range((length + 3) * page_size))
        system.insert(tokens, *range(1, length + 4))
        for stop in range(length + 4):
            node = system.cache.match_prefix(tokens[: stop * page_size]).last_device_node
            receipt = system.cache.inc_lock_ref(node)
            assert (receipt.swa_uuid is None) == (stop <= length)
            pages = list(system.cache.view().pages.values())
            covered = range(max(stop - length, 0), stop)
            assert [page.swa_locks for page in pages] == [n in covered for n in range(length + 3)]
            assert [page.locks for page in pages] == [n < stop for n in range(length + 3)]
            assert system.cache.swa_protected_size() == len(covered) * page_size
            assert system.cache.dec_lock_ref(receipt) == stop * page_size
            assert system.cache.swa_protected_size() == 0

    @clause("SWARADIX-9")
    @sizes
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
    def test_window_locks_are_exact_whatever_happened_in_between(
        self, page_size: int, window: int, order: tuple[int, ...]
    ) -> None:
        """Locked, forked, locked, made tombstones, revived, locked: and unlocked in any order."""
        system, size = self.windows(page_size, window), page_size
        tokens = list(range(6 * size))
        receipts = [self._lock(system, tokens, 1, 2, 3, 4, 5, 6)]
        fork = [*tokens[: 3 * size], *range(500, 500 + 2 * size)]
        receipts.append(self._lock(system, fork, 11, 12, 13, 14, 15))
        system.cache.evict(0, 999)
        receipts.append(self._lock(system, tokens[: 5 * size], 21, 22, 23, 24, 25))
        for index in (None, *order):
            if index is not None:
                system.cache.dec_lock_ref(receipts[index])
            self._are_exact(system, window)
        assert system.cache.swa_protected_size() == 0

    def _are_exact(self, system: System, window: int) -> None:
        """The window locks are those of the open receipts."""
        view, length = system.cache.view(), window_pages(system.page_size, window)
        expected = window_locks(view, system.page_size, length)
        assert {path: page.swa_locks for path, page in view.pages.items()} == expected
        assert all(page.locks >= page.swa_locks for page in view.pages.values())

    @clause("SWARADIX-9")
    @page_sizes
    @pytest.mark.parametrize("revived", [False, True])
    def test_window_lock_on_a_tombstone_is_undone(self, page_size: int, revived: bool) -> None:
        """Whether it is still one by then or not; afterwards eviction has its way."""
        system, req = self._short_of_a_window(page_size)
        self._are_exact(system, 3 * page_size)
        if revived:
            slots = system.allocator.alloc(4 * page_size)
            system.cache.insert(req.tokens[: 4 * page_size], slots)
            system.allocator.free(slots)
        self._are_exact(system, 3 * page_size)

        system.retract(req)

        assert not any(page.swa_locks for page in system.cache.view().pages.values())
        system.cache.evict(0, 999)
        assert not system.cache.view().pages
        system.settle()

    def _short_of_a_window(self, page_size: int) -> tuple[System, Request]:
        """A request that computed five pages, gave up the first two for its window of three, and
        of the five cached four: under its window lock are a tombstone and two live pages."""
        system = self.windows(page_size, 3 * page_size, handed_out=False, spy=True)
        req = system.admit(range(5 * page_size))
        assert system.compute(req, 5 * page_size)
        assert system.evict_swa(req) == 2 * page_size
        system.chunk(req, 4 * page_size)
        assert tombstones(system, req.tokens) == [True, True, False, False]
        return system, req

    @clause("SWARADIX-9")
    def test_lock_of_nothing_has_no_window(self) -> None:
        system = self.windows()
        system.insert([1], 1)
        receipt = system.cache.inc_lock_ref(system.cache.match_prefix([7]).last_device_node)
        assert (receipt.delta, receipt.swa_uuid) == (0, None)
        assert system.cache.swa_protected_size() == 0
        assert system.cache.dec_lock_ref(receipt) == 0

    @clause("SWARADIX-10")
    @sizes
    def test_sizes_count_pages_of_each_pool(self, page_size: int, window: int) -> None:
        for system in self._grown(page_size, window):
            _sizes_are_those_of(system)
        for _ in drained(system, 0, 1):
            _sizes_are_those_of(system)

    @clause("SWARADIX-10")
    @page_sizes
    def test_page_revived_under_a_window_lock_is_protected(self, page_size: int) -> None:
        """And one revived beside it is evictable."""
        system, req = self._short_of_a_window(page_size)
        _sizes_are_those_of(system)
        assert system.cache.swa_protected_size() == 2 * page_size
        system.cache.insert(req.tokens[: 4 * page_size], system.allocator.alloc(4 * page_size))
        _sizes_are_those_of(system)
        assert system.cache.swa_protected_size() == 3 * page_size
        system.retract(req)
        _sizes_are_those_of(system)
        assert system.cache.swa_evictable_size() == 4 * page_size

    @clause("SWARADIX-11")
    @sizes
    def test_path_whose_window_is_not_live_cannot_be_locked(
        self, page_size: int, window: int
    ) -> None:
        """What a match would not give, though it once did."""
        length = window_pages(page_size, window)
        count = length + 4
        system, tokens = self.windows(page_size, window), list(range(count * page_size))
        system.insert(tokens, *range(1, count + 1))
        keys = [tokens[: stop * page_size] for stop in range(1, count + 1)]
        nodes = [system.cache.match_prefix(key).last_device_node for key in keys]
        shed(system, tokens)
        gone = tombstones(system, tokens)
        for stop, node in enumerate(nodes, 1):
            if usable(gone[:stop], length) < stop:
                refused(system, "SWARADIX-11", system.cache.inc_lock_ref, node)
            else:
                assert system.cache.dec_lock_ref(system.cache.inc_lock_ref(node)) > 0
        system.cache.reset()
        for node in nodes:
            refused(system, "CACHE-13", system.cache.inc_lock_ref, node)

    @clause("SWARADIX-11")
    @page_sizes
    @pytest.mark.parametrize("hole", [0, 1])
    def test_path_shorter_than_a_window_must_have_no_tombstone(
        self, page_size: int, hole: int
    ) -> None:
        """Revived, it can be locked by the same handle."""
        system, tokens = self.windows(page_size, 4 * page_size), list(range(3 * page_size))
        drop(system, hole + 1)
        end = system.insert(tokens, 1, 2, 3).last_device_node
        refused(system, "SWARADIX-11", system.cache.inc_lock_ref, end)
        system.insert(tokens, 11, 12, 13)
        assert system.cache.dec_lock_ref(system.cache.inc_lock_ref(end)) == 3 * page_size

    # What happens in these tests

    def _lock(self, system: System, tokens: list[int], *pages: int) -> Any:
        """Insert, and lock where that ended."""
        return system.cache.inc_lock_ref(system.insert(tokens, *pages).last_device_node)

    def _grown(self, page_size: int, window: int) -> Iterator[System]:
        """A cache that grows: forks, tombstones, locks and revivals, thirty pages in other hands.

        At the end nothing is locked, and what the tree does not have of the pages 1 to 34 has been
        given back.
        """
        system, size = self.windows(page_size, window), page_size
        tokens = list(range(6 * size))
        fork = [*tokens[: 2 * size], *range(500, 500 + 2 * size)]
        receipts: list[Any] = []

        def lock(key: list[int]) -> None:
            node = system.cache.match_prefix(key).last_device_node
            receipts.append(system.cache.inc_lock_ref(node))

        drop(system, 2, 3)
        steps: list[Callable[[], Any]] = [
            lambda: system.insert(tokens, 1, 2, 3, 4, 5, 6),
            lambda: lock(tokens),
            lambda: system.insert(fork, 11, 12, 13, 14),
            lambda: evicted(system, 0, 3),
            lambda: system.insert(fork, 15, 16, 17, 18),
            lambda: lock(fork),
            lambda: system.insert(tokens, 21, 22, 23, 24, 25, 26),
            lambda: system.insert([7] * size, 27, extra_key="a"),
            lambda: system.cache.dec_lock_ref(receipts[0]),
            lambda: evicted(system, 1, 2),
            lambda: system.cache.dec_lock_ref(receipts[1]),
        ]
        for step in steps:
            step()
            yield system
        held = {page.page for page in system.cache.view().pages.values()}
        ours = [p for p in range(1, 35) if p not in held and p in system.allocator.view().held]
        system.allocator.free(system.slots(*ours))
        yield system


def _no_leaf_is_a_tombstone(system: System) -> None:
    pages = system.cache.view().pages
    extended = {(space, tokens[: -system.page_size]) for space, tokens in pages}
    assert not [path for path, page in pages.items() if page.tombstone and path not in extended]


def _live_pages_have_pairs(system: System) -> None:
    pairs = dict(system.allocator.view().pairs)
    for page in system.cache.view().pages.values():
        assert page.tombstone == (page.page not in pairs)
    slots = [page.page * system.page_size for page in system.cache.view().pages.values()]
    translated = system.allocator.translate_loc_from_full_to_swa(slots)
    assert [int(slot) // system.page_size for slot in translated] == [
        pairs.get(slot // system.page_size, 0) for slot in slots
    ]


def _sizes_are_those_of(system: System) -> None:
    cache, size = system.cache, system.page_size
    pages = cache.view().pages.values()
    live = [page for page in pages if not page.tombstone]
    locked = sum(page.locks > 0 for page in pages) * size
    window_locked = sum(page.swa_locks > 0 for page in live) * size
    assert cache.full_protected_size() == cache.protected_size() == locked
    assert cache.full_evictable_size() == cache.evictable_size() == len(pages) * size - locked
    assert cache.total_size() == len(pages) * size
    assert cache.swa_protected_size() == window_locked
    assert cache.swa_evictable_size() == len(live) * size - window_locked
