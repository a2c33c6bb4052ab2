"""What holds of every allocator that knows pages and requests. Spec: PAGE, SWA."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.allocator_fuzzing import numbers, refused
from kvspec.conformance.allocator_laws.books import SORTED, AllocatorLaws, pages_of, pools
from kvspec.errors import ContractError

__all__ = ["RequestLaws"]

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


class RequestLaws(AllocatorLaws):
    """The tests that a suite has besides whose allocator knows requests and pages."""

    page_sizes = (4, 1, 16)

    @clause("alloc")
    def test_the_remainder_of_the_size_is_not_used(self) -> None:
        subject = self.make(size=11)
        assert (subject.size, subject.available_size()) == (11, 8)
        assert pages_of(subject.alloc(8), 4) == [1, 2]

    @clause("short")
    @SORTED
    def test_refused_requests_change_nothing(self, need_sort: bool) -> None:
        subject = self.make(pages=4, need_sort=need_sort)
        subject.alloc(12)
        subject.free([8, 4])
        before, counters = subject.view(), subject.counters()
        assert subject.alloc_extend([0, 3], [9, 9], [-1, 14], 15) is None
        assert subject.alloc_decode([1, 5, 1, 1], [-1, 15, -1, -1]) is None
        assert (subject.view(), subject.counters()) == (before, counters)

    @clause("amount")
    @pytest.mark.parametrize("need_size", [1, 3, 6, -1, 101])
    def test_parts_of_pages_are_refused(self, need_size: int) -> None:
        subject = self.make()
        subject.alloc(4)
        refused(subject, self.law.amount, subject.alloc, need_size)

    @clause("extend")
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
            _follow_the_rule(rows, lengths, iter(numbers(slots)), page_size)
        assert {slot // page_size for row in rows for slot in row[1:]} == subject.view().held
        assert len({slot for row in rows for slot in row[1:]}) == sum(len(row) - 1 for row in rows)

    @clause("extend")
    def test_pages_are_given_out_in_the_order_of_requests(self) -> None:
        subject = self.make(pages=6)
        new = subject.alloc_extend([0, 0], [2, 5], [-1, -1], 7)
        assert numbers(new) == [4, 5, 8, 9, 10, 11, 12]
        grown = subject.alloc_extend([2, 5], [9, 6], [5, 12], 8)
        assert numbers(grown) == [6, 7, 16, 17, 18, 19, 20, 13]
        assert numbers(subject.alloc_extend([], [], [], 0)) == []

    @clause("extend")
    def test_requests_may_share_what_comes_before_a_whole_page(self) -> None:
        subject = self.make()
        subject.alloc(4)
        assert numbers(subject.alloc_extend([4, 4], [5, 5], [7, 7], 2)) == [8, 12]
        assert numbers(subject.alloc_extend([2, 2], [2, 3], [5, 5], 1)) == [6]

    @clause("decode")
    @PAGE_SIZES
    def test_decode_follows_the_rule(self, page_size: int) -> None:
        subject = self.make(pages=40, page_size=page_size)
        rows: list[list[int]] = [[-1], [-1]]
        for length in range(1, 2 * page_size + 2):
            slots = subject.alloc_decode([length] * 2, [row[-1] for row in rows])
            _follow_the_rule(rows, [length] * 2, iter(numbers(slots)), page_size)

    @clause("decode")
    def test_decode_gives_one_slot_to_each_request(self) -> None:
        subject = self.make(pages=6)
        subject.alloc(12)
        assert numbers(subject.alloc_decode([3, 5, 1], [5, 7, -1])) == [6, 16, 20]

    @clause("requests")
    @pytest.mark.parametrize("requests", BAD_REQUESTS)
    def test_bad_extensions_are_refused(self, requests: str) -> None:
        subject = self.make(pages=4)
        subject.alloc(8)
        bad = BAD_REQUESTS[requests]
        refused(subject, self.law.requests, subject.alloc_extend, *bad)
        assert numbers(subject.alloc_extend([2], [3], [5], 1)) == [6]

    @clause("requests")
    @pytest.mark.parametrize("requests", BAD_DECODES)
    def test_bad_decodes_are_refused(self, requests: str) -> None:
        subject = self.make(pages=4)
        subject.alloc(8)
        bad = BAD_DECODES[requests]
        refused(subject, self.law.requests, subject.alloc_decode, *bad)
        assert numbers(subject.alloc_decode([3], [5])) == [6]

    @clause("requests")
    def test_a_page_that_waits_is_not_continued(self) -> None:
        subject = self.make(pages=2)
        subject.alloc(4)
        subject.free_group_begin()
        subject.free([4])
        refused(subject, self.law.requests, subject.alloc_decode, [3], [5])

    @clause("free")
    @pytest.mark.parametrize(
        ("slots", "pages"),
        [([9], [2]), ([5, 5], [1]), ([7, 12, 4, 15], [1, 3]), ([], []), ([4, 5, 6, 7, 8], [1, 2])],
        ids=["one slot", "twice", "several", "none", "over the edge"],
    )
    def test_any_slot_gives_back_its_page(self, slots: list[int], pages: list[int]) -> None:
        subject = self.make(pages=4)
        subject.alloc(12)
        subject.free(slots)
        assert all(view.held == {1, 2, 3} - set(pages) for view in pools(subject.view()))
        assert subject.available_size() == 4 + 4 * len(pages)

    @clause("free")
    def test_two_frees_are_one_where_they_meet_at_a_page(self) -> None:
        for middle in range(5):
            for subject, unit in self.each(pages=4):
                slots = subject.alloc(4 * unit)
                subject.free(slots[: middle * unit])
                subject.free(slots[middle * unit :])
                assert subject.available_size() == 4 * unit

    @clause("given_back")
    @SORTED
    def test_the_rest_of_a_page_is_not_freed_later(self, need_sort: bool) -> None:
        subject = self.make(need_sort=need_sort)
        slots = subject.alloc(12)
        subject.free(slots[:6])
        refused(subject, self.law.given_back, subject.free, slots[6:])
        subject.free_group_begin()
        subject.free(slots[8:10])
        refused(subject, self.law.given_back, subject.free, slots[10:])

    @clause("given_back")
    @pytest.mark.parametrize("slot", [3, -4, 16, 18])
    def test_slots_beside_the_pages_are_not_freed(self, slot: int) -> None:
        subject = self.make(size=18)
        subject.alloc(8)
        refused(subject, self.law.given_back, subject.free, [8, slot])

    @clause("restore")
    def test_restore_undoes_what_requests_took(self) -> None:
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

    @clause("argument")
    @pytest.mark.parametrize("page_size", [0, -4, 2**31])
    def test_page_sizes_out_of_range_are_refused(self, page_size: int) -> None:
        with pytest.raises(ContractError, match=f"^{self.law.argument}: "):
            self.make(size=8, page_size=page_size)

    @clause("argument")
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8], ids=str)
    def test_integer_tensors_of_any_width_are_taken(self, dtype: torch.dtype) -> None:
        subject = self.make()
        subject.alloc(8)
        given = torch.tensor([3, 0, 5, 0], dtype=dtype)
        assert numbers(subject.alloc_decode(given[:1], given[2:3])) == [6]
        subject.free(given[::2] + 1)
        assert subject.view().held == {2}

    def calls_with(self, subject: Any, bad: Any) -> list[Callable[[], object]]:
        """See the base."""
        return [
            *super().calls_with(subject, bad),
            lambda: subject.alloc_extend(bad, [3], [5], 1),
            lambda: subject.alloc_extend([2], bad, [5], 1),
            lambda: subject.alloc_extend([2], [3], bad, 1),
            lambda: subject.alloc_decode(bad, [5]),
            lambda: subject.alloc_decode([3], bad),
        ]

    def pages_moved(self, subject: Any) -> tuple[int, int]:
        """See the base."""
        subject.alloc_extend([0], [subject.page_size + 1], [-1], subject.page_size + 1)
        subject.alloc_decode([1], [-1])
        moved, named = super().pages_moved(subject)
        return moved, named + 2 + 1


def _follow_the_rule(
    rows: list[list[int]], lengths: list[int], slots: Iterator[int], page_size: int
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
