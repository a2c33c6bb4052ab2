"""The fast implementation: what the extension gives, and the caches over its tree core."""

from kvspec._core import (
    OwnershipLedger,
    PagedTokenToKVPoolAllocator,
    SharedSegment,
    SWATokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
)
from kvspec.native.chunk_cache import ChunkCache, SWAChunkCache
from kvspec.native.host_memory import HostArena
from kvspec.native.kv_storage import (
    HostKVCache,
    KVCache,
    MHATokenToKVPool,
    MHATokenToKVPoolHost,
    MLATokenToKVPool,
    MLATokenToKVPoolHost,
    SWAKVPool,
)
from kvspec.native.memory_saver import TorchMemorySaverAdapter
from kvspec.native.radix_cache import RadixCache, RadixCacheCpp
from kvspec.native.request_pool import DecodeReqToTokenPool, ReqToTokenPool
from kvspec.native.shm_channel import ShmChannel
from kvspec.native.swa_radix_cache import SWARadixCache

__all__ = [
    "ChunkCache",
    "DecodeReqToTokenPool",
    "HostArena",
    "HostKVCache",
    "KVCache",
    "MHATokenToKVPool",
    "MHATokenToKVPoolHost",
    "MLATokenToKVPool",
    "MLATokenToKVPoolHost",
    "OwnershipLedger",
    "PagedTokenToKVPoolAllocator",
    "RadixCache",
    "RadixCacheCpp",
    "ReqToTokenPool",
    "SWAChunkCache",
    "SWAKVPool",
    "SWARadixCache",
    "SWATokenToKVPoolAllocator",
    "SharedSegment",
    "ShmChannel",
    "TokenToKVPoolAllocator",
    "TorchMemorySaverAdapter",
]
