"""Pinned host memory with a CUDA device: registered by torch's runtime, exactly."""

import gc
import time
from contextlib import suppress
from typing import Any

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance import clause

IMPLS = pytest.mark.parametrize("impl", [kvspec.oracle, kvspec], ids=["oracle", "native"])
MIB = 1 << 20


@clause("HOST-22")
@IMPLS
def test_it_is_pinned_for_torch_and_no_more_than_was_asked_for(impl: Any) -> None:
    nbytes = 20 * MIB + 1
    with impl.HostArena("pinned", nbytes) as arena:
        tensor = arena.tensor()
        assert tensor.is_pinned()
        assert tensor[-1:].is_pinned()
        assert nbytes <= arena.pinned_bytes <= 1.01 * nbytes
        assert arena.resident_bytes() == arena.pinned_bytes
        del tensor
    assert impl.HostArena.capabilities().pins_by == "cuda"
    assert not impl.HostArena("mmap", nbytes).tensor().is_pinned()


@clause("HOST-22")
@IMPLS
def test_copies_do_not_wait_and_are_right(impl: Any) -> None:
    arena = impl.HostArena("pinned", 256 * MIB)
    here = arena.tensor(torch.int32)
    here.copy_(torch.arange(here.numel(), dtype=torch.int32))
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.empty(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        there = here.to("cuda", non_blocking=True)
        done.record()
    waited = not done.query()
    stream.synchronize()
    assert torch.equal(there.cpu(), here)
    here.zero_()
    with torch.cuda.stream(stream):
        here.copy_(there, non_blocking=True)
    stream.synchronize()
    assert int(here[-1]) == here.numel() - 1
    assert waited, "the copy had ended when the call returned"


@clause("HOST-15", "HOST-17", "HOST-22")
@IMPLS
def test_pages_are_registered_until_the_memory_goes(impl: Any) -> None:
    """Registering again what still is registered would be an error."""
    runtime = torch.cuda.cudart()
    for dropped in (False, True):
        arena = impl.HostArena("pinned", 8 * MIB)
        address, tensor = arena.address, arena.tensor()
        assert int(runtime.cudaHostRegister(address, 8 * MIB, 0)) != 0
        assert tensor.is_pinned()
        if dropped:
            del arena
            gc.collect()
            assert tensor.is_pinned()
            tensor.fill_(1)
            del tensor
        else:
            del tensor
            arena.close()
        assert int(runtime.cudaHostUnregister(address)) != 0
        with suppress(RuntimeError):  # torch tells of the errors above once
            torch.zeros(1, device="cuda").cpu()
        torch.zeros(1, device="cuda").cpu()


@clause("HOST-2", "HOST-22")
@pytest.mark.parametrize("nbytes", [(1 << 30) + 1])
def test_a_gigabyte_is_pinned_exactly_and_said_how_fast(nbytes: int) -> None:
    begin = time.perf_counter()
    arena = kvspec.HostArena("pinned", nbytes)
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    theirs = time.perf_counter() - begin
    assert arena.pinned_bytes == nbytes - 1 + arena.page_bytes
    print(f"1 GiB pinned in {seconds:.3f} s, by torch's allocator, as 2 GiB, in {theirs:.3f} s")
    print(f"threads: {arena.counters()['populate_threads']}, nodes: {arena.numa_nodes()}")
    arena.close()


@clause("HOST-9", "HOST-11")
@IMPLS
def test_huge_pages_and_nodes(impl: Any) -> None:
    for node in impl.HostArena.capabilities().memory_nodes or ():
        arena = impl.HostArena("pinned", 64 * MIB, huge_pages="transparent", numa_node=node)
        assert arena.tensor().is_pinned()
        assert arena.numa_nodes() in (None, {node: 64 * MIB})
        arena.close()
