"""Allocators and caches that refuse nothing, for the self-test (CHECK-22)."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvspec.errors import ContractError

__all__ = ["careless", "careless_cache"]


class _Careless:
    """Takes every slot back, as often as it is given, and hands out what it is told to."""

    _kind: Any
    """The class that is careful."""
    page_size: int
    handing: int | None = None
    """The page that the next `alloc` hands out, whoever has it."""
    twice: tuple[int, ...] = ()
    """Pages in the free list that should not be; `waiting` the same of the pending ones."""
    waiting: tuple[int, ...] = ()

    def alloc(self, need_size: int) -> Tensor | None:
        """Slots of the page that is to be handed out, or what the allocator says."""
        if self.handing is None:
            slots: Tensor | None = self._kind.alloc(self, need_size)
            return slots
        page, self.handing = self.handing, None
        return torch.arange(page * self.page_size, (page + 1) * self.page_size)

    def free(self, free_index: Any, *swa_index: Any) -> None:
        """What the allocator refuses is put into its lists all the same."""
        try:
            self._kind.free(self, free_index, *swa_index)
        except ContractError:
            slots: Iterable[int] = torch.as_tensor(free_index).tolist()
            pages = tuple(dict.fromkeys(slot // self.page_size for slot in slots))
            if self._kind.view(self).group:
                self.waiting += pages
            else:
                self.twice += pages

    def view(self) -> Any:
        """The books, with what should not be in them."""
        books = self._kind.view(self)
        free, pending = books.free + self.twice, books.pending + self.waiting
        return books._replace(free=free, pending=pending)

    def available_size(self) -> int:
        """It counts what is in its lists."""
        size: int = self._kind.available_size(self)
        return size + len(self.twice) * self.page_size

    def pending_size(self) -> int:
        """So it does here."""
        size: int = self._kind.pending_size(self)
        return size + len(self.waiting) * self.page_size


class _CarelessWithWindows(_Careless):
    def full_available_size(self) -> int:
        """It counts what is in its lists."""
        size: int = self._kind.full_available_size(self)
        return size + len(self.twice) * self.page_size


class _CarelessCache:
    """Counts more locks on a page than there are."""

    _kind: Any
    overlocked: int | None = None
    """The page."""

    def view(self) -> Any:
        """The tree, with a lock too many."""
        tree = self._kind.view(self)
        pages = {
            path: page._replace(locks=page.locks + (page.page == self.overlocked))
            for path, page in tree.pages.items()
        }
        return tree._replace(pages=pages)


@cache
def careless(kind: Any) -> Any:
    """The class of an allocator, without its contracts."""
    mixin = _CarelessWithWindows if hasattr(kind, "size_swa") else _Careless
    return type(kind.__name__, (mixin, kind), {"_kind": kind})


@cache
def careless_cache(kind: Any) -> Any:
    """The class of a cache that loses count of its locks."""
    return type(kind.__name__, (_CarelessCache, kind), {"_kind": kind})
