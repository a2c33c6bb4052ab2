"""Conformance of a slot allocator. Spec: SLOT."""

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.allocator_fuzzing import AllocatorMachine, numbers, refused, run_machine
from kvspec.conformance.allocator_laws import SORTED, AllocatorLaws, Law
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator

__all__ = ["SlotAllocatorConformance"]


class SlotAllocatorConformance(AllocatorLaws):
    """Subclass it and set `impl`."""

    class_name = "TokenToKVPoolAllocator"
    interface = BaseTokenToKVPoolAllocator
    room = "slot_allocator"
    page_sizes = (1,)
    law = Law(
        books="SLOT-1",
        sink="SLOT-1",
        alloc="SLOT-2",
        short="SLOT-3",
        amount="SLOT-4",
        given_back="SLOT-5",
        pending="SLOT-7",
        group="SLOT-8",
        clear="SLOT-9",
        restore="SLOT-9",
        ticket="SLOT-10",
        argument="SLOT-11",
        order="SLOT-6",
        cost="SLOT-12",
        check="SLOT-13",
        digest="SLOT-13",
        waiting="SLOT-14",
    )

    @clause("SLOT-1")
    @SORTED
    def test_any_sequence(self, need_sort: bool) -> None:
        run_machine(lambda pages: self.make(pages, need_sort=need_sort), 1, AllocatorMachine)

    @clause("SLOT-5")
    @pytest.mark.parametrize("twice", [[1, 1], [3, 2, 3]], ids=str)
    def test_a_slot_is_named_once(self, twice: list[int]) -> None:
        subject = self.make(pages=4)
        subject.alloc(3)
        refused(subject, "SLOT-5", subject.free, twice)

    @clause("SLOT-6")
    def test_free_appends_in_the_order_given(self) -> None:
        subject = self.make(pages=5)
        subject.alloc(4)
        subject.free([4, 1])
        subject.free(torch.tensor([3], dtype=torch.int32))
        assert numbers(subject.free_pages) == [5, 4, 1, 3]
        assert numbers(subject.release_pages) == []
        assert numbers(subject.alloc(3)) == [5, 4, 1]

    @clause("SLOT-6")
    def test_need_sort_merges_when_the_free_list_is_short(self) -> None:
        subject = self.make(pages=6, need_sort=True)
        subject.alloc(5)
        subject.free([4, 1])
        subject.free([3])
        assert (subject.view().free, subject.view().release) == ((6,), (4, 1, 3))
        assert numbers(subject.alloc(1)) == [6]
        assert subject.view().release == (4, 1, 3)
        assert numbers(subject.alloc(2)) == [1, 3]
        assert (subject.view().free, subject.view().release) == ((4,), ())

    @clause("SLOT-7")
    @SORTED
    def test_group_keeps_the_order(self, need_sort: bool) -> None:
        subject = self.make(pages=4, need_sort=need_sort)
        subject.alloc(4)
        subject.free_group_begin()
        subject.free([3])
        subject.free([4, 1])
        assert subject.view().pending == (3, 4, 1)
        subject.free_group_end()
        view = subject.view()
        assert (view.pending, view.free + view.release) == ((), (3, 4, 1))
        assert numbers(subject.alloc(3)) == ([1, 3, 4] if need_sort else [3, 4, 1])
