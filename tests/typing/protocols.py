"""mypy reads this file: both implementations satisfy the interfaces."""

from kvspec import native, oracle
from kvspec.interfaces.chunk_cache import ChunkCache
from kvspec.interfaces.memory_checker import CheckMemory
from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.interfaces.prefix_key import PageHashes
from kvspec.interfaces.radix_cache import RadixCache
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator

slots: list[type[BaseTokenToKVPoolAllocator]] = [
    native.TokenToKVPoolAllocator,
    oracle.TokenToKVPoolAllocator,
]
pages: list[type[PagedTokenToKVPoolAllocator]] = [
    native.PagedTokenToKVPoolAllocator,
    oracle.PagedTokenToKVPoolAllocator,
]
rows: list[type[ReqToTokenPool]] = [
    native.ReqToTokenPool,
    oracle.ReqToTokenPool,
    native.DecodeReqToTokenPool,
    oracle.DecodeReqToTokenPool,
]
trees: list[type[RadixCache]] = [native.RadixCache, oracle.RadixCache]
chunks: list[type[ChunkCache]] = [native.ChunkCache, oracle.ChunkCache]
hashes: PageHashes = oracle.page_hashes
check: CheckMemory = oracle.check_memory
