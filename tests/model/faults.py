"""Oracles with one fault each. A comparison of graphs that does not see them shows nothing."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

from kvspec.interfaces.prefix_cache import LockReceipt, NodeHandle
from kvspec.oracle import PagedTokenToKVPoolAllocator, RadixCache
from kvspec.oracle.prefix_cache import LockReceipt as RadixReceipt
from kvspec.oracle.radix_cache import Page, Root
from kvspec.oracle.slot_allocator import Ticket

__all__ = ["HANDLES", "LOCKS", "MERGES", "ORDER", "RECENCY", "TICKETS"]

Faults: TypeAlias = dict[str, Callable[..., object]]


class FreesAtTheTail(PagedTokenToKVPoolAllocator):
    def _waiting(self, before: list[int], pages: list[int]) -> list[int]:
        return before + pages


class FreesDescending(PagedTokenToKVPoolAllocator):
    def _in_order(self, pages: Iterable[int]) -> list[int]:
        return sorted(pages, reverse=True)


class RestoresAtTheTail(PagedTokenToKVPoolAllocator):
    def restore_state(self, state: Ticket) -> None:
        free = self.free_list
        super().restore_state(state)
        self.free_list = free + self.free_list[: len(self.free_list) - len(free)]


class MergesUnsorted(PagedTokenToKVPoolAllocator):
    def _merge(self) -> None:
        self.free_list, self.release = self.free_list + self.release, []


class TicketsOutliveFrees(PagedTokenToKVPoolAllocator):
    def _end_epoch(self, reason: str) -> None:
        if "freed" not in reason:
            super()._end_epoch(reason)


class LocksTheLastPage(RadixCache):
    def _lock(self, node: Page | Root) -> RadixReceipt:
        receipt = super()._lock(node)
        for page in self._path(node)[:-1]:
            self._locks[page] -= 1
        return receipt


class LocksTwice(RadixCache):
    def inc_lock_ref(self, node: NodeHandle) -> LockReceipt:
        if self.total_size():
            super().inc_lock_ref(node)
        return super().inc_lock_ref(node)


class ConsumesAnyReceipt(RadixCache):
    newest: LockReceipt | None = None

    def inc_lock_ref(self, node: NodeHandle) -> LockReceipt:
        self.newest = receipt = super().inc_lock_ref(node)
        return receipt

    def dec_lock_ref(self, node: LockReceipt | NodeHandle) -> int:
        return super().dec_lock_ref(self.newest or node)


class MatchesWithoutTouch(RadixCache):
    def _hit(self, path: Sequence[Page]) -> None:
        pass


class TouchesTheLastPage(RadixCache):
    def _hit(self, path: Sequence[Page]) -> None:
        super()._hit(path[-1:])


class HandlesRevive(RadixCache):
    def _is_live(self, node: Page | Root) -> bool:
        return super()._is_live(node) or (
            isinstance(node, Page) and (node.before, node.tokens) in self._tree
        )


class HandlesOutliveReset(RadixCache):
    def reset(self) -> None:
        roots = self._roots
        super().reset()
        self._roots = roots


ORDER: Faults = {
    "frees_at_the_tail": FreesAtTheTail,
    "frees_descending": FreesDescending,
    "restores_at_the_tail": RestoresAtTheTail,
}
MERGES: Faults = {"merges_unsorted": MergesUnsorted}
TICKETS: Faults = {"tickets_outlive_frees": TicketsOutliveFrees}
LOCKS: Faults = {
    "locks_the_last_page": LocksTheLastPage,
    "locks_twice": LocksTwice,
    "consumes_any_receipt": ConsumesAnyReceipt,
}
RECENCY: Faults = {
    "matches_without_touch": MatchesWithoutTouch,
    "touches_the_last_page": TouchesTheLastPage,
    "evicts_the_first_born": partial(RadixCache, eviction_policy="fifo"),
    "evicts_the_most_recent": partial(RadixCache, eviction_policy="mru"),
}
HANDLES: Faults = {"handles_revive": HandlesRevive, "handles_outlive_reset": HandlesOutliveReset}
