"""Drives a cache with a trace, one request at a time, and counts. Spec: REPLAY."""

import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from kvspec.errors import ContractError
from kvspec.interfaces.instrumentation import Level
from kvspec.replay.checks import Checks, Record, require_checks
from kvspec.replay.system import (
    FullSystem,
    Implementation,
    Leaks,
    Outcome,
    Setting,
    System,
    Use,
    WindowSystem,
)
from kvspec.replay.trace import Trace, TraceRequest, block_tokens

__all__ = ["LockstepError", "Run", "Sample", "WindowRun", "replay"]

_SHOWN = 60
"""Characters of a value in the text of a LockstepError."""


class LockstepError(AssertionError):
    """Two implementations differ; the text names the request and what differs (REPLAY-7)."""


class Sample(NamedTuple):
    """What is seen after a request."""

    blocks: int
    """Of its input, before it is cut to the capacity."""
    hit_blocks: int
    used: Use
    """By resident pages: all of them in the full pool, the live ones in the window pool."""


class WindowRun(NamedTuple):
    """What a replay with a sliding window counts besides (REPLAY-11)."""

    sliding_window: int
    """Tokens."""
    swa_capacity: int
    """Blocks of the window pool."""
    swa_evictions: int
    """Blocks that the cache took from the window pool."""
    swa_left: int
    """Blocks that requests gave back to it, having left them behind."""
    tombstones: int
    """Blocks that are resident without a window block after the last request."""
    swa_leaked_pages: int
    """Window pages that are still held after the cache was reset."""
    samples: tuple[Sample, ...]
    """One for each request."""

    @property
    def peak(self) -> Use:
        """The most tokens that were used in each pool."""
        used = [sample.used for sample in self.samples] or [Use(0, 0)]
        return Use(max(use.full for use in used), max(use.swa for use in used))

    @property
    def mean(self) -> tuple[float, float]:
        """The tokens used in the full and in the window pool, on average over the requests."""
        used, count = [sample.used for sample in self.samples], max(len(self.samples), 1)
        return sum(use.full for use in used) / count, sum(use.swa for use in used) / count


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
    """Wall clock of all requests, with the check after each; reading the trace is not in."""
    leaked_pages: int
    """Pages that are still held after the cache was reset."""
    leaks: str
    """What `check_memory` reported at the end; empty if nothing."""
    window: WindowRun | None = None
    """None without a sliding window."""


class _Counts(NamedTuple):
    """Sums over the requests so far."""

    matched: int = 0
    """Tokens, in whole blocks."""
    hit_tokens: int = 0
    evicted: int = 0
    """Tokens, in whole blocks, and so below."""
    swa_evicted: int = 0
    swa_left: int = 0
    slots: int = 0
    seconds: float = 0.0

    def after(self, request: TraceRequest, outcome: Outcome, seconds: float) -> "_Counts":
        matched, taken = outcome.matched.numel(), outcome.taken
        return _Counts(
            matched=self.matched + matched,
            hit_tokens=self.hit_tokens + min(matched, request.input_length),
            evicted=self.evicted + taken.evicted,
            swa_evicted=self.swa_evicted + taken.swa_evicted,
            swa_left=self.swa_left + taken.swa_left,
            slots=self.slots + taken.slots.numel(),
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
    sliding_window: int | None = None,
    swa_ratio: float | None = None,
    check: Level = "counts",
    record: Record | None = None,
    tokens: bool = False,
) -> Run:
    """Serve every request of a trace in order, with `capacity` blocks (REPLAY-3 to REPLAY-7).

    The memory is looked at as `check` says after every request, and page by page when the cache has
    been reset at the end; `record` takes what was called, with `tokens` those of each page once
    (REPLAY-13 to REPLAY-16). With `verify`, that implementation serves every request too and is
    compared. `progress` is called after each request. With a `sliding_window` in tokens there is a
    window pool of `swa_ratio`, 1 by default, times as many blocks (REPLAY-9 to REPLAY-12). O(tokens
    of the trace); for each request O(resident tokens) more with `verify`, O(pool) with `sets`.
    """
    require_checks(check, record, tokens)
    setting = _setting(trace, capacity, policy, granularity, sliding_window, swa_ratio)
    kind = FullSystem if sliding_window is None else WindowSystem
    system, *others = (kind(each, setting) for each in (impl, verify) if each is not None)
    counts, samples = _Counts(), list[Sample]()
    with Checks(system, check, record, tokens) as checks:
        for number, request in enumerate(trace.requests):
            start = time.perf_counter()
            ids, matchable = _cut(request, capacity, trace.block, leave_last_token)
            outcome = system.serve(ids, matchable)
            checks.after(number)
            counts = counts.after(request, outcome, time.perf_counter() - start)
            if isinstance(system, WindowSystem):
                hit_blocks = outcome.matched.numel() // trace.block
                samples.append(Sample(len(request.hash_ids), hit_blocks, system.used()))
            for other in others:
                _compare(number, (system, other), (outcome, other.serve(ids, matchable)))
            if progress is not None:
                progress()
        tokens_compared = system.cache.counters()["tokens_compared"]
        leaks = checks.leaks()
    return _run(trace, impl.__name__, setting, counts, samples, tokens_compared, leaks)


def _setting(
    trace: Trace,
    capacity: int,
    policy: str,
    granularity: str,
    sliding_window: int | None,
    swa_ratio: float | None,
) -> Setting:
    """What the caller asked for, or why it cannot be (REPLAY-3, REPLAY-10)."""
    if capacity < 1:
        raise ContractError(f"REPLAY-3: capacity is {capacity}, not a positive number of blocks")
    swa_capacity = 0
    if sliding_window is None:
        if swa_ratio is not None:
            raise ContractError(f"REPLAY-10: swa_ratio is {swa_ratio} without a sliding_window")
    else:
        if (policy, granularity) != ("lru", "page"):
            raise ContractError(
                f"REPLAY-10: a sliding window goes with lru by page, not {policy} by {granularity}"
            )
        ratio = 1 if swa_ratio is None else swa_ratio
        swa_capacity = _swa_capacity(trace.block, capacity, sliding_window, ratio)
    longest = max((len(request.hash_ids) for request in trace.requests), default=0)
    return Setting(
        block=trace.block,
        row=min(longest, capacity),
        capacity=capacity,
        policy=policy,
        granularity=granularity,
        sliding_window=sliding_window,
        swa_capacity=swa_capacity,
    )


def _swa_capacity(block: int, capacity: int, window: int, ratio: float) -> int:
    """Blocks of the window pool (REPLAY-10)."""
    if window < 1:
        raise ContractError(f"REPLAY-10: sliding_window is {window}, not a positive length")
    if not 0 < ratio < math.inf:
        raise ContractError(f"REPLAY-10: swa_ratio is {ratio}, not a positive share")
    # Neither 0.29 of 100 blocks nor a third of 9 loses one to rounding.
    swa_capacity = int(Fraction(ratio).limit_denominator(10**9) * capacity)
    blocks = -(-window // block)
    if swa_capacity < blocks + 2:
        raise ContractError(
            f"REPLAY-10: a window pool of {swa_capacity} blocks does not hold a window of {window}"
            f" tokens, which is {blocks}, and two more"
        )
    return swa_capacity


def _run(
    trace: Trace,
    impl: str,
    setting: Setting,
    counts: _Counts,
    samples: list[Sample],
    tokens_compared: int,
    leaks: Leaks,
) -> Run:
    """What was counted."""
    window, block = setting.sliding_window, setting.block
    last = samples[-1].used if samples else Use(0, 0)
    return Run(
        policy=setting.policy,
        capacity=setting.capacity,
        granularity=setting.granularity,
        impl={"kvspec": "native", "kvspec.oracle": "oracle"}.get(impl, impl),
        requests=len(trace.requests),
        blocks=trace.blocks,
        tokens=trace.tokens,
        hit_blocks=counts.matched // block,
        hit_tokens=counts.hit_tokens,
        evictions=counts.evicted // block,
        slots_allocated=counts.slots,
        tokens_compared=tokens_compared,
        seconds=counts.seconds,
        leaked_pages=leaks.pages,
        leaks=leaks.report,
        window=None
        if window is None
        else WindowRun(
            sliding_window=window,
            swa_capacity=setting.swa_capacity,
            swa_evictions=counts.swa_evicted // block,
            swa_left=counts.swa_left // block,
            tombstones=(last.full - last.swa) // block,
            swa_leaked_pages=leaks.swa_pages,
            samples=tuple(samples),
        ),
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
    number: int, systems: tuple[System, System], outcomes: tuple[Outcome, Outcome]
) -> None:
    """LockstepError unless results and abstract states are equal (REPLAY-7). O(resident tokens)."""
    mine, theirs = (
        outcome.told() | system.state() for system, outcome in zip(systems, outcomes, strict=True)
    )
    for name, value in mine.items():
        if value != theirs[name]:
            pair = f"{str(value)[:_SHOWN]} and {str(theirs[name])[:_SHOWN]}"
            raise LockstepError(f"REPLAY-7: request {number}: {name}: {pair}")
