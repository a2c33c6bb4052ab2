"""What is looked at while a trace is replayed, and what is recorded of it. Spec: REPLAY."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Self, TypeAlias, cast, get_args

from kvspec.errors import ContractError, MemoryLeakError
from kvspec.flight_recorder import FlightRecorder
from kvspec.instrumentation import Instrument, instrument
from kvspec.interfaces.instrumentation import Level
from kvspec.memory_checker import Report
from kvspec.replay.system import Leaks, System, after_request

__all__ = ["Checks", "Record", "require_checks"]

Record: TypeAlias = str | PathLike[str] | FlightRecorder
"""A new file, msgpack if it ends in `.msgpack` and else JSON lines, or a recorder."""


def require_checks(check: str, record: Record | None, tokens: bool) -> None:
    """ContractError for options that do not go together (REPLAY-16)."""
    if check not in get_args(Level):
        raise ContractError(
            f"REPLAY-16: check is {check!r}, not one of {', '.join(get_args(Level))}"
        )
    if tokens and (record is None or isinstance(record, FlightRecorder)):
        raise ContractError("REPLAY-16: tokens are recorded in a file, and record names none")


class Checks:
    """Stands around a system while it serves: `after` every request, `leaks` at the end.

    An instrument stands before its objects if there is a ledger to keep or a log to write, and
    else nothing does (REPLAY-13).
    """

    def __init__(
        self, system: System, check: Level, record: Record | None = None, tokens: bool = False
    ) -> None:
        self._system, self._level = system, check
        self._record, self._tokens = record, tokens
        self._stack = ExitStack()
        self._instrument: Instrument | None = None
        looks: dict[Level, Callable[[int], None]] = {
            "off": lambda _: None,
            "counts": system.count,
            "sets": system.check,
            "ledger": self._look_at_the_ledger,
        }
        self.after = looks[check]
        """Raises MemoryLeakError with the number of the request that was served (REPLAY-14)."""

    def __enter__(self) -> Self:
        if self._level == "ledger" or self._record is not None:
            self._instrument = self._stack.enter_context(
                instrument(
                    self._system.cache,
                    self._system.allocator,
                    self._system.rows,
                    level=self._level,
                    record=self._record,
                    tokens=self._tokens,
                )
            )
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def leaks(self) -> Leaks:
        """What nobody gave back: the tree is emptied for it. With a ledger the report says who had
        it, and where it was lost. O(pool).
        """
        if self._level == "ledger" and self._instrument is not None:
            return self._system.leaks(partial(self._instrument.check, idle=True))
        return self._system.leaks()

    def _look_at_the_ledger(self, number: int) -> None:
        """What the actions of a request did that could not be right; and the counts: of what they
        lack the ledger says who had it. O(1) while there is nothing to say.
        """
        kept = self._instrument
        assert kept is not None, "REPLAY-14: the ledger is kept inside of `with`"
        if kept.blind:
            raise RuntimeError(f"request {number}: the instrument is blind from here on")
        if kept.reports:
            text = "\n".join(map(str, kept.reports))
            raise after_request(number, MemoryLeakError(text, cast(list[Report], kept.reports)))
        try:
            self._system.count(number)
        except MemoryLeakError:
            try:
                kept.check(idle=True)
            except MemoryLeakError as error:
                raise after_request(number, error) from None
            raise
