"""The radix cache with windows: oracle and core against the suite, against each other, and broken
on purpose."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvspec
from kvspec import oracle
from kvspec.conformance.prefix_cache import System, numbers
from kvspec.conformance.swa_radix_cache import SWARadixCacheConformance
from kvspec.errors import ContractError


class TestOracle(SWARadixCacheConformance):
    impl = oracle


class TestNative(SWARadixCacheConformance):
    impl = kvspec


KEYS = st.lists(st.sampled_from([1, 1, 1, 2]), min_size=2, max_size=9)
SPACES = st.sampled_from([None, None, "a"])
WHICH = st.integers(0, 40)
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("match"), KEYS, SPACES, st.booleans()),
        st.tuples(st.just("insert"), KEYS, SPACES, st.integers(0, 1023), st.integers(0, 1023)),
        st.tuples(st.just("insert"), KEYS, SPACES, st.just(1023), st.just(0)),
        st.tuples(st.just("lock"), WHICH),
        st.tuples(st.just("unlock"), WHICH),
        st.tuples(st.just("unlock_node"), WHICH),
        st.tuples(st.just("evict"), st.integers(-1, 4), st.integers(-1, 6)),
        st.tuples(st.just("evict"), st.just(0), st.integers(0, 4)),
        st.tuples(st.just("admit"), KEYS, SPACES),
        st.tuples(st.just("chunk"), WHICH, st.integers(0, 9), st.integers(0, 3)),
        st.tuples(st.just("slide"), WHICH, st.sampled_from([None, 1, 2, 3])),
        st.tuples(st.just("finish"), WHICH),
        st.tuples(st.just("retract"), WHICH),
        st.tuples(st.just("reset"), st.integers(0, 9)),
    ),
    min_size=20,
    max_size=70,
)


class Side:
    """One of the two caches over its own pools, with the handles and receipts that it gave."""

    def __init__(self, impl: Any, page_size: int, window: int) -> None:
        self.system = System.make(
            impl,
            kind="swaradix",
            page_size=page_size,
            page_count=40 // page_size,
            swa_page_count=28 // page_size,
            handed_out=False,
            spy=True,
            sliding_window_size=window,
        )
        self.nodes: list[Any] = []
        self.receipts: list[Any] = []

    def apply(self, name: str, *given_: Any) -> object:
        """What a call gave: its result, or the clause and text of its refusal."""
        try:
            return getattr(self, name)(*given_)
        except ContractError as error:
            return str(error)

    def match(self, key: list[int], space: Any, touch: bool) -> object:
        found = self.system.cache.match_prefix(key, extra_key=space, touch=touch)
        self.nodes += [found.last_device_node] if touch else []
        return numbers(found.device_indices)

    def insert(self, key: list[int], space: Any, own: int, lost: int) -> object:
        """With the tree's pages where it has them, or new ones of which some have no pair."""
        system, size = self.system, self.system.page_size
        slots = system.allocator.alloc(-(-len(key) // size) * size)
        if slots is None:
            return None
        fresh, known = system.pages(numbers(slots)), system.pages(system.held_along(key, space))
        gone = [page for index, page in enumerate(fresh) if lost >> index & 1]
        system.allocator.free_swa(system.slots(*gone))
        pages = [
            known[index] if index < len(known) and not own >> index & 1 else page
            for index, page in enumerate(fresh)
        ]
        result = system.insert(key, *pages, extra_key=space)
        self.nodes.append(result.last_device_node)
        held = {page.page for page in system.cache.view().pages.values()}
        system.allocator.free(system.slots(*(page for page in fresh if page not in held)))
        return result._replace(last_device_node=None)

    def lock(self, which: int) -> object:
        if not self.nodes:
            return None
        receipt = self.system.cache.inc_lock_ref(self.nodes[which % len(self.nodes)])
        self.receipts.append(receipt)
        return receipt.delta, receipt.swa_uuid is None

    def unlock(self, which: int) -> object:
        if not self.receipts:
            return None
        return self.system.cache.dec_lock_ref(self.receipts[which % len(self.receipts)])

    def unlock_node(self, which: int) -> object:
        """One that no request has locked: the oldest receipt of a node may be a request's."""
        free = [
            node
            for node in self.nodes
            if not any(r.lock_receipt and r.lock_receipt.node == node for r in self.system.requests)
        ]
        return self.system.cache.dec_lock_ref(free[which % len(free)]) if free else None

    def evict(self, full: int, swa: int) -> object:
        return self.system.cache.evict(full, swa)

    def admit(self, key: list[int], space: Any) -> object:
        if self.system.pool.available_size():
            self.system.admit([*key, 1], space)
        return None

    def chunk(self, which: int, stop: int, ahead: int) -> object:
        """Compute and cache, and give up the window of what was computed ahead before that."""
        for req in self._chosen(which):
            stop = max(min(stop, len(req.tokens)), req.cache_protected_len)
            if self.system.compute(req, stop + ahead):
                if ahead:
                    self.system.evict_swa(req)
                self.system.chunk(req, stop)
        return None

    def slide(self, which: int, chunk: int | None) -> object:
        window = {"attention_chunk_size": chunk} if chunk else {}
        return [self.system.evict_swa(req, **window) for req in self._chosen(which)]

    def finish(self, which: int) -> object:
        for req in self._chosen(which):
            if self.system.compute(req, len(req.tokens)):
                self.system.finish(req)
        return None

    def retract(self, which: int) -> object:
        for req in self._chosen(which):
            self.system.retract(req)
        return None

    def reset(self, rarely: int) -> object:
        return None if rarely else self.system.cache.reset()

    def _chosen(self, which: int) -> list[Any]:
        return self.system.requests[which % 4 : which % 4 + 1]

    def state(self) -> object:
        """All that can be seen, and all that was given back since the last time."""
        cache, allocator = self.system.cache, self.system.allocator
        cache.check()
        sizes = [
            *(cache.full_evictable_size(), cache.full_protected_size(), cache.total_size()),
            *(cache.swa_evictable_size(), cache.swa_protected_size()),
        ]
        given_back = []
        for calls in (allocator.frees, allocator.swa_frees, allocator.pair_frees):
            given_back.append([self.system.pages(slots) for slots in calls])
            calls.clear()
        requests = [(self.system.row(r), r.cache_protected_len) for r in self.system.requests]
        resolved = [cache.resolve(node) for node in self.nodes]
        views = cache.view(), cache.digest(), allocator.view()
        return views, sizes, given_back, requests, resolved


@given(
    calls=CALLS, page_size=st.sampled_from([1, 2, 4]), window=st.sampled_from([1, 2, 3, 4, 5, 9])
)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_lockstep(calls: list[tuple[Any, ...]], page_size: int, window: int) -> None:
    """The same result or refusal, and the same state, after every call."""
    sides = [Side(impl, page_size, window) for impl in (oracle, kvspec)]
    for name, *arguments in calls:
        results = [side.apply(name, *arguments) for side in sides]
        assert results[0] == results[1]
        assert sides[0].state() == sides[1].state()


def grown() -> Any:
    """An oracle's cache with a fork, a tombstone, and a lock whose window is of two pages."""
    system = System.make(oracle, kind="swaradix", page_size=1, sliding_window_size=2)
    system.allocator.free_swa([1])
    node = system.insert([1, 2, 3], 1, 2, 3).last_device_node
    system.insert([1, 2, 4], 1, 2, 4)
    system.cache.inc_lock_ref(node)
    return system.cache


def last(cache: Any) -> Any:
    """The page that a lock ends with."""
    return next(page for page in cache._tree.values() if page.number == 3)


def orphan(cache: Any) -> None:
    """Take away the first page of a path."""
    del cache._tree[next(iter(cache._tree))]


def unlock(cache: Any) -> None:
    """Forget a lock that a receipt still covers."""
    cache._locks.popitem()


def end(cache: Any) -> None:
    """Make a leaf a tombstone, and end its pair."""
    page = next(page for page in cache._tree.values() if page.number == 4)
    cache._tombstones.add(page)
    cache.token_to_kv_pool_allocator.free_swa([4])


def steal(cache: Any) -> None:
    """End the pair of a live page."""
    cache.token_to_kv_pool_allocator.free_swa([2])


def forget(cache: Any) -> None:
    """Call a live page a tombstone, though it has its pair."""
    cache._tombstones.add(last(cache).before)


def open_window(cache: Any) -> None:
    """Take a window lock away while its receipt is open."""
    del cache._window_locks[last(cache)]


def lock_too_much(cache: Any) -> None:
    """Put a window lock where no receipt has one."""
    cache._window_locks[last(cache).before.before] = 1


def shrink(cache: Any) -> None:
    """Count a window page less than there is."""
    cache.swa_evictable_size = lambda: 0


def shrink_full(cache: Any) -> None:
    """The same of the full pool."""
    cache.full_evictable_size = lambda: 0


@pytest.mark.parametrize(
    ("damage", "id_"),
    [
        (orphan, "RADIX-5"),
        (unlock, "RADIX-6"),
        (end, "SWARADIX-7"),
        (steal, "SWARADIX-8"),
        (forget, "SWARADIX-8"),
        (open_window, "SWARADIX-9"),
        (lock_too_much, "SWARADIX-9"),
        (shrink, "SWARADIX-10"),
        (shrink_full, "SWARADIX-10"),
    ],
)
def test_check_names_the_clause_that_is_broken(damage: Callable[[Any], None], id_: str) -> None:
    """The other half of SWARADIX-21: the core's is in tests/cpp."""
    cache = grown()
    cache.check()

    damage(cache)

    with pytest.raises(ContractError) as caught:
        cache.check()
    assert caught.value.clause == id_


@pytest.mark.parametrize("impl", [oracle, kvspec], ids=["oracle", "native"])
def test_digest_is_the_same_number_in_every_process(impl: Any) -> None:
    system = System.make(impl, kind="swaradix", page_size=2, sliding_window_size=3)
    system.allocator.free_swa([2])
    node = system.insert([1, 2, 3, 4, 5, 6, 7, 8], 1, 2, 3, 4).last_device_node
    system.insert([-5, 6], 5, extra_key=("a", 1, None))
    system.cache.inc_lock_ref(node)
    assert system.cache.digest() == 13893810940653284292
