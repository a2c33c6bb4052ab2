"""Conformance of the instrument, on an implementation's objects and a stranger's. Spec: INSTR."""

import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, ClassVar

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.instrumentation.stranger import (
    StrangersAllocator,
    StrangersCache,
    StrangersPool,
    StrangersRequest,
)
from kvspec.conformance.memory_checker.bench import PAGE, PAGES, Bench, WindowBench
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import watch_function
from kvspec.errors import ContractError, MemoryLeakError
from kvspec.flight_recorder import FlightRecorder, events
from kvspec.instrumentation import views
from kvspec.interfaces.instrumentation import Level
from kvspec.validate import validate

__all__ = ["InstrumentConformance"]

SCHEDULER = """
def run_batch(call, *arguments):
    return call(*arguments)
"""
"""What an engine's module is; in its file the call is in line 3."""


def scheduler() -> Callable[..., Any]:
    """A function of a module that is not kvspec's."""
    names: dict[str, Any] = {"__name__": "engine.scheduler"}
    exec(compile(SCHEDULER, "engine/scheduler.py", "exec"), names)
    run_batch: Callable[..., Any] = names["run_batch"]
    return run_batch


@contextmanager
def unraisable() -> Iterator[list[BaseException | None]]:
    """Where errors go that may not be raised."""
    seen: list[BaseException | None] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda given: seen.append(given.exc_value)
    try:
        yield seen
    finally:
        sys.unraisablehook = before


class Spoilt:
    """Poison that breaks the first time it is used in an action."""

    broken = False

    def freed(self, slots: Any) -> None:
        if self.broken:
            raise RuntimeError("spoilt")

    fresh = freed

    def check(self, pages: Any) -> list[Any]:
        return []


class Stranger:
    """Somebody else's three objects."""

    def __init__(self, page_size: int = PAGE) -> None:
        self.allocator = StrangersAllocator(PAGES * page_size, page_size)
        self.rows = StrangersPool(3, 32)
        self.cache = StrangersCache(self.rows, self.allocator)

    def start(self, tokens: list[int]) -> StrangersRequest:
        """A request that has computed its tokens, and locks the root."""
        pages = -(-len(tokens) // self.allocator.page_size)
        (row,) = self.rows.alloc(1) or [-1]
        slots = self.allocator.alloc(pages * self.allocator.page_size)
        assert slots is not None
        self.rows.write((row, slice(0, len(tokens))), slots[: len(tokens)])
        self.cache.inc_lock_ref(self.cache.root_node)
        req = StrangersRequest(tokens, row, self.cache.root_node, fill_ids=tokens)
        req.last_node = self.cache.root_node
        return req


class InstrumentConformance(Conformance):
    """`impl` may have an `instrument` of its own, and functions of `instrumentation.views`."""

    levels: ClassVar[tuple[Level, ...]] = ("off", "counts", "sets", "ledger")

    def bench(self, kind: type[Bench] = Bench) -> Bench:
        return kind(self.impl, lambda *_, **__: None)

    def instrument(self, system: Any, **options: Any) -> Any:
        """Stand before the methods of a system, and count what of the clauses is reached."""
        make = import_module("kvspec.instrumentation").instrument
        if self.impl_name == MUTANT:
            make = getattr(self.impl, "instrument", make)
        try:
            return make(system.cache, system.allocator, system.rows, **options)
        except ContractError as error:
            self.reached("__init__", None, error)
            raise

    def reached(
        self, call: str, result: Any = None, error: Any = None, looking: Any = None
    ) -> None:
        """Evaluate the clauses after a call, on what the instrument says by then."""
        if self.impl_name == MUTANT:
            return

        def done(blind: bool, reports: list[Any]) -> Any:
            if error is not None:
                raise error
            return result

        done.__name__ = call
        blind, reports = (False, []) if looking is None else (looking.blind, looking.reports)
        with suppress(ContractError):
            watch_function(self.impl_name, done, "instrumentation")(blind=blind, reports=reports)

    def view_of(self, name: str) -> Callable[..., Any]:
        """A function of the room that reads, watched."""
        given = getattr(self.impl, name, None)
        function = given if inspect.isfunction(given) else getattr(views, name)
        if self.impl_name == MUTANT:
            return function

        def read(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            self.reached(name, result)
            return result

        return read

    # ------------------------------------------------------------------------------------ calls

    @clause("INSTR-1")
    @pytest.mark.parametrize("level", levels)
    @pytest.mark.parametrize("kind", [Bench, WindowBench])
    def test_calls_return_what_they_return_without_it(
        self, kind: type[Bench], level: Level
    ) -> None:
        plain, watched = self.bench(kind), self.bench(kind)
        told = [self._story(plain)]
        with self.instrument(watched, level=level, record=FlightRecorder()) as looking:
            told.append(self._story(watched))
            self.reached("cache_finished_req", told[1], looking=looking)
            assert not looking.blind
        assert told[0] == told[1]
        assert plain.cache.digest() == watched.cache.digest()

    def _story(self, bench: Bench) -> list[Any]:
        """What a few requests get to see."""
        told: list[Any] = []
        req = bench.busy()
        told += [req.prefix_indices.tolist(), bench.allocator.available_size()]
        bench.cache.cache_unfinished_req(req)
        told.append(req.prefix_indices.tolist())
        bench.allocator.free_group_begin()
        bench.finish(req)
        told.append(bench.allocator.view())
        bench.allocator.free_group_end()
        for call, argument in ((bench.allocator.free, [PAGE * PAGES]), (bench.rows.free, 2)):
            with pytest.raises(ContractError) as caught:
                call(argument)
            told.append(str(caught.value))
        told += [bench.cache.evict(PAGE), bench.allocator.alloc(PAGE).tolist(), bench.rows.view()]
        return told

    @clause("INSTR-1")
    def test_it_is_the_very_object_and_the_very_error(self) -> None:
        stranger, given, error = Stranger(), object(), KeyError("no page")

        def broken(*_: Any) -> Any:
            raise error

        vars(stranger.allocator)["backup_state"] = lambda: given
        vars(stranger.allocator)["restore_state"] = broken
        with self.instrument(stranger) as looking:
            assert stranger.allocator.backup_state() is given
            with pytest.raises(KeyError) as caught:
                stranger.allocator.restore_state(None)
            assert caught.value is error
            self.reached("backup_state", given, looking=looking)
        assert vars(stranger.allocator)["restore_state"] is broken

    @clause("INSTR-2")
    def test_every_call_is_an_event_and_what_it_does_is_in_it(self) -> None:
        bench, recorder = self.bench(), FlightRecorder()
        bench.finish(bench.start([1, 2, 3, 4]))
        with self.instrument(bench, record=recorder) as looking:
            req = bench.start([1, 2, 3, 4, 5])
            with pytest.raises(ContractError, match=r"PAGE-10|is free") as caught:
                bench.allocator.free([PAGE * PAGES])
            self.reached("free", None, caught.value, looking)
            bench.finish(req)
            bench.cache.evict(PAGE)
        start, *given = recorder.events()
        assert isinstance(start, events.Start)
        assert start.state is not None
        assert [type(event).__name__ for event in given] == [
            *("MatchPrefix", "IncLockRef", "AllocRows", "AllocExtend", "Write", "Write"),
            *("Free", "CacheFinishedReq", "Evict"),
        ]
        refused, finished, evicted = given[-3:]
        assert refused.error.startswith("ContractError: PAGE-10: ")
        assert finished.did == events.Effects(freed=[(8, 12)], rows_freed=[1])
        assert evicted.did is not None  # one slot names a page, or all of them do
        assert [start // PAGE for start, _ in evicted.did.freed] == [1]
        assert given[0] == events.MatchPrefix(
            n=1, at=given[0].at, key=recorder.key([1, 2, 3, 4, 5], PAGE), slots=[(4, 8)]
        )
        assert [event.n for event in recorder.events()] == list(range(10))

    @clause("INSTR-2")
    def test_what_a_cache_moves_is_an_effect_of_its_call(self) -> None:
        bench, recorder = self.bench(), FlightRecorder()
        with self.instrument(bench, record=recorder, level="off"):
            first, second = bench.start([1, 2, 3, 4, 5, 6]), bench.start([1, 2, 3, 4, 7])
            bench.cache.cache_unfinished_req(first)
            bench.cache.cache_unfinished_req(second)
        *_, moved, shared = recorder.events()
        assert isinstance(moved, events.CacheUnfinishedReq)
        assert moved.did is None
        assert (moved.row, moved.protected, moved.after) == (0, 0, [(4, 10)])
        assert isinstance(shared, events.CacheUnfinishedReq)
        assert shared.did == events.Effects(
            freed=[(12, 16)], written=[events.Written(1, 0, [(4, 8)])]
        )
        assert shared.after == [(4, 8), (16, 17)]

    @clause("INSTR-3")
    def test_an_event_names_who_called_from_outside(self) -> None:
        bench, recorder, run_batch = self.bench(), FlightRecorder(), scheduler()
        with self.instrument(bench, record=recorder) as looking:
            run_batch(bench.finish, run_batch(bench.start, [1, 2, 3, 4]))
            history = looking.history(1)
        given = recorder.events()[1:]
        assert {event.at for event in given} == {"engine/scheduler.py:3 run_batch"}
        assert [line.split("  ", 1)[1] for line in history] == [
            "cache_finished_req  engine/scheduler.py:3 run_batch  -> tree",
            "write  engine/scheduler.py:3 run_batch  -> the request in row 0",
            "alloc_extend  engine/scheduler.py:3 run_batch  -> reserved",
        ]

    @clause("INSTR-4")
    @pytest.mark.parametrize("level", ["sets", "ledger"])
    def test_detach_leaves_the_attributes_that_were_there(self, level: Level) -> None:
        bench, stranger = self.bench(), Stranger()
        own = vars(stranger.allocator)["alloc"] = stranger.allocator.alloc
        for system in (bench, stranger):
            objects = (system.cache, system.allocator, system.rows)
            before = [dict(vars(given)) for given in objects]
            with self.instrument(system, level=level, record=FlightRecorder()):
                assert all(vars(given) != then for given, then in zip(objects, before, strict=True))
            assert [vars(given) for given in objects] == before
            looking = self.instrument(system, level=level)
            looking.detach()
            looking.detach()
            self.reached("detach", looking=looking)
            assert [vars(given) for given in objects] == before
        assert stranger.allocator.alloc is own

    @clause("INSTR-4")
    def test_a_detached_instrument_says_that_it_sees_nothing(self) -> None:
        bench = self.bench()
        looking = self.instrument(bench)
        looking.detach()
        with pytest.raises(ContractError, match="INSTR-4: the instrument is detached"):
            looking.check()

    # ----------------------------------------------------------------------------- what is fit

    @clause("INSTR-5")
    @pytest.mark.parametrize(
        ("spoil", "lacking"),
        [
            (lambda s: setattr(s, "allocator", object()), "alloc, free, size, page_size"),
            (lambda s: delattr(s.allocator, "release_pages"), "release_pages"),
            (lambda s: delattr(s.rows, "free_slots"), "free_slots"),
            (lambda s: delattr(s.cache, "root_node"), "root_node"),
            (lambda s: setattr(s, "allocator", StrangersAllocator(8, 4)), "another allocator"),
            (lambda s: setattr(s, "rows", StrangersPool(1, 1)), "another request pool"),
            (lambda s: setattr(s.cache, "page_size", 2), "page_size"),
        ],
    )
    def test_what_is_not_fit_is_refused_with_what_it_lacks(
        self, spoil: Callable[[Any], None], lacking: str
    ) -> None:
        stranger = Stranger()
        spoil(stranger)
        before = dict(vars(stranger.cache))
        with pytest.raises(ContractError, match=f"INSTR-5: .*{lacking}"):
            self.instrument(stranger)
        assert vars(stranger.cache) == before

    @clause("INSTR-5")
    def test_two_instruments_of_one_object_are_refused(self) -> None:
        bench, other = self.bench(), self.bench()
        with self.instrument(bench):
            before = dict(vars(bench.allocator))
            with pytest.raises(ContractError, match=r"INSTR-5: .* instrumented already"):
                self.instrument(bench)
            assert vars(bench.allocator) == before
            other.cache.token_to_kv_pool_allocator = other.allocator = bench.allocator
            with pytest.raises(ContractError, match=r"INSTR-5: .* instrumented already"):
                self.instrument(other)

    # ---------------------------------------------------------------------------------- levels

    @clause("INSTR-6", "INSTR-10")
    def test_below_ledger_nothing_stands_before_a_method(self) -> None:
        bench = self.bench()
        objects = (bench.cache, bench.allocator, bench.rows)
        before = [dict(vars(given)) for given in objects]
        looking = self.instrument(bench, level="off")
        for level in ("counts", "sets", "off"):
            looking.level = level
            assert [vars(given) for given in objects] == before
            assert looking.ledger is None
        looking.level = "ledger"
        self.reached("level", looking=looking)
        assert "alloc" in vars(bench.allocator)
        looking.level = "off"
        assert [vars(given) for given in objects] == before

    @clause("INSTR-6")
    @pytest.mark.parametrize("kind", [Bench, WindowBench])
    def test_at_ledger_the_owners_are_read_anew(self, kind: type[Bench]) -> None:
        bench = self.bench(kind)
        with self.instrument(bench) as looking:
            running = bench.busy()
            looking.level = "off"
            dropped = bench.start([7, 7])
            bench.cache.cache_unfinished_req(running)
            bench.allocator.free_group_begin()
            bench.finish(dropped)
            looking.level = "ledger"
            self.reached("level", looking=looking)
            owners = [looking.owner(page).kind for page in range(1, 6)]
            assert owners == ["tree", "tree", "request", "pending", "free"]
            assert all(line.startswith("start  instrument") for line in looking.history(1))
            assert len(looking.history(1)) == 2
            looking.check()
            bench.allocator.free_group_end()
            bench.finish(running)
            looking.check(idle=True)
            assert looking.reports == []
            assert not looking.blind

    @clause("INSTR-6")
    def test_a_level_is_one_of_four_and_is_not_set_inside_a_call(self) -> None:
        stranger = Stranger()
        with pytest.raises(ContractError, match="INSTR-6: level is 'all'"):
            self.instrument(stranger, level="all")
        looking: Any = None
        errors: list[str] = []

        def inside(*_: Any) -> None:
            try:
                looking.level = "off"
            except ContractError as error:
                errors.append(str(error))

        vars(stranger.allocator)["restore_state"] = inside
        looking = self.instrument(stranger)
        stranger.allocator.restore_state(None)
        assert errors == ["INSTR-6: the level is set from inside a call"]
        assert looking.level == "ledger"

    # ----------------------------------------------------------------------------------- views

    @clause("INSTR-7")
    def test_an_allocator_is_what_its_attributes_say(self) -> None:
        allocator = StrangersAllocator(PAGES * PAGE, PAGE)
        allocator.free_pages = torch.tensor([3, 1, 3, 99])
        allocator.release_pages = torch.tensor([5])
        allocator.free_group_begin()
        allocator.free([8, 9, 10, 11, 24])
        view = self.view_of("allocator_view")(allocator)
        assert (view.free, view.release, view.pending) == ((3, 1, 3, 99), (5,), (2, 6))
        assert view.held == {4, 7, 8}
        assert view.group

    @clause("INSTR-7")
    def test_of_two_pools_each_and_their_pairs(self) -> None:
        both: Any = StrangersAllocator(4, 1)
        both.full_attn_allocator = StrangersAllocator(4, 1)
        both.swa_attn_allocator = StrangersAllocator(2, 1)
        both.full_attn_allocator.alloc(3)
        both.swa_attn_allocator.alloc(2)
        both.full_to_swa_index_mapping = torch.tensor([0, 1, 0, 2, 0, 0])
        both.free_group_begin()
        both.free([3])
        view = self.view_of("allocator_view")(both)
        assert (view.free, view.pending, view.held) == ((4,), (3,), {1, 2})
        assert view.swa is not None
        assert (view.swa.free, view.swa.pending, view.swa.held) == ((), (2,), {1})
        assert view.pairs == ((1, 1),)

    @clause("INSTR-7")
    def test_a_request_pool_is_what_its_attributes_say(self) -> None:
        pool = StrangersPool(4, 4)
        pool.free_slots = [2, 0, 2]
        pool.write((1, slice(0, 2)), [7, 8])
        pool.write((3, slice(0, 4)), [1, 2, 3, 4])
        view = self.view_of("pool_view")(pool, {3: 1})
        assert view.free == (2, 0, 2)
        assert view.rows == {1: (7, 8), 3: (1,)}

    @clause("INSTR-7")
    def test_a_cache_is_what_its_nodes_say(self) -> None:
        stranger = Stranger(page_size=2)
        above = stranger.cache.root_node.extended(
            [1, 2, 3, 4], torch.tensor([2, 3, 40, 41]), lock_ref=2, last_access_time=5.0, id=7
        )
        above.extended([5, 6], torch.tensor([2, 5]), swa_tombstone=True, id=9)
        above.extended([6, 6], None, host_value=torch.tensor([0, 1]))
        view = self.view_of("cache_view")(stranger.cache, 2)
        told = {
            tokens: (page.page, page.locks, page.last, page.born, page.tombstone)
            for (_, tokens), page in view.pages.items()
        }
        assert told == {
            (1, 2): (1, 2, 1, 1, False),
            (1, 2, 3, 4): (20, 2, 1, 1, False),
            (1, 2, 3, 4, 5, 6): (1, 0, 0, 2, True),
        }

    # ----------------------------------------------------------------------------------- errors

    @clause("INSTR-8")
    def test_an_error_of_its_own_blinds_it_and_nothing_else(self) -> None:
        bench, poison = self.bench(), Spoilt()
        with self.instrument(bench, poison=poison) as looking, unraisable() as seen:
            poison.broken = True
            slots = bench.allocator.alloc(PAGE)
            gc.collect()
            self.reached("alloc", slots, looking=looking)
            assert slots.tolist() == [4, 5, 6, 7]
            assert [str(error) for error in seen] == ["spoilt"]
            assert looking.blind
            assert "alloc" not in vars(bench.allocator)
            bench.allocator.free(slots)
            looking.check()

    # ----------------------------------------------------------------------------------- faults

    @clause("INSTR-9")
    @pytest.mark.parametrize("kind", [Bench, WindowBench])
    def test_nothing_is_reported_of_what_keeps_the_clauses(self, kind: type[Bench]) -> None:
        bench = self.bench(kind)
        with self.instrument(bench, every=1) as looking:
            for tokens in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 9]):
                req = bench.start(tokens)
                looking.check()
                bench.cache.cache_unfinished_req(req)
                looking.check()
                other = bench.start([*tokens, 7])
                bench.finish(req)
                looking.check()
                bench.finish(other)
            bench.cache.evict(2 * PAGE)
            ticket = bench.allocator.backup_state()
            bench.allocator.alloc(2 * PAGE)
            bench.allocator.restore_state(ticket)
            looking.check(idle=True)
            bench.cache.reset()
            looking.check(idle=True)
            bench.allocator.clear()
            assert looking.reports == []
            assert not looking.blind

    @clause("INSTR-9")
    def test_the_next_check_raises_what_actions_did_and_only_that_one(self) -> None:
        stranger = Stranger()
        with self.instrument(stranger) as looking:
            slots = stranger.allocator.alloc(PAGE)
            stranger.allocator.free(slots)
            stranger.allocator.free(slots)
            stranger.allocator.free_pages = torch.arange(1, PAGES + 1)  # it is undone
            reports = tuple(looking.reports)
            assert [report.kind for report in reports] == ["double free"]
            with pytest.raises(MemoryLeakError) as caught:
                looking.check()
            assert caught.value.reports == reports
            looking.check()
            assert tuple(looking.reports) == reports

    @clause("INSTR-2")
    @pytest.mark.parametrize("level", ["sets", "ledger"])
    def test_a_check_is_an_event_that_says_what_was_seen(self, level: Level) -> None:
        bench, recorder = self.bench(), FlightRecorder()
        with self.instrument(bench, level=level, record=recorder) as looking:
            req = bench.busy()
            looking.check(reqs=[req])
            bench.finish(req)
            looking.check(idle=True)
            seen = [event for event in recorder.events() if isinstance(event, events.Observe)]
            assert [len(event.state.rows) for event in seen] == [1, 0]
            assert [event.n for event in recorder.events()] == [*range(recorder.recorded)]
            if level == "ledger":
                last = recorder.events()[-2]
                assert looking.history(3)[0].startswith(f"{last.n}  cache_finished_req")
            assert validate(recorder.events()).violation is None

    @clause("INSTR-9")
    @pytest.mark.parametrize("row_first", [False, True])
    def test_a_request_may_be_taken_apart_by_hand(self, row_first: bool) -> None:
        bench = self.bench()
        with self.instrument(bench) as looking:
            req = bench.start([1, 2, 3, 4, 5])
            row, slots = req.req_pool_idx, bench.rows.row(req.req_pool_idx)
            calls = [lambda: bench.allocator.free(slots), lambda: bench.rows.free(row)]
            for call in reversed(calls) if row_first else calls:
                call()
            bench.cache.dec_lock_ref(req.lock_receipt)
            assert looking.reports == []
            looking.check(idle=True)

    @clause("INSTR-9")
    def test_what_cannot_be_right_is_reported_when_the_call_returns(self) -> None:
        stranger, run_batch = Stranger(), scheduler()
        with self.instrument(stranger) as looking:
            req = stranger.start([1, 2, 3, 4, 5])
            run_batch(stranger.allocator.free, [8, 9])
            assert looking.reports == []
            run_batch(stranger.allocator.free, [10])
            assert len(looking.reports) == 1
            report = looking.reports[0]
            self.reached("free", None, looking=looking)
            assert (report.kind, report.page) == ("double free", 2)
            assert report.lost_by is not None
            assert report.lost_by.site == "engine/scheduler.py:3 run_batch"
            assert report.last_owner == "the request in row 0"
            with pytest.raises(MemoryLeakError) as caught:
                looking.check()
            kinds = {(found.kind, found.page) for found in caught.value.reports}
            assert kinds == {("double free", 2), ("dangling row", 2)}
            assert req.req_pool_idx == 0

    @clause("INSTR-9")
    def test_a_page_in_two_rows_is_an_alias(self) -> None:
        bench = self.bench()
        with self.instrument(bench) as looking:
            first, second = bench.start([1, 2, 3]), bench.start([7, 8])
            bench.rows.write((second.req_pool_idx, slice(2, 3)), [int(bench.rows.row(0)[0])])
            assert len(looking.reports) == 1
            report = looking.reports[0]
            self.reached("write", None, looking=looking)
            assert (report.kind, report.page) == ("alias", 1)
            assert set(report.owners) == {"the request in row 0", "the request in row 1"}
            assert first.req_pool_idx == 0

    @clause("INSTR-9")
    def test_a_lock_that_nobody_gave_back_is_named_with_who_took_it(self) -> None:
        stranger, run_batch = Stranger(), scheduler()
        with self.instrument(stranger) as looking:
            stranger.cache.cache_finished_req(stranger.start([1, 2, 3, 4]))
            looking.check(idle=True)
            (node,) = stranger.cache.root_node.children.values()
            run_batch(stranger.cache.inc_lock_ref, node)
            looking.check()
            node.lock_ref += 1
            with pytest.raises(MemoryLeakError, match="CHECK-17") as caught:
                looking.check()
            told = "2 locks, 1 more than are open: inc_lock_ref at engine/scheduler.py:3 run_batch"
            assert told in str(caught.value)

    # ------------------------------------------------------------------------------------ costs

    @clause("INSTR-10")
    def test_a_call_costs_what_it_names(self) -> None:
        bench = self.bench()
        with self.instrument(bench) as looking:
            assert looking.ledger is not None
            before = looking.ledger.counters()["slots_seen"]
            bench.rows.alloc(1)
            bench.cache.match_prefix([1, 2, 3])
            assert looking.ledger.counters()["slots_seen"] == before
            slots = bench.allocator.alloc(2 * PAGE)
            bench.allocator.free(slots[:PAGE])
            named = looking.ledger.counters()["slots_seen"] - before
            assert named <= 3 * PAGE
