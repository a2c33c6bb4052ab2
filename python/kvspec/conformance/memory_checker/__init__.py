"""Conformance of the memory checker: faults are planted, and must be named. Spec: CHECK."""

import pytest

from kvspec.conformance import clause
from kvspec.conformance.memory_checker.bench import PAGE, PAGES, Sealed
from kvspec.conformance.memory_checker.reports import ReportConformance
from kvspec.conformance.memory_checker.self_test import SelfTestConformance
from kvspec.conformance.memory_checker.windows import WindowConformance
from kvspec.errors import MemoryLeakError

__all__ = ["MemoryCheckerConformance"]


class MemoryCheckerConformance(ReportConformance, SelfTestConformance, WindowConformance):
    """`impl` may hold a `check_memory` of its own."""

    @clause("CHECK-6")
    @pytest.mark.parametrize("level", ["sets", "counts"])
    def test_every_step_of_a_request_passes(self, level: str) -> None:
        bench = self.bench()
        bench.passes(level)
        first = bench.start([1, 2, 3, 4, 5, 6])
        bench.passes(level)
        bench.cache.cache_unfinished_req(first)
        bench.passes(level)
        second = bench.start([1, 2, 3, 4, 7, 8, 9])
        bench.passes(level)
        bench.finish(first)
        bench.passes(level)
        bench.finish(second)
        bench.passes(level)
        bench.cache.evict(PAGE)
        bench.passes(level)

    @clause("CHECK-6")
    def test_pending_pages_have_an_owner(self) -> None:
        bench = self.bench()
        req = bench.busy()
        bench.allocator.free_group_begin()
        bench.finish(req)
        assert bench.allocator.view().pending == (3,)
        bench.passes()
        bench.allocator.free_group_end()
        bench.passes()

    @clause("CHECK-6")
    @pytest.mark.parametrize("level", ["sets", "counts"])
    def test_reserved_pages_have_an_owner(self, level: str) -> None:
        bench = self.bench()
        slots = bench.allocator.alloc(2 * PAGE).tolist()
        bench.passes(level, reserved=slots)
        with pytest.raises(MemoryLeakError):
            bench.check(level, reserved=slots[:PAGE])

    @clause("CHECK-1")
    def test_a_held_page_without_owner_is_a_deficit(self) -> None:
        bench = self.bench()
        bench.busy()
        bench.allocator.alloc(2 * PAGE)
        assert bench.faults() == [
            "CHECK-1: page 4 of token_to_kv_pool_allocator is held and has no owner",
            "CHECK-1: page 5 of token_to_kv_pool_allocator is held and has no owner",
        ]

    @clause("CHECK-2")
    def test_a_page_with_two_owners_is_a_surplus(self) -> None:
        bench = self.bench()
        bench.busy()
        bench.allocator.free([4, 12])
        assert bench.faults() == [
            "CHECK-15, CHECK-2: page 1 of token_to_kv_pool_allocator has 2 owners: free; tree",
            "CHECK-16, CHECK-2: page 3 of token_to_kv_pool_allocator has 2 owners:"
            " free; the request in row 1 (row 1 names it from position 4 on)",
        ]

    @clause("CHECK-2")
    def test_all_owners_are_named(self) -> None:
        bench = self.bench()
        bench.busy()
        other = bench.start([7])
        bench.rows.write((other.req_pool_idx, slice(0, 9)), [4, 5, 6, 7, 12, 13, 14, 15, 16])
        bench.allocator.free_group_begin()
        bench.allocator.free([4])
        owners = (
            "page 1 of token_to_kv_pool_allocator has 3 owners: pending; tree; the request in row 2"
        )
        assert bench.faults() == [
            f"CHECK-15, CHECK-2: {owners}",
            f"CHECK-16, CHECK-2: {owners} (row 2 names it from position 0 on)",
            "CHECK-2: page 3 of token_to_kv_pool_allocator has 2 owners:"
            " the request in row 1; the request in row 2",
        ]

    @clause("CHECK-2")
    def test_a_page_twice_in_a_row_has_two_owners(self) -> None:
        bench = self.bench()
        req = bench.start([1, 2, 3, 4])
        bench.rows.write((req.req_pool_idx, slice(0, 8)), [4, 5, 6, 7, 4, 5, 6, 7])
        (fault,) = bench.faults()
        assert fault.endswith("has 2 owners: the request in row 0; the request in row 0")

    @clause("CHECK-2", "CHECK-18")
    @pytest.mark.parametrize(
        ("slot", "why"),
        [
            (PAGES * PAGE + PAGE, "page 9 of {} is outside the pool, 1 .. 8"),
            (1, "page 0 of {} is the sink"),
        ],
    )
    def test_a_page_that_is_no_page_of_the_pool_is_a_surplus(self, slot: int, why: str) -> None:
        bench = self.bench()
        req = bench.start([1, 2, 3, 4])
        bench.rows.write((req.req_pool_idx, slice(4, 5)), [slot])
        assert bench.faults() == [
            f"CHECK-18, CHECK-2: {why.format('token_to_kv_pool_allocator')}, but is in circulation:"
            " the request in row 0"
        ]

    @clause("CHECK-3")
    def test_a_protected_slot_that_is_not_the_trees_is_named(self) -> None:
        bench = self.bench()
        req = bench.busy()
        bench.rows.write((req.req_pool_idx, slice(2, 3)), [11])
        assert bench.faults() == [
            "CHECK-3: row 1 of req_to_token_pool has slot 11 at position 2,"
            " but the tree has 6 on the path of its lock"
        ]

    @clause("CHECK-3")
    def test_a_protected_length_without_a_lock_is_named(self) -> None:
        bench = self.bench()
        req = bench.busy()
        bench.cache.dec_lock_ref(req.lock_receipt)
        req.lock_receipt = None
        assert bench.faults() == [
            "CHECK-3: row 1 of req_to_token_pool has slot 4 at position 0,"
            " but the tree has None on the path of its lock"
        ]

    @clause("CHECK-4")
    def test_a_row_without_request_and_a_request_without_row_are_named(self) -> None:
        bench = self.bench()
        req = bench.start([])
        bench.rows.alloc(1)
        bench.rows.free(req.req_pool_idx)
        assert bench.faults() == [
            "CHECK-4: row 0 of req_to_token_pool is named by a request, but is not live",
            "CHECK-4: row 1 of req_to_token_pool is live and belongs to 0 requests",
        ]

    @clause("CHECK-4")
    def test_two_requests_in_one_row_are_named(self) -> None:
        bench = self.bench()
        bench.reqs.append(bench.start([]))
        assert bench.faults() == [
            "CHECK-4: row 0 of req_to_token_pool is live and belongs to 2 requests"
        ]

    @clause("CHECK-5")
    def test_counts_that_differ_raise_the_messages_of_the_source(self) -> None:
        bench = self.bench()
        bench.busy()
        slots = bench.allocator.alloc(PAGE)
        with pytest.raises(ValueError, match="token_to_kv_pool_allocator memory leak") as caught:
            bench.check("counts")
        assert str(caught.value) == (
            "token_to_kv_pool_allocator memory leak detected! max_total_num_tokens=32,"
            " available_size=16, evictable_size=4, protected_size=4, owned_size=4\n"
        )
        bench.allocator.free(slots)
        bench.passes("counts")
        bench.rows.alloc(2)
        with pytest.raises(ValueError, match="req_to_token_pool memory leak") as caught:
            bench.check("counts")
        assert str(caught.value) == (
            "req_to_token_pool memory leak detected!available_size=0, total_size=3, owned_size=1\n"
        )

    @clause("CHECK-5")
    def test_counts_find_a_request_whose_row_was_freed(self) -> None:
        bench = self.bench()
        req = bench.start([])
        bench.rows.free(req.req_pool_idx)
        with pytest.raises(ValueError, match="req_to_token_pool memory leak detected!"):
            bench.check("counts")

    @clause("CHECK-7")
    def test_one_report_has_every_fault(self) -> None:
        bench = self.bench()
        req = bench.busy()
        bench.allocator.alloc(PAGE)
        bench.allocator.free([8])
        bench.rows.write((req.req_pool_idx, slice(0, 2)), [7, 6])
        bench.rows.alloc(1)
        starts = [fault[: fault.index(" of ")] for fault in bench.faults()]
        surplus = "CHECK-15, CHECK-2: page 2"
        assert starts == [surplus, "CHECK-1: page 4", "CHECK-3: row 1", "CHECK-4: row 2"]

    @clause("CHECK-8")
    def test_off_looks_at_nothing_and_counts_at_sizes(self) -> None:
        bench = self.bench()
        bench.busy()
        bench.allocator, bench.rows, bench.cache = map(
            Sealed, (bench.allocator, bench.rows, bench.cache)
        )
        bench.passes("counts")
        bench.allocator = bench.rows = bench.cache = None
        bench.check("off")
