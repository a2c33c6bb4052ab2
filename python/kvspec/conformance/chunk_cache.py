"""Conformance of the cache that does not share. Spec: CHUNK."""

from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import (
    ABC,
    KINDS,
    CacheConformance,
    System,
    numbers,
    refused,
)
from kvspec.errors import ContractError

__all__ = ["ChunkCacheConformance"]

both = pytest.mark.parametrize("kind", ["chunk", "swachunk"])
page_sizes = pytest.mark.parametrize("page_size", [1, 4])


class ChunkCacheConformance(CacheConformance):
    """The clauses CHUNK, and CACHE-18 from its side."""

    def serving(self, page_size: int = 4, kind: str = "swachunk", **options: Any) -> System:
        """Pools that are free, and a chunk cache over them."""
        return super().serving(page_size, kind=kind, **options)

    @clause("CHUNK-1")
    @both
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_chunk_copies_the_row_and_changes_nothing_else(self, page_size: int, kind: str) -> None:
        system = self.serving(page_size, kind=kind)
        req = system.admit(ABC)
        assert system.compute(req, 12)
        for stop in (3, 4, 10):
            req.fill_ids = ABC[:stop]
            before = system.state()
            system.cache.cache_unfinished_req(req)
            assert numbers(req.prefix_indices) == system.row(req)[:stop]
            req_state = req.state()
            assert system.state()[:3] == before[:3]
            assert (req_state[0], *req_state[2:]) == (before[3][0][0], *before[3][0][2:])

    @clause("CHUNK-1")
    @both
    def test_prefix_indices_are_a_copy(self, kind: str) -> None:
        system = self.serving(kind=kind)
        req = system.admit(ABC)
        system.chunk(req, 10)
        before = system.row(req)

        system.pool.write((req.req_pool_idx, slice(0, 2)), [60, 61])
        assert numbers(req.prefix_indices) == before
        req.prefix_indices[0] = 63
        assert system.row(req) == [60, 61, *before[2:]]

    @clause("CHUNK-2")
    @both
    @pytest.mark.parametrize("page_size", [1, 4, 16])
    @pytest.mark.parametrize("outputs", [0, 1, 5])
    @pytest.mark.parametrize("beyond", [0, 1, 7])
    def test_whole_row_comes_back_once(
        self, page_size: int, outputs: int, beyond: int, kind: str
    ) -> None:
        system = self.serving(page_size, page_count=64 // page_size, spy=True, kind=kind)
        other = system.admit(range(3))
        system.chunk(other, 3)
        available = system.allocator.available_size()
        req = system.admit(range(10))
        system.chunk(req, 10)
        for token in range(outputs):
            system.step(req, token)
        assert system.compute(req, len(req.tokens) + beyond)
        slots = system.row(req)

        system.finish(req)

        frees = [sorted(freed) for freed in system.allocator.frees]
        assert frees == [sorted(system.slots(*system.pages(slots)))]
        assert system.allocator.available_size() == available
        assert system.pool.available_size() == 3
        assert req.req_pool_idx is None
        system.settle()

    @clause("CHUNK-3")
    @both
    def test_match_takes_its_key_in_any_way_and_finds_nothing(self, kind: str) -> None:
        system = self.serving(kind=kind)
        first = system.admit(ABC)
        system.chunk(first, 12)
        system.finish(first)
        for found in (
            system.cache.match_prefix(ABC),
            system.cache.match_prefix(key=ABC),
            system.cache.match_prefix(ABC, extra_key="a", touch=False),
        ):
            assert numbers(found.device_indices) == []
            assert found.host_hit_length == 0

    @clause("CHUNK-3")
    @both
    def test_there_is_nothing_to_evict(self, kind: str) -> None:
        system = self.serving(spy=True, kind=kind)
        system.chunk(system.admit(ABC), 12)
        sizes = (system.cache.evictable_size, system.cache.protected_size, system.cache.total_size)

        assert system.cache.evict(12) == 0
        system.cache.reset()

        assert [size() for size in sizes] == [0, 0, 0]
        assert system.allocator.frees == []
        system.settle()

    @clause("CHUNK-4")
    @both
    @pytest.mark.parametrize("call", ["cache_unfinished_req", "cache_finished_req"])
    @pytest.mark.parametrize("row", [None, 0, 3, -1, 99])
    def test_request_whose_row_is_not_live_is_refused(
        self, call: str, row: int | None, kind: str
    ) -> None:
        system = self.serving(kind=kind)
        req = system.admit([])
        system.finish(req)
        req.req_pool_idx = row
        refused(system, "CHUNK-4", getattr(system.cache, call), req)

    @clause("CHUNK-4")
    @both
    @pytest.mark.parametrize("call", ["cache_unfinished_req", "cache_finished_req"])
    def test_row_with_too_few_slots_is_refused(self, call: str, kind: str) -> None:
        system = self.serving(kind=kind)
        req = system.admit(ABC)
        assert system.compute(req, 11)
        req.fill_ids = ABC
        refused(system, "CHUNK-4", getattr(system.cache, call), req)

    @clause("CHUNK-4")
    @both
    def test_finishing_twice_is_refused(self, kind: str) -> None:
        system = self.serving(kind=kind)
        req = system.admit(ABC)
        system.chunk(req, 12)
        row = req.req_pool_idx
        system.finish(req)
        for stale in (None, row):
            req.req_pool_idx = stale
            refused(system, "CHUNK-4", system.cache.cache_finished_req, req)

    # With a window pool

    @clause("CHUNK-5")
    @page_sizes
    @pytest.mark.parametrize("width", [1, 3, 4, 5, 99])
    @pytest.mark.parametrize("option", ["sliding_window_size", "attention_chunk_size"])
    def test_row_comes_back_with_the_pairs_it_still_has(
        self, page_size: int, option: str, width: int
    ) -> None:
        system = self.serving(page_size, page_count=64 // page_size, spy=True)
        other = system.admit(range(3))
        system.chunk(other, 3)
        available, row = system.available(), []
        for prelen in (6, 11, 18):
            req = system.admit(range(18))
            for stop in range(2, prelen + 1):
                system.chunk(req, stop)
                system.evict_swa(req, **{option: width})
            row = system.row(req)
            req.origin_input_ids = req.tokens[:prelen]

            system.finish(req)

            frees = [sorted(freed) for freed in system.allocator.frees]
            assert frees == [system.slots(*system.pages(row))]
            system.allocator.frees.clear()
            assert system.available() == available
            system.settle()

    @clause("CHUNK-5")
    @page_sizes
    def test_row_comes_back_whole_after_its_window_has_passed_by(self, page_size: int) -> None:
        system = self.serving(page_size, page_count=64 // page_size)
        req = system.admit(range(12))
        system.chunk(req, 12)
        assert system.evict_swa(req, attention_chunk_size=12) == 12
        assert system.available() == (52, 64)

        system.finish(req)

        assert system.available() == (64, 64)
        system.settle()

    @clause("CHUNK-5")
    @page_sizes
    def test_row_that_a_retracted_request_left_comes_back_once(self, page_size: int) -> None:
        system = self.serving(page_size, page_count=64 // page_size)
        req = system.admit(range(20))
        for stop in (20, 8, 14, 16, 20):
            system.chunk(req, stop)
            system.evict_swa(req, sliding_window_size=5)
            system.retract(req)
            assert system.available() == (64, 64)
            system.begin(req)
        system.chunk(req, 20)
        assert system.evict_swa(req, sliding_window_size=5) == 16

        system.finish(req)

        assert system.available() == (64, 64)
        system.settle()

    @clause("CHUNK-6")
    @page_sizes
    def test_allocator_without_a_window_pool_is_refused(self, page_size: int) -> None:
        made, pools = KINDS["swachunk"], self.serving(page_size, kind="chunk")
        with pytest.raises(ContractError) as caught:
            self.subject(
                made.name,
                made.interface,
                made.room,
                req_to_token_pool=pools.pool,
                token_to_kv_pool_allocator=pools.allocator,
                page_size=page_size,
            )
        assert caught.value.clause == "CHUNK-6"
