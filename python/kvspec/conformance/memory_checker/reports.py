"""What a report says, and that each kind of fault is told from the others."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.memory_checker.bench import (
    PAGE,
    PAGES,
    Bench,
    CheckerConformance,
    Doctored,
    only,
)
from kvspec.conformance.suite import MUTANT
from kvspec.conformance.watch import watch_function
from kvspec.errors import MemoryLeakError
from kvspec.instrumentation import instrument
from kvspec.interfaces.memory_checker import (
    Claims,
    HistoryStep,
    HostView,
    RunningReq,
    SystemView,
)
from kvspec.interfaces.ownership_ledger import Fault, Owner
from kvspec.interfaces.prefix_cache import Path

__all__ = ["ReportConformance"]

POOL = "token_to_kv_pool_allocator"
LOST = HistoryStep(1841, "free", "engine/scheduler.py:212 abort", "a request that is no more")
TAKEN = HistoryStep(97, "write", "engine/scheduler.py:88 prefill", "the request in row 2")


class Ledger:
    """An `Attribution` that knows of one page."""

    def __init__(self, pool: str, page: int) -> None:
        self._known = pool, page

    def last_owner(self, pool: str, page: int) -> str | None:
        return TAKEN.owner if (pool, page) == self._known else None

    def history(self, pool: str, page: int) -> tuple[HistoryStep, ...]:
        return (LOST, TAKEN) if (pool, page) == self._known else ()

    def lost_by(self, pool: str, page: int) -> HistoryStep | None:
        return LOST if (pool, page) == self._known else None


def system(bench: Bench, **changes: Any) -> SystemView:
    """What the objects of a bench hold."""
    view = SystemView(
        allocator=bench.allocator.view(),
        rows=bench.rows.view(),
        tree=bench.cache.view(),
        page_size=PAGE,
        page_count=PAGES,
        row_count=3,
    )
    return view._replace(**changes)


def claims(bench: Bench, **changes: Any) -> Claims:
    """Who holds what, of the requests of a bench; whose locks are not known."""
    running = tuple(
        RunningReq(req.req_pool_idx, req.cache_protected_len, None)
        for req in bench.reqs
        if req.req_pool_idx is not None
    )
    return Claims(running=running)._replace(**changes)


class ReportConformance(CheckerConformance):
    """CHECK-13 to CHECK-23."""

    def found(self, bench: Bench, view: Mapping[str, Any] | None = None, **given: Any) -> Any:
        """What `find_faults` says of a bench; `view` changes what it looks at."""
        options = {name: given.pop(name) for name in ("attribution", "idle") if name in given}
        seen = system(bench, **(view or {}))
        return self.function("find_faults")(seen, claims(bench, **given), **options)

    @clause("CHECK-13")
    def test_a_report_says_who_had_the_page_and_what_lost_it(self) -> None:
        bench = self.bench()
        bench.busy()
        bench.allocator.alloc(PAGE)
        report = only(self.found(bench, attribution=Ledger("full", 4)))
        assert (report.kind, report.clause) == ("leak", "CHECK-1")
        assert (report.pool, report.page, report.owners) == (POOL, 4, ())
        assert (report.last_owner, report.lost_by) == (TAKEN.owner, LOST)
        assert report.history == (LOST, TAKEN)
        assert str(report).splitlines() == [
            "CHECK-1: page 4 of token_to_kv_pool_allocator is held and has no owner;"
            " last owner: the request in row 2;"
            " lost by free at engine/scheduler.py:212 abort (action 1841)",
            "  1841  free   engine/scheduler.py:212 abort   -> a request that is no more",
            "    97  write  engine/scheduler.py:88 prefill  -> the request in row 2",
        ]

    @clause("CHECK-13")
    def test_a_row_is_looked_up_as_a_row(self) -> None:
        bench = self.bench()
        bench.rows.alloc(1)
        report = only(self.found(bench, attribution=Ledger("rows", 0)))
        assert (report.pool, report.page, report.lost_by) == ("req_to_token_pool", 0, LOST)

    @clause("CHECK-13")
    def test_without_a_ledger_nothing_is_guessed(self) -> None:
        bench = self.bench()
        bench.allocator.alloc(PAGE)
        report = only(bench.reports())
        assert (report.last_owner, report.lost_by, report.history) == (None, None, ())
        assert str(report) == f"CHECK-1: page 1 of {POOL} is held and has no owner"

    @clause("CHECK-13")
    def test_level_ledger_names_the_call_that_lost_the_page(self) -> None:
        bench = self.bench()
        with instrument(bench.cache, bench.allocator, bench.rows):
            bench.passes("ledger")
            req = bench.start([1, 2, 3, 4])
            bench.passes("ledger")
            bench.rows.free(req.req_pool_idx)
            bench.reqs.clear()
            report = only(bench.reports("ledger"))
        assert (report.kind, report.page) == ("leak", 1)
        assert report.last_owner == "the request in row 0"
        assert report.lost_by is not None
        assert report.lost_by.name == "free_rows"
        assert report.lost_by.site in str(report)
        assert [step.name for step in report.history][:2] == ["free_rows", "write"]

    @clause("CHECK-14")
    @pytest.mark.parametrize(
        ("lists", "owners"),
        [
            ({"free": (*range(1, 9), 3)}, "free; free"),
            ({"release": (3,)}, "free; free"),
            ({"pending": (3,)}, "free; pending"),
        ],
    )
    def test_a_page_that_is_listed_twice_is_a_double_free(
        self, lists: dict[str, Any], owners: str
    ) -> None:
        bench = self.bench()
        bench.allocator = Doctored(bench.allocator, **lists)
        report = only(bench.reports())
        assert (report.kind, report.clause, report.page) == ("double free", "CHECK-14", 3)
        assert str(report) == (
            f"CHECK-14, CHECK-2: page 3 of {POOL} is in the lists 2 times: {owners}"
        )

    @clause("CHECK-14", "CHECK-13")
    def test_what_was_given_back_twice_is_a_double_free(self) -> None:
        free = Owner("free")
        fault = Fault("double free", "full", 3, -1, 1841, free, free)
        report = self.function("report_of")(fault, Ledger("full", 3))
        assert (report.kind, report.clause, report.lost_by) == ("double free", "CHECK-14", LOST)
        assert str(report).startswith(
            f"CHECK-14: page 3 of {POOL} was given back, but was free already;"
            " last owner: the request in row 2; last moved by free at engine/scheduler.py:212 abort"
        )

    @clause("CHECK-15")
    @pytest.mark.parametrize("group", [False, True])
    def test_a_page_of_the_tree_that_is_given_back_is_used_after_free(self, group: bool) -> None:
        bench = self.bench()
        bench.busy()
        if group:
            bench.allocator.free_group_begin()
        bench.allocator.free([8])
        report = only(bench.reports())
        assert (report.kind, report.clause, report.page) == ("use after free", "CHECK-15", 2)
        assert report.owners == ("pending" if group else "free", "tree")

    @clause("CHECK-16", "CHECK-2")
    @pytest.mark.parametrize(
        ("slot", "other", "kind", "id_"),
        [(12, "free", "dangling row", "CHECK-16"), (8, "tree", "alias", "CHECK-2")],
    )
    def test_a_row_that_names_what_is_not_its_requests(
        self, slot: int, other: str, kind: str, id_: str
    ) -> None:
        bench = self.bench()
        req = bench.busy()
        bench.allocator.free([12])
        slots = range(slot, slot + 2)
        bench.rows.write((req.req_pool_idx, slice(4, 6)), [*slots])
        report = only(bench.reports())
        assert (report.kind, report.clause) == (kind, id_)
        assert (report.page, report.row, report.position) == (slot // PAGE, 1, 4)
        assert report.owners == (other, "the request in row 1")

    @clause("CHECK-2", "CHECK-16")
    def test_what_two_requests_have_is_an_alias_and_no_dangling_row(self) -> None:
        bench = self.bench()
        bench.start([1, 2, 3, 4])
        other = bench.start([5])
        bench.rows.write((other.req_pool_idx, slice(0, 4)), [4, 5, 6, 7])
        report = only(bench.reports(reserved=[8]))
        assert (report.kind, report.clause, report.page) == ("alias", "CHECK-2", 1)

    @clause("CHECK-17")
    @pytest.mark.parametrize(
        ("locks", "what"),
        [
            (2, "has 2 locks, 1 more than are open: the request in row 1"),
            (0, "has 0 locks, 1 fewer than are open: the request in row 1"),
        ],
    )
    def test_locks_that_nobody_took_or_gave_back_are_named(self, locks: int, what: str) -> None:
        bench = self.bench()
        bench.busy()
        pages = bench.cache.view().pages
        relocked = {
            path: page._replace(locks=locks) if page.locks else page for path, page in pages.items()
        }
        bench.cache = Doctored(bench.cache, pages=relocked)
        report = only(bench.reports())
        assert (report.kind, report.clause, report.page) == ("lock imbalance", "CHECK-17", 1)
        assert report.owners == ("the request in row 1",)
        assert str(report) == f"CHECK-17: page 1 of {POOL} {what}"

    @clause("CHECK-17")
    def test_a_lock_on_what_is_not_in_the_tree_is_named(self) -> None:
        bench = self.bench()
        gone: Path = (None, (9, 9, 9, 9))
        report = only(self.found(bench, open_locks={gone: ("lock taken at engine.py:3 run",)}))
        assert (report.kind, report.page) == ("lock imbalance", None)
        assert report.owners == ("lock taken at engine.py:3 run",)

    @clause("CHECK-18")
    @pytest.mark.parametrize(
        ("where", "owner"), [("free", "free"), ("tree", "tree"), ("row", "row 0")]
    )
    @pytest.mark.parametrize("page", [0, PAGES + 1])
    def test_what_is_no_page_must_not_be_in_circulation(
        self, where: str, owner: str, page: int
    ) -> None:
        bench = self.bench()
        bench.start([1, 2, 3, 4])
        bench.finish(bench.reqs[0])
        slot = max(page * PAGE, 1)
        view: dict[str, Any] = {}
        if where == "free":
            books = bench.allocator.view()
            view["allocator"] = books._replace(free=(*books.free, page))
        elif where == "tree":
            tree = bench.cache.view()
            pages = {path: each._replace(page=page) for path, each in tree.pages.items()}
            view["tree"] = tree._replace(pages=pages)
        else:
            (row,) = bench.rows.alloc(1)
            bench.rows.write((row, slice(0, 1)), [slot])
            owner = f"row {row}"
        reports = [report for report in self.found(bench, view) if report.kind == "sentinel"]
        assert [(report.clause, report.page) for report in reports] == [("CHECK-18", page)]
        assert reports[0].owners == (owner,)

    @clause("CHECK-19")
    def test_a_host_page_of_nobody_is_an_orphan(self) -> None:
        bench = self.bench()
        sound = HostView(page_count=4, free=(0, 3), tree=(1,))
        assert not self.found(bench, {"host": sound}, host_copies=frozenset({2}))
        report = only(self.found(bench, {"host": sound}, attribution=Ledger("host", 2)))
        assert (report.kind, report.clause, report.page) == ("host orphan", "CHECK-19", 2)
        assert (report.pool, report.lost_by) == ("token_to_kv_pool_host", LOST)

    @clause("CHECK-19")
    @pytest.mark.parametrize(
        ("free", "tree", "kind"),
        [((0, 1, 0), (), "double free"), ((0, 1), (1,), "use after free"), ((0,), (1, 1), "alias")],
    )
    def test_a_host_page_of_two_is_no_orphan(
        self, free: tuple[int, ...], tree: tuple[int, ...], kind: str
    ) -> None:
        host = HostView(page_count=2, free=free, tree=tree)
        report = only(self.found(self.bench(), {"host": host}))
        assert report.kind == kind

    @clause("CHECK-20")
    def test_json_says_all_that_the_text_says(self) -> None:
        bench = self.bench()
        req = bench.busy()
        bench.allocator.alloc(PAGE)
        bench.allocator.free([8, 12])
        bench.rows.write((req.req_pool_idx, slice(0, 2)), [7, 6])
        reports = [*bench.reports(), *self.found(bench, attribution=Ledger("full", 4))]
        assert {len(report.history) for report in reports} == {0, 2}
        for report in reports:
            as_json = report.as_json
            if self.impl_name != MUTANT:
                as_json = watch_function(self.impl_name, report.as_json, "memory_checker")
            told = json.loads(json.dumps(as_json()))
            again = type(report).from_json(told)
            assert again == report, "CHECK-20: the report is not the same again"
            assert str(again) == str(report)
            assert told["clause"] == report.clause

    @clause("CHECK-21")
    @pytest.mark.parametrize("level", ["counts", "sets", "ledger"])
    def test_the_middle_of_a_batch_is_sound(self, level: str) -> None:
        bench = self.bench()
        with instrument(bench.cache, bench.allocator, bench.rows) as looking:
            req = bench.busy()
            bench.allocator.free_group_begin()
            bench.passes(level)
            bench.finish(req)
            bench.passes(level)
            other = bench.start([1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
            slots = bench.rows.row(other.req_pool_idx)[8:]
            with looking.copying(slots):
                bench.passes(level)
                bench.cache.cache_unfinished_req(other)
                bench.passes(level)
            bench.allocator.free_group_end()
            bench.passes(level)

    @clause("CHECK-21")
    def test_a_surplus_does_not_hide_behind_what_is_pending(self) -> None:
        bench = self.bench()
        bench.allocator.free_group_begin()
        bench.allocator.free(bench.allocator.alloc(PAGE))
        bench.passes("counts")
        bench.allocator = Doctored(bench.allocator)
        bench.allocator.available_size = lambda: PAGES * PAGE
        with pytest.raises(MemoryLeakError, match="owned_size=0, pending_size=4"):
            bench.check("counts")

    @clause("CHECK-21")
    def test_a_copy_in_flight_owns_what_nobody_else_has(self) -> None:
        bench = self.bench()
        bench.busy()
        (slot, *_) = bench.allocator.alloc(PAGE).tolist()
        assert not self.found(bench, copies=frozenset({1, 3, slot // PAGE}))
        report = only(self.found(bench, copies=frozenset({slot // PAGE, 8})))
        assert (report.kind, report.owners) == ("use after free", ("free", "a copy in flight"))

    @clause("CHECK-23")
    def test_what_is_left_when_nothing_runs_is_named(self) -> None:
        bench = self.bench()
        bench.busy()
        page = bench.allocator.alloc(PAGE).tolist()[0] // PAGE
        (path,) = (path for path, each in bench.cache.view().pages.items() if each.locks)
        locks = {path: ("lock taken at engine.py:3 run",)}
        held = frozenset({page})
        given: dict[str, Any] = {"reserved": held, "open_locks": locks, "copies": frozenset({2})}
        assert not self.found(bench, **given)
        reports = self.found(bench, **given, idle=True, attribution=Ledger("full", page))
        assert [(r.clause, r.kind, r.pool == POOL, r.page) for r in reports] == [
            ("CHECK-23", "leak", False, 1),
            ("CHECK-23", "leak", True, page),
            ("CHECK-23", "leak", True, 2),
            ("CHECK-23", "lock imbalance", True, 1),
        ]
        assert reports[1].lost_by == LOST
        assert "taken by free at engine/scheduler.py:212 abort" in str(reports[1])
        assert reports[3].owners == ("lock taken at engine.py:3 run",)

    @clause("CHECK-2", "CHECK-3")
    def test_slots_of_the_tree_that_are_not_one_page_are_named(self) -> None:
        bench = self.bench()
        bench.busy()
        tree = bench.cache.view()
        path = next(path for path, each in tree.pages.items() if each.page == 1)
        view = {"misplaced": ((path, (4, 5, 12, 13)),)}
        reports = self.found(bench, view)
        assert [(r.kind, r.pool == POOL, r.page) for r in reports] == [
            ("alias", True, 3),
            ("alias", True, 1),
            ("dangling row", False, 1),
        ]
        assert "slots 4, 5, 12, 13" in reports[1].what
        assert "pages 1 and 3" in reports[1].what
