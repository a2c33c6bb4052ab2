"""Run as a program: asks the kernel when pages come, and prints what it said as one line of JSON.

Nothing of kvspec is imported. Each range lies between pages that may not be accessed, so that the
kernel merges it with no neighbour and its block of smaps is of it alone. Spec: CHAIN-17, CHAIN-21.
"""

import ctypes
import json
import mmap
import os
import resource
import sys
from typing import Any

PAGE = mmap.PAGESIZE
PAGES = 1024
BYTES = PAGES * PAGE
HUGE = 2 << 20

_LIBC = ctypes.CDLL(None, use_errno=True)
_FAILED = ctypes.c_void_p(-1).value
_READ, _WRITE = 1, 2
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS = 1, 2, 0x10, 0x20
_POPULATE, _HUGETLB = 0x8000, 0x40000
_HUGEPAGE, _NOHUGEPAGE = 14, 15


def _map(at: int | None, nbytes: int, prot: int, flags: int, file: int = -1) -> int:
    call = _LIBC.mmap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    found = call(at, nbytes, prot, flags, file, 0)
    if found is None or found == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(found)


def _unmap(at: int, nbytes: int) -> None:
    _LIBC.munmap(ctypes.c_void_p(at), ctypes.c_size_t(nbytes))


def _place(nbytes: int) -> int:
    """Addresses for a range on a huge page's boundary, with a guard before and behind."""
    start = _map(None, nbytes + 2 * HUGE, 0, _PRIVATE | _ANONYMOUS)
    return (start + HUGE) // HUGE * HUGE


def _advise(at: int, nbytes: int, advice: int) -> int:
    return int(_LIBC.madvise(ctypes.c_void_p(at), ctypes.c_size_t(nbytes), advice))


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _block(address: int) -> str:
    found: list[str] = []
    with open("/proc/self/smaps", encoding="utf-8") as file:
        for line in file:
            head = line.split(" ", 1)[0]
            if not head.endswith(":"):
                start, end = (int(part, 16) for part in head.split("-"))
                if found:
                    break
                if not start <= address < end:
                    continue
                found.append(line)
            elif found:
                found.append(line)
    return "".join(found)


def _resident(at: int, nbytes: int) -> int:
    """By mincore, in bytes."""
    seen = (ctypes.c_ubyte * (nbytes // PAGE))()
    _LIBC.mincore(ctypes.c_void_p(at), ctypes.c_size_t(nbytes), seen)
    return PAGE * sum(byte & 1 for byte in bytes(seen))


def _look(at: int, nbytes: int, faults: int) -> dict[str, Any]:
    return {"smaps": _block(at), "mincore": _resident(at, nbytes), "faults": faults}


def _view(at: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * nbytes).from_address(at)).cast("B")


def _write(at: int, nbytes: int) -> dict[str, Any]:
    view, byte_each = _view(at, nbytes), b"\1" * (nbytes // PAGE)
    before = _faults()
    view[::PAGE] = byte_each
    return _look(at, nbytes, _faults() - before)


def _read(at: int, nbytes: int) -> dict[str, Any]:
    view = _view(at, nbytes)
    before = _faults()
    bytes(view[::PAGE])
    return _look(at, nbytes, _faults() - before)


def private(flags: int = 0) -> dict[str, Any]:
    """Private anonymous memory: mapped, then written."""
    at = _place(BYTES)
    before = _faults()
    _map(at, BYTES, _READ | _WRITE, _PRIVATE | _ANONYMOUS | _FIXED | flags)
    faults = _faults() - before
    mapped = _look(at, BYTES, faults)
    if not flags:
        _advise(at, BYTES, _NOHUGEPAGE)
    written = _write(at, BYTES)
    _unmap(at, BYTES)
    return {"mapped": mapped, "written": written}


def read_first() -> dict[str, Any]:
    """Read before it is written."""
    at = _place(BYTES)
    _map(at, BYTES, _READ | _WRITE, _PRIVATE | _ANONYMOUS | _FIXED)
    _advise(at, BYTES, _NOHUGEPAGE)
    looked = {"read": _read(at, BYTES), "written": _write(at, BYTES)}
    _unmap(at, BYTES)
    return looked


def locked() -> dict[str, Any]:
    """mlock brings the pages; `error` is errno where the limit of locked memory forbids it."""
    at = _place(BYTES)
    _map(at, BYTES, _READ | _WRITE, _PRIVATE | _ANONYMOUS | _FIXED)
    _advise(at, BYTES, _NOHUGEPAGE)
    refused = _LIBC.mlock(ctypes.c_void_p(at), ctypes.c_size_t(BYTES)) != 0
    found = _look(at, BYTES, 0) | {"error": ctypes.get_errno() if refused else 0}
    _unmap(at, BYTES)
    return found


def tmpfs() -> dict[str, Any]:
    """A file of /dev/shm, which has no name any more when it is looked at. Blocks in bytes."""
    path = f"/dev/shm/kvspec-alloc-facts-{os.getpid()}"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    found: dict[str, Any] = {}
    os.ftruncate(file, BYTES)
    found["truncated"] = os.fstat(file).st_blocks * 512
    at = _place(BYTES)
    _map(at, BYTES, _READ | _WRITE, _SHARED | _FIXED, file)
    before = _status("RssShmem")
    found["mapped"] = _look(at, BYTES, 0)
    found["written"] = _write(at, BYTES)
    found["written_blocks"] = os.fstat(file).st_blocks * 512
    found["shared_grew"] = _status("RssShmem") - before
    _unmap(at, BYTES)
    os.ftruncate(file, 0)
    os.posix_fallocate(file, 0, BYTES)
    found["reserved"] = os.fstat(file).st_blocks * 512
    _map(at, BYTES, _READ | _WRITE, _SHARED | _FIXED, file)
    found["reserved_mapped"] = _look(at, BYTES, 0)
    _unmap(at, BYTES)
    os.close(file)
    return found


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def huge() -> dict[str, Any]:
    """Written after each advice; explicit huge pages, or the errno with which they are refused."""
    found: dict[str, Any] = {}
    for name, advice in (("advised", _HUGEPAGE), ("advised_against", _NOHUGEPAGE)):
        at = _place(2 * HUGE)
        _map(at, 2 * HUGE, _READ | _WRITE, _PRIVATE | _ANONYMOUS | _FIXED)
        error = ctypes.get_errno() if _advise(at, 2 * HUGE, advice) else 0
        found[name] = _write(at, 2 * HUGE) | {"error": error}
        _unmap(at, 2 * HUGE)
    try:
        at = _map(None, HUGE, _READ | _WRITE, _PRIVATE | _ANONYMOUS | _HUGETLB)
    except OSError as error:
        found["explicit_error"] = error.errno
    else:
        found["explicit_error"] = 0
        _unmap(at, HUGE)
    return found


def main() -> None:
    _read(_map(None, PAGE, _READ | _WRITE, _PRIVATE | _ANONYMOUS), PAGE)  # what Python does once
    facts = {
        "page": PAGE,
        "bytes": BYTES,
        "private": private(),
        "populated": private(_POPULATE),
        "read_first": read_first(),
        "locked": locked(),
        "tmpfs": tmpfs(),
        "huge": huge(),
    }
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
