"""The memory saver: pause and resume in GB/s, and what a factory costs inside a region.

Baselines are the kernel's own way, munmap and mmap, and torch's copy.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kvspec

NBYTES = 1 << 30
PARTS = 64
ROUNDS = 7


def size(benchmark: Any, nbytes: int) -> int:
    """Of what is measured; where nothing is, for the test that it runs, a sixteenth."""
    return nbytes if benchmark.enabled else nbytes // 16


def saver() -> Any:
    """Of a class of its own."""
    return type("Fresh", (kvspec.TorchMemorySaverAdapter,), {}).create(True)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def tables(owner: Any, keep: bool, nbytes: int) -> list[Tensor]:
    """As many as a model has layers, all of them touched."""
    with owner.region("kv_cache", enable_cpu_backup=keep):
        made = [torch.empty(nbytes // PARTS, dtype=torch.uint8) for _ in range(PARTS)]
    for table in made:
        table.fill_(1)
    return made


def copied(table: Tensor) -> Tensor:
    """To memory that the kernel has to give."""
    return kvspec.HostArena("mmap", table.nbytes).tensor().copy_(table)


def pause_and_resume(owner: Any) -> None:
    owner.pause("kv_cache")
    owner.resume("kv_cache")


def bench_pause_and_resume(benchmark: Any) -> None:
    """1 GiB in 64 tensors, against giving the same back by munmap and taking it by mmap (SAVER-20).

    Every byte is given back once, and nothing is touched: the next writes bring the pages.
    """
    owner, nbytes = saver(), size(benchmark, NBYTES)
    made, ratios, times = tables(owner, False, nbytes), [], []
    for _ in range(ROUNDS):
        arenas = [kvspec.HostArena("mmap", nbytes // PARTS, populate=True) for _ in range(PARTS)]

        def again(arenas: list[Any] = arenas) -> None:
            for number in range(PARTS):
                arenas[number].close()
                arenas[number] = kvspec.HostArena("mmap", nbytes // PARTS)

        theirs = seconds(again)
        for table in made:
            table.fill_(1)
        before = owner.counters()["given_back"]
        ours = seconds(lambda: pause_and_resume(owner))
        assert owner.counters()["given_back"] - before == nbytes
        assert owner.counters()["put_back"] == 0
        assert not any(bool(table[0]) for table in made)
        times.append(ours)
        ratios.append(ours / theirs)
    benchmark.extra_info["GB/s"] = round(nbytes / statistics.median(times) / 1e9, 1)
    benchmark.extra_info["ours / munmap and mmap"] = round(statistics.median(ratios), 2)
    benchmark.pedantic(lambda: pause_and_resume(owner), rounds=1)
    assert not benchmark.enabled or statistics.median(ratios) < 1.5


def bench_pause_and_resume_with_a_backup(benchmark: Any) -> None:
    """256 MiB, copied out and back once (SAVER-20), against two copies to memory that is new.

    Most of both is the kernel, which gives the pages.
    """
    owner, nbytes = saver(), size(benchmark, NBYTES // 4)
    made, ratios, times = tables(owner, True, nbytes), [], []
    for _ in range(ROUNDS):
        theirs = seconds(lambda: [copied(copied(table)) for table in made])
        before = owner.counters()
        ours = seconds(lambda: pause_and_resume(owner))
        after = owner.counters()
        assert all(after[name] - before[name] == nbytes for name in ("kept", "put_back"))
        times.append(ours)
        ratios.append(ours / theirs)
    assert all(bool((table == 1).all()) for table in made)
    benchmark.extra_info["GB/s"] = round(nbytes / statistics.median(times) / 1e9, 2)
    benchmark.extra_info["ours / two copies"] = round(statistics.median(ratios), 2)
    benchmark.pedantic(lambda: pause_and_resume(owner), rounds=1)
    assert not benchmark.enabled or statistics.median(ratios) < 2


@pytest.mark.parametrize("nbytes", [4_096, 64 << 20])
def bench_zeros(benchmark: Any, nbytes: int) -> None:
    """A factory inside a region against outside, touched: large ones cost the same.

    A small one pays for a mapping, a reservation in the budget and a detour through Python.
    """
    owner, ratios, times = saver(), [], []

    def touched() -> None:
        torch.zeros(nbytes, dtype=torch.uint8).fill_(1)

    for _ in range(ROUNDS):
        outside = seconds(touched)
        with owner.region("kv_cache"):
            inside = seconds(touched)
        times.append(inside)
        ratios.append(inside / outside)
    assert owner.counters()["captured"] == ROUNDS * nbytes
    assert owner.view()["kv_cache"].allocations == 0
    benchmark.extra_info["us inside"] = round(statistics.median(times) * 1e6, 1)
    benchmark.extra_info["inside / outside"] = round(statistics.median(ratios), 2)
    with owner.region("kv_cache"):
        benchmark.pedantic(touched, rounds=1)
    assert nbytes == 4_096 or not benchmark.enabled or statistics.median(ratios) < 2
