"""The radix cache: request bookkeeping over the tree core. Spec: RADIX, CACHE.

The tree calls nobody. Where an operation gives slots back, everything it needs is allocated first,
then the allocator is called, and what follows cannot fail; so an allocator that raises has changed
nothing (CACHE-6).
"""

from collections.abc import Callable
from typing import ClassVar, cast

import torch
from torch import Tensor

from kvspec import _core
from kvspec.errors import ContractError
from kvspec.interfaces import prefix_cache as interface
from kvspec.interfaces.prefix_cache import (
    InsertRanges,
    InsertResult,
    MatchResult,
    Req,
)
from kvspec.interfaces.prefix_key import ExtraKey, Tokens
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator, Slots
from kvspec.native.prefix_cache import PrefixCache, RequestRow, changing, finished_tokens
from kvspec.prefix_key import key_parts

__all__ = ["RadixCache", "RadixCacheCpp", "TreeCache"]


def _refuse_option(option: str, room: str) -> None:
    raise ContractError(f"CACHE-17: {option}=True needs the room {room}, which does not exist yet")


class TreeCache(PrefixCache):
    """What the caches that share have: all but how they evict; windows come in through hooks."""

    @changing
    def reset(self) -> None:
        """Give back every page; all handles become stale (CACHE-15, CACHE-16). O(pages)."""
        self._tree.require_no_receipt()
        slots = self._tree.resident_slots()
        self._give_back(slots)
        self._tree.reset()
        if slots.numel():
            self._report("reset", slots)

    # Match and insert

    def match_prefix(
        self, key: Tokens, *, extra_key: ExtraKey = None, touch: bool = True
    ) -> MatchResult:
        """The longest resident prefix (RADIX-1, RADIX-2, RADIX-3). O(tokens compared)."""
        if self.disable or not touch:
            return super().match_prefix(key, extra_key=extra_key)
        tokens, frame = key_parts(key, extra_key)
        self.refuse_inside("match_prefix")
        slots, node = self._tree.match(frame, tokens)
        return MatchResult(slots, node, node)

    def insert(
        self, key: Tokens, value: Slots, *, extra_key: ExtraKey = None, priority: int = 0
    ) -> InsertResult:
        """Put the whole pages of a key in (CACHE-8, CACHE-9, CACHE-10, RADIX-4). O(tokens)."""
        if self.disable:
            return super().insert(key, value, extra_key=extra_key, priority=priority)
        tokens, frame = key_parts(key, extra_key)
        return self._insert(frame, tokens, value, priority)

    @changing
    def _insert(self, frame: bytes, tokens: Tokens, value: Slots, priority: int) -> InsertResult:
        plan = self._tree.plan_insert(frame, tokens, value)
        windows = self._add_pairs(plan)
        prefix_len, adopted = plan.prefix_len, plan.adopted
        shared, duplicate, tail = plan.shared, plan.duplicate, plan.tail
        gained = plan.gained_slots() if self._observer else None
        self._revive(plan, lambda: None)
        node = self._tree.commit_insert(plan, priority)
        if gained is not None and gained.numel():
            self._report("insert", gained)
        return InsertResult(prefix_len, node, shared, adopted, duplicate, tail, windows)

    def _add_pairs(self, plan: "_core.InsertPlan") -> InsertRanges | None:
        """Complete a plan by the caller's window slots: without windows it is complete."""
        return None

    def _revive(self, plan: "_core.InsertPlan", then: Callable[[], None]) -> None:
        """Move the pairs that revive tombstones and then do the rest that may fail: without windows
        there is only that.
        """
        then()

    # Requests

    def cache_finished_req(self, req: Req) -> None:
        """Cache what a request computed and take it apart (CACHE-4, CACHE-5). O(row)."""
        if self.disable:
            super().cache_finished_req(req)
        else:
            self._cache_finished_req(req)

    @changing
    def _cache_finished_req(self, req: Req) -> None:
        row, plan = self._plan(req, finished_tokens(req), locks=False)
        allocated, beyond = row.slots.numel(), plan.reach_len
        moved = plan.own_slots(req.cache_protected_len, allocated) if self._observer else None
        returned = plan.duplicate_slots()
        if beyond < allocated:
            returned = torch.cat((returned, plan.own_slots(beyond, allocated)))
        in_order = self._in_order(returned)
        self._revive(plan, lambda: self._give_back(in_order))
        self._tree.commit_insert(plan, 0)
        if req.lock_receipt is not None:
            self._unlock(req.lock_receipt)
        self._dismiss(req)
        if moved is not None:
            self._report("cache_finished_req", moved)

    def cache_unfinished_req(self, req: Req) -> None:
        """Cache what a request has computed so far (CACHE-2, CACHE-3, CACHE-5). O(row)."""
        if self.disable:
            super().cache_unfinished_req(req)
        else:
            self._cache_unfinished_req(req)

    @changing
    def _cache_unfinished_req(self, req: Req) -> None:
        row, plan = self._plan(req, req.fill_ids, locks=True)
        start, stop = req.cache_protected_len, plan.reach_len
        moved = plan.own_slots(start, stop) if self._observer else None
        returned = plan.duplicate_slots()
        if returned.numel():
            tree_slots = plan.tree_slots(start)
            self._revive(plan, lambda: self._exchange(req, row.slots, tree_slots, returned))
        receipt = self._tree.commit_row(plan)
        if req.lock_receipt is not None:
            self._unlock(req.lock_receipt)
        req.last_node, req.lock_receipt = receipt.node, receipt
        req.cache_protected_len = stop
        req.prefix_indices = row.slots[: row.committed]
        if moved is not None:
            self._report("cache_unfinished_req", moved)

    def _plan(
        self, req: Req, tokens: Tokens, *, locks: bool
    ) -> "tuple[RequestRow, _core.InsertPlan]":
        """The row of a request and what caching it would do, or why it is refused (CACHE-5)."""
        tokens, frame = key_parts(tokens, req.extra_key)
        row = self._row(req, tokens)
        protected = req.cache_protected_len
        if protected % self.page_size or not 0 <= protected <= row.committed:
            raise ContractError(
                f"CACHE-5: cache_protected_len is {protected}, not a multiple of {self.page_size}"
                f" of at most {row.committed} committed tokens"
            )
        receipt = req.lock_receipt
        if receipt is not None and not isinstance(receipt, _core.LockReceipt):
            raise ContractError("CACHE-5: the lock_receipt is not open")
        plan = self._tree.plan_row(frame, tokens, row.slots, protected, receipt, locks)
        self._add_pairs(plan)
        return row, plan

    def _exchange(self, req: Req, row: Tensor, tree_slots: Tensor, returned: Tensor) -> None:
        """Put the tree's slots in the row, and give those they replace back (CACHE-2, CACHE-3)."""
        pool = cast(ReqToTokenPool, self.req_to_token_pool)  # the row came from it
        start = req.cache_protected_len
        positions = slice(start, start + tree_slots.numel())
        place = cast(int, req.req_pool_idx), positions
        before = row[positions].clone()
        pool.write(place, tree_slots)
        try:
            self._give_back(self._in_order(returned))
        except BaseException:
            pool.write(place, before)
            raise
        row[positions] = tree_slots

    # Eviction and locks

    def _evict(self, num_tokens: int, swa_num_tokens: int) -> tuple[int, int]:
        """Evict, and how many tokens of either pool; if the allocator raises, take it back.

        One slot of each page names it (PAGE-9).
        """
        evicted, buried, swa_count = self._tree.evict(num_tokens, swa_num_tokens)
        try:
            self._give_back(evicted, buried)
        except BaseException:
            self._tree.evict_undo()
            raise
        self._tree.evict_commit()
        count = evicted.numel()
        if self._observer is not None and (count or buried is not None):
            pages = evicted if buried is None else torch.cat((evicted, buried))
            whole = pages.unsqueeze(1) + torch.arange(self.page_size)
            self._report("evict", whole.flatten())
        return count * self.page_size, swa_count

    def inc_lock_ref(self, node: interface.NodeHandle) -> interface.LockReceipt:
        """Keep the node's path from eviction (CACHE-11, CACHE-13). O(nodes on the path)."""
        return super().inc_lock_ref(node) if self.disable else self._inc_lock_ref(node)

    @changing
    def _inc_lock_ref(self, node: interface.NodeHandle) -> interface.LockReceipt:
        if not isinstance(node, _core.NodeHandle):
            raise ContractError(f"CACHE-13: {node!r:.80} is not a handle of this cache")
        receipt = self._tree.lock(node)
        self._report_lock("inc_lock_ref", node, -receipt.delta)
        return receipt

    def dec_lock_ref(self, node: interface.LockReceipt | interface.NodeHandle) -> int:
        """Undo one `inc_lock_ref` (CACHE-12, CACHE-13). O(nodes on the path)."""
        return super().dec_lock_ref(node) if self.disable else self._dec_lock_ref(node)

    @changing
    def _dec_lock_ref(self, node: interface.LockReceipt | interface.NodeHandle) -> int:
        unlocked = self._unlock(node)
        handle = node.node if isinstance(node, _core.LockReceipt) else node
        self._report_lock("dec_lock_ref", handle, unlocked)
        return unlocked

    def _unlock(self, node: object) -> int:
        if not isinstance(node, _core.LockReceipt | _core.NodeHandle):
            raise ContractError(f"CACHE-13: {node!r:.80} is not a handle of this cache")
        return self._tree.unlock(node)

    def _report_lock(self, name: str, node: object, count: int) -> None:
        """Report the tokens at the end of a path whose lock changed (OBS-1)."""
        if self._observer is not None and isinstance(node, _core.NodeHandle):
            path = self._tree.path_slots(node)
            self._report(name, path[path.numel() - count :])


class RadixCache(TreeCache):
    """A prefix cache that shares (RADIX-1 to RADIX-18, CACHE-1 to CACHE-18)."""

    room: ClassVar[str] = "radix_cache"

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
        disable: bool = False,
        enable_kv_cache_events: bool = False,
        eviction_policy: str = "lru",
        eviction_granularity: str = "page",
    ) -> None:
        if enable_kv_cache_events:
            _refuse_option("enable_kv_cache_events", "kv_events")
        super().__init__(
            req_to_token_pool,
            token_to_kv_pool_allocator,
            page_size,
            disable,
            eviction_policy,
            eviction_granularity,
        )

    @changing
    def evict(self, num_tokens: int) -> int:
        """Give back up to `num_tokens` evictable tokens (RADIX-8 to RADIX-13). O(log n) a leaf."""
        return self._evict(num_tokens, 0)[0]


class RadixCacheCpp(RadixCache):
    """`RadixCache` with the arguments that the source document gives its C++ tree."""

    def __init__(
        self,
        disable: bool,
        use_hicache: bool,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool: BaseTokenToKVPoolAllocator | None,
        tp_cache_group: object,
        page_size: int,
        hicache_ratio: float,
        hicache_size: int,
        hicache_write_policy: str,
        enable_kv_cache_events: bool = False,
    ) -> None:
        if use_hicache:
            _refuse_option("use_hicache", "hierarchical_cache")
        super().__init__(
            req_to_token_pool, token_to_kv_pool, page_size, disable, enable_kv_cache_events
        )
