"""Conformance of a page allocator. Spec: PAGE."""

from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.allocator_fuzzing import PageMachine, numbers, run_machine
from kvspec.conformance.allocator_laws import Law, RequestLaws, pages_of
from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator

__all__ = ["PageAllocatorConformance"]

FRESH_DIGEST = 0x28B27B3DE8DBA30F
"""Of three free pages in ascending order: a number that no other digest function gives."""


class PageAllocatorConformance(RequestLaws):
    """Subclass it and set `impl`."""

    class_name = "PagedTokenToKVPoolAllocator"
    interface = PagedTokenToKVPoolAllocator
    room = "page_allocator"
    law = Law(
        books="PAGE-1",
        sink="PAGE-2",
        alloc="PAGE-3",
        short="PAGE-4",
        amount="PAGE-5",
        extend="PAGE-6",
        decode="PAGE-7",
        requests="PAGE-8",
        free="PAGE-9",
        given_back="PAGE-10",
        pending="PAGE-11",
        group="PAGE-12",
        clear="PAGE-13",
        restore="PAGE-14",
        ticket="PAGE-15",
        argument="PAGE-17",
        order="PAGE-16",
        cost="PAGE-18",
        check="PAGE-19",
        digest="PAGE-20",
        waiting="PAGE-21",
    )

    @clause("PAGE-1", "PAGE-2")
    @pytest.mark.parametrize(
        ("page_size", "need_sort"), [(1, False), (4, False), (4, True), (16, True)]
    )
    def test_any_sequence(self, page_size: int, need_sort: bool) -> None:
        def make(pages: int) -> Any:
            return self.make(pages, page_size=page_size, need_sort=need_sort)

        run_machine(make, page_size, PageMachine)

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

    @clause("PAGE-20")
    def test_digest_is_the_same_in_every_process(self) -> None:
        assert self.make(pages=3).digest() == FRESH_DIGEST
