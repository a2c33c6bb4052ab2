"""Who owns the pages of a window pool, and what level counts says of both pools."""

import pytest

from kvspec.conformance import clause
from kvspec.conformance.memory_checker.bench import (
    PAGE,
    PAGES,
    CheckerConformance,
    Doctored,
    WindowBench,
    WindowChunkBench,
)
from kvspec.errors import MemoryLeakError

__all__ = ["WindowConformance"]


class WindowConformance(CheckerConformance):
    """CHECK-9 to CHECK-12."""

    @clause("CHECK-6", "CHECK-9", "CHECK-10", "CHECK-11", "CHECK-12")
    @pytest.mark.parametrize("kind", [WindowBench, WindowChunkBench])
    @pytest.mark.parametrize("level", ["sets", "counts"])
    def test_every_step_with_windows_passes(self, level: str, kind: type[WindowBench]) -> None:
        bench = self.windows(kind)
        bench.passes(level)
        first = bench.start([1, 2, 3, 4, 5, 6, 7, 8])
        bench.passes(level)
        bench.advance(first, 4)
        assert len(bench.allocator.view().pairs) == 2
        bench.passes(level)
        second = bench.start([1, 2, 3, 4, 5, 6, 7, 8, 9])
        bench.passes(level)
        bench.finish(first)
        bench.passes(level)
        bench.cache.cache_unfinished_req(second)
        bench.passes(level)
        bench.advance(second, 5)
        bench.passes(level)
        bench.finish(second)
        bench.passes(level)
        for count in ((0, PAGE), (PAGE, 0)) if kind is WindowBench else ():
            bench.cache.evict(*count)
            bench.passes(level)

    @clause("CHECK-6", "CHECK-9")
    def test_pending_window_pages_have_an_owner(self) -> None:
        bench = self.windows()
        req = bench.start([1, 2, 3, 4, 5, 6, 7, 8])
        bench.allocator.free_group_begin()
        bench.advance(req, 4)
        assert bench.allocator.view().swa.pending == (1,)
        bench.passes()
        bench.finish(req)
        bench.passes()
        bench.allocator.free_group_end()
        bench.passes()

    @clause("CHECK-9")
    def test_a_held_page_without_owner_is_a_deficit_of_both_pools(self) -> None:
        bench = self.windows()
        bench.busy()
        slots = bench.allocator.alloc(2 * PAGE)
        bench.allocator.free_swa(slots[:PAGE])
        assert bench.faults() == [
            "CHECK-1: page 4 of the full pool of token_to_kv_pool_allocator"
            " is held and has no owner",
            "CHECK-1: page 5 of the full pool of token_to_kv_pool_allocator"
            " is held and has no owner",
            "CHECK-9, CHECK-1: page 5 of the window pool of token_to_kv_pool_allocator"
            " is held and has no owner",
        ]
        bench.passes(reserved=slots.tolist())

    @clause("CHECK-9")
    def test_a_window_page_that_is_no_pair_is_a_deficit(self) -> None:
        bench = self.windows()
        req = bench.start([1, 2, 3, 4, 5, 6, 7, 8])
        bench.allocator = Doctored(bench.allocator, pairs=((2, 2),))
        bench.rows.write((req.req_pool_idx, slice(8, 12)), bench.allocator.alloc(PAGE))
        assert bench.faults()[:2] == [
            "CHECK-9, CHECK-1: page 1 of the window pool of token_to_kv_pool_allocator"
            " is held and has no owner",
            "CHECK-9, CHECK-1: page 3 of the window pool of token_to_kv_pool_allocator"
            " is held and has no owner",
        ]

    @clause("CHECK-9")
    def test_a_pair_of_two_pages_is_a_surplus(self) -> None:
        bench = self.windows()
        bench.busy()
        bench.allocator = Doctored(bench.allocator, pairs=((1, 1), (2, 2), (3, 2), (7, 1)))
        assert bench.faults() == [
            "CHECK-9, CHECK-2: page 1 of the window pool of token_to_kv_pool_allocator"
            " has 2 owners: tree with page 1; free with page 7",
            "CHECK-9, CHECK-2: page 2 of the window pool of token_to_kv_pool_allocator"
            " has 2 owners: tree with page 2; the request in row 1 with page 3"
            " (row 1 names it from position 4 on)",
            "CHECK-9, CHECK-1: page 3 of the window pool of token_to_kv_pool_allocator"
            " is held and has no owner",
        ]

    @clause("CHECK-9")
    def test_a_stale_pair_owns_nothing(self) -> None:
        bench = self.windows()
        slots = bench.allocator.alloc(2 * PAGE).tolist()
        bench.allocator.free(slots[:PAGE])
        bench.allocator = Doctored(bench.allocator, pairs=((1, 1), (2, 2), (3, 6)))
        assert bench.faults(reserved=slots[PAGE:]) == [
            f"CHECK-9, CHECK-2: page {page} of the window pool of token_to_kv_pool_allocator"
            f" has 2 owners: free; free with page {full}"
            for page, full in ((1, 1), (6, 3))
        ]

    @clause("CHECK-9")
    def test_an_alias_in_the_full_pool_is_one_in_the_window_pool(self) -> None:
        bench = self.windows()
        bench.start([1, 2, 3, 4])
        other = bench.start([5, 6, 7, 8, 9])
        bench.rows.write((other.req_pool_idx, slice(0, 4)), [4, 5, 6, 7])
        owners = "has 2 owners: the request in row 0{0}; the request in row 1{0}"
        assert bench.faults() == [
            "CHECK-2: page 1 of the full pool of token_to_kv_pool_allocator " + owners.format(""),
            "CHECK-1: page 2 of the full pool of token_to_kv_pool_allocator is held"
            " and has no owner",
            "CHECK-9, CHECK-2: page 1 of the window pool of token_to_kv_pool_allocator "
            + owners.format(" with page 1"),
            "CHECK-9, CHECK-1: page 2 of the window pool of token_to_kv_pool_allocator is held"
            " and has no owner",
        ]

    @clause("CHECK-10")
    def test_a_page_without_the_pair_that_the_tree_counts_on_is_named(self) -> None:
        bench = self.windows()
        bench.busy()
        bench.allocator.free_swa([8])
        assert bench.faults() == [
            "CHECK-10: page 2 of the full pool of token_to_kv_pool_allocator"
            " is live in the tree, but has no pair"
        ]

    @clause("CHECK-10")
    def test_a_tombstone_with_a_pair_is_named(self) -> None:
        bench = self.windows()
        bench.finish(bench.start([1, 2, 3, 4, 5, 6, 7, 8]))
        slots = bench.allocator.alloc(PAGE).tolist()
        bench.cache.evict(0, PAGE)
        bench.passes(reserved=slots)
        bench.allocator.move_swa([4], slots[:1])
        assert bench.faults(reserved=slots) == [
            "CHECK-10: page 1 of the full pool of token_to_kv_pool_allocator"
            " is a tombstone of the tree, but has page 3 of the window pool",
        ]

    @clause("CHECK-11")
    @pytest.mark.parametrize("kind", [WindowBench, WindowChunkBench])
    def test_a_page_that_the_next_token_reads_must_have_its_pair(
        self, kind: type[WindowBench]
    ) -> None:
        bench = self.windows(kind)
        bench.start([1, 2, 3, 4, 5, 6, 7, 8, 9])
        bench.allocator.free_swa([4])
        bench.passes()
        bench.allocator.free_swa([8])
        if kind is WindowChunkBench:
            bench.passes()
            return
        assert bench.faults() == [
            "CHECK-11: row 0 of req_to_token_pool has page 2 at position 4,"
            " in the window of the next token, but it has no pair"
        ]

    @clause("CHECK-12")
    def test_counts_of_two_pools_raise_the_message_of_the_source(self) -> None:
        bench = self.windows()
        bench.busy()
        bench.allocator.free_swa([8])
        message = (
            "token_to_kv_pool_allocator memory leak detected! full_tokens_per_layer=32,"
            " full_available_size=20, full_evictable_size=4, full_protected_size=4,"
            " full_owned_size=4\n"
            "swa_tokens_per_layer=24, swa_available_size={}, swa_evictable_size=4,"
            " swa_protected_size=4, swa_owned_size={}\n"
        )
        with pytest.raises(ValueError, match="token_to_kv_pool_allocator") as caught:
            bench.check("counts")
        assert str(caught.value) == message.format(16, 4)
        bench.allocator.free_swa([12])
        with pytest.raises(ValueError, match="token_to_kv_pool_allocator") as caught:
            bench.check("counts")
        assert str(caught.value) == message.format(20, 0)

    @clause("CHECK-12")
    def test_counts_find_what_only_one_pool_has_lost(self) -> None:
        bench = self.windows()
        slots = bench.allocator.alloc(2 * PAGE).tolist()
        bench.passes("counts", reserved=slots)
        bench.allocator.free_swa(slots[:1])
        bench.passes("counts", reserved=slots)
        with pytest.raises(MemoryLeakError, match=r"full_owned_size=4(.|\n)*swa_owned_size=4"):
            bench.check("counts", reserved=slots[PAGE:])
        with pytest.raises(MemoryLeakError, match=r"full_owned_size=4(.|\n)*swa_owned_size=0"):
            bench.check("counts", reserved=slots[:PAGE])

    @clause("CHECK-12")
    def test_a_row_that_names_no_slot_of_the_pool_is_counted(self) -> None:
        bench = self.windows()
        req = bench.start([1, 2, 3, 4])
        bench.rows.write((req.req_pool_idx, slice(4, 5)), [PAGES * PAGE + PAGE])
        with pytest.raises(MemoryLeakError, match=r"full_owned_size=8(.|\n)*swa_owned_size=4"):
            bench.check("counts")

    @clause("CHECK-12")
    @pytest.mark.parametrize("kind", [WindowBench, WindowChunkBench])
    def test_token_info_has_the_eight_numbers_of_the_source(self, kind: type[WindowBench]) -> None:
        bench, info = self.windows(kind), self.function("get_swa_token_info")
        bench.advance(bench.start([1, 2, 3, 4, 5, 6, 7, 8]), 4)
        tree = kind is WindowBench
        assert info(bench.allocator, bench.cache) == (12, 8, 12 / 32, 8 / 24, 20, 0, 16, 0)
        bench.finish(bench.reqs[0])
        expected = (0, 0, 0.0, 0.0, 24, 8, 20, 4) if tree else (0, 0, 0.0, 0.0, 32, 0, 24, 0)
        assert info(bench.allocator, bench.cache) == expected
        assert info(bench.allocator, bench.cache).swa_available_size == expected[6]
