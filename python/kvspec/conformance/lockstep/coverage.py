"""What happened in a run, counted in the oracle's results and views."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from kvspec.conformance.lockstep.ownership import Books
from kvspec.interfaces.prefix_cache import PageView, Path

__all__ = ["COUNTED", "Coverage"]

_ROWS = {
    "refusals": "allocations that returned None",
    "mid-page chunks": "chunks cached that ended inside a page",
    "group frees": "frees inside an open group",
    "restores": "restores that undid an allocation",
}
_TREE = {
    "trims": "evictions that left the upper part of a run",
    "leaf evictions": "runs evicted whole",
    "splits under lock": "a match or insert that first left a locked run in its middle",
    "re-inserts": "adopted a page on a path that had been evicted",
    "stale handles": "a lock by a handle whose page had been evicted",
    "duplicates": "operations that gave back pages which the tree already had",
}
_WINDOW = {
    "joint refusals": "allocations refused for want of one pool alone",
    "behind a window": "an evict_swa by window that gave back pages",
    "behind a chunk": "an evict_swa by chunks that gave back pages",
    "retractions": "requests given up that had pages of their own",
    "resumptions": "retracted requests that came back",
    "pairs freed": "calls of free_swa",
    "pairs moved": "calls of move_swa",
}
_WINDOW_TREE = {
    "tombstones": "pages that eviction left without a pair",
    "tombstones inserted": "pages that came without a pair",
    "cascades": "evictions in which a tombstone went with a leaf",
    "revivals": "operations that revived tombstones",
    "revivals under lock": "of pages that another request had locked",
    "handles without window": "refused locks of handles whose window has gone",
    "fallbacks": "matches shorter than what is resident",
    "window splits": "a window lock that first began inside a run",
    "late unlocks": "released when pages on the path had died or been revived",
}
COUNTED: Mapping[str, Mapping[str, str]] = {
    "full": _ROWS | _TREE,
    "swa": _ROWS | _TREE | _WINDOW | _WINDOW_TREE,
    "swachunk": _ROWS | _WINDOW,
}
"""What is counted with each kind of memory."""


class Coverage:
    """Counters, and the memory that they need: which paths were evicted, where runs end."""

    def __init__(self, page_size: int, memory: str) -> None:
        self.page_size = page_size
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTED[memory], 0))
        self._evicted: set[int] = set()
        self._ends: set[int] = set()

    def evicted(self, before: Mapping[Path, PageView], after: Mapping[Path, PageView]) -> None:
        """Look at the pages that an eviction took."""
        gone = before.keys() - after.keys()
        children: Counter[Path] = Counter((name, t[: -self.page_size]) for name, t in before)
        for name, tokens in gone:
            parent = name, tokens[: -self.page_size]
            self._evicted.add(hash((name, tokens)))
            self._ends.discard(hash((name, tokens)))
            if parent in gone:
                continue
            trimmed = parent in after and children[parent] == 1 and not after[parent].cut
            self.counts["trims" if trimmed else "leaf evictions"] += 1

    def adopted(self, name: Any, tokens: tuple[int, ...], first: int) -> None:
        """The tree took the pages of a path from position `first` on."""
        again = False
        for stop in range(first + self.page_size, len(tokens) + 1, self.page_size):
            path = hash((name, tokens[:stop]))
            again |= path in self._evicted
            self._evicted.discard(path)
        self.counts["re-inserts"] += again

    def ended(self, cache: Any, name: Any, tokens: tuple[int, ...], adopted: bool) -> None:
        """A match or insert left the resident part of its path at the end of `tokens`."""
        path = name, tokens
        if hash(path) in self._ends or not tokens:
            return
        self._ends.add(hash(path))
        if not cache.protected_size():
            return
        pages = cache.view().pages
        stop = len(tokens)
        length = stop + self.page_size
        below = [
            page.locks
            for (other, longer), page in pages.items()
            if len(longer) == length and other == name and longer[:stop] == tokens
        ]
        if path in pages and len(below) - adopted == 1 and any(below):
            self.counts["splits under lock"] += 1

    # -- with a window pool

    def refused(self, page_count: int, full: int, window: int) -> None:
        """An allocation of so many pages was refused, with so many left in either pool."""
        self.counts["joint refusals"] += page_count <= max(full, window)

    def left(self, before: Books, after: Books) -> None:
        """Look at what an eviction took, from the tree and from the window pool."""
        self.evicted(before.pages, after.pages)
        gone = [page for path, page in before.pages.items() if path not in after.pages]
        self.counts["cascades"] += any(page.tombstone for page in gone)
        self.counts["tombstones"] += sum(
            path in after.pages and before.live(path) and not after.live(path)
            for path in before.pages
        )

    def entered(self, before: Books, after: Books, locked: Collection[Path]) -> None:
        """Look at what came into the tree; `locked` are the paths that others have locked."""
        new = after.pages.keys() - before.pages.keys()
        again = {hash(path) for path in new} & self._evicted
        self._evicted -= again
        self.counts["re-inserts"] += bool(again)
        self.counts["tombstones inserted"] += sum(after.pages[path].tombstone for path in new)
        revived = {
            path
            for path, page in before.pages.items()
            if page.tombstone and path in after.pages and after.live(path)
        }
        self.counts["revivals"] += bool(revived)
        self.counts["revivals under lock"] += any(
            name == other and tokens == longer[: len(tokens)]
            for name, tokens in revived
            for other, longer in locked
        )

    def window_locked(self, before: Books, path: Path, page_count: int) -> None:
        """A window lock of so many pages was put on the end of a path."""
        name, tokens = path
        start = len(tokens) - page_count * self.page_size
        above, below = (name, tokens[:start]), (name, tokens[: start + self.page_size])
        if start <= 0 or below not in before.pages:
            return
        pages = before.pages
        alone = sum(
            len(longer) == start + self.page_size and other == name and longer[:start] == above[1]
            for other, longer in pages
        )
        states = {(page.tombstone, page.swa_locks) for page in (pages[above], pages[below])}
        self.counts["window splits"] += alone == 1 and len(states) == 1
