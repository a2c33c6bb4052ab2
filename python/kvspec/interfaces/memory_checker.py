"""Who owns every page? Spec: CHECK."""

from collections.abc import Iterable
from typing import Literal, Protocol

from kvspec.interfaces.prefix_cache import BasePrefixCache, Req
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator

__all__ = ["CheckMemory"]


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
        """Raise MemoryLeakError unless every page and row has one owner (CHECK-1 to CHECK-8).

        `reserved` are slots held outside any row. At `counts` the error is the source's.
        """
