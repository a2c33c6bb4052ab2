"""The oracle: every room as the shortest correct text, in lists, sets and dicts."""

from kvspec.memory_budget import MemoryBudget
from kvspec.memory_checker import SWATokenInfo, check_memory, get_swa_token_info
from kvspec.oracle.chunk_cache import ChunkCache, SWAChunkCache
from kvspec.oracle.host_memory import HostArena
from kvspec.oracle.kv_storage import (
    HostKVCache,
    KVCache,
    MHATokenToKVPool,
    MHATokenToKVPoolHost,
    MLATokenToKVPool,
    MLATokenToKVPoolHost,
    SWAKVPool,
)
from kvspec.oracle.memory_saver import TorchMemorySaverAdapter
from kvspec.oracle.ownership_ledger import OwnershipLedger
from kvspec.oracle.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.oracle.radix_cache import RadixCache
from kvspec.oracle.request_pool import DecodeReqToTokenPool, ReqToTokenPool
from kvspec.oracle.shared_memory import SharedSegment
from kvspec.oracle.shm_channel import ShmChannel
from kvspec.oracle.slot_allocator import TokenToKVPoolAllocator
from kvspec.oracle.swa_allocator import SWATokenToKVPoolAllocator
from kvspec.oracle.swa_radix_cache import SWARadixCache
from kvspec.prefix_key import RadixKey, namespace_frame, page_hashes
from kvspec.scheduler import Req, Scheduler, ServerArgs

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
    "MemoryBudget",
    "OwnershipLedger",
    "PagedTokenToKVPoolAllocator",
    "RadixCache",
    "RadixKey",
    "Req",
    "ReqToTokenPool",
    "SWAChunkCache",
    "SWAKVPool",
    "SWARadixCache",
    "SWATokenInfo",
    "SWATokenToKVPoolAllocator",
    "Scheduler",
    "ServerArgs",
    "SharedSegment",
    "ShmChannel",
    "TokenToKVPoolAllocator",
    "TorchMemorySaverAdapter",
    "check_memory",
    "get_swa_token_info",
    "namespace_frame",
    "page_hashes",
]
