"""What the interposer wrote: `cpp/interposer/ring.hpp`, read. Spec: CHAIN-3, CHAIN-6."""

import struct
from collections.abc import Iterator
from typing import Literal

import msgspec

__all__ = ["BYTES", "FRAMES_AT", "FUNCTIONS", "PHASES", "Entry", "empty_ring", "read_ring"]

PHASES = ("", "allocate", "touch", "free", "first use")
"""By number, as the marks give it; 0 is outside of all. Of the first use nothing is told."""

FUNCTIONS = (
    *("malloc", "calloc", "realloc", "aligned_alloc", "posix_memalign", "free"),
    *("mmap", "mmap64", "munmap", "mremap", "brk", "sbrk", "madvise", "mlock", "munlock"),
    *("shm_open", "shm_unlink", "ftruncate", "ftruncate64", "posix_fallocate"),
    *("cudaHostAlloc", "cudaMallocHost", "cudaHostRegister", "cudaHostUnregister", "cudaFreeHost"),
)

_MAGIC = 0x314E494148435653
_HEADER = struct.Struct("<4Q")
_FRAMES = 32
_RECORD = struct.Struct(f"<2Q4I6QQiI{_FRAMES}Q64s")
_CAPACITY = 8192
_ENTRIES: dict[int, Literal["call", "mark", "step"]] = {1: "call", 2: "mark", 3: "step"}

_BEFORE_FRAMES = struct.Struct("<2Q4I6QQi").size
FRAMES_AT = (_BEFORE_FRAMES, _HEADER.size, _RECORD.size)
"""Where the count of frames is in a record; the bytes of the header and of a record."""

BYTES = _HEADER.size + _CAPACITY * _RECORD.size


class Entry(msgspec.Struct, frozen=True):
    """One record. What `values` and `result` mean depends on `entry`: see ring.hpp."""

    entry: Literal["call", "mark", "step"]
    phase: int
    begin_ns: int
    """Of CLOCK_MONOTONIC, as all times of the ring."""
    end_ns: int
    values: tuple[int, ...]
    result: int
    thread: int = 0
    function: str = ""
    error: int = 0
    frames: tuple[int, ...] = ()
    """Return addresses, the caller's first."""
    text: str = ""


def empty_ring() -> bytes:
    """The header of a ring of BYTES bytes, which are zero otherwise."""
    return _HEADER.pack(_MAGIC, _CAPACITY, 0, _RECORD.size)


def read_ring(data: bytes | memoryview) -> tuple[list[Entry], int]:
    """The records in the order in which they were begun, and how many had no room."""
    _, capacity, asked, _ = _HEADER.unpack_from(data)
    entries = sorted(_records(data, min(asked, capacity)), key=lambda entry: entry.begin_ns)
    return entries, max(asked - capacity, 0)


def _records(data: bytes | memoryview, count: int) -> Iterator[Entry]:
    for slot in range(count):
        fields = _RECORD.unpack_from(data, _HEADER.size + slot * _RECORD.size)
        begin, end, entry, function, phase, thread = fields[:6]
        result, error, frame_count = fields[12:15]
        if entry not in _ENTRIES:  # its thread was not done with it
            continue
        yield Entry(
            entry=_ENTRIES[entry],
            phase=phase,
            begin_ns=begin,
            end_ns=end,
            values=fields[6:12],
            result=result,
            thread=thread,
            function=FUNCTIONS[function] if entry == 1 else "",
            error=error,
            frames=fields[15 : 15 + frame_count],
            text=fields[-1].split(b"\0")[0].decode("utf-8", "replace"),
        )
