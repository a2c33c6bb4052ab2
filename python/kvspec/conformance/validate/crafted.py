"""Logs written by hand: one that is valid, and what breaks it in one place each.

Pages of 4 tokens; a page's id is one letter, sixteen times.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from kvspec.flight_recorder.events import (
    SCHEMA,
    Alloc,
    AllocDecode,
    AllocExtend,
    AllocRows,
    CacheFinishedReq,
    CacheUnfinishedReq,
    CopyBegin,
    DecLockRef,
    Effects,
    Event,
    Evict,
    Free,
    FreeGroupBegin,
    FreeGroupEnd,
    FreeRows,
    IncLockRef,
    Insert,
    Key,
    MatchPrefix,
    Observe,
    Reset,
    RestoreState,
    Runs,
    Start,
    State,
    TreePage,
    Write,
    Written,
)

__all__ = ["BREAKS", "VALID", "log", "start"]

PAGES = 8


def start(page_size: int = 4, first: int = 1, cache: str = "RadixCache") -> Start:
    """The first event: eight pages, four rows."""
    paged = "page_allocator.PagedTokenToKVPoolAllocator"
    return Start(
        schema=SCHEMA,
        kvspec="0",
        allocator="kvspec.oracle." + (paged if page_size > 1 else "TokenToKVPoolAllocator"),
        pool="kvspec.oracle.ReqToTokenPool",
        cache=f"kvspec.oracle.{cache}",
        page_size=page_size,
        size=PAGES * page_size,
        rows=4,
        max_context_len=32,
        disable=cache == "ChunkCache",
        first=first,
    )


def log(*events: Event, page_size: int = 4, cache: str = "RadixCache") -> list[Event]:
    """The events after `start`, numbered."""
    begun = [start(page_size, cache=cache), *events]
    return [replace(event, n=number) for number, event in enumerate(begun)]


def key(letters: str, more: int = 0) -> Key:
    """Whole pages, and tokens beyond them."""
    return Key(id_(letters), 4 * len(letters) + more)


def id_(letters: str) -> bytes:
    return b"".join(letter.encode() * 16 for letter in letters)


def write(row: int, start: int, *slots: tuple[int, int]) -> Write:
    return Write(places=[Written(row, start, list(slots))])


def unfinished(
    row: int, letters: str, protected: int, after: Runs, freed: Runs | None = None
) -> Event:
    path = id_(letters[protected // 4 - 1 : protected // 4]) if protected else b""
    did = Effects(freed=freed) if freed is not None else None
    return CacheUnfinishedReq(
        row=row, key=key(letters), protected=protected, path=path, after=after, did=did
    )


def finished(row: int, letters: str, protected: int, path: str, *freed: tuple[int, int]) -> Event:
    did = Effects(freed=list(freed), rows_freed=[row])
    return CacheFinishedReq(
        row=row, key=key(letters), protected=protected, path=id_(path), allocated=12, did=did
    )


FIRST: Sequence[Event] = (
    AllocRows(need_size=1, rows=[2]),
    AllocExtend(
        prefix_lens=[0], seq_lens=[9], last_loc=[-1], extend_num_tokens=9, slots=[(20, 29)]
    ),
    write(2, 0, (20, 29)),
    unfinished(2, "ab", 0, [(20, 28)]),
)
"""Row 2 has pages 5, 6, 7, of which the tree has 5 and 6 under its lock. The pages are a choice."""

SECOND: Sequence[Event] = (
    AllocRows(need_size=1, rows=[0]),
    Alloc(need_size=8, slots=[(4, 8), (12, 16)]),
    write(0, 0, (4, 8), (12, 16)),
    unfinished(0, "ac", 0, [(20, 24), (12, 16)], [(4, 8)]),
)
"""Row 0 has pages 1 and 3; page 1 is what the tree has as 5, and goes back."""

IDLE: Sequence[Event] = (
    finished(2, "ab", 8, "b", (28, 32)),
    finished(0, "ac", 8, "c"),
)
"""Nothing runs; the tree has pages 5, 6 and 3."""

VALID: dict[str, list[Event]] = {
    "what others would have chosen too": log(
        *FIRST,
        *SECOND,
        MatchPrefix(key=key("abd", 2), slots=[(20, 28)]),
        IncLockRef(path=id_("b")),
        *IDLE,
        Evict(num_tokens=4, did=Effects(freed=[(12, 16)])),
        DecLockRef(path=id_("b"), lock=10),
        Evict(num_tokens=5, did=Effects(freed=[(24, 28), (20, 24)])),
        Reset(),
    ),
    "whole leaves, and more than was asked for": log(
        *FIRST, *SECOND, *IDLE, Evict(num_tokens=1, did=Effects(freed=[(20, 28), (12, 16)]))
    ),
    "an allocation rounded down": log(Alloc(need_size=6, slots=[(8, 12)])),
    "duplicates given back in several calls, in parts": log(
        *FIRST,
        *SECOND[:-1],
        unfinished(0, "ac", 0, [(20, 24), (12, 16)], [(6, 8), (4, 6)]),
    ),
    "a lock of nothing given up": log(DecLockRef(path=b"")),
    "what raised, and would not have": log(Alloc(need_size=4, error="MemoryError: ")),
    "a cache that does not share": log(
        *FIRST[:-1],
        CacheFinishedReq(
            row=2,
            key=key("ab", 1),
            protected=0,
            path=b"",
            allocated=9,
            did=Effects(freed=[(20, 29)], rows_freed=[2]),
        ),
        cache="ChunkCache",
    ),
    "a state that was looked at": log(
        *FIRST,
        *SECOND,
        *IDLE,
        Observe(
            state=State(
                free=[(1, 3), (4, 5), (7, 9)],
                free_rows=[(0, 4)],
                tree=[
                    TreePage(id_("a"), b"", [(20, 24)]),
                    TreePage(id_("b"), id_("a"), [(24, 28)]),
                    TreePage(id_("c"), id_("a"), [(12, 16)]),
                ],
            )
        ),
    ),
}
"""Logs of implementations that keep the clauses, by what they chose."""


def observed(free: Runs, *, page: int = 3, locks: int = 0) -> Observe:
    """What is looked at after all have finished."""
    tree = [
        TreePage(id_("a"), b"", [(20, 24)], locks),
        TreePage(id_("b"), id_("a"), [(24, 28)]),
        TreePage(id_("c"), id_("a"), [(4 * page, 4 * page + 4)]),
    ]
    return Observe(state=State(free=free, free_rows=[(0, 4)], tree=tree))


FREE: Runs = [(1, 3), (4, 5), (7, 9)]
RUNNING: Sequence[Event] = (*FIRST, *SECOND)
DONE: Sequence[Event] = (*RUNNING, *IDLE)

BREAKS: dict[str, tuple[str, list[Event]]] = {
    "a held page handed out": ("PAGE-3", log(*FIRST, Alloc(need_size=4, slots=[(28, 32)]))),
    "a page too few": ("PAGE-3", log(Alloc(need_size=8, slots=[(4, 8)]))),
    "a page of the tree for an extension": (
        "PAGE-6",
        log(
            *FIRST,
            AllocExtend(
                prefix_lens=[0], seq_lens=[4], last_loc=[-1], extend_num_tokens=4, slots=[(20, 24)]
            ),
        ),
    ),
    "the wrong slot": (
        "PAGE-7",
        log(*FIRST, AllocDecode(seq_lens=[10], last_loc=[28], slots=[(30, 31)])),
    ),
    "refused with room": ("PAGE-4", log(*FIRST, Alloc(need_size=20))),
    "free given back": (
        "PAGE-10",
        log(Alloc(need_size=4, slots=[(4, 8)]), Free(slots=[(4, 8)]), Free(slots=[(6, 7)])),
    ),
    "never handed out, given back": ("PAGE-10", log(Free(slots=[(4, 8)]))),
    "given back twice at page size 1": (
        "SLOT-5",
        log(Alloc(need_size=2, slots=[(1, 3)]), Free(slots=[(1, 2), (1, 2)]), page_size=1),
    ),
    "a held slot": (
        "SLOT-2",
        log(Alloc(need_size=2, slots=[(1, 3)]), Alloc(need_size=1, slots=[(2, 3)]), page_size=1),
    ),
    "pending, handed out": (
        "PAGE-3",
        log(
            Alloc(need_size=4, slots=[(4, 8)]),
            FreeGroupBegin(),
            Free(slots=[(4, 8)]),
            Alloc(need_size=4, slots=[(4, 8)]),
        ),
    ),
    "no group": ("PAGE-12", log(FreeGroupEnd())),
    "no ticket": ("PAGE-15", log(RestoreState(ticket=-1))),
    "a live row": ("REQ-2", log(*FIRST, AllocRows(need_size=1, rows=[2]))),
    "rows refused": ("REQ-3", log(AllocRows(need_size=2))),
    "a free row given back": ("REQ-4", log(FreeRows(rows=[1]))),
    "a hole in a row": ("REQ-7", log(*FIRST, write(2, 10, (30, 31)))),
    "a free page in a row": ("CACHE-1", log(AllocRows(need_size=1, rows=[0]), write(0, 0, (4, 8)))),
    "another's page in a row": (
        "CACHE-1",
        log(*FIRST, AllocRows(need_size=1, rows=[0]), write(0, 0, (28, 29))),
    ),
    "a page that a live row names": (
        "CACHE-1",
        log(*FIRST, Free(slots=[(28, 29)]), Alloc(need_size=4, slots=[(28, 32)])),
    ),
    "a page of the tree given back": ("CHECK-15", log(*FIRST, Free(slots=[(20, 24)]))),
    "copied, given back": (
        "LEDGER-9",
        log(Alloc(need_size=4, slots=[(4, 8)]), CopyBegin(slots=[(4, 8)]), Free(slots=[(4, 8)])),
    ),
    "found too little": ("RADIX-1", log(*FIRST, MatchPrefix(key=key("ab"), slots=[(20, 24)]))),
    "found another's": ("RADIX-1", log(*FIRST, MatchPrefix(key=key("ab"), slots=[(20, 32)]))),
    "found where nothing is shared": (
        "CHUNK-3",
        log(MatchPrefix(key=key("a"), slots=[(4, 8)]), cache="ChunkCache"),
    ),
    "a duplicate kept": (
        "CACHE-3",
        log(*FIRST, *SECOND[:-1], unfinished(0, "ac", 0, [(20, 24), (12, 16)])),
    ),
    "not the request's": (
        "CACHE-3",
        log(*FIRST, *SECOND[:-1], unfinished(0, "ac", 0, [(20, 24), (12, 16)], [(4, 8), (20, 24)])),
    ),
    "a row that names what is free": (
        "CACHE-2",
        log(*FIRST, *SECOND[:-1], unfinished(0, "ac", 0, [(4, 8), (12, 16)], [(4, 8)])),
    ),
    "given back twice in one action": (
        "PAGE-10",
        log(*FIRST, *SECOND[:-1], unfinished(0, "ac", 0, [(20, 24), (12, 16)], [(4, 8), (4, 8)])),
    ),
    "a tail kept": ("CACHE-4", log(*RUNNING, finished(2, "ab", 8, "b"))),
    "a row kept": (
        "CACHE-4",
        log(*RUNNING, replace(IDLE[0], did=Effects(freed=[(28, 32)]))),
    ),
    "half of it, and an error": ("CACHE-6", log(*RUNNING, replace(IDLE[0], error="E: "))),
    "a lock that is not there": ("CACHE-13", log(*DONE, DecLockRef(path=id_("b")))),
    "a path that is not there": ("CACHE-13", log(*DONE, IncLockRef(path=id_("z")))),
    "a request without its lock": (
        "CACHE-5",
        log(*FIRST, DecLockRef(path=id_("b"), lock=4), finished(2, "ab", 8, "b", (28, 32))),
    ),
    "locked, evicted": (
        "RADIX-11",
        log(*FIRST, Evict(num_tokens=4, did=Effects(freed=[(24, 28)]))),
    ),
    "followed, evicted": (
        "RADIX-8",
        log(*DONE, Evict(num_tokens=4, did=Effects(freed=[(20, 24)]))),
    ),
    "not the tree's, evicted": (
        "RADIX-10",
        log(
            *DONE,
            Alloc(need_size=4, slots=[(4, 8)]),
            Evict(num_tokens=4, did=Effects(freed=[(4, 8)])),
        ),
    ),
    "too little evicted": (
        "RADIX-8",
        log(*DONE, Evict(num_tokens=8, did=Effects(freed=[(24, 28)]))),
    ),
    "inserted, and a duplicate given back": (
        "CACHE-9",
        log(
            *DONE,
            Alloc(need_size=4, slots=[(4, 8)]),
            Insert(key=key("a"), slots=[(4, 8)], prefix_len=4, did=Effects(freed=[(4, 8)])),
        ),
    ),
    "a free page taken in": ("CHECK-15", log(Insert(key=key("a"), slots=[(4, 8)], prefix_len=0))),
    "a page in two places": (
        "CACHE-10",
        log(*DONE, Insert(key=key("d"), slots=[(20, 24)], prefix_len=0)),
    ),
    "reset under a lock": ("CACHE-16", log(*FIRST, Reset(did=Effects(freed=[(20, 28)])))),
    "reset with a page kept": ("CACHE-15", log(*DONE, Reset(did=Effects(freed=[(20, 28)])))),
    "a lost page": ("CHECK-1", log(*DONE, observed([(1, 3), (7, 9)]))),
    "a page of two": ("CHECK-2", log(*DONE, observed([(1, 6), (7, 9)]))),
    "a page of the tree's that is free": ("CHECK-2", log(*DONE, observed(FREE, page=1))),
    "a page listed twice": ("CHECK-14", log(*DONE, observed([*FREE, (1, 2)]))),
    "a lock too many": ("CHECK-17", log(*DONE, observed(FREE, locks=1))),
}
"""What is wrong at the last event, the clause, and the log."""
