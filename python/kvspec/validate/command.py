"""`kvspec validate LOG`: what it reads, says and writes. Spec: VALID."""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from kvspec.errors import ContractError
from kvspec.flight_recorder import LogError, read_log
from kvspec.flight_recorder.events import Event
from kvspec.validate.follow import validate
from kvspec.validate.model import ModelVerdict, follow_with_tlc
from kvspec.validate.pasting import as_pytest
from kvspec.validate.report import as_json, as_text
from kvspec.validate.shrink import shrink
from kvspec.validate.verdict import Violation
from kvspec.validate.words import words

__all__ = ["Judgement", "judge", "tell", "validate_log"]


class Judgement(NamedTuple):
    """What comes of a log."""

    events: int
    """How many were followed."""
    violation: Violation | None
    history: list[Event]
    """The shortest history that breaks the clause; empty for a valid log."""
    broken: LogError | None
    """Why the log could not be read to its end, if it could not."""
    model: ModelVerdict | None = None
    """How far the model checker followed it, if it was asked."""

    @property
    def code(self) -> int:
        """The exit code (VALID-7)."""
        refused = self.model is not None and self.model.refused is not None
        return 1 if self.violation is not None or refused else 2 if self.broken is not None else 0


def validate_log(
    path: str | os.PathLike[str], progress: Callable[[], object] = lambda: None
) -> Judgement:
    """Follow the log of a file as far as it can be read, and shrink what breaks a clause (VALID-5).

    Reads it again for that. ContractError for one without its beginning (VALID-8), OSError for one
    that is not there.
    """
    broken: list[LogError] = []
    events = _readable(path, broken)
    try:
        verdict = validate(events, progress)
        deque(events, maxlen=0)  # what follows a violation may be broken too
    except ContractError:
        if not broken:
            raise
        return Judgement(0, None, [], broken[0])
    violation, history = verdict.violation, list[Event]()
    if violation is not None:
        history = shrink(_readable(path, []), violation)
    return Judgement(verdict.events, violation, history, next(iter(broken), None))


def _readable(path: str | os.PathLike[str], broken: list[LogError]) -> Iterator[Event]:
    """The events of a log up to where it is broken, which is noted."""
    try:
        yield from read_log(path)
    except LogError as error:
        broken.append(error)


def judge(
    path: str | os.PathLike[str],
    *,
    tlc: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> Judgement:
    """`validate_log`, and with `tlc` what the model says of the same events (VALID-6)."""
    judgement = validate_log(path, progress)
    if not tlc or not judgement.events:
        return judgement
    return judgement._replace(model=follow_with_tlc(list(_readable(path, []))))


def tell(judgement: Judgement, path: object, json_file: str | None, test_file: Path | None) -> int:
    """Write what was found where it was asked for, and give the exit code (VALID-7)."""
    violation, broken = judgement.violation, judgement.broken
    test = as_pytest(judgement.history, violation) if violation is not None else ""
    if json_file is not None:
        facts = as_json(judgement.events, violation, judgement.history, broken, test)
        facts |= {"valid": judgement.code == 0, "model": _model(judgement.model) or None}
        text = json.dumps(facts, indent=1)
        if json_file == "-":
            print(text)
        else:
            Path(json_file).write_text(text + "\n", encoding="utf-8")
    if test and test_file is not None:
        test_file.write_text(test, encoding="utf-8")
    if json_file != "-":
        _print(judgement, path, test, test_file)
    if broken is not None:
        print(f"kvspec: {path}: {broken}", file=sys.stderr)
    return judgement.code


def _print(judgement: Judgement, path: object, test: str, test_file: Path | None) -> None:
    if judgement.model is not None:
        print(_model(judgement.model))
    if judgement.violation is None:
        how = "valid" if judgement.broken is None else "valid up to where it is broken"
        print(f"{path}: {judgement.events} events, {how}")
        return
    print(as_text(judgement.violation, judgement.history))
    print()
    print(f"The test is in {test_file}." if test_file is not None else test)


def _model(verdict: ModelVerdict | None) -> str:
    """What the model checker says."""
    if verdict is None:
        return ""
    followed = f"Ownership.tla: {verdict.followed} of {verdict.total} events are its actions"
    if verdict.refused is None:
        return followed
    return f"{followed}; {verdict.action} is none: {words(verdict.refused)}"
