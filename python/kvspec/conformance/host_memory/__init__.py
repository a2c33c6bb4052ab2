"""What every arena of host memory must do. Spec: HOST."""

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvspec.conformance import clause
from kvspec.conformance.host_memory.kernel import PAGE_BYTES
from kvspec.conformance.host_memory.mapping import Mapping, Numa, Pinned, Returning
from kvspec.conformance.host_memory.pages import Pages, Tensors
from kvspec.conformance.suite import MUTANT, fuzzing

__all__ = ["HostMemoryConformance"]

DTYPES = (torch.uint8, torch.int16, torch.float32, torch.complex128)


class HostMemoryConformance(Mapping, Numa, Returning, Pinned, Tensors, Pages):
    """Tests of `HostArena`."""

    @clause("HOST-5", "HOST-13", "HOST-14", "HOST-16", "HOST-19", "HOST-20", "HOST-21")
    def test_an_arena_is_an_array_of_bytes(self) -> None:
        """Whatever is done to it, it is what a `bytearray` would be."""
        broken = self.impl_name == MUTANT
        for kind in ("mmap",) if broken else ("mmap", "shm", "heap"):
            machine = type("Bytes", (ArenaBytes,), {"suite": self, "kind": kind})
            run_state_machine_as_test(machine, settings=fuzzing(2 if broken else 4))


class ArenaBytes(RuleBasedStateMachine):
    """An arena, the bytes that it must have, and the tensors over it."""

    suite: HostMemoryConformance
    kind: str
    pages = 4
    nbytes = 4 * PAGE_BYTES - 10

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        self.arena = self.suite.make(self.kind, self.nbytes)
        self.bytes = bytearray(self.nbytes)
        self.touched: set[int] = set()
        self.tensors: list[tuple[Any, int]] = []
        if self.kind == "heap":
            self.arena.tensor().zero_()
        if self.kind != "mmap":
            self.touched = set(range(self.pages))

    @rule(
        dtype=st.sampled_from(DTYPES),
        offset=st.integers(-16, nbytes + 16),
        lengths=st.lists(st.integers(-1, 40), max_size=3),
    )
    def tensor(self, dtype: torch.dtype, offset: int, lengths: list[int]) -> None:
        elements = 1
        for length in lengths:
            elements *= length
        end = offset + elements * dtype.itemsize
        fits = min(lengths, default=0) >= 0 and offset >= 0 and end <= self.nbytes
        if not fits or offset % dtype.itemsize:
            self.suite.refused("HOST-14", lambda: self.arena.tensor(dtype, lengths, offset))
            return
        held = self.arena.tensor(dtype, lengths, offset)
        assert list(held.shape) == lengths
        if elements:
            self.tensors.append((held, offset))

    @rule(aligned=st.integers(0, nbytes // 16 - 1), elements=st.integers(0, 30))
    def whole(self, aligned: int, elements: int) -> None:
        """One that fits, most of the time."""
        self.tensor(torch.int16, 16 * aligned, [elements])

    @precondition(lambda self: self.tensors)
    @rule(which=st.integers(0), value=st.integers(0, 255))
    def write(self, which: int, value: int) -> None:
        held, offset = self.tensors[which % len(self.tensors)]
        count = held.numel() * held.element_size()
        held.view(-1).view(torch.uint8).fill_(value)
        self.bytes[offset : offset + count] = bytes([value]) * count
        self.touched.update(range(offset // PAGE_BYTES, (offset + count - 1) // PAGE_BYTES + 1))

    @precondition(lambda self: self.tensors)
    @rule(which=st.integers(0))
    def drop(self, which: int) -> None:
        del self.tensors[which % len(self.tensors)]

    @rule(first=st.integers(0, pages), count=st.integers(0, pages), skew=st.integers(0, 7))
    def discard(self, first: int, count: int, skew: int) -> None:
        offset = first * PAGE_BYTES + (skew == 1)
        nbytes = min(count * PAGE_BYTES, max(self.nbytes - offset, 0)) + (skew == 2)
        end = offset + nbytes
        whole = offset % PAGE_BYTES == 0 and (end % PAGE_BYTES == 0 or end == self.nbytes)
        if self.kind == "heap" or not whole or end > self.nbytes:
            self.suite.refused("HOST-20", lambda: self.arena.discard(offset, nbytes))
            return
        self.arena.discard(offset, nbytes)
        self.bytes[offset:end] = bytes(nbytes)
        self.touched -= set(range(first, -(-end // PAGE_BYTES)))

    @rule()
    def close(self) -> None:
        if self.tensors:
            self.suite.refused("HOST-16", self.arena.close, str(len(self.tensors)))
        else:
            self.arena.close()
            self.begin()

    @invariant()
    def bytes_and_pages_agree(self) -> None:
        assert self.arena.view() == (self.kind, self.nbytes, False, len(self.tensors))
        if self.kind == "heap":
            assert self.arena.resident_bytes() == self.nbytes
        elif self.kind == "mmap":  # of a segment, reading takes pages too
            assert self.arena.resident_bytes() == len(self.touched) * PAGE_BYTES
        assert bytes(self.arena.tensor().numpy()) == bytes(self.bytes)
        self.arena.check()

    def teardown(self) -> None:
        self.tensors.clear()
        self.arena.close()
