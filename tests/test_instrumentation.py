"""The instrument on the oracle's objects and on the core's, and on tiers, copies and poison."""

from typing import Any

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance.instrumentation import InstrumentConformance, Stranger
from kvspec.conformance.memory_checker.bench import PAGE, PAGES, Bench, WindowBench
from kvspec.errors import ContractError, MemoryLeakError
from kvspec.flight_recorder import FlightRecorder
from kvspec.instrumentation import Instrument, instrument
from kvspec.poison import Poison


class TestOracle(InstrumentConformance):
    impl = kvspec.oracle


class TestNative(InstrumentConformance):
    impl = kvspec


class NextTier:
    """Host memory, whose first page is 0."""

    def __init__(self, pages: int) -> None:
        self.size, self.page_size = pages * PAGE, PAGE
        self.free_slots = torch.arange(self.size)

    def alloc(self, need_size: int) -> Any:
        slots, self.free_slots = self.free_slots[:need_size], self.free_slots[need_size:]
        return slots

    def free(self, indices: Any) -> None:
        self.free_slots = torch.cat((self.free_slots, indices))


def on(system: Any, **options: Any) -> Instrument:
    return instrument(system.cache, system.allocator, system.rows, **options)


def bench() -> Bench:
    return Bench(kvspec.oracle, lambda *_, **__: None)


def kinds(error: MemoryLeakError) -> list[tuple[str, int | None]]:
    return [(report.kind, report.page) for report in error.reports]


def test_a_host_page_that_nobody_names_is_an_orphan() -> None:
    stranger, host = Stranger(), NextTier(4)
    stranger.cache.cache_finished_req(stranger.start([1, 2, 3, 4]))
    (node,) = stranger.cache.root_node.children.values()
    with on(stranger, host=host) as looking:
        node.host_value = host.alloc(PAGE)
        looking.check()
        assert looking.owner(0, "host").kind == "reserved"
        assert "alloc_host" in looking.history(0, "host")[0]
        node.host_value = None
        with pytest.raises(MemoryLeakError) as caught:
            looking.check()
        assert kinds(caught.value) == [("host orphan", 0)]
        (report,) = caught.value.reports
        assert report.lost_by is not None
        assert report.lost_by.name == "alloc_host"
        host.free(torch.arange(PAGE))
        looking.check()
        host.free(torch.arange(PAGE))
        assert [(report.kind, report.pool) for report in looking.reports] == [
            ("double free", "token_to_kv_pool_host")
        ]
    assert "alloc" not in vars(host)


def test_a_page_with_a_copy_in_flight_is_nobody_elses() -> None:
    stranger = Stranger()
    with on(stranger) as looking:
        req = stranger.start([1, 2, 3, 4])
        with looking.copying([4, 5]):
            assert looking.owner(1).kind == "copy"
            looking.check()
            with pytest.raises(MemoryLeakError):
                looking.check(idle=True)
        assert looking.owner(1).kind == "request"
        with looking.copying([4, 5]):
            stranger.allocator.free([4, 5, 6, 7])
        assert [(report.kind, report.page) for report in looking.reports] == [("use after free", 1)]
        assert req.req_pool_idx == 0


def test_poison_fills_what_nobody_may_read() -> None:
    system, kv = bench(), torch.zeros((PAGES + 1) * PAGE, 2)
    poison = Poison([kv], PAGE)
    with on(system, poison=poison) as looking:
        slots = system.allocator.alloc(PAGE)
        assert [stale.why for stale in poison.stale(kv[slots])] == ["fresh"] * PAGE
        kv[slots] = 1.0
        looking.check()
        system.allocator.free(slots)
        assert [stale.why for stale in poison.stale(kv[slots])] == ["freed"] * PAGE
        looking.check(idle=True)
        kv[slots[0]] = 2.0
        with pytest.raises(MemoryLeakError, match="POISON-3") as caught:
            looking.check()
        assert kinds(caught.value) == [("use after free", 1)]


@pytest.mark.parametrize("level", ["off", "counts", "sets"])
def test_poison_fills_at_any_level(level: Any) -> None:
    system, kv = bench(), torch.zeros((PAGES + 1) * PAGE, 2)
    with on(system, level=level, poison=Poison([kv], PAGE)):
        slots = system.allocator.alloc(PAGE)
        assert kv[slots].isnan().all()


def test_an_instrument_says_what_it_is_in_a_debugger() -> None:
    looking = on(bench())
    assert repr(looking) == "<Instrument at ledger, 0 reports>"
    looking.detach()
    assert repr(looking) == "<Instrument detached, 0 reports>"


def test_what_a_row_got_past_the_calls_is_read_when_the_cache_has_it() -> None:
    """As a kernel writes it."""
    stranger = Stranger()
    with on(stranger) as looking:
        (row,) = stranger.rows.alloc(1) or [-1]
        slots = stranger.allocator.alloc(2 * PAGE)
        assert slots is not None
        stranger.rows.req_to_token[row, : PAGE + 1] = slots[: PAGE + 1]
        stranger.cache.inc_lock_ref(stranger.cache.root_node)
        req = kvspec_request([1, 2, 3, 4, 5], row, stranger.cache.root_node)
        stranger.cache.cache_finished_req(req)
        assert looking.reports == []
        looking.check(idle=True)
        assert looking.owner(1).kind == "tree"


def kvspec_request(tokens: list[int], row: int, node: Any) -> Any:
    from kvspec.conformance.instrumentation.stranger import StrangersRequest

    return StrangersRequest(tokens, row, node)


def test_a_forgotten_tree_is_a_leak_of_the_reset() -> None:
    stranger = Stranger()

    def reset() -> None:
        stranger.cache.root_node.children.clear()

    vars(stranger.cache)["reset"] = reset
    with on(stranger) as looking:
        stranger.cache.cache_finished_req(stranger.start([1, 2, 3, 4]))
        vars(stranger.cache)["reset"]()
        with pytest.raises(MemoryLeakError) as caught:
            looking.check()
    (report,) = caught.value.reports
    assert (report.kind, report.page, report.last_owner) == ("leak", 1, "tree")
    assert report.lost_by is not None
    assert report.lost_by.name == "reset"


def test_a_free_in_between_is_lost_by_restoring_the_state() -> None:
    """SE-20: what was given back after the ticket is in no list any more."""
    stranger = Stranger()
    with on(stranger) as looking:
        slots = stranger.allocator.alloc(PAGE)
        ticket = stranger.allocator.backup_state()
        stranger.allocator.alloc(2 * PAGE)
        stranger.allocator.free(slots)
        stranger.allocator.restore_state(ticket)
        assert looking.owner(2).kind == "free"
        with pytest.raises(MemoryLeakError) as caught:
            looking.check()
        assert kinds(caught.value) == [("leak", 1)]


def test_nobody_holds_a_lock_from_before_that_was_given_back() -> None:
    """Its path may be evicted then, and is no lock on what is not in the tree."""
    system = bench()
    running = system.busy()
    system.cache.cache_unfinished_req(running)
    with on(system) as looking:
        looking.level = "off"
        looking.level = "ledger"
        looking.check()
        system.finish(running)
        looking.check(idle=True)
        system.cache.evict(PAGES * PAGE)
        looking.check(idle=True)
        assert looking.reports == []


def test_there_is_no_owner_without_a_ledger() -> None:
    system = bench()
    with (
        on(system, level="sets") as looking,
        pytest.raises(ContractError, match="INSTR-6: there is no ledger at level sets"),
    ):
        looking.owner(1)


@pytest.mark.parametrize("page_size", [1, PAGE])
@pytest.mark.parametrize("impl", [kvspec.oracle, kvspec], ids=["oracle", "native"])
def test_the_ledger_counts_window_pages_as_the_allocator_does(impl: Any, page_size: int) -> None:
    memory: dict[str, Any] = {"dtype": torch.float16, "device": "cpu", "kvcache": None}
    allocator = impl.SWATokenToKVPoolAllocator(
        size=64, size_swa=32, need_sort=False, page_size=page_size, **memory
    )
    rows = impl.ReqToTokenPool(size=2, max_context_len=32, device="cpu", enable_memory_saver=False)
    cache = impl.SWARadixCache(
        req_to_token_pool=rows,
        token_to_kv_pool_allocator=allocator,
        sliding_window_size=2 * PAGE,
        page_size=page_size,
    )
    with instrument(cache, allocator, rows) as looking:

        def compare() -> None:
            assert looking.ledger is not None
            counts, books = looking.ledger.counts("swa"), allocator.view().swa
            assert (counts["free"], counts["pending"]) == (len(books.free), len(books.pending))
            assert counts["reserved"] == len(books.held)

        slots = allocator.alloc_extend([0], [6], [-1], 6)
        compare()
        for length in range(7, 3 * PAGE + 1):
            slot = allocator.alloc_decode([length], [int(slots[-1])])
            slots = torch.cat((slots, slot))
            compare()
        allocator.free_swa(slots[:page_size])
        compare()
        allocator.free_group_begin()
        allocator.free(slots[page_size : 2 * page_size], slots[2 * page_size : 3 * page_size])
        compare()
        allocator.free_group_end()
        compare()
        ticket = allocator.backup_state()
        allocator.alloc(2 * page_size)
        compare()
        allocator.restore_state(ticket)
        compare()
        assert looking.reports == []
        assert not looking.blind


@pytest.mark.parametrize("impl", [kvspec.oracle, kvspec], ids=["oracle", "native"])
@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.allocator.alloc("x"),
        lambda s: s.allocator.free(5),
        lambda s: s.allocator.free([1.5]),
        lambda s: s.allocator.free_swa(None),
        lambda s: s.allocator.alloc_extend(1, 2, 3, 4),
        lambda s: s.allocator.restore_state(7),
        lambda s: s.rows.write(1, 2),
        lambda s: s.rows.write((9, slice(0, 1)), [1]),
        lambda s: s.rows.free("x"),
        lambda s: s.cache.cache_finished_req(None),
        lambda s: s.cache.cache_unfinished_req(object()),
        lambda s: s.cache.match_prefix(3.5),
        lambda s: s.cache.insert([1], [1, 2]),
        lambda s: s.cache.inc_lock_ref("node"),
        lambda s: s.cache.dec_lock_ref(12),
        lambda s: s.cache.evict(-1),
    ],
)
def test_nonsense_is_refused_by_whom_it_is_given_and_recorded(impl: Any, call: Any) -> None:
    system, recorder = WindowBench(impl, lambda *_, **__: None), FlightRecorder()
    plain = WindowBench(impl, lambda *_, **__: None)
    with pytest.raises((ValueError, TypeError, AttributeError)) as expected:
        call(plain)
    with on(system, record=recorder) as looking:
        with pytest.raises(type(expected.value)):
            call(system)
        assert not looking.blind
        assert looking.reports == []
    assert recorder.events()[-1].error.startswith(type(expected.value).__name__)
