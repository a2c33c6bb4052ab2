"""Following logs: the suite, somebody else's engine, a long log, and the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import kvspec
import kvspec.oracle
from kvspec.cli import main
from kvspec.conformance import clause
from kvspec.conformance.validate import PLANTED, ValidateConformance, planted_log, recorded
from kvspec.conformance.validate.crafted import BREAKS, FIRST, log
from kvspec.conformance.validate.engine import Engine, objects
from kvspec.errors import ContractError, MemoryLeakError
from kvspec.flight_recorder import FlightRecorder
from kvspec.flight_recorder.events import CacheFinishedReq, CacheUnfinishedReq, Event, Start
from kvspec.instrumentation import instrument
from kvspec.validate import (
    LogViolation,
    Violation,
    as_pytest,
    command,
    events_of,
    play,
    shrink,
    validate,
)
from kvspec.validate.model import ModelVerdict
from needs import native
from peers import Sglang, sglang


class TestOracle(ValidateConformance):
    impl = kvspec.oracle


@native
class TestNative(ValidateConformance):
    impl = kvspec


@pytest.fixture(scope="module")
def peer() -> Sglang:
    return sglang()


def chunk_ends_mid_page(peer: Sglang) -> tuple[Event, ...]:
    """Two requests of one text: one caches 6 tokens, the other 12, the first 12 (SE-01)."""
    given = objects(peer, page_size=4)
    recorder = FlightRecorder()
    with instrument(*given, level="off", record=recorder):
        engine = Engine(given, seed=0)
        first, second = engine.admit(list(range(16))), engine.admit(list(range(16)))
        assert first is not None
        assert second is not None
        for request, stop in ((first, 6), (second, 12), (first, 12)):
            slots = engine.take(request, request.computed, stop)
            given.pool.write((request.req_pool_idx, slice(request.computed, stop)), slots)
            request.computed = stop
            engine.cache_chunk(request)
        engine.finish(second)
    return recorder.events()


@clause("VALID-2", "VALID-3", "VALID-4")
def test_a_row_that_names_a_freed_page_is_found_in_sglang(peer: Sglang) -> None:
    events = chunk_ends_mid_page(peer)
    violation = validate(events).violation
    assert violation is not None
    assert violation.clause == "CACHE-2"
    last_chunk = [event for event in events if isinstance(event, CacheUnfinishedReq)][-1]
    assert violation.event == last_chunk
    assert violation.found == (
        "row[4] is slot 8, of page 2, which is free;"
        " it was cached up to token 6 before, inside a page"
    )
    assert violation.expected == "slot 16, of page 4, which is the tree's, with 2 locks"
    history = shrink(events, violation)
    assert len(history) <= 12
    made: dict[str, Any] = {}
    exec(as_pytest(history, violation), made)
    with pytest.raises(LogViolation, match=r"^CACHE-2: "):
        made["test_history"]()
    play(events_of(made["HISTORY"]), *objects(kvspec.oracle, page_size=4))


@clause("VALID-1")
@pytest.mark.parametrize("page_size", [1, 4])
def test_sglang_is_valid_while_its_chunks_end_with_pages(peer: Sglang, page_size: int) -> None:
    for seed in range(3):
        given = objects(peer, page_size)
        events = recorded(given, seed, steps=80, mid_page=False)
        assert sum(isinstance(event, CacheFinishedReq) for event in events) > 5
        violation = validate(events).violation
        assert violation is None, violation.text


@clause("VALID-3")
def test_a_long_log_is_shrunk_to_a_few_events_that_the_fault_needs(peer: Sglang) -> None:
    given = objects(peer, page_size=4, pages=500, rows=12)
    before = recorded(given, seed=1, steps=900, mid_page=False)
    assert len(before) > 2000
    violation = validate(before).violation
    assert violation is None, violation.text
    broken = chunk_ends_mid_page(peer)
    start = before[0]
    assert isinstance(start, Start)
    made = [*before, *broken]
    renumbered = [_numbered(event, number) for number, event in enumerate(made)]
    found = validate(renumbered).violation
    assert found is not None
    assert found.clause == "CACHE-2"
    assert len(shrink(renumbered, found)) <= 12


def _numbered(event: Event, number: int) -> Event:
    event = replace(event, n=number)
    return replace(event, first=number + 1) if isinstance(event, Start) else event


@clause("VALID-3")
def test_a_history_is_shrunk_on_the_implementation_too() -> None:
    planted = next(each for each in PLANTED if "CACHE-4" in each.clauses)
    events = planted_log(planted, seed=0)
    violation = validate(events).violation
    assert violation is not None
    makings = []

    def make() -> tuple[Any, Any, Any]:
        made = objects(kvspec.oracle, planted.page_size)
        cache = planted.broken(made.pool, made.allocator, planted.page_size)
        makings.append(cache)
        return cache, made.allocator, made.pool

    history = shrink(events, violation, on=make)
    assert makings
    with pytest.raises(LogViolation, match=r"^CACHE-4: "):
        play(history, *make())


@clause("VALID-2")
def test_a_page_held_for_a_row_that_is_gone_is_found_where_somebody_looks() -> None:
    """A scheduler that drops a request, and forgets the half of it."""
    made = objects(kvspec.oracle, 4)
    with FlightRecorder() as recorder:
        looking = instrument(made.cache, made.allocator, made.pool, level="sets", record=recorder)
        (row,) = made.pool.alloc(1)
        slots = made.allocator.alloc(8)
        made.pool.write((row, slice(0, 8)), slots)
        made.pool.free(row)
        made.allocator.free(slots[:4])
        with pytest.raises(MemoryLeakError):
            looking.check()
        events = recorder.events()
    violation = validate(events).violation
    assert violation is not None
    assert (violation.clause, violation.n) == ("CHECK-1", len(events) - 1)
    assert f"page 2 is held, and row {row}" in violation.found


@clause("VALID-3")
def test_a_violation_of_another_log_is_refused() -> None:
    _, events = BREAKS["free given back"]
    violation = validate(events).violation
    assert violation is not None
    with pytest.raises(ContractError, match=r"^VALID-3: event 3 of this log does not break"):
        shrink(log(*FIRST), violation)


@clause("VALID-4")
def test_the_text_of_a_test_is_fit_to_be_pasted(tmp_path: Path) -> None:
    _, events = BREAKS["a tail kept"]
    violation = validate(events).violation
    assert violation is not None
    path = tmp_path / "test_pasted.py"
    path.write_text(as_pytest(shrink(events, violation), violation))
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore=E501"]
    rules = "--select=E,F,W,B,UP,SIM,RUF,PT,N,C4,PIE,RET"
    checked = subprocess.run([*ruff, rules, str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    long = [line for line in path.read_text().splitlines() if len(line) > 100]
    assert all(line.startswith('{"op":') for line in long)


@clause("VALID-4")
def test_the_oracle_stands_in_for_a_class_that_cannot_be_imported() -> None:
    _, events = BREAKS["free given back"]
    violation = validate(events).violation
    assert violation is not None
    start = replace(events[0], cache="engine.make.<locals>.Cache", allocator="__main__.Paged")
    made: dict[str, Any] = {}
    exec(as_pytest([start, *events[1:]], violation), made)
    cache, allocator, _ = made["make"]()
    assert type(cache) is kvspec.oracle.RadixCache
    assert type(allocator) is kvspec.oracle.PagedTokenToKVPoolAllocator


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The log of a double free."""
    path = tmp_path / "log.ndjson"
    with FlightRecorder(path) as recorder:
        for event in BREAKS["free given back"][1]:
            recorder.record(event)
    return path


@clause("VALID-7")
def test_the_command_tells_the_clause_the_event_and_the_history(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "test_it.py"
    assert main(["validate", str(written), "--pytest", str(test)]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    for told in (
        "PAGE-10: `free(slots)` must raise ContractError",
        "event     3 free(slots=[6, 7))",
        "found     page 1, which is free, was given back again",
        "expected  ContractError: it was given back before",
        "  1 alloc(need_size=4) -> slots [4, 8)",
        "  2 free(slots=[4, 8))",
        f"The test is in {test}.",
    ):
        assert told in out
    made: dict[str, Any] = {}
    exec(test.read_text(), made)
    made["test_history"]()  # the log names the oracle's classes, which never did this


@clause("VALID-5", "VALID-7")
def test_the_command_tells_where_a_log_is_broken(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written.read_bytes()
    written.write_bytes(data[: data.rindex(b"\n", 0, -1) - 20])
    assert main(["validate", str(written)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{written}: 2 events, valid up to where it is broken\n"
    assert err.startswith(f"kvspec: {written}: REC-6: record 2, at byte ")


@clause("VALID-6", "VALID-7")
def test_the_command_has_the_model_checker_follow_too(
    written: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(events: list[Event]) -> ModelVerdict:
        return ModelVerdict(3, len(events), events[3], "Give(page 1)")

    monkeypatch.setattr(command, "follow_with_tlc", follow)
    assert main(["validate", str(written), "--tlc", "--json", "-"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["model"].startswith(
        "Ownership.tla: 3 of 4 events are its actions; Give(page 1) is none: 3 free("
    )
    assert told["violation"]["clause"] == "PAGE-10"


@clause("VALID-7", "VALID-8")
@pytest.mark.parametrize("content", ["", "nothing of the kind\n"], ids=["empty", "no log"])
def test_the_command_refuses_what_is_no_log(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_text(content)
    assert main(["validate", str(path)]) == 2
    assert main(["validate", str(tmp_path / "absent")]) == 2
    assert "kvspec: " in capsys.readouterr().err


def test_a_violation_says_everything_in_one_line() -> None:
    _, events = BREAKS["free given back"]
    violation = validate(events).violation
    assert isinstance(violation, Violation)
    assert "\n" not in violation.text
    assert violation.text.startswith("PAGE-10: event 3 free(slots=[6, 7)): found page 1")
