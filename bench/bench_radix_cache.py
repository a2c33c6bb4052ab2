"""Radix cache: match, insert and evict. Clauses RADIX-15, CACHE-11.

Counters are gated always; times only with `make bench`. One leaf is one page of 64 tokens.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvspec

PAGE = 64
SIZES = [1_000, 10_000, 100_000, 1_000_000]
ROUNDS = 7


def wide_tree(leaves: int) -> Any:
    """A tree of `leaves` one-page leaves under the root; nothing is freed on eviction."""
    tree = kvspec.RadixCache(None, None, page_size=PAGE)
    tokens = np.zeros(PAGE, dtype=np.int32)
    offsets = np.arange(PAGE, dtype=np.int64)
    for leaf in range(leaves):
        tokens[0] = leaf
        tree.insert(tokens, offsets + (leaf + 1) * PAGE)
    return tree


def seconds_per_leaf(tree: Any, leaves: int) -> float:
    begin = time.perf_counter()
    evicted = tree.evict(leaves * PAGE)
    elapsed = time.perf_counter() - begin
    assert evicted == leaves * PAGE
    return elapsed / leaves


@pytest.mark.clause("RADIX-15")
def bench_heap_moves_grow_with_the_logarithm() -> None:
    """Entries moved per evicted leaf at N, 4N, 16N: each step may add what two levels cost."""
    moves = []
    for leaves in (1_000, 4_000, 16_000):
        tree = wide_tree(leaves)
        before = tree.counters()["heap_moves"]
        tree.evict(leaves * PAGE // 2)
        moves.append((tree.counters()["heap_moves"] - before) / (leaves // 2))
    assert moves[0] > 0
    assert moves[1] - moves[0] < 4
    assert moves[2] - moves[1] < 4


@pytest.mark.clause("RADIX-15")
@pytest.mark.parametrize("tokens", [2_048, 8_192, 32_768])
def bench_tokens_compared_are_those_of_the_path(tokens: int) -> None:
    """A full hit compares each token once, whatever else is in the tree."""
    tree = wide_tree(1_000)
    key = np.arange(tokens, dtype=np.int32) + 1_000_000
    tree.insert(key, np.arange(tokens, dtype=np.int64) + 100_000 * PAGE)
    before = tree.counters()["tokens_compared"]
    assert len(tree.match_prefix(key).device_indices) == tokens
    assert tree.counters()["tokens_compared"] - before == tokens


@pytest.mark.parametrize("tokens", [2_048, 4_096, 32_768])
def bench_match_full_hit(benchmark: Any, tokens: int) -> None:
    tree = kvspec.RadixCache(None, None, page_size=16)
    key = np.arange(tokens, dtype=np.int32)
    tree.insert(key, np.arange(tokens, dtype=np.int64) + 16)
    result = benchmark(tree.match_prefix, key)
    assert len(result.device_indices) == tokens


def bench_insert_new(benchmark: Any) -> None:
    tokens = 32_768
    key = np.arange(tokens, dtype=np.int32)
    slots = np.arange(tokens, dtype=np.int64) + 16

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (kvspec.RadixCache(None, None, page_size=16),), {}

    def insert(tree: Any) -> Any:
        return tree.insert(key, slots)

    result = benchmark.pedantic(insert, setup=fresh, rounds=50)
    assert result.adopted == [(0, tokens)]


def interleaved(sizes: list[int], batch: Callable[[int], int]) -> dict[int, list[float]]:
    """Seconds per leaf at each size, ROUNDS times, one size after the other in each round."""
    trees = {size: wide_tree(size) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for size in sizes:
            if trees[size].evictable_size() < (size - batch(size)) * PAGE:
                trees[size] = wide_tree(size)
            times[size].append(seconds_per_leaf(trees[size], batch(size)))
    return times


def bench_evict_per_leaf(benchmark: Any) -> None:
    """At 1M leaves a leaf costs at most three times what it costs at 10k: median of ratios."""
    if benchmark.disabled:
        tree = wide_tree(1_000)
        benchmark(seconds_per_leaf, tree, 500)
        assert tree.evictable_size() == 500 * PAGE
        return
    times = interleaved(SIZES, lambda size: min(5_000, size // 2))
    for size in SIZES:
        name = f"us_per_leaf_{size}"
        benchmark.extra_info[name] = round(statistics.median(times[size]) * 1e6, 3)
    ratios = [large / small for large, small in zip(times[SIZES[3]], times[SIZES[1]], strict=True)]
    benchmark.extra_info["ratio_1M_to_10k"] = round(statistics.median(ratios), 2)
    print(benchmark.extra_info)
    benchmark.pedantic(lambda: None)
    assert statistics.median(ratios) <= 3
