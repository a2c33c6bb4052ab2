"""The allocators' fuzzers, and what their suites share. Spec: SLOT, PAGE."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvspec.conformance.suite import fuzzing
from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import AllocatorView

__all__ = ["AllocatorMachine", "PageMachine", "numbers", "refused", "run_machine"]


def numbers(slots: Any) -> list[int]:
    """The integers of a result, which has to be a one-dimensional int64 tensor on the CPU."""
    assert isinstance(slots, torch.Tensor)
    assert (slots.dim(), slots.dtype, slots.device.type) == (1, torch.int64, "cpu")
    return [int(slot) for slot in slots.tolist()]


def refused(subject: Any, id_: str, call: Callable[[], object]) -> None:
    """The call has to raise a ContractError that names the clause, and change nothing."""
    before, digest, counters = subject.view(), subject.digest(), subject.counters()
    with pytest.raises(ContractError, match=f"^{id_}: "):
        call()
    assert subject.view() == before
    assert subject.digest() == digest
    assert subject.counters() == counters


class AllocatorMachine(RuleBasedStateMachine):
    """Any use, legal or not. The model is what a client knows: what it holds and what waits."""

    make: Callable[[int], Any]
    page_size: int

    @initialize(page_count=st.integers(0, 9))
    def start(self, page_count: int) -> None:
        self.subject = self.make(page_count)
        self.page_count = page_count
        self.held: set[int] = set()
        self.pending: set[int] = set()
        self.group = False
        self.ticket: Any = self.subject.backup_state()
        self.since: set[int] | None = set()
        """What was handed out since the ticket, None once it is no longer valid."""
        self.views: dict[int, AllocatorView] = {}

    @property
    def available(self) -> int:
        return self.page_count - len(self.held) - len(self.pending)

    def taken(self, slots: Any, page_count: int) -> None:
        """`slots` answer a call that needs so many new pages."""
        assert (slots is None) == (page_count > self.available)
        if slots is None or page_count == 0:
            return
        new = self.subject.view().held - self.held
        assert len(new) == page_count
        assert {slot // self.page_size for slot in numbers(slots)} >= new
        self.held |= new
        if self.since is not None:
            self.since |= new

    def some(self, data: st.DataObject, label: str) -> list[int]:
        """Some of the pages held."""
        return data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True), label=label)

    @rule(page_count=st.integers(0, 4))
    def alloc(self, page_count: int) -> None:
        self.taken(self.subject.alloc(page_count * self.page_size), page_count)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = self.some(data, "pages")
        offset = data.draw(st.integers(0, self.page_size - 1), label="offset")
        self.subject.free([page * self.page_size + offset for page in pages])
        self.held -= set(pages)
        if self.group:
            self.pending |= set(pages)
        if pages:
            self.since = None

    @rule(data=st.data(), good=st.booleans())
    def bad_free(self, data: st.DataObject, good: bool) -> None:
        others = sorted(set(range(-1, self.page_count + 2)) - self.held)
        bad = data.draw(st.sampled_from(others), label="page")
        pages = [*sorted(self.held)[: 2 if good else 0], bad]
        with pytest.raises(ContractError):
            self.subject.free([page * self.page_size for page in pages])

    @rule()
    def bad_alloc(self) -> None:
        with pytest.raises(ContractError):
            self.subject.alloc(-self.page_size)

    @rule()
    def group_begin(self) -> None:
        if self.group:
            with pytest.raises(ContractError):
                self.subject.free_group_begin()
            return
        self.subject.free_group_begin()
        self.group, self.since = True, None

    @rule()
    def group_end(self) -> None:
        if not self.group:
            with pytest.raises(ContractError):
                self.subject.free_group_end()
            return
        self.subject.free_group_end()
        self.group, self.since, self.pending = False, None, set()

    @rule()
    def backup(self) -> None:
        self.ticket, self.since = self.subject.backup_state(), set()

    @rule()
    def restore(self) -> None:
        if self.since is None:
            with pytest.raises(ContractError):
                self.subject.restore_state(self.ticket)
            return
        self.subject.restore_state(self.ticket)
        self.held -= self.since
        self.since = None

    @precondition(lambda self: not self.available)
    @rule()
    def clear(self) -> None:
        self.subject.clear()
        self.held, self.pending, self.group, self.since = set(), set(), False, None

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "subject"):
            return
        view, everything = self.subject.view(), set(range(1, self.page_count + 1))
        listed = [*view.free, *view.release, *view.pending, *view.held]
        assert sorted(listed) == sorted(everything)
        assert (view.held, set(view.pending), view.group) == (self.held, self.pending, self.group)
        assert self.subject.available_size() == self.available * self.page_size
        assert self.views.setdefault(self.subject.digest(), view) == view
        self.subject.check()


class PageMachine(AllocatorMachine):
    """The allocator's fuzzer, with requests that grow."""

    def grow(self, data: st.DataObject, most: int) -> tuple[list[int], list[int], list[int]]:
        """A batch: new requests, and some that continue pages held; each page once."""
        prefixes, lengths, last = [], [], []
        for page in self.some(data, "continued") if self.held else []:
            offset = data.draw(st.integers(0, self.page_size - 1), label="offset")
            before = data.draw(st.integers(0, 2), label="pages before") * self.page_size
            prefixes.append(before + offset + 1)
            last.append(page * self.page_size + offset)
        for _ in range(data.draw(st.integers(0, 2), label="new requests")):
            prefixes.append(0)
            last.append(-1)
        lengths = [prefix + data.draw(st.integers(1, most), label="new") for prefix in prefixes]
        return prefixes, lengths, last

    def new_pages(self, prefixes: list[int], lengths: list[int]) -> int:
        pages = [-(-length // self.page_size) for length in lengths]
        return sum(pages) - sum(-(-prefix // self.page_size) for prefix in prefixes)

    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        prefixes, lengths, last = self.grow(data, most=2 * self.page_size)
        tokens = sum(lengths) - sum(prefixes)
        slots = self.subject.alloc_extend(prefixes, lengths, last, tokens)
        assert slots is None or len(slots) == tokens
        self.taken(slots, self.new_pages(prefixes, lengths))

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        prefixes, lengths, last = self.grow(data, most=1)
        slots = self.subject.alloc_decode(lengths, last)
        assert slots is None or len(slots) == len(lengths)
        self.taken(slots, self.new_pages(prefixes, lengths))

    @rule(data=st.data())
    def bad_decode(self, data: st.DataObject) -> None:
        others = sorted(set(range(-1, self.page_count + 2)) - self.held)
        page = data.draw(st.sampled_from(others), label="page")
        with pytest.raises(ContractError):
            self.subject.alloc_decode([1, 2], [-1, page * self.page_size])


def run_machine(
    make: Callable[[int], Any], page_size: int, machine: type[AllocatorMachine]
) -> None:
    """Run the fuzzer; `make(pages)` gives an allocator with so many pages."""
    members = {"make": staticmethod(make), "page_size": page_size}
    run_state_machine_as_test(type(machine.__name__, (machine,), members), settings=fuzzing())
