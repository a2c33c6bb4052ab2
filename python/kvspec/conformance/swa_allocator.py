"""Conformance of the allocator of a full and a window pool. Spec: SWA."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.allocator_fuzzing import (
    WindowMachine,
    numbers,
    refused,
    run_machine,
    tell_both,
)
from kvspec.conformance.allocator_laws import SORTED, Law, RequestLaws, pages_of
from kvspec.errors import ContractError
from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.interfaces.slot_allocator import AllocatorView, BaseTokenToKVPoolAllocator
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator

__all__ = ["SWAAllocatorConformance"]

DIGEST = 0xE49DF8EAEB9CC634
"""Of pools of three and two pages with one pair: a number that no other digest function gives."""

UNITS = pytest.mark.parametrize("unit", [1, 4], ids=["slots", "pages"])

# Pages whose pairs cannot be given back, in what `mixed` makes.
BAD_PAIRS = {
    "of the sink": [0],
    "of a free page": [1, 6],
    "of a pending page": [5],
    "of a page out of range": [7],
    "of a page below the sink": [-1],
    "of a page far away": [2**40],
    "that is not there": [4],
}
# Targets and sources that do not fit, there.
BAD_MOVES: dict[str, tuple[list[int], list[int]]] = {
    "more targets": ([4, 3], [1]),
    "more sources": ([4], [1, 2]),
    "a target with a pair": ([2], [1]),
    "onto itself": ([1], [1]),
    "a source without a pair": ([4], [3]),
    "a target twice": ([4, 4], [1, 2]),
    "a source twice": ([3, 4], [1, 1]),
    "a free target": ([6], [1]),
    "a free source": ([4], [6]),
    "a pending target": ([5], [1]),
    "the sink as a target": ([0], [1]),
    "the sink as a source": ([4], [0]),
    "a target out of range": ([7], [1]),
    "the second is bad": ([3, 4], [1, 3]),
}
# What makes tickets invalid besides what does for every allocator, and what is said of it.
ENDS_OF_A_TICKET: dict[str, tuple[Callable[[Any, int], object], str]] = {
    "free": (lambda subject, unit: subject.free([unit]), "{}s were freed"),
    "free without a pair": (lambda subject, unit: subject.free([3 * unit]), "{}s were freed"),
    "free both": (lambda subject, unit: subject.free([unit], [2 * unit]), "{}s were freed"),
    "free a pair": (lambda subject, unit: subject.free([], [unit]), "window {}s were freed"),
    "free_swa": (lambda subject, unit: subject.free_swa([unit]), "window {}s were freed"),
    "move_swa": (
        lambda subject, unit: subject.move_swa([3 * unit], [unit]),
        "window {}s were moved",
    ),
}


class SWAAllocatorConformance(RequestLaws):
    """Subclass it and set `impl`."""

    class_name = "SWATokenToKVPoolAllocator"
    interface = SWATokenToKVPoolAllocator
    room = "swa_allocator"
    pool_count = 2
    law = Law(
        books="SWA-1",
        sink="SWA-1",
        alloc="SWA-3",
        short="SWA-4",
        amount="SWA-5",
        extend="SWA-6",
        decode="SWA-6",
        requests="SWA-7",
        free="SWA-8",
        given_back="SWA-9",
        pending="SWA-14",
        group="SWA-15",
        clear="SWA-16",
        restore="SWA-17",
        ticket="SWA-18",
        argument="SWA-21",
        order="SWA-22",
        cost="SWA-23",
        check="SWA-24",
        digest="SWA-24",
        waiting="SWA-25",
    )

    def make(
        self,
        pages: int = 3,
        page_size: int | None = None,
        need_sort: bool = False,
        window: int | None = None,
        **given: Any,
    ) -> Any:
        """`window` pages in the window pool, and as many as in the full one if that is not said."""
        unit = self.page_sizes[0] if page_size is None else page_size
        size_swa = given.get("size", pages * unit) if window is None else window * unit
        given.setdefault("size_swa", size_swa)
        return super().make(pages, unit, need_sort, **given)

    def mixed(self, unit: int, need_sort: bool = False) -> Any:
        """1, 2 held with their pairs 1, 2; 3, 4 held without; 5 pending; 6 free."""
        subject = self.make(6, unit, need_sort)
        subject.alloc(5 * unit)
        subject.free_swa([3 * unit, 4 * unit])
        subject.free_group_begin()
        subject.free([5 * unit])
        return subject

    @clause("SWA-1", "SWA-2")
    @pytest.mark.parametrize(("unit", "need_sort"), [(1, False), (1, True), (4, True), (16, False)])
    def test_any_sequence(self, unit: int, need_sort: bool) -> None:
        def make(pages: int, window: int) -> Any:
            return self.make(pages, unit, need_sort, window)

        run_machine(make, unit, WindowMachine)

    @clause("SWA-2")
    @UNITS
    def test_a_window_page_has_one_owner(self, unit: int) -> None:
        subject = self.mixed(unit)
        subject.move_swa([4 * unit], [unit])
        subject.free([2 * unit])
        view = subject.view()
        assert view.pairs == ((4, 1),)
        assert (sorted(view.held), sorted(view.swa.held)) == ([1, 3, 4], [1])

    @clause("SWA-2")
    @UNITS
    def test_a_pair_ends_with_its_page(self, unit: int) -> None:
        """What a page had before says nothing of what it has when it is handed out again."""
        subject = self.make(2, unit)
        subject.alloc(2 * unit)
        subject.free([unit])
        assert subject.view().pairs == ((2, 2),)
        subject.free_swa([2 * unit])
        subject.alloc(unit)
        subject.free([2 * unit])
        subject.alloc(unit)
        view = subject.view()
        assert sorted(pair for _, pair in view.pairs) == [1, 2]
        subject.free([unit])
        assert subject.view().swa.held == {pair for page, pair in view.pairs if page == 2}

    @clause("SWA-3")
    @UNITS
    def test_pages_are_paired_with_the_next_free_ones(self, unit: int) -> None:
        subject = self.make(4, unit, window=3)
        subject.alloc(3 * unit)
        subject.free_swa([2 * unit])
        subject.free([unit])
        window = subject.view().swa.free
        (taken,) = pages_of(subject.alloc(unit), unit)
        assert subject.view().pairs == tuple(sorted([(3, 3), (taken, window[0])]))
        assert subject.view().swa.free == window[1:]

    @clause("SWA-3")
    def test_sizes_are_as_given(self) -> None:
        subject = self.make(size=11, size_swa=7)
        assert (subject.size, subject.size_full, subject.size_swa) == (11, 11, 7)
        assert (subject.full_available_size(), subject.swa_available_size()) == (8, 4)
        assert self.make(size=3, size_swa=3, page_size=1).alloc(3).tolist() == [1, 2, 3]

    @clause("SWA-4")
    @SORTED
    @UNITS
    @pytest.mark.parametrize(("pages", "window"), [(4, 2), (2, 4)], ids=["window", "full"])
    def test_the_shorter_pool_decides(
        self, pages: int, window: int, unit: int, need_sort: bool
    ) -> None:
        subject = self.make(pages, unit, need_sort, window)
        subject.free(subject.alloc(2 * unit))
        before, counters = subject.view(), subject.counters()
        assert subject.alloc(3 * unit) is None
        assert subject.alloc_extend([0], [3 * unit], [-1], 3 * unit) is None
        assert subject.alloc_decode([1, 1, 1], [-1, -1, -1]) is None
        assert (subject.view(), subject.counters()) == (before, counters)
        assert len(pages_of(subject.alloc(2 * unit), unit)) == 2

    @clause("SWA-4")
    def test_what_counts_is_pages(self) -> None:
        """Requests of 5, 5 and 5 tokens fit into 16 slots, and not into 4 pages."""
        subject = self.make(8, window=4)
        assert subject.alloc_extend([0, 0, 0], [5, 5, 5], [-1, -1, -1], 15) is None
        assert subject.alloc_extend([0, 0], [5, 5], [-1, -1], 10) is not None
        assert (subject.available_size(), subject.full_available_size()) == (0, 16)
        assert subject.alloc_decode([1], [-1]) is None
        assert numbers(subject.alloc_extend([5], [8], [8], 3)) == [9, 10, 11]

    @clause("SWA-6")
    def test_pages_that_requests_begin_are_paired(self) -> None:
        subject = self.make(6)
        subject.alloc_extend([0, 0], [2, 5], [-1, -1], 7)
        assert subject.view().pairs == ((1, 1), (2, 2), (3, 3))
        subject.free_swa([12])
        before = subject.view()
        subject.alloc_extend([2], [4], [5], 2)
        subject.alloc_decode([6], [8])
        assert subject.view() == before
        assert numbers(subject.alloc_decode([5, 5], [7, 15])) == [16, 20]
        assert subject.view().pairs == ((1, 1), (2, 2), (4, 3), (5, 4))

    @clause("SWA-7")
    def test_a_page_without_a_pair_is_not_continued(self) -> None:
        subject = self.make(4)
        subject.alloc_extend([0], [6], [-1], 6)
        subject.free_swa([8])
        refused(subject, "SWA-7", subject.alloc_extend, [6], [7], [9], 1)
        refused(subject, "SWA-7", subject.alloc_decode, [7], [9])
        refused(subject, "SWA-7", subject.alloc_decode, [1, 7], [-1, 9])
        assert numbers(subject.alloc_extend([6], [6], [9], 0)) == []

    @clause("SWA-7")
    @UNITS
    def test_after_a_whole_page_without_a_pair_requests_go_on(self, unit: int) -> None:
        subject = self.make(3, unit)
        subject.alloc(unit)
        subject.free_swa([unit])
        assert numbers(subject.alloc_decode([unit + 1], [2 * unit - 1])) == [2 * unit]

    @clause("SWA-8")
    @SORTED
    @UNITS
    def test_both_are_given_back_at_once(self, unit: int, need_sort: bool) -> None:
        subject = self.make(5, unit, need_sort)
        subject.alloc(5 * unit)
        subject.free_swa([4 * unit])
        subject.free([5 * unit, 4 * unit], [unit, 2 * unit])
        view = subject.view()
        assert (sorted(view.held), sorted(view.swa.held)) == ([1, 2, 3], [3])
        assert view.pairs == ((3, 3),)
        assert sorted(view.free + view.release) == [4, 5]
        assert sorted(view.swa.free + view.swa.release) == [1, 2, 4, 5]

    @clause("SWA-8")
    def test_any_slot_names_its_pair(self) -> None:
        subject = self.make(4)
        subject.alloc(16)
        subject.free([], [5, 6, 15, 4])
        assert subject.view().pairs == ((2, 2), (4, 4))
        assert (subject.full_available_size(), subject.swa_available_size()) == (0, 8)

    @clause("SWA-9")
    @UNITS
    @pytest.mark.parametrize("bad", BAD_PAIRS)
    def test_bad_free_of_pairs_is_refused_whole(self, bad: str, unit: int) -> None:
        subject = self.mixed(unit)
        pairs = [page * unit for page in [2, *BAD_PAIRS[bad]]]
        refused(subject, "SWA-9", subject.free, [3 * unit], pairs)
        refused(subject, "SWA-9", subject.free, [], pairs)
        subject.free([3 * unit], [2 * unit])

    @clause("SWA-9")
    @UNITS
    def test_what_is_given_back_is_not_among_the_pairs(self, unit: int) -> None:
        subject = self.mixed(unit)
        refused(subject, "SWA-9", subject.free, [3 * unit, unit], [2 * unit, unit])
        refused(subject, "SWA-9", subject.free, [3 * unit, 6 * unit], [unit])
        subject.free([3 * unit, unit], [2 * unit])

    @clause("SWA-9")
    @pytest.mark.parametrize("twice", [([1, 1], []), ([], [1, 2, 1]), ([3, 3], [1])], ids=str)
    def test_a_slot_is_named_once(self, twice: tuple[list[int], list[int]]) -> None:
        subject = self.mixed(1)
        refused(subject, "SWA-9", subject.free, *twice)

    @clause("SWA-10")
    @SORTED
    @UNITS
    def test_a_page_stays_without_its_pair(self, unit: int, need_sort: bool) -> None:
        subject = self.make(4, unit, need_sort, window=3)
        taken = subject.alloc(3 * unit)
        subject.free_swa(taken[: 2 * unit])
        view = subject.view()
        assert (sorted(view.held), sorted(view.swa.held), view.pairs) == ([1, 2, 3], [3], ((3, 3),))
        assert (subject.full_available_size(), subject.swa_available_size()) == (unit, 2 * unit)
        subject.free(taken[unit:])
        view = subject.view()
        assert sorted(view.free + view.release) == [2, 3, 4]
        assert sorted(view.swa.free + view.swa.release) == [1, 2, 3]

    @clause("SWA-10")
    @pytest.mark.parametrize("slots", [[9], [8, 8], [11, 8, 9]], ids=str)
    def test_a_pair_is_given_back_once(self, slots: list[int]) -> None:
        subject = self.make()
        subject.alloc(12)
        subject.free_swa(slots)
        assert subject.view().pairs == ((1, 1), (3, 3))
        assert subject.view().swa.free == (2,)

    @clause("SWA-11")
    @UNITS
    @pytest.mark.parametrize("bad", BAD_PAIRS)
    def test_bad_free_swa_is_refused_whole(self, bad: str, unit: int) -> None:
        subject = self.mixed(unit)
        refused(subject, "SWA-11", subject.free_swa, [p * unit for p in [2, *BAD_PAIRS[bad]]])
        subject.free_swa([2 * unit])

    @clause("SWA-11")
    def test_a_pair_is_not_given_back_twice(self) -> None:
        subject = self.mixed(1)
        refused(subject, "SWA-11", subject.free_swa, [1, 1])
        pages = self.make()
        pages.alloc(8)
        pages.free_swa([4, 5])
        refused(pages, "SWA-11", pages.free_swa, [6, 7])

    @clause("SWA-12")
    @SORTED
    @UNITS
    def test_a_pair_moves_and_nothing_else(self, unit: int, need_sort: bool) -> None:
        subject = self.mixed(unit, need_sort)
        before, counters = subject.view(), subject.counters()
        subject.move_swa([4 * unit, 3 * unit], [unit, 2 * unit])
        assert subject.view() == before._replace(pairs=((3, 2), (4, 1)))
        assert subject.counters() == counters
        subject.move_swa([], [])
        assert subject.view() == before._replace(pairs=((3, 2), (4, 1)))

    @clause("SWA-12")
    def test_any_slots_move_the_pairs_of_their_pages(self) -> None:
        subject = self.mixed(4)
        subject.move_swa(torch.tensor([14], dtype=torch.int32), [11])
        assert subject.view().pairs == ((1, 1), (3, 2))

    @clause("SWA-13")
    @UNITS
    @pytest.mark.parametrize("bad", BAD_MOVES)
    def test_bad_moves_are_refused_whole(self, bad: str, unit: int) -> None:
        subject = self.mixed(unit)
        slots = [[page * unit for page in pages] for pages in BAD_MOVES[bad]]
        refused(subject, "SWA-13", subject.move_swa, *slots)
        subject.move_swa([3 * unit], [unit])

    @clause("SWA-14")
    @SORTED
    @UNITS
    def test_pairs_wait_too_and_end_at_once(self, unit: int, need_sort: bool) -> None:
        subject = self.make(4, unit, need_sort)
        subject.alloc(4 * unit)
        subject.free_group_begin()
        subject.free([2 * unit], [4 * unit])
        subject.free_swa([unit])
        view = subject.view()
        assert (view.pending, sorted(view.swa.pending), view.pairs) == ((2,), [1, 2, 4], ((3, 3),))
        assert view.swa.group
        assert subject.swa_available_size() == 0
        subject.free_group_end()
        view = subject.view()
        assert (view.pending, view.swa.pending, view.swa.group) == ((), (), False)
        assert (subject.full_available_size(), subject.swa_available_size()) == (unit, 3 * unit)
        assert sorted(view.swa.free + view.swa.release) == [1, 2, 4]

    @clause("SWA-16")
    @UNITS
    def test_clear_ends_every_pair(self, unit: int) -> None:
        subject = self.mixed(unit)
        subject.clear()
        assert subject.view() == self.make(6, unit).view()
        assert not numbers(subject.full_to_swa_index_mapping.unique())[0]

    @clause("SWA-17")
    @SORTED
    @UNITS
    def test_restore_takes_the_pairs_back(self, unit: int, need_sort: bool) -> None:
        subject = self.make(6, unit, need_sort, window=5)
        subject.alloc(3 * unit)
        subject.free([2 * unit], [3 * unit])
        subject.free([unit])
        before, ticket = subject.view(), subject.backup_state()
        subject.alloc(2 * unit)
        subject.alloc_decode([1, 1], [-1, -1])
        taken = [pair for page, pair in subject.view().pairs if page not in before.held]
        subject.restore_state(ticket)
        after = subject.view()
        assert (after.pairs, after.held, after.swa.held) == ((), before.held, before.swa.held)
        assert sorted(after.swa.free[:4]) == sorted(taken)
        if not need_sort:
            assert after == before

    @clause("SWA-18")
    @UNITS
    @pytest.mark.parametrize("end", ENDS_OF_A_TICKET)
    def test_a_ticket_ends_when_a_pair_changes(self, end: str, unit: int) -> None:
        subject = self.make(4, unit)
        subject.alloc(3 * unit)
        subject.free_swa([3 * unit])
        ticket = subject.backup_state()
        subject.alloc(unit)
        call, why = ENDS_OF_A_TICKET[end]
        call(subject, unit)
        refused(subject, "SWA-18", subject.restore_state, ticket)
        since = why.format("slot" if unit == 1 else "page")
        with pytest.raises(ContractError, match=f"no longer valid: {since} since$"):
            subject.restore_state(ticket)

    @clause("SWA-17")
    def test_calls_that_change_nothing_leave_tickets_valid(self) -> None:
        subject = self.make()
        subject.alloc(4)
        before, ticket = subject.view(), subject.backup_state()
        subject.alloc(4)
        subject.free([], [])
        subject.free_swa([])
        subject.move_swa([], [])
        subject.restore_state(ticket)
        assert subject.view() == before

    @clause("SWA-19")
    @UNITS
    def test_available_is_the_smaller_of_the_two(self, unit: int) -> None:
        subject = self.make(5, unit, window=4)
        for call, full, window in (
            (partial(subject.alloc, 3 * unit), 2, 1),
            (partial(subject.free_swa, [unit, 2 * unit]), 2, 3),
            (partial(subject.free, [unit, 2 * unit]), 4, 3),
        ):
            call()
            assert subject.full_available_size() == full * unit
            assert subject.swa_available_size() == window * unit
            assert subject.available_size() == min(full, window) * unit

    @clause("SWA-25")
    @UNITS
    def test_what_is_pending_is_counted_for_each_pool(self, unit: int) -> None:
        subject = self.make(5, unit, window=4)
        subject.alloc(4 * unit)
        subject.free_swa([unit])
        subject.free_group_begin()
        for call, full, window in (
            (partial(subject.free, [unit, 2 * unit]), 2, 1),
            (partial(subject.free_swa, [3 * unit]), 2, 2),
            (subject.free_group_end, 0, 0),
        ):
            call()
            assert (subject.pending_size(), subject.swa_pending_size()) == (
                full * unit,
                window * unit,
            )

    @clause("SWA-20")
    @UNITS
    def test_slots_are_translated(self, unit: int) -> None:
        subject = self.make(4, unit)
        subject.alloc(4 * unit)
        subject.free([2 * unit])
        subject.free_swa([unit])
        subject.move_swa([unit], [4 * unit])
        given = [-1, 0, 2 * unit - 1, 3 * unit, 2 * unit, 4 * unit, 5 * unit - 1]
        found = subject.translate_loc_from_full_to_swa(given)
        assert found.tolist() == [-1, 0, 5 * unit - 1, 3 * unit, 0, 0, 0]
        assert (found.dtype, found.device.type, found.dim()) == (torch.int32, "cpu", 1)
        assert subject.translate_loc_from_full_to_swa([]).tolist() == []

    @clause("SWA-20")
    @UNITS
    def test_the_mapping_is_a_copy(self, unit: int) -> None:
        subject = self.make(3, unit)
        subject.alloc(2 * unit)
        subject.free_swa([unit])
        mapping = subject.full_to_swa_index_mapping
        assert numbers(mapping) == [slot if slot // unit == 2 else 0 for slot in range(4 * unit)]
        mapping.fill_(1)
        assert subject.translate_loc_from_full_to_swa([0]).tolist() == [0]

    @clause("SWA-21")
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_window_sizes_out_of_range_are_refused(self, page_size: int) -> None:
        for size_swa in (-1, 2**31 - page_size, 2**40):
            with pytest.raises(ContractError, match=r"^SWA-21: "):
                self.make(page_size=page_size, size_swa=size_swa)

    @clause("SWA-21")
    @pytest.mark.parametrize("slot", [-2, 22, 2**31, 2**40, -(2**40)])
    def test_only_slots_are_translated(self, slot: int) -> None:
        subject = self.make(size=18)
        subject.alloc(8)
        refused(subject, "SWA-21", subject.translate_loc_from_full_to_swa, [4, slot])
        assert subject.translate_loc_from_full_to_swa([21]).tolist() == [0]

    def calls_with(self, subject: Any, bad: Any) -> list[Callable[[], object]]:
        """See the base."""
        return [
            *super().calls_with(subject, bad),
            lambda: subject.free([4], bad),
            lambda: subject.free_swa(bad),
            lambda: subject.move_swa(bad, [4]),
            lambda: subject.move_swa([4], bad),
            lambda: subject.translate_loc_from_full_to_swa(bad),
        ]

    @clause("SWA-1", "SWA-22")
    @SORTED
    @pytest.mark.parametrize("unit", [1, 4, 16])
    def test_either_pool_is_kept_as_one_alone(self, unit: int, need_sort: bool) -> None:
        """Any sequence leaves the books of two allocators of one pool, told the same."""
        choose, subject = random.Random(unit), self.make(8, unit, need_sort, window=7)
        full, window = (self.alone(pages, unit, need_sort) for pages in (8, 7))
        for _ in range(150):
            tell_both(choose, subject, full, window)
            view = subject.view()
            assert view._replace(swa=None, pairs=()) == full.view()
            assert view.swa == window.view()

    def alone(self, pages: int, unit: int, need_sort: bool) -> Any:
        """An allocator of one pool."""
        arguments: dict[str, Any] = {"dtype": torch.float16, "device": "cpu", "kvcache": None}
        arguments |= {"size": pages * unit, "need_sort": need_sort}
        if unit == 1:
            name, interface = "TokenToKVPoolAllocator", BaseTokenToKVPoolAllocator
            return self.subject(name, interface, **arguments)
        name, interface = "PagedTokenToKVPoolAllocator", PagedTokenToKVPoolAllocator
        return self.subject(name, interface, page_size=unit, **arguments)

    @clause("SWA-22")
    def test_pairs_go_back_in_the_order_of_slots(self) -> None:
        subject = self.make(5, 1)
        subject.alloc(5)
        subject.free([4, 1], [5, 3])
        assert subject.view().free == (4, 1)
        assert subject.view().swa.free == (4, 1, 5, 3)
        assert numbers(subject.alloc(2)) == [4, 1]
        assert subject.view().pairs == ((1, 1), (2, 2), (4, 4))

    @clause("SWA-22")
    def test_pairs_of_pages_go_back_ascending(self) -> None:
        subject = self.make(5)
        subject.alloc(20)
        subject.free([8], [16])
        subject.free([20, 4], [12])
        view = subject.view()
        assert (view.free, view.swa.free) == ((1, 5, 2), (1, 3, 5, 2, 4))
        subject.alloc(8)
        assert subject.view().pairs == ((1, 1), (5, 3))

    def pages_moved(self, subject: Any) -> tuple[int, int]:
        """See the base; a pair given back alone moves in one pool, a translation in none."""
        unit = subject.page_size
        subject.alloc(2 * unit)
        subject.free_swa([unit])
        subject.move_swa([unit], [2 * unit])
        subject.translate_loc_from_full_to_swa([unit])
        moved, named = super().pages_moved(subject)
        return moved, named + 2 + 1

    @clause("SWA-23")
    @UNITS
    def test_pages_of_both_pools_are_counted(self, unit: int) -> None:
        subject = self.make(4, unit)
        moved = [subject.counters()["pages_moved"]]
        for call in (
            partial(subject.alloc, 3 * unit),
            partial(subject.free_swa, [unit]),
            partial(subject.move_swa, [unit], [2 * unit]),
            partial(subject.free, [unit, 2 * unit]),
        ):
            call()
            moved.append(subject.counters()["pages_moved"])
        assert moved == [0, 6, 7, 7, 10]

    @clause("SWA-24")
    def test_digests_tell_pairs_apart(self) -> None:
        subject = self.make(4, 1)
        subject.alloc(3)
        subject.free_swa([1])
        before, digest = subject.view(), subject.digest()
        subject.move_swa([1], [2])
        assert subject.view() != before
        assert subject.digest() != digest
        subject.move_swa([2], [1])
        assert (subject.view(), subject.digest()) == (before, digest)

    @clause("SWA-24")
    def test_digest_is_the_same_in_every_process(self) -> None:
        subject = self.make(3, window=2)
        subject.alloc(4)
        assert subject.digest() == DIGEST

    @clause("SWA-24")
    @UNITS
    def test_check_finds_nothing_in_good_pairs(self, unit: int) -> None:
        subject = self.mixed(unit)
        subject.check()
        subject.move_swa([3 * unit], [unit])
        subject.check()
        subject.free_group_end()
        subject.check()
        assert isinstance(subject.view(), AllocatorView)
