"""What a cache of pages must count, without pages: a trie of block ids and nothing clever.

One request is one tick. It matches its longest resident prefix, evicts leaves until the rest fits
while its own match is pinned, and becomes resident whole, cut to the capacity. The victim is the
leaf with the smallest key. With windows there is another tree, a dict of paths.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

__all__ = ["POLICIES", "Counts", "WindowCounts", "simulate", "simulate_windows"]


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


class WindowCounts(NamedTuple):
    hit_blocks: int
    hit_tokens: int
    evictions: int
    swa_evictions: int
    swa_left: int
    used: list[tuple[int, int]]
    """After each request, the blocks of resident pages and of live ones."""


class Place(NamedTuple):
    """A path, whether it is resident or not."""

    number: int
    depth: int
    before: int
    """The number of the path without its last block."""


@dataclass
class Windows:
    """The tree and the one request of spec/replay.md, in blocks; windows of `window` tokens."""

    block: int
    capacity: int
    swa_capacity: int
    window: int
    places: dict[tuple[int, int], Place] = field(default_factory=dict)
    """(number of a path, id of the block after it) -> the path with it."""
    last: dict[Place, int] = field(default_factory=dict)
    """When each resident page was walked."""
    live: set[Place] = field(default_factory=set)
    """The resident pages with a pair."""
    tick: int = 0
    locked: list[Place] = field(default_factory=list)
    """The path of the lock: nothing else of the request's is in the tree."""
    own: dict[int, bool] = field(default_factory=dict)
    """Position of each page in the request's hand -> whether it has a pair."""
    evictions: int = 0
    swa_evictions: int = 0
    swa_left: int = 0

    @property
    def full_free(self) -> int:
        return self.capacity - len(self.last) - len(self.own)

    @property
    def swa_free(self) -> int:
        return self.swa_capacity - len(self.live) - sum(self.own.values())

    @property
    def pages(self) -> int:
        """Of a window."""
        return -(-self.window // self.block)

    def path(self, ids: Sequence[int]) -> list[Place]:
        """The paths of one block, of two, and so on."""
        path, before = list[Place](), 0
        for depth, id_ in enumerate(ids):
            place = Place(len(self.places) + 1, depth, before)
            path.append(self.places.setdefault((before, id_), place))
            before = path[-1].number
        return path

    def renew(self, path: Sequence[Place]) -> None:
        self.tick += 1
        self.last.update(dict.fromkeys(path, self.tick))

    def serve(self, wanted: Sequence[int], matchable: int) -> int:
        """The way of a request, and how many blocks it found."""
        path = self.path(wanted)
        self.locked = self.found(path[:matchable])
        hit = at = len(self.locked)
        self.renew(self.locked)
        while at < len(path):
            rest = len(path) - at
            self.evict(rest - self.full_free, rest - self.swa_free)
            if self.swa_free < rest:
                self.leave(at)
            if not self.swa_free:
                self.locked = self.insert(path[:at])
                continue
            end = min(len(path), at + self.swa_free)
            self.own |= dict.fromkeys(range(at, end), True)
            at = end
        self.insert(path)
        self.locked, self.own = [], {}
        return hit

    def found(self, path: list[Place]) -> list[Place]:
        """What is resident and ends in a live window, or has no tombstone."""
        resident = list(takewhile(self.last.__contains__, path))
        while not self.live.issuperset(resident[-self.pages :]):
            resident.pop()
        return resident

    def leave(self, at: int) -> None:
        """What the window of the next token does not reach, but for a window of whole pages."""
        reached = (at * self.block - self.window + 1) // self.block
        frontier = min(reached, at - self.pages)
        for position, paired in self.own.items():
            if paired and position < frontier:
                self.own[position] = False
                self.swa_left += 1

    def insert(self, path: list[Place]) -> list[Place]:
        """The pages up to the last one that is live afterwards become the tree's; their path."""
        after = [place in self.live or self.own.get(n, False) for n, place in enumerate(path)]
        reach = max((n + 1 for n, alive in enumerate(after) if alive), default=0)
        self.renew(path[:reach])
        self.live.update(place for n, place in enumerate(path[:reach]) if after[n])
        self.own = {n: paired for n, paired in self.own.items() if n >= reach}
        return path[:reach]

    def evict(self, full: int, swa: int) -> None:
        """Leaves from both pools, then what was walked longest ago from the window pool."""
        gone = swa_gone = 0
        children = Counter(place.before for place in self.last)
        resident = {place.number: place for place in self.last}

        def take(place: Place) -> int:
            """A live leaf, and the tombstones above it that become leaves."""
            self.live.remove(place)
            above, count = self.drop(place, children), 1
            while above in resident and resident[above] not in self.live and not children[above]:
                above = self.drop(resident[above], children)
                count += 1
            return count

        while gone < full:
            free = self.live.difference(self.locked)
            leaves = (place for place in free if not children[place.number])
            gone += take(min(leaves, key=self.last.__getitem__))
            swa_gone += 1
        free = self.live.difference(self.locked[-self.pages :])
        order = sorted(free, key=lambda place: (self.last[place], place.depth))
        for place in order[: max(swa - swa_gone, 0)]:
            swa_gone += 1
            if children[place.number]:
                self.live.remove(place)
            else:
                gone += take(place)
        self.evictions += gone
        self.swa_evictions += swa_gone

    def drop(self, place: Place, children: Counter[int]) -> int:
        """Out of the tree; what it followed."""
        del self.last[place]
        children[place.before] -= 1
        return place.before


def simulate_windows(
    requests: Iterable[tuple[Sequence[int], int]],
    *,
    block: int,
    capacity: int,
    swa_capacity: int,
    window: int,
    leave_last_token: bool = False,
) -> WindowCounts:
    """The counts for requests of (ids, input_length). O(evictions * resident pages)."""
    tree = Windows(block, capacity, swa_capacity, window)
    hit_blocks = hit_tokens = 0
    used: list[tuple[int, int]] = []
    for ids, input_length in requests:
        wanted = ids[:capacity]
        matchable = min(len(wanted), len(ids) - 1) if leave_last_token else len(wanted)
        hit = tree.serve(wanted, matchable)
        hit_blocks += hit
        hit_tokens += min(hit * block, input_length)
        used.append((len(tree.last), len(tree.live)))
    evictions = tree.evictions, tree.swa_evictions, tree.swa_left
    return WindowCounts(hit_blocks, hit_tokens, *evictions, used)
