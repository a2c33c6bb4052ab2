"""What each level of checking costs on the conversation trace, and what recording it costs.

The first 2,000 requests at capacity 10,000, one by one. All ways count the same, which is asserted;
they take turns, and of each request the median over the rounds counts, in time of this process.
The trace is found as in `bench_replay`.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import kvspec
import needs
from bench_replay import CAPACITY
from kvspec.conformance.suite import one_thread
from kvspec.flight_recorder import FlightRecorder
from kvspec.replay import Run, Trace, read_trace, replay

FILE = "mooncake_conversation_first2000.jsonl"
ROUNDS = 7
AIM = {"counts": 1.01, "ledger": 1.5}
"""Times `off`."""
MOST = {"counts": 1.05, "ledger": 1.8}
"""What catches a regression. `counts` is the aim and 0.04, by which a busy machine moves the ratio;
`ledger` misses its aim by up to 0.15 where this was measured, and has as much again. The medians
are printed beside the aims.
"""


class Timed(NamedTuple):
    run: Run
    seconds: list[float]
    """Of each request but the first."""


Way = Callable[[Trace], Timed]


def _timed(trace: Trace, **options: Any) -> Timed:
    marks: list[float] = []
    run = replay(
        trace,
        impl=kvspec,
        capacity=CAPACITY,
        progress=lambda: marks.append(time.process_time()),
        **options,
    )
    return Timed(run, [stop - start for start, stop in pairwise(marks)])


def _seconds_at_sets(trace: Trace) -> float:
    """One look at `sets` after the last request: it reads the tokens of every resident path."""
    made: dict[str, Any] = {}
    names = "PagedTokenToKVPoolAllocator", "ReqToTokenPool", "RadixCache"

    def keep(name: str) -> Callable[..., Any]:
        def make(*arguments: Any, **options: Any) -> Any:
            made[name] = getattr(kvspec, name)(*arguments, **options)
            return made[name]

        return make

    numbers, seconds = count(1), 0.0

    def look() -> None:
        nonlocal seconds
        if next(numbers) == len(trace.requests):
            start = time.process_time()
            kvspec.check_memory(*(made[name] for name in names), level="sets")
            seconds = time.process_time() - start

    impl: Any = SimpleNamespace(__name__="kvspec", **{name: keep(name) for name in names})
    replay(trace, impl=impl, capacity=CAPACITY, check="off", progress=look)
    return seconds


def _ways(folder: Path) -> dict[str, Way]:
    """What is compared, by the name it is told under."""

    def way(**options: Any) -> Way:
        return lambda trace: _timed(trace, **options)

    def to_ring(check: str) -> Way:
        return lambda trace: _timed(trace, check=check, record=FlightRecorder())

    def to_file(kind: str, tokens: bool = False) -> Way:
        paths: Iterator[Path] = (folder / f"{number}{tokens}.{kind}" for number in count())

        def run(trace: Trace) -> Timed:
            path = next(paths)
            timed = _timed(trace, check="off", record=path, tokens=tokens)
            path.unlink()
            return timed

        return run

    return {
        "off": way(check="off"),
        "counts": way(check="counts"),
        "ledger": way(check="ledger"),
        "recorded, ring alone": to_ring("off"),
        "recorded, ndjson": to_file("ndjson"),
        "recorded, msgpack": to_file("msgpack"),
        "recorded, with tokens": to_file("ndjson", tokens=True),
        "ledger, recorded": to_ring("ledger"),
    }


@needs.trace(FILE)
def bench_levels(benchmark: Any, tmp_path: Path) -> None:
    trace = read_trace(needs.TRACES / FILE)
    if benchmark.disabled:
        trace = trace._replace(requests=trace.requests[:20])
    ways, times = _ways(tmp_path), dict[str, list[list[float]]]()
    expected = None
    with one_thread():
        for _ in range(1 if benchmark.disabled else ROUNDS):
            for name, way in ways.items():
                run, seconds = way(trace)
                assert run._replace(seconds=0) == (expected := expected or run._replace(seconds=0))
                assert not run.leaks
                times.setdefault(name, []).append(seconds)
        sets = _seconds_at_sets(trace)
    benchmark.pedantic(lambda: None)
    if benchmark.disabled:
        return
    took = {
        name: sum(map(statistics.median, zip(*rounds, strict=True))) / len(trace.requests) * 1e6
        for name, rounds in times.items()
    }
    ratios = {name: each / took["off"] for name, each in took.items()}
    benchmark.extra_info.update({name: round(ratio, 3) for name, ratio in ratios.items()})
    benchmark.extra_info["ms_a_look_at_sets"] = round(sets * 1e3)
    print(f"\none look at sets: {sets * 1e3:,.0f} ms")
    print(f"{'':24}  us a request  times off")
    for name, ratio in ratios.items():
        aim = f"  aim {AIM[name]}" if name in AIM else ""
        print(f"{name:24}  {took[name]:12.1f}  {ratio:9.3f}{aim}")
    for name, most in MOST.items():
        assert ratios[name] < most, f"{name}: {ratios[name]:.3f}"
