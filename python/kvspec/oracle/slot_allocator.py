"""Allocators of KV slots: lists, a derived set, no cleverness. Spec: SLOT, and what PAGE shares.

Every page of 1 .. P is in exactly one place (SLOT-1, PAGE-1); at page size 1 a page is a slot:

    |free| + |release| + |pending| + |held| = P
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import AllocatorView, Slots
from kvspec.oracle.boundary import numbers, tensor
from kvspec.oracle.digest import START, mix
from kvspec.oracle.observer import Reporter

__all__ = ["BaseTokenToKVPoolAllocator", "Clauses", "Ticket", "TokenToKVPoolAllocator"]


class Clauses(NamedTuple):
    """The ids under which one allocator refuses what every allocator refuses."""

    books: str
    sink: str
    amount: str
    requests: str
    given_back: str
    group: str
    ticket: str
    argument: str


class Ticket(NamedTuple):
    """Worth one restore while its owner is still in its epoch (PAGE-15, SLOT-10)."""

    owner: object
    epoch: int
    taken: int
    """How many pages had been handed out in that epoch."""


class BaseTokenToKVPoolAllocator(Reporter):
    """The books of pages, in one of two orders: see `queue`."""

    clauses: Clauses
    size_name = "size"
    """What the constructor calls the size."""

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        device: str,
        kvcache: object,
        need_sort: bool,
    ) -> None:
        if page_size < 1:
            raise ContractError(f"{self.clauses.argument}: page_size is {page_size}")
        if not 0 <= size < 2**31 - page_size:
            raise ContractError(
                f"{self.clauses.argument}: {self.size_name} is {size},"
                f" not in 0 .. {2**31 - page_size - 1}"
            )
        self.size, self.page_size = size, page_size
        self.dtype, self.device, self.need_sort = dtype, str(device), need_sort
        self._kvcache = kvcache
        self._pages_moved = self._merges = self._pages_merged = 0
        self._owner = object()
        self._epoch, self._ended_by = 0, ""
        self._start()

    def _start(self) -> None:
        self.free_list = list(range(1, self.page_count + 1))
        self.release: list[int] = []
        self.pending: list[int] = []
        self.group = False
        self.handed_out: list[int] = []

    @property
    def queue(self) -> bool:
        """Whether a slot is named once and goes last (SLOT-5, SLOT-6); else any slot names its
        page, and what is given back goes, ascending, to the head (PAGE-9, PAGE-16).
        """
        return False

    @property
    def unit(self) -> str:
        """What a page is called."""
        return "slot" if self.queue else "page"

    @property
    def page_count(self) -> int:
        """P: the remainder of a size that is not a multiple of page_size is not used."""
        return self.size // self.page_size

    @property
    def held(self) -> frozenset[int]:
        """Every page that is in no list."""
        lists = {*self.free_list, *self.release, *self.pending}
        return frozenset(range(1, self.page_count + 1)) - lists

    @property
    def free_pages(self) -> Tensor:
        """The free list, head first."""
        return tensor(self.free_list)

    @property
    def release_pages(self) -> Tensor:
        """The release list."""
        return tensor(self.release)

    @property
    def is_not_in_free_group(self) -> bool:
        """Whether no free group is open."""
        return not self.group

    def available_size(self) -> int:
        """How many slots `alloc` can hand out now."""
        return (len(self.free_list) + len(self.release)) * self.page_size

    def pending_size(self) -> int:
        """How many slots wait for the open group's end (SLOT-14, PAGE-21)."""
        return len(self.pending) * self.page_size

    def alloc(self, need_size: int) -> Tensor | None:
        """Slots of whole pages, or None (PAGE-3, PAGE-4, PAGE-5; SLOT-2, SLOT-3, SLOT-4)."""
        self._guard("alloc")
        if need_size < 0 or need_size % self.page_size:
            raise ContractError(f"{self.clauses.amount}: {self._odd_amount(need_size)}")
        pages = self._take(need_size // self.page_size)
        if pages is None:
            return None
        self._report_moved("alloc", pages)
        return tensor(self._slots(pages))

    def free(self, free_index: Slots) -> None:
        """Give back, or refuse and change nothing (PAGE-9, PAGE-10; SLOT-5, SLOT-6)."""
        self._guard("free")
        pages = self._given_back(numbers(free_index, self.clauses.argument))
        if pages:
            self._put_back(pages)
            self._end_epoch(f"{self.unit}s were freed")
            self._report_moved("free", pages)

    def free_group_begin(self) -> None:
        """Hold back what is freed from here on (PAGE-11, PAGE-12; SLOT-7, SLOT-8)."""
        self._guard("free_group_begin")
        if self.group:
            raise ContractError(f"{self.clauses.group}: a free group is open already")
        self._open_group()
        self._end_epoch("a free group was opened")
        self._report("free_group_begin")

    def free_group_end(self) -> None:
        """Make available what was held back (PAGE-11, PAGE-12; SLOT-7, SLOT-8)."""
        self._guard("free_group_end")
        if not self.group:
            raise ContractError(f"{self.clauses.group}: no free group is open")
        pages = self._close_group()
        self._end_epoch("a free group was closed")
        self._report("free_group_end", self._slots(pages))

    def backup_state(self) -> Ticket:
        """A ticket for the allocations from here on (PAGE-14; SLOT-9)."""
        return Ticket(self._owner, self._epoch, len(self.handed_out))

    def restore_state(self, state: object) -> None:
        """Undo the allocations since the ticket (PAGE-14, PAGE-15; SLOT-9, SLOT-10)."""
        self._guard("restore_state")
        if not isinstance(state, Ticket) or state.owner is not self._owner:
            raise ContractError(f"{self.clauses.ticket}: this is no ticket of this allocator")
        if state.epoch != self._epoch:
            raise ContractError(
                f"{self.clauses.ticket}: the ticket is no longer valid: {self._ended_by} since"
            )
        pages = self._take_back(state.taken)
        self._end_epoch("a state was restored")
        self._report_moved("restore_state", pages)

    def clear(self) -> None:
        """Everything is free, in ascending order, and no group is open (PAGE-13; SLOT-9)."""
        self._guard("clear")
        before = self.view()
        self._start()
        self._end_epoch("the allocator was cleared")
        if self.view() != before:
            self._report("clear")

    def get_kvcache(self) -> object:
        """The KV tensors, as given to the constructor."""
        return self._kvcache

    def view(self) -> AllocatorView:
        """The abstract state."""
        return AllocatorView(
            free=tuple(self.free_list),
            release=tuple(self.release),
            pending=tuple(self.pending),
            held=self.held,
            group=self.group,
        )

    def digest(self) -> int:
        """64 bits that stand for the view (PAGE-20; SLOT-13); held is the rest."""
        digest = START
        for pages in (self.free_list, self.release, self.pending):
            digest = mix(digest, len(pages), *pages)
        return mix(digest, self.group)

    def check(self) -> None:
        """A page listed twice, out of range, or 0 (PAGE-19; SLOT-13)."""
        listed = [*self.free_list, *self.release, *self.pending]
        if 0 in listed:
            raise ContractError(f"{self.clauses.sink}: the sink is listed")
        if len({*listed} & {*range(1, self.page_count + 1)}) != len(listed):
            raise ContractError(f"{self.clauses.books}: a {self.unit} is unknown or listed twice")

    def counters(self) -> dict[str, int]:
        """Pages that entered or left a list one by one, and the merges apart (PAGE-18; SLOT-12)."""
        return {
            "pages_moved": self._pages_moved,
            "merges": self._merges,
            "pages_merged": self._pages_merged,
        }

    def _odd_amount(self, need_size: int) -> str:
        why = "is negative" if self.queue else f"but page_size is {self.page_size}"
        return f"alloc({need_size}) {why}"

    def _given_back(self, slots: list[int]) -> list[int]:
        """The pages that `free` gives back, in the order in which they go into a list."""
        held = self.held
        pages = self._named(
            "free",
            slots,
            lambda page: self._unheld(page, held),
            clause=self.clauses.given_back,
            once=self.queue,
        )
        return self._in_order(pages)

    def _named(
        self, call: str, slots: list[int], fault: Callable[[int], str], *, clause: str, once: bool
    ) -> list[int]:
        """The pages that slots name, in the order of their first slot; refuses the first fault."""
        pages = dict[int, None]()
        for slot in slots:
            page = slot // self.page_size
            why = " twice" if once and page in pages else fault(page)
            if why:
                raise ContractError(f"{clause}: {call} names {self.unit} {page}{why}")
            pages[page] = None
        return list(pages)

    def _in_order(self, pages: Iterable[int]) -> list[int]:
        """Pages given back at one time, in the order in which they go into a list."""
        return list(pages) if self.queue else sorted(pages)

    def _waiting(self, before: list[int], pages: list[int]) -> list[int]:
        """A list after these pages were put into it."""
        return before + pages if self.queue else pages + before

    def _open_group(self) -> None:
        self.group = True

    def _close_group(self) -> list[int]:
        pages = self._in_order(self.pending)
        self.pending, self.group = [], False
        self._put_back(pages)
        return pages

    def _put_back(self, pages: list[int]) -> None:
        if self.group:
            self.pending = self.pending + pages
        elif self.need_sort:
            self.release = self._waiting(self.release, pages)
        else:
            self.free_list = self._waiting(self.free_list, pages)
        self._pages_moved += len(pages)

    def _take(self, page_count: int) -> list[int] | None:
        """Pages from the head of the free list, merged with the release list if it is short."""
        if page_count > len(self.free_list) + len(self.release):
            return None
        if page_count > len(self.free_list):
            self._merge()
        pages, self.free_list = self.free_list[:page_count], self.free_list[page_count:]
        self.handed_out += pages
        self._pages_moved += page_count
        return pages

    def _take_back(self, taken: int) -> list[int]:
        """Put the pages handed out after the first `taken` back at the head."""
        pages = self.handed_out[taken:]
        self.free_list = pages + self.free_list
        self._pages_moved += len(pages)
        return pages

    def _merge(self) -> None:
        self.free_list, self.release = sorted(self.free_list + self.release), []
        self._merges += 1
        self._pages_merged += len(self.free_list)

    def _end_epoch(self, reason: str) -> None:
        self._epoch, self._ended_by = self._epoch + 1, reason
        self.handed_out = []

    def _slots(self, pages: Sequence[int]) -> list[int]:
        size = self.page_size
        return [page * size + offset for page in pages for offset in range(size)]

    def _report_moved(self, name: str, pages: Sequence[int]) -> None:
        if pages:
            self._report(name, self._slots(pages))

    def _unheld(self, page: int, held: frozenset[int]) -> str:
        """Why a page cannot be given back, or nothing."""
        if page in held:
            return ""
        if page == 0:
            return ", which is the sink"
        if not 0 < page <= self.page_count:
            return f", which is out of range 1 .. {self.page_count}"
        return ", which is pending" if page in self.pending else ", which is free"


class TokenToKVPoolAllocator(BaseTokenToKVPoolAllocator):
    """A queue of slots (SLOT-1)."""

    room = "slot_allocator"
    queue = True
    clauses = Clauses(
        books="SLOT-1",
        sink="SLOT-1",
        amount="SLOT-4",
        requests="",
        given_back="SLOT-5",
        group="SLOT-8",
        ticket="SLOT-10",
        argument="SLOT-11",
    )

    def __init__(
        self, size: int, dtype: torch.dtype, device: str, kvcache: object, need_sort: bool
    ) -> None:
        super().__init__(size, 1, dtype, device, kvcache, need_sort)
