"""What runs say to people and to programs."""

from collections.abc import Iterable, Sequence
from typing import NotRequired, TypedDict

from rich.table import Table

from kvspec.replay.run import Run, WindowRun
from kvspec.replay.trace import Trace

__all__ = ["Report", "RunReport", "WindowReport", "as_json", "as_table", "as_window_table"]


class WindowReport(TypedDict):
    """What a sliding window adds to an element of `runs`."""

    sliding_window: int
    swa_capacity: int
    swa_evictions: int
    swa_left: int
    tombstones: int
    swa_leaked_pages: int
    full_used_peak: int
    full_used_mean: float
    swa_used_peak: int
    swa_used_mean: float


class RunReport(TypedDict):
    """One element of `runs` in the JSON."""

    policy: str
    capacity: int
    granularity: str
    impl: str
    hit_blocks: int
    hit_tokens: int
    evictions: int
    seconds: float
    leaked_pages: int
    window: NotRequired[WindowReport]


class Report(TypedDict):
    """The JSON of spec/replay.md."""

    trace: str
    block: int
    requests: int
    runs: list[RunReport]


def as_json(trace: Trace, runs: Iterable[Run]) -> Report:
    """What `--json` writes: one element for each run, in the order asked for."""
    return Report(
        trace=trace.name,
        block=trace.block,
        requests=len(trace.requests),
        runs=[_run_report(run) for run in runs],
    )


def _run_report(run: Run) -> RunReport:
    report = RunReport(
        policy=run.policy,
        capacity=run.capacity,
        granularity=run.granularity,
        impl=run.impl,
        hit_blocks=run.hit_blocks,
        hit_tokens=run.hit_tokens,
        evictions=run.evictions,
        seconds=run.seconds,
        leaked_pages=run.leaked_pages,
    )
    if run.window is not None:
        report["window"] = _window_report(run.window)
    return report


def _window_report(window: WindowRun) -> WindowReport:
    peak, mean = window.peak, window.mean
    return WindowReport(
        sliding_window=window.sliding_window,
        swa_capacity=window.swa_capacity,
        swa_evictions=window.swa_evictions,
        swa_left=window.swa_left,
        tombstones=window.tombstones,
        swa_leaked_pages=window.swa_leaked_pages,
        full_used_peak=peak.full,
        full_used_mean=mean[0],
        swa_used_peak=peak.swa,
        swa_used_mean=mean[1],
    )


def as_table(trace: Trace, runs: Sequence[Run]) -> Table:
    """What the command prints: a row for each run."""
    table = Table(
        title=f"{trace.name}\n{len(trace.requests):,} requests, {trace.blocks:,} blocks of"
        f" {trace.block} tokens, {trace.tokens:,} tokens",
        caption=_setting(runs),
    )
    for heading in (
        "policy",
        "capacity\nblocks",
        "hit rate\nblocks",
        "hit rate\ntokens",
        "evictions\nblocks",
        "slots\nallocated",
        "tokens\ncompared",
        "time per\nrequest",
        "check_memory",
    ):
        table.add_column(
            heading, justify="left" if heading in ("policy", "check_memory") else "right"
        )
    for run in runs:
        table.add_row(
            run.policy,
            f"{run.capacity:,}",
            _rate(run.hit_blocks, run.blocks),
            _rate(run.hit_tokens, run.tokens),
            f"{run.evictions:,}",
            f"{run.slots_allocated:,}",
            f"{run.tokens_compared:,}",
            f"{run.seconds / max(run.requests, 1) * 1e6:,.0f} us",
            "no leak" if not run.leaks else f"{run.leaked_pages:,} pages leaked",
        )
    return table


def as_window_table(trace: Trace, runs: Sequence[Run]) -> Table | None:
    """What the command prints below of runs with a sliding window; None if there is none."""
    windows = [(run, run.window) for run in runs if run.window is not None]
    if not windows:
        return None
    table = Table(title=f"sliding window of {windows[0][1].sliding_window:,} tokens")
    for heading in (
        "capacity\nblocks",
        "window\nblocks",
        "evictions\nwindow",
        "left\nbehind",
        "tombstones\nat the end",
        "full pool\nmean, peak",
        "window pool\nmean, peak",
        "leaked\nwindow",
    ):
        table.add_column(heading, justify="right")
    for run, window in windows:
        block = trace.block
        table.add_row(
            f"{run.capacity:,}",
            f"{window.swa_capacity:,}",
            f"{window.swa_evictions:,}",
            f"{window.swa_left:,}",
            f"{window.tombstones:,}",
            _share(window.mean[0], window.peak.full, run.capacity * block),
            _share(window.mean[1], window.peak.swa, window.swa_capacity * block),
            f"{window.swa_leaked_pages:,}",
        )
    return table


def _share(mean: float, peak: int, pool: int) -> str:
    """Of a pool, all in tokens."""
    return f"{mean / pool:.1%}, {peak / pool:.1%}"


def _setting(runs: Sequence[Run]) -> str:
    """Implementation and granularity, which all runs of a report share."""
    return "; ".join(sorted({f"{run.impl}, {run.granularity} granularity" for run in runs}))


def _rate(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"
