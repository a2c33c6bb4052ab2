"""The memory saver where there is CUDA, with the package `torch_memory_saver` and without it."""

import gc
import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.errors import ContractError

NBYTES = 256 << 20
INSTALLED = find_spec("torch_memory_saver") is not None


def fresh(impl: Any = kvspec) -> Any:
    """A saver of a class of its own."""
    return type("Fresh", (impl.TorchMemorySaverAdapter,), {}).create(True)


def free_bytes() -> int:
    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0])


@pytest.fixture
def saver() -> Any:
    """A saver with the package; whether it works here is what the tests find out."""
    if not INSTALLED:
        pytest.skip("the package torch_memory_saver is not installed")
    return fresh()


@clause("SAVER-7")
@pytest.mark.parametrize("impl", [kvspec.oracle, kvspec], ids=["oracle", "native"])
def test_without_the_package_a_device_is_refused(
    impl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fresh(impl)
    monkeypatch.setattr(made, "_package", None, raising=False)
    with made.region("kv_cache"):
        here = torch.ones(4)
        with pytest.raises(ContractError, match=r"SAVER-7: zeros on cuda.* torch_memory_saver"):
            torch.zeros(4, device="cuda")
        with pytest.raises(ContractError, match="SAVER-7"):
            here.to("cuda")
        with pytest.raises(ContractError, match="SAVER-7: empty of pinned memory"):
            torch.empty(4, pin_memory=True)
    made.pause("kv_cache")
    made.resume("kv_cache")
    assert not here.any()
    assert made.view()["kv_cache"].allocations == 1


@clause("REQ-14")
def test_without_the_package_a_pool_on_a_device_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kvspec.TorchMemorySaverAdapter.create(True), "_package", None)
    with pytest.raises(ContractError, match="SAVER-7"):
        kvspec.ReqToTokenPool(4, 16, "cuda", True)


@clause("SAVER-21", "SAVER-8", "SAVER-9")
@pytest.mark.parametrize("keep", [False, True])
def test_the_devices_memory_is_given_back(saver: Any, keep: bool) -> None:
    tag = f"kv_cache {keep}"
    with saver.region(tag, enable_cpu_backup=keep):
        there = torch.full((NBYTES,), 7, dtype=torch.uint8, device="cuda")
        here = torch.full((1 << 20,), 7, dtype=torch.uint8)
    address, before = there.data_ptr(), free_bytes()
    saver.pause(tag)
    assert free_bytes() - before >= NBYTES
    assert not here.any()
    saver.resume(tag)
    assert there.data_ptr() == address
    assert before - free_bytes() < NBYTES // 8
    there.add_(0)
    if keep:
        assert (there == 7).all()
        assert (here == 7).all()
    there.fill_(3)
    assert there.sum().item() == 3 * NBYTES


@clause("SAVER-11")
def test_what_is_freed_while_paused_is_freed_once(saver: Any) -> None:
    with saver.region("freed"):
        there = torch.ones(NBYTES, dtype=torch.uint8, device="cuda")
        here = torch.ones(1 << 20, dtype=torch.uint8)
    saver.pause("freed")
    del here
    assert saver.view()["freed"].allocations == 0
    saver.resume("freed")
    assert there.numel() == NBYTES
    del there
    gc.collect()
    torch.cuda.empty_cache()


@clause("SAVER-21")
def test_a_table_of_rows_on_the_device(saver: Any) -> None:
    process = kvspec.TorchMemorySaverAdapter.create(True)
    pool = kvspec.ReqToTokenPool(512, 4_096, "cuda", True)
    pool.alloc(1)
    pool.write((0, slice(0, 3)), [1, 2, 3])
    pool.commit()
    pool.check()
    address = pool.req_to_token.data_ptr()
    process.pause("kv_cache")
    process.resume("kv_cache")
    assert pool.req_to_token.data_ptr() == address
    pool.clear()
    pool.alloc(1)
    pool.write((0, slice(0, 3)), [4, 5, 6])
    pool.commit()
    pool.check()
    assert saver.enabled


def test_the_environment_is_said() -> None:
    """What a report of this run has to name."""
    preload = os.environ.get("LD_PRELOAD", "")
    print(torch.__version__, torch.version.cuda, f"installed={INSTALLED}", f"preload={preload!r}")
