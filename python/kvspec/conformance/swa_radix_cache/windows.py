"""What the tests of windows share: sizes, trees with tombstones, and the rules done naively."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvspec.conformance.prefix_cache.system import CacheConformance, System
from kvspec.interfaces.prefix_cache import CacheView, Interval, Path

__all__ = [
    "WindowConformance",
    "drained",
    "drop",
    "evicted",
    "intervals",
    "page_sizes",
    "shed",
    "sizes",
    "tombstones",
    "usable",
    "window_locks",
    "window_pages",
]

page_sizes = pytest.mark.parametrize("page_size", [1, 4])
sizes = pytest.mark.parametrize(
    ("page_size", "window"), [(size, window) for size in (1, 4) for window in (1, 2, 3, 4, 5, 9)]
)
"""Windows smaller than a page, as large, and larger."""


class WindowConformance(CacheConformance):
    """What the suites of windows have."""

    def windows(self, page_size: int = 1, window: int = 1, **options: Any) -> System:
        """A cache with windows of so many tokens, all its slots in the test's hand."""
        given = {"kind": "swaradix", "page_count": 64, "sliding_window_size": window, **options}
        return self.stocked(page_size, **given)


def window_pages(page_size: int, window: int) -> int:
    """The pages of a window."""
    return -(-window // page_size)


def usable(gone: Sequence[bool], length: int) -> int:
    """How many of these pages, of which some have no pair, a match gives (SWARADIX-1)."""
    stop = len(gone)
    while any(gone[max(stop - length, 0) : stop]):
        stop -= 1
    return stop


def window_locks(view: CacheView, page_size: int, length: int) -> dict[Path, int]:
    """How many open receipts have each page among the last of their path (SWARADIX-9)."""
    found = dict.fromkeys(view.pages, 0)
    for namespace, tokens in view.receipts:
        for stop in range(len(tokens), 0, -page_size)[:length]:
            found[namespace, tokens[:stop]] += 1
    return found


def intervals(kinds: Sequence[str], kind: str, page_size: int) -> list[Interval]:
    """Where the pages of one kind lie, in tokens."""
    found: list[Interval] = []
    for index, this in enumerate(kinds):
        start, stop = index * page_size, (index + 1) * page_size
        if this == kind and found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        elif this == kind:
            found.append((start, stop))
    return found


def tombstones(system: System, tokens: Sequence[int], extra_key: Any = None) -> list[bool]:
    """For each resident page along the tokens, whether it is without a pair."""
    view, stops = system.cache.view().pages, range(system.page_size, len(tokens) + 1)
    paths = [(extra_key, tuple(tokens[:stop])) for stop in stops]
    return [view[path].tombstone for path in paths if path in view]


def drop(system: System, *pages: int) -> None:
    """End the pairs of pages that the test has in its hand."""
    system.allocator.free_swa([page * system.page_size for page in pages])


def shed(system: System, tokens: Sequence[int]) -> None:
    """Make all pages tombstones, and let all leave, that are not in the last window of a path."""
    receipt = system.cache.inc_lock_ref(system.cache.match_prefix(tokens).last_device_node)
    evicted(system, 999, 999)
    system.cache.dec_lock_ref(receipt)


def drained(system: System, full_pages: int, swa_pages: int) -> Iterator[None]:
    """Evict so many pages at a time until there are none, with a look after each time."""
    while system.cache.view().pages:
        assert any(evicted(system, full_pages, swa_pages)), "nothing was evicted"
        yield


def evicted(system: System, full_pages: int, swa_pages: int) -> tuple[list[int], list[int]]:
    """Evict so many pages: which left the tree, and which became tombstones, ascending."""
    before = system.cache.view().pages
    system.cache.evict(full_pages * system.page_size, swa_pages * system.page_size)
    after = system.cache.view().pages
    gone = [page.page for path, page in before.items() if path not in after]
    made = [
        page.page for path, page in after.items() if page.tombstone and not before[path].tombstone
    ]
    return sorted(gone), sorted(made)
