"""The allocator of a full and a window pool. Spec: SWA."""

from typing import Protocol

from torch import Tensor

from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.interfaces.slot_allocator import Slots

__all__ = ["SWATokenToKVPoolAllocator"]


class SWATokenToKVPoolAllocator(PagedTokenToKVPoolAllocator, Protocol):
    """Hands out slots of the full pool, each page with its pair in the window pool.

    SWA-1 and SWA-2 are its law; `alloc`, `alloc_extend`, `alloc_decode` and the free groups are as
    in the other allocators, for both pools at once (SWA-3 to SWA-7, SWA-14 to SWA-18, SWA-21).
    The order of both free lists, and of the pairs, is SWA-22; costs are SWA-23.
    """

    @property
    def size_full(self) -> int:
        """Slots of the full pool, as given; `size` is the same."""

    @property
    def size_swa(self) -> int:
        """Slots of the window pool, as given."""

    @property
    def full_to_swa_index_mapping(self) -> Tensor:
        """The window slot of every full slot, 0 where there is none: int64
        [(full pages + 1) · page_size], a copy. O(pool).
        """

    def available_size(self) -> int:
        """The smaller of the two: what `alloc` can hand out (SWA-19). O(1)."""

    def full_available_size(self) -> int:
        """Slots that are free or released in the full pool (SWA-19). O(1)."""

    def swa_pending_size(self) -> int:
        """The window pool's share of what the open group holds back (SWA-25). O(1)."""

    def swa_available_size(self) -> int:
        """Slots that are free or released in the window pool (SWA-19). O(1)."""

    def free(self, free_index: Slots, swa_index: Slots = ()) -> None:
        """Give back pages and their pairs, and the pairs alone of those in `swa_index`: all of it,
        or nothing (SWA-8, SWA-9). O(slots named).
        """

    def free_swa(self, free_index: Slots) -> None:
        """Give back the pairs of the pages named, which stay held (SWA-10, SWA-11). O(slots)."""

    def move_swa(self, tgt_loc: Slots, src_loc: Slots) -> None:
        """Make the pairs of the source pages those of the targets (SWA-12, SWA-13). O(slots)."""

    def translate_loc_from_full_to_swa(self, kv_indices: Slots) -> Tensor:
        """The window slot of each full slot, 0 for none, -1 for -1: int32 [slots], on the CPU
        (SWA-20). O(slots).
        """

    def check(self) -> None:
        """Raise ContractError if the books of either pool or the pairs are broken (SWA-24)."""

    def digest(self) -> int:
        """64 bits that stand for `view()` (SWA-24). O(pool)."""
