"""Broken classes, whose logs break a clause: what `validate` has to find."""

from collections.abc import Sequence
from typing import Any

import kvspec.oracle
from kvspec.errors import ContractError
from kvspec.oracle.boundary import tensor
from kvspec.oracle.slot_allocator import BaseTokenToKVPoolAllocator

__all__ = [
    "AcceptsWhatIsFree",
    "AcceptsWhatIsFreeSlots",
    "CopiesNoDuplicate",
    "EvictsLocked",
    "ForgetsATail",
    "HandsOutTwice",
    "HandsOutTwiceSlots",
    "KeepsTheRow",
    "LosesAPage",
    "MatchesTooLittle",
    "RefusesTheLast",
    "ReplacesTwice",
]


class _Lenient(BaseTokenToKVPoolAllocator):
    """Takes back what it does not have to give, as an allocator without checks does."""

    def free(self, free_index: Any) -> None:
        try:
            super().free(free_index)
        except ContractError:
            return


class AcceptsWhatIsFree(_Lenient, kvspec.oracle.PagedTokenToKVPoolAllocator):
    """PAGE-10."""


class AcceptsWhatIsFreeSlots(_Lenient, kvspec.oracle.TokenToKVPoolAllocator):
    """SLOT-5."""


class _Generous(BaseTokenToKVPoolAllocator):
    """Hands a page out again to whoever asks for two."""

    def _take(self, page_count: int) -> list[int] | None:
        held = list(self.handed_out)
        pages = super()._take(page_count)
        if pages and held and page_count == 2:
            pages[0] = held[-1]
        return pages


class HandsOutTwice(_Generous, kvspec.oracle.PagedTokenToKVPoolAllocator):
    """PAGE-3, PAGE-6, PAGE-7."""


class HandsOutTwiceSlots(_Generous, kvspec.oracle.TokenToKVPoolAllocator):
    """SLOT-2."""


class LosesAPage(kvspec.oracle.PagedTokenToKVPoolAllocator):
    """PAGE-1: one page of those given back is in no list; nobody sees it but who looks."""

    def _put_back(self, pages: list[int]) -> None:
        super()._put_back(pages[1:] if len(pages) > 1 else pages)


class RefusesTheLast(kvspec.oracle.PagedTokenToKVPoolAllocator):
    """PAGE-4: there is one page left when it says that there is none."""

    def _take(self, page_count: int) -> list[int] | None:
        if page_count and page_count == len(self.free_list) + len(self.release):
            return None
        return super()._take(page_count)


class ForgetsATail(kvspec.oracle.RadixCache):
    """CACHE-4: what is beyond the last whole page is not given back."""

    def _claim_of_row(self, row: Any, frame: bytes) -> Any:
        claim, _ = super()._claim_of_row(row, frame)
        return claim, []


class ReplacesTwice(kvspec.oracle.RadixCache):
    """PAGE-10: gives back what it found twice in the tree, and once more."""

    def _give_back(self, pages: Sequence[int]) -> None:
        super()._give_back(pages)
        if self._busy == "cache_finished_req":
            super()._give_back(pages)


class CopiesNoDuplicate(kvspec.oracle.RadixCache):
    """CACHE-3: points the row at the tree's pages, and forgets its own."""

    def _exchange(self, req: Any, row: Any, shared: Any, duplicates: Any) -> None:
        if duplicates:
            self._rewrite(req, shared)


class KeepsTheRow(kvspec.oracle.RadixCache):
    """CACHE-2: gives a duplicate back, and leaves the row as it was."""

    def _rewrite(self, req: Any, shared: Sequence[int]) -> None:
        """Nothing."""

    def cache_unfinished_req(self, req: Any) -> None:
        assert self.req_to_token_pool is not None
        before = self.req_to_token_pool.row(req.req_pool_idx)
        super().cache_unfinished_req(req)
        req.prefix_indices = before[: len(req.fill_ids)]


class EvictsLocked(kvspec.oracle.RadixCache):
    """RADIX-11: a lock keeps nothing."""

    def _victims(self, num_tokens: int) -> Any:
        kept, self._locks = self._locks, {}
        victims = super()._victims(num_tokens)
        self._locks = kept
        return victims


class MatchesTooLittle(kvspec.oracle.RadixCache):
    """RADIX-1: the last page of a match is left out."""

    def match_prefix(self, key: Any, **options: Any) -> Any:
        found = super().match_prefix(key, **options)
        slots = found.device_indices.tolist()
        return found._replace(device_indices=tensor(slots[: -self.page_size] if slots else slots))
