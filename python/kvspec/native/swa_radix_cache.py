"""The radix cache of models with sliding-window layers. Spec: SWARADIX.

The tree knows which pages are tombstones; who has a pair outside of it, the allocator says.
"""

from collections.abc import Callable
from typing import ClassVar

from kvspec import _core
from kvspec.errors import ContractError
from kvspec.interfaces.prefix_cache import EvictResult, InsertRanges
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.native.prefix_cache import WindowedCache, changing
from kvspec.native.radix_cache import TreeCache

__all__ = ["SWARadixCache"]


class SWARadixCache(TreeCache, WindowedCache):
    """A prefix cache that shares, over two pools (SWARADIX-1 to SWARADIX-20)."""

    room: ClassVar[str] = "swa_radix_cache"

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        sliding_window_size: int,
        page_size: int,
        disable: bool = False,
    ) -> None:
        super().__init__(
            req_to_token_pool,
            token_to_kv_pool_allocator,
            page_size,
            disable,
            sliding_window_size=sliding_window_size,
        )
        if sliding_window_size < 1:
            raise ContractError(f"SWARADIX-19: sliding_window_size is {sliding_window_size}")
        self._require_window_pool("SWARADIX-19")
        self.sliding_window_size = sliding_window_size

    def _add_pairs(self, plan: _core.InsertPlan) -> InsertRanges:
        """Complete a plan by what the allocator has; without one every slot has its window slot
        (SWARADIX-3 to SWARADIX-6).
        """
        pool, pairs = self._window_pool, None
        if pool is not None:
            pairs = pool.translate_loc_from_full_to_swa(plan.named_slots())
        self._tree.add_pairs(plan, pairs)
        return InsertRanges(*plan.pair_ranges())

    def _revive(self, plan: _core.InsertPlan, then: Callable[[], None]) -> None:
        """Move the pairs that revive tombstones, and if the rest fails move them back (CACHE-6)."""
        pool, moves = self._window_pool, plan.revived_slots()
        if pool is None or moves is None:
            then()
            return
        tree, own = moves
        pool.move_swa(tree, own)
        try:
            then()
        except BaseException:
            pool.move_swa(own, tree)
            raise

    @changing
    def evict(self, full_num_tokens: int, swa_num_tokens: int = 0) -> EvictResult:
        """Make room in both pools (SWARADIX-12 to SWARADIX-17). O(log n) a leaf or run of
        tombstones, amortised.
        """
        return EvictResult(*self._evict(full_num_tokens, swa_num_tokens))

    def _frontier(self, prelen: int, chunk_size: int | None, window_size: int | None) -> int:
        if chunk_size is None and window_size is None:
            window_size = self.sliding_window_size
        window = -(-self.sliding_window_size // self.page_size)  # what a match asks for, in pages
        kept = (prelen // self.page_size - window) * self.page_size
        return min(super()._frontier(prelen, chunk_size, window_size), max(kept, 0))

    def check(self) -> None:
        """Raise ContractError if the books are broken, or are not the allocator's (SWARADIX-21).

        O(tokens).
        """
        super().check()
        if self._window_pool is None:
            return
        for tombstones in (False, True):
            firsts = self._tree.first_slots(tombstones)
            windows = self._window_pool.translate_loc_from_full_to_swa(firsts)
            wrong = firsts[(windows > 0) == tombstones]
            if wrong.numel():
                what = "a tombstone and has a pair" if tombstones else "live and has no pair"
                page = int(wrong[0]) // self.page_size
                raise ContractError(f"SWARADIX-8: page {page} is {what}")
