"""Hit rate against capacity, a curve for each policy; with windows, the use of both pools too."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from kvspec.replay.run import Run, Sample, WindowRun
from kvspec.replay.trace import Trace

__all__ = ["plot_hit_rates"]

_MARKERS = "osD^vP*"
_SPANS = 40
"""A curve over the requests is drawn as the mean of one part in so many."""


def plot_hit_rates(trace: Trace, runs: Sequence[Run], path: str | Path) -> None:
    """Write a picture; the suffix of `path` says of which type. Needs the extra `plot`.

    Runs with a sliding window have a second panel below: what is used of both pools as requests
    are served. If there is one such run, the first panel has its hit rate over the requests too.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    windows = [(run, run.window) for run in runs if run.window is not None]
    figure = Figure(figsize=(8, 8 if windows else 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rates, *below = figure.subplots(2 if windows else 1, squeeze=False)[:, 0]
    if len(windows) == 1:
        _draw_hit_rate_over_requests(rates, trace, windows[0][1].samples)
    else:
        _draw_hit_rate_over_capacity(rates, trace, runs)
    if windows:
        _draw_use(below[0], trace, windows)
    what = f"{Path(trace.name).name}: {len(trace.requests):,} requests"
    if windows:
        what += f", sliding window of {windows[0][1].sliding_window:,} tokens"
    figure.suptitle(what, fontsize=11)
    for axes in (rates, *below):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path)


def _draw_hit_rate_over_capacity(axes: Any, trace: Trace, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    capacities = sorted({run.capacity for run in runs})
    policies = list(dict.fromkeys(run.policy for run in runs))
    for order, policy in enumerate(policies):
        points = sorted((run.capacity, run.hit_blocks) for run in runs if run.policy == policy)
        # Later curves are thinner, so that one that lies on another hides nothing.
        width = 4 - 2.8 * order / len(policies)
        axes.plot(
            [capacity for capacity, _ in points],
            [hits / max(trace.blocks, 1) for _, hits in points],
            marker=_MARKERS[order % len(_MARKERS)],
            markersize=4 + 2 * width,
            markerfacecolor="none",
            linewidth=width,
            alpha=0.85,
            label=policy,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(capacities))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel(f"capacity (blocks of {trace.block} tokens)")
    _finish_hit_rates(axes, trace)


def _draw_hit_rate_over_requests(axes: Any, trace: Trace, samples: Sequence[Sample]) -> None:
    hits = [sample.hit_blocks for sample in samples]
    blocks = [sample.blocks for sample in samples]
    span = max(len(samples) // _SPANS, 1)
    ends = range(span, len(samples) + 1)
    rates = [h / max(b, 1) for h, b in zip(_sums(hits, span), _sums(blocks, span), strict=True)]
    sums = zip(accumulate(hits), accumulate(blocks), strict=True)
    so_far = [h / max(b, 1) for h, b in sums]
    axes.plot(ends, rates, linewidth=1, alpha=0.8, label=f"last {span:,} requests")
    axes.plot(range(1, len(samples) + 1), so_far, color="black", linewidth=1.5, label="so far")
    _over_requests(axes, len(samples))
    _finish_hit_rates(axes, trace)


def _finish_hit_rates(axes: Any, trace: Trace) -> None:
    """Without eviction every block hits but the first of each path: no policy does better."""
    from matplotlib.ticker import PercentFormatter

    distinct = len({int(id_) for request in trace.requests for id_ in request.hash_ids})
    ideal = 1 - distinct / max(trace.blocks, 1)
    axes.axhline(ideal, color="0.5", linestyle="--", linewidth=1, label="unbounded cache")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_ylabel("block hit rate")
    _legend_above(axes)


def _draw_use(axes: Any, trace: Trace, windows: Sequence[tuple[Run, WindowRun]]) -> None:
    """Of each pool the share that is used; a colour for each run, or of one run for each pool."""
    from matplotlib.ticker import PercentFormatter

    alone = len(windows) == 1
    for order, (run, window) in enumerate(windows):
        count = len(window.samples)
        span = max(count // _SPANS, 1)
        blocks = run.capacity, window.swa_capacity
        if not alone:
            axes.plot([], [], f"C{order}", label=f"{blocks[0]:,} + {blocks[1]:,} blocks")
        for pool, name in enumerate(("full", "window")):
            shares = [sample.used[pool] / blocks[pool] / trace.block for sample in window.samples]
            colour, line = (f"C{pool}", "-") if alone else (f"C{order}", ("-", "--")[pool])
            if alone:
                axes.plot(range(1, count + 1), shares, colour, linewidth=0.5, alpha=0.3)
                label = f"{name} pool, {blocks[pool]:,} blocks"
                axes.plot([], [], colour, label=label)
            elif run is windows[-1][0]:
                axes.plot([], [], "0.4", linestyle=line, label=f"{name} pool")
            means = [total / span for total in _sums(shares, span)]
            axes.plot(range(span, count + 1), means, colour, linestyle=line, linewidth=1.5)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    _over_requests(axes, max(len(window.samples) for _, window in windows))
    axes.set_xlabel("requests served")
    axes.set_ylabel("used of the pool")
    _legend_above(axes)


def _over_requests(axes: Any, count: int) -> None:
    axes.set_xlim(0, max(count, 1))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _legend_above(axes: Any) -> None:
    """Where no curve is."""
    where = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
    axes.legend(**where, ncols=4, frameon=False, fontsize=9, columnspacing=1.5)


def _sums(values: Sequence[float], span: int) -> list[float]:
    """Of every `span` values that follow one another."""
    totals = list(accumulate(values, initial=0.0))
    return [end - start for start, end in zip(totals, totals[span:], strict=False)]
