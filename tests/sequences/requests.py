"""Sequences of requests: what their rows name, what they own, what they leave."""

from typing import Any

import pytest

from kvspec.conformance.suite import Conformance
from kvspec.errors import ContractError
from sequences.engine import Engine, numbers, refused
from sequences.report import report

__all__ = ["Requests"]


class Requests(Conformance):
    """A request takes what it needs and gives back all that it took."""

    @report("SEED-2", "MINI-142", clause="CACHE-2")
    def test_a_row_is_redirected_before_its_duplicates_are_freed(self) -> None:
        engine = Engine(self.impl, page_count=80)
        tokens = list(range(32))
        first, second = engine.admit(tokens), engine.admit(tokens)
        for req in (first, second):
            engine.compute(req, 32)
        for req in (first, second):
            engine.chunk(req, 32)

        rest = engine.keep(engine.allocator.alloc(engine.allocator.available_size()))

        assert engine.row(first) == engine.row(second) == numbers(second.prefix_indices)
        assert not set(engine.row(second)) & set(rest)
        engine.settle()

    @report("SE-01", clause="CACHE-2")
    def test_a_chunk_that_ends_in_mid_page_meets_that_page_cached(self) -> None:
        engine = Engine(self.impl, page_size=4)
        req = engine.admit(list(range(9)))
        engine.chunk(req, 6)
        assert engine.serve(list(range(8))) == 4

        engine.chunk(req, 8)

        tree = engine.cache.match_prefix(req.tokens, touch=False).device_indices
        assert engine.row(req) == numbers(tree)
        engine.settle()
        engine.sample(req, 0)
        engine.settle()

    @report("JAX-1147", "SG-31616", clause="CACHE-4")
    @pytest.mark.parametrize("allocated", [9, 10, 12, 13, 17])
    def test_draft_slots_beyond_the_committed_come_back(self, allocated: int) -> None:
        engine = Engine(self.impl, page_size=4)
        req = engine.admit(list(range(9)))
        engine.compute(req, allocated)

        engine.sample(req)

        assert engine.cached(list(range(9))) == 8
        assert engine.allocator.available_size() == 14 * 4
        engine.settle()

    @report("SG-24745", clause="CACHE-4")
    def test_the_last_sampled_token_is_not_cached(self) -> None:
        engine = Engine(self.impl)
        req = engine.admit([1, 2, 3])
        engine.compute(req, 6)
        engine.sample(req, 4, 5)

        assert engine.cached([1, 2, 3, 4, 5]) == 4
        engine.settle()

    @report("SG-10871", clause="CACHE-4")
    @pytest.mark.parametrize("output", [(), (7,)])
    def test_a_request_that_ends_in_its_first_step_frees_its_row(self, output: Any) -> None:
        engine = Engine(self.impl, row_count=1)
        for _ in range(3):
            engine.sample(engine.admit([1, 2, 3]), *output)
            assert engine.pool.available_size() == 1
        engine.settle()

    @report("SG-1858", clause="CACHE-2")
    def test_four_chunks_hold_one_lock(self) -> None:
        engine = Engine(self.impl, page_size=2)
        req = engine.admit(list(range(12)))
        for stop in (3, 6, 8, 11):
            engine.cache.match_prefix(req.tokens[:stop])
            engine.chunk(req, stop)
            assert engine.cache.view().receipts == ((None, tuple(range(stop - stop % 2))),)
            engine.settle()

        engine.sample(req, 0)

        assert engine.cache.protected_size() == 0
        engine.settle()

    @report("JAX-971", "SEED-9", clause="CACHE-5")
    def test_a_chunk_after_the_finish_is_refused(self) -> None:
        engine = Engine(self.impl, page_size=2)
        req = engine.admit(list(range(8)))
        engine.chunk(req, 4)
        row = req.req_pool_idx
        engine.compute(req, 8)
        engine.sample(req)

        req.req_pool_idx, req.fill_ids = row, req.tokens
        refused(engine, "CACHE-5", engine.cache.cache_unfinished_req, req)
        refused(engine, "CACHE-5", engine.cache.cache_finished_req, req)

        engine.settle()

    @report("SG-29471", clause="CACHE-5")
    def test_a_request_that_lost_its_lock_is_refused(self) -> None:
        engine = Engine(self.impl)
        req = engine.admit([1, 2, 3, 4])
        engine.chunk(req, 3)
        engine.compute(req, 4)
        receipt, req.lock_receipt = req.lock_receipt, None

        refused(engine, "CACHE-5", engine.cache.cache_unfinished_req, req)

        req.lock_receipt = receipt
        engine.chunk(req, 4)
        engine.settle()

    @report("SG-37494", clause="CACHE-4")
    def test_a_request_that_never_matched_has_no_lock_to_drop(self) -> None:
        engine = Engine(self.impl)
        req = engine.admit([1, 2, 3])
        assert req.lock_receipt is None

        engine.sample(req, 4)

        assert engine.cache.protected_size() == 0
        engine.settle()

    @report("JAX-982", clause="SLOT-5")
    def test_what_the_finish_gave_back_is_not_freed_again(self) -> None:
        engine = Engine(self.impl)
        req = engine.admit([1, 2, 3])
        engine.compute(req, 5)
        late = engine.row(req)[4:]
        engine.sample(req, 4)

        refused(engine, "SLOT-5", engine.allocator.free, late)

        engine.settle()

    @report("SG-28754", clause="CACHE-5")
    def test_more_committed_than_allocated_is_refused(self) -> None:
        engine = Engine(self.impl)
        req = engine.admit([1, 2, 3])
        engine.compute(req, 3)
        req.output_ids = [4, 5]

        refused(engine, "CACHE-5", engine.cache.cache_finished_req, req)

        req.output_ids = [4]
        engine.sample(req)
        engine.settle()

    @report("SG-40681", clause="CACHE-2")
    def test_a_match_after_caching_covers_what_was_cached(self) -> None:
        engine = Engine(self.impl, page_size=4)
        req = engine.admit(list(range(8)))
        engine.chunk(req, 8)

        assert engine.cached(req.tokens) == req.cache_protected_len == 8
        assert engine.cache.evict(64) == 0

        engine.sample(req, 9)
        assert engine.cached(list(range(8))) == 8
        engine.settle()

    @report("SG-26972", "SEED-12", clause="REQ-7")
    def test_a_row_does_not_spill_into_its_neighbour(self) -> None:
        engine = Engine(self.impl, width=8)
        left, right = engine.admit([1] * 7), engine.admit([2] * 7)
        for req in (left, right):
            engine.compute(req, 7)
        more = engine.keep(engine.allocator.alloc(2))

        refused(engine, "REQ-7", engine.pool.write, (left.req_pool_idx, slice(7, 9)), more)

        assert len(engine.row(right)) == 7
        engine.settle()

    @report("VL-42273", clause="REQ-8")
    def test_the_table_of_the_kernels_follows_the_books(self) -> None:
        engine = Engine(self.impl, page_count=32)
        first, second = engine.admit(list(range(8))), engine.admit(list(range(8)))
        for req in (first, second):
            engine.compute(req, 8)
        for req in (first, second):
            engine.chunk(req, 8)

        engine.pool.commit()

        table = engine.pool.req_to_token
        for req in (first, second):
            assert numbers(table[req.req_pool_idx, :8]) == engine.row(req)
        engine.settle()

    @report("TRT-17926", "SEED-26", clause="RADIX-11")
    def test_eviction_at_zero_headroom_spares_the_path_in_hand(self) -> None:
        engine = Engine(self.impl, page_size=2, page_count=6)
        engine.serve([9, 8, 7, 6])
        req = engine.admit(list(range(12)))
        for stop in (4, 8, 12):
            engine.chunk(req, stop)
            assert engine.cached(req.tokens) == stop
            engine.settle()

        assert engine.cache.evict(12) == 0
        engine.sample(req)
        engine.settle()

    @report("TRT-17926", clause="CACHE-7")
    def test_an_eviction_from_inside_a_finish_is_refused(self) -> None:
        engine = Engine(self.impl)
        engine.serve([1, 2, 3])
        refusals: list[str] = []

        def greedy(_operation: object) -> None:
            try:
                engine.cache.evict(3)
            except ContractError as error:
                refusals.append(error.clause)

        engine.allocator.attach(greedy)
        req = engine.admit([1, 2, 3, 4])
        engine.pool.attach(greedy)
        engine.compute(req, 6)
        refusals.clear()
        engine.sample(req)

        assert refusals
        assert set(refusals) == {"CACHE-7"}
        assert engine.cached([1, 2, 3, 4]) == 4
        engine.settle()

    @report("SG-26387", clause="OBS-1")
    def test_caches_and_pools_report_what_they_did(self) -> None:
        engine = Engine(self.impl)
        seen: list[Any] = []
        for part in (engine.allocator, engine.pool, engine.cache):
            part.attach(seen.append)

        engine.serve([1, 2, 3])
        engine.cache.evict(3)

        did = {(operation.room, operation.name) for operation in seen}
        assert {("slot_allocator", "alloc"), ("request_pool", "alloc")} <= did
        assert {("radix_cache", "cache_finished_req"), ("radix_cache", "evict")} <= did
        engine.settle()
