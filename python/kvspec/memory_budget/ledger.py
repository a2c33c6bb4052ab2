"""Who has reserved what: one small file for each process, in /dev/shm (BUDGET-5 to BUDGET-9).

A file `kvspec-budget.<pid>.<start time>` has a head and then entries of 32 bytes:

    head    magic (8 bytes); pid, start time, whether the last cgroup is the root of all, four sums
            of the entries (`Totals`), 24 numbers of cgroups, 8 bytes each
    entry   bytes reserved (0: the entry is free), address, bytes mapped, 8 bytes each; kind (2),
            nothing (2), number of the budget (4)

Its owner holds `flock` on it as long as it lives, which the kernel gives up at any death, in any
namespace: a file whose lock is free is nobody's, and whoever sees it removes it. Files are made,
read and judged by under `flock` on the folder.
"""

import atexit
import fcntl
import os
import stat
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Self, TypeAlias, get_args
from weakref import WeakValueDictionary

from kvspec.memory_budget.kernel import Cgroups

__all__ = [
    "KINDS",
    "PREFIX",
    "Entry",
    "Kind",
    "Ledger",
    "Rank",
    "Totals",
    "folder_locked",
    "ledgers",
    "others",
    "parsed",
]

Kind: TypeAlias = Literal["torch", "heap", "mmap", "shm", "pinned"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PREFIX = "kvspec-budget."

_MAGIC = b"KVBUDG01"
_CGROUPS = 24
_HEAD = struct.Struct(f"<8s3Q4Q{_CGROUPS}Q")
_TOTALS = struct.Struct("<4Q")
_TOTALS_AT = 32
_ENTRY = struct.Struct("<QQQHHI")


class Entry(NamedTuple):
    """A reservation that is alive."""

    nbytes: int
    address: int
    """0 until it is mapped."""
    mapped: int
    kind: Kind
    budget: int
    """Which of the process's budgets it was made through."""


class Totals(NamedTuple):
    """Sums of a process's entries, in bytes, which it keeps so that nobody has to add them up."""

    reserved: int = 0
    shm: int = 0
    """Of kind shm."""
    pinned: int = 0
    """Of kind pinned."""
    uncommitted: int = 0
    """Not mapped, or of kind shm, which the kernel commits page by page."""

    @classmethod
    def of(cls, entry: Entry) -> Self:
        """What an entry adds."""
        n = entry.nbytes
        by_page = entry.kind == "shm" or not entry.mapped
        return cls(n, n * (entry.kind == "shm"), n * (entry.kind == "pinned"), n * by_page)


@dataclass(frozen=True)
class Rank:
    """A live process and what it has reserved."""

    pid: int
    start: int
    cgroups: tuple[int, ...]
    whole: bool
    totals: Totals
    image: bytes
    """Of its entries."""
    own: bool = False

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """O(them)."""
        rows = _ENTRY.iter_unpack(self.image[: len(self.image) // _ENTRY.size * _ENTRY.size])
        return tuple(
            Entry(nbytes, address, mapped, KINDS[kind], budget)
            for nbytes, address, mapped, kind, _, budget in rows
            if nbytes and kind < len(KINDS)
        )

    def may_be_in(self, cgroup: int) -> bool:
        """Whether it counts in a cgroup: yes, unless it is known to be in others only."""
        return self.own or cgroup in self.cgroups or not self.whole


@contextmanager
def folder_locked(folder: str) -> Iterator[None]:
    """Alone among the processes that use the folder; nothing if it cannot be opened.

    The lock is given up by name: a process forked meanwhile has a copy of the descriptor.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    _folders_open.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        _folders_open.discard(descriptor)
        os.close(descriptor)


def others(folder: str, own: str | None) -> list[Rank]:
    """The live processes but this one; files of the dead are removed. Under the folder's lock."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.startswith(PREFIX))
    except OSError:
        return []
    found = (_read(f"{folder}/{name}") for name in names if name != own)
    return [rank for rank in found if rank is not None]


def _read(path: str) -> Rank | None:
    """What a live process wrote; None of one that is dead, or that we may not read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        told = os.fstat(descriptor)
        if not stat.S_ISREG(told.st_mode):
            return None
        if _is_free(descriptor):
            with suppress(OSError):  # another user's, in a folder with the sticky bit
                os.unlink(path)
            return None
        return parsed(os.pread(descriptor, told.st_size, 0))
    finally:
        os.close(descriptor)


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def parsed(image: bytes | bytearray, own: bool = False) -> Rank | None:
    """What a ledger's file says; None if it is none, or not written yet."""
    if len(image) < _HEAD.size or image[: len(_MAGIC)] != _MAGIC:
        return None
    _, pid, start, whole, *rest = _HEAD.unpack_from(image)
    totals, cgroups = Totals(*rest[:4]), tuple(filter(None, rest[4:]))
    return Rank(pid, start, cgroups, bool(whole), totals, bytes(image[_HEAD.size :]), own)


class Ledger:
    """What this process has reserved in one folder: in memory, and in a file where it can be.

    `mapped` and `dropped` never wait: they come from finalizers too, in the middle of anything.
    What they say is done by whoever has the lock, at the latest when it gives it up.
    """

    def __init__(self, folder: str, pid: int, start: int, cgroups: Cgroups) -> None:
        self.folder, self.name = folder, f"{PREFIX}{pid}.{start}"
        self.alone: str | None = None
        """Why others cannot see it, while it has entries and no file."""
        self.disowned = False
        """In a process that was forked: it is the parent's."""
        numbers = cgroups.numbers[:_CGROUPS]
        whole = cgroups.whole and len(numbers) == len(cgroups.numbers) and all(numbers)
        padded = (*numbers, *[0] * (_CGROUPS - len(numbers)))
        self._image = bytearray(_HEAD.pack(_MAGIC, pid, start, whole, *Totals(), *padded))
        self._totals = Totals()
        self._of_budget: Counter[int] = Counter()
        self._free: list[int] = []
        self._used = 0
        self._file: int | None = None
        self._lock = threading.Lock()
        self._said: deque[tuple[int, tuple[int, int]] | int] = deque()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Alone among the threads."""
        with self._lock:
            self._do_what_was_said()
            yield
        self._catch_up()

    def rank(self) -> Rank:
        """This process. Inside `held`."""
        rank = parsed(self._image, own=True)
        assert rank is not None
        return rank

    def held_by(self, budget: int) -> int:
        """Bytes that were reserved through a budget. Inside `held`."""
        return self._of_budget[budget]

    def file_name(self) -> str | None:
        """Of its file, while it has one."""
        return None if self._file is None else self.name

    def written(self) -> Rank | None:
        """What its file says, None while it has none: to be compared with `rank`."""
        if self._file is None:
            return None
        return parsed(os.pread(self._file, os.fstat(self._file).st_size, 0), own=True)

    def add(self, kind: Kind, nbytes: int, budget: int) -> int:
        """Record a reservation; where it stands. Inside `held` and the folder's lock.

        One of nothing stands nowhere: 0.
        """
        if not nbytes:
            return 0
        if not self._free:
            self._free.append(len(self._image))
            self._image += bytes(_ENTRY.size)
        place = self._free.pop()
        self._put(place, Entry(nbytes, 0, 0, kind, budget))
        self._used += 1
        if self._file is None:
            self._create()
        return place

    def mapped(self, place: int, address: int, nbytes: int) -> None:
        """Note where a reservation lies. Never waits."""
        if place:
            self._said.append((place, (address, nbytes)))
        self._catch_up()

    def dropped(self, place: int) -> None:
        """Take a reservation off. Never waits."""
        if place:
            self._said.append(place)
        self._catch_up()

    def _catch_up(self) -> None:
        while self._said and self._lock.acquire(blocking=False):
            try:
                self._do_what_was_said()
            finally:
                self._lock.release()

    def _do_what_was_said(self) -> None:
        while self._said:
            said = self._said.popleft()
            if self.disowned:
                continue
            place, lies = said if isinstance(said, tuple) else (said, None)
            entry = self._at(place)
            if lies is not None:
                self._put(place, entry._replace(address=lies[0], mapped=lies[1]))
                continue
            self._put(place, entry._replace(nbytes=0))
            self._free.append(place)
            self._used -= 1
            if not self._used:
                self.remove()

    def _at(self, place: int) -> Entry:
        nbytes, address, mapped, kind, _, budget = _ENTRY.unpack_from(self._image, place)
        return Entry(nbytes, address, mapped, KINDS[kind], budget)

    def _put(self, place: int, entry: Entry) -> None:
        """Write an entry and the sums. Of either a reader may see the old or the new."""
        old, new = Totals.of(self._at(place)), Totals.of(entry)
        self._totals = Totals(*(t - o + n for t, o, n in zip(self._totals, old, new, strict=True)))
        self._of_budget[entry.budget] += new.reserved - old.reserved
        nbytes, address, mapped, kind, budget = entry
        row = nbytes, address, mapped, KINDS.index(kind), 0, budget
        _ENTRY.pack_into(self._image, place, *row)
        _TOTALS.pack_into(self._image, _TOTALS_AT, *self._totals)
        self._write(place, place + _ENTRY.size)
        self._write(_TOTALS_AT, _TOTALS_AT + _TOTALS.size)

    def _create(self) -> None:
        """A name that is taken by a live process of another namespace gets a number."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        base = ".".join(self.name.split(".")[:3])
        for number in range(100):
            self.name = f"{base}.{number}" if number else base
            try:
                self._file = os.open(f"{self.folder}/{self.name}", flags, 0o644)
            except FileExistsError as error:
                self.alone = f"{self.folder}: {error.strerror}"
                continue
            except OSError as error:
                self.alone = f"{self.folder}: {error.strerror}"
                return
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(self._file, 0o644)  # whatever the mask: other users count it too
            self.alone = None
            self._write(0, len(self._image))
            return

    def _write(self, begin: int, end: int) -> None:
        if self._file is None:
            return
        try:
            os.pwrite(self._file, self._image[begin:end], begin)
        except OSError as error:  # a full tmpfs
            self.remove()
            self.alone = f"{self.folder}: {error.strerror}"

    def remove(self) -> None:
        """Take the file away; the next reservation makes a new one."""
        if self._file is not None:
            with suppress(OSError):
                os.unlink(f"{self.folder}/{self.name}")
            os.close(self._file)
        self._file, self.alone = None, None

    def disown(self) -> None:
        """After a fork: leave file and lock to the parent."""
        if self._file is not None:
            os.close(self._file)
        self._file, self._lock, self.disowned = None, threading.Lock(), True
        self._said.clear()


ledgers: WeakValueDictionary[tuple[str, str], Ledger] = WeakValueDictionary()
"""(where /proc is, folder) -> the ledger of this process."""
_folders_open: set[int] = set()


def _after_fork() -> None:
    for ledger in list(ledgers.values()):
        ledger.disown()
    ledgers.clear()
    for descriptor in _folders_open:
        os.close(descriptor)
    _folders_open.clear()


def _at_exit() -> None:
    for ledger in list(ledgers.values()):
        ledger.remove()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
