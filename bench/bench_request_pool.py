"""Rows of requests: microseconds a call, and the gates that need no clock."""

from typing import Any

import pytest
import torch

import kvspec

WIDTH = 16_384


def _pool(size: int = 512) -> Any:
    pool = kvspec.ReqToTokenPool(size, WIDTH if size <= 512 else 64, "cpu", False)
    pool.alloc(size - 1)
    return pool


@pytest.mark.parametrize("count", [1, 512, 12_000])
def bench_write_run(benchmark: Any, count: int) -> None:
    """A prefill: the slots of one request."""
    pool, slots = _pool(), torch.arange(1, count + 1)
    benchmark(pool.write, (0, slice(0, count)), slots)
    assert pool.row_length(0) == count


@pytest.mark.parametrize("batch", [1, 32, 256])
def bench_write_decode(benchmark: Any, batch: int) -> None:
    """A decode step: one slot for each request."""
    pool = _pool()
    rows, positions = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
    benchmark(pool.write, (rows, positions), rows + 1)


@pytest.mark.parametrize("size", [64, 4_096])
def bench_alloc_free(benchmark: Any, size: int) -> None:
    """The same at every size of the pool (REQ-13)."""
    pool = _pool(size)

    def turn() -> None:
        pool.free(pool.alloc(1))

    benchmark(turn)


def bench_row(benchmark: Any) -> None:
    """The slots of a long request."""
    pool = _pool()
    pool.write((0, slice(0, 12_000)), torch.arange(1, 12_001))
    assert len(benchmark(pool.row, 0)) == 12_000


def bench_commit(benchmark: Any) -> None:
    """A decode step of 256 requests, packed, copied and scattered: all but the device's latency."""
    pool = kvspec.ReqToTokenPool(512, 4_096, "meta", False)
    pool._table = torch.zeros((512, 4_096), dtype=torch.int32)  # a device that answers at once
    pool.alloc(256)
    rows, positions = torch.arange(256), torch.zeros(256, dtype=torch.int64)

    def step() -> int:
        pool.write((rows, positions), rows + 1)
        return int(pool.commit())

    assert benchmark(step) == 256


def bench_table_slice(benchmark: Any) -> None:
    """What torch takes to write 12,000 slots into a table of its own, without any books."""
    table, slots = torch.zeros((512, WIDTH), dtype=torch.int32), torch.arange(1, 12_001)
    benchmark(table.__setitem__, (0, slice(0, 12_000)), slots)
