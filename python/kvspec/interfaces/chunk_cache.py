"""The cache that does not share. Spec: CHUNK."""

from typing import Protocol

from kvspec.interfaces.prefix_cache import BasePrefixCache

__all__ = ["ChunkCache"]


class ChunkCache(BasePrefixCache, Protocol):
    """The interface of a prefix cache for chunked prefill without sharing.

    It finds, adopts and locks nothing (CHUNK-1, CHUNK-2, CHUNK-3, CHUNK-4, CACHE-18).
    """
