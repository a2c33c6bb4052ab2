"""Allocators of KV slots: what all of them share, and page size 1. Spec: SLOT."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from kvspec.interfaces.observer import Observable

__all__ = ["AllocatorView", "BaseTokenToKVPoolAllocator", "Slots", "Ticket"]

Slots: TypeAlias = Sequence[int] | Tensor | memoryview
"""Slots as an argument: a list, a buffer or a one-dimensional integer tensor on the CPU."""


Ticket: TypeAlias = object
"""What `backup_state` returns: opaque, and worth one `restore_state`."""


class AllocatorView(NamedTuple):
    """The abstract state, in pages; at page size 1 a page is a slot."""

    free: tuple[int, ...]
    release: tuple[int, ...]
    pending: tuple[int, ...]
    held: frozenset[int]
    group: bool
    swa: "AllocatorView | None" = None
    """The window pool's, where there is one; the rest is the full pool's."""
    pairs: tuple[tuple[int, int], ...] = ()
    """(full page, window page), ascending."""


class BaseTokenToKVPoolAllocator(Observable, Protocol):
    """What every allocator of KV slots has (SLOT-11, PAGE-17).

    Slots in results are int64 tensors on the CPU, in the order that SLOT-6 or PAGE-16 says.
    """

    @property
    def size(self) -> int:
        """Slots, as given to the constructor; the remainder of a page is not used."""

    @property
    def page_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> str: ...

    @property
    def need_sort(self) -> bool: ...

    @property
    def free_pages(self) -> Tensor:
        """The free list, head first: int64, a copy. O(pages)."""

    @property
    def release_pages(self) -> Tensor:
        """The release list: int64, a copy. O(pages)."""

    @property
    def is_not_in_free_group(self) -> bool: ...

    def available_size(self) -> int:
        """How many slots `alloc` can hand out now. O(1)."""

    def pending_size(self) -> int:
        """How many slots were given back in the open free group (SLOT-14, PAGE-21). O(1)."""

    def alloc(self, need_size: int) -> Tensor | None:
        """Take slots, or None and no change (PAGE-3, PAGE-4, PAGE-5; SLOT-2, SLOT-3, SLOT-4)."""

    def free(self, free_index: Slots) -> None:
        """Give slots back (PAGE-9, PAGE-10; SLOT-5, SLOT-6). O(slots named)."""

    def free_group_begin(self) -> None:
        """Hold back what is freed until `free_group_end` (PAGE-11, PAGE-12; SLOT-7, SLOT-8)."""

    def free_group_end(self) -> None:
        """Make all that was freed in the group available (PAGE-11, PAGE-12; SLOT-7, SLOT-8)."""

    def backup_state(self) -> Ticket:
        """A ticket to undo the allocations from here on (PAGE-14; SLOT-9). O(1)."""

    def restore_state(self, state: Ticket) -> None:
        """Undo the allocations since the ticket (PAGE-14, PAGE-15; SLOT-9, SLOT-10)."""

    def clear(self) -> None:
        """Make everything free (PAGE-13; SLOT-9). O(pages)."""

    def get_kvcache(self) -> object:
        """The KV tensors this allocator manages, as given to the constructor."""

    def view(self) -> AllocatorView:
        """The abstract state. O(pages)."""

    def digest(self) -> int:
        """64 bits that stand for `view()`, equal in every process (PAGE-20; SLOT-13). O(pages)."""

    def check(self) -> None:
        """Raise ContractError if the books are broken (PAGE-19; SLOT-13). O(pages)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `pages_moved`, `merges` (PAGE-18; SLOT-12)."""
