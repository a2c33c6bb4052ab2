"""Host memory: getting and touching it, by kind, and the gates that need no clock.

Baselines are torch's own: `torch.empty`, and its power of two for pinned memory.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import kvspec

NBYTES = 128 << 20
ROUNDS = 7
KINDS = ["torch", "heap", "mmap", "shm", "pinned"]


def _touched(kind: str, **given: Any) -> None:
    arena = kvspec.HostArena(kind, NBYTES + 1, **given)
    arena.populate()
    assert arena.resident_bytes() == arena.mapped_bytes <= 1.01 * NBYTES
    arena.close()


@pytest.mark.parametrize("kind", KINDS)
def bench_get_touch_and_give_back(benchmark: Any, kind: str) -> None:
    """Every page once (HOST-27), and no more than was asked for (HOST-2)."""
    benchmark.pedantic(_touched, args=(kind,), rounds=ROUNDS)


def bench_torch_empty(benchmark: Any) -> None:
    """What torch takes for the same, with one thread and zeros."""
    benchmark.pedantic(lambda: torch.zeros(NBYTES + 1, dtype=torch.uint8), rounds=ROUNDS)


def bench_transparent_huge_pages(benchmark: Any) -> None:
    """A page of 2 MiB is touched once."""
    benchmark.pedantic(lambda: _touched("mmap", huge_pages="transparent"), rounds=ROUNDS)


@pytest.mark.parametrize("kind", KINDS)
def bench_small(benchmark: Any, kind: str) -> None:
    """One page, with the budget's share of it."""
    benchmark(lambda: kvspec.HostArena(kind, 4096).close())


def bench_tensor(benchmark: Any) -> None:
    """A tensor over memory that is there."""
    arena = kvspec.HostArena("mmap", 1 << 20)
    assert benchmark(lambda: arena.tensor(torch.float16, (64, 128), 4096).numel()) == 8192


def bench_resident_bytes(benchmark: Any) -> None:
    """8 bytes of pagemap for each of 32768 pages."""
    arena = kvspec.HostArena("mmap", NBYTES, populate=True)
    assert benchmark(arena.resident_bytes) == NBYTES


def _seconds(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def _populated(threads: int) -> float:
    arena = kvspec.HostArena("mmap", 4 * NBYTES)
    seconds = _seconds(lambda: arena.populate(threads=threads))
    counted = {"pages_populated": 4 * NBYTES // 4096, "populate_threads": threads}
    assert arena.counters() == counted
    arena.close()
    return seconds


def bench_parallel_against_serial(benchmark: Any) -> None:
    """Threads share the pages and do each once; with two CPUs it must not be slower."""
    cpus = len(os.sched_getaffinity(0))
    ratios = [_populated(1) / _populated(cpus) for _ in range(ROUNDS)]
    benchmark.extra_info["serial / parallel"] = statistics.median(ratios)
    benchmark.pedantic(lambda: _populated(cpus), rounds=1)
    assert cpus == 1 or statistics.median(ratios) > 0.9
