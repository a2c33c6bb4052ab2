"""What runs say to people and to programs."""

from collections.abc import Iterable, Sequence
from typing import TypedDict

from rich.table import Table

from kvspec.replay.run import Run
from kvspec.replay.trace import Trace

__all__ = ["Report", "RunReport", "as_json", "as_table"]


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
        runs=[
            RunReport(
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
            for run in runs
        ],
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


def _setting(runs: Sequence[Run]) -> str:
    """Implementation and granularity, which all runs of a report share."""
    return "; ".join(sorted({f"{run.impl}, {run.granularity} granularity" for run in runs}))


def _rate(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "-"
