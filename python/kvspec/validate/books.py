"""What is followed: the oracle's objects, and what a log calls their pages, paths and locks."""

from collections.abc import Iterable

import torch

from kvspec.flight_recorder.events import Effects, Event, Runs, Start
from kvspec.interfaces.prefix_cache import LockReceipt, NodeHandle
from kvspec.oracle.boundary import tensor
from kvspec.validate.choices import (
    Cache,
    FollowedChunk,
    FollowedPages,
    FollowedRadix,
    FollowedRows,
    FollowedSlots,
    FollowedWindowedChunk,
    FollowedWindowedRadix,
    FollowedWindows,
    Locks,
)
from kvspec.validate.names import Names
from kvspec.validate.request import PlayedRequest
from kvspec.validate.runs import pages_of

__all__ = ["Books", "Broken", "Laws", "effects_of", "is_chunk", "is_queue"]

_NOTHING = Effects()


class Broken(Exception):
    """An event breaks a clause."""

    def __init__(self, clause: str, found: str, expected: str) -> None:
        super().__init__(clause, found, expected)
        self.clause, self.found, self.expected = clause, found, expected


class Laws:
    """The clauses of the implementation that was recorded: each room has its own ids."""

    def __init__(self, start: Start) -> None:
        windows, queue = start.size_swa is not None, is_queue(start)
        self.chunk = is_chunk(start)
        self.alloc, self.refusal, self.group_end = (
            ("SWA-3", "SWA-4", "SWA-14")
            if windows
            else ("SLOT-2", "SLOT-3", "SLOT-7")
            if queue
            else ("PAGE-3", "PAGE-4", "PAGE-11")
        )
        self.extend, self.decode = ("SWA-6", "SWA-6") if windows else ("PAGE-6", "PAGE-7")
        self.match = self._cache("CHUNK-3", "SWARADIX-1" if windows else "RADIX-1", start)
        self.finish = self._cache("CHUNK-2", "CACHE-4", start)
        self.copy = self._cache("CHUNK-1", "CACHE-2", start)
        self.duplicates = self._cache("CHUNK-1", "CACHE-3", start)
        self.victims = self._cache("CHUNK-3", "SWARADIX-16" if windows else "RADIX-10", start)
        self.leaf = "SWARADIX-12" if windows else "RADIX-8"
        self.locked = "SWARADIX-12" if windows else "RADIX-11"

    def _cache(self, chunk: str, sharing: str, start: Start) -> str:
        return chunk if self.chunk else "CACHE-18" if start.disable else sharing


def is_chunk(start: Start) -> bool:
    """Whether the cache is a ChunkCache, going by its name."""
    return "Chunk" in start.cache.rpartition(".")[2]


def is_queue(start: Start) -> bool:
    """Whether the allocator is a TokenToKVPoolAllocator: page size 1, and not paged by name."""
    return start.page_size == 1 and "Paged" not in start.allocator.rpartition(".")[2]


class Books:
    """The oracle's allocator, pool and cache, made as `start` says, and who has which page."""

    def __init__(self, start: Start) -> None:
        self.start, self.page_size, self.laws = start, start.page_size, Laws(start)
        self.allocator = _allocator(start)
        self.pool = FollowedRows(
            size=start.rows,
            max_context_len=max(start.max_context_len, 1),
            device="meta",
            enable_memory_saver=False,
        )
        self.cache = _cache(start, self.allocator, self.pool)
        self.locks = Locks()
        self.locks_known = True
        """Whether no lock was taken or given up on a node that the log could not name."""
        self.owners: dict[int, int] = {}
        """Page -> the row that has it for itself: written there, held since, in no tree."""
        self.abandoned: dict[int, int] = {}
        """Page -> the row whose own it was when somebody gave it back by hand."""
        self.forsaken: dict[int, int] = {}
        """Page -> the row whose own it was when the row was given back without it."""
        self.cached: dict[int, int] = {}
        """Row -> how many tokens of it were cached when it was last."""
        self.returned: set[int] = set()
        """Pages that were given back at least once."""
        self.tickets: dict[int, object] = {}
        """Of `backup_state`, by the number of its event."""
        self.copies: dict[int, frozenset[int]] = {}
        """Pages of copies in flight, by the number of the event that began them."""
        self.names = Names(start.page_size)

    @property
    def tree(self) -> Cache | None:
        """The cache, if it shares."""
        shares = isinstance(self.cache, Cache) and not self.cache.disable
        return self.cache if shares and isinstance(self.cache, Cache) else None

    @property
    def foreign(self) -> bool:
        """Whether the cache is somebody else's."""
        return not self.start.cache.startswith("kvspec.")

    def handle(self, id_: bytes) -> NodeHandle | None:
        """A handle of a path, the empty one's for no id; None if a match does not give it."""
        path = self.names.path(id_)
        if path is None:
            return None
        match = self.cache.match_prefix(path)
        return match.last_device_node if len(match.device_indices) == len(path) else None

    def request(self, row: int, tokens: list[int], receipt: LockReceipt | None) -> PlayedRequest:
        """A request of this row, of which the tree owns what the oracle's lock says."""
        request = PlayedRequest(row, None, receipt, tensor([]))
        request.holds(tokens)
        if receipt is not None:
            depth = self.names.depth(self.locks.path(receipt))
            request.cache_protected_len = depth * self.page_size
        return request

    # Who has what

    def who(self, page: int) -> str:
        """Who has a page, for a person."""
        if page == 0:
            return "the sink"
        if not 0 < page <= self.allocator.page_count:
            return f"outside 1 .. {self.allocator.page_count}"
        if page in self.allocator.pending:
            return "pending"
        resident = self.tree.page_of(page) if self.tree else None
        locks = self.tree.locks_of(resident) if self.tree and resident else 0
        if resident:
            return f"the tree's, with {locks} locks" if locks else "the tree's"
        if not self.allocator.is_held(page):
            return "free"
        return f"row {self.owners[page]}'s" if page in self.owners else "held"

    def is_resident(self, page: int) -> bool:
        """Whether the tree has a page."""
        return self.tree is not None and self.tree.page_of(page) is not None

    def released(self) -> list[int]:
        """The pages given back since this was last asked for; they are nobody's (LEDGER-9)."""
        pages, self.allocator.given_back = self.allocator.given_back, []
        self.returned.update(pages)
        for page in pages:
            self.owners.pop(page, None)
            self.forsaken.pop(page, None)
            for copy, copied in self.copies.items():
                if page in copied:
                    found = f"page {page} was given back while the copy of event {copy} is on"
                    raise Broken("LEDGER-9", found, "it stays held until the copy is done")
        return pages

    def own(self, row: int, pages: Iterable[int]) -> None:
        """A row has been given these pages; those of the tree stay the tree's."""
        self.owners.update((page, row) for page in pages if not self.is_resident(page))

    def disown(self, row: int, pages: Iterable[int]) -> None:
        """A row does not name these pages any more."""
        for page in pages:
            if self.owners.get(page) == row:
                del self.owners[page]

    def dismiss(self, row: int, slots: list[int]) -> None:
        """A row, which had these slots, has been given back."""
        pages = {slot // self.page_size for slot in slots}
        left = {page for page in pages if self.owners.get(page) == row}
        self.forsaken.update((page, row) for page in left if self.allocator.is_held(page))
        self.disown(row, pages)
        self.locks.disown(row)
        self.cached.pop(row, None)

    def before(self, row: int) -> str:
        """How far a row was cached before, for a person: what an implementation knows of it."""
        count = self.cached.get(row)
        if count is None:
            return "; it was not cached before"
        where = "inside a page" if count % self.page_size else "to the end of a page"
        return f"; it was cached up to token {count} before, {where}"

    def pages(self, runs: Runs | None) -> list[int]:
        """The pages of slots, each once."""
        return pages_of(runs, self.page_size)


def effects_of(event: Event) -> Effects:
    """What an event did to others."""
    return event.did or _NOTHING


def _allocator(start: Start) -> FollowedSlots | FollowedPages | FollowedWindows:
    if start.size_swa is not None:
        return FollowedWindows(
            size=start.size,
            size_swa=start.size_swa,
            dtype=torch.bfloat16,
            device="cpu",
            kvcache=None,
            need_sort=start.need_sort,
            page_size=start.page_size,
        )
    if is_queue(start):
        return FollowedSlots(start.size, torch.bfloat16, "cpu", None, start.need_sort)
    return FollowedPages(start.size, start.page_size, torch.bfloat16, "cpu", None, start.need_sort)


def _cache(
    start: Start,
    allocator: FollowedSlots | FollowedPages | FollowedWindows,
    pool: FollowedRows,
) -> FollowedRadix | FollowedWindowedRadix | FollowedChunk | FollowedWindowedChunk:
    if is_chunk(start):
        kind = FollowedChunk if start.size_swa is None else FollowedWindowedChunk
        return kind(pool, allocator, start.page_size)
    if start.size_swa is None:
        return FollowedRadix(pool, allocator, start.page_size, start.disable)
    window = start.sliding_window_size or 1
    return FollowedWindowedRadix(pool, allocator, window, start.page_size, start.disable)
