"""A machine whose kernel says what a test wants, and processes on it that reserve and touch."""

import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

__all__ = ["GIB", "MIB", "Machine", "SimulatedRank", "area", "forked", "wait_for"]

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


class Machine:
    """Folders that stand for /proc, /sys/fs/cgroup and /dev/shm. Use it with `with`.

    Processes are numbered from 101; each sees the machine through a /proc of its own, in which
    `self` is it. Of the machine's memory, `available` is what meminfo says.
    """

    def __init__(self, total: int = 64 * GIB, *, cgroup_max: int | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="kvspec-machine-"))
        self.shm, self.cgroup, self.proc = (self.root / n for n in ("shm", "cgroup", "proc"))
        for folder in (self.shm, self.cgroup, self.proc):
            folder.mkdir()
        self._views: dict[int, Path] = {}
        self.total = self.available = total
        self.cgroup_max, self.cgroup_used = cgroup_max, 0
        self.show()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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


def forked(child: Callable[[Callable[[object], None]], None]) -> tuple[int, Any]:
    """Run `child(say)` in a forked process: its id, and a file of the lines that it says.

    It ends with status 0, or 1 if it raised; `wait_for` waits for it.
    """
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of torch, which it leaves be
        pid = os.fork()
    if pid == 0:
        status = 1
        signal.alarm(30)  # whatever it waits for, it ends
        try:
            os.close(receiving)
            child(lambda what: os.write(sending, f"{what}\n".encode()) and None)
            status = 0
        except BaseException as error:
            os.write(sending, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    os.close(sending)
    return pid, os.fdopen(receiving, encoding="utf-8")


def wait_for(process: tuple[int, Any]) -> tuple[int, list[str]]:
    """How a forked process ended, as `os.waitstatus_to_exitcode` says it, and what it said."""
    pid, said = process
    with said:
        lines = said.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), lines
