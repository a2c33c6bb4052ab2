"""How full the pools are, and whether anything is missing when nobody is live. Spec: SCHED.

The numbers and the words are those of the source document.
"""

from typing import cast

from kvspec.errors import MemoryLeakError
from kvspec.interfaces.prefix_cache import BasePrefixCache, WindowedCache
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.scheduler import TokenInfo
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator
from kvspec.memory_checker import get_swa_token_info
from kvspec.scheduler.pools import has_windows, usable_size

__all__ = ["check_sums", "token_info"]


def token_info(allocator: BaseTokenToKVPoolAllocator, tree_cache: BasePrefixCache) -> TokenInfo:
    """The source's four numbers, of the full pool if there are two (SCHED-3). O(1)."""
    total = usable_size(allocator)
    if has_windows(allocator):
        windowed = cast(SWATokenToKVPoolAllocator, allocator)
        available = windowed.full_available_size()
        evictable = cast(WindowedCache, tree_cache).full_evictable_size()
    else:
        available, evictable = allocator.available_size(), tree_cache.evictable_size()
    used = total - (available + evictable)
    return TokenInfo(used, used / total, available, evictable)


def check_sums(
    allocator: BaseTokenToKVPoolAllocator, rows: ReqToTokenPool, tree_cache: BasePrefixCache
) -> None:
    """Raise MemoryLeakError unless what is available and what can be evicted is all there is, and
    every row is free. O(1).
    """
    if has_windows(allocator):
        _check_two(cast(SWATokenToKVPoolAllocator, allocator), cast(WindowedCache, tree_cache))
    else:
        info = token_info(allocator, tree_cache)
        if info.num_used:
            raise MemoryLeakError(
                "token_to_kv_pool_allocator memory leak detected! "
                f"self.max_total_num_tokens={usable_size(allocator)}, "
                f"available_size={info.available_size}, evictable_size={info.evictable_size}, "
                f"protected_size={tree_cache.protected_size()}\n"
            )
    total = len(rows.req_to_token)
    if rows.available_size() != total:
        raise MemoryLeakError(
            "req_to_token_pool memory leak detected!"
            f"available_size={rows.available_size()}, total_size={total}\n"
        )


def _check_two(allocator: SWATokenToKVPoolAllocator, tree_cache: WindowedCache) -> None:
    info = get_swa_token_info(allocator, tree_cache)
    if info.full_num_used or info.swa_num_used:
        full, swa = usable_size(allocator), allocator.size_swa
        raise MemoryLeakError(
            "token_to_kv_pool_allocator memory leak detected! "
            f"self.full_tokens_per_layer={full}, full_available_size={info.full_available_size}, "
            f"full_evictable_size={info.full_evictable_size}, "
            f"self.tree_cache.full_protected_size()={tree_cache.full_protected_size()}\n"
            f"self.swa_tokens_per_layer={swa}, swa_available_size={info.swa_available_size}, "
            f"swa_evictable_size={info.swa_evictable_size}, "
            f"self.tree_cache.swa_protected_size()={tree_cache.swa_protected_size()}\n"
        )
