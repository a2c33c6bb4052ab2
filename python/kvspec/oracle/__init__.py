"""The oracle: every room as the shortest correct text, in lists, sets and dicts."""

from kvspec.memory_checker import check_memory
from kvspec.oracle.chunk_cache import ChunkCache
from kvspec.oracle.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.oracle.radix_cache import RadixCache
from kvspec.oracle.request_pool import DecodeReqToTokenPool, ReqToTokenPool
from kvspec.oracle.slot_allocator import TokenToKVPoolAllocator
from kvspec.prefix_key import RadixKey, namespace_frame, page_hashes

__all__ = [
    "ChunkCache",
    "DecodeReqToTokenPool",
    "PagedTokenToKVPoolAllocator",
    "RadixCache",
    "RadixKey",
    "ReqToTokenPool",
    "TokenToKVPoolAllocator",
    "check_memory",
    "namespace_frame",
    "page_hashes",
]
