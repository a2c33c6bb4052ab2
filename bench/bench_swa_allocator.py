"""Slots and their pairs: microseconds a call in a pool of a million, what the second pool costs
beside the first, SGLang 0.5.2 side by side, and the gates that need no clock.
"""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kvspec
from bench_against_peers import MEMORY, ROUNDS, compare, seconds
from peers import sglang

POOL, COUNT, REPEAT = 1_000_000, 512, 20


def _pool(size: int = POOL, page_size: int = 1) -> Any:
    return kvspec.SWATokenToKVPoolAllocator(size=size, size_swa=size, page_size=page_size, **MEMORY)


def _plain(page_size: int) -> Any:
    if page_size == 1:
        return kvspec.TokenToKVPoolAllocator(size=POOL, **MEMORY)
    return kvspec.PagedTokenToKVPoolAllocator(size=POOL, page_size=page_size, **MEMORY)


@pytest.mark.parametrize("size", [POOL // 16, POOL])
def bench_alloc_free(benchmark: Any, size: int) -> None:
    """512 slots and pairs out and in again, at the same cost in every pool (SWA-23)."""
    pool = _pool(size)

    def turn() -> None:
        pool.free(pool.alloc(COUNT))

    benchmark(turn)
    assert pool.available_size() == size


@pytest.mark.parametrize("page_size", [1, 64])
def bench_free_swa(benchmark: Any, page_size: int) -> None:
    """The pairs of 512 slots given back."""
    pool = _pool(page_size=page_size)
    slots = pool.alloc(COUNT)

    def again() -> None:
        pool.clear()
        pool.alloc(COUNT)

    benchmark.pedantic(pool.free_swa, args=(slots,), setup=again, rounds=50)
    assert pool.full_available_size() + COUNT == pool.swa_available_size()


@pytest.mark.parametrize("page_size", [1, 64])
def bench_translate(benchmark: Any, page_size: int) -> None:
    """512 window slots read."""
    pool = _pool(page_size=page_size)
    slots = pool.alloc(COUNT)
    found = benchmark(pool.translate_loc_from_full_to_swa, slots)
    assert torch.equal(found, pool.full_to_swa_index_mapping[slots].int())


@pytest.mark.parametrize("page_size", [1, 64])
def bench_free_beside_one_pool(benchmark: Any, page_size: int) -> None:
    """512 slots with their pairs given back, for at most 2.5 times what they cost without."""
    plain, paired = _plain(page_size), _pool(page_size=page_size)

    def free_all(pool: Any) -> Callable[[], None]:
        batches = iter([pool.alloc(COUNT) for _ in range(REPEAT)])
        return lambda: pool.free(next(batches))

    if not benchmark.disabled:
        pairs = [[seconds(free_all(pool), REPEAT) for pool in (plain, paired)] for _ in range(51)]
        ratio = statistics.median(both / one for one, both in pairs)
        benchmark.extra_info["ratio"] = round(ratio, 2)
        print(benchmark.name, benchmark.extra_info)
        assert ratio < 2.5
    benchmark.pedantic(free_all(paired))


def _peer_pool() -> Any:
    """The peer's allocator, over a KV pool that has no tensors."""
    peer = sglang()
    kvcache = object.__new__(peer.SWAKVPool)
    kvcache.full_kv_pool = kvcache.swa_kv_pool = None
    return peer.SWATokenToKVPoolAllocator(
        size=POOL, size_swa=POOL, **(MEMORY | {"kvcache": kvcache})
    )


def _assert_equal(theirs: Any, ours: Any) -> None:
    """What is available, and the pairs. Both are read in full slots."""
    for name in ("full_available_size", "swa_available_size"):
        assert getattr(theirs, name)() == getattr(ours, name)()
    mapping = theirs.full_to_swa_index_mapping[: POOL + 1]
    assert torch.equal(mapping, ours.full_to_swa_index_mapping)


def _assert_equal_work(theirs: Any, ours: Any) -> None:
    """The same slots and pairs after each call, a second time round too."""
    for _ in range(2):
        slots = theirs.alloc(COUNT)
        assert torch.equal(slots, ours.alloc(COUNT))
        _assert_equal(theirs, ours)
        for name, part in (("free_swa", slots[::2]), ("free", slots)):
            for pool in (theirs, ours):
                getattr(pool, name)(part)
            _assert_equal(theirs, ours)


def bench_peer_alloc_free(benchmark: Any) -> None:
    theirs, ours = _peer_pool(), _pool()
    _assert_equal_work(theirs, ours)

    def turn(pool: Any) -> None:
        pool.free(pool.alloc(COUNT))

    compare(benchmark, lambda: turn(theirs), lambda: turn(ours), REPEAT)


def bench_peer_free_swa(benchmark: Any) -> None:
    theirs, ours = _peer_pool(), _pool()
    _assert_equal_work(theirs, ours)

    def batches(pool: Any) -> Iterator[torch.Tensor]:
        return iter([pool.alloc(COUNT) for _ in range(ROUNDS * REPEAT + 5)])

    his, mine = batches(theirs), batches(ours)
    compare(
        benchmark,
        lambda: theirs.free_swa(next(his)),
        lambda: ours.free_swa(next(mine)),
        REPEAT,
    )


def _counted(size: int) -> tuple[int, ...]:
    """Pages moved by each call, in a pool of this size."""
    pool = _pool(size)
    slots = pool.alloc(COUNT)
    calls: list[Callable[[], object]] = [
        lambda: pool.free_swa(slots[: COUNT // 2]),
        lambda: pool.move_swa(slots[: COUNT // 4], slots[COUNT // 2 : 3 * COUNT // 4]),
        lambda: pool.translate_loc_from_full_to_swa(slots),
        lambda: pool.backup_state(),
        lambda: pool.free(slots[COUNT // 2 :], slots[: COUNT // 4]),
    ]
    moved = [pool.counters()["pages_moved"]]
    for call in calls:
        call()
        moved.append(pool.counters()["pages_moved"])
    assert pool.counters()["merges"] == 0
    return tuple(moved)


def test_moves_do_not_grow_with_the_pool() -> None:
    """Exact counters at N, 2N and 4N: of either pool what enters or leaves a list (SWA-23)."""
    alloc, free_swa = 2 * COUNT, COUNT // 2
    free = COUNT // 2 + COUNT // 2  # half of the full slots, and the pairs that are left
    before = alloc + free_swa
    expected = (alloc, *[before] * 4, before + free)
    assert {_counted(size) for size in (POOL, 2 * POOL, 4 * POOL)} == {expected}
