"""Who owns every page? Spec: CHECK."""

from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

from kvspec.interfaces.prefix_cache import BasePrefixCache, Req, WindowedCache
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator

__all__ = ["CheckMemory", "GetSWATokenInfo", "SWATokenInfo"]


class SWATokenInfo(NamedTuple):
    """How full the two pools are, in tokens; a usage is a share of the pool, 0 of an empty one."""

    full_num_used: int
    """Neither available nor evictable."""
    swa_num_used: int
    full_token_usage: float
    swa_token_usage: float
    full_available_size: int
    full_evictable_size: int
    swa_available_size: int
    swa_evictable_size: int


class CheckMemory(Protocol):
    def __call__(
        self,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator,
        req_to_token_pool: ReqToTokenPool,
        tree_cache: BasePrefixCache,
        reqs: Iterable[Req] = (),
        reserved: Iterable[int] = (),
        level: Literal["off", "counts", "sets"] = "sets",
    ) -> None:
        """Raise MemoryLeakError unless every page and row has one owner (CHECK-1 to CHECK-12).

        `reserved` are slots held outside any row. At `counts` the error is the source's.
        """


class GetSWATokenInfo(Protocol):
    def __call__(
        self, token_to_kv_pool_allocator: SWATokenToKVPoolAllocator, tree_cache: WindowedCache
    ) -> SWATokenInfo:
        """The source's eight numbers, in its order (CHECK-12). O(1)."""
