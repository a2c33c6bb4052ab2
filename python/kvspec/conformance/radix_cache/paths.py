"""The abstract state of RADIX as a dict from paths to what is said of their pages, for fuzzing."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvspec.conformance.prefix_cache.system import CacheConformance, System, numbers
from kvspec.interfaces.prefix_cache import CacheView, PageView, Path
from kvspec.interfaces.radix_cache import RadixCache

__all__ = ["POLICIES", "Paths", "Tree", "TreeConformance"]

POLICIES = ("lru", "lfu", "fifo", "mru", "filo", "slru", "priority")


class TreeConformance(CacheConformance):
    """What the suites of the radix cache have."""

    def tree(self, **options: Any) -> System:
        """A cache of pages of one slot, all in the test's hand."""
        return self.stocked(**{"page_size": 1, "page_count": 32, **options})

    def alone(self, page_size: int, **options: str) -> Any:
        """A cache without pools."""
        arguments = {
            "req_to_token_pool": None,
            "token_to_kv_pool_allocator": None,
            "page_size": page_size,
            "disable": False,
            "enable_kv_cache_events": False,
            "eviction_policy": "lru",
            "eviction_granularity": "page",
            **options,
        }
        return self.subject("RadixCache", RadixCache, "radix_cache", "prefix_cache", **arguments)


@dataclass
class Entry:
    """One resident page; `last` and `born` are ticks."""

    page: int
    last: int
    born: int
    priority: int
    hits: int = 0
    cut: bool = False


class Paths:
    """What a client may know of a radix cache."""

    def __init__(self, page_size: int, policy: str, granularity: str) -> None:
        self.page_size, self.policy, self.granularity = page_size, policy, granularity
        self.entries: dict[Path, Entry] = {}
        self.receipts: list[Path] = []
        self.tick = 0

    def prefixes(self, path: Path) -> list[Path]:
        """The paths of the pages of a path, the shortest first."""
        stops = range(self.page_size, len(path[1]) + 1, self.page_size)
        return [(path[0], path[1][:stop]) for stop in stops]

    def resident(self, path: Path) -> list[Path]:
        """Those of them that are in the tree."""
        return [prefix for prefix in self.prefixes(path) if prefix in self.entries]

    def locks(self, path: Path) -> int:
        """How many open receipts cover a page (RADIX-6)."""
        length = len(path[1])
        return sum(key == path[0] and t[:length] == path[1] for key, t in self.receipts)

    def found(self, path: Path) -> list[Path]:
        """What a match of the path covers (RADIX-1)."""
        return self.resident(path)

    def match(self, path: Path) -> list[int]:
        """The pages found (RADIX-1, RADIX-2, RADIX-3)."""
        self.tick += 1
        found = self.found(path)
        for prefix in found:
            self.entries[prefix].last = self.tick
            self.entries[prefix].hits += 1
        self.cut(found)
        return [self.entries[prefix].page for prefix in found]

    def insert(self, path: Path, pages: list[int], priority: int) -> list[str]:
        """What becomes of each of the pages (RADIX-4, CACHE-8)."""
        self.tick += 1
        self.cut(self.resident(path))
        kinds = []
        for prefix, page in zip(self.prefixes(path), pages, strict=True):
            entry = self.entries.get(prefix)
            if entry is None:
                kinds.append("adopted")
                self.entries[prefix] = Entry(page, self.tick, self.tick, priority)
            else:
                kinds.append("shared" if entry.page == page else "duplicate")
                entry.last, entry.priority = self.tick, max(entry.priority, priority)
        self.cut(self.resident(path))
        return kinds

    def cut(self, walked: list[Path]) -> None:
        """An insert or a match ended or left after these pages."""
        if walked and self.granularity == "node":
            self.entries[walked[-1]].cut = True

    def evict(self, token_count: int) -> list[int]:
        """The pages evicted, in order (RADIX-8, RADIX-9, RADIX-11, RADIX-13)."""
        pages: list[int] = []
        while len(pages) * self.page_size < token_count and (leaves := self.free_leaves()):
            path = min(leaves, key=self.order)
            while True:
                pages.append(self.entries.pop(path).page)
                path = (path[0], path[1][: -self.page_size])
                if self.granularity == "page" or not path[1] or self.entries[path].cut:
                    break
        return pages

    def free_leaves(self) -> list[Path]:
        """Unlocked pages that no resident page extends."""
        parents = {(key, tokens[: -self.page_size]) for key, tokens in self.entries}
        return [path for path in self.entries if path not in parents and not self.locks(path)]

    def order(self, path: Path) -> tuple[int, ...]:
        """The smallest is evicted first (RADIX-13)."""
        entry = self.entries[path]
        keys: dict[str, tuple[int, ...]] = {
            "lru": (entry.last,),
            "mru": (-entry.last,),
            "fifo": (entry.born,),
            "filo": (-entry.born,),
            "lfu": (entry.hits, entry.last),
            "slru": (entry.hits >= 1, entry.last),
            "priority": (entry.priority, entry.last),
        }
        return (*keys[self.policy], entry.born)

    def view(self) -> CacheView:
        """As the cache ought to tell it."""
        last = sorted({entry.last for entry in self.entries.values()})
        born = sorted({entry.born for entry in self.entries.values()})
        pages = {
            path: PageView(
                page=entry.page,
                locks=self.locks(path),
                last=last.index(entry.last),
                born=born.index(entry.born),
                hits=entry.hits,
                priority=entry.priority,
                cut=entry.cut,
            )
            for path, entry in self.entries.items()
        }
        return CacheView(self.granularity, pages, tuple(self.receipts))


class Tree(RuleBasedStateMachine):
    """A cache without pools, beside the dict of paths."""

    suite: TreeConformance
    keys = st.lists(st.sampled_from([1, 2]), max_size=9).map(tuple)
    spaces = st.sampled_from([None, None, "a"])

    @classmethod
    def of(cls, suite: TreeConformance) -> "type[Tree]":
        """The machine for an implementation."""
        return type(cls.__name__, (cls,), {"suite": suite})

    @initialize(
        policy=st.sampled_from(POLICIES),
        granularity=st.sampled_from(["page", "node"]),
        page_size=st.sampled_from([1, 2]),
    )
    def start(self, policy: str, granularity: str, page_size: int) -> None:
        self.cache = self.suite.alone(
            page_size, eviction_policy=policy, eviction_granularity=granularity
        )
        kept = self.cache.eviction_policy, self.cache.eviction_granularity
        self.paths = Paths(page_size, *kept)
        self.next_page = 1
        self.nodes: list[tuple[Any, Path]] = []
        self.receipts: list[Any] = []

    def whole(self, key: tuple[int, ...], space: Any) -> Path:
        return space, key[: len(key) // self.paths.page_size * self.paths.page_size]

    @rule(key=keys, space=spaces)
    def match(self, key: tuple[int, ...], space: Any) -> None:
        path, size = self.whole(key, space), self.paths.page_size
        silent = self.cache.match_prefix(list(key), extra_key=space, touch=False)
        found = self.cache.match_prefix(list(key), extra_key=space)
        pages = self.paths.match(path)
        slots = [slot for page in pages for slot in range(page * size, (page + 1) * size)]
        assert numbers(silent.device_indices) == numbers(found.device_indices) == slots
        assert silent.last_device_node is None
        covered = (space, path[1][: len(slots)])
        assert self.cache.resolve(found.last_device_node) == covered
        self.nodes.append((found.last_device_node, covered))

    @rule(key=keys, space=spaces, priority=st.integers(-1, 2), own=st.booleans())
    def insert(self, key: tuple[int, ...], space: Any, priority: int, own: bool) -> None:
        """With slots of its own, or with the tree's where it has some."""
        path, size = self.whole(key, space), self.paths.page_size
        prefixes = self.paths.prefixes(path)
        fresh = list(range(self.next_page, self.next_page + len(prefixes)))
        self.next_page += len(fresh) + 1
        known = {p: e.page for p, e in self.paths.entries.items() if not own}
        pages = [known.get(prefix, page) for prefix, page in zip(prefixes, fresh, strict=True)]
        slots = [slot for page in pages for slot in range(page * size, (page + 1) * size)]
        tail = [1] * (len(key) - len(slots))
        resident = len(self.paths.resident(path)) * size

        result = self.cache.insert(list(key), slots + tail, extra_key=space, priority=priority)

        kinds = self.paths.insert(path, pages, priority)
        for kind in ("shared", "adopted", "duplicate"):
            positions = [i for start, stop in getattr(result, kind) for i in range(start, stop)]
            assert [kinds[i // size] for i in positions] == [kind] * len(positions)
            assert len(positions) == kinds.count(kind) * size
        assert result.prefix_len == resident
        assert result.tail == ([(len(slots), len(key))] if tail else [])
        self.nodes.append((result.last_device_node, path))

    @rule(which=st.integers(0, 30))
    def lock(self, which: int) -> None:
        live = [(node, path) for node, path in self.nodes if self.cache.resolve(node) is not None]
        if live:
            node, path = live[which % len(live)]
            free = sum(not self.paths.locks(p) for p in self.paths.prefixes(path))
            self.receipts.append(self.cache.inc_lock_ref(node))
            self.paths.receipts.append(path)
            assert self.receipts[-1].delta == -free * self.paths.page_size

    @rule(which=st.integers(0, 30))
    def unlock(self, which: int) -> None:
        if self.receipts:
            index = which % len(self.receipts)
            path = self.paths.receipts.pop(index)
            free = sum(not self.paths.locks(p) for p in self.paths.prefixes(path))
            freed = self.cache.dec_lock_ref(self.receipts.pop(index))
            assert freed == free * self.paths.page_size

    @rule(token_count=st.integers(0, 8))
    def evict(self, token_count: int) -> None:
        evicted = self.cache.evict(token_count)
        assert evicted == len(self.paths.evict(token_count)) * self.paths.page_size

    @invariant()
    def views_are_equal(self) -> None:
        expected = self.paths.view()
        assert self.cache.view() == expected
        locked = sum(page.locks > 0 for page in expected.pages.values()) * self.paths.page_size
        total = len(expected.pages) * self.paths.page_size
        assert self.cache.evictable_size() == total - locked
        assert self.cache.protected_size() == locked
        assert self.cache.total_size() == total
        self.cache.check()

    @invariant()
    def paths_are_closed(self) -> None:
        paths = self.cache.view().pages
        assert all(
            len(self.paths.resident(path)) * self.paths.page_size == len(path[1]) for path in paths
        )
        assert len({page.page for page in paths.values()}) == len(paths)
