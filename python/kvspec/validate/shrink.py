"""The shortest history that still breaks the clause. Spec: VALID.

First the events are sliced away on which the last does not depend, then chunks of what is left are
left out, down to single events, and with them what cannot be without them. Each attempt is followed
from its start, for nothing else says whether its last event still breaks the clause.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec.structs import replace

from kvspec.errors import ContractError
from kvspec.flight_recorder.events import (
    BackupState,
    CopyEnd,
    DecLockRef,
    Event,
    Observe,
    RestoreState,
    Start,
)
from kvspec.validate.follow import Follower
from kvspec.validate.play import play
from kvspec.validate.renaming import compacted, renamed
from kvspec.validate.slicing import Thing, footprints, slice_of
from kvspec.validate.verdict import LogViolation, Violation

__all__ = ["alike", "shrink"]

_NUMBERS = re.compile(r"\d+")
_REFUSALS = frozenset({"PAGE-4", "SLOT-3", "SWA-4", "REQ-3"})
"""Where an allocation was refused or granted against what is left."""
_REPAIRS = 50
"""How often a slice is mended, before the whole history is taken."""
_SETTLED = 60
"""Up to this length, what cannot be without an event goes with it: that costs its square."""


def shrink(
    events: Iterable[Event],
    violation: Violation,
    on: Callable[[], tuple[Any, Any, Any]] | None = None,
) -> list[Event]:
    """The events, numbered anew, of a history of which the last breaks the same clause in the same
    way, and none before it any, and from which no event but `start` can be left out (VALID-3).

    With `on`, which makes the cache, allocator and pool anew, it also has to break the clause when
    it is played on them; where not even the whole history does, that is not asked.

    Seconds for a log of 10,000 events; ContractError if this is no violation of this log.
    """
    history = _until(events, violation)
    if not _Fault(violation, None).is_in(history):
        raise ContractError(f"VALID-3: event {violation.n} of this log does not break the clause")
    slice_ = _sliced(history, violation)
    if slice_ is not None:
        part, fault = slice_[0], _Fault(slice_[1], on)
        small = compacted(_reduced(part, fault), history[0]) if fault.is_in(part) else None
        if small is not None and fault.is_in(small):
            return renumbered(small)
    whole = _Fault(violation, on)
    return renumbered(_reduced(history, whole if whole.is_in(history) else _Fault(violation, None)))


class _Fault:
    """What a history has to come to."""

    def __init__(self, violation: Violation, on: Callable[[], tuple[Any, Any, Any]] | None) -> None:
        self._violation, self._on = violation, on

    def is_in(self, history: Sequence[Event]) -> bool:
        """Whether its last event breaks the clause, and none before it one."""
        index, found = first_break(history)
        return index == len(history) - 1 and self.is_this(found, history)

    def is_this(self, found: Violation | None, history: Sequence[Event]) -> bool:
        """Whether what the last event breaks is it."""
        if found is None or not alike(found, self._violation):
            return False
        if self._on is None:
            return True
        try:
            play(history, *self._on())
        except LogViolation as again:
            return again.violation.clause == self._violation.clause
        return False


def _until(events: Iterable[Event], violation: Violation) -> list[Event]:
    """From the last `start` before an event up to it."""
    history: list[Event] = []
    for event in events:
        if isinstance(event, Start):
            history = []
        history.append(event)
        if event.n == violation.n:
            break
    return history


def first_break(history: Sequence[Event]) -> tuple[int, Violation | None]:
    """The index of the first event that breaks a clause, and how."""
    follower = Follower(history[0])
    for index, event in enumerate(history[1:], 1):
        found = follower.follow(event)
        if found is not None:
            return index, found
    return len(history), None


def alike(found: Violation, violation: Violation) -> bool:
    """Whether it is the same fault, whatever numbers the pages and rows have.

    In a state that is looked at, and where an allocation was refused or should have been, the
    numbers are the fault.
    """
    both = (found.clause, found.found, found.expected)
    wanted = (violation.clause, violation.found, violation.expected)
    return both == wanted if _counts(violation) else _shape(both) == _shape(wanted)


def _shape(texts: Iterable[str]) -> list[str]:
    return [_NUMBERS.sub("#", text) for text in texts]


def _counts(violation: Violation) -> bool:
    return isinstance(violation.event, Observe) or violation.clause in _REFUSALS


def _sliced(history: Sequence[Event], violation: Violation) -> tuple[list[Event], Violation] | None:
    """What the last event depends on, and how that breaks the clause; None if it does not.

    Where an event of the slice cannot be what it was, what it depends on is taken in too, such as
    what gave back a page that a kept event hands out again where no other page is left for it; and
    if that is all there, it is left out.
    """
    start = history[0]
    assert isinstance(start, Start)
    prints = footprints(history, start.page_size)
    last = len(history) - 1
    needed = prints[last].touched
    if _counts(violation):
        blamed = {("page", int(number)) for number in _NUMBERS.findall(violation.found)}
        needed = _alive(history) | blamed
    kept, banned = slice_of(prints, last, needed), set[int]()
    for _ in range(_REPAIRS):
        indices = [0, *sorted(kept - banned), last]
        plain = [history[index] for index in indices]
        slice_ = (None if _counts(violation) else renamed(plain)) or plain
        index, found = first_break(slice_)
        if index >= len(slice_) - 1:
            same = found is not None and alike(found, violation)
            return (slice_, found) if found is not None and same else None
        more = slice_of(prints, indices[index], prints[indices[index]].touched) - kept
        kept |= more
        if not more:
            banned.add(indices[index])
    return None


def _alive(history: Sequence[Event]) -> frozenset[Thing]:
    """Everything that somebody has before the last event."""
    follower = Follower(history[0])
    for event in history[1:-1]:
        follower.follow(event)
    books = follower.books
    pages, rows = books.allocator.held, books.pool.live_rows()
    group = [("group", 0)] if books.allocator.group else []
    kinds = [("page", page) for page in pages], [("locks", page) for page in pages]
    return frozenset([*kinds[0], *kinds[1], *(("row", row) for row in rows), *group])


def _reduced(history: Sequence[Event], fault: _Fault) -> list[Event]:
    """Leave out chunks, from the end, until not even one of the events can be left out."""
    kept, size = list(history), len(history)
    while True:
        removed = False
        stop = len(kept) - 1
        while stop > 1:
            start = max(stop - size, 1)
            left = _settled([*kept[:start], *kept[stop:]], fault)
            if left is not None:
                kept, removed = left, True
            stop = min(start, len(kept) - 1)
        if size == 1 and not removed:
            return kept
        size = max(size // 2, 1)


def _settled(history: list[Event], fault: _Fault) -> list[Event] | None:
    """What is left when those events go too that break a clause in what is left; None if the last
    does not break its own then.
    """
    follower = Follower(history[0])
    middle = [event for event in history[1:-1] if follower.follow(event) is None]
    settled = [history[0], *middle, history[-1]]
    index, found = first_break(settled)
    if index == len(settled) - 1:
        return settled if fault.is_this(found, settled) else None
    # An event that broke a clause has left its marks before that was seen: one by one, then.
    while 1 < len(history) <= _SETTLED:
        index, found = first_break(history)
        if index >= len(history) - 1:
            return history if fault.is_this(found, history) else None
        del history[index]
    return None


def renumbered(history: Iterable[Event]) -> list[Event]:
    """The events from 0 on, and what they say of each other's numbers with them."""
    events = list(history)
    numbers = {event.n: number for number, event in enumerate(events)}
    return [_renumbered(event, numbers) for event in events]


def _renumbered(event: Event, numbers: dict[int, int]) -> Event:
    event = replace(event, n=numbers[event.n])
    if isinstance(event, Start):
        return replace(event, first=1)
    if isinstance(event, DecLockRef):
        return replace(event, lock=numbers.get(event.lock, -1))
    if isinstance(event, BackupState | RestoreState):
        return replace(event, ticket=numbers.get(event.ticket, -1))
    if isinstance(event, CopyEnd):
        return replace(event, copy=numbers.get(event.copy, -1))
    return event
