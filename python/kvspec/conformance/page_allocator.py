"""Conformance of a page allocator. Spec: PAGE."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.allocator_fuzzing import PageMachine, numbers, refused, run_machine
from kvspec.conformance.slot_allocator import NOT_SLOTS, SORTED, ends_of_a_ticket
from kvspec.conformance.suite import Conformance
from kvspec.errors import ContractError
from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.interfaces.slot_allocator import AllocatorView

__all__ = ["PageAllocatorConformance"]

FRESH_DIGEST = 0x28B27B3DE8DBA30F
"""Of three free pages in ascending order: a number that no other digest function gives."""

PAGE_SIZES = pytest.mark.parametrize("page_size", [1, 4, 16])

# prefix_lens, seq_lens, last_loc, extend_num_tokens against pages 1 and 2 held, at page size 4
BAD_REQUESTS = {
    "lists of several lengths": ([0, 0], [1], [-1], 1),
    "no last_loc": ([0], [1], [], 1),
    "prefix beyond the length": ([3], [2], [6], -1),
    "negative prefix": ([-1], [1], [-1], 2),
    "tokens do not add up": ([0], [3], [-1], 4),
    "negative number of tokens": ([], [], [], -1),
    "no prefix, but a last_loc": ([0], [1], [4], 1),
    "a prefix, but no last_loc": ([2], [3], [-1], 1),
    "last_loc in a free page": ([2], [3], [13], 1),
    "last_loc in the sink": ([2], [3], [1], 1),
    "last_loc out of range": ([2], [3], [401], 1),
    "last_loc at another offset": ([2], [3], [6], 1),
    "aligned prefix, last_loc not at the end of its page": ([4], [5], [6], 1),
    "nothing new, last_loc at another offset": ([2], [2], [6], 0),
    "one page continued twice": ([2, 1], [3, 2], [5, 4], 2),
    "the second request is bad": ([2, 2], [3, 3], [5, 8], 2),
}
BAD_DECODES = {
    "lists of several lengths": ([1, 1], [-1]),
    "no token": ([0], [-1]),
    "first token, but a last_loc": ([1], [4]),
    "last_loc in a free page": ([3], [13]),
    "last_loc at another offset": ([3], [4]),
    "one page continued twice": ([3, 3], [5, 5]),
}


def pages_of(slots: Any, page_size: int) -> list[int]:
    """The pages of a result, which has to consist of whole pages, each in order."""
    flat = numbers(slots)
    pages = [slot // page_size for slot in flat[::page_size]]
    assert flat == [page * page_size + i for page in pages for i in range(page_size)]
    return pages


class PageAllocatorConformance(Conformance):
    """Subclass it and set `impl`."""

    def make(
        self,
        pages: int = 3,
        page_size: int = 4,
        need_sort: bool = False,
        size: int | None = None,
        **given: Any,
    ) -> Any:
        """An allocator of so many pages of the implementation under test."""
        arguments = {"dtype": torch.float16, "device": "cpu", "kvcache": None, **given}
        return self.subject(
            "PagedTokenToKVPoolAllocator",
            PagedTokenToKVPoolAllocator,
            "page_allocator",
            "observer",
            size=pages * page_size if size is None else size,
            page_size=page_size,
            need_sort=need_sort,
            **arguments,
        )

    @clause("PAGE-1")
    @SORTED
    def test_every_page_is_in_one_place(self, need_sort: bool) -> None:
        subject = self.make(pages=6, need_sort=need_sort)
        subject.alloc(20)
        subject.free([8])
        subject.free_group_begin()
        subject.free([16])
        view = subject.view()
        assert sorted([*view.free, *view.release, *view.pending, *view.held]) == [1, 2, 3, 4, 5, 6]
        assert (view.pending, view.held) == ((4,), {1, 3, 5})

    @clause("PAGE-1", "PAGE-2")
    @pytest.mark.parametrize(
        ("page_size", "need_sort"), [(1, False), (4, False), (4, True), (16, True)]
    )
    def test_any_sequence(self, page_size: int, need_sort: bool) -> None:
        def make(pages: int) -> Any:
            return self.make(pages=pages, page_size=page_size, need_sort=need_sort)

        run_machine(make, page_size, PageMachine)

    @clause("PAGE-2")
    @PAGE_SIZES
    def test_the_sink_is_never_handed_out(self, page_size: int) -> None:
        subject = self.make(pages=3, page_size=page_size)
        for _ in range(2):
            assert pages_of(subject.alloc(3 * page_size), page_size) == [1, 2, 3]
            assert subject.alloc(page_size) is None
            subject.clear()

    @clause("PAGE-3")
    @PAGE_SIZES
    @pytest.mark.parametrize("page_count", [0, 1, 3])
    def test_alloc_takes_whole_pages(self, page_size: int, page_count: int) -> None:
        subject = self.make(pages=3, page_size=page_size)
        taken = pages_of(subject.alloc(page_count * page_size), page_size)
        assert taken == [1, 2, 3][:page_count]
        assert subject.view().held == set(taken)
        assert subject.available_size() == (3 - page_count) * page_size

    @clause("PAGE-3")
    def test_the_remainder_of_the_size_is_not_used(self) -> None:
        subject = self.make(size=11, page_size=4)
        assert (subject.size, subject.available_size()) == (11, 8)
        assert pages_of(subject.alloc(8), 4) == [1, 2]

    @clause("PAGE-3")
    def test_what_was_returned_is_not_changed_by_what_follows(self) -> None:
        subject = self.make(pages=3)
        taken = subject.alloc(4)
        subject.alloc(4)
        subject.free(taken)
        assert numbers(taken) == [4, 5, 6, 7]

    @clause("PAGE-4")
    @SORTED
    def test_refused_allocations_change_nothing(self, need_sort: bool) -> None:
        subject = self.make(pages=4, need_sort=need_sort)
        subject.alloc(12)
        subject.free([8, 4])
        before, counters = subject.view(), subject.counters()
        assert subject.alloc(16) is None
        assert subject.alloc_extend([0, 3], [9, 9], [-1, 14], 15) is None
        assert subject.alloc_decode([1, 5, 1, 1], [-1, 15, -1, -1]) is None
        assert (subject.view(), subject.counters()) == (before, counters)

    @clause("PAGE-4")
    @SORTED
    def test_what_is_available_can_be_taken(self, need_sort: bool) -> None:
        subject = self.make(pages=4, need_sort=need_sort)
        subject.alloc(12)
        subject.free([8, 4])
        assert subject.available_size() == 12
        assert subject.alloc(16) is None
        assert len(pages_of(subject.alloc(12), 4)) == 3

    @clause("PAGE-5")
    @pytest.mark.parametrize("need_size", [1, 3, 6, -4, -1, 101])
    def test_parts_of_pages_are_refused(self, need_size: int) -> None:
        subject = self.make(pages=3)
        subject.alloc(4)
        refused(subject, "PAGE-5", lambda: subject.alloc(need_size))

    @clause("PAGE-6")
    @PAGE_SIZES
    @SORTED
    def test_requests_grow_by_the_rule(self, page_size: int, need_sort: bool) -> None:
        subject = self.make(pages=40, page_size=page_size, need_sort=need_sort)
        choose, rows = random.Random(page_size), [[-1] for _ in range(4)]
        for _ in range(20):
            prefixes = [len(row) - 1 for row in rows]
            lengths = [prefix + choose.choice([0, 1, 3, 9]) for prefix in prefixes]
            new = sum(lengths) - sum(prefixes)
            slots = subject.alloc_extend(prefixes, lengths, [row[-1] for row in rows], new)
            if slots is None:
                break
            self._follow_the_rule(rows, lengths, iter(numbers(slots)), page_size)
        assert {slot // page_size for row in rows for slot in row[1:]} == subject.view().held
        assert len({slot for row in rows for slot in row[1:]}) == sum(len(row) - 1 for row in rows)

    def _follow_the_rule(
        self, rows: list[list[int]], lengths: list[int], slots: Iterator[int], page_size: int
    ) -> None:
        for row, length in zip(rows, lengths, strict=True):
            for position in range(len(row) - 1, length):
                slot = next(slots)
                if position % page_size == 0:
                    assert slot % page_size == 0
                else:
                    assert slot == row[-1] + 1
                row.append(slot)
        assert next(slots, None) is None

    @clause("PAGE-6")
    def test_pages_are_given_out_in_the_order_of_requests(self) -> None:
        subject = self.make(pages=6)
        new = subject.alloc_extend([0, 0], [2, 5], [-1, -1], 7)
        assert numbers(new) == [4, 5, 8, 9, 10, 11, 12]
        grown = subject.alloc_extend([2, 5], [9, 6], [5, 12], 8)
        assert numbers(grown) == [6, 7, 16, 17, 18, 19, 20, 13]
        assert numbers(subject.alloc_extend([], [], [], 0)) == []

    @clause("PAGE-6")
    def test_requests_may_share_what_comes_before_a_whole_page(self) -> None:
        subject = self.make(pages=3)
        subject.alloc(4)
        assert numbers(subject.alloc_extend([4, 4], [5, 5], [7, 7], 2)) == [8, 12]
        assert numbers(subject.alloc_extend([2, 2], [2, 3], [5, 5], 1)) == [6]

    @clause("PAGE-7")
    @PAGE_SIZES
    def test_decode_follows_the_rule(self, page_size: int) -> None:
        subject = self.make(pages=40, page_size=page_size)
        rows: list[list[int]] = [[-1], [-1]]
        for length in range(1, 2 * page_size + 2):
            slots = subject.alloc_decode([length] * 2, [row[-1] for row in rows])
            self._follow_the_rule(rows, [length] * 2, iter(numbers(slots)), page_size)

    @clause("PAGE-7")
    def test_decode_gives_one_slot_to_each_request(self) -> None:
        subject = self.make(pages=6)
        subject.alloc(12)
        assert numbers(subject.alloc_decode([3, 5, 1], [5, 7, -1])) == [6, 16, 20]

    @clause("PAGE-8")
    @pytest.mark.parametrize("requests", BAD_REQUESTS)
    def test_bad_extensions_are_refused(self, requests: str) -> None:
        subject = self.make(pages=4)
        subject.alloc(8)
        refused(subject, "PAGE-8", lambda: subject.alloc_extend(*BAD_REQUESTS[requests]))
        assert numbers(subject.alloc_extend([2], [3], [5], 1)) == [6]

    @clause("PAGE-8")
    @pytest.mark.parametrize("requests", BAD_DECODES)
    def test_bad_decodes_are_refused(self, requests: str) -> None:
        subject = self.make(pages=4)
        subject.alloc(8)
        refused(subject, "PAGE-8", lambda: subject.alloc_decode(*BAD_DECODES[requests]))
        assert numbers(subject.alloc_decode([3], [5])) == [6]

    @clause("PAGE-8")
    def test_a_page_that_waits_is_not_continued(self) -> None:
        subject = self.make(pages=2)
        subject.alloc(4)
        subject.free_group_begin()
        subject.free([4])
        refused(subject, "PAGE-8", lambda: subject.alloc_decode([3], [5]))

    @clause("PAGE-9")
    @pytest.mark.parametrize(
        ("slots", "pages"),
        [([9], [2]), ([5, 5], [1]), ([7, 12, 4, 15], [1, 3]), ([], []), ([4, 5, 6, 7, 8], [1, 2])],
        ids=["one slot", "twice", "several", "none", "over the edge"],
    )
    def test_any_slot_gives_back_its_page(self, slots: list[int], pages: list[int]) -> None:
        subject = self.make(pages=4)
        subject.alloc(12)
        subject.free(slots)
        assert subject.view().held == {1, 2, 3} - set(pages)
        assert subject.available_size() == 4 + 4 * len(pages)

    @clause("PAGE-9")
    @PAGE_SIZES
    def test_two_frees_are_one_where_they_meet_at_a_page(self, page_size: int) -> None:
        for middle in range(5):
            subject = self.make(pages=4, page_size=page_size)
            slots = subject.alloc(4 * page_size)
            subject.free(slots[: middle * page_size])
            subject.free(slots[middle * page_size :])
            assert subject.available_size() == 4 * page_size

    @clause("PAGE-10")
    @pytest.mark.parametrize(
        "bad",
        [[0], [3], [-1], [-4], [16], [18], [2**40], [12], [4, 12], [12, 4]],
        ids=str,
    )
    def test_bad_free_is_refused_whole(self, bad: list[int]) -> None:
        subject = self.make(size=18)
        subject.alloc(8)
        refused(subject, "PAGE-10", lambda: subject.free([8, *bad]))
        subject.free([4, 8])

    @clause("PAGE-10")
    @SORTED
    def test_the_rest_of_a_page_is_not_freed_later(self, need_sort: bool) -> None:
        subject = self.make(pages=3, need_sort=need_sort)
        slots = subject.alloc(12)
        subject.free(slots[:6])
        refused(subject, "PAGE-10", lambda: subject.free(slots[6:]))
        subject.free_group_begin()
        subject.free(slots[8:10])
        refused(subject, "PAGE-10", lambda: subject.free(slots[10:]))

    @clause("PAGE-11")
    @SORTED
    def test_group_holds_back_and_ends_as_one_free(self, need_sort: bool) -> None:
        grouped, plain = (self.make(pages=4, need_sort=need_sort) for _ in range(2))
        for subject in (grouped, plain):
            subject.alloc(16)
            subject.free([8])
        grouped.free_group_begin()
        assert not grouped.is_not_in_free_group
        grouped.free([16])
        grouped.free([13, 4])
        assert grouped.available_size() == 4
        assert set(grouped.view().pending) == {1, 3, 4}
        assert grouped.alloc(8) is None
        grouped.free_group_end()
        plain.free([4, 12, 16])
        assert grouped.is_not_in_free_group
        assert grouped.view() == plain.view()

    @clause("PAGE-11")
    def test_what_waits_is_not_the_callers_tensor(self) -> None:
        subject = self.make(pages=3)
        taken = subject.alloc(4)
        subject.free_group_begin()
        subject.free(taken)
        taken.fill_(8)
        subject.free_group_end()
        assert subject.view().free == (1, 2, 3)

    @clause("PAGE-12")
    def test_groups_do_not_nest(self) -> None:
        subject = self.make(pages=3)
        refused(subject, "PAGE-12", subject.free_group_end)
        subject.alloc(8)
        subject.free_group_begin()
        subject.free([4])
        refused(subject, "PAGE-12", subject.free_group_begin)
        subject.free_group_end()
        assert subject.available_size() == 8

    @clause("PAGE-13")
    @SORTED
    def test_clear_frees_everything_in_ascending_order(self, need_sort: bool) -> None:
        subject = self.make(pages=4, need_sort=need_sort)
        subject.alloc(16)
        subject.free([12])
        subject.free_group_begin()
        subject.free([8])
        subject.clear()
        assert subject.view() == AllocatorView((1, 2, 3, 4), (), (), frozenset(), False)
        assert subject.is_not_in_free_group

    @clause("PAGE-14")
    def test_restore_undoes_the_allocations_since_the_ticket(self) -> None:
        subject = self.make(pages=6)
        subject.alloc(8)
        subject.free([8])
        subject.alloc_extend([0], [3], [-1], 3)
        before = subject.view()
        ticket = subject.backup_state()
        subject.alloc_extend([3, 0], [6, 1], [10, -1], 4)
        subject.alloc(4)
        subject.alloc_decode([7], [13])
        subject.restore_state(ticket)
        assert subject.view() == before

    @clause("PAGE-14")
    def test_restore_leaves_the_rest_as_it_is(self) -> None:
        subject = self.make(pages=4, need_sort=True)
        subject.alloc(12)
        subject.free([12])
        subject.free([8])
        ticket = subject.backup_state()
        subject.alloc(4)
        subject.alloc(4)
        subject.restore_state(ticket)
        assert subject.view() == AllocatorView((4, 2, 3), (), (), frozenset({1}), False)

    @clause("PAGE-14")
    def test_restore_in_a_group_leaves_what_waits(self) -> None:
        subject = self.make(pages=3)
        subject.alloc(4)
        subject.free_group_begin()
        subject.free([4])
        ticket = subject.backup_state()
        subject.alloc(8)
        subject.free([])
        subject.restore_state(ticket)
        assert subject.view() == AllocatorView((2, 3), (), (1,), frozenset(), True)

    @clause("PAGE-15")
    @pytest.mark.parametrize("end", ends_of_a_ticket(4))
    def test_a_ticket_ends_with_the_next_free_group_clear_or_restore(self, end: str) -> None:
        subject = self.make(pages=4)
        subject.alloc(8)
        ticket = subject.backup_state()
        subject.alloc(4)
        ends_of_a_ticket(4)[end](subject)
        refused(subject, "PAGE-15", lambda: subject.restore_state(ticket))

    @clause("PAGE-15")
    def test_a_ticket_is_for_one_allocator_and_one_restore(self) -> None:
        subject, other = self.make(), self.make()
        refused(subject, "PAGE-15", lambda: subject.restore_state(other.backup_state()))
        refused(subject, "PAGE-15", lambda: subject.restore_state(None))
        ticket = subject.backup_state()
        subject.alloc(4)
        subject.restore_state(ticket)
        refused(subject, "PAGE-15", lambda: subject.restore_state(ticket))

    @clause("PAGE-16")
    def test_one_free_goes_ascending_before_the_free_list(self) -> None:
        subject = self.make(pages=6)
        subject.alloc(20)
        subject.free([20, 8])
        subject.free(torch.tensor([17, 4], dtype=torch.int32))
        assert numbers(subject.free_pages) == [1, 4, 2, 5, 6]
        assert pages_of(subject.alloc(12), 4) == [1, 4, 2]

    @clause("PAGE-16")
    def test_need_sort_merges_when_the_free_list_is_short(self) -> None:
        subject = self.make(pages=6, need_sort=True)
        subject.alloc(20)
        subject.free([20, 8])
        subject.free([4])
        assert numbers(subject.release_pages) == [1, 2, 5]
        assert pages_of(subject.alloc(4), 4) == [6]
        assert (subject.view().free, subject.view().release) == ((), (1, 2, 5))
        assert numbers(subject.alloc_extend([0], [5], [-1], 5)) == [4, 5, 6, 7, 8]
        assert (subject.view().free, subject.view().release) == ((5,), ())

    @clause("PAGE-16")
    def test_release_list_is_sorted_into_the_free_list(self) -> None:
        subject = self.make(pages=4, need_sort=True)
        subject.alloc(12)
        subject.free([8])
        subject.free([12])
        assert subject.view().release == (3, 2)
        assert pages_of(subject.alloc(8), 4) == [2, 3]
        assert subject.view().free == (4,)

    @clause("PAGE-17")
    @pytest.mark.parametrize(
        ("size", "page_size"),
        [(8, 0), (8, -4), (-1, 4), (2**31 - 4, 4), (2**40, 4), (8, 2**31)],
    )
    def test_sizes_out_of_range_are_refused(self, size: int, page_size: int) -> None:
        with pytest.raises(ContractError, match=r"^PAGE-17: "):
            self.make(size=size, page_size=page_size)

    @clause("PAGE-17")
    @pytest.mark.parametrize("given", NOT_SLOTS)
    def test_what_is_no_list_of_slots_is_refused(self, given: str) -> None:
        subject = self.make()
        subject.alloc(8)
        bad = NOT_SLOTS[given]
        calls: list[Callable[[], object]] = [
            lambda: subject.free(bad),
            lambda: subject.alloc_extend(bad, [3], [5], 1),
            lambda: subject.alloc_extend([2], bad, [5], 1),
            lambda: subject.alloc_extend([2], [3], bad, 1),
            lambda: subject.alloc_decode(bad, [5]),
            lambda: subject.alloc_decode([3], bad),
        ]
        for call in calls:
            with pytest.raises(ContractError, match=r"^PAGE-17: "):
                call()
        assert subject.view() == AllocatorView((3,), (), (), frozenset({1, 2}), False)

    @clause("PAGE-17")
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
    def test_integer_tensors_of_any_width_are_taken(self, dtype: torch.dtype) -> None:
        subject = self.make(pages=3)
        subject.alloc(8)
        given = torch.tensor([3, 0, 5, 0], dtype=dtype)
        assert numbers(subject.alloc_decode(given[:1], given[2:3])) == [6]
        subject.free(given[::2] + 1)
        assert subject.view().held == {2}

    @clause("PAGE-17")
    def test_an_empty_pool_is_a_pool(self) -> None:
        subject = self.make(size=3, page_size=4)
        assert subject.alloc(4) is None
        assert numbers(subject.alloc(0)) == []

    @clause("PAGE-18")
    def test_cost_does_not_depend_on_the_pool(self) -> None:
        moved = {_pages_moved(self.make(pages=pages)) for pages in (64, 128, 256)}
        assert len(moved) == 1
        assert moved.pop() <= 2 * PAGES_NAMED

    @clause("PAGE-18")
    def test_merges_are_counted(self) -> None:
        subject = self.make(pages=4, need_sort=True)
        subject.free(subject.alloc(16))
        subject.alloc(4)
        counters = subject.counters()
        assert (counters["merges"], counters["pages_merged"]) == (1, 4)

    @clause("PAGE-19")
    @SORTED
    def test_check_finds_nothing_in_good_books(self, need_sort: bool) -> None:
        subject = self.make(pages=6, need_sort=need_sort)
        subject.check()
        taken = subject.alloc(8)
        subject.free(taken[:4])
        subject.check()
        subject.alloc(12)
        subject.free_group_begin()
        subject.free(taken[4:])
        subject.check()

    @clause("PAGE-20")
    def test_equal_views_have_equal_digests(self) -> None:
        one, other = self.make(pages=4), self.make(pages=4)
        one.free(one.alloc(8))
        other.alloc(12)
        other.free([12])
        other.free([8])
        other.free([4])
        assert one.view() == other.view()
        assert one.digest() == other.digest()

    @clause("PAGE-20")
    def test_different_views_have_different_digests(self) -> None:
        steps: list[Callable[[Any], object]] = [
            lambda subject: subject.alloc(12),
            lambda subject: subject.free([4]),
            lambda subject: subject.alloc(4),
            lambda subject: subject.free_group_begin(),
            lambda subject: subject.free([8]),
            lambda subject: subject.free([12]),
            lambda subject: subject.free_group_end(),
        ]
        subject = self.make(pages=4, need_sort=True)
        views, digests = {subject.view()}, {subject.digest()}
        for step in steps:
            step(subject)
            views.add(subject.view())
            digests.add(subject.digest())
        assert len(views) == len(digests) == len(steps) + 1

    @clause("PAGE-20")
    def test_digest_is_the_same_in_every_process(self) -> None:
        subject = self.make(pages=3)
        assert subject.digest() == FRESH_DIGEST

    @clause("PAGE-3")
    def test_attributes_are_as_given(self) -> None:
        kvcache = object()
        subject = self.make(pages=2, dtype=torch.bfloat16, kvcache=kvcache)
        assert (subject.size, subject.page_size, subject.need_sort) == (8, 4, False)
        assert (subject.dtype, subject.device) == (torch.bfloat16, "cpu")
        assert subject.get_kvcache() is kvcache


PAGES_NAMED = 3 + 2 + 2 + 2 + 1 + 1
"""By the calls of `_pages_moved`; each goes into a list or out of one, or waits and does both."""


def _pages_moved(subject: Any) -> int:
    subject.alloc(12)
    subject.free(subject.alloc(8))
    subject.alloc_extend([0], [5], [-1], 5)
    subject.alloc_decode([1], [-1])
    subject.backup_state()
    subject.free_group_begin()
    subject.free([4])
    subject.free_group_end()
    moved: int = subject.counters()["pages_moved"]
    return moved
