"""The cache that does not share, for chunked prefill. Spec: CHUNK."""

from typing import ClassVar

from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.native.prefix_cache import PrefixCache

__all__ = ["ChunkCache"]


class ChunkCache(PrefixCache):
    """Everything it does is what `PrefixCache` does (CHUNK-1, CHUNK-2, CHUNK-3, CHUNK-4)."""

    room: ClassVar[str] = "chunk_cache"
    row_clause: ClassVar[str] = "CHUNK-4"

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
    ) -> None:
        super().__init__(req_to_token_pool, token_to_kv_pool_allocator, page_size)
