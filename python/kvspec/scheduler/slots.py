"""Taking slots for a step and writing them into rows. Spec: SCHED-13, SCHED-15, SCHED-28."""

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from kvspec.interfaces.model_runner import ForwardBatch
from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.interfaces.prefix_cache import BasePrefixCache, WindowedCache
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator
from kvspec.interfaces.swa_radix_cache import SWARadixCache
from kvspec.scheduler.req import Req

__all__ = ["Extension", "Memory", "Room"]


class Extension(NamedTuple):
    """New tokens of a request in a step: those that its row is extended for, and what they are."""

    req: Req
    start: int
    """Position of the first."""
    token_ids: Sequence[int]
    """The new tokens; negative ones are not known yet, and stand for samples of the step before."""
    sampled: range
    """After which of them, counted from the first, a token is sampled."""
    reserve: int
    """How long the row is to be: at least `stop`, and more for what a draft may need."""

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


class Room(NamedTuple):
    """Pages that are free or can be evicted."""

    full: int
    swa: int | None
    """Of the window pool, if there is one."""


class Memory:
    """The pools and the cache, as a scheduler uses them: rows, slots, and room for more.

    `sliding_window_size` is that of the layers in the window pool, None without one; `shares` is
    whether the cache keeps what it could evict.
    """

    def __init__(
        self,
        rows: ReqToTokenPool,
        allocator: BaseTokenToKVPoolAllocator,
        tree_cache: BasePrefixCache,
        *,
        sliding_window_size: int | None,
        shares: bool,
    ) -> None:
        self.rows, self.allocator, self.tree_cache = rows, allocator, tree_cache
        self.page_size, self.sliding_window_size = allocator.page_size, sliding_window_size
        self.is_hybrid, self.shares = sliding_window_size is not None, shares
        self.evicted_tokens = 0
        self.swa_left = 0

    @property
    def swa_allocator(self) -> SWATokenToKVPoolAllocator:
        return cast(SWATokenToKVPoolAllocator, self.allocator)

    @property
    def swa_cache(self) -> WindowedCache:
        return cast(WindowedCache, self.tree_cache)

    def pages(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size)

    def new_pages(self, req: Req, stop: int) -> int:
        """Pages that a row has to get to reach `stop` tokens."""
        return max(self.pages(stop) - self.pages(req.kv_allocated_len), 0)

    def room(self) -> Room:
        """What could be had now. O(1)."""
        if not self.is_hybrid:
            tokens = self.allocator.available_size() + self.tree_cache.evictable_size()
            return Room(tokens // self.page_size, None)
        allocator, cache = self.swa_allocator, self.swa_cache
        full = allocator.full_available_size() + cache.full_evictable_size()
        swa = allocator.swa_available_size() + cache.swa_evictable_size()
        return Room(full // self.page_size, swa // self.page_size)

    def make_room(self, pages: int, live: Iterable[Req] = ()) -> bool:
        """Whether there is room for so many pages, in both pools if there are two.

        What the pool is short of is evicted first (SCHED-13); what it still is, is taken from the
        window slots that live requests have left behind (SCHED-28).
        """
        need = pages * self.page_size
        if not self.is_hybrid:
            short = need - self.allocator.available_size()
            if short > 0:
                evicted = self.tree_cache.evict(short)
                assert isinstance(evicted, int)
                self.evicted_tokens += evicted
            return self.allocator.available_size() >= need
        for req in live:
            if self.swa_allocator.swa_available_size() >= need:
                break
            self.leave_behind(req)
        self._evict_windows(need)
        return self.allocator.available_size() >= need

    def _evict_windows(self, need: int) -> None:
        allocator = self.swa_allocator
        full = max(need - allocator.full_available_size(), 0)
        swa = max(need - allocator.swa_available_size(), 0)
        if self.shares and (full or swa):
            cache = cast(SWARadixCache, self.tree_cache)
            self.evicted_tokens += sum(cache.evict(full, swa))

    def leave_behind(self, req: Req) -> None:
        """Give back the window slots that no step of the request reads any more (SCHED-28)."""
        if self.is_hybrid and req.kv_committed_len:
            self.swa_left += self.swa_cache.evict_swa(
                req, req.kv_committed_len, sliding_window_size=self.sliding_window_size
            )

    def forward_batch(self, extensions: Sequence[Extension]) -> ForwardBatch:
        """Take slots for a step, for which there is room, write them, and say what to compute.

        O(new tokens + context of the batch): every request's slots are copied, so that nothing
        that happens while the step is in flight changes what it reads.
        """
        self._take(extensions)
        token_slots = tuple(self._row(each.req)[: each.stop] for each in extensions)
        ids, positions, sampled = array("q"), array("q"), array("q")
        for each in extensions:
            sampled.extend(len(ids) + offset for offset in each.sampled)
            ids.extend(each.token_ids)
            positions.extend(range(each.start, each.stop))
        new = [slots[each.start :] for slots, each in zip(token_slots, extensions, strict=True)]
        return ForwardBatch(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            out_cache_loc=torch.cat(new),
            seq_lens=tuple(each.stop for each in extensions),
            extend_lens=tuple(len(each.token_ids) for each in extensions),
            token_slots=token_slots,
            sample_indices=torch.tensor(sampled, dtype=torch.int64),
        )

    def _row(self, req: Req) -> Tensor:
        assert req.req_pool_idx is not None, "SCHED-8: a live request has a row"
        return self.rows.row(req.req_pool_idx)

    def _take(self, extensions: Sequence[Extension]) -> None:
        growing = [each for each in extensions if each.reserve > each.req.kv_allocated_len]
        if not growing:
            return
        had = [each.req.kv_allocated_len for each in growing]
        get = [each.reserve for each in growing]
        slots = self._alloc(growing, had, get)
        assert slots is not None, "SCHED-11: there was room for what is taken"
        rows, positions = array("q"), array("q")
        for each, start, stop in zip(growing, had, get, strict=True):
            assert each.req.req_pool_idx is not None, "SCHED-8: a live request has a row"
            rows.extend([each.req.req_pool_idx] * (stop - start))
            positions.extend(range(start, stop))
            each.req.kv_allocated_len = stop
        self.rows.write((torch.tensor(rows), torch.tensor(positions)), slots)
        self.rows.commit()

    def _alloc(
        self, growing: Sequence[Extension], had: Sequence[int], get: Sequence[int]
    ) -> Tensor | None:
        total = sum(get) - sum(had)
        if not hasattr(self.allocator, "alloc_extend"):
            return self.allocator.alloc(total)
        allocator = cast(PagedTokenToKVPoolAllocator, self.allocator)
        last = [self._last_slot(each.req) for each in growing]
        if total == len(growing) and all(had):
            return allocator.alloc_decode(get, last)
        return allocator.alloc_extend(had, get, last, total)

    def _last_slot(self, req: Req) -> int:
        return int(self._row(req)[-1]) if req.kv_allocated_len else -1
