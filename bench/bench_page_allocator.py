"""Pages: microseconds a call in a pool of a million slots, and the gates that need no clock."""

from typing import Any

import pytest
import torch

import kvspec

POOL, PAGE, COUNT, BATCH = 1_000_000, 16, 512, 64


def _pool(size: int = POOL) -> Any:
    return kvspec.PagedTokenToKVPoolAllocator(size, PAGE, torch.float16, "cpu", None, False)


@pytest.mark.parametrize("size", [POOL // 16, POOL])
def bench_alloc_free(benchmark: Any, size: int) -> None:
    """512 slots out and in again, at the same cost in every pool (PAGE-18)."""
    pool = _pool(size)

    def turn() -> None:
        pool.free(pool.alloc(COUNT))

    benchmark(turn)
    assert pool.available_size() == size // PAGE * PAGE


def bench_free(benchmark: Any) -> None:
    """512 slots, 32 pages, given back."""
    pool = _pool()
    slots = pool.alloc(COUNT)

    def again() -> None:
        pool.clear()
        pool.alloc(COUNT)

    benchmark.pedantic(pool.free, args=(slots,), setup=again, rounds=50)
    assert pool.available_size() == POOL // PAGE * PAGE


def _requests(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    none = torch.zeros(BATCH, dtype=torch.int64)
    return none, none + tokens, none - 1, BATCH * tokens


@pytest.mark.parametrize("tokens", [1, 8, 100])
def bench_alloc_extend(benchmark: Any, tokens: int) -> None:
    """64 new requests of so many tokens, undone again."""
    pool, requests = _pool(), _requests(tokens)

    def turn() -> None:
        ticket = pool.backup_state()
        pool.alloc_extend(*requests)
        pool.restore_state(ticket)

    benchmark(turn)
    assert pool.available_size() == POOL // PAGE * PAGE


def bench_alloc_decode(benchmark: Any) -> None:
    """One token for each of 64 requests, within their pages."""
    pool = _pool()
    last = pool.alloc_extend(*_requests(8)).view(BATCH, 8)[:, -1].contiguous()
    lengths = torch.full((BATCH,), 9)
    slots = benchmark(pool.alloc_decode, lengths, last)
    assert torch.equal(slots, last + 1)


def test_moves_do_not_grow_with_the_pool() -> None:
    """Exact counters at N, 2N and 4N (PAGE-18)."""
    moved = set()
    for size in (POOL, 2 * POOL, 4 * POOL):
        pool = _pool(size)
        pool.free(pool.alloc(COUNT))
        pool.alloc_extend(*_requests(20))
        pool.backup_state()
        moved.add(tuple(pool.counters().items()))
    pages = 2 * COUNT // PAGE + 2 * BATCH
    assert moved == {(("pages_moved", pages), ("merges", 0), ("pages_merged", 0))}
