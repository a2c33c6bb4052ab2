"""What a log is made of: one event, one action. Spec: REC.

The names of the operations are those of the methods; `slots` are what a call gave or took, as runs.
Schema: `spec/flight_recorder.schema.json`, generated from these classes.
"""

from typing import TypeAlias

import msgspec

__all__ = [
    "SCHEMA",
    "Alloc",
    "AllocDecode",
    "AllocExtend",
    "AllocRows",
    "AnyEvent",
    "BackupState",
    "CacheFinishedReq",
    "CacheUnfinishedReq",
    "Clear",
    "ClearRows",
    "CopyBegin",
    "CopyEnd",
    "DecLockRef",
    "Effects",
    "Event",
    "Evict",
    "EvictSwa",
    "Free",
    "FreeGroupBegin",
    "FreeGroupEnd",
    "FreeRows",
    "FreeSwa",
    "IncLockRef",
    "Insert",
    "Key",
    "LiveRow",
    "MatchPrefix",
    "MoveSwa",
    "Observe",
    "Reset",
    "RestoreState",
    "Runs",
    "Start",
    "State",
    "TreePage",
    "Write",
    "Written",
]

SCHEMA = 1
"""Version of the schema; a reader refuses another."""

Runs: TypeAlias = list[tuple[int, int]]
"""Slots, rows or pages [start, stop), in the order in which they were given; no run is empty."""


class _Record(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What all of it is: a value that refuses what it does not know."""


class Key(_Record, frozen=True):
    """What a cache was asked for."""

    ids: bytes = b""
    """16 bytes for each whole page (REC-3)."""
    count: int = 0
    """Tokens, those beyond the last whole page included."""
    tokens: dict[int, list[int]] = {}
    """Tokens of the pages that the file names for the first time, by their index in this key."""
    namespace: bytes = b""
    """The frame of the namespace, where tokens are recorded."""


class Written(_Record, frozen=True):
    """Positions [start, start + slots) of a row were set."""

    row: int
    start: int
    slots: Runs


class LiveRow(_Record, frozen=True):
    row: int
    slots: Runs
    protected: int = 0
    """`cache_protected_len` of its request, if it is known."""


class TreePage(_Record, frozen=True):
    id: bytes
    """Of the page (REC-3)."""
    parent: bytes
    """Of the page before it, empty for the first of a namespace."""
    slots: Runs
    locks: int = 0
    tombstone: bool = False


class State(_Record, frozen=True):
    """What the three objects held, in pages."""

    free: Runs
    """The free list, then the release list, head first."""
    pending: Runs = []
    group: bool = False
    rows: list[LiveRow] = []
    free_rows: Runs = []
    tree: list[TreePage] = []
    """Parents before children."""
    swa_free: Runs = []
    swa_pending: Runs = []
    pairs: list[tuple[int, int]] = []
    """(full page, window page)."""


class Effects(_Record, frozen=True):
    """What a call did to the other two objects, in order within each field."""

    freed: Runs = []
    """Slots given to `free`."""
    swa_freed: Runs = []
    """Slots given to `free_swa`, full slots."""
    rows_freed: list[int] = []
    written: list[Written] = []


class Event(_Record, frozen=True, kw_only=True, tag_field="op"):
    """What all events have."""

    n: int = 0
    """Its number, from 0 (REC-1)."""
    at: str = ""
    """Call site: `file:line function`."""
    error: str = ""
    """What it raised, `Type: text`; its results are then missing."""
    did: Effects | None = None
    """What it did to others: None where it called none of them."""


class Start(Event, frozen=True, kw_only=True, tag="start"):
    """What was instrumented. The first event of every log."""

    schema: int
    kvspec: str
    allocator: str
    """`module.Class`."""
    pool: str
    cache: str
    page_size: int
    size: int
    rows: int
    max_context_len: int
    size_swa: int | None = None
    sliding_window_size: int | None = None
    need_sort: bool = False
    disable: bool = False
    """Whether the cache shares nothing."""
    first: int = 1
    """The number of the event that follows; above 1 if a ring dropped what was between."""
    state: State | None = None
    """None: everything was free and the tree empty."""


class Alloc(Event, frozen=True, kw_only=True, tag="alloc"):
    need_size: int
    slots: Runs | None = None
    """None: refused."""


class AllocExtend(Event, frozen=True, kw_only=True, tag="alloc_extend"):
    prefix_lens: list[int]
    seq_lens: list[int]
    last_loc: list[int]
    extend_num_tokens: int
    slots: Runs | None = None


class AllocDecode(Event, frozen=True, kw_only=True, tag="alloc_decode"):
    seq_lens: list[int]
    last_loc: list[int]
    slots: Runs | None = None


class Free(Event, frozen=True, kw_only=True, tag="free"):
    slots: Runs
    swa_slots: Runs | None = None
    """The second argument of `free`, full slots whose window slots alone go back."""


class FreeSwa(Event, frozen=True, kw_only=True, tag="free_swa"):
    slots: Runs


class MoveSwa(Event, frozen=True, kw_only=True, tag="move_swa"):
    source: Runs
    target: Runs


class FreeGroupBegin(Event, frozen=True, kw_only=True, tag="free_group_begin"):
    pass


class FreeGroupEnd(Event, frozen=True, kw_only=True, tag="free_group_end"):
    pass


class BackupState(Event, frozen=True, kw_only=True, tag="backup_state"):
    ticket: int
    """The number of this event."""


class RestoreState(Event, frozen=True, kw_only=True, tag="restore_state"):
    ticket: int
    """That of the event that took it; -1 if it is none that was seen."""


class Clear(Event, frozen=True, kw_only=True, tag="clear"):
    """`clear` of the allocator."""


class AllocRows(Event, frozen=True, kw_only=True, tag="alloc_rows"):
    """`alloc` of the request pool."""

    need_size: int
    rows: list[int] | None = None


class FreeRows(Event, frozen=True, kw_only=True, tag="free_rows"):
    """`free` of the request pool."""

    rows: list[int]


class Write(Event, frozen=True, kw_only=True, tag="write"):
    """`write` of the request pool."""

    places: list[Written]


class ClearRows(Event, frozen=True, kw_only=True, tag="clear_rows"):
    """`clear` of the request pool."""


class MatchPrefix(Event, frozen=True, kw_only=True, tag="match_prefix"):
    key: Key
    slots: Runs = []
    touch: bool = True


class IncLockRef(Event, frozen=True, kw_only=True, tag="inc_lock_ref"):
    path: bytes
    """Id of the last page of the path, empty for the root; see `known`."""
    known: bool = True
    """Whether the node was seen in a result of this cache; else `path` says nothing."""


class DecLockRef(Event, frozen=True, kw_only=True, tag="dec_lock_ref"):
    path: bytes
    known: bool = True
    lock: int = -1
    """Number of the event that took the lock, where a receipt says so."""


class Insert(Event, frozen=True, kw_only=True, tag="insert"):
    key: Key
    slots: Runs
    prefix_len: int | None = None
    """Tokens that were resident before."""


class CacheUnfinishedReq(Event, frozen=True, kw_only=True, tag="cache_unfinished_req"):
    row: int
    key: Key
    """Of the committed tokens."""
    protected: int
    """What the tree owned of the row before the call, in tokens."""
    path: bytes
    """Of the lock the request had before."""
    after: Runs = []
    """The slots of the row [0, tokens of the key), after the call."""


class CacheFinishedReq(Event, frozen=True, kw_only=True, tag="cache_finished_req"):
    row: int
    key: Key
    protected: int
    path: bytes
    allocated: int
    """Positions of the row that were written."""


class Evict(Event, frozen=True, kw_only=True, tag="evict"):
    num_tokens: int
    swa_num_tokens: int = 0


class EvictSwa(Event, frozen=True, kw_only=True, tag="evict_swa"):
    row: int
    prelen: int
    attention_chunk_size: int | None = None
    sliding_window_size: int | None = None


class Reset(Event, frozen=True, kw_only=True, tag="reset"):
    """`reset` of the cache."""


class CopyBegin(Event, frozen=True, kw_only=True, tag="copy_begin"):
    slots: Runs


class CopyEnd(Event, frozen=True, kw_only=True, tag="copy_end"):
    copy: int
    """Number of the event that began it."""


class Observe(Event, frozen=True, kw_only=True, tag="observe"):
    """Nobody asked for anything: what the three objects held when they were looked at."""

    state: State


AnyEvent: TypeAlias = (
    Start
    | Alloc
    | AllocExtend
    | AllocDecode
    | Free
    | FreeSwa
    | MoveSwa
    | FreeGroupBegin
    | FreeGroupEnd
    | BackupState
    | RestoreState
    | Clear
    | AllocRows
    | FreeRows
    | Write
    | ClearRows
    | MatchPrefix
    | IncLockRef
    | DecLockRef
    | Insert
    | CacheUnfinishedReq
    | CacheFinishedReq
    | Evict
    | EvictSwa
    | Reset
    | CopyBegin
    | CopyEnd
    | Observe
)
"""What a log may hold: one of these, told by `op`."""
