"""An instrument: what it looks at, what it reads, and what it says. Spec: INSTR."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self, cast, get_args

import kvspec
from kvspec.errors import ContractError
from kvspec.flight_recorder import FlightRecorder, events
from kvspec.instrumentation.calls import Calls, Objects, refuse_unfit
from kvspec.instrumentation.effects import Effects
from kvspec.instrumentation.fills import Fills, PoisonLike
from kvspec.instrumentation.knowledge import BEFORE, Knowledge
from kvspec.instrumentation.listener import Listener
from kvspec.instrumentation.reading import (
    claims_of,
    given_claims,
    open_paths,
    own_length,
    page_counts,
    seed,
)
from kvspec.instrumentation.scribe import Scribe
from kvspec.instrumentation.sites import Sites
from kvspec.instrumentation.start import start_event, state_of
from kvspec.instrumentation.views import RowView, system_view
from kvspec.interfaces import memory_checker as interface
from kvspec.interfaces.instrumentation import Level
from kvspec.interfaces.memory_checker import SystemView
from kvspec.interfaces.ownership_ledger import Owner, OwnershipLedger
from kvspec.interfaces.prefix_cache import Req
from kvspec.interfaces.slot_allocator import Slots
from kvspec.memory_checker import Report, check_memory, find_faults, raise_faults
from kvspec.memory_checker.counts import written_length

__all__ = ["Instrument"]

_ACTIONS = 65_536
"""How many actions' call sites are kept."""
_STEPS = 1 << 18
"""How many steps of pages are kept."""
_BEFORE_PAGE_0 = {"host": 1}


class Instrument:
    """Looks over the shoulder of three objects, and of a next tier (INSTR-1 to INSTR-10).

    Not for several threads at once. `kvspec.instrument` makes one.
    """

    def __init__(
        self,
        objects: Objects,
        level: Level,
        recorder: FlightRecorder | None,
        poison: PoisonLike | None,
        every: int,
        *,
        own_recorder: bool = False,
    ) -> None:
        """The objects are fit for it. O(1) at level `off` without a recorder (INSTR-10)."""
        self._objects, self._poison, self._every = objects, poison, every
        self._level: Level = level
        self._recorder, self._own_recorder = recorder, own_recorder
        self.reports: list[interface.Report] = []
        """What actions did that could not be right, the oldest first (INSTR-9)."""
        self._fills: Fills | None = None
        self._calls: Calls | None = None
        self._listener: Listener | None = None
        self._next_action = 1
        self._looked = 0
        """The last action after which everything was read."""
        self.ledger: OwnershipLedger | None = None
        """None below level `ledger`."""
        self._told = 0
        """How many of the reports a check has raised."""
        self._detached = False
        self.blind = False
        """Whether an error inside kvspec ended the recording (INSTR-8)."""
        self._sites = Sites((given for _, given in objects.places()), _ACTIONS)
        view = None
        if recorder is not None:
            view, _ = self._read({})
            recorder.record(start_event(objects, view))
        self._attach(view)

    # ------------------------------------------------------------------------------- attachment

    @property
    def level(self) -> Level:
        """What `check` does; may be set between actions (INSTR-6)."""
        return self._level

    @level.setter
    def level(self, level: Level) -> None:
        require_level(level)
        if self._calls is not None and self._calls.inside:
            raise ContractError("INSTR-6: the level is set from inside a call")
        if self.blind or level == self._level:
            return
        before, self._level = self._level, level
        if "ledger" in (before, level):
            self._remove()
            self._attach(None)

    def _attach(self, view: SystemView | None) -> None:
        """Stand before the methods, if there is anybody to tell (INSTR-6, INSTR-10)."""
        if self._level != "ledger" and self._recorder is None and self._poison is None:
            return
        refuse_unfit(self._objects)
        view = view or self._read({})[0]
        ledger = self.ledger = self._new_ledger(view) if self._level == "ledger" else None
        self._fills = self._new_fills(view, ledger)
        effects = Effects(self._objects, ledger, self._fills)
        effects.lengths.update((row, len(slots)) for row, slots in view.rows.rows.items())
        if effects.shares:
            effects.locks.begin(open_paths(self._objects.cache, view))
        scribe = None
        if self._recorder is not None:
            scribe = effects.did = Scribe(self._objects, self._recorder, effects.lengths)
            self._next_action = self._recorder.recorded
        self._listener = Listener(
            effects, ledger, scribe, self._sites, self.reports, self._next_action
        )
        if self._every:
            self._listener.ended = self._look
        self._calls = Calls(self._objects, self._listener, self, self._blinded)

    def _new_ledger(self, view: SystemView) -> OwnershipLedger:
        """A ledger of what is there; the core's where there is one."""
        library: Any = kvspec if kvspec.has_native() else kvspec.oracle
        ledger: OwnershipLedger = library.OwnershipLedger(
            view.page_size, page_counts(view), max(view.row_count, 1), _STEPS
        )
        seed(ledger, view)
        return ledger

    def _new_fills(self, view: SystemView, ledger: OwnershipLedger | None) -> Fills | None:
        if self._poison is None:
            return None
        size = int(self._objects.allocator.size)
        fills = Fills(self._poison, view.page_size, size, ledger)
        fills.begin(view)
        return fills

    def _remove(self) -> None:
        if self._calls is not None:
            self._calls.remove()
        if self._listener is not None:
            self._next_action = self._listener.action + 1
        self._calls = self._listener = self.ledger = None

    def _blinded(self, error: Exception) -> None:
        """What was known stays known; nothing new is."""
        self.blind = True

    def __repr__(self) -> str:
        state = "detached" if self._detached else f"at {self._level}"
        return f"<Instrument {state}, {len(self.reports)} reports{', blind' * self.blind}>"

    def detach(self) -> None:
        """Leave the objects as they were before (INSTR-4)."""
        self._remove()
        self._level, self._detached = "off", True
        if self._own_recorder and self._recorder is not None:
            self._recorder.close()
        self._recorder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.detach()

    # ----------------------------------------------------------------------------- what is known

    @property
    def recorder(self) -> FlightRecorder | None:
        """Where events go."""
        return self._recorder

    def owner(self, page: int, pool: str = "full") -> Owner:
        """Who has a page (LEDGER-1). O(1)."""
        return self._kept().owner(pool, page + _BEFORE_PAGE_0.get(pool, 0))

    def history(self, page: int, pool: str = "full") -> list[str]:
        """What became of a page, the newest first, a line each (LEDGER-13)."""
        steps = self._knowledge(self._kept()).history(pool, page)
        return [
            f"{'start' if step.action == BEFORE else step.action}  {step.name}"
            f"{'  ' * bool(step.site)}{step.site}  -> {step.owner}"
            for step in steps
        ]

    def _kept(self) -> OwnershipLedger:
        if self.ledger is None:
            raise ContractError(f"INSTR-6: there is no ledger at level {self._level}")
        return self.ledger

    def _knowledge(self, ledger: OwnershipLedger, row_views: Iterable[RowView] = ()) -> Knowledge:
        forgotten = self._listener.effects.forgotten if self._listener is not None else BEFORE
        return Knowledge(ledger, self._sites, forgotten=forgotten, row_views=row_views)

    @contextmanager
    def copying(self, slots: Slots) -> Iterator[None]:
        """Inside, a copy from or to these slots is in flight (LEDGER-9)."""
        listener = self._listener
        if listener is None or self.blind:
            yield
            return
        frame = sys._getframe(2)
        copy = listener.copy_begin(slots, frame)
        try:
            yield
        finally:
            if listener is self._listener and not self.blind:
                listener.copy_end(copy, frame)

    # ---------------------------------------------------------------------------------- checking

    def check(
        self, reqs: Iterable[Req] = (), reserved: Iterable[int] = (), *, idle: bool = False
    ) -> None:
        """Raise MemoryLeakError unless every page and row has one owner (CHECK-13, CHECK-21).

        At `ledger` the requests and what is reserved are known and need not be given; with `idle`
        there must be none (CHECK-23). What actions did since the last check is raised with it. A
        recorder is told what was seen, as `observe`.
        """
        if self._detached:
            raise ContractError("INSTR-4: the instrument is detached, and sees nothing")
        if self._level == "off":
            return
        cache, allocator, pool, _ = self._objects
        if self._level == "counts":
            check_memory(allocator, pool, cache, reqs, reserved, level="counts")
            return
        found = self._faults(tuple(reqs), tuple(reserved), idle=idle, observed=True)
        since = cast(list[Report], self.reports[self._told :])
        self._told = len(self.reports)
        told = {(report.kind, report.pool, report.page) for report in found}
        news = [each for each in since if (each.kind, each.pool, each.page) not in told]
        raise_faults([*news, *found])

    def _faults(
        self,
        reqs: tuple[Req, ...],
        reserved: tuple[int, ...],
        *,
        idle: bool,
        observed: bool = False,
    ) -> list[Report]:
        listener, ledger = self._listener, self.ledger
        lengths = dict(listener.effects.lengths) if listener is not None else {}
        lengths |= {
            req.req_pool_idx: written_length(req) for req in reqs if req.req_pool_idx is not None
        }
        view, row_views = self._read(lengths)
        if observed and self._recorder is not None and not self.blind:
            self._recorder.record(events.Observe(state=state_of(view)))
            if listener is not None:
                listener.action += 1  # which is the number of the event
        if ledger is None or listener is None:
            claims = given_claims(self._objects.cache, view, reqs, reserved)
            return find_faults(view, claims, idle=idle)
        knowledge = self._knowledge(ledger, row_views)
        if self.blind:
            claims = given_claims(self._objects.cache, view, reqs, reserved)
        else:
            claims = claims_of(listener.effects, ledger.view(), view, reqs, reserved)
        found = find_faults(view, claims, knowledge, idle=idle)
        return found if self._fills is None else found + self._fills.faults(view, knowledge)

    def _look(self, action: int) -> None:
        """After `every` actions: what is found and not told yet goes to the reports."""
        if action - self._looked < self._every:
            return
        self._looked = action
        for report in self._faults((), (), idle=False):
            told = report.kind, report.pool, report.page
            if told not in {(known.kind, known.pool, known.page) for known in self.reports}:
                self.reports.append(report)

    def _read(self, lengths: dict[int, int]) -> tuple[SystemView, tuple[RowView, ...]]:
        cache, allocator, pool, host = self._objects
        view, row_views = system_view(cache, allocator, pool, host, lengths)
        if hasattr(pool, "view"):
            return view, row_views
        rows = {
            row: slots if row in lengths else slots[: own_length(view, slots)]
            for row, slots in view.rows.rows.items()
        }
        return view._replace(rows=view.rows._replace(rows=rows)), row_views


def require_level(level: str) -> None:
    """Refuse what is no level."""
    if level not in get_args(Level):
        raise ContractError(f"INSTR-6: level is {level!r}, not one of {', '.join(get_args(Level))}")
