"""The allocator of KV pages. Spec: PAGE."""

from typing import Protocol

from torch import Tensor

from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator, Slots

__all__ = ["PagedTokenToKVPoolAllocator"]


class PagedTokenToKVPoolAllocator(BaseTokenToKVPoolAllocator, Protocol):
    """Hands out whole pages of `page_size` slots (PAGE-1, PAGE-2)."""

    def alloc_extend(
        self, prefix_lens: Slots, seq_lens: Slots, last_loc: Slots, extend_num_tokens: int
    ) -> Tensor | None:
        """Slots for positions [prefix, seq) of each request, or None (PAGE-4, PAGE-6, PAGE-8).

        Arguments are [batch]; the result is int64 [extend_num_tokens]. O(extend_num_tokens).
        """

    def alloc_decode(self, seq_lens: Slots, last_loc: Slots) -> Tensor | None:
        """A slot for position seq - 1 of each request, or None (PAGE-4, PAGE-7, PAGE-8).

        `seq_lens` counts the new token already; `last_loc` is the slot before it. O(batch).
        """
