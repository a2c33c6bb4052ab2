"""Who has reserved what: one small file for each process, in /dev/shm (BUDGET-5 to BUDGET-9).

A file `kvspec-budget.<pid>.<start time>` has a head and then entries of 32 bytes:

    head    magic (8 bytes), pid, start time, whether the last cgroup is the root of all, and
            24 numbers of cgroups, 8 bytes each
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
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple, TypeAlias, get_args
from weakref import WeakValueDictionary

from kvspec.memory_budget.kernel import Cgroups

__all__ = ["KINDS", "PREFIX", "Entry", "Kind", "Ledger", "Rank", "folder_locked", "others"]

Kind: TypeAlias = Literal["torch", "heap", "mmap", "shm", "pinned"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PREFIX = "kvspec-budget."

_MAGIC = b"KVBUDG01"
_CGROUPS = 24
_HEAD = struct.Struct(f"<8s3Q{_CGROUPS}Q")
_ENTRY = struct.Struct("<QQQHHI")
_MAPPED = struct.Struct("<QQ")


class Entry(NamedTuple):
    """A reservation that is alive."""

    nbytes: int
    address: int
    """0 until it is mapped."""
    mapped: int
    kind: Kind
    budget: int
    """Which of the process's budgets it was made through."""


class Rank(NamedTuple):
    """A live process and what it has reserved."""

    pid: int
    start: int
    cgroups: tuple[int, ...]
    whole: bool
    entries: tuple[Entry, ...]
    own: bool = False

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
        return _parsed(os.pread(descriptor, told.st_size, 0))
    finally:
        os.close(descriptor)


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _parsed(image: bytes | bytearray, own: bool = False) -> Rank | None:
    if len(image) < _HEAD.size or image[: len(_MAGIC)] != _MAGIC:
        return None
    _, pid, start, whole, *cgroups = _HEAD.unpack_from(image)
    body = memoryview(image)[_HEAD.size :]
    rows = _ENTRY.iter_unpack(body[: len(body) // _ENTRY.size * _ENTRY.size])
    entries = tuple(
        Entry(nbytes, address, mapped, KINDS[kind], budget)
        for nbytes, address, mapped, kind, _, budget in rows
        if nbytes and kind < len(KINDS)
    )
    return Rank(pid, start, tuple(filter(None, cgroups)), bool(whole), entries, own)


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
        self._image = bytearray(_HEAD.pack(_MAGIC, pid, start, whole, *padded))
        self._free: list[int] = []
        self._used = 0
        self._file: int | None = None
        self._lock = threading.Lock()
        self._said: deque[tuple[int, int, int] | int] = deque()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Alone among the threads."""
        with self._lock:
            self._do_what_was_said()
            yield
        self._catch_up()

    def rank(self) -> Rank:
        """This process. Inside `held`."""
        rank = _parsed(self._image, own=True)
        assert rank is not None
        return rank

    def file_name(self) -> str | None:
        """Of its file, while it has one."""
        return None if self._file is None else self.name

    def written(self) -> Rank | None:
        """What its file says, None while it has none: to be compared with `rank`."""
        if self._file is None:
            return None
        return _parsed(os.pread(self._file, os.fstat(self._file).st_size, 0), own=True)

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
        _ENTRY.pack_into(self._image, place, nbytes, 0, 0, KINDS.index(kind), 0, budget)
        self._used += 1
        if self._file is None:
            self._create()
        else:
            self._write(place, place + _ENTRY.size)
        return place

    def mapped(self, place: int, address: int, nbytes: int) -> None:
        """Note where a reservation lies. Never waits."""
        if place:
            self._said.append((place, address, nbytes))
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
            if isinstance(said, tuple):
                place, address, nbytes = said
                _MAPPED.pack_into(self._image, place + 8, address, nbytes)
                self._write(place + 8, place + 24)
                continue
            self._image[said : said + 8] = bytes(8)  # one word: a reader sees all of it or nothing
            self._free.append(said)
            self._used -= 1
            if self._used:
                self._write(said, said + 8)
            else:
                self.remove()

    def _create(self) -> None:
        """A name that is taken by a live process of another namespace gets a number."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        base = ".".join(self.name.split(".")[:3])
        for number in range(100):
            self.name = f"{base}.{number}" if number else base
            try:
                self._file = os.open(f"{self.folder}/{self.name}", flags, 0o644)
                break
            except FileExistsError:
                continue
            except OSError as error:
                self.alone = f"{self.folder}: {error.strerror}"
                return
        if self._file is not None:
            self.alone = None
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(self._file, 0o644)
            self._write(0, len(self._image))

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
