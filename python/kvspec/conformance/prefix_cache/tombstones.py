"""Requests over a tree with tombstones. Spec: CACHE-1 to CACHE-6, CACHE-9, CACHE-10, CACHE-15."""

from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import (
    CacheConformance,
    Request,
    System,
    numbers,
    refused,
)
from kvspec.errors import ContractError

__all__ = ["TombstoneConformance"]

page_sizes = pytest.mark.parametrize("page_size", [1, 4])
PAGES = 6
"""Pages of the path that most tests have in the tree: four tombstones, then a window of two."""


class TombstoneConformance(CacheConformance):
    """What windows change for a request: its reach, and the pairs that it brings."""

    def behind(self, page_size: int, **options: Any) -> tuple[System, list[int]]:
        """A tree with a path that a request has left but for its last two pages, and its pages."""
        given = {"page_count": 32, "spy": True, "sliding_window_size": 2 * page_size, **options}
        system = self.serving(page_size, kind="swaradix", **given)
        first = system.admit(range(PAGES * page_size))
        assert system.compute(first, PAGES * page_size)
        held = system.row(first)
        system.allocator.free_swa(held[: 4 * page_size])
        system.finish(first)
        assert tombstones(system) == [0, 1, 2, 3]
        for calls in (system.allocator.frees, system.allocator.pair_frees):
            calls.clear()
        return system, held

    def diverging(self, page_size: int, **options: Any) -> tuple[System, Request, list[int]]:
        """A request computed up to its fifth page, of which three are tombstones of the tree."""
        system, held = self.behind(page_size, **options)
        tokens = [*range(3 * page_size), *range(500, 500 + 2 * page_size + 1)]
        req = system.admit(tokens)
        assert req.cache_protected_len == 0
        assert system.compute(req, len(tokens))
        req.fill_ids = tokens[:-1]
        return system, req, held

    @clause("CACHE-1")
    @page_sizes
    def test_every_page_has_one_owner_while_windows_are_left(self, page_size: int) -> None:
        system, _ = self.behind(page_size)
        first, second = (
            system.admit(range(length * page_size)) for length in (PAGES + 3, PAGES - 2)
        )
        for stop in range(2, PAGES + 4):
            for req in (first, second):
                stop_here = max(stop * page_size, req.cache_protected_len)
                system.chunk(req, min(stop_here, len(req.tokens)))
                system.settle()
                system.evict_swa(req)
                system.settle()
        for req in (first, second):
            system.finish(req)
            system.settle()

    @clause("CACHE-2")
    @page_sizes
    def test_unfinished_request_keeps_what_its_reach_leaves_out(self, page_size: int) -> None:
        system = self.serving(page_size, kind="swaradix", sliding_window_size=1, spy=True)
        req = system.admit(range(5 * page_size))
        assert system.compute(req, 4 * page_size)
        own, req.fill_ids = system.row(req), req.tokens[: 4 * page_size]
        system.allocator.free_swa(own)

        system.cache.cache_unfinished_req(req)

        assert (system.row(req), numbers(req.prefix_indices)) == (own, own)
        assert req.cache_protected_len == 0
        assert system.cache.view().receipts == ((None, ()),)
        assert (system.cache.view().pages, system.allocator.frees) == ({}, [])
        system.settle()

        system.chunk(req, 5 * page_size)
        assert req.cache_protected_len == 5 * page_size
        assert system.row(req)[: 4 * page_size] == own
        assert tombstones(system) == [0, 1, 2, 3]
        system.settle()

    @clause("CACHE-2", "CACHE-3")
    @page_sizes
    def test_unfinished_request_revives_and_goes_on_on_the_pages_of_the_tree(
        self, page_size: int
    ) -> None:
        system, req, held = self.diverging(page_size)
        own, windows = system.row(req), dict(system.allocator.view().pairs)
        shared = 3 * page_size

        system.cache.cache_unfinished_req(req)

        assert system.row(req) == held[:shared] + own[shared:]
        assert numbers(req.prefix_indices) == system.row(req)[:-1]
        assert req.cache_protected_len == 5 * page_size
        assert system.cache.resolve(req.lock_receipt.node) == (None, tuple(req.fill_ids))
        assert system.allocator.frees == [own[:shared]]
        paired = dict(system.allocator.view().pairs)
        places = zip(system.pages(held[:shared]), system.pages(own[:shared]), strict=True)
        assert all(paired[page] == windows[mine] for page, mine in places)
        assert tombstones(system) == [3]
        system.settle()

    @clause("CACHE-3")
    @page_sizes
    def test_duplicates_come_back_with_the_pairs_that_nobody_took(self, page_size: int) -> None:
        system, held = self.behind(page_size)
        tokens = [*range(PAGES * page_size), 99]
        req = Request(tokens)
        (req.req_pool_idx,) = system.pool.alloc(1)
        system.requests.append(req)
        assert system.compute(req, len(tokens))
        own, before = system.row(req), system.available()
        req.fill_ids = tokens[:-1]

        system.cache.cache_unfinished_req(req)

        assert system.row(req) == [*held, own[-1]]
        assert system.allocator.frees == [own[:-1]]
        assert len(system.allocator.moves) == 1
        whole = PAGES * page_size
        assert system.available() == (before[0] + whole, before[1] + 2 * page_size)
        system.settle()

    @clause("CACHE-3")
    @page_sizes
    def test_page_without_a_pair_is_no_duplicate_beyond_the_reach(self, page_size: int) -> None:
        system, req, _ = self.diverging(page_size)
        own, req.fill_ids = system.row(req), req.tokens[: 2 * page_size]
        system.allocator.free_swa(own[: 2 * page_size])

        system.cache.cache_unfinished_req(req)

        assert (system.row(req), req.cache_protected_len) == (own, 0)
        assert (system.allocator.frees, system.allocator.moves) == ([], [])
        system.settle()

    @clause("CACHE-4")
    @page_sizes
    def test_finished_request_gives_back_what_its_reach_leaves_out(self, page_size: int) -> None:
        system = self.serving(page_size, kind="swaradix", sliding_window_size=1, spy=True)
        req = system.admit(range(5 * page_size))
        system.chunk(req, 2 * page_size)
        assert system.compute(req, 6 * page_size)
        own = system.row(req)
        system.allocator.free_swa(own[2 * page_size : 5 * page_size])

        system.finish(req)

        assert system.allocator.frees == [own[2 * page_size :]]
        assert system.held_along(range(6 * page_size)) == own[: 2 * page_size]
        system.settle()

    @clause("CACHE-4")
    @page_sizes
    def test_finished_request_revives(self, page_size: int) -> None:
        system, req, held = self.diverging(page_size)
        own = system.row(req)

        system.finish(req)

        assert (
            system.held_along(req.tokens)
            == held[: 3 * page_size]
            + own[3 * page_size :][: (2 if page_size > 1 else 3) * page_size]
        )
        beyond = own[5 * page_size :] if page_size > 1 else []
        assert [sorted(freed) for freed in system.allocator.frees] == [
            sorted([*own[: 3 * page_size], *system.slots(*system.pages(beyond))])
        ]
        assert tombstones(system) == [3]
        system.settle()

    @clause("CACHE-5")
    @pytest.mark.parametrize("call", ["cache_unfinished_req", "cache_finished_req"])
    @page_sizes
    def test_row_with_a_page_of_the_tree_beyond_the_reach_is_refused(
        self, page_size: int, call: str
    ) -> None:
        system, held = self.behind(page_size)
        req = Request(list(range(2 * page_size)))
        (req.req_pool_idx,) = system.pool.alloc(1)
        system.pool.write((req.req_pool_idx, slice(0, 2 * page_size)), held[: 2 * page_size])
        req.fill_ids = req.tokens

        refused(system, "CACHE-5", getattr(system.cache, call), req)

    @clause("CACHE-6")
    @pytest.mark.parametrize("call", ["cache_unfinished_req", "cache_finished_req", "evict"])
    @page_sizes
    def test_operation_whose_free_fails_has_moved_no_pair(self, page_size: int, call: str) -> None:
        system, req, _ = self.diverging(page_size)
        arguments = (page_size, 2 * page_size) if call == "evict" else (req,)
        before = system.state()

        def fail() -> None:
            raise ContractError("SWA-9: the allocator refuses")

        system.allocator.on_free = fail
        with pytest.raises(ContractError, match=r"^SWA-9"):
            getattr(system.cache, call)(*arguments)
        assert system.state() == before
        system.settle()

        getattr(system.cache, call)(*arguments)
        assert system.state() != before
        assert len(system.allocator.frees) == 1
        assert system.allocator.pair_frees == []

    @clause("CACHE-10")
    @page_sizes
    def test_page_of_the_tree_beyond_the_reach_is_refused(self, page_size: int) -> None:
        """Called tail, it would be given back by the caller."""
        system, held = self.behind(page_size)
        tokens, slots = list(range(3 * page_size)), held[: 3 * page_size]
        refused(system, "CACHE-10", system.cache.insert, tokens, slots)
        other = numbers(system.allocator.alloc(page_size))
        system.allocator.free_swa(other)
        refused(
            system, "CACHE-10", system.cache.insert, tokens, other + held[page_size : 3 * page_size]
        )

    @clause("CACHE-9")
    @page_sizes
    def test_insert_that_revives_replaces_no_slot_and_frees_nothing(self, page_size: int) -> None:
        system, held = self.behind(page_size)
        slots = numbers(system.allocator.alloc(3 * page_size))
        before = system.available()

        result = system.cache.insert(range(3 * page_size), slots)

        assert result.duplicate == [(0, 3 * page_size)]
        assert system.held_along(range(3 * page_size)) == held[: 3 * page_size]
        assert system.allocator.frees == system.allocator.pair_frees == []
        assert system.available() == before
        system.reserved = set(system.pages(slots))
        system.settle()

    @clause("CACHE-15")
    @page_sizes
    def test_reset_gives_back_tombstones_too(self, page_size: int) -> None:
        system, held = self.behind(page_size)

        system.cache.reset()

        assert [sorted(freed) for freed in system.allocator.frees] == [sorted(held)]
        assert system.available() == (32 * page_size, 32 * page_size)
        assert not system.cache.view().pages
        system.settle()


def tombstones(system: System) -> list[int]:
    """The places in their paths of the tombstones of a tree."""
    pages = system.cache.view().pages.items()
    return sorted(len(path) // system.page_size - 1 for (_, path), page in pages if page.tombstone)
