"""Conformance of following a log. Spec: VALID.

engine     what drives a cache, an allocator and a pool
crafted    logs written by hand, valid and broken
faults     broken classes, whose logs are recorded
"""

import contextlib
import inspect
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

import kvspec.oracle
import kvspec.validate
from kvspec.conformance import clause
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.validate import faults
from kvspec.conformance.validate.crafted import BREAKS, FIRST, VALID, log, start
from kvspec.conformance.validate.engine import Engine, objects
from kvspec.conformance.watch import watch_function
from kvspec.errors import ContractError
from kvspec.flight_recorder import FlightRecorder
from kvspec.flight_recorder.events import Event, Start
from kvspec.instrumentation import instrument
from kvspec.validate import LogViolation, Violation, command, model
from kvspec.validate.play import look
from kvspec.validate.shrink import alike
from kvspec.validate.tlc import java

__all__ = ["PLANTED", "Planted", "ValidateConformance", "planted_log", "recorded"]


class Planted(NamedTuple):
    """A broken class, and the clauses that its log breaks."""

    broken: type
    page_size: int
    clauses: tuple[str, ...]
    careless: bool = False
    every: int = 0
    """Steps of the engine from one look at the state to the next."""


PLANTED = [
    Planted(faults.AcceptsWhatIsFree, 4, ("PAGE-10",), careless=True),
    Planted(faults.AcceptsWhatIsFreeSlots, 1, ("SLOT-5",), careless=True),
    Planted(faults.HandsOutTwiceSlots, 1, ("SLOT-2",)),
    Planted(faults.ForgetsATail, 4, ("CACHE-4",)),
    Planted(faults.CopiesNoDuplicate, 4, ("CACHE-3",)),
    Planted(faults.KeepsTheRow, 4, ("CACHE-2",)),
    Planted(faults.MatchesTooLittle, 4, ("RADIX-1",)),
    Planted(faults.EvictsLocked, 4, ("RADIX-11",)),
]
LOST = Planted(faults.LosesAPage, 4, ("CHECK-1",), every=1)
"""What no call shows, but the state does."""


def recorded(
    given: Any, seed: int, steps: int, every: int = 0, **options: Any
) -> tuple[Event, ...]:
    """What an engine did to three objects, up to where they raised; their state `every` so often
    in between.
    """
    recorder = FlightRecorder()
    broken = contextlib.suppress(ContractError, KeyError)
    with instrument(*given, level="off", record=recorder), broken:
        engine = Engine(given, seed, **options)
        for step in range(steps):
            engine.step()
            if every and step % every == 0:
                recorder.record(look(*given))
        engine.run(0)
        if every:
            recorder.record(look(*given))
    return recorder.events()


def planted_log(planted: Planted, seed: int, steps: int = 120) -> tuple[Event, ...]:
    """The log of a broken class among those of the oracle."""
    names = {name: getattr(kvspec.oracle, name) for name in kvspec.oracle.__all__}
    base = next(each.__name__ for each in planted.broken.__mro__[1:] if each.__name__ in names)
    impl = SimpleNamespace(**{**names, base: planted.broken})
    given = objects(impl, planted.page_size)
    return recorded(given, seed, steps, planted.every, careless=planted.careless)


@cache
def first_violation(planted: Planted) -> tuple[tuple[Event, ...], Violation]:
    """The log of the first seed that comes to what was planted, and where."""
    for seed in range(20):
        events = planted_log(planted, seed)
        violation = kvspec.validate.validate(events).violation
        if violation is not None:
            return events, violation
    raise AssertionError(f"no log of {planted.broken.__name__} breaks anything")


@cache
def shortest(planted: Planted) -> list[Event]:
    """That log, shrunk."""
    return kvspec.validate.shrink(*first_violation(planted))


_logs: dict[tuple[str, int, str], tuple[Event, ...]] = {}
"""Of the oracle and of the core, by what they were made with."""


@contextlib.contextmanager
def _written(events: Sequence[Event], cut: int = 0) -> Iterator[Path]:
    """A file with a log, without its last bytes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "log.ndjson"
        with FlightRecorder(path) as recorder:
            for event in events:
                recorder.record(event)
        if cut:
            path.write_bytes(path.read_bytes()[:-cut])
        yield path


class ValidateConformance(Conformance):
    """`impl` may also hold functions of the room, which then stand in for those of kvspec."""

    def function(self, name: str, room: ModuleType = kvspec.validate) -> Callable[..., Any]:
        """A function of the room, watched."""
        given = getattr(self.impl, name, None)
        function = given if inspect.isfunction(given) else getattr(room, name)
        return watch_function(self.impl_name, function, "validate")

    def log_of(self, page_size: int, options: dict[str, Any]) -> tuple[Event, ...]:
        """What an engine does to the implementation; a mutant of this room has the oracle's."""
        made = page_size, repr(options)
        name = "oracle" if self.impl_name == MUTANT else self.impl_name
        if (name, *made) not in _logs:
            given = objects(self.impl, page_size, **options)
            _logs[name, *made] = recorded(given, seed=3, steps=60, every=6)
        return _logs[name, *made]

    def violation(self, events: Sequence[Event]) -> Violation | None:
        found: Violation | None = self.function("validate")(events).violation
        return found

    @clause("VALID-1")
    @pytest.mark.parametrize("page_size", [1, 4])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"need_sort": True, "eviction_granularity": "node", "eviction_policy": "mru"},
            {"disable": True},
            {"cache": "ChunkCache"},
            {"cache": "SWARadixCache", "window": 5},
            {"cache": "SWAChunkCache", "window": 5},
        ],
        ids=["radix", "nodes", "disabled", "chunk", "windows", "window-chunks"],
    )
    def test_what_an_implementation_did_is_valid(
        self, page_size: int, options: dict[str, Any]
    ) -> None:
        events = self.log_of(page_size, options)
        assert len(events) > 120
        verdict = self.function("validate")(events)
        assert verdict.violation is None, verdict.violation.text
        assert verdict.events == len(events)

    @clause("VALID-1")
    def test_a_log_may_begin_in_the_middle_of_it_all(self) -> None:
        given = objects(self.impl, 4)
        engine = Engine(given, seed=5)
        for _ in range(25):
            engine.step()
        recorder = FlightRecorder()
        with instrument(*given, level="off", record=recorder):
            engine.run(40)
        first, *_ = recorder.events()
        assert isinstance(first, Start)
        assert first.state is not None
        assert first.state.tree
        assert self.violation(recorder.events()) is None

    @clause("VALID-1")
    @pytest.mark.parametrize("chosen", VALID)
    def test_a_choice_is_not_judged(self, chosen: str) -> None:
        violation = self.violation(VALID[chosen])
        assert violation is None, violation.text

    @clause("VALID-2")
    @pytest.mark.parametrize("wrong", BREAKS)
    def test_the_first_event_that_breaks_a_clause_is_named(self, wrong: str) -> None:
        broken, events = BREAKS[wrong]
        verdict = self.function("validate")(events)
        assert verdict.violation is not None
        assert verdict.violation.clause == broken, verdict.violation.text
        assert verdict.violation.event == events[-1]
        assert verdict.violation.n == events[-1].n == verdict.events - 1
        assert verdict.violation.found
        assert verdict.violation.expected
        assert verdict.violation.text.startswith(f"{broken}: event {events[-1].n} ")

    @clause("VALID-2")
    @pytest.mark.parametrize(
        "planted", [*PLANTED, LOST], ids=lambda planted: planted.broken.__name__
    )
    def test_what_was_planted_is_found(self, planted: Planted) -> None:
        events, expected = first_violation(planted)
        violation = self.violation([*events, *log()[1:]])
        assert violation is not None
        assert violation == expected
        assert violation.clause in planted.clauses

    @clause("VALID-3")
    @pytest.mark.parametrize("planted", PLANTED[::3], ids=lambda planted: planted.broken.__name__)
    def test_the_shortest_history_breaks_it_and_needs_every_event(self, planted: Planted) -> None:
        events, violation = first_violation(planted)
        history = self.function("shrink")(events, violation)
        assert [event.n for event in history] == list(range(len(history)))
        assert len(history) <= 24
        last = kvspec.validate.validate(history).violation
        assert last is not None
        assert last.n == history[-1].n
        assert alike(last, violation)
        for left_out in range(1, len(history) - 1):
            fewer = history[:left_out] + history[left_out + 1 :]
            found = kvspec.validate.validate(fewer).violation
            assert found is None or found.n != history[-1].n or not alike(found, violation)

    @clause("VALID-3")
    def test_what_does_not_matter_is_left_out(self) -> None:
        _, events = BREAKS["free given back"]
        more = [*log(*FIRST), *events[1:]]
        history = [replace(event, n=number) for number, event in enumerate(more)]
        history[-3] = replace(history[-3], slots=[(4, 8)])
        violation = kvspec.validate.validate(history).violation
        assert violation is not None
        assert self.function("shrink")(history, violation) == events

    @clause("VALID-4")
    @pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.broken.__name__)
    def test_the_test_fails_where_it_was_recorded_and_passes_on_the_oracle(
        self, planted: Planted
    ) -> None:
        _, violation = first_violation(planted)
        history = shortest(planted)
        text = self.function("as_pytest")(history, violation)
        assert violation.clause in text
        made: dict[str, Any] = {}
        exec(compile(text, "pasted", "exec"), made)
        with pytest.raises(LogViolation, match=f"^{violation.clause}: "):
            made["test_history"]()
        kvspec.validate.play(
            kvspec.validate.events_of(made["HISTORY"]),
            *objects(kvspec.oracle, planted.page_size),
        )

    @clause("VALID-5")
    @pytest.mark.parametrize("cut", [1, 30])
    def test_a_log_that_was_cut_is_judged_as_far_as_it_goes(self, cut: int) -> None:
        with _written(log(*FIRST), cut) as path:
            judgement = self.function("validate_log")(path)
            size = path.stat().st_size
        assert judgement.events == len(FIRST)
        assert judgement.violation is None
        assert judgement.broken is not None
        assert judgement.broken.record == len(FIRST)
        assert 0 < judgement.broken.position < size
        assert "truncated" in judgement.broken.reason

    @clause("VALID-5")
    def test_what_is_wrong_before_the_cut_is_found(self) -> None:
        _, events = BREAKS["free given back"]
        with _written([*events, *log(*FIRST)[1:]], cut=1) as path:
            judgement = self.function("validate_log")(path)
        assert judgement.broken is not None
        assert judgement.violation is not None
        assert judgement.violation.clause == "PAGE-10"

    @clause("VALID-6")
    def test_the_model_follows_what_is_valid_and_names_what_is_not(self) -> None:
        if self.impl_name == MUTANT and not hasattr(self.impl, "follow_with_tlc"):
            return  # it takes seconds, and is the same for mutants of anything else
        try:
            java()
        except ImportError as absent:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(absent))
        _, events = BREAKS["free given back"]
        verdict = self.function("follow_with_tlc", model)(events)
        assert verdict.total == len(events)
        assert verdict.refused == events[-1]

    @clause("VALID-7")
    @pytest.mark.parametrize(
        ("events", "cut", "code"),
        [
            (log(*FIRST), 0, 0),
            (BREAKS["free given back"][1], 0, 1),
            (log(*FIRST), 1, 2),
            (BREAKS["free given back"][1] + log(*FIRST)[1:], 1, 1),
        ],
        ids=["valid", "violation", "truncated", "both"],
    )
    def test_the_exit_code_and_the_json_say_the_same(
        self, events: Sequence[Event], cut: int, code: int
    ) -> None:
        with _written(events, cut) as path:
            judgement = self.function("validate_log")(path)
            told, errors = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(errors):
                exit_code = self.function("tell", command)(judgement, path, "-", None)
        assert exit_code == code
        facts = json.loads(told.getvalue())
        assert (facts["violation"] is not None) == (code == 1)
        assert facts["valid"] == (code == 0)
        assert (facts["broken"] is not None) == bool(cut) == ("REC-6" in errors.getvalue())
        if code == 1:
            assert facts["violation"]["clause"] == "PAGE-10"
            assert len(facts["violation"]["history"]) == len(judgement.history)
            assert "def test_history" in facts["violation"]["pytest"]

    @clause("VALID-8")
    @pytest.mark.parametrize(
        ("events", "reason"),
        [
            ([], "the log is empty"),
            (list(FIRST), "the log begins with 0 alloc_rows"),
            ([start(first=7), *FIRST], "a ring dropped the events 1 .. 6"),
        ],
        ids=["empty", "no-start", "dropped"],
    )
    def test_a_log_without_its_beginning_is_refused(
        self, events: Sequence[Event], reason: str
    ) -> None:
        with pytest.raises(ContractError, match=f"^VALID-8: .*{reason}"):
            self.function("validate")(events)
