"""Conformance of the sliding-window radix cache. Spec: SWARADIX."""

import math
from itertools import product
from typing import Any

import pytest
from hypothesis.stateful import run_state_machine_as_test

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import numbers
from kvspec.conformance.suite import fuzzing
from kvspec.conformance.swa_radix_cache.contents import WindowContentConformance
from kvspec.conformance.swa_radix_cache.eviction import WindowEvictionConformance
from kvspec.conformance.swa_radix_cache.locks import WindowLockConformance
from kvspec.conformance.swa_radix_cache.ownership import OwnershipConformance
from kvspec.conformance.swa_radix_cache.paths import Windows
from kvspec.conformance.swa_radix_cache.wide import WideConformance
from kvspec.conformance.swa_radix_cache.windows import drained, drop, page_sizes
from kvspec.errors import ContractError
from kvspec.interfaces.swa_radix_cache import SWARadixCache

__all__ = ["SWARadixCacheConformance"]


class SWARadixCacheConformance(
    WindowContentConformance,
    WindowLockConformance,
    WindowEvictionConformance,
    OwnershipConformance,
    WideConformance,
):
    """The clauses SWARADIX, and those of RADIX that hold too."""

    @clause(*(f"SWARADIX-{n}" for n in (*range(1, 17), 21)))
    def test_random_trees_with_windows_are_what_the_clauses_say(self) -> None:
        run_state_machine_as_test(Windows.of(self), settings=fuzzing(40))

    # Options and reading

    @clause("SWARADIX-19")
    @pytest.mark.parametrize("window", [0, -1, -4096])
    def test_window_below_one_is_refused(self, window: int) -> None:
        with pytest.raises(ContractError) as caught:
            self.windows(window=window)
        assert caught.value.clause == "SWARADIX-19"

    @clause("SWARADIX-19")
    @page_sizes
    def test_allocator_without_a_window_pool_is_refused(self, page_size: int) -> None:
        pools = self.serving(page_size)
        with pytest.raises(ContractError) as caught:
            self._make(pools.pool, pools.allocator, page_size)
        assert caught.value.clause == "SWARADIX-19"

    @clause("SWARADIX-19")
    @page_sizes
    def test_windows_of_any_size_are_kept(self, page_size: int) -> None:
        for window in (1, 4, 5, 2**40):
            cache = self.windows(page_size, window).cache
            assert (cache.sliding_window_size, cache.page_size) == (window, page_size)

    @clause("SWARADIX-1", "SWARADIX-12")
    @page_sizes
    def test_windows_without_pools_are_all_live(self, page_size: int) -> None:
        cache, size = self._make(None, None, page_size), page_size
        slots = list(range(size, 4 * size))
        result = cache.insert(range(3 * size), slots)
        assert result.swa.adopted == result.adopted == [(0, 3 * size)]
        assert numbers(cache.match_prefix(range(2 * size)).device_indices) == slots[: 2 * size]
        assert cache.evict(1) == (size, size)
        assert (cache.swa_evictable_size(), cache.full_evictable_size()) == (2 * size, 2 * size)
        cache.reset()
        assert cache.total_size() == 0

    @clause("CACHE-18", "SWARADIX-18")
    @page_sizes
    def test_disabled_cache_gives_back_the_row_and_its_pairs(self, page_size: int) -> None:
        system = self.engine(page_size, 3, disable=True)
        req = system.admit(range(20))
        system.chunk(req, 13)
        assert system.evict_swa(req) == (10 if page_size == 1 else 8)
        system.chunk(req, 20)
        assert system.cache.evict(9, 9) == (0, 0)
        system.finish(req)
        assert len(system.allocator.frees) == 1
        assert system.allocator.swa_available_size() == 64 * page_size
        system.settle()

    def _make(self, pool: Any, allocator: Any, page_size: int) -> Any:
        return self.subject(
            "SWARadixCache",
            SWARadixCache,
            "swa_radix_cache",
            "prefix_cache",
            req_to_token_pool=pool,
            token_to_kv_pool_allocator=allocator,
            sliding_window_size=2 * page_size,
            page_size=page_size,
            disable=False,
        )

    @clause("SWARADIX-20")
    @page_sizes
    def test_work_does_not_grow_with_the_tree_of_tombstones(self, page_size: int) -> None:
        """Paths of four pages, of which the middle two are tombstones."""
        costs = []
        for width in (8, 16, 32):
            system = self.windows(page_size, page_count=4 * width + 4)
            keys = [[index] * (4 * page_size) for index in range(width)]
            for index, key in enumerate(keys):
                pages = range(4 * index + 1, 4 * index + 5)
                drop(system, *pages[1:3])
                system.insert(key, *pages)
            before = system.cache.counters()["tokens_compared"]
            for stop in (4, 3, 2, 1):
                system.cache.match_prefix(keys[width // 2][: stop * page_size])
            system.insert(keys[width // 2], *range(4 * width + 1, 4 * width + 5))
            costs.append(system.cache.counters()["tokens_compared"] - before)
            assert system.cache.evict(0, width * page_size).swa_num_tokens == width * page_size
            assert system.cache.evict(0, 99 * width).full_num_tokens > 0
            assert system.cache.total_size() == 0
            assert system.cache.counters()["heap_moves"] <= 32 * width * math.log2(4 * width)
        assert costs[0] == costs[1] == costs[2] <= 3 * 14 * page_size

    @clause("SWARADIX-21")
    @page_sizes
    @pytest.mark.parametrize("window", [1, 3, 9])
    def test_check_finds_nothing_in_a_sound_tree_with_windows(
        self, page_size: int, window: int
    ) -> None:
        for system in self._grown(page_size, window):
            system.cache.check()
        for _ in drained(system, 0, 1):
            system.cache.check()

    @clause("RADIX-17")
    @page_sizes
    def test_digest_covers_tombstones_and_window_locks(self, page_size: int) -> None:
        """The same keys and locks, with windows of one page and two, with a hole and without."""
        digests = []
        for window, holes in product((1, 2), ((), (1,))):
            system = self.windows(page_size, window * page_size)
            drop(system, *holes)
            node = system.insert(range(4 * page_size), 1, 2, 3, 4).last_device_node
            before = system.cache.digest()
            system.cache.inc_lock_ref(node)
            digests += [system.cache.digest()] + ([before] if window == 1 else [])
        assert len(set(digests)) == len(digests) == 6
