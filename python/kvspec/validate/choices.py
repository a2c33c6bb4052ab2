"""The oracle with its choices made for it. Spec: VALID.

Which free page is handed out, which row, and which pages are evicted are choices of an
implementation. These are the classes of `kvspec.oracle`, with a method to make each of them before
the call; all else that they do is the oracle's.
"""

from collections.abc import Iterable, Sequence

from kvspec.interfaces.prefix_cache import LockReceipt
from kvspec.oracle import (
    ChunkCache,
    PagedTokenToKVPoolAllocator,
    RadixCache,
    ReqToTokenPool,
    SWAChunkCache,
    SWARadixCache,
    SWATokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
)
from kvspec.oracle.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.oracle.swa_radix_cache import Eviction
from kvspec.oracle.trie import Page, TrieCache

__all__ = [
    "Allocator",
    "Cache",
    "FollowedChunk",
    "FollowedPages",
    "FollowedRadix",
    "FollowedRows",
    "FollowedSlots",
    "FollowedWindowedChunk",
    "FollowedWindowedRadix",
    "FollowedWindows",
    "Locks",
]


class Allocator(BaseTokenToKVPoolAllocator):
    """An allocator that hands out what it is told to, and knows what is held without a search."""

    _held: set[int]
    _frozen: frozenset[int] | None
    given_back: list[int]
    """Pages given back or taken back since it was last emptied, in order."""

    def _start(self) -> None:
        super()._start()
        self._held, self._frozen, self.given_back = set(), None, []

    @property
    def held(self) -> frozenset[int]:
        """Every page that is in no list."""
        if self._frozen is None:
            self._frozen = frozenset(self._held)
        return self._frozen

    def is_held(self, page: int) -> bool:
        """Whether a page is in no list. O(1)."""
        return page in self._held

    def is_free(self, page: int) -> bool:
        """Whether a page of the pool is in the free or the release list."""
        return 0 < page <= self.page_count and page not in self._held and page not in self.pending

    def put_first(self, pages: Sequence[int]) -> None:
        """Make free pages the next to be handed out, in this order. O(free pages)."""
        if self.free_list[: len(pages)] != list(pages):
            chosen = set(pages)
            rest = [page for page in self.free_list if page not in chosen]
            self.free_list = [*pages, *rest]
            self.release = [page for page in self.release if page not in chosen]

    def hold(self, free: Sequence[int], pending: Sequence[int], group: bool) -> None:
        """Take over the state of a log's beginning: what is listed nowhere is held."""
        self.free_list, self.release, self.pending, self.group = (
            list(free),
            [],
            list(pending),
            group,
        )
        self._held = {*range(1, self.page_count + 1)}.difference(free, pending)
        self._frozen = None

    def _take(self, page_count: int) -> list[int] | None:
        pages = super()._take(page_count)
        self._held.update(pages or ())
        self._frozen = None
        return pages

    def _take_back(self, taken: int) -> list[int]:
        pages = super()._take_back(taken)
        self._held.difference_update(pages)
        self._frozen = None
        self.given_back += pages
        return pages

    def _put_back(self, pages: list[int]) -> None:
        super()._put_back(pages)
        self._held.difference_update(pages)
        self._frozen = None
        self.given_back += pages


class FollowedSlots(Allocator, TokenToKVPoolAllocator):
    """At page size 1 (SLOT)."""


class FollowedPages(Allocator, PagedTokenToKVPoolAllocator):
    """Of pages (PAGE)."""


class FollowedWindows(Allocator, SWATokenToKVPoolAllocator):
    """With a window pool (SWA). Which window page is a full page's pair no log tells, but its
    state: what counts is which full pages have one.
    """


class FollowedRows(ReqToTokenPool):
    """A pool that hands out the rows it is told to (REQ)."""

    def is_free(self, row: int) -> bool:
        """Whether a row can be handed out."""
        return row in self._free

    def is_live(self, row: int) -> bool:
        """Whether a row is a request's. O(1)."""
        return row in self._rows

    def live_rows(self) -> dict[int, list[int]]:
        """The slots of every live row; not copies."""
        return self._rows

    def put_first(self, rows: Sequence[int]) -> None:
        """Make free rows the next to be handed out, in this order."""
        chosen = set(rows)
        self._free = [*rows, *(row for row in self._free if row not in chosen)]

    def hold(self, free: Sequence[int], live: Iterable[int]) -> None:
        """Take over the state of a log's beginning: these rows are free, and these live."""
        self._free, self._rows = list(free), {row: [] for row in live}

    def _send(self) -> int:
        """There is no table."""
        self._unsent.clear()
        return 0


class Cache(TrieCache):
    """A tree that evicts what it is told to."""

    chosen: Sequence[int] = ()
    """KV pages of the next eviction."""

    def page_of(self, number: int) -> Page | None:
        """Who holds a KV page. O(1)."""
        return self._held.get(number)

    def knows(self, tokens: Sequence[int]) -> bool:
        """Whether all whole pages of a key of no namespace are resident. O(tokens)."""
        pages = self._whole_pages(tokens)
        return len(self._walk(self._root(b""), pages)) == len(pages)

    def residents(self) -> dict[int, Page]:
        """KV page -> who holds it; not a copy."""
        return self._held

    def locks_of(self, page: Page) -> int:
        """How many open receipts cover a page. O(1)."""
        return self._locks.get(page, 0)

    def window_locks_of(self, page: Page) -> int:
        """How many window locks cover a page. O(1)."""
        return self._window_locks.get(page, 0)

    def is_tombstone(self, page: Page) -> bool:
        """Whether a page is without a pair. O(1)."""
        return page in self._tombstones

    def extensions(self, pages: Iterable[Page]) -> list[Page]:
        """Resident pages that extend one of these and are none of them. O(resident pages)."""
        gone = set(pages)
        return [p for p in self._tree.values() if p.before in gone and p not in gone]

    def receipts_covering(self, pages: Iterable[Page]) -> list[LockReceipt]:
        """Open receipts whose path has one of these pages."""
        gone = set(pages)
        return [
            receipt for receipt, node in self._open.items() if not gone.isdisjoint(self._path(node))
        ]

    def _chosen_pages(self) -> list[Page]:
        return [self._held[number] for number in self.chosen]


class FollowedRadix(Cache, RadixCache):
    """A tree over one pool (RADIX)."""

    def _victims(self, num_tokens: int) -> list[list[Page]]:
        return [[page] for page in self._chosen_pages()]


class FollowedWindowedRadix(Cache, SWARadixCache):
    """A tree over two pools (SWARADIX)."""

    made: Sequence[int] = ()
    """KV pages that the next eviction makes tombstones."""

    def _victims(self, full_num_tokens: int, swa_num_tokens: int) -> Eviction:
        eviction = Eviction(self._tree.values(), self._tombstones)
        for page in (self._held[number] for number in self.made):
            eviction.made.append(page)
            eviction.window_count += 1
        for page in self._chosen_pages():
            eviction.window_count += page not in self._tombstones
            eviction.gone.append(page)
            del eviction.left[page]
        return eviction


class FollowedChunk(ChunkCache):
    """A cache that shares nothing (CHUNK)."""


class FollowedWindowedChunk(SWAChunkCache):
    """The same over two pools (CHUNK)."""


class Locks:
    """The open receipts of the oracle, by what a log calls them."""

    def __init__(self) -> None:
        self._paths: dict[LockReceipt, bytes] = {}
        self._at: dict[bytes, list[LockReceipt]] = {}
        self._events: dict[int, LockReceipt] = {}
        self._rows: dict[int, LockReceipt] = {}

    def add(self, receipt: LockReceipt, path: bytes, event: int, row: int | None = None) -> None:
        """An event took a lock on a path, for a row or for somebody."""
        self._paths[receipt] = path
        self._at.setdefault(path, []).append(receipt)
        self._events[event] = receipt
        if row is not None:
            self._rows[row] = receipt

    def drop(self, receipt: LockReceipt) -> None:
        """It is open no more."""
        self._at[self._paths.pop(receipt)].remove(receipt)
        for row in [row for row, own in self._rows.items() if own is receipt]:
            self.disown(row)

    def disown(self, row: int) -> None:
        """The row has been given back; the lock that it had is somebody's."""
        self._rows.pop(row, None)

    def path(self, receipt: LockReceipt) -> bytes:
        """The id of the last page that it covers."""
        return self._paths[receipt]

    def of_row(self, row: int) -> LockReceipt | None:
        """The lock that a cache took for a row."""
        return self._rows.get(row)

    def find(self, path: bytes, event: int = -1) -> LockReceipt | None:
        """That of an event, or the oldest on a path: one that no row was left with, if there is."""
        receipt = self._events.get(event)
        if receipt in self._paths:
            return receipt
        return self.unowned(path) or next(iter(self._at.get(path, ())), None)

    def unowned(self, path: bytes) -> LockReceipt | None:
        """The oldest on a path that no row was left with."""
        owned = set(self._rows.values())
        return next((r for r in self._at.get(path, ()) if r not in owned), None)
