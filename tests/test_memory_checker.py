"""The memory checker, on both implementations' views."""

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance.memory_checker import MemoryCheckerConformance
from kvspec.errors import ContractError
from needs import native


class TestOracle(MemoryCheckerConformance):
    impl = kvspec.oracle


@native
class TestNative(MemoryCheckerConformance):
    impl = kvspec


def test_an_unknown_level_is_refused() -> None:
    bench = TestOracle().bench()
    with pytest.raises(
        ContractError, match="CHECK-8: level is 'all', not one of off, counts, sets"
    ):
        bench.check("all")


def test_rows_for_requests_to_come_are_counted() -> None:
    rows = kvspec.oracle.DecodeReqToTokenPool(
        size=2, max_context_len=4, device="cpu", enable_memory_saver=False, pre_alloc_size=3
    )
    allocator = kvspec.oracle.TokenToKVPoolAllocator(
        size=4, dtype=torch.float16, device="cpu", kvcache=None, need_sort=False
    )
    cache = kvspec.oracle.ChunkCache(rows, allocator, 1)
    for level in ("counts", "sets"):
        kvspec.check_memory(allocator, rows, cache, level=level)
    rows.alloc(1)
    for level in ("counts", "sets"):
        with pytest.raises(kvspec.MemoryLeakError):
            kvspec.check_memory(allocator, rows, cache, level=level)
