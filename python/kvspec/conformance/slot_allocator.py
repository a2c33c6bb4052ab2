"""Conformance of a slot allocator. Spec: SLOT."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.allocator_fuzzing import AllocatorMachine, numbers, refused, run_machine
from kvspec.conformance.suite import Conformance
from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import AllocatorView, BaseTokenToKVPoolAllocator

__all__ = ["NOT_SLOTS", "SORTED", "SlotAllocatorConformance", "ends_of_a_ticket"]

SORTED = pytest.mark.parametrize("need_sort", [False, True], ids=["queue", "need_sort"])
NOT_SLOTS = {
    "floats": [1.5],
    "float tensor": torch.tensor([1.0]),
    "two dimensions": torch.tensor([[1]]),
    "no dimension": torch.tensor(1),
    "not on the CPU": torch.empty(1, dtype=torch.int64, device="meta"),
    "one number": 1,
    "nothing": None,
}


def ends_of_a_ticket(page_size: int) -> dict[str, Callable[[Any], object]]:
    """What makes the tickets of an allocator invalid that holds page 1."""

    def restore_another(subject: Any) -> None:
        subject.restore_state(subject.backup_state())

    def group(subject: Any) -> None:
        subject.free_group_begin()
        subject.free_group_end()

    return {
        "free": lambda subject: subject.free([page_size]),
        "clear": lambda subject: subject.clear(),
        "group begin": lambda subject: subject.free_group_begin(),
        "group": group,
        "restore": restore_another,
    }


class SlotAllocatorConformance(Conformance):
    """Subclass it and set `impl`."""

    def make(self, size: int = 4, need_sort: bool = False, **given: Any) -> Any:
        """A slot allocator of the implementation under test."""
        arguments = {"dtype": torch.float16, "device": "cpu", "kvcache": None, **given}
        return self.subject(
            "TokenToKVPoolAllocator",
            BaseTokenToKVPoolAllocator,
            "slot_allocator",
            "observer",
            size=size,
            need_sort=need_sort,
            **arguments,
        )

    @clause("SLOT-1")
    @SORTED
    def test_every_slot_is_in_one_place(self, need_sort: bool) -> None:
        subject = self.make(size=6, need_sort=need_sort)
        subject.alloc(5)
        subject.free([2])
        subject.free_group_begin()
        subject.free([4])
        view = subject.view()
        assert sorted([*view.free, *view.release, *view.pending, *view.held]) == [1, 2, 3, 4, 5, 6]
        assert (view.pending, view.held) == ((4,), {1, 3, 5})

    @clause("SLOT-1")
    @SORTED
    def test_any_sequence(self, need_sort: bool) -> None:
        run_machine(lambda pages: self.make(size=pages, need_sort=need_sort), 1, AllocatorMachine)

    @clause("SLOT-2")
    @pytest.mark.parametrize("need_size", [0, 1, 3, 4])
    def test_alloc_takes_from_the_head(self, need_size: int) -> None:
        subject = self.make(size=4)
        assert numbers(subject.alloc(need_size)) == [1, 2, 3, 4][:need_size]
        assert subject.available_size() == 4 - need_size
        assert subject.view().held == {1, 2, 3, 4} - set(range(need_size + 1, 5))

    @clause("SLOT-2")
    def test_what_was_returned_is_not_changed_by_what_follows(self) -> None:
        subject = self.make(size=4)
        taken = subject.alloc(2)
        subject.free(taken)
        subject.alloc(4)
        assert numbers(taken) == [1, 2]

    @clause("SLOT-3")
    @SORTED
    def test_refused_alloc_changes_nothing(self, need_sort: bool) -> None:
        subject = self.make(size=4, need_sort=need_sort)
        subject.alloc(3)
        subject.free([2, 1])
        before = subject.view()
        assert subject.alloc(4) is None
        assert subject.view() == before
        assert subject.available_size() == 3
        assert len(numbers(subject.alloc(3))) == 3

    @clause("SLOT-4")
    @pytest.mark.parametrize("need_size", [-1, -4])
    def test_negative_alloc_is_refused(self, need_size: int) -> None:
        subject = self.make(size=4)
        subject.alloc(1)
        refused(subject, "SLOT-4", lambda: subject.alloc(need_size))

    @clause("SLOT-5")
    @pytest.mark.parametrize(
        "bad",
        [[1, 1], [3, 2, 3], [0], [5], [-1], [4], [1, 4], [2**40]],
        ids=["twice", "twice later", "sink", "beyond", "negative", "free", "mixed", "huge"],
    )
    def test_bad_free_is_refused_whole(self, bad: list[int]) -> None:
        subject = self.make(size=4)
        subject.alloc(3)
        refused(subject, "SLOT-5", lambda: subject.free([2, *bad] if 2 not in bad else bad))
        subject.free([2])

    @clause("SLOT-5")
    @SORTED
    def test_double_free_is_refused(self, need_sort: bool) -> None:
        subject = self.make(size=4, need_sort=need_sort)
        subject.alloc(3)
        subject.free([2])
        refused(subject, "SLOT-5", lambda: subject.free([1, 2]))
        subject.free_group_begin()
        subject.free([3])
        refused(subject, "SLOT-5", lambda: subject.free([3]))

    @clause("SLOT-6")
    def test_free_appends_in_the_order_given(self) -> None:
        subject = self.make(size=5)
        subject.alloc(4)
        subject.free([4, 1])
        subject.free(torch.tensor([3], dtype=torch.int32))
        assert numbers(subject.free_pages) == [5, 4, 1, 3]
        assert numbers(subject.release_pages) == []
        assert numbers(subject.alloc(3)) == [5, 4, 1]

    @clause("SLOT-6")
    def test_need_sort_merges_when_the_free_list_is_short(self) -> None:
        subject = self.make(size=6, need_sort=True)
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
    def test_group_holds_back_and_keeps_the_order(self, need_sort: bool) -> None:
        subject = self.make(size=4, need_sort=need_sort)
        subject.alloc(4)
        subject.free_group_begin()
        assert not subject.is_not_in_free_group
        subject.free([3])
        subject.free([4, 1])
        assert (subject.available_size(), subject.view().pending) == (0, (3, 4, 1))
        assert subject.alloc(1) is None
        subject.free_group_end()
        assert subject.is_not_in_free_group
        view = subject.view()
        assert (view.pending, view.free + view.release) == ((), (3, 4, 1))
        assert numbers(subject.alloc(3)) == ([1, 3, 4] if need_sort else [3, 4, 1])

    @clause("SLOT-7")
    def test_what_is_pending_is_not_the_callers_tensor(self) -> None:
        subject = self.make(size=4)
        taken = subject.alloc(2)
        subject.free_group_begin()
        subject.free(taken)
        taken.fill_(4)
        subject.free_group_end()
        assert subject.view().free == (3, 4, 1, 2)

    @clause("SLOT-8")
    def test_groups_do_not_nest(self) -> None:
        subject = self.make(size=4)
        refused(subject, "SLOT-8", subject.free_group_end)
        subject.alloc(2)
        subject.free_group_begin()
        subject.free([1])
        refused(subject, "SLOT-8", subject.free_group_begin)
        subject.free_group_end()
        assert subject.available_size() == 3

    @clause("SLOT-9")
    @SORTED
    def test_restore_undoes_the_allocs_since_the_ticket(self, need_sort: bool) -> None:
        subject = self.make(size=6, need_sort=need_sort)
        subject.alloc(3)
        subject.free([2, 1])
        subject.alloc(1)
        ticket = subject.backup_state()
        before = subject.view()
        taken = [*numbers(subject.alloc(1)), *numbers(subject.alloc(3))]
        subject.restore_state(ticket)
        after = subject.view()
        assert after.held == before.held
        assert list(after.free[:4]) == taken
        assert sorted(after.free) == sorted(before.free + before.release)

    @clause("SLOT-9")
    @SORTED
    def test_clear_frees_everything_in_ascending_order(self, need_sort: bool) -> None:
        subject = self.make(size=4, need_sort=need_sort)
        subject.alloc(4)
        subject.free([3])
        subject.free_group_begin()
        subject.free([2])
        subject.clear()
        assert subject.view() == AllocatorView((1, 2, 3, 4), (), (), frozenset(), False)
        assert subject.is_not_in_free_group

    @clause("SLOT-10")
    @pytest.mark.parametrize("end", ends_of_a_ticket(1))
    def test_a_ticket_ends_with_the_next_free_group_clear_or_restore(self, end: str) -> None:
        subject = self.make(size=4)
        subject.alloc(2)
        ticket = subject.backup_state()
        subject.alloc(1)
        ends_of_a_ticket(1)[end](subject)
        refused(subject, "SLOT-10", lambda: subject.restore_state(ticket))

    @clause("SLOT-10")
    def test_a_ticket_is_for_one_allocator(self) -> None:
        subject, other = self.make(), self.make()
        refused(subject, "SLOT-10", lambda: subject.restore_state(other.backup_state()))
        refused(subject, "SLOT-10", lambda: subject.restore_state(None))

    @clause("SLOT-9")
    def test_a_free_of_nothing_leaves_tickets_valid(self) -> None:
        subject = self.make(size=4)
        ticket = subject.backup_state()
        subject.alloc(2)
        subject.free([])
        subject.restore_state(ticket)
        assert subject.view().free == (1, 2, 3, 4)

    @clause("SLOT-11")
    @pytest.mark.parametrize("size", [-1, 2**31 - 1, 2**40])
    def test_sizes_out_of_range_are_refused(self, size: int) -> None:
        with pytest.raises(ContractError, match=r"^SLOT-11: "):
            self.make(size=size)

    @clause("SLOT-11")
    @pytest.mark.parametrize("given", NOT_SLOTS)
    def test_what_is_no_list_of_slots_is_refused(self, given: str) -> None:
        subject = self.make(size=4)
        subject.alloc(2)
        refused(subject, "SLOT-11", lambda: subject.free(NOT_SLOTS[given]))

    @clause("SLOT-11")
    def test_an_empty_pool_is_a_pool(self) -> None:
        subject = self.make(size=0)
        assert subject.alloc(1) is None
        assert numbers(subject.alloc(0)) == []

    @clause("SLOT-12")
    def test_cost_does_not_depend_on_the_pool(self) -> None:
        moved = {_pages_moved(self.make(size=size)) for size in (64, 128, 256)}
        assert len(moved) == 1
        assert moved.pop() <= 2 * SLOTS_NAMED

    @clause("SLOT-12")
    def test_merges_are_counted(self) -> None:
        subject = self.make(size=4, need_sort=True)
        subject.free(subject.alloc(4))
        subject.alloc(1)
        counters = subject.counters()
        assert (counters["merges"], counters["pages_merged"]) == (1, 4)

    @clause("SLOT-13")
    @SORTED
    def test_check_finds_nothing_in_good_books(self, need_sort: bool) -> None:
        subject = self.make(size=6, need_sort=need_sort)
        subject.check()
        subject.free(subject.alloc(2))
        subject.check()
        subject.alloc(3)
        subject.free_group_begin()
        subject.free([3])
        subject.check()

    @clause("SLOT-13")
    def test_equal_views_have_equal_digests(self) -> None:
        one, other = self.make(size=4), self.make(size=4)
        one.free(one.alloc(2))
        for slot in numbers(other.alloc(2)):
            other.free([slot])
        assert one.view() == other.view()
        assert one.digest() == other.digest()

    @clause("SLOT-13")
    def test_different_views_have_different_digests(self) -> None:
        steps: list[Callable[[Any], object]] = [
            lambda subject: subject.alloc(3),
            lambda subject: subject.free([1]),
            lambda subject: subject.alloc(1),
            lambda subject: subject.free_group_begin(),
            lambda subject: subject.free([2]),
            lambda subject: subject.free([3]),
            lambda subject: subject.free_group_end(),
        ]
        subject = self.make(size=4, need_sort=True)
        views, digests = {subject.view()}, {subject.digest()}
        for step in steps:
            step(subject)
            views.add(subject.view())
            digests.add(subject.digest())
        assert len(views) == len(digests) == len(steps) + 1

    @clause("SLOT-2")
    def test_attributes_are_as_given(self) -> None:
        kvcache = object()
        subject = self.make(size=3, dtype=torch.bfloat16, kvcache=kvcache)
        assert (subject.size, subject.page_size, subject.need_sort) == (3, 1, False)
        assert (subject.dtype, subject.device) == (torch.bfloat16, "cpu")
        assert subject.get_kvcache() is kvcache


SLOTS_NAMED = 3 + 2 + 2 + 1
"""By the calls of `_pages_moved`; each goes into a list or out of one, or waits and does both."""


def _pages_moved(subject: Any) -> int:
    subject.alloc(3)
    subject.free(subject.alloc(2))
    subject.backup_state()
    subject.free_group_begin()
    subject.free([1])
    subject.free_group_end()
    moved: int = subject.counters()["pages_moved"]
    return moved
