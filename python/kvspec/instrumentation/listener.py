"""Actions as they come from the calls, to ledger, recorder and reports. Spec: INSTR."""

from collections.abc import Callable
from types import FrameType
from typing import Any

from kvspec.flight_recorder import events
from kvspec.instrumentation.calls import CACHE_OPS, Arguments, Options
from kvspec.instrumentation.effects import Effects
from kvspec.instrumentation.knowledge import Knowledge
from kvspec.instrumentation.scribe import Scribe, runs_of
from kvspec.instrumentation.sites import Mark, Sites
from kvspec.interfaces.memory_checker import Report
from kvspec.interfaces.ownership_ledger import Fault, OwnershipLedger
from kvspec.interfaces.slot_allocator import Slots
from kvspec.memory_checker import report_of

__all__ = ["Listener"]


class Listener:
    """What is made of calls, while there is a ledger or a recorder."""

    by_hand = frozenset({"free", "free_swa", "free_group_end", "free_rows", "write"})
    """A scheduler that drops a request gives back its slots and its row in two calls, of any order:
    between them nothing is at fault yet (LEDGER-6, LEDGER-7).
    """

    def __init__(
        self,
        effects: Effects,
        ledger: OwnershipLedger | None,
        scribe: Scribe | None,
        sites: Sites,
        reports: list[Report],
        first: int,
    ) -> None:
        self.effects, self.ledger, self._scribe, self._sites = effects, ledger, scribe, sites
        self._reports = reports
        self.action = first - 1
        """The number of the last action that has begun."""
        self._facts: dict[str, Any] = {}
        self._mark: Mark = (0, "", Listener.begin.__code__, 0)
        self.hooks, self._foreign_rows = effects.hooks, effects.foreign_rows
        self.everything = scribe is not None
        self.ended: Callable[[int], None] | None = None
        """Called with the number of each action after which nothing is half done."""

    def begin(self, op: str, args: Arguments, options: Options, frame: FrameType) -> None:
        """An action begins (INSTR-2, INSTR-3)."""
        if self._foreign_rows:
            unseen = self.effects.unseen(op, args, options)
            if unseen is not None:
                self._catch_up(*unseen, frame)
        action = self.action = self.action + 1
        self.effects.mark = self._mark = self._sites.note(action, op, frame)
        if self.ledger is not None:
            self.ledger.begin(action)
        if self._scribe is not None:
            self.effects.by_cache = op in CACHE_OPS
            self._facts = self._scribe.before(op, args, options)

    def _catch_up(self, row: int, start: int, slots: Any, frame: FrameType) -> None:
        """What was written past `write` is an action of its own, seen now."""
        arguments = ((row, slice(start, start + len(slots))), slots)
        self.begin("write", arguments, {}, frame)
        self.effects.written(row, start, slots)
        self.end("write", arguments, {}, None)

    def end(self, op: str, args: Arguments, options: Options, result: Any) -> None:
        """It has returned."""
        ledger = self.ledger
        if ledger is not None:
            faults = ledger.end(op in self.by_hand)
            if faults:
                self._report(faults, ledger)
        if self._scribe is not None:
            self._scribe.write(op, self._mark, args, options, self._facts, result)
        if self.ended is not None and op not in self.by_hand:
            self.ended(self.action)

    def failed(self, op: str, args: Arguments, options: Options, error: BaseException) -> None:
        """It has raised; what it did until then is done."""
        self.effects.give_up()
        if self.ledger is not None:
            self._report(self.ledger.end(op in self.by_hand), self.ledger)
        if self._scribe is not None:
            self._scribe.write(op, self._mark, args, options, self._facts, None, error)

    def copy_begin(self, slots: Slots, frame: FrameType) -> tuple[int, int]:
        """A copy is in flight: its number in the ledger, and that of its event."""
        self.begin("copy_begin", (), {}, frame)
        copy, ledger = -1, self.ledger
        if ledger is not None:
            copy = ledger.copy_begin("full", slots)
            self._report(ledger.end(), ledger)
        if self._scribe is not None:
            self._scribe.copied(self._mark, events.CopyBegin(slots=runs_of(slots)))
        return copy, self.action

    def copy_end(self, copy: tuple[int, int], frame: FrameType) -> None:
        """It is done."""
        number, begun = copy
        self.begin("copy_end", (), {}, frame)
        ledger = self.ledger
        if ledger is not None:
            ledger.copy_end(number)
            self._report(ledger.end(), ledger)
        if self._scribe is not None:
            self._scribe.copied(self._mark, events.CopyEnd(copy=begun))

    def _report(self, faults: list[Fault], ledger: OwnershipLedger) -> None:
        """Report the faults of an action (INSTR-9)."""
        knowledge = Knowledge(ledger, self._sites, forgotten=self.effects.forgotten)
        for fault in faults:
            self._reports.append(report_of(fault, knowledge, windows=self.effects.windowed))
