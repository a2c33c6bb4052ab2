"""The fast implementation: what the extension gives, and the caches over its tree core."""

from kvspec._core import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from kvspec.native.chunk_cache import ChunkCache
from kvspec.native.radix_cache import RadixCache, RadixCacheCpp
from kvspec.native.request_pool import DecodeReqToTokenPool, ReqToTokenPool

__all__ = [
    "ChunkCache",
    "DecodeReqToTokenPool",
    "PagedTokenToKVPoolAllocator",
    "RadixCache",
    "RadixCacheCpp",
    "ReqToTokenPool",
    "TokenToKVPoolAllocator",
]
