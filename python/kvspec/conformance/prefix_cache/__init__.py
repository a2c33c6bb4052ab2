"""Conformance of prefix caches: what all of them keep. Spec: CACHE."""

import pytest

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.entries import EntryConformance
from kvspec.conformance.prefix_cache.requests import RequestConformance
from kvspec.conformance.prefix_cache.system import (
    ABC,
    KINDS,
    CacheConformance,
    Request,
    System,
    covered,
    numbers,
    refused,
)
from kvspec.conformance.prefix_cache.tombstones import TombstoneConformance
from kvspec.conformance.prefix_cache.windows import WindowConformance
from kvspec.errors import ContractError

__all__ = ["CacheConformance", "PrefixCacheConformance", "Request", "System", "numbers", "refused"]


NOT_SHARING = ["disabled", "chunk", "swadisabled", "swachunk"]


class PrefixCacheConformance(
    RequestConformance, EntryConformance, WindowConformance, TombstoneConformance
):
    """The clauses CACHE, on the radix cache and, where they say something, on the others."""

    # Options

    @clause("CACHE-17")
    def test_option_whose_room_does_not_exist_is_refused(self) -> None:
        with pytest.raises(ContractError) as caught:
            self.serving(enable_kv_cache_events=True)
        assert caught.value.clause == "CACHE-17"

    @clause("CACHE-17")
    @pytest.mark.parametrize("kind", list(KINDS))
    @pytest.mark.parametrize("page_size", [0, 2])
    def test_page_size_that_is_not_the_allocators_is_refused(
        self, kind: str, page_size: int
    ) -> None:
        made, pools = KINDS[kind], self.serving(page_size=4, kind=kind)
        arguments = {
            "req_to_token_pool": pools.pool,
            "token_to_kv_pool_allocator": pools.allocator,
            "page_size": page_size,
        }
        with pytest.raises(ContractError) as caught:
            self.subject(made.name, made.interface, "prefix_cache", **{**made.options, **arguments})
        assert caught.value.clause == "CACHE-17"

    @clause("CACHE-18")
    @pytest.mark.parametrize("kind", NOT_SHARING)
    def test_cache_that_does_not_share_finds_and_keeps_nothing(self, kind: str) -> None:
        system = self.serving(kind=kind)
        slots = numbers(system.allocator.alloc(8))
        result = system.cache.insert(ABC[:6], slots[:6], extra_key="a")
        assert covered(result) == list(range(6))
        assert result.tail == [(0, 6)]
        assert result.prefix_len == 0
        found = system.cache.match_prefix(ABC[:6], extra_key="a")
        assert len(found.device_indices) == 0
        receipt = system.cache.inc_lock_ref(found.last_device_node)
        assert receipt.delta == 0
        assert system.cache.protected_size() == 0
        assert system.cache.dec_lock_ref(receipt) == 0
        assert system.evict(8) == 0
        assert not system.cache.view().pages

    @clause("CACHE-18")
    @pytest.mark.parametrize("kind", NOT_SHARING)
    @pytest.mark.parametrize("outputs", [0, 1, 6])
    def test_cache_that_does_not_share_gives_back_the_row(self, kind: str, outputs: int) -> None:
        system = self.serving(kind=kind, spy=True)
        req = system.admit(range(10))
        system.chunk(req, 7)
        system.chunk(req, 10)
        assert numbers(req.prefix_indices) == system.row(req)
        for token in range(outputs):
            system.step(req, token)

        system.finish(req)

        assert len(system.allocator.frees) == 1
        assert system.allocator.available_size() == 64
        assert system.pool.available_size() == 4
