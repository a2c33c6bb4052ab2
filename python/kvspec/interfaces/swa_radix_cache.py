"""The radix cache of models with sliding-window layers. Spec: SWARADIX."""

from typing import Protocol

from kvspec.interfaces.prefix_cache import BasePrefixCache, EvictResult, WindowedCache

__all__ = ["SWARadixCache"]


class SWARadixCache(BasePrefixCache, WindowedCache, Protocol):
    """A prefix cache that shares, whose pages can be without their pair (SWARADIX-1 to SWARADIX-7).

    A resident page is live while the allocator has a pair for it (SWARADIX-8), and no eviction
    takes what a live request needs (SWARADIX-9, SWARADIX-11, SWARADIX-15, SWARADIX-18). Match and
    insert cost O(tokens compared and added) (SWARADIX-20); `check` is for all of it (SWARADIX-21).
    """

    sliding_window_size: int
    """W, in tokens, at least 1 (SWARADIX-19)."""

    def evict(self, full_num_tokens: int, swa_num_tokens: int = 0) -> EvictResult:
        """Make room in both pools (SWARADIX-12 to SWARADIX-17).

        First leaves, from both pools, until `full_num_tokens` have gone; then window slots, until
        `swa_num_tokens` have gone in all. O(log n) a leaf or run of tombstones, amortised.
        """
