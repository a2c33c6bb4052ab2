"""What following a log comes to. Spec: VALID."""

from typing import NamedTuple

from kvspec.flight_recorder.events import Event

__all__ = ["LogViolation", "Verdict", "Violation"]


class Violation(NamedTuple):
    """The first event that breaks a clause (VALID-2)."""

    n: int
    """Number of the event."""
    clause: str
    event: Event
    found: str
    """What came of it."""
    expected: str
    """What could have."""
    text: str
    """All of it in one line, which begins with the clause."""


class Verdict(NamedTuple):
    """What `validate` says."""

    events: int
    """How many were followed, the one that breaks a clause included."""
    violation: Violation | None
    """None: the log is valid (VALID-1)."""


class LogViolation(AssertionError):
    """A history that was played broke a clause; the text begins with its id (VALID-4)."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation.text)
        self.violation = violation
