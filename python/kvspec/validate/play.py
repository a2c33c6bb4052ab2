"""A history on live objects. Spec: VALID.

The calls of a history are made again. What an implementation hands out is its own choice, so slots,
rows, nodes and locks of the history stand for those that were handed out in their place.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import singledispatchmethod
from typing import Any

import torch
from torch import Tensor

from kvspec.flight_recorder import FlightRecorder
from kvspec.flight_recorder.events import (
    Alloc,
    AllocDecode,
    AllocExtend,
    AllocRows,
    BackupState,
    CacheFinishedReq,
    CacheUnfinishedReq,
    Clear,
    ClearRows,
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
    MatchPrefix,
    MoveSwa,
    Observe,
    Reset,
    RestoreState,
    Runs,
    Write,
)
from kvspec.instrumentation import instrument
from kvspec.instrumentation.start import state_of
from kvspec.instrumentation.views import system_view
from kvspec.validate.follow import validate
from kvspec.validate.names import Names
from kvspec.validate.request import PlayedRequest
from kvspec.validate.runs import ids_of, numbers_of
from kvspec.validate.verdict import LogViolation

__all__ = ["look", "play"]


def play(events: Iterable[Event], cache: Any, allocator: Any, pool: Any) -> None:
    """Make the calls of a history on three objects, record them, and follow what was recorded.

    Raises LogViolation, an AssertionError whose text begins with the clause, at the first event
    that breaks one (VALID-4). What a call raises is recorded, and nothing comes of it.
    """
    recorder = FlightRecorder()
    with instrument(cache, allocator, pool, level="off", record=recorder):
        player = Player(cache, allocator, pool)
        for event in events:
            player.play(event)
            if isinstance(event, Observe):
                recorder.record(look(cache, allocator, pool, player.lengths))
    violation = validate(recorder.events()).violation
    if violation is not None:
        raise LogViolation(violation)


def look(
    cache: Any, allocator: Any, pool: Any, lengths: Mapping[int, int] | None = None
) -> Observe:
    """What the three hold now; `lengths` are those of the rows of a pool that does not say them.

    O(pool + resident pages × depth).
    """
    view, _ = system_view(cache, allocator, pool, lengths=lengths)
    return Observe(state=state_of(view))


class Player:
    """Makes the calls of events, one after the other."""

    def __init__(self, cache: Any, allocator: Any, pool: Any) -> None:
        self._cache, self._allocator, self._pool = cache, allocator, pool
        self._size = int(allocator.page_size)
        self._names = Names(self._size)
        self._pages: dict[int, int] = {}
        """Page of the history -> page that was handed out for it."""
        self._rows: dict[int, int] = {}
        self.lengths: dict[int, int] = {}
        """Live rows, and how far they are written."""
        self._requests: dict[int, PlayedRequest] = {}
        """By the row of the history."""
        self._nodes: dict[bytes, Any] = {}
        """The last page of a path -> the node that was given for it."""
        self._locks: dict[bytes, list[Any]] = {}
        """Open locks that no row was left with, by their path."""
        self._events: dict[int, Any] = {}
        """Receipts and tickets by the number of the event that gave them."""

    def play(self, event: Event) -> None:
        """Make the call of an event, if what it is about is there. What it raises is recorded."""
        self._make(event)

    def _call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options)
        except Exception:  # the recorder has it, and nothing has come of it
            return None

    @singledispatchmethod
    def _make(self, event: Event) -> None:
        """`start`, a copy, and looking at the state: no calls."""

    # What the history calls them, and what they are here

    def _slots(self, runs: Runs | None) -> Tensor:
        return self._tensor(numbers_of(runs))

    def _tensor(self, slots: Iterable[int]) -> Tensor:
        return torch.tensor([self._slot(slot) for slot in slots], dtype=torch.int64)

    def _slot(self, slot: int) -> int:
        page, offset = divmod(slot, self._size)
        return self._pages.get(page, page) * self._size + offset

    def _meet(self, slots: Runs | None, given: Any) -> None:
        """These slots were handed out for those of the history."""
        if given is not None:
            for slot, here in zip(numbers_of(slots), given.tolist(), strict=False):
                self._pages[slot // self._size] = here // self._size

    def _row(self, row: int) -> int:
        return self._rows.get(row, row)

    # Allocator

    @_make.register
    def _(self, event: Alloc) -> None:
        self._meet(event.slots, self._call(self._allocator.alloc, event.need_size))

    @_make.register
    def _(self, event: AllocExtend) -> None:
        last = [slot if slot < 0 else self._slot(slot) for slot in event.last_loc]
        lists = map(torch.tensor, (event.prefix_lens, event.seq_lens, last))
        given = self._call(self._allocator.alloc_extend, *lists, event.extend_num_tokens)
        self._meet(event.slots, given)

    @_make.register
    def _(self, event: AllocDecode) -> None:
        last = [slot if slot < 0 else self._slot(slot) for slot in event.last_loc]
        lists = map(torch.tensor, (event.seq_lens, last))
        self._meet(event.slots, self._call(self._allocator.alloc_decode, *lists))

    @_make.register
    def _(self, event: Free) -> None:
        alone = () if event.swa_slots is None else (self._slots(event.swa_slots),)
        self._call(self._allocator.free, self._slots(event.slots), *alone)

    @_make.register
    def _(self, event: FreeSwa) -> None:
        self._call(self._allocator.free_swa, self._slots(event.slots))

    @_make.register
    def _(self, event: MoveSwa) -> None:
        both = self._slots(event.target), self._slots(event.source)
        self._call(self._allocator.move_swa, *both)

    @_make.register
    def _(self, event: FreeGroupBegin) -> None:
        self._call(self._allocator.free_group_begin)

    @_make.register
    def _(self, event: FreeGroupEnd) -> None:
        self._call(self._allocator.free_group_end)

    @_make.register
    def _(self, event: BackupState) -> None:
        self._events[event.ticket] = self._call(self._allocator.backup_state)

    @_make.register
    def _(self, event: RestoreState) -> None:
        self._call(self._allocator.restore_state, self._events.get(event.ticket))

    @_make.register
    def _(self, event: Clear) -> None:
        self._call(self._allocator.clear)

    # Rows

    @_make.register
    def _(self, event: AllocRows) -> None:
        given = self._call(self._pool.alloc, event.need_size)
        self._rows.update(zip(event.rows or (), given or (), strict=False))
        self.lengths.update(dict.fromkeys(given or (), 0))

    @_make.register
    def _(self, event: FreeRows) -> None:
        for row in event.rows:
            self._requests.pop(row, None)
            self.lengths.pop(self._row(row), None)
        rows = [self._row(row) for row in event.rows]
        self._call(self._pool.free, rows[0] if len(rows) == 1 else rows)

    @_make.register
    def _(self, event: Write) -> None:
        for place in event.places:
            slots = self._slots(place.slots)
            positions = slice(place.start, place.start + len(slots))
            row = self._row(place.row)
            self._call(self._pool.write, (row, positions), slots)
            self.lengths[row] = max(self.lengths.get(row, 0), positions.stop)

    @_make.register
    def _(self, event: ClearRows) -> None:
        self._requests.clear()
        self.lengths.clear()
        self._call(self._pool.clear)

    # Cache

    @_make.register
    def _(self, event: MatchPrefix) -> None:
        options = {} if event.touch else {"touch": False}
        tokens = self._names.tokens(event.key)
        found = self._call(self._cache.match_prefix, key=tokens, **options)
        if found is not None:
            self._know(event.key.ids, len(found.device_indices), found.last_device_node)
            self._meet(event.slots, found.device_indices)

    def _know(self, ids: bytes, count: int, node: Any) -> None:
        """A node that was given for the first tokens of a key."""
        if node is not None:
            self._nodes[self._last_id(ids, count)] = node

    def _last_id(self, ids: bytes, count: int) -> bytes:
        return b"".join(ids_of(ids)[: count // self._size][-1:])

    def _node(self, path: bytes) -> Any:
        """The node of a path; a match tells where it has not been given yet."""
        if path not in self._nodes:
            tokens = self._names.path(path)
            if tokens is None:
                return None
            found = self._call(self._cache.match_prefix, key=tokens)
            self._nodes[path] = found.last_device_node if found is not None else None
        return self._nodes[path]

    @_make.register
    def _(self, event: Insert) -> None:
        tokens, slots = self._names.tokens(event.key), self._slots(event.slots)
        result = self._call(self._cache.insert, tokens, slots)
        self._know(event.key.ids, len(tokens), getattr(result, "last_device_node", None))

    @_make.register
    def _(self, event: IncLockRef) -> None:
        if not event.known:
            return
        node = self._node(event.path)
        taken = self._call(self._cache.inc_lock_ref, node)
        lock = taken if hasattr(taken, "node") else node
        self._locks.setdefault(event.path, []).append(lock)
        self._events[event.n] = lock

    @_make.register
    def _(self, event: DecLockRef) -> None:
        lock = self._events.get(event.lock)
        there = self._locks.get(event.path, [])
        if lock is None:
            lock = there[0] if there else self._node(event.path)
        if any(other is lock for other in there):
            del there[next(at for at, other in enumerate(there) if other is lock)]
        self._call(self._cache.dec_lock_ref, lock)

    @_make.register
    def _(self, event: Evict) -> None:
        windows = (event.swa_num_tokens,) if event.swa_num_tokens else ()
        self._call(self._cache.evict, event.num_tokens, *windows)

    @_make.register
    def _(self, event: EvictSwa) -> None:
        request = self._requests.get(event.row) or self._request(event.row, b"", 0)
        sizes = {
            "attention_chunk_size": event.attention_chunk_size,
            "sliding_window_size": event.sliding_window_size,
        }
        given = {name: size for name, size in sizes.items() if size is not None}
        self._call(self._cache.evict_swa, request, event.prelen, **given)

    @_make.register
    def _(self, event: CacheUnfinishedReq) -> None:
        request = self._asked(event)
        self._call(self._cache.cache_unfinished_req, request)
        self._events[event.n] = request.lock_receipt or request.last_node
        self._know(event.key.ids, event.key.count, request.last_node)

    @_make.register
    def _(self, event: CacheFinishedReq) -> None:
        self._call(self._cache.cache_finished_req, self._asked(event))
        self._requests.pop(event.row, None)
        self.lengths.pop(self._row(event.row), None)

    def _asked(self, event: CacheUnfinishedReq | CacheFinishedReq) -> PlayedRequest:
        """The request of a row, as it comes to the cache."""
        tokens = self._names.tokens(event.key)
        if event.row not in self._requests:
            path = event.path or self._last_id(event.key.ids, event.protected)
            self._requests[event.row] = self._request(event.row, path, event.protected)
        request = self._requests[event.row]
        request.holds(tokens)
        return request

    def _request(self, row: int, path: bytes, protected: int) -> PlayedRequest:
        """A request that begins with what a match gave, and has a lock there."""
        row, node = self._row(row), self._node(path)
        locks = self._locks.get(path)
        lock = locks.pop(0) if locks else None
        receipt = lock if hasattr(lock, "node") else None
        prefix = self._pool.req_to_token[row, :protected].long().clone()
        return PlayedRequest(row, node, receipt, prefix)

    @_make.register
    def _(self, event: Reset) -> None:
        self._nodes.clear()
        self._locks.clear()
        self._call(self._cache.reset)
