"""The cache that does not share. Spec: CHUNK."""

from typing import Protocol

from kvspec.interfaces.prefix_cache import BasePrefixCache, WindowedCache

__all__ = ["ChunkCache", "SWAChunkCache"]


class ChunkCache(BasePrefixCache, Protocol):
    """The interface of a prefix cache for chunked prefill without sharing.

    It finds, adopts and locks nothing (CHUNK-1, CHUNK-2, CHUNK-3, CHUNK-4, CACHE-18).
    """

    def evict(self, num_tokens: int) -> int:
        """Evict nothing (CHUNK-3). O(1)."""


class SWAChunkCache(ChunkCache, WindowedCache, Protocol):
    """The same over an allocator with a window pool, which it gives back as a request moves on
    (CHUNK-5, CHUNK-6, CACHE-19, CACHE-20).
    """
