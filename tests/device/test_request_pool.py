"""The request pool's table on a CUDA device."""

from typing import Any

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.errors import ContractError

IMPLS = pytest.mark.parametrize("impl", [kvspec.oracle, kvspec], ids=["oracle", "native"])


def _agrees(pool: Any) -> None:
    for row, slots in pool.view().rows.items():
        assert pool.req_to_token[row, : len(slots)].tolist() == list(slots)
    pool.check()


@clause("REQ-8", "REQ-13")
@IMPLS
def test_commit_brings_the_table_up_to_date(impl: Any) -> None:
    pool = impl.ReqToTokenPool(4, 16, "cuda", False)
    assert pool.req_to_token.is_cuda
    pool.alloc(3)
    pool.write((0, slice(0, 10)), torch.arange(1, 11))
    pool.write(([0, 2, 0], [10, 0, 3]), [50, 51, 52])
    assert pool.req_to_token.count_nonzero().item() == 0
    assert pool.commit() == 12
    _agrees(pool)
    pool.free(0)
    pool.alloc(2)
    pool.write((0, slice(0, 2)), [7, 8])
    assert pool.commit() == 2
    _agrees(pool)
    assert pool.commit() == 0


@clause("REQ-10")
@IMPLS
def test_check_finds_what_a_kernel_wrote(impl: Any) -> None:
    pool = impl.ReqToTokenPool(2, 8, "cuda", False)
    pool.alloc(1)
    pool.write((0, slice(0, 3)), [1, 2, 3])
    pool.check()
    pool.commit()
    pool.req_to_token[0, 2] = 9
    with pytest.raises(ContractError, match=r"^REQ-8: "):
        pool.check()


@clause("REQ-7")
@IMPLS
def test_arguments_are_host_tensors(impl: Any) -> None:
    pool = impl.ReqToTokenPool(2, 8, "cuda", False)
    pool.alloc(1)
    there = torch.tensor([1], device="cuda")
    for indices, values in (((0, there), [1]), ((0, slice(0, 1)), there), ((there, [0]), [1])):
        with pytest.raises(ContractError, match=r"^REQ-7: a tensor on cuda"):
            pool.write(indices, values)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@clause("REQ-13")
def test_commit_is_one_copy_and_one_scatter() -> None:
    pool = kvspec.ReqToTokenPool(64, 4096, "cuda", False)
    pool.alloc(64)
    for row in range(64):
        pool.write((row, slice(0, 100)), torch.arange(1, 101))
    pool.commit()
    for row in range(64):
        pool.write((row, [7, 100]), [8, 9])
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assert pool.commit() == 128
        torch.cuda.synchronize()
    work = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(work) == 2, work
    assert sum("Memcpy HtoD" in name for name in work) == 1
    _agrees(pool)


@clause("REQ-8")
def test_a_hundred_commits_without_waiting() -> None:
    """The packed copy of a commit stays as it is until the device has read it."""
    pool = kvspec.ReqToTokenPool(8, 4096, "cuda", False)
    pool.alloc(8)
    busy = torch.randn(4096, 4096, device="cuda")
    for turn in range(100):
        busy = busy @ busy / 64
        for row in range(8):
            pool.write((row, slice(0, 500)), torch.arange(1, 501) * (turn + 1) + row)
        assert pool.commit() == 4000
    _agrees(pool)
