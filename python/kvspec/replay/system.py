"""What a scheduler works with, and the way of one request through it. Spec: REPLAY.

    match, lock, take a row; evict, alloc, write the row; insert, unlock, finish

With a sliding window the middle comes in chunks, as large as the window pool allows (REPLAY-9).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from kvspec import implementations
from kvspec.errors import MemoryLeakError
from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.interfaces.prefix_cache import (
    BasePrefixCache,
    EvictResult,
    LockReceipt,
    NodeHandle,
)
from kvspec.interfaces.prefix_key import ExtraKey
from kvspec.interfaces.radix_cache import RadixCache
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator
from kvspec.interfaces.swa_radix_cache import SWARadixCache
from kvspec.memory_checker import check_memory, counting

__all__ = [
    "FullSystem",
    "Implementation",
    "Outcome",
    "Request",
    "Setting",
    "System",
    "Use",
    "WindowSystem",
    "after_request",
    "implementation",
]


class Implementation(Protocol):
    """A namespace with the classes of the specification, as `kvspec` and `kvspec.oracle` are.

    Those with SWA in their name are used with a sliding window, and the two like them without.
    """

    __name__: str
    ReqToTokenPool: Callable[..., ReqToTokenPool]
    PagedTokenToKVPoolAllocator: Callable[..., PagedTokenToKVPoolAllocator]
    RadixCache: Callable[..., RadixCache]
    SWATokenToKVPoolAllocator: Callable[..., SWATokenToKVPoolAllocator]
    SWARadixCache: Callable[..., SWARadixCache]


def implementation(name: str) -> Implementation:
    """`native` or `oracle`; ImportError if that is the extension and it is absent."""
    return cast(Implementation, implementations.implementation(name))


@dataclass(slots=True)
class Request:
    """A request as a cache reads and writes it: `interfaces.prefix_cache.Req`."""

    origin_input_ids: Sequence[int]
    req_pool_idx: int | None
    prefix_indices: Tensor
    last_node: NodeHandle | None
    lock_receipt: LockReceipt | None
    cache_protected_len: int
    output_ids: Sequence[int] = ()
    extra_key: ExtraKey = None
    fill_ids: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.fill_ids = self.origin_input_ids


class Setting(NamedTuple):
    """How large the system of a run is, and what it evicts."""

    block: int
    """Tokens to a page."""
    row: int
    """Blocks of the longest request."""
    capacity: int
    """Blocks."""
    policy: str
    granularity: str
    sliding_window: int | None
    """Tokens."""
    swa_capacity: int
    """Blocks of the window pool, if there is one."""


class Taken(NamedTuple):
    """What it took to find place for the tokens of a request that the cache did not have."""

    slots: Tensor
    evicted: int
    """Tokens that the cache gave back to the full pool."""
    swa_evicted: int = 0
    """The same of the window pool."""
    swa_left: int = 0
    """Window tokens that the request gave back, having left them behind."""


class Outcome(NamedTuple):
    """What became of a request."""

    matched: Tensor
    """The slots that the cache had."""
    taken: Taken

    def told(self) -> dict[str, object]:
        """What is compared with another implementation's (REPLAY-7)."""
        return {
            "matched slots": self.matched.tolist(),
            "evicted tokens": self.taken.evicted,
            "evicted window tokens": self.taken.swa_evicted,
            "window tokens left behind": self.taken.swa_left,
            "slots taken": self.taken.slots.tolist(),
        }


class Leaks(NamedTuple):
    pages: int
    """Still held after the cache was reset."""
    swa_pages: int
    """The same of the window pool."""
    report: str
    """What `check_memory` says; empty if nothing."""


class Use(NamedTuple):
    """Tokens in each pool."""

    full: int
    swa: int


class System(ABC):
    """Rows, slots and a cache over both; one row, since one request runs at a time."""

    allocator: PagedTokenToKVPoolAllocator
    cache: BasePrefixCache

    def __init__(self, impl: Implementation, setting: Setting) -> None:
        self.block = setting.block
        self.rows = impl.ReqToTokenPool(
            size=1,
            max_context_len=max(setting.row, 1) * setting.block,
            device="cpu",
            enable_memory_saver=False,
        )
        memory = {"dtype": torch.bfloat16, "device": "cpu", "kvcache": None, "need_sort": False}
        self._make(impl, setting, {"page_size": setting.block, **memory})
        self._count = counting(self.allocator, self.rows, self.cache)

    @abstractmethod
    def _make(self, impl: Implementation, setting: Setting, memory: dict[str, object]) -> None:
        """The allocator and the cache over it."""

    def serve(self, tokens: memoryview, matchable: int) -> Outcome:
        """The way of a request (REPLAY-3)."""
        matched, node, *_ = self.cache.match_prefix(tokens[:matchable])
        assert node is not None, "REPLAY-3: a match that touches gives a handle"
        receipt = self.cache.inc_lock_ref(node)
        prefix = matched.numel()
        rows = self.rows.alloc(1)
        assert rows is not None, "REPLAY-3: the row of the last request was not given back"
        self.rows.write((rows[0], slice(0, prefix)), matched)
        request = Request(tokens, rows[0], matched, node, receipt, prefix)
        taken = self._compute(request, prefix, len(tokens))
        self.cache.cache_finished_req(request)
        return Outcome(matched, taken)

    @abstractmethod
    def _compute(self, request: Request, start: int, stop: int) -> Taken:
        """Take and write slots for the positions [start, stop), evicting for them."""

    def _extend(self, request: Request, start: int, stop: int, before: Tensor) -> Tensor:
        """Take and write slots for [start, stop), which fit; `before` ends with the one before."""
        last = int(before[-1]) if start else -1
        slots = self.allocator.alloc_extend([start], [stop], [last], stop - start)
        assert slots is not None, "REPLAY-3: the cache did not make room for a request that fits"
        assert request.req_pool_idx is not None
        self.rows.write((request.req_pool_idx, slice(start, stop)), slots)
        return slots

    def state(self) -> dict[str, object]:
        """What is compared with another implementation's (REPLAY-7). O(resident tokens)."""
        return {
            "rows": self.rows.view(),
            "allocator.digest()": self.allocator.digest(),
            "cache.digest()": self.cache.digest(),
            "evictable_size()": self.cache.evictable_size(),
            "protected_size()": self.cache.protected_size(),
        }

    def count(self, number: int) -> None:
        """`check_memory` at level `counts` after request `number`. O(1)."""
        try:
            self._count()
        except MemoryLeakError as error:
            raise after_request(number, error) from None

    def check(self, number: int) -> None:
        """The same at level `sets`. O(pool)."""
        try:
            check_memory(self.allocator, self.rows, self.cache, level="sets")
        except MemoryLeakError as error:
            raise after_request(number, error) from None

    def leaks(self, check: Callable[[], None] | None = None) -> Leaks:
        """What nobody gave back: the tree is emptied for it. `check_memory` looks for it, unless
        something else does. O(pool).
        """
        self.cache.reset()
        try:
            if check is not None:
                check()
            else:
                check_memory(self.allocator, self.rows, self.cache, level="sets")
        except MemoryLeakError as error:
            books = self.allocator.view()
            return Leaks(len(books.held), len(books.swa.held) if books.swa else 0, str(error))
        return Leaks(0, 0, "")


def after_request(number: int, error: MemoryLeakError) -> MemoryLeakError:
    """The same error, which says after which request (REPLAY-14)."""
    return MemoryLeakError(f"request {number}: {error}", error.reports)


class FullSystem(System):
    """All layers attend to everything."""

    cache: RadixCache

    def _make(self, impl: Implementation, setting: Setting, memory: dict[str, object]) -> None:
        self.allocator = impl.PagedTokenToKVPoolAllocator(
            size=setting.capacity * setting.block, **memory
        )
        self.cache = impl.RadixCache(
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=setting.block,
            disable=False,
            enable_kv_cache_events=False,
            eviction_policy=setting.policy,
            eviction_granularity=setting.granularity,
        )

    def _compute(self, request: Request, start: int, stop: int) -> Taken:
        shortfall = stop - start - self.allocator.available_size()
        evicted = self.cache.evict(shortfall) if shortfall > 0 else 0
        return Taken(self._extend(request, start, stop, request.prefix_indices), evicted)


class WindowSystem(System):
    """Some layers attend to a window, and have a pool of their own (REPLAY-9)."""

    allocator: SWATokenToKVPoolAllocator
    cache: SWARadixCache

    def _make(self, impl: Implementation, setting: Setting, memory: dict[str, object]) -> None:
        self.allocator = impl.SWATokenToKVPoolAllocator(
            size=setting.capacity * setting.block,
            size_swa=setting.swa_capacity * setting.block,
            **memory,
        )
        self.cache = impl.SWARadixCache(
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            sliding_window_size=setting.sliding_window,
            page_size=setting.block,
            disable=False,
        )

    def _compute(self, request: Request, start: int, stop: int) -> Taken:
        """In chunks as large as the window pool allows (REPLAY-9)."""
        chunks: list[Tensor] = []
        evicted = swa_evicted = left = 0
        before = request.prefix_indices
        while start < stop:
            full, swa, behind = self._make_room(request, start, stop - start)
            evicted, swa_evicted, left = evicted + full, swa_evicted + swa, left + behind
            if not self.allocator.swa_available_size():
                stuck = start == request.cache_protected_len
                assert not stuck, "REPLAY-9: beside a window that is locked there is room for more"
                request.fill_ids = request.origin_input_ids[:start]
                self.cache.cache_unfinished_req(request)
                before = request.prefix_indices
                continue
            end = min(stop, start + self.allocator.swa_available_size())
            before = self._extend(request, start, end, before)
            chunks.append(before)
            start = end
        slots = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int64)
        return Taken(slots, evicted, swa_evicted, left)

    def _make_room(self, request: Request, start: int, need_size: int) -> tuple[int, int, int]:
        """Evict what either pool is short of for what follows `start`; if the window pool still is,
        the request gives back what it has left behind. How many tokens of the full pool, of the
        window pool, and of the request.
        """
        full = max(need_size - self.allocator.full_available_size(), 0)
        swa = max(need_size - self.allocator.swa_available_size(), 0)
        evicted = self.cache.evict(full, swa) if full or swa else EvictResult(0, 0)
        left = 0
        if self.allocator.swa_available_size() < need_size:
            left = self.cache.evict_swa(request, start)
        return *evicted, left

    def used(self) -> Use:
        """What the tree holds while no request runs. O(1)."""
        live = self.cache.swa_evictable_size() + self.cache.swa_protected_size()
        return Use(self.cache.total_size(), live)

    def state(self) -> dict[str, object]:
        return super().state() | {
            "swa_evictable_size()": self.cache.swa_evictable_size(),
            "swa_protected_size()": self.cache.swa_protected_size(),
        }
