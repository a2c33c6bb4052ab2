"""What the kernel says of this process's memory, for suites that do not believe an arena."""

import ctypes
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "PAGE_BYTES",
    "Area",
    "area_of",
    "heap_bytes",
    "in_child",
    "is_mapped",
    "locked_bytes",
    "mapped_total",
    "policy_of",
    "private_bytes",
    "punched",
    "usable_bytes",
    "with_address_space",
    "without_lock",
]

PAGE_BYTES = resource.getpagesize()
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.malloc_usable_size.restype = ctypes.c_size_t
_LIBC.malloc_usable_size.argtypes = [ctypes.c_void_p]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
]
_FIXED_PRIVATE_ANONYMOUS = 0x32
_CAP_IPC_LOCK = 1 << 14
_CAPABILITY_VERSION = 0x20080522


class Area(NamedTuple):
    """A mapping, by /proc/self/smaps."""

    begin: int
    end: int
    flags: tuple[str, ...]


def _areas() -> Iterator[tuple[int, int, list[str]]]:
    lines: list[str] = []
    begin = end = 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and rest:
            if end:
                yield begin, end, lines
            begin, end = (int(part, 16) for part in first.split("-"))
            lines = []
        else:
            lines.append(line)
    yield begin, end, lines


def area_of(address: int) -> Area:
    """The mapping that an address lies in."""
    for begin, end, lines in _areas():
        if begin <= address < end:
            flags = next(line for line in lines if line.startswith("VmFlags:"))
            return Area(begin, end, tuple(flags.split()[1:]))
    raise AssertionError(f"{address:#x} is not mapped")


def private_bytes(address: int, nbytes: int) -> int:
    """Rss of the mappings that the bytes lie in, which may have more than those."""
    return sum(
        int(line.split()[1]) * 1024
        for begin, end, lines in _areas()
        if begin < address + nbytes and address < end
        for line in lines
        if line.startswith("Rss:")
    )


def _begin_of(address: int) -> int | None:
    """Where the mapping begins that an address lies in."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        begin, end = (int(part, 16) for part in line.partition(" ")[0].split("-"))
        if begin <= address < end:
            return begin
    return None


def is_mapped(address: int) -> bool:
    """Whether there is a mapping at an address."""
    return _begin_of(address) is not None


def heap_bytes() -> int:
    """What brk has given to malloc: no block above it can be of what was freed before."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith("[heap]"):
            begin, end = (int(part, 16) for part in line.partition(" ")[0].split("-"))
            return end - begin
    return 0


def policy_of(address: int) -> str:
    """The NUMA policy of the mapping at an address: default, bind:0, ... ."""
    begin = _begin_of(address)
    for line in Path("/proc/self/numa_maps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if int(words[0], 16) == begin:
            return words[1]
    return "none"


def mapped_total() -> int:
    """Address space of the process, in bytes."""
    text = Path("/proc/self/statm").read_text(encoding="ascii")
    return int(text.split()[0]) * PAGE_BYTES


def locked_bytes() -> int:
    """What the process has locked (VmLck)."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition("VmLck:")[2].split()[0]) * 1024


def usable_bytes(address: int) -> int:
    """What malloc has set aside for a block."""
    return int(_LIBC.malloc_usable_size(address))


@contextmanager
def punched(address: int) -> Iterator[None]:
    """Inside, the page at an address is not mapped."""
    assert _LIBC.munmap(address, PAGE_BYTES) == 0
    try:
        yield
    finally:
        assert _LIBC.mmap(address, PAGE_BYTES, 3, _FIXED_PRIVATE_ANONYMOUS, -1, 0) == address


@contextmanager
def _limit(which: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(which)
    hard = before[1] if before[1] != resource.RLIM_INFINITY else soft
    resource.setrlimit(which, (min(soft, hard), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@contextmanager
def with_address_space(more_bytes: int) -> Iterator[None]:
    """Inside, the process can map so much more."""
    with _limit(resource.RLIMIT_AS, mapped_total() + more_bytes):
        yield


def _capabilities(effective: int | None) -> int:
    """CAP_IPC_LOCK and the others of this thread; sets the effective ones of the first 32."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert _LIBC.capget(header, data) == 0
    before = data[0]
    if effective is not None:
        data[0] = effective
        assert _LIBC.capset(header, data) == 0
    return int(before)


@contextmanager
def without_lock(soft_bytes: int) -> Iterator[None]:
    """Inside, this thread may lock what the process has locked and so much more."""
    before = _capabilities(None)
    _capabilities(before & ~_CAP_IPC_LOCK)
    try:
        with _limit(resource.RLIMIT_MEMLOCK, soft_bytes):
            yield
    finally:
        _capabilities(before)


def in_child(action: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether an action in a child of fork went well: no exception, no signal, in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads may run: not in it
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.002)
