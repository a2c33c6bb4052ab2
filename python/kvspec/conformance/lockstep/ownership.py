"""Who has which page of either pool, and what nobody may take: laws of both systems, in the views.

Oracle and core agree when this is asked, so it reads the oracle alone. It knows what a client knows
and what the views say, nothing of how either of them works.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from kvspec.conformance.lockstep.pair import Divergence, Pair
from kvspec.interfaces.prefix_cache import CacheView, PageView, Path
from kvspec.interfaces.slot_allocator import AllocatorView

__all__ = ["Books", "BrokenLaw", "check_locks", "check_nothing_taken", "check_owners", "prefixes"]


class BrokenLaw(Divergence):
    """Both systems do what a clause forbids."""

    def __init__(self, clause: str, what: str) -> None:
        super().__init__(f"{clause}: {what}", None, None)

    def __str__(self) -> str:
        return f"both systems break {self.where}"


class Books(NamedTuple):
    """The state of one system between two calls."""

    allocator: AllocatorView
    pairs: Mapping[int, int]
    """Window page of a full page."""
    cache: CacheView

    @classmethod
    def of(cls, pair: Pair) -> "Books":
        """Those of the oracle. O(pool)."""
        view = pair.allocator.oracle.view()
        return cls(view, dict(view.pairs), pair.cache.oracle.view())

    @property
    def pages(self) -> Mapping[Path, PageView]:
        """The resident pages."""
        return self.cache.pages

    def live(self, path: Path) -> bool:
        """Whether a path ends in a resident page with a pair."""
        return path in self.pages and not self.pages[path].tombstone


def prefixes(path: Path, page_size: int, start: int = 0) -> Iterator[Path]:
    """The paths of whole pages that lead to a path, itself included, beyond `start` tokens."""
    name, tokens = path
    for stop in range(start + page_size, len(tokens) + 1, page_size):
        yield name, tokens[:stop]


def check_nothing_taken(name: str, before: Books, after: Books, kept: Iterable[int]) -> None:
    """No locked page has gone, no pair of a live page changed, and `kept` is as it was.

    `kept` are pages that a call had no business with: other requests' own and those in no row.
    """
    for path, page in before.pages.items():
        now = after.pages.get(path)
        if now is None or now.page != page.page:
            if page.locks:
                raise BrokenLaw("RADIX-11", f"{name} took page {page.page} under a lock")
        elif not page.tombstone:
            if page.swa_locks and now.tombstone:
                raise BrokenLaw("SWARADIX-15", f"{name} took the locked pair of page {page.page}")
            if not now.tombstone and after.pairs.get(page.page) != before.pairs.get(page.page):
                raise BrokenLaw("SWARADIX-18", f"{name} changed the pair of page {page.page}")
    for number in kept:
        if number in before.allocator.held and number not in after.allocator.held:
            raise BrokenLaw("SWARADIX-18", f"{name} gave back page {number} of somebody else")
        if after.pairs.get(number) != before.pairs.get(number):
            raise BrokenLaw("SWARADIX-18", f"{name} changed the pair of somebody's page {number}")


def check_owners(books: Books, counts: tuple[int, int], own: Mapping[str, Collection[int]]) -> None:
    """Each of the pages 1 .. count, of either pool, has one owner (SWA-1, SWA-2, CHECK-2)."""
    full, window = books.allocator, books.allocator.swa
    assert window is not None
    _check_partition(
        "full",
        counts[0],
        {
            "free": (*full.free, *full.release),
            "pending": full.pending,
            "tree": [page.page for page in books.pages.values()],
            **own,
        },
    )
    paired = {"free": (*window.free, *window.release), "pending": window.pending}
    _check_partition("window", counts[1], {**paired, "pairs": books.pairs.values()})
    if not full.held >= books.pairs.keys():
        raise BrokenLaw("SWA-2", f"of {sorted(books.pairs)}, a page with a pair is not held")


def _check_partition(pool: str, count: int, owners: Mapping[str, Collection[int]]) -> None:
    listed = [page for pages in owners.values() for page in pages]
    if sorted(listed) == list(range(1, count + 1)):
        return
    for page in {*listed, *range(1, count + 1)}:
        has = [owner for owner, pages in owners.items() for one in pages if one == page]
        if len(has) != 1:
            clause = "CHECK-2" if has else "CHECK-1"
            raise BrokenLaw(clause, f"the owners of {pool} page {page} are {has}")


def check_locks(books: Books, page_size: int, pages_of_window: int) -> None:
    """Tombstones, leaves and locks are what pairs and receipts say (SWARADIX-7 to SWARADIX-9)."""
    parents = {(name, tokens[:-page_size]) for name, tokens in books.pages}
    locks, window_locks = Counter[Any](), Counter[Any]()
    for receipt in books.cache.receipts:
        locks.update(prefixes(receipt, page_size))
        start = len(receipt[1]) - pages_of_window * page_size
        window_locks.update(prefixes(receipt, page_size, max(start, 0)))
    for path, page in books.pages.items():
        if page.tombstone == (page.page in books.pairs):
            raise BrokenLaw("SWARADIX-8", f"page {page.page} is a tombstone: {page.tombstone}")
        if page.tombstone and path not in parents:
            raise BrokenLaw("SWARADIX-7", f"page {page.page} is a leaf and a tombstone")
        if (page.locks, page.swa_locks) != (locks[path], window_locks[path]):
            counted = locks[path], window_locks[path]
            raise BrokenLaw("SWARADIX-9", f"receipts lock page {page.page} {counted} times: {page}")
