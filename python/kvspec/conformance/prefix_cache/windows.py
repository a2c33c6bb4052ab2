"""What a request leaves behind. Spec: CACHE-19, CACHE-20, and CACHE-6, CACHE-7 of it."""

import math

import pytest

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import ABC, CacheConformance, Request, System, refused
from kvspec.errors import ContractError

__all__ = ["WindowConformance"]

WINDOW, CHUNK = "sliding_window_size", "attention_chunk_size"
LENGTH = 20
"""Tokens of a request: pages of 1 and of 4 end there."""
EDGES = (0, 3, 4, 7, 8, 9, 11, 12, 13, LENGTH)
"""Where pages and windows end, and beside it."""

windowed = pytest.mark.parametrize("kind", ["swaradix", "swachunk"])
page_sizes = pytest.mark.parametrize("page_size", [1, 4])
widths = pytest.mark.parametrize(
    ("option", "width"),
    [(option, width) for option in (WINDOW, CHUNK) for width in (1, 3, 4, 5, 9, 99)],
)
"""Both kinds of attention, narrower than a page and wider, up to more than there is."""


def first_kept(system: System, option: str, width: int, prelen: int) -> int:
    """The first of `prelen` positions that the token after them still reads.

    Or, in a tree, a match of the whole pages of all `prelen`.
    """
    first = prelen + 1 - width if option == WINDOW else prelen - prelen % width
    own = getattr(system.cache, WINDOW, 0)
    if own:
        size = system.page_size
        first = min(first, (prelen // size - math.ceil(own / size)) * size)
    return max(first, 0)


def without_pair(system: System, req: Request) -> list[int]:
    """The places in the row of the pages that have no pair."""
    paired = dict(system.allocator.view().pairs)
    pages = system.pages(system.row(req))
    return [place for place, page in enumerate(pages) if page not in paired]


class WindowConformance(CacheConformance):
    """`evict_swa` of both caches that have it."""

    def running(self, kind: str, page_size: int, own: int = 4) -> tuple[System, Request]:
        """A request whose row is computed, and of which nothing is cached; and another one.

        A cache that has a window of its own has one of `own` tokens.
        """
        options = {WINDOW: own} if kind == "swaradix" else {}
        count = 64 // page_size
        system = self.serving(page_size, kind=kind, page_count=count, spy=True, **options)
        system.chunk(system.admit(range(50, 59)), 9)
        req = system.admit(range(LENGTH))
        assert system.compute(req, LENGTH)
        return system, req

    @clause("CACHE-19")
    @windowed
    @page_sizes
    @widths
    def test_pages_that_no_token_reads_any_more_lose_their_pair(
        self, kind: str, page_size: int, option: str, width: int
    ) -> None:
        system, req = self.running(kind, page_size, own=min(width, 8))
        row, (full, swa), behind = system.row(req), system.available(), 0
        for prelen in range(LENGTH + 1):
            count = system.cache.evict_swa(req, prelen, **{option: width})

            first = first_kept(system, option, width, prelen)
            left = [place for place in range(LENGTH) if (place + 1) * page_size <= first]
            assert without_pair(system, req) == left
            assert count == len(left) * page_size - behind
            behind += count
            assert system.available() == (full, swa + behind)
        assert [slot for freed in system.allocator.pair_frees for slot in freed] == row[:behind]
        assert (system.allocator.frees, system.row(req)) == ([], row)
        system.settle()

    @clause("CACHE-19")
    @windowed
    @page_sizes
    @pytest.mark.parametrize(("option", "width"), [(WINDOW, 1), (WINDOW, 6), (CHUNK, 6)])
    def test_all_of_it_is_given_back_in_one_call(
        self, kind: str, page_size: int, option: str, width: int
    ) -> None:
        for prelen in EDGES:
            system, req = self.running(kind, page_size, own=width)
            own, first = system.row(req), first_kept(system, option, width, prelen)

            count = system.cache.evict_swa(req, prelen, **{option: width})

            assert count == first - first % page_size
            assert system.allocator.pair_frees == ([own[:count]] if count else [])
            assert (system.allocator.frees, system.allocator.moves) == ([], [])
            assert system.cache.evict_swa(req, prelen, **{option: width}) == 0

    @clause("CACHE-19")
    @windowed
    def test_page_that_the_frontier_is_in_is_kept(self, kind: str) -> None:
        system, req = self.running(kind, page_size=4)

        counts = [system.cache.evict_swa(req, prelen, None, **{WINDOW: 3}) for prelen in (9, 12)]

        assert counts == [4, 4]
        assert without_pair(system, req) == [0, 1]
        assert system.compute(req, LENGTH + 3)
        assert system.cache.evict_swa(req, LENGTH + 3, 8) == 8
        assert without_pair(system, req) == [0, 1, 2, 3]

    @clause("CACHE-19")
    @page_sizes
    @pytest.mark.parametrize("cached", [8, 12])
    def test_pages_of_the_tree_keep_their_pair(self, page_size: int, cached: int) -> None:
        system, req = self.running("swaradix", page_size)
        req.fill_ids = req.tokens[:cached]
        system.cache.cache_unfinished_req(req)
        tree = system.cache.view()

        assert system.cache.evict_swa(req, LENGTH, **{WINDOW: 5}) == 16 - cached

        assert without_pair(system, req) == list(range(cached // page_size, 16 // page_size))
        assert system.cache.view() == tree
        system.settle()

    @clause("CACHE-19")
    @page_sizes
    def test_tombstones_of_the_tree_in_a_row_are_passed_over(self, page_size: int) -> None:
        system, first = self.running("swaradix", page_size)
        assert system.cache.evict_swa(first, LENGTH) == 16
        system.finish(first)
        req = system.admit([*range(LENGTH), *range(30, 40)])
        assert req.cache_protected_len == LENGTH
        assert system.compute(req, 30)

        assert system.cache.evict_swa(req, 28) == 4

        behind = [*range(16 // page_size), *range(LENGTH // page_size, 24 // page_size)]
        assert without_pair(system, req) == behind
        system.settle()

    @clause("CACHE-19")
    @windowed
    @page_sizes
    @pytest.mark.parametrize("option", [WINDOW, CHUNK])
    def test_row_that_is_used_again_begins_anew(
        self, kind: str, page_size: int, option: str
    ) -> None:
        system, req = self.running(kind, page_size)
        row, width = req.req_pool_idx, 5 if option == WINDOW else 4
        left = [first_kept(system, option, width, prelen) for prelen in (LENGTH, 12)]
        assert system.cache.evict_swa(req, LENGTH, **{option: width}) == left[0]
        system.retract(req)
        system.settle()

        for again in (req, Request(list(range(LENGTH))), req):
            system.begin(again)
            last = again.req_pool_idx
            assert system.compute(again, 12)
            assert without_pair(system, again) == []
            assert system.cache.evict_swa(again, 12, **{option: width}) == left[1]
            system.settle()
            system.retract(again)
        assert last == row

    @clause("CACHE-19")
    @windowed
    @page_sizes
    def test_request_that_begins_again_shares_what_it_left_before(
        self, kind: str, page_size: int
    ) -> None:
        system, req = self.running(kind, page_size)
        for _ in range(3):
            req.fill_ids = req.tokens[:8]
            system.cache.cache_unfinished_req(req)
            system.cache.evict_swa(req, LENGTH, **{WINDOW: 4})
            system.settle()
            system.retract(req)
            system.begin(req)
            assert req.cache_protected_len == (8 if kind == "swaradix" else 0)
            assert system.compute(req, LENGTH)

    @clause("CACHE-19")
    @page_sizes
    @pytest.mark.parametrize("width", [1, 3, 4, 6, 99])
    def test_window_is_the_caches_own_if_none_is_given(self, page_size: int, width: int) -> None:
        system, req = self.running("swaradix", page_size, own=width)
        assert system.cache.sliding_window_size == width

        count = system.cache.evict_swa(req, LENGTH)

        first = first_kept(system, WINDOW, width, LENGTH)
        assert count == first - first % page_size
        assert system.cache.evict_swa(req, LENGTH, **{WINDOW: width}) == 0

    @clause("CACHE-19")
    @page_sizes
    @pytest.mark.parametrize("own", [1, 3, 4, 5, 8])
    @pytest.mark.parametrize("option", [WINDOW, CHUNK])
    def test_what_is_cached_after_a_window_was_left_can_be_matched(
        self, page_size: int, own: int, option: str
    ) -> None:
        for prelen in EDGES:
            system, req = self.running("swaradix", page_size, own)
            system.cache.evict_swa(req, prelen, **{option: 1})
            req.fill_ids = req.tokens[:prelen]

            system.cache.cache_unfinished_req(req)

            whole = prelen - prelen % page_size
            assert len(system.held_along(req.tokens[:prelen])) == whole
            assert req.cache_protected_len == whole
            system.settle()

    @clause("CACHE-20")
    @windowed
    @pytest.mark.parametrize("row", [None, 3, -1, 99])
    def test_request_whose_row_is_not_live_is_refused(self, kind: str, row: int | None) -> None:
        system, req = self.running(kind, page_size=4)
        system.retract(req)
        req.req_pool_idx = row
        refused(system, "CACHE-20", system.cache.evict_swa, req, 0, **{WINDOW: 3})

    @clause("CACHE-20")
    @windowed
    @pytest.mark.parametrize("prelen", [-1, LENGTH + 1, 2 * LENGTH])
    @pytest.mark.parametrize("option", [WINDOW, CHUNK])
    def test_more_than_the_row_holds_cannot_be_computed(
        self, kind: str, prelen: int, option: str
    ) -> None:
        system, req = self.running(kind, page_size=4)
        refused(system, "CACHE-20", system.cache.evict_swa, req, prelen, **{option: 3})

    @clause("CACHE-20")
    @windowed
    @pytest.mark.parametrize(
        "options",
        [{WINDOW: 0}, {WINDOW: -1}, {CHUNK: 0}, {CHUNK: -4}, {WINDOW: 4, CHUNK: 4}],
    )
    def test_one_size_has_to_be_given_and_positive(
        self, kind: str, options: dict[str, int]
    ) -> None:
        system, req = self.running(kind, page_size=4)
        refused(system, "CACHE-20", system.cache.evict_swa, req, LENGTH, **options)

    @clause("CACHE-20")
    def test_cache_without_a_window_of_its_own_has_to_be_told(self) -> None:
        system, req = self.running("swachunk", page_size=4)
        refused(system, "CACHE-20", system.cache.evict_swa, req, LENGTH)

    @clause("CACHE-6")
    @windowed
    @page_sizes
    def test_window_that_the_allocator_does_not_take_back_is_kept(
        self, kind: str, page_size: int
    ) -> None:
        system, req = self.running(kind, page_size)
        before = system.state()

        def fail() -> None:
            raise ContractError("SWA-11: the allocator refuses")

        system.allocator.on_free = fail
        with pytest.raises(ContractError, match=r"^SWA-11"):
            system.evict_swa(req, **{WINDOW: 5})
        assert system.state() == before
        assert system.evict_swa(req, **{WINDOW: 5}) == 16

    @clause("CACHE-7")
    @windowed
    @pytest.mark.parametrize("inner", ["evict_swa", "cache_unfinished_req", "cache_finished_req"])
    def test_call_from_inside_of_giving_back_a_window_is_refused(
        self, kind: str, inner: str
    ) -> None:
        system, req = self.running(kind, page_size=4)
        req.fill_ids = ABC
        arguments = (req, LENGTH, 4) if inner == "evict_swa" else (req,)
        before = system.state()
        system.allocator.on_free = lambda: getattr(system.cache, inner)(*arguments)

        with pytest.raises(ContractError, match=r"^CACHE-7"):
            system.evict_swa(req, **{WINDOW: 5})

        assert system.state() == before
