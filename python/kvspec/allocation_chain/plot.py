"""The timeline of an allocation, drawn. Needs the extra `plot`. Spec: CHAIN-8."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvspec.allocation_chain.chain import told_call
from kvspec.allocation_chain.observation import LibraryCall, Observation, Phase, SystemCall

__all__ = ["plot_timeline"]

_SHADES = {"allocate": "C0", "touch": "C2", "free": "C3"}
_MOST_CALLS = 6
"""Calls that are named for each phase: the first."""
_LETTERS = 37
"""That fit into a phase of the width 1."""

_Points = list[tuple[int, float]]


def plot_timeline(observation: Observation, path: str | Path) -> None:
    """Virtual and resident size over time, calls at their instants, and page faults below.

    The suffix of `path` says of which type. What the observer itself took between the phases is
    cut out of the time, so that the phases lie side by side.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axis = _Time(observation.phases)
    figure = Figure(figsize=(10, 7.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, above, below = figure.subplots(3, sharex=True, height_ratios=(1.1, 3, 1))
    unit, per = _unit(_most(observation))
    _draw_sizes(above, observation, axis, per)
    _draw_calls(top, above, observation, axis)
    _draw_faults(below, observation, axis)
    for axes in (top, above, below):
        for phase in observation.phases:
            begin, end = axis.span(phase)
            axes.axvspan(begin, end, color=_SHADES[phase.name], alpha=0.08, linewidth=0)
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    above.set_ylabel(f"change since the begin ({unit})")
    above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9,
                 borderaxespad=0, columnspacing=1.5)  # fmt: skip
    for phase in observation.phases:
        begin, end = axis.span(phase)
        top.text((begin + end) / 2, 1.01, f"{phase.name}, {_time(phase.took_ns)}",
                 transform=top.get_xaxis_transform(), ha="center", va="bottom", fontsize=9,
                 color=_SHADES[phase.name])  # fmt: skip
    below.set_xticks([])
    below.set_xlim(0, axis.width)
    below.set_xlabel(
        "time (phases are not to one scale); sizes were read where a phase begins and ends,"
        " and after each step of the touch"
    )
    asked = observation.request
    what = f"{observation.arena}({asked.kind!r}, {asked.nbytes:,} bytes)"
    figure.suptitle(f"{what} at {observation.address:#x}", fontsize=11)
    figure.savefig(path)


class _Time:
    """Where an instant is drawn: phases beside each other, each with a width of its own."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        widths = {"allocate": 1.4, "touch": 1.4, "free": 1.0}
        self._at: dict[str, tuple[float, Phase]] = {}
        self.width = 0.0
        for phase in phases:
            self._at[phase.name] = (self.width, phase)
            self.width += widths[phase.name]
        self._widths = widths

    def span(self, phase: Phase) -> tuple[float, float]:
        begin, _ = self._at[phase.name]
        return begin, begin + self._widths[phase.name]

    def place(self, name: str, at_ns: int, last_ns: int) -> float:
        """Of an instant of a phase whose last one is `last_ns`."""
        begin, phase = self._at[name]
        part = (at_ns - phase.at_ns) / max(last_ns - phase.at_ns, 1)
        return begin + self._widths[name] * min(max(part, 0.0), 1.0)


def _most(observation: Observation) -> int:
    return max(
        *(
            phase.virtual_after - observation.phases[0].virtual_before
            for phase in observation.phases
        ),
        observation.mapped_bytes,
    )


def _unit(value: int) -> tuple[str, int]:
    for name, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if value >= size:
            return name, size
    return "KiB", 1 << 10


def _time(ns: int) -> str:
    for name, size in (("s", 10**9), ("ms", 10**6)):
        if ns >= size:
            return f"{ns / size:,.1f} {name}"
    return f"{ns / 1000:,.0f} µs"


def _curve(observation: Observation, axis: _Time, *, resident: bool) -> _Points:
    """Each phase begins where the one before ended: what the observer took between is left out."""
    points: _Points = []
    level = 0
    for phase in observation.phases:
        begin, end = axis.span(phase)
        first, last = (
            (phase.resident_before, phase.resident_after)
            if resident
            else (phase.virtual_before, phase.virtual_after)
        )
        points.append((level, begin))
        if phase.name == "touch" and observation.timeline:
            samples = observation.timeline
            for sample in samples:
                value = sample.resident if resident else sample.virtual
                at = axis.place("touch", sample.at_ns, samples[-1].at_ns)
                points.append((level + value - first, at))
        else:
            at = _when(observation, phase, axis)
            points += [(level, at), (level + last - first, at)]
        level += last - first
        points.append((level, end))
    return points


def _draw_sizes(axes: Any, observation: Observation, axis: _Time, per: int) -> None:
    for label, resident, colour in (("virtual size", False, "0.35"), ("resident set", True, "C1")):
        points = _curve(observation, axis, resident=resident)
        axes.plot([at for _, at in points], [value / per for value, _ in points], color=colour,
                  linewidth=2, linestyle="-" if resident else "--", label=label)  # fmt: skip
    samples = observation.timeline or ()
    seen = [sample for sample in samples if sample.range_resident is not None]
    if seen:
        last = samples[-1].at_ns
        axes.plot(
            [axis.place("touch", sample.at_ns, last) for sample in seen],
            [(sample.range_resident or 0) / per for sample in seen],
            *("C4.",),
            markersize=3,
            label="pages of the allocation that are mapped (mincore)",
        )
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.04 * high), high * 1.05)


def _when(observation: Observation, phase: Phase, axis: _Time) -> float:
    """The last call that was seen in a phase, or its end: where what it changed is drawn."""
    seen = _largest(observation, phase)
    at_ns = seen[-1][0] if seen else phase.at_ns + phase.took_ns
    return axis.place(phase.name, at_ns, phase.at_ns + phase.took_ns)


def _draw_calls(top: Any, above: Any, observation: Observation, axis: _Time) -> None:
    """What concerns the allocation, in order, each with a line where it was made."""
    for phase in observation.phases:
        last = phase.at_ns + phase.took_ns
        begin, end = axis.span(phase)
        for order, (at_ns, text, colour) in enumerate(_largest(observation, phase)):
            at = axis.place(phase.name, at_ns, last)
            for axes in (top, above):
                axes.axvline(at, color=colour, linewidth=0.8, alpha=0.6)
            top.annotate(
                _short(text, int(_LETTERS * (end - begin))),
                (begin, 0.92 - 0.155 * order),
                xycoords=top.get_xaxis_transform(),
                xytext=(4, 0),
                textcoords="offset points",
                va="top",
                fontsize=7,
                color=colour,
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
            )
    top.set_yticks([])
    names = ",\n".join(
        word
        for word, seen in (
            ("library (blue)", observation.library_calls is not None),
            ("system (red)", observation.system_calls is not None),
        )
        if seen
    )
    top.set_ylabel(f"calls:\n{names}" if names else "no call\nwas seen")


def _largest(observation: Observation, phase: Phase) -> list[tuple[int, str, str]]:
    of_it: list[tuple[int, str, str]] = []
    for call in observation.library_calls or ():
        if call.phase == phase.name and _concerns(call, observation):
            of_it.append((call.at_ns, told_call(call), "C0"))
    if phase.name != "touch":
        for traced in observation.system_calls or ():
            if traced.phase == phase.name and _traces(traced, observation):
                of_it.append((traced.at_ns, f"{traced.name}({traced.arguments})", "C3"))
    return sorted(of_it)[:_MOST_CALLS]


def _concerns(call: LibraryCall, observation: Observation) -> bool:
    """Whether the allocation's address or size is in it, or it names the segment."""
    numbers = {*call.arguments, call.result}
    named = call.text is not None and call.text == observation.name
    return named or bool({observation.address, observation.mapped_bytes} & numbers)


def _traces(call: SystemCall, observation: Observation) -> bool:
    """Whether a range that begins at the allocation's first page is in it, or its segment."""
    numbers = re.findall(r"0x[0-9a-f]+", f"{call.arguments} {call.result}")
    near = any(0 <= observation.address - int(number, 16) < 4096 for number in numbers)
    return near or (observation.name is not None and observation.name in call.arguments)


def _short(text: str, most: int) -> str:
    """Without what every path begins with, and no longer than there is room."""
    text = re.sub(r"AT_FDCWD(<[^>]*>)?, |<[^>]*>", "", text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _draw_faults(axes: Any, observation: Observation, axis: _Time) -> None:
    """Bars: faults of a phase, or of each step of the touch."""
    for phase in observation.phases:
        begin, end = axis.span(phase)
        samples = observation.timeline if phase.name == "touch" else None
        if samples:
            last = samples[-1].at_ns
            ends = [axis.place("touch", sample.at_ns, last) for sample in samples]
            widths = [after - before for before, after in zip([begin, *ends], ends, strict=False)]
            axes.bar([at - width for at, width in zip(ends, widths, strict=True)],
                     [sample.minor_faults for sample in samples], width=widths, align="edge",
                     color="C2", alpha=0.8)  # fmt: skip
        else:
            middle, shade = (begin + end) / 2, _SHADES[phase.name]
            axes.bar([middle], [phase.minor_faults], width=0.12, color=shade, alpha=0.8)
        told = f"{phase.minor_faults:,} minor"
        if phase.major_faults:
            told += f", {phase.major_faults:,} major"
        axes.text((begin + end) / 2, 1.0, told, transform=axes.get_xaxis_transform(),
                  ha="center", va="bottom", fontsize=8)  # fmt: skip
    axes.set_ylabel("page faults\n(each step)")
    axes.yaxis.get_major_locator().set_params(integer=True)
