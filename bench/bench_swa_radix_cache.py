"""Sliding-window radix cache: match, insert, lock and both kinds of eviction. Clause SWARADIX-20.

Counters are gated always; times only with `make bench`, as ratios. A family is a trunk of one page
with two leaves of one page, so that evicting pairs makes tombstones and uncovers them. SGLang 0.5.2
does equal work beside it, at page size 1, where a node of either tree is PAGE tokens.
"""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import kvspec
from bench_against_peers import compare, seconds
from peers import sglang

PAGE = 64
SIZES = [1_000, 10_000, 100_000]
"""Nodes."""
ROUNDS = 9
NODES = 3
"""In a family."""


class Sink:
    """An allocator that has every pair and takes everything, so that the tree alone is measured."""

    device = "cpu"
    size_swa = 0

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size

    def free(self, slots: torch.Tensor, swa_slots: Any = ()) -> None:
        """Take slots, and window slots."""

    def free_swa(self, slots: torch.Tensor) -> None:
        """Take window slots."""

    def translate_loc_from_full_to_swa(self, slots: torch.Tensor) -> torch.Tensor:
        """Every page has a pair."""
        return torch.ones(len(slots), dtype=torch.int32)


def forest(nodes: int) -> Any:
    """Families of a trunk and two leaves, the first leaves the oldest; nothing is freed."""
    tree = kvspec.SWARadixCache(None, None, sliding_window_size=PAGE, page_size=PAGE)
    for family in range(nodes // NODES):
        for leaf in (0, 1):
            tree.insert(*member(family, leaf))
    for family in range(nodes // NODES):
        tree.match_prefix(member(family, 1)[0])
    return tree


def member(family: int, leaf: int) -> tuple[Any, Any]:
    """The key of a leaf, two pages of it, and slots."""
    tokens = np.zeros(2 * PAGE, dtype=np.int32)
    tokens[0], tokens[PAGE] = family, leaf
    trunk, own = NODES * family + 1, NODES * family + 2 + leaf
    offsets = np.arange(PAGE, dtype=np.int64)
    return tokens, np.concatenate((offsets + trunk * PAGE, offsets + own * PAGE))


def evict_pairs(tree: Any, pages: int) -> None:
    """Evict the window slots of so many pages."""
    assert tree.evict(0, pages * PAGE).swa_num_tokens == pages * PAGE


def evict_leaves(tree: Any, pages: int) -> None:
    """Evict so many pages from both pools."""
    assert tree.evict(pages * PAGE).full_num_tokens == pages * PAGE


KINDS = pytest.mark.parametrize("evict", [evict_leaves, evict_pairs])


@pytest.mark.clause("SWARADIX-20")
@KINDS
def bench_heap_moves_grow_with_the_logarithm(evict: Callable[[Any, int], None]) -> None:
    """Entries moved per evicted page at N, 4N, 16N: each step may add what two levels cost in both
    heaps. A page at a time, so that no call can share the cost of another.
    """
    moves = []
    for nodes in (999, 3_999, 15_999):
        tree = forest(nodes)
        before = tree.counters()["heap_moves"]
        for _ in range(nodes // 2):
            evict(tree, 1)
        moves.append((tree.counters()["heap_moves"] - before) / (nodes // 2))
    assert moves[0] > 0
    assert moves[1] - moves[0] < 8
    assert moves[2] - moves[1] < 8


@pytest.mark.clause("SWARADIX-20")
def bench_what_was_renewed_is_passed_over_once() -> None:
    """After every path was matched, evictions of one page move what one eviction of all moves."""
    counts = []
    for step in (1, 999):
        tree = forest(2_997)
        for family in range(999):
            tree.match_prefix(member(family, 0)[0])
        before = tree.counters()["heap_moves"]
        for _ in range(999 // step):
            evict_pairs(tree, step)
        counts.append(tree.counters()["heap_moves"] - before)
    assert 0 < counts[1] <= counts[0] <= 1.5 * counts[1]


@pytest.mark.clause("SWARADIX-20")
@pytest.mark.parametrize("tokens", [2_048, 32_768])
def bench_tokens_compared_are_those_of_the_path(tokens: int) -> None:
    """Also where a match falls back, and where an insert revives."""
    tree = forest(999)
    key = np.arange(tokens, dtype=np.int32) + 1_000_000
    slots = np.arange(tokens, dtype=np.int64) + 100_000 * PAGE
    tree.insert(key, slots)
    tree.match_prefix(key)
    assert tree.evict(0, 10**9).swa_num_tokens
    tree.insert(key, slots)
    for call in (lambda: tree.match_prefix(key), lambda: tree.insert(key, slots)):
        before = tree.counters()["tokens_compared"]
        call()
        assert tree.counters()["tokens_compared"] - before == tokens


def match(tree: Any, count: int) -> None:
    """Match the second leaves of so many families."""
    for family in range(count):
        tree.match_prefix(member(family, 1)[0])


def insert(tree: Any, count: int) -> None:
    """Insert what is there."""
    for family in range(count):
        tree.insert(*member(family, 1))


def lock(tree: Any, count: int) -> None:
    """Lock and unlock."""
    for family in range(count):
        node = tree.match_prefix(member(family, 1)[0]).last_device_node
        for _ in range(9):
            tree.dec_lock_ref(tree.inc_lock_ref(node))


@pytest.mark.parametrize("work", [match, insert, lock, evict_leaves, evict_pairs])
def bench_work_does_not_grow_with_the_tree(
    benchmark: Any, work: Callable[[Any, int], None]
) -> None:
    """At 100k nodes it costs at most three times what it costs at 1k: median of ratios."""
    if benchmark.disabled:
        benchmark(work, forest(999), 9)
        return
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    trees = {size: forest(size) for size in SIZES}
    for _ in range(ROUNDS):
        for size in SIZES:
            if trees[size].swa_evictable_size() < size * PAGE // 2:
                trees[size] = forest(size)
            times[size].append(seconds(lambda tree=trees[size]: work(tree, 300), 1) / 300)
    for size in SIZES:
        benchmark.extra_info[f"us_{size}"] = round(statistics.median(times[size]) * 1e6, 3)
    ratios = [large / small for large, small in zip(times[SIZES[-1]], times[SIZES[0]], strict=True)]
    benchmark.extra_info["ratio"] = round(statistics.median(ratios), 2)
    print(benchmark.name, benchmark.extra_info)
    benchmark.pedantic(lambda: None)
    assert statistics.median(ratios) <= 3


def _side_by_side(window: int) -> tuple[Any, Any]:
    """The peer's tree and the core's, each over a sink."""
    peer = sglang()
    theirs = type("PeerSink", (Sink, peer.SWATokenToKVPoolAllocator), {})(1)
    return (
        peer.SWARadixCache(None, theirs, window, 1),
        kvspec.SWARadixCache(None, Sink(1), window, 1),
    )


def _assert_equal_sizes(theirs: Any, ours: Any) -> None:
    names = ("full_evictable_size", "full_protected_size")
    for name in (*names, *(name.replace("full", "swa") for name in names)):
        assert getattr(theirs, name)() == getattr(ours, name)(), name


def _insert(trees: tuple[Any, Any], key: list[int], first_slot: int) -> None:
    slots = torch.arange(len(key), dtype=torch.int64) + first_slot
    for tree in trees:
        tree.insert(key, slots)


@pytest.mark.parametrize("tokens", [2_048, 32_768])
def bench_peer_match(benchmark: Any, tokens: int) -> None:
    """A full hit of a list."""
    trees = theirs, ours = _side_by_side(window=1_024)
    key = list(range(tokens))
    _insert(trees, key, 1)
    expected = theirs.match_prefix(key).device_indices
    assert torch.equal(ours.match_prefix(key).device_indices, expected)
    _assert_equal_sizes(theirs, ours)
    compare(benchmark, lambda: theirs.match_prefix(key), lambda: ours.match_prefix(key), 20)


def bench_peer_insert(benchmark: Any) -> None:
    """2,048 tokens that are there, and 64 that are new."""
    trees = theirs, ours = _side_by_side(window=1_024)
    prefix = list(range(2_048))
    _insert(trees, prefix, 1)
    slots = torch.arange(2_112, dtype=torch.int64) + 1
    branch = {id(tree): 0 for tree in trees}

    def insert_next(tree: Any) -> None:
        branch[id(tree)] += 1
        number = branch[id(tree)]
        slots[2_048:] = torch.arange(64) + 2_049 + 64 * number
        tree.insert([*prefix, 10_000 + number, *range(63)], slots.clone())

    for _ in range(3):
        insert_next(theirs)
        insert_next(ours)
    _assert_equal_sizes(theirs, ours)
    compare(benchmark, lambda: insert_next(theirs), lambda: insert_next(ours), 20)


def bench_peer_lock(benchmark: Any) -> None:
    """A path of 64 nodes, of which a window covers the last 16."""
    trees = theirs, ours = _side_by_side(window=16 * PAGE)
    key = list(range(64 * PAGE))
    for stop in range(PAGE, len(key) + 1, PAGE):
        _insert(trees, key[:stop], 1)
    his = theirs.match_prefix(key).last_device_node
    mine = ours.match_prefix(key).last_device_node
    uuid, receipt = theirs.inc_lock_ref(his), ours.inc_lock_ref(mine)
    _assert_equal_sizes(theirs, ours)
    theirs.dec_lock_ref(his, uuid)
    ours.dec_lock_ref(receipt)
    _assert_equal_sizes(theirs, ours)
    compare(
        benchmark,
        lambda: theirs.dec_lock_ref(his, theirs.inc_lock_ref(his)),
        lambda: ours.dec_lock_ref(ours.inc_lock_ref(mine)),
        50,
    )


@pytest.mark.parametrize("amounts", [(100 * PAGE, 0), (0, 100 * PAGE)], ids=["leaves", "pairs"])
def bench_peer_evict(benchmark: Any, amounts: tuple[int, int]) -> None:
    """100 nodes of 64 tokens in one call, from 6,000 families."""
    trees = theirs, ours = _side_by_side(window=PAGE)
    families = 300 if benchmark.disabled else 6_000
    for family in range(families):
        trunk = [family, *range(PAGE - 1)]
        for leaf in (0, 1):
            key = [*trunk, -1 - leaf, *range(PAGE - 1)]
            slots = torch.arange(2 * PAGE, dtype=torch.int64) + (NODES * family + 1) * PAGE
            slots[PAGE:] += leaf * PAGE
            for tree in trees:
                tree.insert(key, slots.clone())
    for family in range(families):
        key = [family, *range(PAGE - 1), -2, *range(PAGE - 1)]
        assert {len(tree.match_prefix(key).device_indices) for tree in trees} == {2 * PAGE}
    for _ in range(3):
        for tree in trees:
            tree.evict(*amounts)
        _assert_equal_sizes(theirs, ours)
    compare(benchmark, lambda: theirs.evict(*amounts), lambda: ours.evict(*amounts), 5)
