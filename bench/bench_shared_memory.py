"""Shared memory: microseconds a handle beside Python's own, and the gates that need no clock."""

import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import pytest

import kvspec

LABEL = f"bench-{os.getpid()}"
MIB = 2**20
ROUNDS = 9


def _reserved(name: str) -> int:
    return os.stat(f"/dev/shm/{name}").st_blocks * 512


def _ours(nbytes: int) -> int:
    segment = kvspec.SharedSegment.create(LABEL, nbytes)
    reserved = _reserved(segment.name)
    segment.close()
    return reserved


def _pythons(nbytes: int) -> int:
    """The same work with the library's class: it reserves nothing, so that is done for it."""
    segment = SharedMemory(create=True, size=nbytes)
    os.posix_fallocate(vars(segment)["_fd"], 0, nbytes)
    reserved = _reserved(segment.name)
    segment.close()
    segment.unlink()
    return reserved


@pytest.mark.parametrize("nbytes", [4096, 16 * MIB])
def bench_create_close(benchmark: Any, nbytes: int) -> None:
    """A name, a lock, the memory, a mapping, and all of it given back."""
    assert benchmark(_ours, nbytes) == nbytes


@pytest.mark.parametrize("nbytes", [4096, 16 * MIB])
def bench_create_close_of_python(benchmark: Any, nbytes: int) -> None:
    """`multiprocessing.shared_memory`, which leaves the name to the next start."""
    assert benchmark(_pythons, nbytes) == nbytes


def bench_attach_close(benchmark: Any) -> None:
    """One more owner of 16 MiB, and one less."""
    segment = kvspec.SharedSegment.create(LABEL, 16 * MIB)
    benchmark(lambda: kvspec.SharedSegment.attach(segment.name).close())
    segment.check()
    segment.close()


def bench_reap_among_the_living(benchmark: Any) -> None:
    """A hundred segments that somebody holds: what a start pays for looking."""
    segments = [kvspec.SharedSegment.create(LABEL, 1) for _ in range(100)]
    assert benchmark(kvspec.SharedSegment.reap) == []
    for segment in segments:
        segment.check()
        segment.close()


def bench_tensor(benchmark: Any) -> None:
    """A tensor over the mapping costs the same at every size: nothing is copied."""
    segment = kvspec.SharedSegment.create(LABEL, 16 * MIB)
    assert benchmark(segment.tensor).data_ptr() == segment.address
    segment.close()


def _seconds(call: Callable[[int], int], nbytes: int, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        assert call(nbytes) == nbytes
    return time.perf_counter() - start


@pytest.mark.parametrize(("nbytes", "repeat", "limit"), [(4096, 200, 2.0), (16 * MIB, 3, 1.3)])
def bench_create_against_python(benchmark: Any, nbytes: int, repeat: int, limit: float) -> None:
    """With the lock and the sweep it costs about what the library's class costs.

    Equal work: as many bytes are reserved and given back. The median of interleaved ratios; in a
    run of the tests the work is compared, and nothing is timed.
    """
    assert _ours(nbytes) == _pythons(nbytes) == nbytes
    if not benchmark.disabled:
        ratios = [
            _seconds(_ours, nbytes, repeat) / _seconds(_pythons, nbytes, repeat)
            for _ in range(ROUNDS)
        ]
        benchmark.extra_info["of_python"] = round(statistics.median(ratios), 2)
        print(benchmark.name, benchmark.extra_info)
        assert statistics.median(ratios) < limit
    benchmark.pedantic(_ours, (nbytes,))


def bench_cost_of_handles(benchmark: Any) -> None:
    """A handle costs one descriptor and one mapping, and a closed one nothing."""

    def cost() -> tuple[int, int]:
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum(LABEL in line for line in maps)

    before = cost()
    segment = benchmark.pedantic(kvspec.SharedSegment.create, (LABEL, 16 * MIB))
    handles = [kvspec.SharedSegment.attach(segment.name) for _ in range(9)]
    assert cost() == (before[0] + 10, before[1] + 10)
    for handle in (segment, *handles):
        handle.close()
    assert cost() == before
