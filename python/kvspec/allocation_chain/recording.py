"""Runs the process that is observed, and keeps what it and its observers said. Spec: CHAIN-1."""

import ctypes
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

import kvspec
from kvspec.allocation_chain import ring, strace
from kvspec.allocation_chain.ring import Entry
from kvspec.errors import ContractError, HostMemoryError
from kvspec.interfaces.host_memory import ArenaKind, HugePages
from kvspec.memory_budget import MemoryBudget

__all__ = ["Recording", "Request", "TouchBy", "helper", "record"]

TouchBy = Literal["page", "all", "read"]

_TIMEOUT_S = 600
_GRACE_S = 5
_CHILD = Path(__file__).with_name("child.py")


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was asked for."""

    kind: ArenaKind
    nbytes: int
    alignment: int | None = None
    populate: bool = False
    huge_pages: HugePages = "no"
    numa_node: int | None = None
    touch: TouchBy | None = None
    """A byte written to each page, all bytes written, a byte of each page read, or nothing."""


class Recording(msgspec.Struct, frozen=True):
    """What was said, unread: `observe` makes an observation of it."""

    request: Request
    entries: list[Entry]
    """Marks, steps and calls, by time."""
    dropped: int
    """Calls for which the ring had no room."""
    names: dict[str, tuple[str | None, str | None, int]]
    """Library, symbol and offset of each return address."""
    states: dict[str, dict[str, Any]]
    """What the process read of /proc/self before, allocated, touched, freed."""
    maps: dict[str, list[str]]
    """/proc/self/maps before and after each phase."""
    traced: str | None
    """What strace wrote; None with a reason in `traced_why`."""
    interposed_why: str | None
    """Why no library call was seen; None if they were."""
    traced_why: str | None
    address: int
    mapped_bytes: int
    name: str | None
    arena: str
    pid: int
    machine: dict[str, Any]


def helper(name: str) -> Path | None:
    """A file that the build puts beside the extension; None if it was not built."""
    if not kvspec.has_native():
        return None
    from kvspec import _core

    path = Path(str(_core.__file__)).parent / "allocation_chain" / name
    return path if path.exists() else None


def record(
    request: Request,
    progress: Callable[[int], object] | None = None,
    *,
    interpose: bool = True,
    trace: bool = True,
) -> Recording:
    """Allocate in a process of its own and record it. `progress` is told the bytes touched.

    ContractError and HostMemoryError are those of HostArena; the budget is asked before the process
    is there, unless it has a whole HostArena, which asks itself (HOST-28). Costs the start of a
    process, and the import of torch for kind torch, and for pinned where there is a GPU.
    """
    library = helper("libkvspec_interposer.so") if interpose else None
    refused = strace.why_not() if trace else "it was not asked for"
    if refused is None and library is None:
        refused = "the interposer, which makes the marks, is not loaded"
    core = _core_file(request)
    with _reserved(request, core), _ring() as memory, tempfile.TemporaryDirectory() as folder:
        trace_file = Path(folder) / "strace" if refused is None else None
        said = _run(_for_the_child(request, core, memory), memory, library, trace_file, progress)
        traced = trace_file.read_text("utf-8", "replace") if trace_file is not None else None
        entries, dropped = ring.read_ring(os.pread(memory, ring.BYTES, 0))
    attached = said.pop("attached")
    own = said.pop("entries")
    return Recording(
        request=request,
        entries=entries if attached else msgspec.convert(own, list[Entry]),
        dropped=dropped,
        names={frame: tuple(name) for frame, name in said.pop("names").items()},
        traced=traced,
        traced_why=refused,
        interposed_why=None if attached else _why_not_interposed(interpose, library),
        machine=_machine(said.pop("torch")),
        **said,
    )


def _why_not_interposed(wanted: bool, library: Path | None) -> str:
    if not wanted:
        return "it was not asked for"
    return "the interposer was not built" if library is None else "the interposer was not loaded"


def _core_file(request: Request) -> str | None:
    """The extension's file, where the process needs no more than the core's part of an arena.

    That has neither torch nor CUDA in it; where they have a part, and without an extension, the
    process has a whole HostArena.
    """
    device = request.kind == "pinned" and Path("/dev/nvidiactl").exists()
    if request.kind == "torch" or device or not kvspec.has_native():
        return None
    from kvspec import _core

    return _core.__file__


def _reserved(request: Request, core: str | None) -> AbstractContextManager[object]:
    """The bytes in the budget, which a whole HostArena asks itself (HOST-28)."""
    if core is None or request.huge_pages == "explicit":
        return nullcontext()
    return MemoryBudget.current().reserve(request.kind, max(request.nbytes, 0), label="alloc")


@contextmanager
def _ring() -> Iterator[int]:
    """Memory that both processes see and that no file system has to do with."""
    memory = os.memfd_create("kvspec-alloc")
    try:
        os.ftruncate(memory, ring.BYTES)
        os.pwrite(memory, ring.empty_ring(), 0)
        yield memory
    finally:
        os.close(memory)


def _run(
    asked: dict[str, Any],
    memory: int,
    library: Path | None,
    trace_file: Path | None,
    progress: Callable[[int], object] | None,
) -> dict[str, Any]:
    """The child's last words. It is gone when this returns, whatever happens."""
    environment, preload = dict(os.environ), os.environ.get("LD_PRELOAD")
    assigned = {"KVSPEC_CHAIN_RING": f"{memory},{ring.BYTES}"}
    if library is not None:
        assigned["LD_PRELOAD"] = ":".join(filter(None, [str(library), preload]))
    command = [sys.executable, "-P", str(_CHILD), json.dumps(asked)]
    if trace_file is not None:  # strace is not the one to be observed
        given = [part for name, value in assigned.items() for part in ("-E", f"{name}={value}")]
        command = [*strace.command(str(trace_file)), *given, *command]
    else:
        environment |= assigned
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            pass_fds=[memory],
            start_new_session=True,
            text=True,
        )
        try:
            said = _listen(child, progress)
            child.wait(_TIMEOUT_S)
        finally:
            _end(child)
        if said is None:
            errors.seek(0)
            last = " ".join(errors.read().decode("utf-8", "replace").split())[-300:]
            raise OSError(f"the process that allocates ended with {child.returncode}: {last}")
    return said


def _end(child: "subprocess.Popen[str]") -> None:
    """Interrupt it if it still runs, so that it takes its segment with it; then no more asking."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        if child.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)
    child.wait()


def _for_the_child(request: Request, core: str | None, memory: int) -> dict[str, Any]:
    given = msgspec.to_builtins(request)
    options = ("alignment", "populate", "huge_pages", "numa_node")
    return {
        "kind": request.kind,
        "nbytes": request.nbytes,
        "touch": request.touch,
        "options": {name: given[name] for name in options},
        "core": core,
        "ring": [memory, *ring.FRAMES_AT],
    }


def _listen(
    child: "subprocess.Popen[str]", progress: Callable[[int], object] | None
) -> dict[str, Any] | None:
    assert child.stdout is not None
    found: dict[str, Any] | None = None
    with child.stdout as lines:
        for text in lines:
            line = json.loads(text)
            if "touched" in line and progress is not None:
                progress(line["touched"])
            if "error" in line:
                raise _raised(**line["error"])
            found = line.get("done", found)
    return found


def _raised(type: str, text: str) -> Exception:
    """The error as the child had it: what it names is the same clause."""
    known = {"ContractError": ContractError, "HostMemoryError": HostMemoryError}
    return known.get(type, OSError)(text)


def _machine(torch: str | None) -> dict[str, Any]:
    """What the observation depends on."""
    return {
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()) or None,
        "python": platform.python_version(),
        "torch": torch,
        "page_bytes": os.sysconf("SC_PAGESIZE"),
        "cpus": os.cpu_count(),
        "transparent_huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "shmem_huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "explicit_huge_pages": _meminfo("HugePages_Total"),
        "malloc_environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
        },
    }


def _chosen(path: str) -> str | None:
    """`always [madvise] never` is madvise."""
    try:
        found = re.search(r"\[(\w+)\]", Path(path).read_text("ascii"))
    except OSError:
        return None
    return found[1] if found else None


def _meminfo(field: str) -> int | None:
    found = re.search(rf"^{field}: +(\d+)", Path("/proc/meminfo").read_text("ascii"), re.M)
    return int(found[1]) if found else None


@cache
def demangled(symbol: str) -> str:
    """`c10::alloc_cpu(unsigned long)`; a name as it is where the C++ runtime is not at hand."""
    if not symbol.startswith("_Z"):
        return symbol
    try:
        runtime = ctypes.CDLL("libstdc++.so.6")
    except OSError:
        return symbol
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = runtime.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not text:
        return symbol
    name = ctypes.string_at(text).decode("utf-8", "replace")
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    free(text)
    return name
