"""A machine whose kernel says what a test wants, and processes on it that reserve and touch."""

import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Self

__all__ = ["GIB", "MIB", "Forked", "Machine", "SimulatedRank", "area"]

MIB, GIB = 1 << 20, 1 << 30


def area(
    begin: int, size: int, resident: int, *, locked: bool = False, path: str = "", inode: int = 0
) -> str:
    """One mapping as smaps has it."""
    return (
        f"{begin:x}-{begin + size:x} rw-p 00000000 00:01 {inode} {path}\n"
        f"Size: {size // 1024:>14} kB\nRss: {resident // 1024:>15} kB\nLocked: 0 kB\n"
        f"VmFlags: rd wr mr{' lo' if locked else ''} ac\n"
    )


def _place() -> str | None:
    """Memory, where thousands of small files cost nothing, if it is large enough to say so."""
    try:
        told = os.statvfs("/dev/shm")
    except OSError:
        return None
    roomy = told.f_bavail * told.f_frsize >= 16 * GIB and os.access("/dev/shm", os.W_OK)
    return "/dev/shm" if roomy else None


class Machine:
    """Folders that stand for /proc, /sys/fs/cgroup and /dev/shm. Use it with `with`.

    Processes are numbered from 101; each sees the machine through a /proc of its own, in which
    `self` is it. Of the machine's memory, `available` is what meminfo says.
    """

    def __init__(self, total: int = 64 * GIB, *, cgroup_max: int | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="kvspec-machine-", dir=_place()))
        self.shm, self.cgroup, self.proc = (self.root / n for n in ("shm", "cgroup", "proc"))
        for folder in (self.shm, self.cgroup, self.proc):
            folder.mkdir()
        self._views: dict[int, Path] = {}
        self._forked: list[Forked] = []
        self.total = self.available = total
        self.cgroup_max, self.cgroup_used = cgroup_max, 0
        self.show()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._forked:
            if not process.said.closed:
                process.kill()
        shutil.rmtree(self.root)

    def write(self, path: str, text: str) -> Path:
        """A file below the root."""
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="ascii")
        return place

    def show(self) -> None:
        """Say what there is."""
        self.write(
            "proc/meminfo",
            f"MemTotal: {self.total // 1024} kB\nMemFree: 0 kB\n"
            f"MemAvailable: {self.available // 1024} kB\n",
        )
        if self.cgroup_max is not None:
            self.write("cgroup/box/memory.max", f"{self.cgroup_max}\n")
            self.write("cgroup/box/memory.current", f"{self.cgroup_used}\n")

    def take(self, nbytes: int) -> None:
        """Somebody touches memory, which the kernel sees at once."""
        self.available -= nbytes
        self.cgroup_used += nbytes
        self.show()

    def process(self, pid: int, cgroup: str = "0::/box\n") -> Path:
        """A process, and its view of /proc."""
        self.write(f"proc/{pid}/stat", f"{pid} (a (name) here) S {' '.join(['0'] * 18)} {pid * 7}")
        self.write(f"proc/{pid}/cgroup", cgroup)
        view = self.root / f"proc-{pid}"
        view.mkdir()
        self._views[pid] = view
        for one, other in {(pid, each) for each in self._views} | {(n, pid) for n in self._views}:
            (self._views[one] / str(other)).symlink_to(self.proc / str(other))
        (view / "self").symlink_to(self.proc / str(pid))
        for name in ("meminfo", "sys"):
            (view / name).symlink_to(self.proc / name)
        return view

    def fork(self, child: Callable[[Callable[[object], None]], None]) -> "Forked":
        """A process that does not outlive the machine."""
        self._forked.append(Forked(child))
        return self._forked[-1]

    def files(self) -> dict[str, Path]:
        """Where a budget of process 101 finds things; the process is made if it is not there."""
        view = self.root / "proc-101"
        return {
            "proc": view if view.exists() else self.process(101),
            "cgroup": self.cgroup,
            "shm": self.shm,
        }

    def ledgers(self) -> list[str]:
        """What lies where /dev/shm would be."""
        return sorted(os.listdir(self.shm))


class SimulatedRank:
    """A process of a machine that reserves, maps and touches. `make` makes its budget."""

    def __init__(
        self, machine: Machine, make: Callable[..., Any], pid: int, apart: int = 0, **more: Any
    ) -> None:
        """Its mappings lie `apart` bytes from one another; at 0 the kernel makes one of them."""
        self.machine, self.pid, self.apart = machine, pid, apart
        self.budget = make(
            proc=machine.process(pid), cgroup=machine.cgroup, shm=machine.shm, **more
        )
        self.held: list[tuple[Any, int]] = []
        """Reservations and where they lie, 0 for not yet."""
        self.touched: dict[int, int] = {}
        """Address -> bytes of it that are touched."""
        self._next = 0x7F00_0000_0000

    def reserve(self, nbytes: int, kind: str = "mmap") -> int:
        """The number of the reservation."""
        self.held.append((self.budget.reserve(kind, nbytes), 0))
        return len(self.held) - 1

    def map(self, number: int) -> None:
        """Map what was reserved, and say so."""
        reservation, _ = self.held[number]
        address, self._next = self._next, self._next + reservation.nbytes + self.apart
        self.held[number] = reservation, address
        self.touched[address] = 0
        self.show()
        reservation.mapped(address, reservation.nbytes)

    def touch(self, number: int, nbytes: int) -> None:
        """Touch as much more of it."""
        _, address = self.held[number]
        self.touched[address] += nbytes
        self.show()
        self.machine.take(nbytes)

    def show(self) -> None:
        """Its smaps: neighbours are one mapping."""
        rows = [(at, r.nbytes, self.touched[at]) for r, at in self.held if at]
        merged: list[tuple[int, int, int]] = []
        for begin, size, resident in rows:
            if merged and sum(merged[-1][:2]) == begin:
                first, length, held = merged.pop()
                begin, size, resident = first, length + size, held + resident
            merged.append((begin, size, resident))
        text = "".join(area(*row) for row in [(0x1000, 4096, 4096), *merged])
        self.machine.write(f"proc/{self.pid}/smaps", text)


class Forked:
    """A forked process that runs `child(say)`: its id, and the lines that it says.

    It ends with status 0, or 1 if it raised. Its machine kills it if nobody waited for it.
    """

    def __init__(self, child: Callable[[Callable[[object], None]], None]) -> None:
        receiving, sending = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads, left in peace
            self.pid = os.fork()
        if self.pid == 0:
            os.close(receiving)
            _run(child, sending)
        os.close(sending)
        self.said = os.fdopen(receiving, encoding="utf-8")

    def wait(self) -> tuple[int, list[str]]:
        """How it ended, as `os.waitstatus_to_exitcode` says it, and what else it said."""
        with self.said:
            lines = self.said.read().splitlines()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), lines

    def kill(self) -> tuple[int, list[str]]:
        """Kill it, which nothing can keep off, and wait."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


def _run(child: Callable[[Callable[[object], None]], None], sending: int) -> NoReturn:
    def say(what: object) -> None:
        os.write(sending, f"{what}\n".encode())

    status = 1
    signal.alarm(30)  # whatever it waits for, it ends
    try:
        child(say)
        status = 0
    except BaseException as error:
        say(repr(error))
    finally:
        os._exit(status)
