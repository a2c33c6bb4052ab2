"""Who has which page, step by step, and what a radix tree holds. Spec: DEMO-7."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from kvspec.interfaces.prefix_cache import CacheView, PageView, Path
from kvspec.interfaces.request_pool import ReqToTokenPoolView
from kvspec.interfaces.slot_allocator import AllocatorView

__all__ = [
    "EVICTABLE",
    "FREE",
    "LOCKED",
    "NOBODY",
    "Sample",
    "TreeRun",
    "letter",
    "owners",
    "packed_pages",
    "shares",
    "tree_runs",
]

FREE, EVICTABLE, LOCKED, NOBODY = ".", "-", "+", "!"
"""Owners of a page, one letter each; conversation i is the letter i of the alphabet."""


class Sample(NamedTuple):
    """The pool after a step."""

    step: int
    seconds: float
    """Since the first request was added, without the time it took to look."""
    pages: str
    """The owner of each page, from page 1 on."""

    def by_owner(self) -> dict[str, int]:
        """Pages by owner."""
        return dict(Counter(self.pages))


class TreeRun(NamedTuple):
    """A stretch of a tree in which nothing branches and all pages have equally many locks."""

    parent: int | None
    """Its place in the list; None at the root."""
    start: int
    """Position of its first token."""
    tokens: int
    pages: int
    locks: int
    last: int
    """Rank of its last access among all pages, 0 the oldest."""
    token_ids: tuple[int, ...]
    path: Path


def letter(conversation: int) -> str:
    """What stands for a conversation in `Sample.pages`: A to Z, then a to z."""
    return chr(ord("A") + conversation if conversation < 26 else ord("a") + conversation - 26)


def owners(
    books: AllocatorView,
    rows: ReqToTokenPoolView,
    tree: CacheView,
    live: Mapping[int, tuple[int, int]],
    *,
    page_count: int,
    page_size: int,
) -> str:
    """The owner of each page from 1 to `page_count` (DEMO-7). O(pool).

    `live` has of each row its conversation and how many of its tokens are the tree's.
    """
    owner = [NOBODY] * (page_count + 1)
    for page in (*books.free, *books.release, *books.pending):
        owner[page] = FREE
    for row, (conversation, protected) in live.items():
        for slot in rows.rows[row][protected:]:
            owner[slot // page_size] = letter(conversation)
    for resident in tree.pages.values():
        owner[resident.page] = LOCKED if resident.locks else EVICTABLE
    return "".join(owner[1:])


def tree_runs(tree: CacheView) -> list[TreeRun]:
    """The tree with its unbranched stretches drawn together, parents before children."""
    size = min((len(tokens) for _, tokens in tree.pages), default=0)  # every first page's
    parents = {path: _parent(path, size) for path in tree.pages}
    children = Counter(parents.values())
    runs: list[TreeRun] = []
    place: dict[Path | None, int | None] = {None: None}
    ends: dict[int, Path] = {}
    for path in sorted(tree.pages, key=lambda path: (len(path[1]), repr(path[0]), path[1])):
        page, parent = tree.pages[path], parents[path]
        at = place[parent]
        new = path[1][len(parent[1]) if parent else 0 :]
        grows = at is not None and children[parent] == 1 and runs[at].locks == page.locks
        if at is not None and grows and ends[at] == parent:
            before = runs[at]
            runs[at] = before._replace(
                tokens=before.tokens + len(new),
                pages=before.pages + 1,
                last=max(before.last, page.last),
                token_ids=before.token_ids + new,
                path=path,
            )
        else:
            at = len(runs)
            runs.append(_run(place[parent], parent, page, new, path))
        place[path], ends[at] = at, path
    return runs


def _run(
    parent: int | None, before: Path | None, page: PageView, new: tuple[int, ...], path: Path
) -> TreeRun:
    start = len(before[1]) if before else 0
    return TreeRun(parent, start, len(new), 1, page.locks, page.last, new, path)


def _parent(path: Path, page_size: int) -> Path | None:
    """The page before it; None of a first page."""
    extra_key, tokens = path
    before = (extra_key, tokens[: len(tokens) - page_size])
    return before if before[1] else None


def packed_pages(pages: str) -> str:
    """`12.3A40-`: how often, and whose."""
    return "".join(f"{len(list(run))}{owner}" for owner, run in groupby(pages))


def shares(run: TreeRun, conversations: Sequence[Sequence[int]]) -> list[int]:
    """Which conversations begin with all of a run's path."""
    tokens = list(run.path[1])
    return [at for at, each in enumerate(conversations) if list(each[: len(tokens)]) == tokens]
