"""What a cache of pages must count, without pages: a trie of block ids and nothing clever.

One request is one tick. It matches its longest resident prefix, evicts leaves until the rest fits
while its own match is pinned, and becomes resident whole, cut to the capacity. The victim is the
leaf with the smallest key.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["POLICIES", "Counts", "simulate"]


@dataclass(eq=False)
class Page:
    parent: "Page | None"
    id: int
    born: int
    last: int
    hits: int = 0
    children: dict[int, "Page"] = field(default_factory=dict)


class Counts(NamedTuple):
    hit_blocks: int = 0
    hit_tokens: int = 0
    evictions: int = 0


POLICIES: dict[str, Callable[[Page], tuple[int, ...]]] = {
    "lru": lambda page: (page.last,),
    "mru": lambda page: (-page.last,),
    "fifo": lambda page: (page.born,),
    "filo": lambda page: (-page.born,),
    "lfu": lambda page: (page.hits, page.last),
    "slru": lambda page: (page.hits >= 1, page.last),
    "priority": lambda page: (0, page.last),
}
"""The keys of RADIX-13. Every request of a trace has the priority 0."""


def simulate(
    requests: Iterable[tuple[Sequence[int], int]],
    *,
    block: int,
    capacity: int,
    policy: str,
    leave_last_token: bool = False,
) -> Counts:
    """The counts for requests of (ids, input_length). O(evictions * leaves)."""
    key = POLICIES[policy]
    root = Page(parent=None, id=-1, born=0, last=0)
    leaves: set[Page] = set()
    size, counts = 0, Counts()
    for tick, (ids, input_length) in enumerate(requests, start=1):
        wanted = ids[:capacity]
        matchable = wanted[: len(ids) - 1] if leave_last_token else wanted
        path = [root]
        for id_ in matchable:
            if id_ not in path[-1].children:
                break
            path.append(path[-1].children[id_])
            path[-1].hits += 1
            path[-1].last = tick
        hit, pinned = len(path) - 1, set(path)
        # Beyond the match the last page may be resident: it is needed all the same.
        evicted = max(0, size + len(wanted) - hit - capacity)
        for _ in range(evicted):
            unpinned = (leaf for leaf in leaves if leaf not in pinned)
            victim = min(unpinned, key=lambda page: (*key(page), page.born))
            leaves.remove(victim)
            assert victim.parent is not None
            del victim.parent.children[victim.id]
            if victim.parent is not root and not victim.parent.children:
                leaves.add(victim.parent)
        size -= evicted
        for id_ in wanted[hit:]:
            parent = path[-1]
            if id_ not in parent.children:
                parent.children[id_] = Page(parent, id_, born=tick, last=tick)
                leaves.discard(parent)
                leaves.add(parent.children[id_])
                size += 1
            path.append(parent.children[id_])
            path[-1].last = tick
        counts = Counts(
            counts.hit_blocks + hit,
            counts.hit_tokens + min(hit * block, input_length),
            counts.evictions + evicted,
        )
    return counts
