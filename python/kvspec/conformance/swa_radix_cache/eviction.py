"""What leaves each pool, and in which order. Spec: SWARADIX-12 to SWARADIX-17."""

from collections.abc import Sequence

import pytest

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import System, refused
from kvspec.conformance.swa_radix_cache.windows import (
    WindowConformance,
    drop,
    evicted,
    page_sizes,
    shed,
    sizes,
    tombstones,
    window_pages,
)

__all__ = ["WindowEvictionConformance"]


class WindowEvictionConformance(WindowConformance):
    """Evict, from both pools and from one."""

    def path(self, page_size: int, window: int, count: int) -> tuple[System, list[int]]:
        """A cache with one path of so many pages, numbered from 1, and its tokens."""
        system = self.windows(page_size, window, spy=True)
        tokens = list(range(count * page_size))
        system.insert(tokens, *range(1, count + 1))
        return system, tokens

    # Room in the full pool

    @clause("SWARADIX-12")
    @page_sizes
    @pytest.mark.parametrize("tokens", [0, 1, 4, 5, 11, 99])
    def test_leaves_go_from_both_pools(self, page_size: int, tokens: int) -> None:
        system, key = self.path(page_size, 2, 5)
        pages = min(-(-tokens // page_size), 5)
        assert system.cache.evict(tokens) == (pages * page_size, pages * page_size)
        assert system.held_along(key) == system.slots(*range(1, 6 - pages))

    @clause("SWARADIX-12")
    @page_sizes
    def test_leaf_walked_longest_ago_goes_first(self, page_size: int) -> None:
        system = self.windows(page_size, spy=True)
        keys = [[token] * page_size for token in (1, 2, 3, 4)]
        for page, key in enumerate(keys, 1):
            system.insert(key, page)
        for which in (2, 0):
            system.cache.match_prefix(keys[which])
        system.cache.inc_lock_ref(system.cache.match_prefix(keys[3]).last_device_node)
        assert [evicted(system, 1, 0)[0] for _ in range(4)] == [[2], [3], [1], []]

    @clause("SWARADIX-12")
    @page_sizes
    @pytest.mark.parametrize("pages", [1, 2, 3, 4, 5, 9])
    def test_tombstones_that_become_leaves_count_as_full_tokens(
        self, page_size: int, pages: int
    ) -> None:
        """Of six pages the fourth and fifth are tombstones, and the second."""
        system = self.windows(page_size)
        drop(system, 2, 4, 5)
        system.insert(range(6 * page_size), 1, 2, 3, 4, 5, 6)
        result = system.cache.evict(pages * page_size)
        full, swa = {1: (3, 1), 2: (3, 1), 3: (3, 1), 4: (5, 2), 5: (5, 2), 9: (6, 3)}[pages]
        assert result == (full * page_size, swa * page_size)
        assert len(system.cache.view().pages) == 6 - full

    @clause("SWARADIX-12")
    def test_eviction_for_the_full_pool_leaves_other_pairs(self) -> None:
        system, key = self.path(1, 1, 4)
        assert evicted(system, 2, 0) == ([3, 4], [])
        assert tombstones(system, key) == [False, False]

    # Room in the window pool

    @clause("SWARADIX-13")
    @page_sizes
    @pytest.mark.parametrize("tokens", [0, 1, 4, 5, 13, 99])
    def test_pages_that_others_extend_become_tombstones(self, page_size: int, tokens: int) -> None:
        system, key = self.path(page_size, 2, 5)
        pages = min(-(-tokens // page_size), 5)
        full = 5 if pages == 5 else 0
        assert system.cache.evict(0, tokens) == (full * page_size, pages * page_size)
        assert tombstones(system, key) == ([n < pages for n in range(5)] if not full else [])

    @clause("SWARADIX-13")
    @page_sizes
    @pytest.mark.parametrize(("full", "swa"), [(2, 1), (2, 2), (2, 3), (2, 5), (1, 6), (6, 6)])
    def test_what_went_for_the_full_pool_counts(self, page_size: int, full: int, swa: int) -> None:
        system, key = self.path(page_size, 2, 7)
        result = system.cache.evict(full * page_size, swa * page_size)
        more = max(swa - full, 0)
        assert result == (full * page_size, (full + more) * page_size)
        assert tombstones(system, key) == [n < more for n in range(7 - full)]

    @clause("SWARADIX-13")
    @page_sizes
    def test_leaf_without_company_leaves_both_pools(self, page_size: int) -> None:
        system = self.windows(page_size, spy=True)
        for page in (1, 2):
            system.insert([page] * page_size, page)
        assert evicted(system, 0, 1) == ([1], [])
        assert system.cache.evict(0, 2 * page_size) == (page_size, page_size)

    @clause("SWARADIX-13")
    @sizes
    def test_evicting_windows_gives_as_much_as_is_asked_for(
        self, page_size: int, window: int
    ) -> None:
        """Unless it is locked: here the last window of the path."""
        length = window_pages(page_size, window)
        system, key = self.path(page_size, window, length + 4)
        system.cache.inc_lock_ref(system.cache.match_prefix(key).last_device_node)
        for asked, given in ((1, 1), (2, 2), (9, 1), (1, 0)):
            before = system.allocator.swa_available_size()
            result = system.cache.evict(0, asked * page_size)
            assert result == (0, given * page_size)
            assert system.allocator.swa_available_size() == before + given * page_size

    # Order

    @clause("SWARADIX-14")
    @sizes
    def test_end_of_a_path_goes_last(self, page_size: int, window: int) -> None:
        """So the path is found until its last window is begun."""
        length = window_pages(page_size, window)
        system, key = self.path(page_size, window, length + 3)
        for page in (1, 2, 3):
            assert evicted(system, 0, 1) == ([], [page])
            assert len(system.held_along(key)) == len(key)
        for page in range(4, length + 3):
            assert evicted(system, 0, 1) == ([], [page])
            assert system.held_along(key) == []
        assert evicted(system, 0, 1) == (list(range(1, length + 4)), [])

    @clause("SWARADIX-14")
    @page_sizes
    def test_page_walked_longest_ago_goes_first(self, page_size: int) -> None:
        """Three branches, of which the first has been found since and the second inserted again."""
        system = self.windows(page_size, spy=True)
        keys = [[token for n in (1, last) for token in [n] * page_size] for last in (2, 3, 4)]
        system.insert(keys[0], 1, 2)
        system.insert(keys[1], 1, 3)
        system.insert(keys[2], 1, 4)
        system.insert([9] * page_size, 5)
        system.cache.match_prefix(keys[0])
        system.insert(keys[1], 11, 13)
        order = [evicted(system, 0, 1) for _ in range(4)]
        assert order == [([4], []), ([5], []), ([2], []), ([], [1])]
        assert evicted(system, 0, 1) == ([1, 3], [])

    @clause("SWARADIX-14")
    def test_place_in_the_path_decides_and_not_the_page(self) -> None:
        system = self.windows(spy=True)
        system.insert([1, 2, 3, 4], 7, 3, 9, 5)
        order = [evicted(system, 0, 1) for _ in range(4)]
        assert order == [([], [7]), ([], [3]), ([], [9]), ([3, 5, 7, 9], [])]

    @clause("SWARADIX-14")
    def test_match_of_a_part_renews_that_part(self) -> None:
        system, _ = self.path(1, 1, 5)
        system.cache.match_prefix([0, 1, 77])
        assert [evicted(system, 0, 1) for _ in range(2)] == [([], [3]), ([], [4])]
        assert evicted(system, 0, 1) == ([3, 4, 5], [])
        assert evicted(system, 0, 1) == ([], [1])

    @clause("SWARADIX-14")
    def test_revived_page_is_as_recent_as_its_path(self) -> None:
        system, key = self.path(1, 1, 3)
        shed(system, key)
        system.insert([8, 9], 8, 9)
        system.insert(key, 11, 12, 13)
        assert [evicted(system, 0, 1) for _ in range(2)] == [([], [8]), ([8, 9], [])]
        assert evicted(system, 0, 2) == ([], [1, 2])

    # Locks

    @clause("SWARADIX-15")
    @sizes
    @pytest.mark.parametrize("full", [0, 99])
    def test_window_of_a_lock_stays(self, page_size: int, window: int, full: int) -> None:
        length = window_pages(page_size, window)
        system, key = self.path(page_size, window, length + 4)
        stop = length + 2
        node = system.cache.match_prefix(key[: stop * page_size]).last_device_node
        receipt = system.cache.inc_lock_ref(node)

        evicted(system, full, 99)

        assert tombstones(system, key) == [True] * 2 + [False] * length
        locked = key[: stop * page_size]
        assert system.held_along(locked) == system.slots(*range(1, stop + 1))
        system.cache.dec_lock_ref(receipt)
        evicted(system, 0, length)
        assert not system.cache.view().pages

    @clause("SWARADIX-15")
    @page_sizes
    def test_windows_of_two_locks_on_one_path_stay(self, page_size: int) -> None:
        system, key = self.path(page_size, 2 * page_size, 8)
        for stop in (3, 7):
            node = system.cache.match_prefix(key[: stop * page_size]).last_device_node
            system.cache.inc_lock_ref(node)
        evicted(system, 99, 99)
        assert tombstones(system, key) == [True, False, False, True, True, False, False]

    # What is given back

    @clause("SWARADIX-16")
    def test_slots_are_given_back_in_order_of_eviction(self) -> None:
        system = self.windows(spy=True)
        drop(system, 13, 16)
        system.insert([1, 2, 3, 4], 14, 13, 16, 11)
        system.insert([5], 9)
        system.insert([6, 7, 8], 3, 8, 4)

        system.cache.evict(4, 5)

        assert system.allocator.frees == [[11, 16, 13, 14, 9]]
        assert system.allocator.swa_frees == [[3, 8]]

    @clause("SWARADIX-16")
    @pytest.mark.parametrize("page_size", [2, 4])
    def test_exactly_what_was_evicted_is_given_back(self, page_size: int) -> None:
        system = self.windows(page_size, spy=True)
        drop(system, 13, 16)
        system.insert(range(4 * page_size), 14, 13, 16, 11)
        system.insert(range(100, 100 + page_size), 9)
        system.insert(range(200, 200 + 3 * page_size), 8, 3, 4)
        pairs = dict(system.allocator.view().pairs)

        system.cache.evict(4 * page_size, 5 * page_size)

        assert list(map(system.pages, system.allocator.frees)) == [[9, 11, 13, 14, 16]]
        assert list(map(system.pages, system.allocator.swa_frees)) == [[3, 8]]
        left = {page: pairs[page] for page in pairs if page not in (3, 8, 9, 11, 14)}
        assert dict(system.allocator.view().pairs) == left
        assert system.allocator.full_available_size() == 5 * page_size
        assert system.allocator.swa_available_size() == (2 + 5) * page_size

    @clause("SWARADIX-16")
    @page_sizes
    def test_tombstone_that_leaves_in_the_same_call_is_given_back_once(
        self, page_size: int
    ) -> None:
        system, _ = self.path(page_size, 1, 3)
        system.cache.evict(0, 3 * page_size)
        frees = [sorted(system.pages(slots)) for slots in system.allocator.frees]
        assert frees == [[1, 2, 3]]
        assert system.allocator.swa_frees == [[]]
        assert system.allocator.full_available_size() == 3 * page_size
        assert system.allocator.swa_available_size() == 3 * page_size

    @clause("SWARADIX-16")
    @pytest.mark.parametrize("amounts", [(0, 0), (1, 0), (0, 1), (9, 9)])
    def test_nothing_is_given_back_in_vain(self, amounts: tuple[int, int]) -> None:
        system, key = self.path(1, 3, 3)
        system.cache.inc_lock_ref(system.cache.match_prefix(key).last_device_node)
        assert system.cache.evict(*amounts) == (0, 0)
        assert system.allocator.frees == []

    @clause("SWARADIX-17")
    @page_sizes
    @pytest.mark.parametrize("amounts", [(-1,), (-1, 0), (0, -1), (3, -1), (-100, 3)])
    def test_negative_amount_for_either_pool_is_refused(
        self, page_size: int, amounts: Sequence[int]
    ) -> None:
        system, _ = self.path(page_size, 1, 3)
        refused(system, "SWARADIX-17", system.cache.evict, *amounts)
