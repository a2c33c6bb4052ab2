"""The allocators' fuzzers, and what their suites share. Spec: SLOT, PAGE, SWA."""

import random
from collections.abc import Callable, Collection, Iterable
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

__all__ = [
    "AllocatorMachine",
    "PageMachine",
    "WindowMachine",
    "numbers",
    "refused",
    "run_machine",
    "tell_both",
]


def numbers(slots: Any) -> list[int]:
    """The integers of a result, which has to be a one-dimensional int64 tensor on the CPU."""
    assert isinstance(slots, torch.Tensor)
    assert (slots.dim(), slots.dtype, slots.device.type) == (1, torch.int64, "cpu")
    return [int(slot) for slot in slots.tolist()]


def refused(subject: Any, id_: str, call: Callable[..., object], *given: object) -> None:
    """The call has to raise a ContractError that names the clause, and change nothing."""
    before, digest, counters = subject.view(), subject.digest(), subject.counters()
    with pytest.raises(ContractError, match=f"^{id_}: "):
        call(*given)
    assert subject.view() == before
    assert subject.digest() == digest
    assert subject.counters() == counters


class AllocatorMachine(RuleBasedStateMachine):
    """Any use, legal or not. The model is what a client knows: what it holds and what waits."""

    make: Callable[..., Any]
    page_size: int

    @initialize(page_count=st.integers(0, 9))
    def start(self, page_count: int) -> None:
        self.begin(self.make(page_count), page_count)

    def begin(self, subject: Any, page_count: int) -> None:
        """All of the subject's pages are free."""
        self.subject, self.page_count = subject, page_count
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

    def gave_back(self, pages: Iterable[int]) -> None:
        """These pages were given back."""
        for page in pages:
            self.held.remove(page)
            self.since = None
            if self.group:
                self.pending.add(page)

    def ended_group(self) -> None:
        """No group is open any more."""
        self.group, self.since, self.pending = False, None, set()

    def some(
        self, data: st.DataObject, label: str, among: Collection[int] | None = None
    ) -> list[int]:
        """Some of the pages held, or of others."""
        pages = sorted(self.held if among is None else among)
        drawn = st.lists(st.sampled_from(pages), unique=True) if pages else st.just([])
        return data.draw(drawn, label=label)

    @rule(page_count=st.integers(0, 4))
    def alloc(self, page_count: int) -> None:
        self.taken(self.subject.alloc(page_count * self.page_size), page_count)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = self.some(data, "pages")
        offset = data.draw(st.integers(0, self.page_size - 1), label="offset")
        self.subject.free([page * self.page_size + offset for page in pages])
        self.gave_back(pages)

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
        self.ended_group()

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
        self.held = set()
        self.ended_group()

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

    @property
    def continuable(self) -> Collection[int]:
        """Pages into which a request may grow."""
        return self.held

    def grow(self, data: st.DataObject, most: int) -> tuple[list[int], list[int], list[int]]:
        """A batch: new requests, and some that continue pages held; each page once."""
        prefixes, lengths, last = [], [], []
        for page in self.some(data, "continued", self.continuable):
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


class WindowMachine(PageMachine):
    """The page allocator's fuzzer, with a window pool. The model owns the pages of both pools."""

    @initialize(page_count=st.integers(0, 9), window_count=st.integers(0, 9))
    def start(self, page_count: int, window_count: int = 0) -> None:
        self.window_count = window_count
        self.begin(self.make(page_count, window_count), page_count)
        self.paired: dict[int, int] = {}
        """Also of pages that are held no longer: see `pairs`."""
        self.window_pending: set[int] = set()

    @property
    def pairs(self) -> dict[int, int]:
        """The window page of every held page that has one."""
        return {page: pair for page, pair in self.paired.items() if page in self.held}

    @property
    def continuable(self) -> Collection[int]:
        """See the base: those with a pair."""
        return self.pairs

    @property
    def window_available(self) -> int:
        return self.window_count - len(self.pairs) - len(self.window_pending)

    @property
    def available(self) -> int:
        return min(super().available, self.window_available)

    def taken(self, slots: Any, page_count: int) -> None:
        """See the base: new pages have new pairs, and no other has."""
        before = self.pairs
        super().taken(slots, page_count)
        self.paired = dict(self.subject.view().pairs)
        assert self.paired.items() >= before.items()
        assert len(self.paired) == len(before) + (0 if slots is None else page_count)

    def unpair(self, pages: Iterable[int]) -> None:
        """The pairs of these pages were given back."""
        for page in pages:
            pair = self.paired.pop(page)
            self.since = None
            if self.group:
                self.window_pending.add(pair)

    def gave_back(self, pages: Iterable[int]) -> None:
        self.unpair(page for page in pages if page in self.pairs)
        super().gave_back(pages)

    def ended_group(self) -> None:
        super().ended_group()
        self.window_pending = set()

    def slots(self, data: st.DataObject, pages: list[int]) -> list[int]:
        """A slot of every page."""
        offset = data.draw(st.integers(0, self.page_size - 1), label="offset")
        return [page * self.page_size + offset for page in pages]

    @rule(data=st.data())
    def free_both(self, data: st.DataObject) -> None:
        pages = self.some(data, "pages")
        alone = self.some(data, "alone", self.pairs.keys() - set(pages))
        self.subject.free(self.slots(data, pages), self.slots(data, alone))
        self.gave_back(pages)
        self.unpair(alone)

    @rule(data=st.data())
    def free_swa(self, data: st.DataObject) -> None:
        pages = self.some(data, "pages", self.pairs)
        self.subject.free_swa(self.slots(data, pages))
        self.unpair(pages)

    @rule(data=st.data())
    def move_swa(self, data: st.DataObject) -> None:
        targets = self.some(data, "targets", self.held - self.pairs.keys())
        sources = self.some(data, "sources", self.pairs)
        count = min(len(targets), len(sources))
        moves = list(zip(targets[:count], sources[:count], strict=True))
        self.subject.move_swa(*(self.slots(data, [move[i] for move in moves]) for i in range(2)))
        for target, source in moves:
            self.paired[target] = self.paired.pop(source)
            self.since = None

    @rule(data=st.data(), good=st.booleans())
    def bad_pairs(self, data: st.DataObject, good: bool) -> None:
        """Of a page that is not held or has no pair, after some that have one."""
        others = sorted(set(range(-1, self.page_count + 2)) - self.pairs.keys())
        bad = data.draw(st.sampled_from(others), label="page")
        pages = [*sorted(self.pairs)[: 2 if good else 0], bad]
        slots = [page * self.page_size for page in pages]
        calls = [
            lambda: self.subject.free_swa(slots),
            lambda: self.subject.free([], slots),
            lambda: self.subject.move_swa(slots[::-1], slots),
        ]
        with pytest.raises(ContractError):
            data.draw(st.sampled_from(calls), label="call")()

    @invariant()
    def window_books_are_right(self) -> None:
        if not hasattr(self, "subject"):
            return
        view = self.subject.view()
        assert dict(view.pairs) == self.pairs
        assert list(view.pairs) == sorted(view.pairs)
        owned = [*view.swa.free, *view.swa.release, *self.window_pending, *self.pairs.values()]
        assert sorted(owned) == list(range(1, self.window_count + 1))
        assert view.swa.held == set(self.pairs.values())
        assert set(view.swa.pending) == self.window_pending
        assert view.swa.group == self.group
        assert self.subject.swa_available_size() == self.window_available * self.page_size
        assert self.subject.full_available_size() == super().available * self.page_size


def tell_both(choose: random.Random, subject: Any, full: Any, window: Any) -> None:
    """One call to an allocator of two pools, and what it means for two of one pool each."""
    view, unit = subject.view(), subject.page_size
    pairs, everyone = dict(view.pairs), (subject, full, window)
    call = choose.choice(["alloc", "alloc", "free", "free", "group", "restore", "clear"])
    if call == "alloc":
        slots = subject.alloc(choose.randint(0, 3) * unit)
        for pool in (full, window) if slots is not None else ():
            pool.alloc(len(slots))
    elif call == "free":
        pages = choose.sample(sorted(view.held), choose.randint(0, min(3, len(view.held))))
        rest = sorted(pairs.keys() - set(pages))
        alone = choose.sample(rest, choose.randint(0, min(2, len(rest))))
        subject.free([page * unit for page in pages], [page * unit for page in alone])
        full.free([page * unit for page in pages])
        window.free([pairs[page] * unit for page in pages + alone if page in pairs])
    elif call == "group":
        for pool in everyone:
            (pool.free_group_end if view.group else pool.free_group_begin)()
    elif call == "restore" and subject.available_size():
        for pool in everyone:
            pool.restore_state((pool.backup_state(), pool.alloc(unit))[0])
    elif call == "clear" and choose.random() < 0.2:
        for pool in everyone:
            pool.clear()


def run_machine(make: Callable[..., Any], page_size: int, machine: type[AllocatorMachine]) -> None:
    """Run the fuzzer; `make(pages)` gives an allocator, of two pools `make(pages, window)`."""
    members = {"make": staticmethod(make), "page_size": page_size}
    run_state_machine_as_test(type(machine.__name__, (machine,), members), settings=fuzzing())
