"""Hit rate against capacity, a curve for each policy."""

from collections.abc import Sequence
from pathlib import Path

from kvspec.replay.run import Run
from kvspec.replay.trace import Trace

__all__ = ["plot_hit_rates"]

_MARKERS = "osD^vP*"


def plot_hit_rates(trace: Trace, runs: Sequence[Run], path: str | Path) -> None:
    """Write a picture; the suffix of `path` says of which type. Needs the extra `plot`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
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
    # Without eviction every block hits but the first of each path: no policy does better.
    ideal = 1 - _distinct(trace) / max(trace.blocks, 1)
    axes.axhline(ideal, color="0.5", linestyle="--", linewidth=1, label="unbounded cache")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(capacities))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"capacity (blocks of {trace.block} tokens)")
    axes.set_ylabel("block hit rate")
    axes.set_title(f"{Path(trace.name).name}: {len(trace.requests):,} requests", fontsize=11)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(title="policy", frameon=False)
    figure.savefig(path)


def _distinct(trace: Trace) -> int:
    return len({int(id_) for request in trace.requests for id_ in request.hash_ids})
