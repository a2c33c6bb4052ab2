"""SGLang 0.5.2 under the instrument: nothing of it is changed. Spec: INSTR, CHECK."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch

from kvspec.errors import MemoryLeakError
from kvspec.flight_recorder import FlightRecorder
from kvspec.instrumentation import Instrument, instrument
from peers import Sglang, sglang
from sglang_engine import Engine, SglangRequest, with_row_views

PAGE = 16
KINDS = ("radix", "chunk", "swa")


@pytest.fixture(scope="module")
def peer() -> Sglang:
    return sglang()


def watched(engine: Engine, **options: Any) -> Instrument:
    return instrument(engine.cache, engine.allocator, engine.pool, **options)


def engine_of(peer: Sglang, kind: str, page_size: int = 1, pages: int = 96) -> Engine:
    from sglang.srt.mem_cache.chunk_cache import ChunkCache  # there after `sglang()`

    kinds = {"radix": peer.RadixCache, "chunk": ChunkCache, "swa": peer.SWARadixCache}
    return Engine(peer, kinds[kind], page_size, pages, window=4 if kind == "swa" else 0)


def here(text: str) -> str:
    """The call site of the line of this file that has this text."""
    with open(__file__, encoding="utf-8") as file:
        (line,) = [n for n, line in enumerate(file, 1) if line.strip() == text]
    return f"test_instrumentation_sglang.py:{line} "


# ------------------------------------------------------------- what its own checks do not see


def test_a_chunk_that_ends_in_mid_page_leaves_its_row_on_a_freed_page(peer: Sglang) -> None:
    """SE-01: the page is given back, since another request has cached one like it, but of the row
    only what follows the chunk's end is rewritten.
    """
    engine = engine_of(peer, "radix", PAGE, pages=12)
    with watched(engine) as looking:
        tokens = list(range(3 * PAGE))
        chunked = engine.start(tokens, stop=PAGE + 8)
        engine.cache.cache_unfinished_req(chunked)
        other = engine.start(tokens)
        engine.cache.cache_unfinished_req(other)
        page = int(engine.pool.req_to_token[chunked.req_pool_idx, PAGE]) // PAGE
        engine.compute(chunked, 2 * PAGE + 8)
        assert looking.reports == []
        looking.check()

        engine.cache.cache_unfinished_req(chunked)  # the chunk that goes wrong

        (report,) = looking.reports
        assert (report.kind, report.clause, report.page) == ("dangling row", "CHECK-16", page)
        assert f"row {chunked.req_pool_idx} still names it" in str(report)
        assert report.last_owner == f"the request in row {chunked.req_pool_idx}"
        site = here("engine.cache.cache_unfinished_req(chunked)  # the chunk that goes wrong")
        assert report.lost_by is not None
        assert report.lost_by.name == "cache_unfinished_req"
        assert site in report.lost_by.site
        with pytest.raises(MemoryLeakError) as caught:
            looking.check()
        found = next(report for report in caught.value.reports if report.page == page)
        assert f"names it from position {PAGE} on" in str(found)
        for req in (chunked, other):
            engine.finish(req)
        assert engine.balances()


def test_a_tree_that_keeps_the_row_itself_changes_with_it(peer: Sglang) -> None:
    """SE-04: what was cached silently becomes the next request's, and nobody has the old slots."""
    engine = Engine(peer, with_row_views(peer.RadixCache), pages=12)
    with watched(engine) as looking:
        first = engine.start([1, 2, 3, 4])
        engine.finish(first)  # its row goes into the tree
        cached = engine.cache.match_prefix([1, 2, 3, 4]).device_indices.tolist()
        looking.check()
        for _ in range(4):  # so that the row comes round
            (row,) = engine.pool.alloc(1)
            if row == 0:
                break
            engine.pool.free(row)
        slots = engine.allocator.alloc(4)
        engine.pool.write((0, slice(0, 4)), slots)

        assert engine.cache.match_prefix([1, 2, 3, 4]).device_indices.tolist() != cached
        assert engine.allocator.available_size() + engine.cache.evictable_size() + 4 == engine.size
        with pytest.raises(MemoryLeakError) as caught:
            looking.check()
        by_kind: dict[str, list[Any]] = {"leak": [], "alias": []}
        for report in caught.value.reports:
            by_kind[report.kind].append(report)
        assert [report.page for report in by_kind["leak"]] == cached
        for report in by_kind["leak"]:
            assert report.last_owner.startswith("tree (")
            assert "a view of row 0 of req_to_token" in str(report)
            assert report.lost_by.name == "cache_finished_req"
            assert here("engine.finish(first)  # its row goes into the tree") in report.lost_by.site
        assert [report.page for report in by_kind["alias"]] == slots.tolist()
        for report in by_kind["alias"]:
            assert report.owners == ("tree", "the request in row 0")
            assert "a view of row 0 of req_to_token" in str(report)


# --------------------------------------------------------------------------- no false alarms


def numbers(seed: int) -> Iterator[int]:
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        yield seed >> 33


def drive(engine: Engine, look: Callable[[], None], seed: int, steps: int = 60) -> None:
    """Requests that come, run side by side, end or are dropped; chunks end where pages do."""
    draw, running = numbers(seed), list[SglangRequest]()
    for _ in range(steps):
        choice = next(draw) % 6
        if choice < 2 and len(running) < 3:
            length = (next(draw) % 3 + 1) * max(engine.page_size, 3)
            tokens = [next(draw) % 2 for _ in range(length)]
            stop = max(engine.page_size, length // 2 // engine.page_size * engine.page_size)
            running.append(engine.start(tokens, stop))
            look()
            engine.cache.cache_unfinished_req(running[-1])
            if running[-1].written < length:
                look()
                engine.compute(running[-1], length)
                engine.cache.cache_unfinished_req(running[-1])
        elif choice < 4 and running:
            req = running[next(draw) % len(running)]
            if len(req.output_ids) < 9:
                engine.decode(req, 1)
        elif choice == 4 and running:
            engine.allocator.free_group_begin()
            engine.finish(running.pop(next(draw) % len(running)))
            look()
            engine.allocator.free_group_end()
        elif running and not running[0].output_ids:
            engine.retract(running.pop(0))
        look()
    for req in running:
        engine.finish(req)
        look()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "page_size"),
    [("radix", 1), ("radix", PAGE), ("chunk", 1), ("chunk", PAGE), ("swa", 1)],
)
def test_nothing_is_reported_of_a_clean_run(
    peer: Sglang, kind: str, page_size: int, seed: int
) -> None:
    engine = engine_of(peer, kind, page_size)
    with watched(engine) as looking:

        def look() -> None:
            looking.check()
            assert looking.reports == []
            assert not looking.blind

        drive(engine, look, seed)
        assert kind == "chunk" or engine.balances()


@pytest.mark.parametrize(("kind", "page_size"), [("radix", PAGE), ("chunk", 1), ("swa", 1)])
def test_a_system_that_already_runs_is_read(peer: Sglang, kind: str, page_size: int) -> None:
    engine = engine_of(peer, kind, page_size)
    old = engine.start(list(range(2 * page_size)))
    engine.decode(old, 1)
    engine.finish(old)
    first = engine.start([*range(page_size), *range(9, 9 + page_size)])
    engine.cache.cache_unfinished_req(first)
    second = engine.start(list(range(20, 20 + page_size)))
    with watched(engine) as looking:
        looking.check()
        for req in (first, second):
            engine.decode(req, 1)
            engine.decode(req, 2)
            looking.check()
            engine.finish(req)
            looking.check()
        assert looking.reports == []
        looking.check(idle=True)


@pytest.mark.parametrize(("kind", "page_size"), [("radix", PAGE), ("chunk", 1), ("swa", 1)])
def test_every_call_of_it_is_recorded(peer: Sglang, kind: str, page_size: int) -> None:
    engine, recorder = engine_of(peer, kind, page_size), FlightRecorder(tokens=True)
    with watched(engine, level="off", record=recorder) as looking:
        drive(engine, lambda: None, seed=4)
        assert not looking.blind
    ops = {type(event).__name__ for event in recorder.events()}
    assert ops >= {"Start", "Alloc", "Write", "CacheUnfinishedReq", "CacheFinishedReq"}
    assert not any(event.error for event in recorder.events())


@pytest.mark.parametrize("level", ["sets", "counts", "off"])
def test_below_ledger_the_objects_are_read(peer: Sglang, level: Any) -> None:
    engine = engine_of(peer, "radix", PAGE)
    looking = watched(engine, level=level)
    req = engine.start(list(range(2 * PAGE)))
    engine.cache.cache_unfinished_req(req)
    looking.check([cast(Any, req)])
    engine.finish(req)
    looking.check()
    engine.allocator.alloc(PAGE)
    if level == "off":
        looking.check()
    else:
        with pytest.raises(MemoryLeakError):
            looking.check()


# -------------------------------------------------------------------------------- planted faults


@pytest.mark.parametrize(("kind", "page_size"), [("radix", 1), ("radix", PAGE), ("swa", 1)])
def test_a_planted_double_free_is_reported(peer: Sglang, kind: str, page_size: int) -> None:
    engine = engine_of(peer, kind, page_size)
    with watched(engine) as looking:
        engine.finish(engine.start(list(range(2 * page_size))))
        slots = engine.allocator.alloc(page_size)
        engine.allocator.free(slots)
        engine.allocator.free(slots)
        (report,) = looking.reports
        assert (report.kind, report.page) == ("double free", int(slots[0]) // page_size)
        with pytest.raises(MemoryLeakError, match="CHECK-14"):
            looking.check()


@pytest.mark.parametrize(
    ("kind", "page_size"), [("radix", 1), ("radix", PAGE), ("chunk", PAGE), ("swa", 1)]
)
def test_a_planted_leak_is_reported(peer: Sglang, kind: str, page_size: int) -> None:
    engine = engine_of(peer, kind, page_size)
    with watched(engine) as looking:
        req = engine.start(list(range(2 * page_size)))
        page = int(engine.pool.req_to_token[req.req_pool_idx, page_size]) // page_size
        engine.pool.free(req.req_pool_idx)
        engine.allocator.free(torch.tensor([page * page_size]))
        with pytest.raises(MemoryLeakError, match="CHECK-1: ") as caught:
            looking.check()
        (lost,) = {report.page for report in caught.value.reports if report.kind == "leak"}
        report = next(r for r in caught.value.reports if r.page == lost)
        assert report.last_owner == "the request in row 0"
        assert report.lost_by is not None
        assert report.lost_by.name == "free_rows"
        assert here("engine.pool.free(req.req_pool_idx)") in report.lost_by.site
