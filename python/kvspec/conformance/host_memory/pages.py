"""Tensors over memory, and what is done to pages: HOST-13, HOST-14, HOST-19 to HOST-21, HOST-27."""

import os
from functools import partial
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.host_memory.kernel import PAGE_BYTES, private_bytes
from kvspec.conformance.host_memory.making import KINDS, MIB, HostMemorySuite

__all__ = ["Pages", "Tensors"]

P = PAGE_BYTES
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
BAD_TENSORS: dict[str, tuple[Any, ...]] = {
    "an offset that is not aligned": (torch.float32, (1,), 2),
    "an offset that is not aligned, and no length": (torch.int64, (0,), 4),
    "an offset below 0": (torch.uint8, (1,), -1),
    "an offset beyond the end": (torch.uint8, (0,), 101),
    "one byte too many": (torch.uint8, (101,), 0),
    "one element too many": (torch.int16, (3, 17), 0),
    "an end beyond the end": (torch.float64, (4,), 72),
    "a negative length": (torch.uint8, (-1,), 0),
    "two negative lengths": (torch.uint8, (-2, -5), 0),
    "lengths that wrap to few": (torch.int64, (2**32, 2**32), 0),
    "a length that wraps": (torch.int64, (2**61,), 8),
    "an offset that wraps": (torch.uint8, (2,), 2**64 - 1),
}
BAD_RANGES: dict[str, tuple[int, int | None]] = {
    "a part of a page at the end": (0, 100),
    "a part of a page at the beginning": (1, P - 1),
    "a page that is none": (100, P),
    "from within the last page": (4 * P + 1, None),
    "beyond the end": (4 * P, P),
    "all, and the rest of the last page": (0, 5 * P),
    "below the beginning": (-P, P),
    "a negative number of bytes": (P, -P),
    "what wraps": (P, 2**64 - P),
}


class Tensors(HostMemorySuite):
    """Tensors over an arena."""

    @clause("HOST-13")
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_tensor_is_the_memory(self, kind: str) -> None:
        arena = self.make(kind, 1000)
        all_of_it = arena.tensor()
        part = arena.tensor(torch.int32, (2, 3, 4), offset=40)
        assert (all_of_it.dtype, tuple(all_of_it.shape)) == (torch.uint8, (1000,))
        assert (part.dtype, tuple(part.shape)) == (torch.int32, (2, 3, 4))
        assert (all_of_it.data_ptr(), part.data_ptr()) == (arena.address, arena.address + 40)
        assert part.device.type == "cpu"
        assert part.is_contiguous()
        assert not part.requires_grad
        all_of_it.zero_()
        part[1, 2, 3] = 0x01020304
        assert all_of_it[40 + 92 : 40 + 96].tolist() == [4, 3, 2, 1]
        all_of_it[40] = 9
        assert int(part[0, 0, 0]) == 9
        assert arena.view().tensors == 2

    @clause("HOST-13")
    def test_every_dtype_of_torch(self) -> None:
        arena = self.make("mmap", 100)
        for dtype in DTYPES:
            held = arena.tensor(dtype, offset=16)
            assert (held.dtype, held.numel()) == (dtype, 84 // dtype.itemsize)
            assert held.data_ptr() == arena.address + 16
            assert arena.tensor(dtype, (2, 1)).shape == (2, 1)

    @clause("HOST-13")
    def test_shapes_at_the_edge(self) -> None:
        arena = self.make("mmap", 100)
        assert arena.tensor(torch.int16, ()).shape == ()
        assert arena.tensor(torch.int16, [50]).shape == (50,)
        assert arena.tensor(torch.int64, torch.Size([2, 2]), offset=64).shape == (2, 2)
        assert arena.tensor(torch.int64, offset=56).shape == (5,)
        assert arena.tensor(offset=99).shape == (1,)
        empty = [arena.tensor(offset=100), arena.tensor(torch.int64, (3, 0, 2), offset=96)]
        assert [tuple(each.shape) for each in empty] == [(0,), (3, 0, 2)]
        assert empty[1].dtype == torch.int64
        assert arena.view().tensors == 0
        arena.close()

    @clause("HOST-14")
    @pytest.mark.parametrize("bad", BAD_TENSORS)
    def test_a_tensor_of_bytes_that_are_not_there(self, bad: str) -> None:
        dtype, shape, offset = BAD_TENSORS[bad]
        arena = self.make("heap", 100)
        arena.tensor().zero_()
        self.unchanged(arena, "HOST-14", lambda: arena.tensor(dtype, shape, offset))
        assert arena.view().tensors == 0


class Pages(HostMemorySuite):
    """Pages that are given back, and counted."""

    @clause("HOST-19")
    @pytest.mark.parametrize("kind", ["mmap", "shm"])
    def test_discarded_pages_are_zeros_and_the_rest_is_as_it_was(self, kind: str) -> None:
        arena = self.make(kind, 5 * P + 100)
        held, address = arena.tensor(), arena.address
        other = self.make("shm", 5 * P + 100, attach=arena.name) if kind == "shm" else arena
        seen = other.tensor()
        held.fill_(1)
        assert int(seen.sum()) == 5 * P + 100
        assert arena.resident_bytes() == 6 * P
        arena.discard(P, 2 * P)
        assert arena.resident_bytes() == 4 * P
        assert held[:P].all()
        assert held[3 * P :].all()
        assert not held[P : 3 * P].any()
        assert not seen[P : 3 * P].any()
        assert (arena.address, held.data_ptr()) == (address, address)
        held[2 * P] = 8
        assert int(seen[2 * P]) == 8

    @clause("HOST-19")
    @pytest.mark.parametrize("kind", ["mmap", "shm"])
    def test_the_last_page_is_whole_though_the_arena_ends_in_it(self, kind: str) -> None:
        arena = self.make(kind, 5 * P + 100)
        arena.tensor().fill_(1)
        arena.discard(5 * P, 100)
        assert arena.resident_bytes() == 5 * P
        arena.discard(4 * P)
        assert arena.resident_bytes() == 4 * P
        arena.discard(0, 0)
        assert arena.resident_bytes() == 4 * P
        arena.discard()
        assert arena.resident_bytes() == 0
        assert not arena.tensor().any()
        arena.populate()
        assert arena.resident_bytes() == 6 * P

    @clause("HOST-20")
    @pytest.mark.parametrize("bad", BAD_RANGES)
    @pytest.mark.parametrize("kind", ["mmap", "shm"])
    def test_parts_of_pages_are_not_discarded(self, bad: str, kind: str) -> None:
        offset, nbytes = BAD_RANGES[bad]
        arena = self.make(kind, 4 * P + 100)
        arena.tensor().fill_(1)
        self.unchanged(arena, "HOST-20", lambda: arena.discard(offset, nbytes))

    @clause("HOST-20")
    @pytest.mark.parametrize("kind", ["torch", "heap", "pinned"])
    def test_other_kinds_keep_their_pages(self, kind: str) -> None:
        arena = self.make(kind)
        arena.tensor().fill_(1)
        self.unchanged(arena, "HOST-20", arena.discard, kind)

    @clause("HOST-20")
    def test_only_what_there_is_is_populated(self) -> None:
        arena = self.make(nbytes=100)
        for offset, nbytes in ((-1, 2), (0, 101), (101, 0), (5, -1), (1, 2**64)):
            self.unchanged(arena, "HOST-20", partial(arena.populate, offset, nbytes))
        self.unchanged(arena, "HOST-20", lambda: arena.populate(threads=0), "threads 0")

    @clause("HOST-21")
    @pytest.mark.parametrize("kind", ["mmap", "pinned"])
    def test_resident_is_what_the_kernel_counts(self, kind: str) -> None:
        arena = self.make(kind, 512 * P)
        before = private_bytes(arena.address, 512 * P) if kind == "mmap" else 0
        assert arena.resident_bytes() == (0 if kind == "mmap" else 512 * P)
        if kind == "mmap":
            held = arena.tensor()
            for page in range(0, 512, 3):
                held[page * P] = 1
            assert arena.resident_bytes() == 171 * P
            assert private_bytes(arena.address, 512 * P) - before == 171 * P

    @clause("HOST-21")
    def test_reading_takes_no_memory(self) -> None:
        arena = self.make(nbytes=16 * P)
        assert int(arena.tensor().sum()) == 0
        assert arena.resident_bytes() == 0
        arena.tensor()[P] = 1
        assert int(arena.tensor().sum()) == 1
        assert arena.resident_bytes() == P

    @clause("HOST-21")
    @pytest.mark.parametrize("kind", ["torch", "heap"])
    def test_bytes_of_a_page_that_others_share(self, kind: str) -> None:
        arena = self.make(kind, 3 * P + 7)
        arena.tensor().fill_(1)
        assert arena.resident_bytes() == 3 * P + 7

    @clause("HOST-21")
    def test_a_segment_has_what_anybody_touched(self) -> None:
        arena = self.make("shm", 4 * P)
        other = self.make("shm", 4 * P, attach=arena.name)
        assert arena.resident_bytes() == 4 * P
        arena.discard()
        other.tensor()[P] = 1
        assert arena.resident_bytes() == other.resident_bytes() == P

    @clause("HOST-27")
    def test_each_page_is_populated_once_by_as_many_threads_as_it_takes(self) -> None:
        cpus = len(os.sched_getaffinity(0))
        for nbytes, wanted in ((MIB, 1), (65 * MIB, 2)):
            arena = self.make(nbytes=nbytes, populate=True)
            counted = {"pages_populated": nbytes // P, "populate_threads": min(wanted, cpus)}
            assert arena.counters() == counted
            arena.close()
        arena = self.make(nbytes=3 * P)
        arena.populate(1, 2 * P, threads=5)
        assert arena.counters() == {"pages_populated": 3, "populate_threads": 5}
        arena.populate(0, 0)
        assert arena.counters()["pages_populated"] == 3
