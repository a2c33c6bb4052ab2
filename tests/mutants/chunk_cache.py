"""Chunk caches with one clause broken each."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from kvspec import oracle
from kvspec.conformance.chunk_cache import ChunkCacheConformance
from kvspec.conformance.mutants import Registry
from kvspec.interfaces.prefix_cache import MatchResult
from kvspec.oracle import ChunkCache, SWAChunkCache
from kvspec.oracle.boundary import tensor
from kvspec.oracle.prefix_cache import RequestRow, finished_tokens

registry = Registry(ChunkCacheConformance, oracle)


@registry.mutant("CHUNK-1", reports=("SE-19", "SE-04"))
class GivesAViewOfTheRow(ChunkCache):
    def cache_unfinished_req(self, req: Any) -> None:
        super().cache_unfinished_req(req)
        assert self.req_to_token_pool is not None
        table = self.req_to_token_pool.req_to_token
        req.prefix_indices = table[req.req_pool_idx, : len(req.fill_ids)]


@registry.mutant("CHUNK-1")
class CopiesWholePagesOnly(ChunkCache):
    def cache_unfinished_req(self, req: Any) -> None:
        super().cache_unfinished_req(req)
        whole = len(req.fill_ids) // 4 * 4
        req.prefix_indices = req.prefix_indices[:whole]


@registry.mutant("CHUNK-1", "CHUNK-2", "CHUNK-3")
class CallsTheRowProtected(ChunkCache):
    def cache_unfinished_req(self, req: Any) -> None:
        super().cache_unfinished_req(req)
        req.cache_protected_len = len(req.fill_ids) // self.page_size * self.page_size


class GivesBackTooLittle(ChunkCache, ABC):
    """Gives back the first slots of the row alone."""

    @abstractmethod
    def kept(self, req: Any, slots: list[int]) -> list[int]:
        """The slots that are given back."""

    def _row(self, req: Any, tokens: list[int]) -> RequestRow:
        row = super()._row(req, tokens)
        if self._busy == "cache_finished_req":
            return RequestRow(self.kept(req, row.slots), row.tokens)
        return row


@registry.mutant("CHUNK-2", reports=("JAX-1147", "SG-31616"))
class LeaksWhatWasAllocatedBeyondTheCommitted(GivesBackTooLittle):
    def kept(self, req: Any, slots: list[int]) -> list[int]:
        return slots[: len(finished_tokens(req))]


@registry.mutant("CHUNK-2", reports=("SE-25",))
class LeaksASlotWithoutOutput(GivesBackTooLittle):
    def kept(self, req: Any, slots: list[int]) -> list[int]:
        return slots if req.output_ids else slots[: max(len(slots) - self.page_size, 0)]


@registry.mutant("CHUNK-2", "CHUNK-4", reports=("SG-10871",))
class KeepsTheRow(ChunkCache):
    def _dismiss(self, req: Any) -> None:
        pool, self.req_to_token_pool = self.req_to_token_pool, None
        super()._dismiss(req)
        self.req_to_token_pool = pool


@registry.mutant("CHUNK-3", "CHUNK-1", "CHUNK-2")
class FindsTheLastThingItSaw(ChunkCache):
    last: tuple[int, ...] = ()

    def cache_unfinished_req(self, req: Any) -> None:
        super().cache_unfinished_req(req)
        self.last = tuple(req.prefix_indices.tolist())

    def match_prefix(self, key: Any, *, extra_key: Any = None, touch: bool = True) -> MatchResult:
        return MatchResult(tensor(self.last[: len(key)]), None, None)


@registry.mutant("CHUNK-3")
class SaysItEvicted(ChunkCache):
    def evict(self, num_tokens: int) -> int:
        return num_tokens


@registry.mutant("CHUNK-4", reports=("SG-28754",))
class TakesMoreCommittedThanAllocated(ChunkCache):
    def _row(self, req: Any, tokens: list[int]) -> RequestRow:
        return super()._row(req, [])._replace(tokens=tokens)


@registry.mutant("CHUNK-4", reports=("JAX-982",))
class FinishesTwiceInSilence(ChunkCache):
    def cache_finished_req(self, req: Any) -> None:
        if req.req_pool_idx is not None:
            super().cache_finished_req(req)


# With a window pool


@registry.mutant("CHUNK-5")
class LeaksThePagesWhoseWindowIsGone(SWAChunkCache):
    def _give_back(self, pages: Sequence[int]) -> None:
        windows = self._have_windows([page * self.page_size for page in pages])
        paired = [page for page, window in zip(pages, windows, strict=True) if window]
        super()._give_back(paired)


@registry.mutant("CHUNK-5", "CHUNK-2")
class GivesWindowsBackThatAreGone(SWAChunkCache):
    """It counts them from what the request left in an earlier life."""

    def evict_swa(self, req: Any, prelen: int, *args: Any, **options: Any) -> int:
        count = super().evict_swa(req, prelen, *args, **options)
        req.evicted_seqlen_local = getattr(req, "evicted_seqlen_local", 0) or count
        return count

    def cache_finished_req(self, req: Any) -> None:
        slots = self._row(req, finished_tokens(req)).slots
        left = slots[getattr(req, "evicted_seqlen_local", 0) :]
        if left and self._window_pool is not None:
            self._window_pool.free_swa(tensor(left))
        super().cache_finished_req(req)


@registry.mutant("CHUNK-6")
class TakesAnyAllocator(SWAChunkCache):
    def _require_window_pool(self, clause: str) -> None:
        """Forgotten."""
