"""The model checker follows a log in `Ownership.tla`. Spec: VALID-6.

An event becomes one or more steps, each an action of the model, in the order in which a system that
works does them: rows first name what the tree has, then the tree adopts, then pages go back.
What a log does not say follows from its keys: the tree adopts the pages of a key that are not
resident by their ids.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from kvspec.errors import ContractError
from kvspec.flight_recorder import events as log
from kvspec.flight_recorder.events import Event, Key, Runs
from kvspec.validate.tlc import TLA, Exit, tlc

__all__ = ["ModelVerdict", "follow_with_tlc"]

MAX_EVENTS = 2_000
ID_BYTES = 16
MODULES = ("Pool.tla", "Ownership.tla", "OwnershipTrace.tla", "OwnershipTrace.cfg")

_NEEDS_PAGES = frozenset(
    {*("Take", "Give", "LetGo", "Undo", "Evict", "AdoptSlots"), *("CopyBegin", "Within")}
)
"""Actions that a step without pages does not take."""


class ModelVerdict(NamedTuple):
    """How far the model could follow."""

    followed: int
    """Events that are actions of the model, from the first one on."""
    total: int
    """Events of the log."""
    refused: Event | None
    """The first that is none; None if there is none."""
    action: str
    """What it would have been: the action of the model and its arguments; empty without one."""


class Step(NamedTuple):
    """One action of `OwnershipTrace.tla`."""

    event: int
    """Its place in the log."""
    action: str
    row: int = 0
    place: int = 0
    """In a row, counted from 1; of a copy, its number."""
    pages: tuple[int, ...] = ()
    """In the numbers of the log; of SeeRows, rows."""

    def __str__(self) -> str:
        row = f"row {self.row}" if self.action in _OF_A_ROW else ""
        pages = ", ".join(
            f"{start}" if stop == start + 1 else f"{start}..{stop - 1}"
            for start, stop in _runs(self.pages)
        )
        what = "rows" if self.action == "SeeRows" else "pages"
        return f"{self.action}({', '.join(filter(None, [row, pages and f'{what} {pages}']))})"


_OF_A_ROW = frozenset({"TakeRow", "GiveRow", "LeaveRow", "Write", "Names", "AdoptRow"})


def follow_with_tlc(events: Sequence[Event]) -> ModelVerdict:
    """Turn a log into actions of the model, and have TLC take them one after the other (VALID-6).

    ContractError for a log that is no whole log (VALID-8), longer than 2,000 events, or of a pool
    with windows; ImportError where java or TLC is absent; RuntimeError if TLC is not done in time.
    O(steps × pages named in the log) in TLC, of which ten million take some ten seconds.
    """
    start = _start(events)
    follower = _Follower(start)
    for index, event in enumerate(events):
        follower.follow(index, event)
    steps = follower.steps
    depth = _depth(_trace_data(start, steps))
    if depth == len(steps):
        return ModelVerdict(len(events), len(events), None, "")
    refused = steps[depth]
    return ModelVerdict(refused.event, len(events), events[refused.event], str(refused))


def _start(events: Sequence[Event]) -> log.Start:
    start = events[0] if events else None
    if not isinstance(start, log.Start):
        raise ContractError("VALID-8: the log does not begin with start")
    if start.first > 1:
        raise ContractError(f"VALID-8: events 1 .. {start.first - 1} were dropped by a ring")
    if len(events) > MAX_EVENTS:
        raise ContractError(f"VALID-6: the log has {len(events)} events, more than {MAX_EVENTS}")
    if start.size_swa is not None:
        raise ContractError("VALID-6: the model has no window pool, and the log is of one")
    return start


# -- events to steps -------------------------------------------------------------------------------


class _Follower:
    """Knows of the log what its keys and rows mean: what is resident, and where rows point."""

    def __init__(self, start: log.Start) -> None:
        self.page_size, self.disable = start.page_size, start.disable
        self.page_count = start.size // start.page_size
        self._foreign = not start.cache.startswith("kvspec.")
        self.steps: list[Step] = []
        self._event = 0
        self._tree: dict[bytes, int] = {}
        self._rows: dict[int, list[int]] = {}
        self._taken: list[int] = []
        self._tickets: dict[int, int] = {}

    def follow(self, index: int, event: Event) -> None:
        """The steps of one event."""
        self._event = index
        if event.error:
            self._refused(event)
        elif isinstance(event, log.CacheFinishedReq):
            self._finished(event)
        elif isinstance(event, log.CacheUnfinishedReq):
            self._unfinished(event)
        elif isinstance(event, log.Insert | log.Evict | log.Reset):
            self._cached(event)
        elif isinstance(event, log.AllocRows | log.FreeRows | log.Write | log.ClearRows):
            self._of_rows(event)
        elif isinstance(event, log.CopyBegin | log.CopyEnd | log.Start | log.Observe):
            self._of_the_outside(event)
        else:
            self._allocated(event)

    def _step(
        self, action: str, pages: Iterable[int] = (), *, row: int = 0, place: int = 0
    ) -> None:
        step = Step(self._event, action, row, place, tuple(pages))
        if step.pages or action not in _NEEDS_PAGES:
            self.steps.append(step)

    # The allocator

    def _allocated(self, event: Event) -> None:
        match event:
            case log.Alloc() | log.AllocExtend() | log.AllocDecode():
                self._take(event.slots or [])
            case log.Free():
                self._step("LetGo", self._pages(event.slots))
            case log.FreeGroupBegin():
                self._step("OpenGroup")
            case log.FreeGroupEnd():
                self._step("CloseGroup")
            case log.Clear():
                self._step("Clear")
            case log.BackupState():
                self._tickets[event.ticket] = len(self._taken)
            case log.RestoreState():
                if event.ticket not in self._tickets:
                    raise ContractError(
                        f"VALID-6: event {event.n} restores what no event backed up"
                    )
                self._step("Undo", self._taken[self._tickets[event.ticket] :])

    def _take(self, slots: Runs) -> None:
        """A page is new where its first slot is given; else the allocation goes on with it."""
        size = self.page_size
        begun = [start // size for start, _ in slots if start % size]
        new = [page for start, stop in slots for page in range(-(-start // size), -(-stop // size))]
        self._step("Within", begun)
        self._step("Take", new)
        self._taken += new

    def _pages(self, slots: Runs) -> list[int]:
        """The pages of slots, once each, in order."""
        size = self.page_size
        pages = (page for a, b in slots for page in range(a // size, (b - 1) // size + 1))
        return list(dict.fromkeys(pages))

    # The request pool

    def _of_rows(self, event: log.AllocRows | log.FreeRows | log.Write | log.ClearRows) -> None:
        match event:
            case log.AllocRows():
                for row in event.rows or []:
                    self._step("TakeRow", row=row)
                    self._rows[row] = []
            case log.FreeRows():
                for row in event.rows:
                    self._step("LeaveRow", row=row)
            case log.Write():
                for written in event.places:
                    self._write(written.row, written.start, written.slots)
            case log.ClearRows():
                self._step("ClearRows")

    def _write(self, row: int, start: int, slots: Runs) -> None:
        """A page is named where its first slot is; what begins within one goes on with it."""
        named, position, size = list[tuple[int, int]](), start, self.page_size
        for first, stop in slots:
            while first < stop:
                step = min(size - position % size, size - first % size, stop - first)
                if position % size:
                    self._step("Names", [first // size], row=row, place=position // size + 1)
                else:
                    named.append((position // size, first // size))
                first, position = first + step, position + step
        for begin, pages in _stretches(named):
            self._step("Write", pages, row=row, place=begin + 1)
            self._note(row, begin, pages)

    def _note(self, row: int, begin: int, pages: Sequence[int]) -> None:
        known = self._rows.setdefault(row, [])
        known += [0] * (begin - len(known))
        known[begin : begin + len(pages)] = pages

    # The cache

    def _cached(self, event: log.Insert | log.Evict | log.Reset) -> None:
        did = event.did or log.Effects()
        self._writes(did)
        if isinstance(event, log.Insert):
            slots = [slot for start, stop in event.slots for slot in range(start, stop)]
            pages = [slot // self.page_size for slot in slots[:: self.page_size]]
            self._step("AdoptSlots", self._adopted(event.key, pages))
        self._give("Give" if isinstance(event, log.Insert) else "Evict", did)
        if isinstance(event, log.Reset):
            self._tree.clear()
            self._step("Drop" if self._foreign else "SeeTree")

    def _unfinished(self, event: log.CacheUnfinishedReq) -> None:
        did = event.did or log.Effects()
        self._writes(did)
        ids = [] if self.disable else _ids(event.key)
        if ids:
            resident = [self._tree[id] for id in ids if id in self._tree]
            adopted = self._adopted(event.key, self._rows.get(event.row, []))
            for begin, pages in _stretches(list(enumerate(resident))):
                self._step("Names", pages, row=event.row, place=begin + 1)
            self._step("AdoptRow", adopted, row=event.row, place=len(ids))
        self._give("Give", did)

    def _finished(self, event: log.CacheFinishedReq) -> None:
        did = event.did or log.Effects()
        self._writes(did)
        self._step("AdoptSlots", self._adopted(event.key, self._rows.get(event.row, [])))
        if did.rows_freed == [event.row]:
            self._give("GiveRow", did, row=event.row)
        else:
            self._undone(did)

    def _adopted(self, key: Key, pages: Sequence[int]) -> list[int]:
        """The pages that the tree has of a key from here on, of those that were brought for it.

        Where none was brought it is the sink, which no step may name.
        """
        adopted = []
        for index, id in enumerate([] if self.disable else _ids(key)):
            if id not in self._tree:
                self._tree[id] = pages[index] if index < len(pages) else 0
                adopted.append(self._tree[id])
        return adopted

    def _writes(self, did: log.Effects) -> None:
        for written in did.written:
            self._write(written.row, written.start, written.slots)

    def _give(self, action: str, did: log.Effects, *, row: int = 0) -> None:
        """What a method of the cache gave back, and again what it gave back twice."""
        freed = self._pages(did.freed)
        gone = {*freed}
        self._tree = {id: page for id, page in self._tree.items() if page not in gone}
        self._step(action, freed, row=row)
        self._step("Give", _again(did.freed, self.page_size))

    def _refused(self, event: Event) -> None:
        """What raised has changed nothing but what it did to others before."""
        did = event.did or log.Effects()
        self._writes(did)
        self._undone(did)

    def _undone(self, did: log.Effects) -> None:
        self._give("Give", did)
        for row in did.rows_freed:
            self._step("GiveRow", row=row)

    # What comes from outside

    def _of_the_outside(self, event: log.CopyBegin | log.CopyEnd | log.Start | log.Observe) -> None:
        match event:
            case log.CopyBegin():
                self._step("CopyBegin", self._pages(event.slots), place=event.n)
            case log.CopyEnd():
                self._step("CopyEnd", place=event.copy)
            case log.Start():
                if event.state is not None:
                    self._begin(event.state)
            case log.Observe():
                state = event.state
                self._step("SeeFree", _numbers(state.free))
                self._step("SeePending", _numbers(state.pending))
                self._step("SeeTree", self._tree_of(state).values())
                self._step("SeeRows", [live.row for live in state.rows])

    def _tree_of(self, state: log.State) -> dict[bytes, int]:
        return {page.id: page.slots[0][0] // self.page_size for page in state.tree}

    def _begin(self, state: log.State) -> None:
        """From empty pools to the state in which the log begins."""
        free = {*_numbers(state.free)}
        self._step("Take", (page for page in range(1, self.page_count + 1) if page not in free))
        self._tree = self._tree_of(state)
        self._step("AdoptSlots", self._tree.values())
        if state.group:
            self._step("OpenGroup")
        self._step("Give", _numbers(state.pending))
        for live in state.rows:
            self._step("TakeRow", row=live.row)
            self._write(live.row, 0, live.slots)


def _ids(key: Key) -> list[bytes]:
    return [key.ids[i : i + ID_BYTES] for i in range(0, len(key.ids), ID_BYTES)]


def _numbers(runs: Runs) -> list[int]:
    return [number for start, stop in runs for number in range(start, stop)]


def _again(runs: Runs, page_size: int) -> list[int]:
    """Pages of slots that were given back more than once."""
    overlaps = ((c, min(b, d)) for (_, b), (c, d) in pairwise(sorted(runs)) if c < b)
    return [page for a, b in overlaps for page in range(a // page_size, (b - 1) // page_size + 1)]


def _stretches(named: Sequence[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """(first index, pages) of what follows each other in index and page both."""
    begin = 0
    for end in range(1, len(named) + 1):
        index, page = named[end - 1]
        if end == len(named) or named[end] != (index + 1, page + 1):
            yield named[begin][0], [page for _, page in named[begin:end]]
            begin = end


# -- steps to a module -----------------------------------------------------------------------------


def _runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """As half-open runs, in order."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][1] == page:
            runs[-1] = runs[-1][0], page + 1
        else:
            runs.append((page, page + 1))
    return runs


def _trace_data(start: log.Start, steps: Sequence[Step]) -> str:
    """The module TraceData. Pages that no step names are left out: they stay free."""
    page_count = start.size // start.page_size
    named = {page for step in steps if step.action not in _SEEN for page in step.pages}
    for step in steps:
        if step.action == "SeeFree":
            named |= {*range(1, page_count + 1)} - {*step.pages}
    ranks = {page: rank for rank, page in enumerate(sorted(named & {*range(1, page_count + 1)}), 1)}
    lines = ",\n".join(_record(step, ranks) for step in steps)
    copies = ", ".join(str(step.place) for step in steps if step.action.startswith("Copy"))
    ends = [step.place + len(step.pages) for step in steps if step.action == "Write"]
    return (
        "---- MODULE TraceData ----\n"
        "EXTENDS Naturals\n"
        f"LogPageCount == {max(len(ranks), 1)}\n"
        f"LogRowCount == {start.rows}\n"
        f"LogRowLength == {max(ends, default=1)}\n"
        f"LogCopyNumbers == {{{copies}}}\n"
        f"Steps == <<\n{lines}\n>>\n"
        "====\n"
    )


_SEEN = frozenset({"SeeFree", "SeeRows"})


def _record(step: Step, ranks: dict[int, int]) -> str:
    if step.action == "SeeRows":
        numbers = list(step.pages)
    elif step.action == "SeeFree":
        numbers = [ranks[page] for page in step.pages if page in ranks]
    else:
        numbers = [ranks.get(page, 0) for page in step.pages]
    runs = ", ".join(f"<<{start}, {stop}>>" for start, stop in _runs(numbers))
    return (
        f'[action |-> "{step.action}", row |-> {step.row}, place |-> {step.place},'
        f" pages |-> <<{runs}>>]"
    )


def _depth(trace_data: str) -> int:
    """How many steps TLC can take. It runs in a folder of its own, beside nothing else."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for module in MODULES:
            shutil.copy(TLA / module, folder)
        (folder / "TraceData.tla").write_text(trace_data, encoding="utf-8")
        try:
            run = tlc("OwnershipTrace", "OwnershipTrace", folder, folder=folder, workers=1)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"TLC was not done after {error.timeout:.0f} s") from None
    depth = re.search(r"^The depth of the complete state graph search is (\d+)\.", run.stdout, re.M)
    if run.returncode != Exit.HOLDS or depth is None:
        said = [line for line in run.stdout.splitlines() if not line.startswith("\t")]
        raise RuntimeError("TLC could not follow the log:\n" + "\n".join(said[-20:]))
    return int(depth[1]) - 1
