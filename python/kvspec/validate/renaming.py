"""Other pages and rows for those that a history uses again.

A page that was given back and handed out again is, to what depends on it, another page. With a name
of its own, what became of it before can be left out.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import fields, replace

from kvspec.flight_recorder.events import (
    Alloc,
    AllocDecode,
    AllocExtend,
    AllocRows,
    Event,
    Start,
)
from kvspec.validate.runs import numbers_of, pages_of, runs_of

__all__ = ["compacted", "renamed"]

S = TypeVar("S", bound=Struct)

_SLOTS = frozenset({"slots", "swa_slots", "source", "target", "after", "freed", "swa_freed"})
_PARTS = frozenset({"places", "written"})
_ROWS = frozenset({"rows", "rows_freed"})


def renamed(history: Sequence[Event]) -> list[Event] | None:
    """The history with a page of its own for each time that one is handed out, and so for rows, in
    pools that are larger where they have to be; None where `start` has a state.

    The last event names what those before it left. O(slots named).
    """
    start = history[0]
    if not isinstance(start, Start) or start.state is not None:
        return None
    size = start.page_size
    renaming = _Renaming(size, _Names(start.size // size + 1), _Names(start.rows))
    middle = [renaming.event(event) for event in history[1:-1]]
    last = renaming.apply(history[-1])
    pages, rows = renaming.stops
    return [replace(start, size=max(start.size, (pages - 1) * size), rows=rows), *middle, last]


def compacted(history: Sequence[Event], start: Event) -> list[Event] | None:
    """A history that was renamed, in the pools that `start` has; None if they are too small."""
    if not isinstance(start, Start):
        return None
    size = start.page_size
    pages, rows = _everything(history, size)
    there = range(1, start.size // size + 1), range(start.rows)
    names = [_fitted(used, pool) for used, pool in zip((pages, rows), there, strict=True)]
    if None in names:
        return None
    page_names, row_names = names[0] or {}, names[1] or {}

    def slot(found: int) -> int:
        page, offset = divmod(found, size)
        return page_names.get(page, page) * size + offset

    def row(found: int) -> int:
        return row_names.get(found, found)

    return [start, *(_mapped(event, slot, row) for event in history[1:])]


def _fitted(used: set[int], pool: range) -> dict[int, int] | None:
    """Names of the pool for those that are beyond it; None if it has too few."""
    beyond = sorted(name for name in used if name >= pool.stop)
    spare = [name for name in pool if name not in used]
    return dict(zip(beyond, spare, strict=False)) if len(beyond) <= len(spare) else None


def _everything(history: Iterable[Event], page_size: int) -> tuple[set[int], set[int]]:
    """All pages and rows that a history names."""
    pages, rows = set[int](), set[int]()

    def slot(found: int) -> int:
        pages.add(found // page_size)
        return found

    def row(found: int) -> int:
        rows.add(found)
        return found

    for event in history:
        _mapped(event, slot, row)
    return pages, rows


class _Names:
    """What each page, or row, is called at this point of the history."""

    def __init__(self, stop: int) -> None:
        self._now: dict[int, int] = {}
        self.stop = stop
        """The first name that has not been given."""

    def now(self, name: int) -> int:
        """What it is called."""
        return self._now.get(name, name)

    def again(self, name: int) -> None:
        """It is handed out: by its own name once, by a new one from then on."""
        if name in self._now:
            self._now[name] = self.stop
            self.stop += 1
        else:
            self._now[name] = name


class _Renaming:
    """Goes through a history."""

    def __init__(self, page_size: int, pages: _Names, rows: _Names) -> None:
        self._size, self._pages, self._rows = page_size, pages, rows

    @property
    def stops(self) -> tuple[int, int]:
        """The first page and the first row that have no name."""
        return self._pages.stop, self._rows.stop

    def event(self, event: Event) -> Event:
        """The next event, after which what it hands out has a new name."""
        if isinstance(event, Alloc | AllocExtend | AllocDecode):
            continued = set(event.last_loc) if not isinstance(event, Alloc) else set()
            before = {slot // self._size for slot in continued}
            for page in pages_of(event.slots, self._size):
                if page not in before:
                    self._pages.again(page)
        if isinstance(event, AllocRows):
            for row in event.rows or ():
                self._rows.again(row)
        return self.apply(event)

    def apply(self, event: Event) -> Event:
        """An event with the names of this point."""
        return _mapped(event, self._slot, self._rows.now)

    def _slot(self, slot: int) -> int:
        page, offset = divmod(slot, self._size)
        return self._pages.now(page) * self._size + offset


def _mapped(found: S, slot: Callable[[int], int], row: Callable[[int], int]) -> S:
    """A record with other slots and rows in it."""
    changes: dict[str, Any] = {}
    for field in fields(found):
        name, value = field.name, getattr(found, field.name)
        if not value and value != 0:
            continue
        if name in _SLOTS:
            changes[name] = runs_of(map(slot, numbers_of(value)))
        elif name in _ROWS and isinstance(value, list):
            changes[name] = [row(number) for number in value]
        elif name == "row":
            changes[name] = row(value)
        elif name == "last_loc":
            changes[name] = [slot(number) if number >= 0 else number for number in value]
        elif name in _PARTS:
            changes[name] = [_mapped(part, slot, row) for part in value]
        elif name == "did":
            changes[name] = _mapped(value, slot, row)
    return replace(found, **changes)
