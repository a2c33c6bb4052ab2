"""Conformance of what rooms report. Spec: OBS."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.allocator_fuzzing import numbers, refused
from kvspec.conformance.suite import Conformance
from kvspec.interfaces.observer import Operation
from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator

__all__ = ["ObserverConformance"]

REFUSED_FREE = {"slot_allocator": "SLOT-5", "page_allocator": "PAGE-10"}
ROOMS = pytest.mark.parametrize("room", ["slot_allocator", "page_allocator"])


def names(seen: list[Operation]) -> list[str]:
    """The names of operations, which have to be numbered from 0."""
    assert [operation.number for operation in seen] == list(range(len(seen)))
    return [operation.name for operation in seen]


@contextmanager
def unraisable() -> Iterator[list[BaseException | None]]:
    """The errors that reach `sys.unraisablehook` meanwhile."""
    errors: list[BaseException | None] = []
    hook = sys.unraisablehook
    sys.unraisablehook = lambda args: errors.append(args.exc_value)
    try:
        yield errors
    finally:
        sys.unraisablehook = hook


class ObserverConformance(Conformance):
    """Subclass it and set `impl`."""

    def make(self, room: str, need_sort: bool = False) -> Any:
        """An allocator of 16 slots, in a room that reports."""
        arguments: dict[str, Any] = {
            "size": 16,
            "dtype": torch.float16,
            "device": "cpu",
            "kvcache": None,
            "need_sort": need_sort,
        }
        if room == "slot_allocator":
            return self.subject(
                "TokenToKVPoolAllocator", BaseTokenToKVPoolAllocator, "observer", **arguments
            )
        return self.subject(
            "PagedTokenToKVPoolAllocator",
            PagedTokenToKVPoolAllocator,
            "observer",
            page_size=4,
            **arguments,
        )

    def observed(self, room: str) -> tuple[Any, list[Operation]]:
        """An allocator and what it reports."""
        subject, seen = self.make(room), list[Operation]()
        subject.attach(seen.append)
        return subject, seen

    @clause("OBS-1")
    @ROOMS
    def test_every_change_is_reported_once_and_in_order(self, room: str) -> None:
        subject, seen = self.observed(room)
        subject.alloc(12)
        subject.free([4])
        subject.free_group_begin()
        subject.free([8])
        subject.free_group_end()
        subject.restore_state((subject.backup_state(), subject.alloc(4))[0])
        subject.clear()
        assert names(seen) == [
            "alloc",
            "free",
            "free_group_begin",
            "free",
            "free_group_end",
            "alloc",
            "restore_state",
            "clear",
        ]
        assert {operation.room for operation in seen} == {room}

    @clause("OBS-1")
    @ROOMS
    def test_what_moved_is_reported(self, room: str) -> None:
        subject, seen = self.observed(room)
        unit = subject.page_size
        taken = numbers(subject.alloc(3 * unit))
        subject.free_group_begin()
        subject.free(taken[::-1])
        subject.free_group_end()
        ticket = subject.backup_state()
        again = numbers(subject.alloc(unit))
        subject.restore_state(ticket)
        subject.alloc(unit)
        subject.clear()
        freed = taken if unit > 1 else taken[::-1]
        moved = [numbers(operation.slots) for operation in seen]
        assert moved == [taken, [], freed, freed, again, again, again, []]

    @clause("OBS-1")
    def test_pages_that_requests_begin_are_reported_whole(self) -> None:
        subject, seen = self.observed("page_allocator")
        subject.alloc_extend([0], [2], [-1], 2)
        subject.alloc_extend([2], [4], [5], 2)
        subject.alloc_decode([5, 1], [7, -1])
        assert names(seen) == ["alloc_extend", "alloc_decode"]
        assert numbers(seen[0].slots) == [4, 5, 6, 7]
        assert numbers(seen[1].slots) == [8, 9, 10, 11, 12, 13, 14, 15]

    @clause("OBS-1")
    @ROOMS
    def test_what_changed_nothing_is_not_reported(self, room: str) -> None:
        subject, seen = self.observed(room)
        subject.clear()
        subject.alloc(0)
        subject.free([])
        assert subject.alloc(20) is None
        refused(subject, REFUSED_FREE[room], lambda: subject.free([4]))
        subject.restore_state(subject.backup_state())
        for read in (subject.view, subject.digest, subject.check, subject.available_size):
            read()
        assert not seen

    @clause("OBS-1")
    @ROOMS
    def test_the_change_is_done_when_it_is_reported(self, room: str) -> None:
        subject, views = self.make(room), list[Any]()
        subject.attach(lambda operation: views.append(subject.view()))
        changed = []
        for change in (
            lambda: subject.alloc(12),
            lambda: subject.free([4]),
            subject.free_group_begin,
            lambda: subject.free([8]),
            subject.free_group_end,
            subject.clear,
        ):
            change()
            changed.append(subject.view())
        assert views == changed

    @clause("OBS-1")
    @ROOMS
    def test_attach_replaces_and_none_detaches(self, room: str) -> None:
        subject, seen = self.observed(room)
        subject.alloc(4)
        later: list[Operation] = []
        subject.attach(later.append)
        subject.alloc(4)
        subject.attach(None)
        subject.alloc(4)
        assert (names(seen), names(later)) == (["alloc"], ["alloc"])

    @clause("OBS-2")
    @ROOMS
    def test_an_observer_that_raises_changes_nothing(self, room: str) -> None:
        subject, plain = self.make(room), self.make(room)
        fault, counts = RuntimeError("of the observer"), list[int]()

        def observer(operation: Operation) -> None:
            counts.append(operation.number)
            raise fault

        subject.attach(observer)
        with unraisable() as errors:
            taken = numbers(subject.alloc(8))
            subject.free(taken[4:])
        plain.free(plain.alloc(8)[4:])
        assert taken == list(range(taken[0], taken[0] + 8))
        assert subject.view() == plain.view()
        assert (errors, counts) == ([fault, fault], [0, 1])

    @clause("OBS-3")
    @ROOMS
    def test_an_observer_does_not_change_what_it_observes(self, room: str) -> None:
        subject = self.make(room)
        subject.alloc(4)
        ticket = subject.backup_state()
        calls = {
            "alloc": lambda: subject.alloc(4),
            "free": lambda: subject.free([4]),
            "free_group_begin": subject.free_group_begin,
            "free_group_end": subject.free_group_end,
            "restore_state": lambda: subject.restore_state(ticket),
            "clear": subject.clear,
            "attach": lambda: subject.attach(None),
        }
        if room == "page_allocator":
            calls["alloc_extend"] = lambda: subject.alloc_extend([0], [1], [-1], 1)
            calls["alloc_decode"] = lambda: subject.alloc_decode([1], [-1])
        tried = []

        def observer(operation: Operation) -> None:
            for name, call in calls.items():
                refused(subject, "OBS-3", call)
                tried.append(name)

        subject.attach(observer)
        with unraisable() as errors:
            subject.alloc(4)
        assert (errors, tried) == ([], list(calls))

    @clause("OBS-3")
    @ROOMS
    def test_an_observer_may_read_and_may_use_another_room(self, room: str) -> None:
        subject, other = self.make(room), self.make(room)
        available = []

        def observer(operation: Operation) -> None:
            subject.backup_state()
            subject.check()
            available.append(subject.available_size())
            other.alloc(4)

        subject.attach(observer)
        subject.alloc(4)
        subject.alloc(4)
        assert available == [12, 8]
        assert other.view() == subject.view()

    @clause("OBS-4")
    @ROOMS
    def test_with_nothing_attached_the_work_is_the_same(self, room: str) -> None:
        observed, _ = self.observed(room)
        plain = self.make(room)
        for subject in (observed, plain):
            subject.free(subject.alloc(8))
        assert observed.counters() == plain.counters()
