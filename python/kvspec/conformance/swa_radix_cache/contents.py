"""What a cache with windows finds and takes. Spec: SWARADIX-1 to SWARADIX-6."""

from itertools import product

import pytest

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import covered, numbers, refused
from kvspec.conformance.swa_radix_cache.windows import (
    WindowConformance,
    drop,
    intervals,
    page_sizes,
    shed,
    sizes,
    tombstones,
    usable,
    window_pages,
)

__all__ = ["WindowContentConformance"]


class WindowContentConformance(WindowConformance):
    """Match and insert."""

    # Match

    @clause("SWARADIX-1")
    @sizes
    def test_match_ends_in_a_window_of_live_pages(self, page_size: int, window: int) -> None:
        """A tombstone at every place but the last, and a key of every length."""
        length = window_pages(page_size, window)
        count = length + 2
        system = self.windows(page_size, window, page_count=count * count)
        tokens = list(range(count * page_size))
        for hole in range(count - 1):
            pages = range(hole * count + 1, (hole + 1) * count + 1)
            drop(system, pages[hole])
            system.insert(tokens, *pages, extra_key=hole)
            for stop in range(count + 1):
                found = system.cache.match_prefix(tokens[: stop * page_size], extra_key=hole)
                expected = hole if stop - length <= hole < stop else stop
                assert numbers(found.device_indices) == system.slots(*pages[:expected])
                path = hole, tuple(tokens[: expected * page_size])
                assert system.cache.resolve(found.last_device_node) == path

    @clause("SWARADIX-1")
    @pytest.mark.parametrize("window", [1, 2, 3, 4])
    def test_match_falls_back_to_the_window_before(self, window: int) -> None:
        """Every pattern of tombstones, also with runs that are too short in between."""
        system = self.windows(window=window, page_count=16 * 5)
        for number, rest in enumerate(product([False, True], repeat=4)):
            gone = [*rest, False]
            pages = range(number * 5 + 1, number * 5 + 6)
            drop(system, *(page for page, lost in zip(pages, gone, strict=True) if lost))
            system.insert(range(5), *pages, extra_key=number)
            for stop in range(6):
                found = system.held_along(range(stop), number)
                assert found == list(pages[: usable(gone[:stop], window)])

    @clause("SWARADIX-1")
    def test_match_stops_at_the_pages_of_the_key(self) -> None:
        """The page in which the key ends is no part of its window."""
        system = self.windows(page_size=4, window=4)
        drop(system, 2)
        system.insert(range(16), 1, 2, 3, 4)
        for length, pages in ((16, 4), (15, 3), (12, 3), (11, 1), (8, 1), (7, 1), (4, 1), (3, 0)):
            assert len(system.held_along(range(length))) == 4 * pages

    @clause("SWARADIX-2")
    @sizes
    def test_match_that_falls_back_leaves_what_it_compared(
        self, page_size: int, window: int
    ) -> None:
        count = window_pages(page_size, window) + 3
        system = self.windows(page_size, window)
        tokens = list(range(count * page_size))
        drop(system, 2)
        system.insert(tokens, *range(1, count + 1))
        system.insert([700] * page_size, 60)
        before = list(system.cache.view().pages.values())

        found = system.cache.match_prefix(tokens[: (count - 2) * page_size])

        after = list(system.cache.view().pages.values())
        assert len(found.device_indices) == page_size
        assert after[0] == before[0]._replace(hits=1, last=2)
        assert after[1:] == before[1:]
        system.cache.check()

    @clause("SWARADIX-2")
    @page_sizes
    def test_match_that_falls_back_to_nothing_changes_nothing(self, page_size: int) -> None:
        system = self.windows(page_size, window=2 * page_size)
        drop(system, 1)
        tokens = list(range(4 * page_size))
        system.insert(tokens, 1, 2, 3, 4)
        system.insert([700] * page_size, 60)
        before, digest = system.state(), system.cache.digest()

        found = system.cache.match_prefix(tokens[: 2 * page_size])

        assert system.cache.resolve(found.last_device_node) == (None, ())
        assert (system.state(), system.cache.digest()) == (before, digest)

    @clause("SWARADIX-2")
    @pytest.mark.parametrize("amounts", [(1, 0), (0, 1)])
    def test_what_was_compared_in_vain_still_goes_first(self, amounts: tuple[int, int]) -> None:
        """The key leaves a run in its middle, and the match gives nothing of it."""
        system = self.windows(window=2)
        drop(system, 1)
        system.insert([1, 2, 3], 1, 2, 3)
        system.insert([8], 8)
        system.cache.match_prefix([1, 2, 7])
        system.cache.evict(*amounts)
        assert 8 in {page.page for page in system.cache.view().pages.values()}

    # Insert

    @clause("SWARADIX-3")
    @page_sizes
    @pytest.mark.parametrize("known", [0, 1])
    @pytest.mark.parametrize("tail", [0, 1])
    def test_insert_takes_the_pages_up_to_the_last_live_one(
        self, page_size: int, known: int, tail: int
    ) -> None:
        system, size = self.windows(page_size, page_count=16 * 6), page_size
        tokens = list(range(4 * size + tail * (size - 1)))
        for number, rest in enumerate(product([False, True], repeat=4)):
            pages = range(number * 6 + 1, number * 6 + 6)
            system.insert(tokens[: known * size], *pages[:known], extra_key=number)
            gone = [*[False] * known, *rest[known:]]
            drop(system, *(page for page, lost in zip(pages, gone, strict=False) if lost))
            reach = 4 - next((n for n, lost in enumerate(reversed(gone)) if not lost), 4)

            result = system.insert(tokens, *pages, extra_key=number)

            resident = [path for path in system.cache.view().pages if path[0] == number]
            assert resident == [(number, tuple(tokens[: n * size])) for n in range(1, reach + 1)]
            assert result.adopted == ([(known * size, reach * size)] if reach > known else [])
            beyond = reach * size, len(tokens)
            assert result.tail == ([beyond] if beyond[0] < beyond[1] else [])
            assert (result.prefix_len, result.duplicate) == (known * size, [])
            path = number, tuple(tokens[: reach * size])
            assert system.cache.resolve(result.last_device_node) == path

    @clause("SWARADIX-3")
    @page_sizes
    @pytest.mark.parametrize("stop", range(7))
    @pytest.mark.parametrize("frontier", [0, 2, 5, 6])
    def test_reach_over_tombstones_of_the_tree(
        self, page_size: int, stop: int, frontier: int
    ) -> None:
        """The tree has five pages, the second to the fourth of them tombstones; what the caller
        has before the frontier is without a pair."""
        system, size = self.windows(page_size), page_size
        tokens = list(range(6 * size))
        drop(system, 2, 3, 4)
        system.insert(tokens[: 5 * size], 1, 2, 3, 4, 5)
        drop(system, *range(11, 11 + frontier))

        result = system.insert(tokens[: stop * size], *range(11, 11 + stop))

        live = [n + 1 for n in range(stop) if n >= frontier or n in (0, 4)]
        reach = max(live, default=0)
        assert len(system.cache.view().pages) == max(reach, 5)
        assert result.adopted == ([(5 * size, 6 * size)] if reach == 6 else [])
        assert result.tail == ([(reach * size, stop * size)] if reach < stop else [])
        assert result.prefix_len == min(reach, 5) * size
        path = None, tuple(tokens[: reach * size])
        assert system.cache.resolve(result.last_device_node) == path

    @clause("SWARADIX-3")
    def test_insert_beyond_whose_reach_the_tree_has_pages_leaves_them(self) -> None:
        system = self.windows(spy=True)
        drop(system, 2, 3)
        system.insert([1, 2, 3, 4], 1, 2, 3, 4)
        system.insert([8], 8)
        drop(system, 12, 13)
        result = system.insert([1, 2, 3], 1, 12, 13)
        assert (result.shared, result.duplicate, result.tail) == ([(0, 1)], [], [(1, 3)])
        assert [page.last for page in system.cache.view().pages.values()] == [2, 0, 0, 0, 1]

    @clause("CACHE-10", "SWARADIX-3")
    @page_sizes
    def test_page_of_the_tree_beyond_the_reach_is_refused(self, page_size: int) -> None:
        """The tail is the caller's to give back."""
        system, size = self.windows(page_size), page_size
        drop(system, 2, 3, 12, 13)
        system.insert(range(4 * size), 1, 2, 3, 4)
        for pages in ((1, 2), (1, 2, 3), (1, 12, 3), (11, 2, 13)):
            key = list(range(len(pages) * size))
            refused(system, "CACHE-10", system.cache.insert, key, system.slots(*pages))
        assert system.insert(range(4 * size), 1, 2, 3, 4).shared == [(0, 4 * size)]

    @clause("SWARADIX-4")
    @page_sizes
    @pytest.mark.parametrize("window", [1, 3, 9])
    @pytest.mark.parametrize("known", [0, 1, 3])
    def test_page_enters_live_if_the_callers_has_a_pair(
        self, page_size: int, window: int, known: int
    ) -> None:
        system, size = self.windows(page_size, window, page_count=16 * 5), page_size
        tokens = list(range(5 * size))
        for number, rest in enumerate(product([False, True], repeat=4)):
            pages, gone = range(number * 5 + 1, number * 5 + 6), [*rest, False]
            system.insert(tokens[: known * size], *pages[:known], extra_key=number)
            gone[:known] = [False] * known
            drop(system, *(page for page, lost in zip(pages, gone, strict=True) if lost))
            system.insert(tokens, *pages, extra_key=number)
            assert tombstones(system, tokens, number) == gone
        paired = {page for page, _ in system.allocator.view().pairs}
        assert all(
            p.tombstone == (p.page not in paired) for p in system.cache.view().pages.values()
        )

    @clause("SWARADIX-5")
    @page_sizes
    @pytest.mark.parametrize("first", [0, 1, 3])
    @pytest.mark.parametrize("last", [3, 4])
    @pytest.mark.parametrize("frontier", range(7))
    def test_tombstone_is_revived_and_keeps_its_page(
        self, page_size: int, first: int, last: int, frontier: int
    ) -> None:
        """A run of tombstones, and where the caller's pairs begin before, in or after it."""
        system, size = self.windows(page_size, spy=True), page_size
        tokens, run = list(range(6 * size)), range(first, last + 1)
        drop(system, *(n + 1 for n in run))
        system.insert(tokens, *range(1, 7))
        drop(system, *range(11, 11 + frontier))
        pairs = dict(system.allocator.view().pairs)
        system.allocator.pair_frees.clear()

        result = system.insert(tokens, *range(11, 17))

        for n in run:
            if n >= frontier:
                pairs[n + 1] = pairs.pop(n + 11)
        assert dict(system.allocator.view().pairs) == pairs
        assert tombstones(system, tokens) == [n in run and n < frontier for n in range(6)]
        assert [page.page for page in system.cache.view().pages.values()] == list(range(1, 7))
        assert result.duplicate == [(0, 6 * size)]
        assert system.allocator.frees == system.allocator.pair_frees == []

    @clause("SWARADIX-5")
    @page_sizes
    def test_same_page_revives_nothing(self, page_size: int) -> None:
        """The caller who brings the tree's own tombstone brings no pair."""
        system = self.windows(page_size)
        tokens = list(range(3 * page_size))
        drop(system, 1, 2)
        system.insert(tokens, 1, 2, 3)
        before = system.allocator.view()
        result = system.insert(tokens, 1, 2, 3)
        assert result.shared == [(0, 3 * page_size)]
        assert result.swa.shared == [(2 * page_size, 3 * page_size)]
        assert tombstones(system, tokens) == [True, True, False]
        assert system.allocator.view() == before

    @clause("SWARADIX-5")
    @page_sizes
    def test_revived_path_is_found_and_can_lose_its_pairs_again(self, page_size: int) -> None:
        system = self.windows(page_size, window=2 * page_size)
        tokens = list(range(4 * page_size))
        system.insert(tokens, 1, 2, 3, 4)
        for pages in ((11, 12, 13, 14), (21, 22, 23, 24)):
            shed(system, tokens)
            assert tombstones(system, tokens) == [True, True, False, False]
            assert system.held_along(tokens[: 3 * page_size]) == []
            system.insert(tokens, *pages)
            assert system.held_along(tokens[: 3 * page_size]) == system.slots(1, 2, 3)

    @clause("SWARADIX-6")
    @page_sizes
    def test_window_slots_are_sorted_into_four_ranges(self, page_size: int) -> None:
        """A tree of three pages of which two may be tombstones, and a caller who brings for each
        the tree's, one of its own, or one without a pair, and half a page more."""
        system, size = self.windows(page_size, page_count=4 * 27 * 8), page_size
        tokens = list(range(4 * size - 1))
        free = iter(range(1, 4 * 27 * 8))
        for gone in product([False, True], [False, True], [False]):
            for brought in product(["tree's", "own", "lost"], repeat=3):
                theirs, ours = [next(free) for _ in range(3)], [next(free) for _ in range(3)]
                drop(system, *(page for page, lost in zip(theirs, gone, strict=True) if lost))
                drop(
                    system, *(p for p, which in zip(ours, brought, strict=True) if which == "lost")
                )
                space = str((gone, brought))
                system.insert(tokens[: 3 * size], *theirs, extra_key=space)
                pages = [
                    known if which == "tree's" else own
                    for known, own, which in zip(theirs, ours, brought, strict=True)
                ]

                result = system.insert(tokens, *pages, next(free), extra_key=space).swa

                kinds = [_kind(*each) for each in zip(gone, brought, strict=True)]
                for kind in ("shared", "adopted", "duplicate"):
                    assert getattr(result, kind) == intervals(kinds, kind, size)
                assert result.tail == ([(3 * size, 4 * size - 1)] if size > 1 else [])
                had = [n for n, kind in enumerate(kinds) if kind]
                positions = [n * size + offset for n in had for offset in range(size)]
                assert covered(result) == [*positions, *range(3 * size, 4 * size - 1)]

    @clause("SWARADIX-6")
    @page_sizes
    def test_window_slots_of_new_pages(self, page_size: int) -> None:
        """The second and the last whole page have none, the page that the key ends in has."""
        system, size = self.windows(page_size), page_size
        drop(system, 2, 5)
        result = system.insert(range(6 * size - 1), 1, 2, 3, 4, 5, 6)
        assert result.adopted == [(0, 4 * size)]
        assert result.swa.adopted == [(0, size), (2 * size, 4 * size)]
        assert result.swa.shared == result.swa.duplicate == []
        assert result.swa.tail == ([(5 * size, 6 * size - 1)] if size > 1 else [])


def _kind(gone: bool, brought: str) -> str:
    """What becomes of the window slots that a caller brings for a resident page of the reach."""
    if brought == "lost" or (brought == "tree's" and gone):
        return ""
    if brought == "tree's":
        return "shared"
    return "adopted" if gone else "duplicate"
