"""What live requests own in two pools. Spec: SWARADIX-18."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis.stateful import run_state_machine_as_test

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import Request, System
from kvspec.conformance.suite import fuzzing
from kvspec.conformance.swa_radix_cache.requests import Requests
from kvspec.conformance.swa_radix_cache.windows import (
    WindowConformance,
    drop,
    page_sizes,
    sizes,
    tombstones,
    window_pages,
)
from kvspec.errors import ContractError

__all__ = ["OwnershipConformance"]


class OwnershipConformance(WindowConformance):
    """Requests whose pages others find, revive and evict."""

    def engine(self, page_size: int, window: int, **options: Any) -> System:
        """Two pools that are free, for requests."""
        options = {"handed_out": False, "spy": True, **options}
        return self.windows(page_size, window, **options)

    @clause("SWARADIX-18")
    def test_random_requests_keep_what_they_have(self) -> None:
        run_state_machine_as_test(Requests.of(self), settings=fuzzing(40))

    @clause("SWARADIX-18")
    @sizes
    @pytest.mark.parametrize("call", ["insert", "cache_unfinished_req", "cache_finished_req"])
    def test_revival_takes_nothing_of_a_request_whose_lock_it_is_under(
        self, page_size: int, window: int, call: str
    ) -> None:
        """The other computed the same, and brings pairs for what has left the first's window."""
        system, first, second = self._twins(page_size, window)
        tokens = first.tokens
        before = _owned(system, first)
        assert tombstones(system, tokens) == [True] * 3 + [False] * window_pages(page_size, window)

        if call == "insert":
            system.cache.insert(tokens, system.row(second))
        else:
            second.fill_ids = tokens
            getattr(system.cache, call)(second)

        assert tombstones(system, tokens) == [False] * (3 + window_pages(page_size, window))
        assert _owned(system, first) == before
        assert system.held_along(tokens) == system.row(first)
        freed = {page for slots in system.allocator.frees for page in system.pages(slots)}
        assert not freed & set(system.pages(system.row(first)))
        system.cache.check()

    @clause("SWARADIX-18")
    @sizes
    def test_eviction_takes_nothing_that_a_request_needs(self, page_size: int, window: int) -> None:
        system, first, second = self._twins(page_size, window)
        before = [_owned(system, req) for req in (first, second)]
        assert system.cache.evict(999, 999) == (0, 0)
        assert [_owned(system, req) for req in (first, second)] == before
        system.settle()

    @clause("SWARADIX-18")
    @sizes
    def test_page_at_the_edge_of_the_window_has_one_owner(
        self, page_size: int, window: int
    ) -> None:
        """The window's edge passes over every place in a page, on a row that is cached at times."""
        system = self.engine(page_size, window)
        req = system.admit(range(5))
        for token in range(22):
            system.step(req, 100 + token)
            system.evict_swa(req)
            if token % 3 == 1:
                system.chunk(req, len(req.tokens) - 1)
            view, length = system.allocator.view(), system.pool.row_length(req.req_pool_idx)
            begin = max(length - window + 1, 0) // page_size
            needed = system.pages(system.row(req))[begin:]
            assert set(needed) <= dict(view.pairs).keys()
            system.settle()
        system.finish(req)
        system.settle()

    @clause("SWARADIX-18", "CACHE-2")
    @page_sizes
    @pytest.mark.parametrize("short", [0, 1, 2])
    def test_request_holds_what_it_inserted_though_no_match_would_find_it(
        self, page_size: int, short: int
    ) -> None:
        """The window below its last token is less than one below where its insert ended."""
        system = self.engine(page_size, 4 * page_size)
        req = system.admit(range(8 * page_size))
        assert system.compute(req, 8 * page_size)
        system.evict_swa(req)
        system.chunk(req, 8 * page_size - short)
        assert req.cache_protected_len == (8 * page_size - short) // page_size * page_size
        committed = req.tokens[: req.cache_protected_len]
        assert system.cache.view().receipts == ((None, tuple(committed)),)
        system.settle()

        assert system.cache.evict(999, 999).full_num_tokens == 0
        assert system.row(req)[: len(committed)] == system.slots(
            *(page.page for page in system.cache.view().pages.values())
        )
        system.finish(req)
        system.settle()

    @clause("SWARADIX-18")
    def test_out_of_window_insert_match_again_and_finish(self) -> None:
        """Pages of 64, a window of 127, and a request of 1024 that drops what leaves its window."""
        system = self.engine(64, 127, page_count=40)
        req = system.admit(range(1024))
        for stop in range(192, 1025, 64):
            assert system.compute(req, stop)
            system.evict_swa(req)
            system.chunk(req, stop)
            system.settle()
        assert len(system.held_along(req.tokens)) == 1024
        again = system.admit([*range(1024), 5000])
        assert again.cache_protected_len == 1024
        system.finish(req)
        system.settle()
        assert system.compute(again, 1025)
        system.finish(again)
        system.settle()
        assert system.cache.swa_protected_size() == 0

    @clause("SWARADIX-18")
    @sizes
    def test_window_slots_that_were_left_are_others_at_once(
        self, page_size: int, window: int
    ) -> None:
        """What one request gave back is handed out again while its row still names the pages."""
        length = window_pages(page_size, window)
        count = 2 * (length + 4)
        system = self.engine(page_size, window, page_count=count, swa_page_count=length + 5)
        req = system.admit(range((length + 4) * page_size))
        assert system.compute(req, (length + 4) * page_size)
        gone = system.evict_swa(req)
        assert gone >= 3 * page_size
        other = system.admit(range(900, 900 + gone))
        assert system.compute(other, gone)
        before = _owned(system, other)
        system.finish(req)
        assert _owned(system, other) == before
        system.settle()

    @clause("CACHE-19")
    @sizes
    @pytest.mark.parametrize("kind", ["sliding_window_size", "attention_chunk_size"])
    def test_what_a_request_caches_behind_its_window_can_be_matched(
        self, page_size: int, window: int, kind: str
    ) -> None:
        system = self.engine(page_size, window)
        for computed in range(1, 23):
            req = system.admit(range(100 * computed, 100 * computed + computed))
            assert system.compute(req, computed)
            system.evict_swa(req, **{kind: window})
            system.chunk(req, computed)
            whole = computed // page_size * page_size
            assert len(system.held_along(req.tokens)) == whole
            system.retract(req)
            system.cache.reset()

    @clause("CACHE-6", "SWARADIX-18")
    @page_sizes
    @pytest.mark.parametrize("call", ["cache_unfinished_req", "cache_finished_req"])
    def test_revival_whose_free_fails_has_not_happened(self, page_size: int, call: str) -> None:
        system, _, second = self._twins(page_size, 2 * page_size)
        second.fill_ids = second.tokens
        before = system.state()

        def fail() -> None:
            raise ContractError("SWA-9: the allocator refuses")

        system.allocator.on_free = fail
        with pytest.raises(ContractError, match=r"^SWA-9"):
            getattr(system.cache, call)(second)
        assert system.state() == before
        system.settle()
        getattr(system.cache, call)(second)
        assert tombstones(system, second.tokens or []) == [False] * 5

    @clause("CACHE-6", "SWARADIX-18")
    @page_sizes
    def test_eviction_whose_free_fails_has_not_happened(self, page_size: int) -> None:
        system = self.windows(page_size, 1, spy=True)
        drop(system, 1)
        system.insert(range(3 * page_size), 1, 2, 3)
        before = system.state()

        def fail() -> None:
            raise ContractError("SWA-9: the allocator refuses")

        for amounts in ((1, 0), (0, 1), (1, 99)):
            system.allocator.on_free = fail
            with pytest.raises(ContractError, match=r"^SWA-9"):
                system.cache.evict(*amounts)
            assert system.state() == before
            system.cache.check()

    @clause("CACHE-7", "SWARADIX-18")
    def test_call_from_inside_a_revival_is_refused(self) -> None:
        system, _, second = self._twins(4, 4)
        second.fill_ids = second.tokens
        before = system.state()
        inner: list[Callable[[], Any]] = [
            lambda: system.cache.evict(0, 4),
            lambda: system.cache.evict_swa(second, 4),
        ]
        for call in inner:
            system.allocator.on_free = call
            with pytest.raises(ContractError, match=r"^CACHE-7"):
                system.cache.cache_unfinished_req(second)
            assert system.state() == before

    def _twins(self, page_size: int, window: int) -> tuple[System, Request, Request]:
        """Two requests that computed the same; the first's is in the tree, and three pages of it
        have left its window."""
        count = window_pages(page_size, window) + 3
        system = self.engine(page_size, window)
        first, second = (system.admit(range(count * page_size)) for _ in range(2))
        for req in (first, second):
            assert system.compute(req, count * page_size)
        system.chunk(first, count * page_size)
        assert system.cache.evict(0, 999).swa_num_tokens == 3 * page_size
        system.allocator.frees.clear()
        return system, first, second


def _owned(system: System, req: Request) -> Any:
    """The row of a request, and the pairs of the pages that are its own or in its window."""
    row, view = system.row(req), system.allocator.view()
    pages = system.pages(row)
    assert set(pages) <= view.held
    protected, window = req.cache_protected_len, system.cache.sliding_window_size
    begin = max(protected - window, 0) // system.page_size
    pairs = dict(view.pairs)
    return row, [pairs[page] for page in pages[begin:]]
