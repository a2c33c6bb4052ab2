"""What a violation is, for a person, and for a program. Spec: VALID."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from kvspec.clauses import clauses
from kvspec.flight_recorder import LogError
from kvspec.flight_recorder.events import AnyEvent, Event
from kvspec.validate.verdict import Violation
from kvspec.validate.words import operation, words

__all__ = ["as_json", "as_text", "events_of", "lines_of", "sentence"]

_decode = msgspec.json.Decoder(AnyEvent).decode


def lines_of(events: Iterable[Event]) -> str:
    """Events as NDJSON, a line each, without checksums."""
    return "".join(msgspec.json.encode(event).decode() + "\n" for event in events)


def events_of(lines: str) -> list[Event]:
    """The events of such lines; empty lines are passed over."""
    return [_decode(line) for line in lines.splitlines() if line.strip()]


def sentence(clause: str) -> str:
    """What a clause says."""
    known = clauses().get(clause)
    return known.text.replace("**", "") if known is not None else ""


def as_text(violation: Violation, history: Sequence[Event]) -> str:
    """For a person: the clause, the event, what was found, and the shortest history."""
    return "\n".join(
        [
            f"{violation.clause}: {sentence(violation.clause)}",
            "",
            f"event     {words(violation.event)}",
            f"found     {violation.found}",
            f"expected  {violation.expected}",
            "",
            f"The shortest history that breaks it, {len(history)} events:",
            *(f"  {words(event)}" for event in history),
        ]
    )


def as_json(
    count: int,
    violation: Violation | None,
    history: Sequence[Event] = (),
    broken: LogError | None = None,
    test: str = "",
) -> dict[str, Any]:
    """The same for a program, which `json.dumps` can write."""
    found: dict[str, Any] | None = None
    if violation is not None:
        found = {
            "n": violation.n,
            "clause": violation.clause,
            "says": sentence(violation.clause),
            "op": operation(violation.event),
            "event": _plain(violation.event),
            "found": violation.found,
            "expected": violation.expected,
            "text": violation.text,
            "history": [_plain(event) for event in history],
            "pytest": test,
        }
    error = None
    if broken is not None:
        error = {"position": broken.position, "record": broken.record, "reason": broken.reason}
    valid = violation is None and broken is None
    return {"events": count, "valid": valid, "violation": found, "broken": error}


def _plain(event: Event) -> Any:
    return msgspec.to_builtins(event, builtin_types=())
