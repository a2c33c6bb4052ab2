"""What happened in a run, counted in the oracle's results and views."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from kvspec.interfaces.prefix_cache import PageView, Path

__all__ = ["COUNTED", "Coverage"]

COUNTED = {
    "refusals": "allocations that returned None",
    "trims": "evictions that left the upper part of a run",
    "leaf evictions": "runs evicted whole",
    "splits under lock": "a match or insert that first left a locked run in its middle",
    "re-inserts": "adopted a page on a path that had been evicted",
    "stale handles": "a lock by a handle whose page had been evicted",
    "duplicates": "operations that gave back pages which the tree already had",
    "mid-page chunks": "chunks cached that ended inside a page",
    "group frees": "frees inside an open group",
    "restores": "restores that undid an allocation",
}


class Coverage:
    """Counters, and the memory that they need: which paths were evicted, where runs end."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
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
