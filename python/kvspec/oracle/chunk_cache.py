"""The cache that does not share, for chunked prefill. Spec: CHUNK."""

from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.oracle.prefix_cache import BasePrefixCache, WindowedCache

__all__ = ["ChunkCache", "SWAChunkCache"]


class ChunkCache(BasePrefixCache):
    """What it does is what `BasePrefixCache` does (CHUNK-1, CHUNK-2, CHUNK-3, CHUNK-4)."""

    room = "chunk_cache"
    row_clause = "CHUNK-4"

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
    ) -> None:
        super().__init__(req_to_token_pool, token_to_kv_pool_allocator, page_size, disable=True)

    def evict(self, num_tokens: int) -> int:
        """Evict nothing (CHUNK-3)."""
        return 0


class SWAChunkCache(ChunkCache, WindowedCache):
    """The same over an allocator with a window pool, whose `free` gives back what pairs a row
    still has (CHUNK-5, CHUNK-6, CACHE-19, CACHE-20).
    """

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
    ) -> None:
        super().__init__(req_to_token_pool, token_to_kv_pool_allocator, page_size)
        self._require_window_pool("CHUNK-6")
