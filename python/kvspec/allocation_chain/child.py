"""Run as a program: allocates, touches, frees, and writes down what it can see of itself.

It imports nothing of kvspec but the core, so that an observation of heap, mmap or shm has no torch
in it. Its argument is JSON; its standard output is lines of JSON: `{"touched": bytes}` as it goes,
then `{"done": ...}` or `{"error": ...}`. Spec: CHAIN-2, CHAIN-5, CHAIN-6, CHAIN-8.
"""

import ctypes
import gc
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

_PAGE = mmap.PAGESIZE
_STEPS = 64
_MAPS_BYTES = 2 << 20
_HOW = {"page": 0, "all": 1, "read": 2}
_ALLOCATE, _TOUCH, _FREE, _FIRST_USE = 1, 2, 3, 4
_HEADER, _RECORD_FRAMES = struct.Struct("<4Q"), struct.Struct("<I32Q")

_Arena = tuple[Any, int, Callable[[], object]]


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class Marks:
    """The interposer's marks; without it the same facts as Python can get them."""

    def __init__(self, libc: Any) -> None:
        self._libc = libc if hasattr(libc, "kvspec_chain_attached") else None
        if self._libc is not None and not libc.kvspec_chain_attached():
            self._libc = None
        self._libc_all = libc
        self.entries: list[dict[str, Any]] = []
        self._phase = 0
        if self._libc is not None:
            word = ctypes.c_uint64
            libc.kvspec_chain_touch.argtypes = [word, word, word, word, ctypes.c_int]
            libc.kvspec_chain_begin.restype = libc.kvspec_chain_end.restype = None

    @property
    def attached(self) -> bool:
        return self._libc is not None

    def begin(self, phase: int) -> None:
        if self._libc is not None:
            self._libc.kvspec_chain_begin(phase)
            return
        self._phase = phase
        self._mark(begins=True)

    def end(self) -> None:
        if self._libc is not None:
            self._libc.kvspec_chain_end()
            return
        self._mark(begins=False)
        self._phase = 0

    def _mark(self, *, begins: bool) -> None:
        use = resource.getrusage(resource.RUSAGE_SELF)
        virtual, resident = _statm()
        now, clock = time.monotonic_ns(), time.time_ns()
        top = self._libc_all.sbrk(0)
        values = [use.ru_minflt, use.ru_majflt, top, clock, virtual, resident]
        self._add("mark", now, now, values, int(begins))

    def touch(self, address: int, nbytes: int, start: int, length: int, how: int) -> None:
        """[start, start + length) of the range."""
        if self._libc is not None:
            self._libc.kvspec_chain_touch(address, nbytes, start, length, how)
            return
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin = time.monotonic_ns()
        view = memoryview((ctypes.c_ubyte * length).from_address(address + start)).cast("B")
        count = len(range(0, length, _PAGE))
        if how == 1:
            ctypes.memset(address + start, 1, length)
        elif how == 2:
            bytes(view[::_PAGE])
        else:
            view[::_PAGE] = b"\1" * count
        end = time.monotonic_ns()
        after = resource.getrusage(resource.RUSAGE_SELF)
        minor, major = after.ru_minflt - before.ru_minflt, after.ru_majflt - before.ru_majflt
        pages = resident_bytes(self._libc_all, address, nbytes)
        values = [minor, major, *_statm(), (1 << 64) - 1 if pages is None else pages, 0]
        self._phase = _TOUCH
        self._add("step", begin, end, values, start + length)
        self._phase = 0

    def _add(self, entry: str, begin: int, end: int, values: list[int], result: int) -> None:
        self.entries.append(
            {
                "entry": entry,
                "phase": self._phase,
                "begin_ns": begin,
                "end_ns": end,
                "values": values,
                "result": result,
            }
        )


class Maps:
    """/proc/self/maps around each phase, read into memory that was there before the first."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
        self._rooms = [mmap.mmap(-1, _MAPS_BYTES) for _ in range(6)]  # shared: merged with nothing
        self._read: list[tuple[str, int]] = []

    def read(self, phase: str) -> None:
        room = memoryview(self._rooms[len(self._read)])
        at = 0
        while got := os.preadv(self._file, [room[at:]], at):
            at += got
        self._read.append((phase, at))

    def texts(self) -> dict[str, list[str]]:
        """Before and after, by phase."""
        found: dict[str, list[str]] = {}
        for room, (phase, length) in zip(self._rooms, self._read, strict=False):
            found.setdefault(phase, []).append(room[:length].decode("utf-8", "replace"))
        return found


def _statm() -> tuple[int, int]:
    with open("/proc/self/statm", "rb") as file:
        virtual, resident = file.read().split()[:2]
    return int(virtual) * _PAGE, int(resident) * _PAGE


def resident_bytes(libc: Any, address: int, nbytes: int) -> int | None:
    """What of a range mincore calls resident, in whole pages; None if a part is not mapped."""
    first = address // _PAGE * _PAGE
    end = -(-(address + nbytes) // _PAGE) * _PAGE
    span, pages = _PAGE << 16, 0
    seen = (ctypes.c_ubyte * (1 << 16))()
    for at in range(first, end, span):
        length = min(span, end - at)
        if libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(length), seen) != 0:
            return None
        pages += sum(byte & 1 for byte in bytes(seen)[: length // _PAGE])
    return pages * _PAGE


def state(libc: Any, address: int | None, nbytes: int) -> dict[str, Any]:
    """What the kernel and libc say now. `smaps` is of the mapping that holds the address."""
    with open("/proc/self/status", encoding="utf-8") as file:
        status = file.read()
    info: dict[str, int] | None = None
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = _MallocInfo
        found = libc.mallinfo2()
        info = {name: getattr(found, name) for name in ("arena", "hblks", "hblkhd", "uordblks")}
    return {
        "smaps": None if address is None else _block(address),
        "status": status,
        "malloc": info,
        "range_resident": None if address is None else resident_bytes(libc, address, nbytes),
    }


def _block(address: int) -> str | None:
    """The block of smaps for the mapping that holds the address."""
    block: list[str] = []
    with open("/proc/self/smaps", encoding="utf-8") as file:
        for line in file:
            head = line.split(" ", 1)[0]
            if "-" in head and not head.endswith(":"):
                if block:
                    break
                start, end = (int(part, 16) for part in head.split("-"))
                if start <= address < end:
                    block.append(line)
            elif block:
                block.append(line)
    return "".join(block) or None


def _core(path: str) -> Any:
    """The extension, in a package that has its folder and has imported nothing."""
    package = ModuleType("kvspec")
    package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    spec = spec_from_file_location("kvspec._core", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["kvspec"], sys.modules["kvspec._core"] = package, module
    spec.loader.exec_module(module)
    return module


def opener(request: dict[str, Any], core: str | None) -> Callable[[int], _Arena]:
    """What opens an arena of some bytes: the object, its address, and what gives it back.

    A whole HostArena, or of that the part of the core, whose file is given.
    """
    kind, options = request["kind"], request["options"]
    if core is None:
        from kvspec import HostArena

        def arena(nbytes: int) -> _Arena:
            made = HostArena(kind, nbytes, **options, label="alloc")
            return made, made.address, made.close

        return arena
    block = _core(core).HostBlock
    names = ("alignment", "populate", "huge_pages", "numa_node")
    given = [options[name] for name in names]

    def of_the_core(nbytes: int) -> _Arena:
        made = block(kind, nbytes, *given, "alloc", None, "/sys/devices/system/node")
        made.open(True)
        return made, made.address, made.give_back

    return of_the_core


def names_of(libc: Any, frames: set[int]) -> dict[str, list[Any]]:
    """Library, symbol and offset of each address, as the loader knows them."""
    look = libc.kvspec_chain_name
    look.restype = ctypes.c_uint64
    look.argtypes = [ctypes.c_uint64, *2 * [ctypes.POINTER(ctypes.c_char_p)]]
    names: dict[str, list[Any]] = {}
    for frame in frames:
        library, symbol = ctypes.c_char_p(), ctypes.c_char_p()
        offset = look(frame, ctypes.byref(library), ctypes.byref(symbol))
        names[str(frame)] = [
            None if each is None else each.decode("utf-8", "replace")
            for each in (library.value, symbol.value)
        ] + [offset]
    return names


def _frames(ring: int, frame_at: int, header: int, record: int) -> set[int]:
    """Every return address in the ring."""
    _, capacity, asked, _ = _HEADER.unpack(os.pread(ring, header, 0))
    found: set[int] = set()
    for slot in range(min(asked, capacity)):
        data = os.pread(ring, _RECORD_FRAMES.size, header + slot * record + frame_at)
        count, *frames = _RECORD_FRAMES.unpack(data)
        found.update(frames[:count])
    return found


def _forget(marks: Marks, ring: tuple[int, int, int, int]) -> None:
    """Of the first use nothing is told: a device's alone would fill the ring."""
    marks.entries.clear()
    if not marks.attached:
        return
    memory, _, header, record = ring
    magic, capacity, asked, record_bytes = _HEADER.unpack(os.pread(memory, header, 0))
    for slot in range(min(asked, capacity)):  # one by one: what is large would be mapped
        os.pwrite(memory, bytes(record), header + slot * record)
    os.pwrite(memory, _HEADER.pack(magic, capacity, 0, record_bytes), 0)


def _say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def observe(request: dict[str, Any]) -> dict[str, Any]:
    """Everything between the marks, in order; times are of CLOCK_MONOTONIC."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    libc.sbrk.argtypes = [ctypes.c_ssize_t]
    marks, nbytes = Marks(libc), request["nbytes"]
    open_arena = opener(request, request["core"])
    maps = Maps()
    marks.begin(_FIRST_USE)  # so that what a process does once is not taken for the allocation's
    *_, close = open_arena(_PAGE)
    close()
    marks.end()
    _forget(marks, request["ring"])
    gc.collect()
    gc.disable()
    states = {"before": state(libc, None, 0)}
    maps.read("allocate")
    marks.begin(_ALLOCATE)
    arena, address, close = open_arena(nbytes)
    marks.end()
    maps.read("allocate")
    states["allocated"] = state(libc, address, nbytes)
    if request["touch"] is not None:
        maps.read("touch")
        _touch(marks, address, nbytes, request["touch"])
        maps.read("touch")
        states["touched"] = state(libc, address, nbytes)
    mapped, name = arena.mapped_bytes, getattr(arena, "name", None)
    maps.read("free")
    marks.begin(_FREE)
    close()
    marks.end()
    maps.read("free")
    states["freed"] = state(libc, address, nbytes)
    ring = request["ring"]
    return {
        "attached": marks.attached,
        "entries": marks.entries,
        "names": names_of(libc, _frames(*ring)) if marks.attached else {},
        "states": states,
        "maps": maps.texts(),
        "address": address,
        "mapped_bytes": mapped,
        "name": name,
        "arena": type(arena).__name__,
        "pid": os.getpid(),
        "torch": getattr(sys.modules.get("torch"), "__version__", None),
    }


def _touch(marks: Marks, address: int, nbytes: int, how: str) -> None:
    """In about _STEPS steps, each between marks of its own: what is said of it costs pages too."""
    step = max(-(-nbytes // _STEPS) // _PAGE, 1) * _PAGE
    start = 0
    marks.touch(address, nbytes, 0, 0, _HOW[how])  # how it stands before
    while start < nbytes:
        # A step ends at the end of a page, so that each page is touched once.
        end = min(start + step - (address + start) % _PAGE, nbytes)
        marks.touch(address, nbytes, start, end - start, _HOW[how])
        start = end
        _say(touched=start)


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent made of it
    request = json.loads(sys.argv[1])
    try:
        _say(done=observe(request))
    except (ValueError, MemoryError, OSError, RuntimeError) as error:
        _say(error={"type": type(error).__name__, "text": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
