"""The radix cache: oracle and core against the suite, against each other, and broken on purpose."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvspec
from kvspec import oracle
from kvspec.conformance.prefix_cache import System, numbers
from kvspec.conformance.radix_cache import RadixCacheConformance
from kvspec.conformance.radix_cache.paths import POLICIES
from kvspec.errors import ContractError
from kvspec.oracle.radix_cache import Page


class TestOracle(RadixCacheConformance):
    impl = oracle


class TestNative(RadixCacheConformance):
    impl = kvspec


KEYS = st.lists(st.sampled_from([1, 2]), max_size=7)
SPACES = st.sampled_from([None, "a"])
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("match"), KEYS, SPACES, st.booleans()),
        st.tuples(st.just("insert"), KEYS, SPACES, st.integers(-1, 1)),
        st.tuples(st.just("lock"), st.integers(0, 40)),
        st.tuples(st.just("unlock"), st.integers(0, 10)),
        st.tuples(st.just("unlock_node"), st.integers(0, 40)),
        st.tuples(st.just("evict"), st.integers(-1, 6)),
        st.tuples(st.just("reset")),
    ),
    min_size=20,
    max_size=60,
)


class Side:
    """One of the two caches, with the handles and receipts that it gave."""

    def __init__(self, impl: Any, page_size: int, options: dict[str, Any]) -> None:
        self.system = System.make(impl, page_size=page_size, page_count=12, spy=True, **options)
        self.nodes: list[Any] = []
        self.receipts: list[Any] = []

    def apply(self, name: str, *given_: Any) -> object:
        """What a call gave: its result, or the clause of its refusal."""
        try:
            return getattr(self, name)(*given_)
        except ContractError as error:
            return error.clause

    def match(self, key: list[int], space: Any, touch: bool) -> object:
        found = self.system.cache.match_prefix(key, extra_key=space, touch=touch)
        self.nodes += [found.last_device_node] if touch else []
        return numbers(found.device_indices)

    def insert(self, key: list[int], space: Any, priority: int) -> object:
        """With the tree's pages where it has them, and the lowest that it has not."""
        size = self.system.page_size
        held = {page.page for page in self.system.cache.view().pages.values()}
        known = self.system.pages(self.system.held_along(key, space))
        spare = [page for page in range(1, 13) if page not in held]
        pages = [*known, *spare][: -(-len(key) // size)]
        key = key[: len(pages) * size]
        result = self.system.insert(key, *pages, extra_key=space, priority=priority)
        self.nodes.append(result.last_device_node)
        return result._replace(last_device_node=None)

    def lock(self, which: int) -> object:
        self.receipts += [self.system.cache.inc_lock_ref(self.nodes[which % len(self.nodes)])]
        return self.receipts[-1].delta

    def unlock(self, which: int) -> object:
        return self.system.cache.dec_lock_ref(self.receipts[which % len(self.receipts)])

    def unlock_node(self, which: int) -> object:
        return self.system.cache.dec_lock_ref(self.nodes[which % len(self.nodes)])

    def evict(self, count: int) -> object:
        return self._and_take_back(lambda: self.system.cache.evict(count))

    def reset(self) -> object:
        return self._and_take_back(self.system.cache.reset)

    def _and_take_back(self, call: Callable[[], object]) -> object:
        """The pages given back, and in which order; then the test has them in its hand again."""
        result, size = call(), self.system.page_size
        given_back = self.system.allocator.frees
        frees = [list(dict.fromkeys(slot // size for slot in slots)) for slots in given_back]
        self.system.allocator.frees.clear()
        self.system.allocator.alloc(self.system.allocator.available_size())
        return result, frees

    def state(self) -> object:
        """All that can be seen."""
        cache = self.system.cache
        cache.check()
        sizes = cache.evictable_size(), cache.protected_size(), cache.total_size()
        resolved = [cache.resolve(node) for node in self.nodes]
        return cache.view(), cache.digest(), sizes, resolved


@pytest.mark.parametrize("granularity", ["page", "node"])
@given(calls=CALLS, policy=st.sampled_from(POLICIES), page_size=st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_lockstep(
    granularity: str, calls: list[tuple[Any, ...]], policy: str, page_size: int
) -> None:
    """The same result or refusal, and the same state, after every call."""
    options = {"eviction_policy": policy, "eviction_granularity": granularity}
    sides = [Side(impl, page_size, options) for impl in (oracle, kvspec)]
    for name, *arguments in calls:
        if name in ("lock", "unlock_node") and not sides[0].nodes:
            continue
        if name == "unlock" and not sides[0].receipts:
            continue
        results = [side.apply(name, *arguments) for side in sides]
        assert results[0] == results[1]
        assert sides[0].state() == sides[1].state()


def grown() -> Any:
    """An oracle's cache with a fork and a lock."""
    system = System.make(oracle, page_size=1)
    node = system.insert([1, 2, 3], 1, 2, 3).last_device_node
    system.insert([1, 4], 1, 4, extra_key=None)
    system.cache.inc_lock_ref(node)
    return system.cache


def orphan(cache: Any) -> None:
    """Take away the first page of a path."""
    del cache._tree[next(iter(cache._tree))]


def share(cache: Any) -> None:
    """Let two paths hold one page."""
    pages: list[Page] = list(cache._tree.values())
    pages[-1].number = pages[0].number


def unlock(cache: Any) -> None:
    """Forget a lock that a receipt still covers."""
    cache._locks.popitem()


def close(cache: Any) -> None:
    """Forget a receipt whose locks still stand."""
    cache._open.clear()


def shrink(cache: Any) -> None:
    """Count a page less than there is."""
    cache.evictable_size = lambda: 0


@pytest.mark.parametrize(
    ("damage", "id_"),
    [
        (orphan, "RADIX-5"),
        (share, "RADIX-5"),
        (unlock, "RADIX-6"),
        (close, "RADIX-6"),
        (shrink, "RADIX-7"),
    ],
)
def test_check_names_the_clause_that_is_broken(damage: Callable[[Any], None], id_: str) -> None:
    """The other half of RADIX-16: the core's is in tests/cpp."""
    cache = grown()
    cache.check()

    damage(cache)

    with pytest.raises(ContractError) as caught:
        cache.check()
    assert caught.value.clause == id_


@pytest.mark.parametrize("impl", [oracle, kvspec], ids=["oracle", "native"])
def test_digest_is_the_same_number_in_every_process(impl: Any) -> None:
    system = System.make(impl, page_size=2, eviction_granularity="node")
    system.insert([1, 2, 3, 4], 1, 2, priority=3)
    node = system.cache.match_prefix([1, 2]).last_device_node
    system.insert([-5, 6], 3, extra_key=("a", 1, None))
    system.cache.inc_lock_ref(node)
    assert system.cache.digest() == 7174679415171060379
