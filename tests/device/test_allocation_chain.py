"""Pinned memory where there is a CUDA device: who pins it, and where that shows."""

import os

import torch

from kvspec.allocation_chain import Request, claims, gather, observe, process_memory, record
from kvspec.conformance import clause

MIB = 1 << 20


@clause("CHAIN-24", "CHAIN-3")
def test_pinned_memory_is_registered_with_cuda() -> None:
    found = observe(record(Request("pinned", 8 * MIB, touch="page")))
    assert found.arena == "HostArena"
    calls = {c.function: c for c in found.library_calls or () if c.function.startswith("cuda")}
    assert set(calls) & {"cudaHostRegister", "cudaHostAlloc"}
    pins = calls.get("cudaHostRegister") or calls["cudaHostAlloc"]
    assert pins.result == 0
    assert pins.arguments[1] == found.mapped_bytes
    assert pins.phase == "allocate"
    assert found.states["allocated"].range_resident == 8 * MIB
    touch = found.phase("touch")
    assert touch is not None
    assert touch.minor_faults == 0


@clause("CHAIN-4", "CHAIN-24")
def test_the_driver_is_asked_by_ioctl_where_strace_sees_it() -> None:
    """There may be no strace on the machine: then nothing is said of it."""
    found = observe(record(Request("pinned", 8 * MIB)))
    if found.system_calls is None:
        assert found.sources["system_calls"].why_not
        return
    asked = [c for c in found.system_calls if c.phase == "allocate" and c.name == "ioctl"]
    assert any("/dev/nvidia" in call.arguments for call in asked)


@clause("CHAIN-12")
def test_devices_are_a_kind_of_their_own() -> None:
    torch.zeros(1, device="cuda")
    groups = {group.kind: group for group in process_memory(os.getpid()).groups}
    assert any(one.path.startswith("/dev/nvidia") for one in groups["device"].named)


@clause("CHAIN-22", "CHAIN-24")
def test_the_claims_are_judged_here_too() -> None:
    found = {claim.clause: claim for claim in claims(gather())}
    assert found["CHAIN-22"].observed.endswith("c10::alloc_cpu > posix_memalign")
    assert "cuda" in found["CHAIN-24"].observed
