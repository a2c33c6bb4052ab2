"""The memory checker, on both implementations' views, and on somebody else's objects."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvspec
import kvspec.memory_checker.self_test as room
import kvspec.oracle
from kvspec.cli import main
from kvspec.conformance import clause
from kvspec.conformance.memory_checker import MemoryCheckerConformance
from kvspec.conformance.memory_checker.bench import PAGE, Sealed
from kvspec.errors import ContractError, MemoryLeakError
from kvspec.instrumentation import instrument
from kvspec.interfaces.memory_checker import HistoryStep
from kvspec.interfaces.ownership_ledger import Fault, Owner
from kvspec.memory_checker import Report, counting, raise_faults, report_of
from needs import native
from peers import sglang
from sglang_engine import Engine


class TestOracle(MemoryCheckerConformance):
    impl = kvspec.oracle


@native
class TestNative(MemoryCheckerConformance):
    impl = kvspec


def test_an_unknown_level_is_refused() -> None:
    bench = TestOracle().bench()
    with pytest.raises(
        ContractError, match="CHECK-8: level is 'all', not one of off, counts, sets, ledger"
    ):
        bench.check("all")


def test_rows_for_requests_to_come_are_counted() -> None:
    rows = kvspec.oracle.DecodeReqToTokenPool(
        size=2, max_context_len=4, device="cpu", enable_memory_saver=False, pre_alloc_size=3
    )
    allocator = kvspec.oracle.TokenToKVPoolAllocator(
        size=4, dtype=torch.float16, device="cpu", kvcache=None, need_sort=False
    )
    cache = kvspec.oracle.ChunkCache(rows, allocator, 1)
    for level in ("counts", "sets"):
        kvspec.check_memory(allocator, rows, cache, level=level)
    rows.alloc(1)
    for level in ("counts", "sets"):
        with pytest.raises(kvspec.MemoryLeakError):
            kvspec.check_memory(allocator, rows, cache, level=level)


def test_level_ledger_needs_one() -> None:
    bench = TestOracle().bench()
    with pytest.raises(ContractError, match="CHECK-8: level ledger needs"):
        bench.check("ledger")
    with (
        instrument(bench.cache, bench.allocator, bench.rows, level="sets"),
        pytest.raises(ContractError, match="CHECK-8: level ledger needs"),
    ):
        bench.check("ledger")


def test_a_report_names_the_line_that_lost_the_page() -> None:
    bench = TestOracle().bench()
    with instrument(bench.cache, bench.allocator, bench.rows):
        (row,) = bench.rows.alloc(1)
        bench.rows.write((row, slice(0, PAGE)), bench.allocator.alloc(PAGE))
        bench.rows.free(row)
        with pytest.raises(kvspec.MemoryLeakError) as caught:
            bench.check("ledger")
    (report,) = caught.value.reports
    assert (report.kind, report.page, report.last_owner) == ("leak", 1, "the request in row 0")
    here = "test_a_report_names_the_line_that_lost_the_page"
    assert report.lost_by is not None
    assert report.lost_by.site.endswith(here)
    head, *history = str(caught.value).splitlines()
    assert head.startswith("CHECK-1: page 1 of token_to_kv_pool_allocator is held and has no owner")
    assert len(history) == len(report.history) == 3
    assert all(here in line for line in history)


RESERVED, TREE, FREE = Owner("reserved"), Owner("tree"), Owner("free")
SECOND = Owner("request", 2)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            Fault("leak", "full", 4, 2, 7, SECOND, Owner("request", -1)),
            "CHECK-1: page 4 of token_to_kv_pool_allocator was left behind when row 2 was given"
            " back; last owner: the request in row 2",
        ),
        (
            Fault("alias", "full", 4, -1, 7, TREE, RESERVED),
            "CHECK-2: page 4 of token_to_kv_pool_allocator was handed out, but was that of the"
            " tree; last owner: tree",
        ),
        (
            Fault("alias", "swa", 4, 3, 7, SECOND, Owner("request", 3)),
            "CHECK-9, CHECK-2: page 4 of the window pool of token_to_kv_pool_allocator was written"
            " to row 3, but was that of the request in row 2; last owner: the request in row 2",
        ),
        (
            Fault("use after free", "full", 4, 2, 7, FREE, TREE),
            "CHECK-15: page 4 of token_to_kv_pool_allocator was taken into the tree, but was free",
        ),
        (
            Fault("use after free", "host", 4, -1, 7, Owner("copy", 3), FREE),
            "CHECK-15: host page 4 of token_to_kv_pool_host was given back, but copy 3 of it was in"
            " flight; last owner: copy 3",
        ),
        (
            Fault("dangling row", "full", 4, 2, 7, SECOND, FREE),
            "CHECK-16: page 4 of token_to_kv_pool_allocator was given back, but row 2 still names"
            " it; last owner: the request in row 2",
        ),
        (
            Fault("dangling row", "full", 4, 2, 7, FREE, SECOND),
            "CHECK-16: page 4 of token_to_kv_pool_allocator was written to row 2, but was free",
        ),
        (
            Fault("dangling row", "rows", 2, 2, 7, FREE, RESERVED),
            "CHECK-4: row 2 of req_to_token_pool was written, but was free",
        ),
        (
            Fault("alias", "rows", 2, 2, 7, RESERVED, RESERVED),
            "CHECK-4: row 2 of req_to_token_pool was handed out, but was live already;"
            " last owner: reserved",
        ),
        (
            Fault("sentinel", "full", 0, 2, 7, FREE, FREE),
            "CHECK-18: page 0 of token_to_kv_pool_allocator is the sink, but was named by row 2",
        ),
    ],
    ids=lambda given: f"{given.kind} {given.pool}" if isinstance(given, Fault) else "",
)
def test_a_fault_of_a_ledger_becomes_a_sentence(fault: Fault, text: str) -> None:
    assert str(report_of(fault)) == text


def test_an_action_before_the_ledger_began_is_the_start() -> None:
    begun = HistoryStep(-1, "instrument", "", "tree")
    fault = Fault("use after free", "full", 4, -1, 7, FREE, TREE)
    known = SimpleNamespace(
        last_owner=lambda *_: None, lost_by=lambda *_: None, history=lambda *_: (begun,)
    )
    assert str(report_of(fault, known)).endswith("\n  start  instrument    -> tree")


def test_raising_nothing_raises_nothing() -> None:
    raise_faults([])


class TestCounting:
    """The counts, prepared for those who look after every step."""

    @pytest.mark.parametrize("kind", ["bench", "windows"])
    def test_it_says_what_level_counts_says(self, kind: str) -> None:
        bench = getattr(TestOracle(), kind)()
        check = counting(bench.allocator, bench.rows, bench.cache)
        check()
        req = bench.start([1, 2, 3, 4])
        check(reqs=[req])
        bench.allocator.free_group_begin()
        bench.finish(req)
        bench.allocator.free(bench.allocator.alloc(PAGE))
        check()
        slots = bench.allocator.alloc(PAGE).tolist()
        check(reserved=slots)
        with pytest.raises(kvspec.MemoryLeakError) as caught:
            check()
        with pytest.raises(kvspec.MemoryLeakError) as expected:
            bench.check("counts")
        assert str(caught.value) == str(expected.value)

    @clause("CHECK-8")
    def test_it_reads_the_sizes_alone(self) -> None:
        bench = TestOracle().bench()
        bench.finish(bench.start([1, 2, 3, 4]))
        sealed = map(Sealed, (bench.allocator, bench.rows, bench.cache))
        check = counting(*sealed)
        check()
        bench.rows.alloc(1)
        with pytest.raises(kvspec.MemoryLeakError, match="req_to_token_pool memory leak"):
            check()


class TestSglang:
    """SGLang 0.5.2 has no `view()`, and its own check knows no page."""

    def pools(self, page_size: int) -> tuple[Any, Any, Any]:
        peer = sglang()
        memory = {"dtype": torch.float16, "device": "cpu", "kvcache": None, "need_sort": False}
        allocator = peer.PagedTokenToKVPoolAllocator(
            size=8 * page_size, page_size=page_size, **memory
        )
        rows = peer.ReqToTokenPool(2, 32, "cpu", False)
        return allocator, rows, peer.RadixCache(rows, allocator, page_size=page_size)

    def test_a_leak_and_a_double_free_are_named_by_page(self) -> None:
        pools = self.pools(page_size=4)
        kvspec.check_memory(*pools, level="counts")
        kvspec.check_memory(*pools, level="sets")
        slots = pools[0].alloc(8)
        pools[0].free(torch.tensor([31]))
        with pytest.raises(kvspec.MemoryLeakError) as caught:
            kvspec.check_memory(*pools, level="sets")
        found = [(report.kind, report.page) for report in caught.value.reports]
        assert found == [("leak", 1), ("leak", 2), ("double free", 7)]
        pools[0].free_group_begin()
        pools[0].free(slots)
        with pytest.raises(kvspec.MemoryLeakError, match=r"available_size=28.*pending_size=8"):
            kvspec.check_memory(*pools, level="counts")

    def test_a_page_of_the_tree_that_is_free_is_used_after_free(self) -> None:
        pools = self.pools(page_size=1)
        pools[2].insert([1, 2, 3], pools[0].alloc(3))
        kvspec.check_memory(*pools, level="sets")
        pools[0].free(torch.tensor([2]))
        with pytest.raises(kvspec.MemoryLeakError) as caught:
            kvspec.check_memory(*pools, level="sets")
        assert [(r.kind, r.page) for r in caught.value.reports] == [("use after free", 2)]

    @pytest.mark.parametrize("page_size", [1, 4])
    def test_its_requests_own_their_pages(self, page_size: int) -> None:
        engine = Engine(sglang(), sglang().RadixCache, page_size)
        engine.finish(engine.start([*range(8)]))
        req = engine.start([*range(13)])
        pools = engine.allocator, engine.pool, engine.cache
        reserved = req.spare if page_size == 1 else ()
        for level in ("counts", "sets"):
            kvspec.check_memory(*pools, reqs=[req], reserved=reserved, level=level)
        engine.pool.req_to_token[req.req_pool_idx, 12] = engine.pool.req_to_token[0, 8]
        lost = 13 if page_size == 1 else 4
        with pytest.raises(kvspec.MemoryLeakError, match=rf"CHECK-1: page {lost} of"):
            kvspec.check_memory(*pools, reqs=[req], reserved=reserved, level="sets")


class TestCommand:
    """`kvspec check`."""

    @pytest.fixture(autouse=True)
    def _few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        few = [
            s for s in room.settings() if s.page_size == 4 and s.busy and s.group and s.need_sort
        ]
        monkeypatch.setattr(room, "settings", lambda: few)

    def test_it_says_what_it_is_for(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check"]) == 0
        assert "kvspec check --self-test" in capsys.readouterr().out

    def test_a_table_says_that_all_was_found(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--self-test", "--impl", "oracle"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for told in (
            "Paged, 4",
            "SWA, 4",
            "SWARadixCache, disabled",
            "all found",
            "no false alarm",
        ):
            assert told in out

    def test_json_has_every_result(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["check", "--self-test", "--impl", "oracle", "--json"]
        assert main([*given, "-"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["impl"], told["missed"]) == ("oracle", 0)
        kinds = {result["planted"] for result in told["results"]}
        assert kinds == {"nothing", *room.PLANTS}
        assert main([*given, str(tmp_path / "found.json")]) == 0
        assert json.loads((tmp_path / "found.json").read_text()) == told

    def test_a_miss_is_told_and_fails(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def blind(*pools: Any, **options: Any) -> None:
            """See nothing."""

        options: Any = room.self_test.__kwdefaults__
        monkeypatch.setitem(options, "check", blind)
        assert main(["check", "--self-test", "--impl", "oracle"]) == 1
        out = capsys.readouterr().out
        assert "missed" in out
        assert "0 of " in out
        assert "reported" in out


def test_the_text_of_many_faults_has_the_histories_of_the_first() -> None:
    steps = (HistoryStep(1, "alloc", "engine.py:1 run", "reserved"),)
    reports = [
        Report(
            kind="leak",
            clauses=("CHECK-1",),
            pool="pool",
            page=page,
            what=f"page {page}",
            history=steps,
        )
        for page in range(1, 31)
    ]
    with pytest.raises(MemoryLeakError) as caught:
        raise_faults(reports)
    lines = str(caught.value).splitlines()
    assert len(lines) == 50
    assert lines[-1] == "CHECK-1: page 30"
    assert all(report.history == steps for report in caught.value.reports)
