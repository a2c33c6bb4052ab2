"""The decorator that says what a sequence stands for."""

from collections.abc import Callable
from typing import Any, TypeVar

from kvspec.conformance import clause as decides

__all__ = ["report"]

Sequence = TypeVar("Sequence", bound=Callable[..., None])


def report(*ids: str, clause: str) -> Callable[[Sequence], Sequence]:
    """Mark a sequence with what it stands for and the clause that decides it."""

    def mark(sequence: Any) -> Any:
        sequence.evidence, sequence.clause = ids, clause
        return decides(clause)(sequence)

    return mark
