"""What holds of the books of every allocator. Spec: SLOT, PAGE, SWA."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.allocator_fuzzing import numbers, refused
from kvspec.conformance.suite import Conformance
from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import AllocatorView

__all__ = ["NOT_SLOTS", "SORTED", "AllocatorLaws", "Law", "pages_of", "pools"]

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


def _group(subject: Any) -> None:
    subject.free_group_begin()
    subject.free_group_end()


# What makes the tickets of an allocator invalid that holds page 1.
ENDS_OF_A_TICKET: dict[str, Callable[[Any], object]] = {
    "free": lambda subject: subject.free([subject.page_size]),
    "clear": lambda subject: subject.clear(),
    "group begin": lambda subject: subject.free_group_begin(),
    "group": _group,
    "restore": lambda subject: subject.restore_state(subject.backup_state()),
}


def pages_of(slots: Any, page_size: int) -> list[int]:
    """The pages of a result, which has to consist of whole pages, each in order."""
    flat = numbers(slots)
    pages = [slot // page_size for slot in flat[::page_size]]
    assert flat == [page * page_size + i for page in pages for i in range(page_size)]
    return pages


def pools(view: AllocatorView) -> list[AllocatorView]:
    """The books of the pool, or of both: in these tests they are of one size and always equal."""
    return [view._replace(swa=None, pairs=())] + ([] if view.swa is None else [view.swa])


class Law(NamedTuple):
    """The clauses of one room; none where it has no such law."""

    books: str
    sink: str
    alloc: str
    short: str
    """What becomes of an allocation when there are too few pages."""
    amount: str
    given_back: str
    pending: str
    group: str
    clear: str
    restore: str
    ticket: str
    argument: str
    order: str
    cost: str
    check: str
    digest: str
    waiting: str
    """How much `pending_size` says there is."""
    extend: str = ""
    decode: str = ""
    requests: str = ""
    free: str = ""


class AllocatorLaws(Conformance):
    """The tests that every allocator's suite has."""

    law: Law
    class_name: str
    interface: type
    room: str
    page_sizes: tuple[int, ...]
    """Those that the room has, the usual one first."""
    pool_count = 1

    def make(
        self, pages: int = 3, page_size: int | None = None, need_sort: bool = False, **given: Any
    ) -> Any:
        """An allocator of so many pages of the implementation under test."""
        page_size = self.page_sizes[0] if page_size is None else page_size
        arguments: dict[str, Any] = {"size": pages * page_size, "page_size": page_size}
        if self.page_sizes == (1,):
            del arguments["page_size"]
        arguments |= {"dtype": torch.float16, "device": "cpu", "kvcache": None}
        arguments |= {"need_sort": need_sort, **given}
        return self.subject(self.class_name, self.interface, self.room, "observer", **arguments)

    def each(self, **given: Any) -> Iterator[tuple[Any, int]]:
        """An allocator of every page size, and the page size."""
        for page_size in self.page_sizes:
            yield self.make(page_size=page_size, **given), page_size

    @clause("books")
    @SORTED
    def test_every_page_is_in_one_place(self, need_sort: bool) -> None:
        for subject, unit in self.each(pages=8, need_sort=need_sort):
            subject.alloc(7 * unit)
            subject.free([2 * unit, 4 * unit, 6 * unit])
            subject.free_group_begin()
            subject.free([3 * unit])
            for view in pools(subject.view()):
                listed = [*view.free, *view.release, *view.pending, *view.held]
                assert sorted(listed) == [1, 2, 3, 4, 5, 6, 7, 8]
                assert (view.pending, sorted(view.held)) == ((3,), [1, 5, 7])

    @clause("sink")
    def test_the_sink_is_never_handed_out(self) -> None:
        for subject, unit in self.each(pages=3):
            for _ in range(2):
                assert pages_of(subject.alloc(3 * unit), unit) == [1, 2, 3]
                assert subject.alloc(unit) is None
                subject.clear()

    @clause("alloc")
    @pytest.mark.parametrize("page_count", [0, 1, 3])
    def test_alloc_takes_from_the_head(self, page_count: int) -> None:
        for subject, unit in self.each(pages=3):
            taken = pages_of(subject.alloc(page_count * unit), unit)
            assert taken == [1, 2, 3][:page_count]
            assert all(view.held == set(taken) for view in pools(subject.view()))
            assert subject.available_size() == (3 - page_count) * unit

    @clause("alloc")
    def test_what_was_returned_is_not_changed_by_what_follows(self) -> None:
        for subject, unit in self.each(pages=4):
            taken = subject.alloc(2 * unit)
            subject.alloc(unit)
            subject.free(taken)
            subject.alloc(3 * unit)
            assert pages_of(taken, unit) == [1, 2]

    @clause("alloc")
    def test_attributes_are_as_given(self) -> None:
        kvcache = object()
        for subject, unit in self.each(pages=2, dtype=torch.bfloat16, kvcache=kvcache):
            assert (subject.size, subject.page_size, subject.need_sort) == (2 * unit, unit, False)
            assert (subject.dtype, subject.device) == (torch.bfloat16, "cpu")
            assert subject.get_kvcache() is kvcache

    @clause("short")
    @SORTED
    def test_refused_allocations_change_nothing(self, need_sort: bool) -> None:
        for subject, unit in self.each(pages=4, need_sort=need_sort):
            subject.alloc(3 * unit)
            subject.free([2 * unit, unit])
            before, counters = subject.view(), subject.counters()
            assert subject.alloc(4 * unit) is None
            assert (subject.view(), subject.counters()) == (before, counters)

    @clause("short")
    @SORTED
    def test_what_is_available_can_be_taken(self, need_sort: bool) -> None:
        for subject, unit in self.each(pages=4, need_sort=need_sort):
            subject.alloc(3 * unit)
            subject.free([2 * unit, unit])
            assert subject.available_size() == 3 * unit
            assert subject.alloc(4 * unit) is None
            assert len(pages_of(subject.alloc(3 * unit), unit)) == 3

    @clause("amount")
    @pytest.mark.parametrize("page_count", [-1, -4])
    def test_negative_alloc_is_refused(self, page_count: int) -> None:
        for subject, unit in self.each(pages=4):
            subject.alloc(unit)
            refused(subject, self.law.amount, subject.alloc, page_count * unit)

    @clause("given_back")
    @pytest.mark.parametrize("bad", [[0], [-1], [4], [5], [2**40], [1, 4], [4, 1]], ids=str)
    def test_bad_free_is_refused_whole(self, bad: list[int]) -> None:
        for subject, unit in self.each(pages=4):
            subject.alloc(3 * unit)
            slots = [page * unit for page in [2, *bad]]
            refused(subject, self.law.given_back, subject.free, slots)
            subject.free([2 * unit])

    @clause("given_back")
    @SORTED
    def test_double_free_is_refused(self, need_sort: bool) -> None:
        for subject, unit in self.each(pages=4, need_sort=need_sort):
            subject.alloc(3 * unit)
            subject.free([2 * unit])
            refused(subject, self.law.given_back, subject.free, [unit, 2 * unit])
            subject.free_group_begin()
            subject.free([3 * unit])
            refused(subject, self.law.given_back, subject.free, [3 * unit])

    @clause("pending")
    @SORTED
    def test_group_holds_back_and_ends_as_one_free(self, need_sort: bool) -> None:
        pairs = zip(*(self.each(pages=4, need_sort=need_sort) for _ in range(2)), strict=True)
        for (grouped, unit), (plain, _) in pairs:
            for subject in (grouped, plain):
                subject.alloc(4 * unit)
                subject.free([2 * unit])
            grouped.free_group_begin()
            assert not grouped.is_not_in_free_group
            grouped.free([4 * unit])
            grouped.free([3 * unit, unit])
            assert grouped.available_size() == unit
            assert all(set(view.pending) == {1, 3, 4} for view in pools(grouped.view()))
            assert grouped.alloc(2 * unit) is None
            grouped.free_group_end()
            plain.free([4 * unit, 3 * unit, unit])
            assert grouped.is_not_in_free_group
            assert grouped.view() == plain.view()

    @clause("waiting")
    @SORTED
    def test_pending_size_counts_what_a_group_holds_back(self, need_sort: bool) -> None:
        for subject, unit in self.each(pages=5, need_sort=need_sort):
            subject.alloc(5 * unit)
            subject.free([unit])
            assert subject.pending_size() == 0
            subject.free_group_begin()
            assert subject.pending_size() == 0
            subject.free([4 * unit, 2 * unit])
            subject.free([3 * unit])
            assert subject.pending_size() == 3 * unit
            assert subject.view().held == {5}
            subject.free_group_end()
            assert subject.pending_size() == 0

    @clause("pending")
    def test_what_is_pending_is_not_the_callers_tensor(self) -> None:
        for subject, unit in self.each(pages=3):
            taken = subject.alloc(unit)
            subject.alloc(unit)
            subject.free_group_begin()
            subject.free(taken)
            taken.fill_(2 * unit)
            subject.free_group_end()
            for view in pools(subject.view()):
                assert (sorted(view.free), sorted(view.held)) == ([1, 3], [2])

    @clause("group")
    def test_groups_do_not_nest(self) -> None:
        for subject, unit in self.each(pages=4):
            refused(subject, self.law.group, subject.free_group_end)
            subject.alloc(2 * unit)
            subject.free_group_begin()
            subject.free([unit])
            refused(subject, self.law.group, subject.free_group_begin)
            subject.free_group_end()
            assert subject.available_size() == 3 * unit

    @clause("clear")
    @SORTED
    def test_clear_frees_everything_in_ascending_order(self, need_sort: bool) -> None:
        for subject, unit in self.each(pages=4, need_sort=need_sort):
            subject.alloc(4 * unit)
            subject.free([3 * unit])
            subject.free_group_begin()
            subject.free([2 * unit])
            subject.clear()
            fresh = AllocatorView((1, 2, 3, 4), (), (), frozenset(), False)
            assert pools(subject.view()) == [fresh] * self.pool_count
            assert subject.is_not_in_free_group

    @clause("restore")
    @SORTED
    def test_restore_undoes_the_allocations_since_the_ticket(self, need_sort: bool) -> None:
        for subject, unit in self.each(pages=6, need_sort=need_sort):
            subject.alloc(3 * unit)
            subject.free([2 * unit, unit])
            subject.alloc(unit)
            before, ticket = subject.view(), subject.backup_state()
            taken = [pages_of(subject.alloc(count * unit), unit) for count in (1, 3)]
            subject.restore_state(ticket)
            for view, old in zip(pools(subject.view()), pools(before), strict=True):
                assert view.held == old.held
                assert list(view.free[:4]) == [*taken[0], *taken[1]]
                assert sorted(view.free) == sorted(old.free + old.release)

    @clause("restore")
    def test_restore_leaves_the_rest_as_it_is(self) -> None:
        for subject, unit in self.each(pages=4, need_sort=True):
            subject.alloc(3 * unit)
            subject.free([3 * unit])
            subject.free([2 * unit])
            ticket = subject.backup_state()
            subject.alloc(unit)
            subject.alloc(unit)
            subject.restore_state(ticket)
            merged = AllocatorView((4, 2, 3), (), (), frozenset({1}), False)
            assert pools(subject.view()) == [merged] * self.pool_count

    @clause("restore")
    def test_restore_in_a_group_leaves_what_waits(self) -> None:
        for subject, unit in self.each(pages=3):
            subject.alloc(unit)
            subject.free_group_begin()
            subject.free([unit])
            ticket = subject.backup_state()
            subject.alloc(2 * unit)
            subject.free([])
            subject.restore_state(ticket)
            left = AllocatorView((2, 3), (), (1,), frozenset(), True)
            assert pools(subject.view()) == [left] * self.pool_count

    @clause("ticket")
    @pytest.mark.parametrize("end", ENDS_OF_A_TICKET)
    def test_a_ticket_ends_with_the_next_free_group_clear_or_restore(self, end: str) -> None:
        for subject, unit in self.each(pages=4):
            subject.alloc(2 * unit)
            ticket = subject.backup_state()
            subject.alloc(unit)
            ENDS_OF_A_TICKET[end](subject)
            refused(subject, self.law.ticket, subject.restore_state, ticket)

    @clause("ticket")
    def test_a_ticket_is_for_one_allocator_and_one_restore(self) -> None:
        subject, other = self.make(), self.make()
        for ticket in (other.backup_state(), None):
            refused(subject, self.law.ticket, subject.restore_state, ticket)
        ticket = subject.backup_state()
        subject.alloc(self.page_sizes[0])
        subject.restore_state(ticket)
        refused(subject, self.law.ticket, subject.restore_state, ticket)

    @clause("argument")
    def test_sizes_out_of_range_are_refused(self) -> None:
        for page_size in self.page_sizes:
            for size in (-1, 2**31 - page_size, 2**40):
                with pytest.raises(ContractError, match=f"^{self.law.argument}: "):
                    self.make(size=size, page_size=page_size)

    @clause("argument")
    @pytest.mark.parametrize("given", NOT_SLOTS)
    def test_what_is_no_list_of_slots_is_refused(self, given: str) -> None:
        subject = self.make(pages=4)
        subject.alloc(2 * self.page_sizes[0])
        for call in self.calls_with(subject, NOT_SLOTS[given]):
            refused(subject, self.law.argument, call)

    def calls_with(self, subject: Any, bad: Any) -> list[Callable[[], object]]:
        """Calls that are given what no list of slots is."""
        return [lambda: subject.free(bad)]

    @clause("argument")
    def test_an_empty_pool_is_a_pool(self) -> None:
        for subject, unit in self.each(pages=0):
            assert subject.alloc(unit) is None
            assert numbers(subject.alloc(0)) == []

    @clause("cost")
    def test_cost_does_not_depend_on_the_pool(self) -> None:
        for page_size in self.page_sizes:
            made = [self.make(pages=pages, page_size=page_size) for pages in (64, 128, 256)]
            moved, named = zip(*map(self.pages_moved, made), strict=True)
            assert len(set(moved)) == 1
            assert moved[0] <= 2 * named[0] * self.pool_count

    def pages_moved(self, subject: Any) -> tuple[int, int]:
        """How many pages some calls moved and named; each moves in or out, or waits and both."""
        unit = subject.page_size
        subject.alloc(3 * unit)
        subject.free(subject.alloc(2 * unit))
        subject.backup_state()
        subject.free_group_begin()
        subject.free([unit])
        subject.free_group_end()
        return subject.counters()["pages_moved"], 3 + 2 + 2 + 1

    @clause("cost")
    def test_merges_are_counted(self) -> None:
        for subject, unit in self.each(pages=4, need_sort=True):
            subject.free(subject.alloc(4 * unit))
            subject.alloc(unit)
            counters, count = subject.counters(), self.pool_count
            assert (counters["merges"], counters["pages_merged"]) == (count, 4 * count)

    @clause("check")
    @SORTED
    def test_check_finds_nothing_in_good_books(self, need_sort: bool) -> None:
        for subject, unit in self.each(pages=6, need_sort=need_sort):
            subject.check()
            taken = subject.alloc(2 * unit)
            subject.free(taken[:unit])
            subject.check()
            subject.alloc(3 * unit)
            subject.free_group_begin()
            subject.free(taken[unit:])
            subject.check()

    @clause("digest")
    def test_equal_views_have_equal_digests(self) -> None:
        for one, unit in self.each(pages=4):
            other = self.make(pages=4, page_size=unit)
            one.alloc(2 * unit)
            one.restore_state((one.backup_state(), one.alloc(unit))[0])
            other.alloc(2 * unit)
            assert one.view() == other.view()
            assert one.digest() == other.digest()

    @clause("digest")
    def test_different_views_have_different_digests(self) -> None:
        steps: list[Callable[[Any, int], object]] = [
            lambda subject, unit: subject.alloc(3 * unit),
            lambda subject, unit: subject.free([unit]),
            lambda subject, unit: subject.alloc(unit),
            lambda subject, unit: subject.free_group_begin(),
            lambda subject, unit: subject.free([2 * unit]),
            lambda subject, unit: subject.free([3 * unit]),
            lambda subject, unit: subject.free_group_end(),
        ]
        for subject, unit in self.each(pages=4, need_sort=True):
            views, digests = {subject.view()}, {subject.digest()}
            for step in steps:
                step(subject, unit)
                views.add(subject.view())
                digests.add(subject.digest())
            assert len(views) == len(digests) == len(steps) + 1
