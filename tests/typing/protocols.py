"""mypy reads this file: both implementations satisfy the interfaces."""

from kvspec import native, oracle, scheduler
from kvspec.interfaces.chunk_cache import ChunkCache, SWAChunkCache
from kvspec.interfaces.host_memory import HostArena
from kvspec.interfaces.kv_storage import (
    HostKVCache,
    MHATokenToKVPool,
    MLATokenToKVPool,
    SWAKVPool,
)
from kvspec.interfaces.memory_checker import CheckMemory
from kvspec.interfaces.memory_saver import TorchMemorySaverAdapter
from kvspec.interfaces.ownership_ledger import OwnershipLedger
from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.interfaces.prefix_key import PageHashes
from kvspec.interfaces.radix_cache import RadixCache
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.scheduler import Req, Scheduler, ServerArgs
from kvspec.interfaces.shared_memory import SharedSegment
from kvspec.interfaces.shm_channel import ShmChannel
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator
from kvspec.interfaces.swa_radix_cache import SWARadixCache

slots: list[type[BaseTokenToKVPoolAllocator]] = [
    native.TokenToKVPoolAllocator,
    oracle.TokenToKVPoolAllocator,
]
pages: list[type[PagedTokenToKVPoolAllocator]] = [
    native.PagedTokenToKVPoolAllocator,
    oracle.PagedTokenToKVPoolAllocator,
]
window_pages: list[type[SWATokenToKVPoolAllocator]] = [
    native.SWATokenToKVPoolAllocator,
    oracle.SWATokenToKVPoolAllocator,
]
rows: list[type[ReqToTokenPool]] = [
    native.ReqToTokenPool,
    oracle.ReqToTokenPool,
    native.DecodeReqToTokenPool,
    oracle.DecodeReqToTokenPool,
]
trees: list[type[RadixCache]] = [native.RadixCache, oracle.RadixCache]
window_trees: list[type[SWARadixCache]] = [native.SWARadixCache, oracle.SWARadixCache]
chunks: list[type[ChunkCache]] = [native.ChunkCache, oracle.ChunkCache]
window_chunks: list[type[SWAChunkCache]] = [native.SWAChunkCache, oracle.SWAChunkCache]
hashes: PageHashes = oracle.page_hashes
check: CheckMemory = oracle.check_memory
ledgers: list[type[OwnershipLedger]] = [native.OwnershipLedger, oracle.OwnershipLedger]
heads: list[type[MHATokenToKVPool]] = [native.MHATokenToKVPool, oracle.MHATokenToKVPool]
latents: list[type[MLATokenToKVPool]] = [native.MLATokenToKVPool, oracle.MLATokenToKVPool]
windows: list[type[SWAKVPool]] = [native.SWAKVPool, oracle.SWAKVPool]
hosts: list[type[HostKVCache]] = [
    native.MHATokenToKVPoolHost,
    oracle.MHATokenToKVPoolHost,
    native.MLATokenToKVPoolHost,
    oracle.MLATokenToKVPoolHost,
]
segments: list[type[SharedSegment]] = [native.SharedSegment, oracle.SharedSegment]
arenas: list[type[HostArena]] = [native.HostArena, oracle.HostArena]
channels: list[type[ShmChannel]] = [native.ShmChannel, oracle.ShmChannel]
savers: list[type[TorchMemorySaverAdapter]] = [
    native.TorchMemorySaverAdapter,
    oracle.TorchMemorySaverAdapter,
]
requests: type[Req] = scheduler.Req
options: type[ServerArgs] = scheduler.ServerArgs
schedulers: type[Scheduler[scheduler.Req, scheduler.ServerArgs]] = scheduler.Scheduler
