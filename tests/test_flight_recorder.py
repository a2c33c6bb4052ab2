"""The flight recorder: the suite, killed processes, full disks, the schema, ids and runs."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvspec
import kvspec.oracle
from kvspec.clauses import spec_folder
from kvspec.conformance import clause
from kvspec.conformance.flight_recorder import (
    FORMATS,
    START,
    FlightRecorderConformance,
    misfit,
    samples,
)
from kvspec.flight_recorder import FlightRecorder, LogError, events, read_log
from kvspec.flight_recorder.events import AnyEvent, Clear, Event, Evict
from kvspec.flight_recorder.keys import PageIds
from kvspec.flight_recorder.runs import python_slot_runs, slot_runs
from kvspec.flight_recorder.schema import schema
from kvspec.prefix_key import page_hashes
from needs import native

SCHEMA_FILE = spec_folder() / "flight_recorder.schema.json"


class TestOracle(FlightRecorderConformance):
    impl = kvspec.oracle


@native
class TestNative(FlightRecorderConformance):
    impl = kvspec


# A package that has not run `kvspec/__init__.py`: recorder and reader need neither torch nor numpy.
_BARE = f"""
import sys, types
sys.modules["kvspec"] = types.ModuleType("kvspec")
sys.modules["kvspec"].__path__ = [{str(Path(kvspec.__file__).parent)!r}]
"""


def child(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """A process that runs this with `sys.argv[1:]`; its output can be read as it comes."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_as_far(path: Path) -> tuple[list[Any], LogError | None]:
    """The events before the end or the fault of a log, and the fault."""
    found = []
    try:
        for event in read_log(path):
            found.append(event)
    except LogError as error:
        return found, error
    return found, None


_RECORD_FOREVER = """
import itertools, sys
from kvspec.flight_recorder import FlightRecorder
from kvspec.flight_recorder.events import Free
path, format, flush_every = sys.argv[1:]
recorder = FlightRecorder(path, format=format, flush_every=int(flush_every))
for step in itertools.count(1):
    recorder.record(Free(slots=[(at, at + 1) for at in range(step % 50)]))
    if step % int(flush_every) == 0:
        print(step, flush=True)
"""


@clause("REC-5")
@pytest.mark.parametrize(
    ("format", "flush_every", "lines"),
    [("ndjson", 1, 1), ("msgpack", 1, 100), ("ndjson", 1, 300), ("msgpack", 7, 40)],
)
def test_a_killed_process_leaves_what_it_flushed(
    format: str, flush_every: int, lines: int, tmp_path: Path
) -> None:
    process = child(_BARE + _RECORD_FOREVER, tmp_path / "log", format, flush_every)
    assert process.stdout is not None
    for _ in range(lines):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    told, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL

    flushed = max(map(int, told.split("\n")[:-1]), default=lines * flush_every)
    found, error = read_as_far(tmp_path / "log")
    assert error is None or error.reason.startswith("truncated: ")
    assert len(found) >= flushed
    assert [event.n for event in found] == list(range(len(found)))
    assert all(len(event.slots) == (event.n + 1) % 50 for event in found)


_FILL = """
import resource, sys
from kvspec.flight_recorder import FlightRecorder
from kvspec.flight_recorder.events import Evict
path, format, flush_every, limit = sys.argv[1:]
recorder = FlightRecorder(path, format=format, flush_every=int(flush_every))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
told = []
sys.unraisablehook = lambda seen: told.append(type(seen.exc_value).__name__)
for step in range(20):
    recorder.record(Evict(num_tokens=step))
recorder.close()
print(recorder.dropped, len(recorder.events()), *told)
"""


@clause("REC-7")
@pytest.mark.parametrize(("format", "flush_every"), [("ndjson", 1), ("msgpack", 6)])
def test_a_disk_that_fills_within_a_record_lacks_what_is_counted(
    format: str, flush_every: int, tmp_path: Path
) -> None:
    process = child(_BARE + _FILL, tmp_path / "log", format, flush_every, 333)
    told, complaint = process.communicate()
    assert (process.returncode, complaint) == (0, "")
    dropped, kept, *errors = told.split()
    assert (tmp_path / "log").stat().st_size == 333
    read, error = read_as_far(tmp_path / "log")
    assert error is not None
    assert error.reason.startswith("truncated: ")
    assert 0 < len(read) == 20 - int(dropped)
    assert (int(kept), errors) == (20, ["OSError"])


@clause("REC-5")
def test_a_recorder_that_is_let_go_flushes(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "log", flush_every=100)
    recorder.record(START)
    assert not list(read_log(tmp_path / "log"))
    del recorder
    assert list(read_log(tmp_path / "log")) == [START]


@clause("REC-8")
def test_a_recorder_closes_at_the_end_of_with(tmp_path: Path) -> None:
    with FlightRecorder(tmp_path / "log", flush_every=100) as recorder:
        recorder.record(START)
        assert (recorder.recorded, recorder.dropped) == (1, 0)
    with pytest.raises(kvspec.ContractError, match="REC-8"):
        recorder.record(Clear())
    assert list(read_log(tmp_path / "log")) == [START]


@clause("REC-8")
def test_a_file_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FlightRecorder(tmp_path / "nowhere" / "log")
    with pytest.raises(FileNotFoundError):
        FlightRecorder().dump(tmp_path / "nowhere" / "log")
    with pytest.raises(FileNotFoundError):
        next(read_log(tmp_path / "log"))


@clause("REC-6")
def test_a_length_beyond_the_file_asks_for_no_memory(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"kvspec01" + b"\xff" * 8 + b"\x80")
    with pytest.raises(LogError, match="truncated: 1 of 4294967295 bytes"):
        next(read_log(tmp_path / "log"))


def test_any_event_is_every_kind_of_event() -> None:
    kinds = {
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
    }
    assert set(get_args(AnyEvent)) == kinds
    tags = [kind.__struct_config__.tag for kind in get_args(AnyEvent)]
    assert len(set(tags)) == len(tags)
    assert set(events.__all__) >= {kind.__name__ for kind in kinds}


@clause("REC-2")
def test_the_schema_in_spec_is_current() -> None:
    """`python -m kvspec.flight_recorder.schema > spec/flight_recorder.schema.json` renews it."""
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == schema()


@clause("REC-2")
def test_the_schema_says_every_field_of_every_event() -> None:
    told = schema()
    parts = told["$defs"]
    assert len(told["anyOf"]) == len(get_args(AnyEvent))
    for kind in get_args(AnyEvent):
        fields = {field.encode_name for field in msgspec.structs.fields(kind)}
        assert set(parts[kind.__name__]["properties"]) == {"op", *fields}
    for part in parts.values():
        assert part["additionalProperties"] is False


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"more": 1}, "$.more: unknown"),
        ({"need_size": "1"}, "$.need_size: '1' is no integer"),
        ({"need_size": True}, "$.need_size: True is no integer"),
        ({"need_size": None}, "$.need_size: None is no integer"),
        ({"op": "free"}, "$.op: 'free' is not in ['alloc']"),
        ({"slots": [[1]]}, "$.slots: none of"),
        ({"slots": [[1, 2, 3]]}, "$.slots: none of"),
        ({"did": {"freed": 1}}, "$.did: none of"),
    ],
)
def test_the_schema_is_strict(changed: dict[str, Any], why: str) -> None:
    parts = schema()["$defs"]
    value = {"op": "alloc", "need_size": 1, "slots": [[1, 2]]}
    assert misfit(value, parts["Alloc"], parts) == ""
    assert misfit({"op": "alloc"}, parts["Alloc"], parts) == "$: ['need_size'] missing"
    assert misfit({**value, **changed}, parts["Alloc"], parts).startswith(why)


@clause("REC-3")
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), max_size=12),
            st.integers(1, 3),
            st.sampled_from([None, "a", 7]),
        ),
        min_size=20,
        max_size=60,
    ),
    st.sampled_from([0, 2_000, 4_000, 1 << 20]),
)
def test_ids_are_the_same_however_little_is_remembered(
    keys: list[tuple[list[int], int, Any]], budget: int
) -> None:
    ids = PageIds(budget)
    for tokens, page_size, name in keys:
        found, words, _ = ids.of(tokens, page_size, name)
        assert found == b"".join(h[:16] for h in page_hashes(tokens, page_size, name))
        assert words.tolist() == tokens
        assert ids.used <= budget


@clause("REC-9")
def test_the_keys_of_late_are_the_ones_remembered() -> None:
    ids = PageIds(20_000)
    for tenant in range(100):
        ids.of([1, 2, 3], 1, "kept")
        ids.of([1, 2, 3], 1, tenant)
    assert ids.hashed == 3 + 3 * 100
    ids.of([1, 2, 3], 1, 99)
    assert ids.hashed == 303
    ids.of([1, 2, 3], 1, 0)
    assert ids.hashed == 306


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_tokens_of_any_kind_are_kept_as_they_were(kind: Any) -> None:
    recorder = FlightRecorder(tokens=True)
    tokens = [5, 6, 7, 8, 9]
    given = kind(tokens)
    key = recorder.key(given, 2)
    if kind is not tuple:
        given[0] = 0
    assert key.tokens == {0: [5, 6], 1: [7, 8]}
    assert recorder.key(tokens, 2).ids == key.ids


INTEGERS = st.integers(-(2**63), 2**63 - 1)
STEPS = st.lists(st.sampled_from([1, 1, 1, 0, -1, 2, 5]), max_size=40)


@clause("REC-2")
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.one_of(st.tuples(st.integers(-3, 60), STEPS), st.lists(INTEGERS, max_size=12)))
def test_runs_are_the_slots_whoever_finds_them(drawn: Any) -> None:
    if isinstance(drawn, tuple):
        slots = [drawn[0]]
        for step in drawn[1]:
            slots.append(slots[-1] + step)
    else:
        slots = drawn
    runs = python_slot_runs(slots)
    assert slot_runs(slots) == runs
    assert slot_runs(torch.tensor(slots, dtype=torch.int64)) == runs
    assert [slot for start, stop in runs for slot in range(start, stop)] == slots
    assert all(stop != start for (_, stop), (start, _) in pairwise(runs))


@clause("REC-2")
@pytest.mark.parametrize(
    "slots",
    [
        [],
        [2**63 - 1],
        [2**63 - 1, -(2**63)],
        [-(2**63), -(2**63) + 1],
        [-2, -1, 0, 1],
        range(5),
        (7,),
        torch.tensor([1, 2, 4], dtype=torch.int32),
        torch.arange(10)[::2],
        None,
        "12",
        [1.5],
        torch.tensor([[1, 2]]),
        torch.tensor([1.0]),
    ],
    ids=lambda slots: f"{slots!r:.40}",
)
def test_runs_of_what_slots_can_be(slots: Any) -> None:
    told: list[Any] = []
    for find in (slot_runs, python_slot_runs):
        try:
            told.append(find(slots))
        except kvspec.ContractError as error:
            told.append(str(error))
    assert told[0] == told[1]


_WITHOUT_MSGSPEC = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "msgspec":
            raise ImportError("msgspec is absent")
sys.meta_path.insert(0, Absent())
import kvspec, kvspec.oracle
print(kvspec.page_hashes([1], 1)[0].hex()[:4], "msgspec" in sys.modules)
"""


def test_kvspec_works_where_msgspec_is_absent() -> None:
    told, complaint = child(_WITHOUT_MSGSPEC).communicate()
    assert complaint == ""
    assert told == "67ab False\n"


def test_an_event_costs_no_more_memory_than_its_bytes() -> None:
    """The ring holds what was written, in one object an event."""
    recorder = FlightRecorder(ring=3)
    for event in samples():
        recorder.record(event)
    assert {type(kept) for kept in recorder._ring} == {bytes}
    assert [event.n for event in recorder.events()] == [25, 26, 27]


@pytest.mark.parametrize("format", FORMATS)
def test_a_log_of_a_pipe_is_a_log(format: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with FlightRecorder(tmp_path / "pipe", format=format) as recorder:
        recorded = [recorder.record(START), recorder.record(Evict(num_tokens=1))]
    (tmp_path / "log").write_bytes(os.read(reader, 65536))
    os.close(reader)
    assert list(read_log(tmp_path / "log")) == recorded
