"""Slots: microseconds a call in a pool of a million, and the gates that need no clock."""

from typing import Any

import pytest
import torch

import kvspec

POOL, COUNT = 1_000_000, 512


def _pool(size: int = POOL, need_sort: bool = False) -> Any:
    return kvspec.TokenToKVPoolAllocator(size, torch.float16, "cpu", None, need_sort)


@pytest.mark.parametrize("size", [POOL // 16, POOL])
def bench_alloc_free(benchmark: Any, size: int) -> None:
    """512 slots out and in again, at the same cost in every pool (SLOT-12)."""
    pool = _pool(size)

    def turn() -> None:
        pool.free(pool.alloc(COUNT))

    benchmark(turn)
    assert pool.available_size() == size


def bench_free(benchmark: Any) -> None:
    """512 slots given back."""
    pool = _pool()
    slots = pool.alloc(COUNT)

    def again() -> None:
        pool.clear()
        pool.alloc(COUNT)

    benchmark.pedantic(pool.free, args=(slots,), setup=again, rounds=50)
    assert pool.available_size() == POOL


def bench_merge(benchmark: Any) -> None:
    """Half a million slots, given back one by one in falling order, sorted (SLOT-6)."""
    pool = _pool(need_sort=True)
    slots = pool.alloc(POOL).flip(0)

    def again() -> None:
        pool.clear()
        pool.alloc(POOL)
        pool.free(slots)

    benchmark.pedantic(pool.alloc, args=(COUNT,), setup=again, rounds=5)
    assert pool.counters()["pages_merged"] == POOL * pool.counters()["merges"]


def test_moves_do_not_grow_with_the_pool() -> None:
    """Exact counters at N, 2N and 4N (SLOT-12)."""
    moved = set()
    for size in (POOL, 2 * POOL, 4 * POOL):
        pool = _pool(size)
        pool.free(pool.alloc(COUNT))
        pool.backup_state()
        moved.add(tuple(pool.counters().items()))
    assert moved == {(("pages_moved", 2 * COUNT), ("merges", 0), ("pages_merged", 0))}
