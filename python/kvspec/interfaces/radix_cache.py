"""The radix cache. Spec: RADIX."""

from typing import Literal, Protocol, TypeAlias

from kvspec.interfaces.prefix_cache import BasePrefixCache

__all__ = ["EvictionGranularity", "EvictionPolicy", "RadixCache"]

EvictionPolicy: TypeAlias = Literal["lru", "lfu", "fifo", "mru", "filo", "slru", "priority"]
EvictionGranularity: TypeAlias = Literal["page", "node"]


class RadixCache(BasePrefixCache, Protocol):
    """A prefix cache that shares: a trie of pages per namespace (RADIX-1 to RADIX-18)."""

    eviction_policy: str
    eviction_granularity: str

    def evict(self, num_tokens: int) -> int:
        """Give back up to `num_tokens` evictable tokens (RADIX-8 to RADIX-13). O(log n) a leaf."""
