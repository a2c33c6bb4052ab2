"""What the oracle asks of the kernel about pages, through libc. Spec: HOST."""

import ctypes
import mmap
import os
import resource
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvspec.errors import HostMemoryError

__all__ = [
    "HUGE_PAGE_BYTES",
    "PAGE_BYTES",
    "POPULATE_WRITE",
    "advise",
    "bind",
    "bytes_on_nodes",
    "heap",
    "lock",
    "mapped",
    "nodes",
    "number",
    "on_node",
    "populates_on_request",
    "resident",
    "rounded",
    "zeros",
]

_LIBC = ctypes.CDLL(None, use_errno=True)
_ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_LIBC.mmap.restype = _LIBC.malloc.restype = _ADDRESS
_LIBC.mmap.argtypes = [_ADDRESS, _SIZE, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = _LIBC.mlock.argtypes = [_ADDRESS, _SIZE]
_LIBC.msync.argtypes = _LIBC.madvise.argtypes = [_ADDRESS, _SIZE, ctypes.c_int]
_LIBC.posix_memalign.argtypes = [_ADDRESS, _SIZE, _SIZE]
_LIBC.malloc.argtypes = [_SIZE]
_LIBC.free.argtypes, _LIBC.free.restype = [_ADDRESS], None
_LIBC.syscall.restype = ctypes.c_long

# mbind, set_mempolicy, get_mempolicy, move_pages
_NUMBERS = {"x86_64": (237, 238, 239, 279), "aarch64": (235, 237, 236, 239)}
_MBIND, _SET_POLICY, _GET_POLICY, _MOVE_PAGES = _NUMBERS[os.uname().machine]
POPULATE_WRITE = 23
_HUGETLB, _BIND, _NODES = 0x40000, 2, 1024
_PRESENT, _EXCLUSIVE = 1 << 63, 1 << 56  # of an entry of pagemap


def number(path: str, field: str) -> int:
    """What stands behind a name in a file of the kernel, kB as bytes; 0 if there is none."""
    for line in Path(path).read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * (1024 if value.endswith("kB") else 1)
    return 0


PAGE_BYTES = resource.getpagesize()
HUGE_PAGE_BYTES = number("/proc/meminfo", "Hugepagesize") or 2 << 20


def rounded(nbytes: int, unit: int) -> int:
    """Up to a multiple."""
    return -(-nbytes // unit) * unit


def _reason() -> str:
    return os.strerror(ctypes.get_errno())


def heap(nbytes: int, alignment: int) -> tuple[int, Callable[[], None]]:
    """A block of malloc and how to free it (HOST-2, HOST-4)."""
    block = ctypes.c_void_p()
    if alignment <= 16:
        block.value = _LIBC.malloc(nbytes)
    else:
        _LIBC.posix_memalign(ctypes.addressof(block), alignment, nbytes)
    address = block.value
    if address is None:
        raise HostMemoryError(f"HOST-4: heap cannot have {nbytes} bytes: Cannot allocate memory")
    return address, lambda: _LIBC.free(address)


def zeros(kind: str, nbytes: int, alignment: int, huge: bool) -> tuple[int, Callable[[], None]]:
    """Private anonymous memory and how to unmap it (HOST-2, HOST-4, HOST-8, HOST-10)."""
    natural = HUGE_PAGE_BYTES if huge else PAGE_BYTES
    spare = max(alignment - natural, 0)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_HUGETLB if huge else 0)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    begin = _LIBC.mmap(None, nbytes + spare, protection, flags, -1, 0)
    if begin == ctypes.c_void_p(-1).value:
        if huge:
            raise HostMemoryError(
                f"HOST-8: {nbytes} bytes of explicit huge pages are {nbytes // natural} pages of"
                f" {natural}, and HugePages_Free is {number('/proc/meminfo', 'HugePages_Free')} of"
                f" {number('/proc/meminfo', 'HugePages_Total')}: write more to"
                " /proc/sys/vm/nr_hugepages, or ask for transparent ones"
            )
        raise HostMemoryError(f"HOST-4: {kind} cannot have {nbytes} bytes: {_reason()}")
    address = rounded(begin, max(alignment, natural))
    for at, size in ((begin, address - begin), (address + nbytes, begin + spare - address)):
        if size:
            _LIBC.munmap(at, size)
    _LIBC.madvise(address, nbytes, mmap.MADV_DONTFORK)
    owner = os.getpid()

    def give_back() -> None:
        if os.getpid() == owner:
            _LIBC.munmap(address, nbytes)

    return address, give_back


def advise(address: int, nbytes: int, advice: int) -> str | None:
    """Say what the whole pages that the bytes lie on are for; why the kernel does not do it."""
    begin = address // PAGE_BYTES * PAGE_BYTES
    end = rounded(address + nbytes, PAGE_BYTES)
    return _reason() if _LIBC.madvise(begin, end - begin, advice) else None


def mapped(address: int, nbytes: int) -> bool:
    """Whether all these bytes are mapped (HOST-1)."""
    begin = address // PAGE_BYTES * PAGE_BYTES
    return int(_LIBC.msync(begin, address + nbytes - begin, 1)) == 0  # MS_ASYNC


def lock(address: int, nbytes: int) -> None:
    """Lock pages, or say what the limit is (HOST-22, HOST-23)."""
    if _LIBC.mlock(address, nbytes) == 0:
        return
    soft, hard = (
        "unlimited" if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    )
    raise HostMemoryError(
        f"HOST-23: pinned has to lock {nbytes} bytes; RLIMIT_MEMLOCK is {soft} soft and {hard}"
        f" hard, and {number('/proc/self/status', 'VmLck')} bytes are locked already (VmLck): raise"
        " it with ulimit -l, LimitMEMLOCK= or --ulimit memlock=-1, or give the process CAP_IPC_LOCK"
    )


def populates_on_request() -> bool:
    """Whether the kernel has MADV_POPULATE_WRITE."""
    address, give_back = zeros("mmap", PAGE_BYTES, PAGE_BYTES, False)
    done = advise(address, PAGE_BYTES, POPULATE_WRITE) is None
    give_back()
    return done


def _pages(address: int, nbytes: int) -> tuple[range, Callable[[int], int]]:
    """Where the pages begin that the bytes lie on, and how many bytes lie on each."""
    begin, end = address // PAGE_BYTES * PAGE_BYTES, address + nbytes
    return range(begin, end, PAGE_BYTES), lambda p: min(p + PAGE_BYTES, end) - max(p, address)


def resident(address: int, nbytes: int) -> int:
    """How many bytes of private memory lie on pages of their own (HOST-21)."""
    pages, on_page = _pages(address, nbytes)
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        entries = array("Q", os.pread(file.fileno(), 8 * len(pages), 8 * pages[0] // PAGE_BYTES))
    own = _PRESENT | _EXCLUSIVE
    return sum(on_page(p) for p, entry in zip(pages, entries, strict=True) if entry & own == own)


def nodes(folder: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The NUMA nodes that have memory, and those that have CPUs (HOST-25)."""

    def listed(name: str) -> Iterator[int]:
        path = Path(folder, name)
        text = path.read_text(encoding="ascii").strip() if path.exists() else ""
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            yield from range(int(first), int(last or first) + 1)

    if not Path(folder, "has_memory").exists():
        return None
    return tuple(listed("has_memory")), tuple(listed("has_cpu"))


def _refuse_node(node: int) -> HostMemoryError:
    return HostMemoryError(f"HOST-11: the kernel gives no memory of node {node}: {_reason()}")


def _mask(node: int) -> "ctypes.Array[ctypes.c_ulong]":
    words = [0] * (_NODES // 64)
    words[node // 64] = 1 << node % 64
    return (ctypes.c_ulong * len(words))(*words)


def _syscall(which: int, *arguments: object) -> int:
    """A number is passed as 64 bits, as registers are."""
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(_LIBC.syscall(ctypes.c_long(which), *given))


def bind(address: int, nbytes: int, node: int) -> None:
    """Let pages that are not there yet come from a node (HOST-11)."""
    if _syscall(_MBIND, address, nbytes, _BIND, _mask(node), _NODES, 0):
        raise _refuse_node(node)


@contextmanager
def on_node(node: int | None) -> Iterator[None]:
    """Inside, what this thread makes the kernel allocate lies on a node (HOST-11)."""
    if node is None:
        yield
        return
    policy, before = ctypes.c_int(), _mask(0)
    if _syscall(_GET_POLICY, ctypes.byref(policy), before, _NODES, None, 0) or _syscall(
        _SET_POLICY, _BIND, _mask(node), _NODES
    ):
        raise _refuse_node(node)
    try:
        yield
    finally:
        _syscall(_SET_POLICY, policy.value, before, _NODES)


def bytes_on_nodes(address: int, nbytes: int) -> dict[int, int] | None:
    """For each node how many bytes are on its pages (HOST-12)."""
    pages, on_page = _pages(address, nbytes)
    where = (ctypes.c_int * len(pages))()
    given = (ctypes.c_void_p * len(pages))(*pages)
    if _syscall(_MOVE_PAGES, 0, len(pages), given, None, where, 0):
        return None
    found = Counter[int]()
    for page, node in zip(pages, where, strict=True):
        if node >= 0:
            found[node] += on_page(page)
    return dict(sorted(found.items()))
