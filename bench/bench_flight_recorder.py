"""What an event costs. Clause REC-9: counters are gated, microseconds reported.

    make bench

The events are those of one step of decoding and of one request that enters: a few runs each.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvspec.flight_recorder.log
from kvspec.flight_recorder import FlightRecorder
from kvspec.flight_recorder.events import (
    Alloc,
    AllocDecode,
    Event,
    Free,
    FreeGroupBegin,
    FreeGroupEnd,
    Start,
)
from kvspec.flight_recorder.log import read_log
from kvspec.prefix_key import page_hashes

ROUNDS = 7
EVENTS = 1_000
AT = "scheduler.py:1234 update_running_batch"
START = Start(
    schema=1,
    kvspec="0",
    allocator="a.Allocator",
    pool="a.Pool",
    cache="a.Cache",
    page_size=16,
    size=65536,
    rows=64,
    max_context_len=4096,
)
STEP: tuple[Event, ...] = (
    Alloc(at=AT, need_size=512, slots=[(4096, 4608)]),
    AllocDecode(
        at=AT,
        seq_lens=list(range(1000, 1032)),
        last_loc=list(range(5000, 5032)),
        slots=[(slot, slot + 1) for slot in range(8000, 8064, 2)],
    ),
    FreeGroupBegin(at=AT),
    Free(at=AT, slots=[(4096, 4608)]),
    FreeGroupEnd(at=AT),
)
KINDS: dict[str, dict[str, Any]] = {
    "ring": {},
    "ndjson": {"format": "ndjson"},
    "msgpack": {"format": "msgpack"},
    "ndjson, flushed every 64": {"format": "ndjson", "flush_every": 64},
}


def _recorder(folder: Path, kind: str) -> FlightRecorder:
    name = f"{kind} {len(list(folder.iterdir()))}"
    recorder = FlightRecorder(None if kind == "ring" else folder / name, **KINDS[kind])
    recorder.record(START)
    return recorder


def _microseconds(work: Callable[[], int]) -> float:
    """Of this process, for one unit of what the work counts."""
    begin = time.process_time()
    count = work()
    return (time.process_time() - begin) / count * 1e6


def _record(recorder: FlightRecorder) -> int:
    for event in itertools.islice(itertools.cycle(STEP), EVENTS):
        recorder.record(event)
    recorder.flush()
    return EVENTS


@pytest.mark.clause("REC-9")
def bench_an_event(benchmark: Any, tmp_path: Path) -> None:
    """Microseconds of `record`, the median of interleaved rounds; reported, not gated."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def round_of_all() -> None:
        for kind in KINDS:
            with _recorder(tmp_path, kind) as recorder:
                found[kind].append(_microseconds(lambda: _record(recorder)))

    benchmark.pedantic(round_of_all, rounds=1 if benchmark.disabled else ROUNDS)
    for kind, times in found.items():
        benchmark.extra_info[f"us_per_event, {kind}"] = round(statistics.median(times), 2)
    for path in tmp_path.iterdir():
        assert sum(1 for _ in read_log(path)) == EVENTS + 1


@pytest.mark.clause("REC-9")
@pytest.mark.parametrize("format", ["ndjson", "msgpack"])
def bench_bytes_of_an_event(benchmark: Any, tmp_path: Path, format: str) -> None:
    """Linear in its runs: each further run of the same digits adds the same bytes."""
    sizes: list[int] = []

    def write() -> None:
        path = tmp_path / "log"
        with FlightRecorder(path, format=format) as recorder:
            for count in (0, 128, 256, 512):
                slots = [(slot, slot + 1) for slot in range(100_000, 100_000 + 2 * count, 2)]
                recorder.record(Free(slots=slots))
                sizes.append(path.stat().st_size)
        path.unlink()

    benchmark.pedantic(write, rounds=1)
    once, twice, four_times = (b - a for a, b in itertools.pairwise(sizes))
    spread = 12  # a checksum has from 1 to 10 digits
    assert abs((four_times - twice) - 2 * (twice - once)) <= spread
    benchmark.extra_info["bytes_per_run"] = round((four_times - twice) / 256, 2)
    assert four_times - twice <= 256 * 18


@pytest.mark.clause("REC-9")
@pytest.mark.parametrize("flush_every", [1, 64])
def bench_writes(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_every: int
) -> None:
    """One system call a flush, whatever there is to write."""
    calls: list[int] = []
    write = kvspec.flight_recorder.log.os.write

    def counted(file: int, data: bytes) -> int:
        calls.append(len(data))
        return write(file, data)

    monkeypatch.setattr(kvspec.flight_recorder.log.os, "write", counted)

    def run() -> None:
        with FlightRecorder(tmp_path / "log", flush_every=flush_every) as recorder:
            _record(recorder)

    benchmark.pedantic(run, rounds=1)
    assert len(calls) == -(-EVENTS // flush_every)
    assert sum(calls) == (tmp_path / "log").stat().st_size


@pytest.mark.clause("REC-9")
@pytest.mark.parametrize("page_size", [1, 16, 512])
def bench_keys_that_grow(benchmark: Any, page_size: int) -> None:
    """Sixteen conversations of one beginning, eight turns each, asked for three times a turn.

    Each page is hashed once. Reported: the time of a key over that of hashing it whole; where pages
    are large, to make words of a list of tokens is most of both.
    """
    tokens = 8 * 512
    common = list(range(tokens))
    turns = [
        [*common, *range(10_000 * (1 + person), 10_000 * (1 + person) + turn * 512)]
        for turn in range(1, 9)
        for person in range(16)
    ]
    ratios: list[float] = []

    def run() -> None:
        recorder = FlightRecorder()

        def remembered() -> int:
            for key in turns:
                for _ in range(3):
                    recorder.key(key, page_size)
            return len(turns)

        def whole() -> int:
            for key in turns[::16]:
                page_hashes(key, page_size)
            return len(turns[::16])

        asked = _microseconds(remembered)
        ratios.append(asked / 3 / _microseconds(whole))
        pages = (tokens + 16 * 8 * 512) // page_size
        assert recorder.hashed_pages == pages

    benchmark.pedantic(run, rounds=1 if benchmark.disabled else ROUNDS)
    benchmark.extra_info["ratio"] = round(statistics.median(ratios), 3)
