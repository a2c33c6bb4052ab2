"""Drives a cache with a trace, one request at a time, and counts. Spec: REPLAY."""

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from kvspec import has_native
from kvspec.errors import ContractError, MemoryLeakError
from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.interfaces.prefix_cache import LockReceipt, NodeHandle
from kvspec.interfaces.prefix_key import ExtraKey
from kvspec.interfaces.radix_cache import RadixCache
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.memory_checker import check_memory
from kvspec.replay.trace import Trace, TraceRequest, block_tokens

__all__ = [
    "Implementation",
    "LockstepError",
    "Request",
    "Run",
    "implementation",
    "replay",
]


_SHOWN = 60
"""Characters of a value in the text of a LockstepError."""


class LockstepError(AssertionError):
    """Two implementations differ; the text names the request and what differs (REPLAY-7)."""


class Implementation(Protocol):
    """A namespace with the classes of the specification, as `kvspec` and `kvspec.oracle` are."""

    __name__: str
    ReqToTokenPool: Callable[..., ReqToTokenPool]
    PagedTokenToKVPoolAllocator: Callable[..., PagedTokenToKVPoolAllocator]
    RadixCache: Callable[..., RadixCache]


class Run(NamedTuple):
    """What one replay counted (REPLAY-4)."""

    policy: str
    capacity: int
    """Blocks."""
    granularity: str
    impl: str
    requests: int
    blocks: int
    """Of all inputs, before a request is cut to the capacity."""
    tokens: int
    """Of all inputs, padding not counted."""
    hit_blocks: int
    hit_tokens: int
    evictions: int
    """Blocks."""
    slots_allocated: int
    tokens_compared: int
    seconds: float
    """Wall clock of all requests, with the memory check after each; reading the trace is not in."""
    leaked_pages: int
    """Pages that are still held after the cache was reset."""
    leaks: str
    """What `check_memory` reported at the end; empty if nothing."""


def implementation(name: str) -> Implementation:
    """`native` or `oracle`; ImportError if that is the extension and it is absent."""
    if name == "native" and not has_native():
        raise ImportError("the native core is absent: only the oracle can run")
    module = importlib.import_module({"native": "kvspec", "oracle": "kvspec.oracle"}[name])
    return cast(Implementation, module)


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


class _Outcome(NamedTuple):
    matched: Tensor
    """The slots that the cache had."""
    evicted: int
    """Tokens."""
    slots: Tensor
    """The slots taken for the rest."""


class _System:
    """The three parts that a scheduler works with; one row, since one request runs at a time."""

    def __init__(
        self, impl: Implementation, trace: Trace, *, capacity: int, policy: str, granularity: str
    ) -> None:
        block = trace.block
        longest = max((len(request.hash_ids) for request in trace.requests), default=0)
        self.rows = impl.ReqToTokenPool(
            size=1,
            max_context_len=max(min(longest, capacity), 1) * block,
            device="cpu",
            enable_memory_saver=False,
        )
        self.allocator = impl.PagedTokenToKVPoolAllocator(
            size=capacity * block,
            page_size=block,
            dtype=torch.bfloat16,
            device="cpu",
            kvcache=None,
            need_sort=False,
        )
        self.cache = impl.RadixCache(
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=block,
            disable=False,
            enable_kv_cache_events=False,
            eviction_policy=policy,
            eviction_granularity=granularity,
        )

    def serve(self, tokens: memoryview, matchable: int) -> _Outcome:
        """Match, lock, evict, alloc, write the row; insert, unlock and finish (REPLAY-3)."""
        total = len(tokens)
        matched, node, *_ = self.cache.match_prefix(tokens[:matchable])
        assert node is not None, "REPLAY-3: a match that touches gives a handle"
        receipt = self.cache.inc_lock_ref(node)
        prefix = matched.numel()
        taken = self.rows.alloc(1)
        assert taken is not None, "REPLAY-3: the row of the last request was not given back"
        row = taken[0]
        self.rows.write((row, slice(0, prefix)), matched)
        shortfall = total - prefix - self.allocator.available_size()
        evicted = self.cache.evict(shortfall) if shortfall > 0 else 0
        last = int(matched[-1]) if prefix else -1
        slots = self.allocator.alloc_extend([prefix], [total], [last], total - prefix)
        assert slots is not None, "REPLAY-3: the cache did not make room for a request that fits"
        self.rows.write((row, slice(prefix, total)), slots)
        self.cache.cache_finished_req(Request(tokens, row, matched, node, receipt, prefix))
        return _Outcome(matched, evicted, slots)

    def check_counts(self, number: int) -> None:
        """`check_memory` by counts, after request `number`."""
        try:
            check_memory(self.allocator, self.rows, self.cache, level="counts")
        except MemoryLeakError as error:
            raise MemoryLeakError(f"request {number}: {error}") from None

    def leaks(self) -> tuple[int, str]:
        """Pages that nobody gave back, and the report: the tree is emptied for it. O(pool)."""
        self.cache.reset()
        try:
            check_memory(self.allocator, self.rows, self.cache, level="sets")
        except MemoryLeakError as error:
            return len(self.allocator.view().held), str(error)
        return 0, ""


class _Counts(NamedTuple):
    """Sums over the requests so far."""

    matched: int = 0
    """Tokens, in whole blocks."""
    hit_tokens: int = 0
    evicted: int = 0
    """Tokens, in whole blocks."""
    slots: int = 0
    seconds: float = 0.0

    def after(self, request: TraceRequest, outcome: _Outcome, seconds: float) -> "_Counts":
        matched = outcome.matched.numel()
        return _Counts(
            matched=self.matched + matched,
            hit_tokens=self.hit_tokens + min(matched, request.input_length),
            evicted=self.evicted + outcome.evicted,
            slots=self.slots + outcome.slots.numel(),
            seconds=self.seconds + seconds,
        )


def replay(
    trace: Trace,
    *,
    impl: Implementation,
    capacity: int,
    policy: str = "lru",
    granularity: str = "page",
    leave_last_token: bool = False,
    verify: Implementation | None = None,
    progress: Callable[[], object] | None = None,
) -> Run:
    """Serve every request of a trace in order, with `capacity` blocks (REPLAY-3 to REPLAY-7).

    `check_memory` looks at the counts after every request and, when the cache has been reset at the
    end, at the sets. With `verify`, that implementation serves every request too and is compared.
    `progress` is called after each request. O(tokens of the trace), and O(resident tokens) more for
    each request with `verify`.
    """
    if capacity < 1:
        raise ContractError(f"REPLAY-3: capacity is {capacity}, not a positive number of blocks")
    system, *others = (
        _System(each, trace, capacity=capacity, policy=policy, granularity=granularity)
        for each in (impl, verify)
        if each is not None
    )
    counts = _Counts()
    for number, request in enumerate(trace.requests):
        start = time.perf_counter()
        tokens, matchable = _cut(request, capacity, trace.block, leave_last_token)
        outcome = system.serve(tokens, matchable)
        system.check_counts(number)
        counts = counts.after(request, outcome, time.perf_counter() - start)
        for other in others:
            _compare(number, (system, other), (outcome, other.serve(tokens, matchable)))
        if progress is not None:
            progress()
    tokens_compared = system.cache.counters()["tokens_compared"]
    leaked_pages, leaks = system.leaks()
    return Run(
        policy=policy,
        capacity=capacity,
        granularity=granularity,
        impl={"kvspec": "native", "kvspec.oracle": "oracle"}.get(impl.__name__, impl.__name__),
        requests=len(trace.requests),
        blocks=trace.blocks,
        tokens=trace.tokens,
        hit_blocks=counts.matched // trace.block,
        hit_tokens=counts.hit_tokens,
        evictions=counts.evicted // trace.block,
        slots_allocated=counts.slots,
        tokens_compared=tokens_compared,
        seconds=counts.seconds,
        leaked_pages=leaked_pages,
        leaks=leaks,
    )


def _cut(
    request: TraceRequest, capacity: int, block: int, leave_last: bool
) -> tuple[memoryview, int]:
    """The tokens of the blocks that fit, and how many may be matched (REPLAY-3, REPLAY-6)."""
    tokens = block_tokens(request.hash_ids[:capacity], block)
    whole_before_last = max(request.input_length - 1, 0) // block * block
    matchable = min(len(tokens), whole_before_last) if leave_last else len(tokens)
    return tokens.data, matchable


def _compare(
    number: int, systems: tuple[_System, _System], outcomes: tuple[_Outcome, _Outcome]
) -> None:
    """LockstepError unless results and abstract states are equal (REPLAY-7). O(resident tokens)."""
    mine, theirs = (
        {
            "matched slots": outcome.matched.tolist(),
            "evicted tokens": outcome.evicted,
            "slots taken": outcome.slots.tolist(),
            "rows": system.rows.view(),
            "allocator.digest()": system.allocator.digest(),
            "cache.digest()": system.cache.digest(),
            "evictable_size()": system.cache.evictable_size(),
            "protected_size()": system.cache.protected_size(),
        }
        for system, outcome in zip(systems, outcomes, strict=True)
    )
    for name, value in mine.items():
        if value != theirs[name]:
            pair = f"{str(value)[:_SHOWN]} and {str(theirs[name])[:_SHOWN]}"
            raise LockstepError(f"REPLAY-7: request {number}: {name}: {pair}")
