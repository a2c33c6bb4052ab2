"""The caches that do not share, for chunked prefill. Spec: CHUNK."""

from typing import ClassVar

from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.native.prefix_cache import PrefixCache, WindowedCache

__all__ = ["ChunkCache", "SWAChunkCache"]


class ChunkCache(PrefixCache):
    """Nearly all it does is what `PrefixCache` does (CHUNK-1, CHUNK-2, CHUNK-3, CHUNK-4)."""

    room: ClassVar[str] = "chunk_cache"
    row_clause: ClassVar[str] = "CHUNK-4"

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
    ) -> None:
        super().__init__(req_to_token_pool, token_to_kv_pool_allocator, page_size)

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
