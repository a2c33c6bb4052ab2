"""A scheduler's way with SGLang's memory layer, request by request, without its kernels.

Slots are taken by `alloc`, in whole pages, and written with `write`; what a request does not use of
its last page yet stays its own. Everything else is SGLang's.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Engine", "SglangRequest", "with_row_views"]

ROWS = 4
WIDTH = 128


@dataclass(eq=False)
class SglangRequest:
    """What SGLang's caches read and write of a request."""

    origin_input_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    fill_ids: list[int] = field(default_factory=list)
    req_pool_idx: int | None = None
    prefix_indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    last_node: Any = None
    swa_uuid_for_lock: int | None = None
    evicted_seqlen_local: int = 0
    written: int = 0
    """Positions of its row."""
    spare: list[int] = field(default_factory=list)
    """Slots of its last page that it has not used yet."""


class Engine:
    """The three objects, and what a scheduler does with them."""

    def __init__(
        self, sglang: Any, cache: Any, page_size: int = 1, pages: int = 16, window: int = 0
    ) -> None:
        self.page_size, self.size = page_size, pages * page_size
        self.pool = sglang.ReqToTokenPool(ROWS, WIDTH, "cpu", False)
        self.windowed = window > 0
        memory = {"dtype": torch.float32, "device": "cpu", "kvcache": None, "need_sort": False}
        if self.windowed:
            memory["kvcache"] = kvcache = object.__new__(sglang.SWAKVPool)
            kvcache.full_kv_pool = kvcache.swa_kv_pool = None
            self.allocator = sglang.SWATokenToKVPoolAllocator(self.size, self.size // 2, **memory)
        elif page_size == 1:
            self.allocator = sglang.TokenToKVPoolAllocator(self.size, **memory)
        else:
            self.allocator = sglang.PagedTokenToKVPoolAllocator(self.size, page_size, **memory)
        windows = {"sliding_window_size": window} if self.windowed else {}
        self.cache = cache(self.pool, self.allocator, page_size=page_size, **windows)

    def start(self, tokens: list[int], stop: int | None = None) -> SglangRequest:
        """A request, with its first chunk computed: [0, stop) of its tokens, or a page."""
        req = SglangRequest(tokens)
        matched, req.last_node, *_ = self.cache.match_prefix(key=tokens[:-1])
        req.prefix_indices = matched
        req.swa_uuid_for_lock = self.cache.inc_lock_ref(req.last_node)
        (req.req_pool_idx,) = self.pool.alloc(1)
        self.pool.write((req.req_pool_idx, slice(0, len(matched))), matched)
        req.written = len(matched)
        least = min(len(matched) + self.page_size, len(tokens))
        self.compute(req, len(tokens) if stop is None else max(stop, least))
        return req

    def compute(self, req: SglangRequest, stop: int) -> None:
        """Take and write slots for a chunk that ends at `stop`."""
        req.fill_ids = req.origin_input_ids[:stop]
        slots = self._take(req, stop - req.written)
        self.pool.write((req.req_pool_idx, slice(req.written, stop)), slots)
        req.written = stop

    def decode(self, req: SglangRequest, token: int) -> None:
        """The KV of the last token that was sampled, and the next one; of a batch of one."""
        if req.output_ids:
            rows, places = torch.tensor([req.req_pool_idx]), torch.tensor([req.written])
            self.pool.write((rows, places), self._take(req, 1))
            req.written += 1
        req.output_ids.append(token)

    def finish(self, req: SglangRequest) -> None:
        """The last token was sampled: the cache has the request's."""
        if not req.output_ids:
            req.output_ids.append(0)
        self.cache.cache_finished_req(req)
        req.req_pool_idx = None

    def retract(self, req: SglangRequest) -> None:
        """Drop what a request has computed; it would begin anew."""
        row = req.req_pool_idx
        shared = len(req.prefix_indices) if hasattr(self.cache, "root_node") else 0
        self.allocator.free(self.pool.req_to_token[row, shared : req.written])
        self.pool.free(row)
        self.cache.dec_lock_ref(req.last_node, *[req.swa_uuid_for_lock] * self.windowed)
        req.req_pool_idx = None

    def balances(self) -> bool:
        """What SGLang itself checks when it is idle."""
        if self.windowed:
            full = self.cache.full_evictable_size() + self.cache.full_protected_size()
            return bool(self.allocator.full_available_size() + full == self.size)
        resident = self.cache.evictable_size() + self.cache.protected_size()
        return bool(self.allocator.available_size() + resident == self.size)

    def _take(self, req: SglangRequest, count: int) -> Tensor:
        pages = -(-max(count - len(req.spare), 0) // self.page_size)
        slots = self._room(pages * self.page_size)
        slots = [*req.spare, *slots]
        req.spare = slots[count:]
        return torch.tensor(slots[:count], dtype=torch.int32)

    def _room(self, need_size: int) -> list[int]:
        slots = self.allocator.alloc(need_size)
        if slots is None:
            self.cache.evict(need_size, *[need_size] * self.windowed)
            slots = self.allocator.alloc(need_size)
        assert slots is not None, "the engine was given more than fits"
        numbers: list[int] = slots.tolist()
        return numbers


def with_row_views(radix_cache: Any) -> type:
    """What the wrapper of its C++ tree does: the tree keeps the row itself, not a copy of it."""

    class RowViews(radix_cache):
        row: Tensor | None = None

        def cache_finished_req(self, req: Any) -> None:
            self.row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
            super().cache_finished_req(req)
            self.row = None

        def insert(self, key: Any, value: Any = None, **options: Any) -> int:
            value = value if self.row is None else self.row[: len(key)]
            count: int = super().insert(key, value, **options)
            return count

    return RowViews
