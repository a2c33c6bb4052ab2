"""A page allocator, as the model PageAllocator sees it."""

import pickle
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import chain, combinations
from operator import methodcaller
from typing import Any, TypeAlias

import torch

from kvspec.errors import ContractError
from model.graph import State

__all__ = ["PageClient", "model_view"]

PAGE_SIZE = 2
Move: TypeAlias = "Callable[[PageClient], str]"
_VARIABLES = ("free", "release", "pending", "held", "group", "ticket", "since")


def model_view(state: State) -> Hashable:
    """All of the model's state."""
    return tuple(state[name] for name in _VARIABLES)


def _slots(pages: Sequence[int], offset: int = 0) -> list[int]:
    return [page * PAGE_SIZE + offset for page in pages]


class PageClient:
    """An allocator and the one ticket that its user keeps: at first, another allocator's."""

    def __init__(self, make: Callable[..., Any], page_count: int, need_sort: bool) -> None:
        self.page_count = page_count
        self.pool, other = (
            make(
                size=page_count * PAGE_SIZE + 1,  # the last slot is no whole page
                page_size=PAGE_SIZE,
                dtype=torch.float16,
                device="cpu",
                kvcache=None,
                need_sort=need_sort,
            )
            for _ in range(2)
        )
        self.ticket = other.backup_state()

    def state(self) -> Hashable:
        """The view, and what a restore of the ticket would put at the head of the free list."""
        pool, ticket = pickle.loads(pickle.dumps((self.pool, self.ticket)))
        view = pool.view()
        try:
            pool.restore_state(ticket)
        except ContractError:
            return (*view[:5], False, ())
        free = pool.view().free
        return (*view[:5], True, free[: len(free) - len(view.free)])

    def moves(self) -> Iterator[Move]:
        """Every call of the interface that can change it, and many that may not."""
        held = sorted(self.pool.view().held)
        for count in (1, 2):
            yield from self._allocs(count, held)
        if held:
            yield methodcaller("extend", "AllocWithin", [1], [2], _slots(held[:1]))
            yield methodcaller("decode", "AllocWithin", [2], _slots(held[:1]))
        for pages in chain.from_iterable(combinations(held, n) for n in range(1, len(held) + 1)):
            yield methodcaller("free", [*_slots(pages[::-1], 1), *_slots(pages[:1])])
        for page in {*range(self.page_count + 2)} - {*held}:
            yield methodcaller("free", [*_slots(held[:1]), *_slots([page])])
        yield methodcaller("begin")
        yield methodcaller("end")
        yield methodcaller("clear")
        yield methodcaller("backup")
        yield methodcaller("restore")

    def _allocs(self, count: int, held: list[int]) -> Iterator[Move]:
        """Calls that take `count` pages: whole, begun, and continued from a page held."""
        yield methodcaller("alloc", count * PAGE_SIZE)
        new, whole = [0] * count, count * PAGE_SIZE
        yield methodcaller("extend", "AllocExtend", new, [1] * count, [-1] * count)
        if held:
            yield methodcaller("extend", "AllocExtend", [1], [1 + whole], _slots(held[:1]))
        else:
            yield methodcaller("extend", "AllocExtend", [0], [whole - 1], [-1])
        if len(held) >= count:
            yield methodcaller("decode", "AllocDecode", [3] * count, _slots(held[:count], 1))
        else:
            yield methodcaller("decode", "AllocDecode", [1] * count, [-1] * count)

    def alloc(self, slot_count: int) -> str:
        """PAGE-3 or PAGE-4."""
        return "AllocRefused" if self.pool.alloc(slot_count) is None else "Alloc"

    def extend(self, action: str, prefixes: list[int], lengths: list[int], last: list[int]) -> str:
        """PAGE-6 or PAGE-4: `action`, unless it is refused."""
        new = sum(lengths) - sum(prefixes)
        got = self.pool.alloc_extend(prefixes, lengths, last, new)
        return "AllocRefused" if got is None else action

    def decode(self, action: str, lengths: list[int], last: list[int]) -> str:
        """PAGE-7 or PAGE-4: `action`, unless it is refused."""
        return "AllocRefused" if self.pool.alloc_decode(lengths, last) is None else action

    def free(self, slots: list[int]) -> str:
        """PAGE-9 or PAGE-10."""
        return _granted("Free", "FreeRefused", "PAGE-10", partial(self.pool.free, slots))

    def begin(self) -> str:
        """PAGE-11 or PAGE-12."""
        return _granted("GroupBegin", "BeginRefused", "PAGE-12", self.pool.free_group_begin)

    def end(self) -> str:
        """PAGE-11 or PAGE-12."""
        return _granted("GroupEnd", "EndRefused", "PAGE-12", self.pool.free_group_end)

    def clear(self) -> str:
        """PAGE-13."""
        self.pool.clear()
        return "Clear"

    def backup(self) -> str:
        """PAGE-14; the ticket before is forgotten."""
        self.ticket = self.pool.backup_state()
        return "Backup"

    def restore(self) -> str:
        """PAGE-14 or PAGE-15."""
        call = partial(self.pool.restore_state, self.ticket)
        return _granted("Restore", "RestoreRefused", "PAGE-15", call)


def _granted(granted: str, refused: str, clause: str, call: Callable[[], object]) -> str:
    """Which of two actions a call was; a refusal has to name its clause."""
    try:
        call()
    except ContractError as error:
        return refused if error.clause == clause else f"{refused}, but by {error.clause}"
    return granted
