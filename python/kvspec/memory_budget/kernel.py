"""What the kernel says there is: limits, and what is used of them (BUDGET-1, BUDGET-2).

Every number is read from a file that can be named. A file that is missing, or that says no number,
means that there is no such limit: nothing is invented.

    limit     where                                                              for
    ram       meminfo: MemTotal, MemAvailable                                    every kind
    commit    meminfo: CommitLimit, Committed_AS, if sys/vm/overcommit_memory    every kind
              is 2
    cgroup    memory.max and memory.high, memory.current, memory.stat of the     every kind
              process's cgroup and each above it (version 1: memory.limit_in_bytes,
              memory.usage_in_bytes, hierarchical_memory_limit)
    shm       statvfs of /dev/shm                                                shm
    memlock   self/limits: RLIMIT_MEMLOCK, self/status: VmLck; none with         pinned
              CAP_IPC_LOCK in the initial user namespace
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, TypeAlias

__all__ = ["Area", "Cgroups", "Kernel", "LimitName", "Reading"]

LimitName: TypeAlias = Literal["ram", "commit", "cgroup", "shm", "memlock", "user"]

_CAP_IPC_LOCK = 14
_UNLIMITED = 1 << 62
"""Version 1 says "no limit" as the largest number of pages, which depends on their size."""
_MOUNTED = "/sys/fs/cgroup"


class Reading(NamedTuple):
    """A limit as it was read."""

    name: LimitName
    source: str
    """The file that it stands in."""
    limit: int | None
    """In bytes; None where there is none."""
    used: int | None
    """In bytes, without what the kernel would give back for the asking; None if not said."""
    cgroup: int = 0
    """The number that the kernel has for a cgroup, whoever looks at it."""


class Cgroups(NamedTuple):
    """The memory cgroups of a process, its own first."""

    folders: tuple[str, ...] = ()
    version: int = 2
    numbers: tuple[int, ...] = ()
    """Their inodes, which are the same in every namespace; 0 for one that cannot be seen."""
    whole: bool = False
    """Whether the last is the root of all, and not that of a namespace."""


class Area(NamedTuple):
    """A mapping of a process."""

    begin: int
    end: int
    resident: int
    """Bytes that have physical pages; of a file in /dev/shm, of the file, mapped or not."""
    locked: bool
    file: int = 0
    """The inode, of a file in /dev/shm."""


class Kernel:
    """Reads the files of one process. `proc`, `cgroup` and `shm` say where they are."""

    def __init__(self, proc: str, cgroup: str, shm: str) -> None:
        self.proc, self.cgroup, self.shm = proc, cgroup, shm
        self.files_read = 0
        """How many files were opened to be read, for whoever counts (BUDGET-14)."""
        self._mounts: list[tuple[str, str, int]] | None = None

    def text(self, path: str) -> str | None:
        """What a file says, or None if it cannot be read."""
        self.files_read += 1
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                return file.read()
        except OSError:
            return None

    def identity(self) -> tuple[int, int]:
        """Process id, and start in ticks since the machine's: together nobody else's, ever."""
        return self._start("self") or (os.getpid(), 0)

    def is_same(self, pid: int, start: int) -> bool:
        """Whether `proc` shows this process under this id: in other namespaces it may not."""
        return self._start(str(pid)) == (pid, start)

    def _start(self, who: str) -> tuple[int, int] | None:
        text = self.text(f"{self.proc}/{who}/stat") or ""
        fields = text.rpartition(")")[2].split()
        return (int(text.split()[0]), int(fields[19])) if len(fields) > 19 else None

    def readings(self, cgroups: Cgroups) -> list[Reading]:
        """Every limit now. O(cgroups above the process) small files."""
        memory = self._table(f"{self.proc}/meminfo", 1024)
        of_version = self._version_2 if cgroups.version == 2 else self._version_1
        pairs = zip(cgroups.folders, cgroups.numbers, strict=True)
        found = [of_version(folder)._replace(cgroup=number) for folder, number in pairs]
        return [
            self._ram(memory),
            self._commit(memory),
            *(found or [Reading("cgroup", self.cgroup, None, None)]),
            self._shm(),
            self._memlock(),
        ]

    def _ram(self, memory: dict[str, int]) -> Reading:
        source = f"{self.proc}/meminfo"
        total, available = memory.get("MemTotal"), memory.get("MemAvailable")
        if total is None or available is None:
            return Reading("ram", source, None, None)
        return Reading("ram", source, total, total - available)

    def _commit(self, memory: dict[str, int]) -> Reading:
        """A limit only where the kernel was told never to overcommit."""
        source = f"{self.proc}/meminfo"
        strict = (self.text(f"{self.proc}/sys/vm/overcommit_memory") or "").strip() == "2"
        limit, used = memory.get("CommitLimit"), memory.get("Committed_AS")
        return Reading("commit", source, *((limit, used) if strict else (None, None)))

    def _shm(self) -> Reading:
        try:
            told = os.statvfs(self.shm)
        except OSError:
            return Reading("shm", self.shm, None, None)
        limit = told.f_blocks * told.f_frsize
        return Reading("shm", self.shm, limit or None, limit - told.f_bavail * told.f_frsize)

    def _memlock(self) -> Reading:
        source = f"{self.proc}/self/limits"
        said = re.search(r"^Max locked memory +(\d+)", self.text(source) or "", re.M)
        if said is None:
            return Reading("memlock", source, None, None)
        status = self.text(f"{self.proc}/self/status") or ""
        mask = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.M)
        if mask and int(mask[1], 16) >> _CAP_IPC_LOCK & 1 and self._in_initial_namespace():
            return Reading("memlock", source, None, None)
        locked = re.search(r"^VmLck:\s*(\d+) kB", status, re.M)
        return Reading("memlock", source, int(said[1]), int(locked[1]) * 1024 if locked else None)

    def _in_initial_namespace(self) -> bool:
        """Capabilities of another user namespace lift no limit."""
        users = self.text(f"{self.proc}/self/uid_map")
        return users is None or users.split() == ["0", "0", str(2**32 - 1)]

    def cgroups(self) -> Cgroups:
        """The cgroups whose limits hold for this process, found through its mounts."""
        paths: dict[int, str] = {}
        for line in (self.text(f"{self.proc}/self/cgroup") or "").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if "memory" in controllers.split(","):
                paths[1] = path
            elif number == "0" and not controllers:
                paths[2] = path
        if not paths:
            return Cgroups()
        version = min(paths)  # beside version 1, version 2 has no memory controller
        folders = self._folders(paths[version], version)
        root_only = "cgroup.sane_behavior" if version == 1 else None
        top = folders[-1]
        whole = (
            os.path.exists(f"{top}/{root_only}")
            if root_only
            else os.path.isdir(top) and not os.path.exists(f"{top}/cgroup.type")
        )
        return Cgroups(folders, version, tuple(map(_inode, folders)), whole)

    def _folders(self, path: str, version: int) -> tuple[str, ...]:
        """From the process's own up to the highest that is mounted."""
        if self._mounts is None:
            self._mounts = list(self._read_mounts())
        fallback = ("/", self.cgroup if version == 2 else f"{self.cgroup}/memory", version)
        mounts = [each for each in self._mounts if each[2] == version] or [fallback]
        root, point, _ = next((each for each in mounts if _is_below(path, each[0])), mounts[0])
        inner = path[len(root) :] if root != "/" else path
        if not _is_below(path, root) or ".." in path.split("/"):
            inner = ""  # it lies outside of what is mounted, whose root is all that can be seen
        folders = [point]
        for name in filter(None, inner.split("/")):
            folders.append(f"{folders[-1]}/{name}")
        return tuple(reversed(folders))

    def _read_mounts(self) -> Iterator[tuple[str, str, int]]:
        """Root, mount point and version of each hierarchy that may have the memory controller."""
        for line in (self.text(f"{self.proc}/self/mountinfo") or "").splitlines():
            head, _, tail = line.partition(" - ")
            fields, kind = head.split(" "), tail.split(" ")
            if len(fields) < 5 or len(kind) < 3:
                continue
            root, point = map(_unescaped, fields[3:5])
            if point == _MOUNTED or point.startswith(_MOUNTED + "/"):
                point = self.cgroup + point[len(_MOUNTED) :]
            if kind[0] == "cgroup2":
                yield root, point, 2
            elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
                yield root, point, 1

    def _version_2(self, folder: str) -> Reading:
        given = [(self._number(f"{folder}/{name}"), name) for name in ("memory.max", "memory.high")]
        limits = [(limit, name) for limit, name in given if limit is not None]
        if not limits:
            return Reading("cgroup", f"{folder}/memory.max", None, None)
        limit, name = min(limits)
        used = self._number(f"{folder}/memory.current")
        stat = self._table(f"{folder}/memory.stat")
        return Reading("cgroup", f"{folder}/{name}", limit, self._firm(used, stat, ""))

    def _version_1(self, folder: str) -> Reading:
        source = f"{folder}/memory.limit_in_bytes"
        stat = self._table(f"{folder}/memory.stat")
        given = (self._number(source), stat.get("hierarchical_memory_limit"))
        limits = [limit for limit in given if limit is not None and limit < _UNLIMITED]
        if not limits:
            return Reading("cgroup", source, None, None)
        used = self._number(f"{folder}/memory.usage_in_bytes")
        prefix = "total_" if "total_inactive_file" in stat else ""
        return Reading("cgroup", source, min(limits), self._firm(used, stat, prefix))

    def _firm(self, used: int | None, stat: dict[str, int], prefix: str) -> int | None:
        """What is used without the file pages that the kernel drops before it kills (BUDGET-2).

        These are on the two lists of file pages. `file`, or `cache` of version 1, has shared memory
        too, which can go nowhere without swap, and pages that are locked.
        """
        if used is None:
            return None
        lists = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
        return max(0, used - lists)

    def _number(self, path: str) -> int | None:
        text = (self.text(path) or "").strip()
        return int(text) if text.isdecimal() else None

    def _table(self, path: str, unit: int = 1) -> dict[str, int]:
        """Lines of a name and a number."""
        rows = (line.split() for line in (self.text(path) or "").splitlines())
        pairs = ((row[0].rstrip(":"), row[1]) for row in rows if len(row) > 1)
        return {name: int(number) * unit for name, number in pairs if number.isdecimal()}

    def areas(self, who: str) -> list[Area] | None:
        """The mappings of a process, by address; None if it does not let us see them."""
        text = self.text(f"{self.proc}/{who}/smaps")
        return None if text is None else list(_areas(text.splitlines(), self._allocated))

    def _allocated(self, path: str, inode: str) -> int | None:
        """Bytes that a file of /dev/shm has, mapped or not; None if it is none or was removed."""
        folder, _, name = path.rpartition("/")
        if folder not in ("/dev/shm", self.shm):
            return None
        try:
            told = os.stat(f"{self.shm}/{name}")
        except OSError:
            return None
        return told.st_blocks * 512 if str(told.st_ino) == inode else None


def _areas(lines: Iterable[str], allocated: Callable[[str, str], int | None]) -> Iterator[Area]:
    """Of each mapping smaps has a head, then lines "Name: value", VmFlags the last of them."""
    head: list[str] = []
    resident = 0
    for line in lines:
        if line.startswith("Rss:"):
            resident = int(line.split()[1]) * 1024
        elif line.startswith("VmFlags:"):
            begin, end = (int(number, 16) for number in head[0].split("-"))
            of_file = allocated(head[5], head[4]) if len(head) > 5 else None
            if of_file is None:
                yield Area(begin, end, resident, " lo" in line)
            else:
                yield Area(begin, end, of_file, " lo" in line, int(head[4]))
        elif not line.split(" ", 1)[0].endswith(":"):
            head, resident = line.split(maxsplit=5), 0


def _is_below(path: str, root: str) -> bool:
    return root == "/" or path == root or path.startswith(root + "/")


def _unescaped(path: str) -> str:
    """mountinfo has blanks as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0
