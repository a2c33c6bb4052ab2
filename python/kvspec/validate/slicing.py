"""What an event depends on, told from the events alone: the pages, rows, locks that it names.

A backward slice keeps of a long log what could matter to one event. It need not be exact: what it
keeps is followed, and what was missing is put back (`shrink`).
"""

from collections.abc import Iterable, Sequence
from functools import singledispatchmethod
from typing import NamedTuple, TypeAlias

from kvspec.flight_recorder.events import (
    Alloc,
    AllocDecode,
    AllocExtend,
    AllocRows,
    BackupState,
    CacheFinishedReq,
    CacheUnfinishedReq,
    CopyBegin,
    CopyEnd,
    DecLockRef,
    Event,
    Evict,
    EvictSwa,
    Free,
    FreeGroupBegin,
    FreeGroupEnd,
    FreeRows,
    FreeSwa,
    IncLockRef,
    Insert,
    Key,
    MatchPrefix,
    MoveSwa,
    RestoreState,
    Runs,
    Write,
)
from kvspec.validate.runs import ids_of, numbers_of, pages_of

__all__ = ["Footprint", "Thing", "footprints", "slice_of"]

Thing: TypeAlias = tuple[str, object]
"""A page, a row, a lock, the locks on a page, the group, a ticket or a copy."""
Things: TypeAlias = frozenset[Thing]


class Footprint(NamedTuple):
    """What an event has to do with."""

    makes: Things = frozenset()
    """What came before does not matter to these."""
    changes: Things = frozenset()
    """What came before does."""
    adds: Things = frozenset()
    """These are changed without being read."""
    reads: Things = frozenset()

    @property
    def touched(self) -> Things:
        """All of it."""
        return self.makes | self.changes | self.adds | self.reads


def slice_of(prints: Sequence[Footprint], last: int, needed: Iterable[Thing]) -> set[int]:
    """Indices below `last` of the events on which these things depend, without the first."""
    kept, need = set[int](), set(needed)
    for index in range(last - 1, 0, -1):
        found = prints[index]
        if need.isdisjoint(found.makes | found.changes | found.adds):
            continue
        kept.add(index)
        need -= found.makes
        need |= found.reads | found.changes
    return kept


def footprints(events: Iterable[Event], page_size: int) -> list[Footprint]:
    """That of each event, in one pass. O(slots and ids named)."""
    reader = _Reader(page_size)
    return [reader.read(event) for event in events]


class _Reader:
    """Remembers which slots a row names and which page an id is, as far as the log tells."""

    def __init__(self, page_size: int) -> None:
        self._size = page_size
        self._rows: dict[int, list[int]] = {}
        self._numbers: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._paths: dict[bytes, list[bytes]] = {}
        """Of an id that a key ended with, all its ids."""

    @singledispatchmethod
    def read(self, event: Event) -> Footprint:
        """The footprint of the next event."""
        return Footprint()

    @read.register
    def _(self, event: Alloc) -> Footprint:
        return Footprint(makes=self._pages(event.slots))

    @read.register
    def _(self, event: AllocExtend | AllocDecode) -> Footprint:
        continued = _things("page", [slot // self._size for slot in event.last_loc if slot >= 0])
        return Footprint(makes=self._pages(event.slots) - continued, reads=continued)

    @read.register
    def _(self, event: Free) -> Footprint:
        return Footprint(changes=self._pages(event.slots) | self._pages(event.swa_slots))

    @read.register
    def _(self, event: FreeSwa) -> Footprint:
        return Footprint(changes=self._pages(event.slots))

    @read.register
    def _(self, event: MoveSwa) -> Footprint:
        return Footprint(changes=self._pages(event.source) | self._pages(event.target))

    @read.register
    def _(self, event: FreeGroupBegin) -> Footprint:
        return Footprint(makes=_things("group", [0]))

    @read.register
    def _(self, event: FreeGroupEnd) -> Footprint:
        return Footprint(changes=_things("group", [0]))

    @read.register
    def _(self, event: BackupState) -> Footprint:
        return Footprint(makes=_things("ticket", [event.ticket]))

    @read.register
    def _(self, event: RestoreState) -> Footprint:
        return Footprint(reads=_things("ticket", [event.ticket]))

    @read.register
    def _(self, event: CopyBegin) -> Footprint:
        return Footprint(makes=_things("copy", [event.n]), reads=self._pages(event.slots))

    @read.register
    def _(self, event: CopyEnd) -> Footprint:
        return Footprint(changes=_things("copy", [event.copy]))

    @read.register
    def _(self, event: AllocRows) -> Footprint:
        self._rows.update((row, []) for row in event.rows or ())
        return Footprint(makes=_things("row", event.rows or ()))

    @read.register
    def _(self, event: FreeRows) -> Footprint:
        for row in event.rows:
            self._rows.pop(row, None)
        return Footprint(changes=_things("row", event.rows))

    @read.register
    def _(self, event: Write) -> Footprint:
        pages = Things()
        for place in event.places:
            slots = numbers_of(place.slots)
            row = self._rows.setdefault(place.row, [])
            row[place.start : place.start + len(slots)] = slots
            pages |= self._pages(place.slots)
        return Footprint(changes=_things("row", [place.row for place in event.places]), reads=pages)

    @read.register
    def _(self, event: MatchPrefix) -> Footprint:
        self._learn(event.key, numbers_of(event.slots)[:: self._size])
        return Footprint(reads=self._resident(ids_of(event.key.ids)))

    @read.register
    def _(self, event: Insert) -> Footprint:
        ids, slots = ids_of(event.key.ids), numbers_of(event.slots)
        there = (event.prefix_len or 0) // self._size
        before = self._resident(ids[:there])
        self._learn(event.key, slots[:: self._size], there)
        return Footprint(changes=self._pages(event.slots), reads=before)

    @read.register
    def _(self, event: IncLockRef) -> Footprint:
        return Footprint(
            makes=_things("lock", [event.n]) | _things("lock at", [event.path]),
            adds=self._locks(event.path),
            reads=self._resident(self._paths.get(event.path, [event.path])),
        )

    @read.register
    def _(self, event: DecLockRef) -> Footprint:
        lock = ("lock", event.lock) if event.lock >= 0 else ("lock at", event.path)
        reads = frozenset([lock]) if event.path else Things()
        return Footprint(adds=self._locks(event.path), reads=reads)

    @read.register
    def _(self, event: CacheUnfinishedReq) -> Footprint:
        before, ids = self._request(event), ids_of(event.key.ids)
        after, there = numbers_of(event.after), self._resident(ids)
        self._learn(event.key, after[:: self._size])
        row = self._rows.setdefault(event.row, [])
        row[: len(after)] = after
        path = ids[-1] if ids else b""
        return Footprint(
            makes=_things("lock", [event.n]) | _things("lock at", [path]),
            changes=before.changes,
            adds=before.adds | self._locks(path),
            reads=before.reads | there | self._resident(ids),
        )

    @read.register
    def _(self, event: CacheFinishedReq) -> Footprint:
        before = self._request(event)
        resident = self._resident(ids_of(event.key.ids))
        numbers = [slot // self._size for slot in self._rows.pop(event.row, [])[:: self._size]]
        freed = pages_of(event.did.freed, self._size) if event.did is not None else []
        kept = [-1 if number in freed else number for number in numbers]
        self._learn(event.key, [number * self._size for number in kept])
        return before._replace(reads=before.reads | resident)

    @read.register
    def _(self, event: Evict) -> Footprint:
        did = event.did
        freed = self._pages(did.freed) | self._pages(did.swa_freed) if did else Things()
        for page in pages_of(did.freed, self._size) if did else ():
            self._numbers.pop(self._names.pop(page, b""), None)
        return Footprint(changes=freed, reads=frozenset(("locks", page) for _, page in freed))

    @read.register
    def _(self, event: EvictSwa) -> Footprint:
        freed = self._pages(event.did.swa_freed) if event.did else Things()
        return Footprint(changes=freed, reads=_things("row", [event.row]))

    def _pages(self, runs: Runs | None) -> Things:
        return _things("page", pages_of(runs, self._size))

    def _learn(self, key: Key, firsts: Sequence[int], start: int = 0) -> None:
        """First slots of the pages that the ids of a key are, as far as there are some."""
        ids = ids_of(key.ids)
        for id_, slot in list(zip(ids, firsts, strict=False))[start:]:
            if slot >= 0:
                self._numbers[id_] = slot // self._size
                self._names[slot // self._size] = id_
        for length in {len(ids), min(len(ids), len(firsts))}:
            if length:
                self._paths[ids[length - 1]] = ids[:length]

    def _resident(self, ids: Iterable[bytes]) -> Things:
        return _things("page", [self._numbers[id_] for id_ in ids if id_ in self._numbers])

    def _locks(self, path: bytes) -> Things:
        """The locks on a page are a thing of their own, which few events depend on."""
        pages = self._resident(self._paths.get(path, [path]))
        return frozenset(("locks", page) for _, page in pages)

    def _request(self, event: CacheUnfinishedReq | CacheFinishedReq) -> Footprint:
        """What a request brings to a cache: its row and pages, and its lock."""
        freed = event.did.freed if event.did is not None else []
        own = [slot // self._size for slot in self._rows.get(event.row, ())[:: self._size]]
        return Footprint(
            changes=_things("row", [event.row]) | _things("page", own) | self._pages(freed),
            adds=self._locks(event.path),
            reads=_things("lock at", [event.path]) if event.path else Things(),
        )


def _things(kind: str, names: Iterable[object]) -> Things:
    return frozenset((kind, name) for name in names)
