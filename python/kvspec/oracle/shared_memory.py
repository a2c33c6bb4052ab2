"""Named segments of shared memory, with files and locks of the standard library. Spec: SHM.

The same names and the same locks as the core, so that either side can be the other process. Alive
is what somebody has a lock on; `_remove_if_alone` is the only place where a name goes. Python's own
`multiprocessing.shared_memory` is not used: its tracker would remove names at an exit (SHM-18).
"""

import atexit
import ctypes
import errno
import fcntl
import itertools
import mmap
import operator
import os
import re
import resource
import signal
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kvspec.errors import ContractError, HostMemoryError
from kvspec.oracle.boundary import memory_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from kvspec.interfaces.shared_memory import Reaped, SharedSegmentView

__all__ = ["SharedSegment"]

FOLDER = "/dev/shm"
LABEL = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAME = re.compile(rf"kvspec\.{LABEL.pattern}(\.[0-9]{{1,20}}){{3}}")
EXHAUSTION = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)


def _start_time() -> str:
    """Field 22 of /proc/self/stat; the second may have any character in it, but ends with `)`."""
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]


def _open(name: str, flags: int) -> int:
    return os.open(f"{FOLDER}/{name}", flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)


@contextmanager
def _out_of(what: str) -> Iterator[None]:
    """What the machine lacks inside is a HostMemoryError that says for what (SHM-5)."""
    try:
        yield
    except OSError as error:
        raise HostMemoryError(f"SHM-5: {what}: {error.strerror}") from None


class _Hold:
    """A lock on a segment and a mapping of it, which the handle and its tensors share."""

    def __init__(self, handle: "type[SharedSegment]", name: str, fd: int) -> None:
        self.handle, self.name, self.fd = handle, name, fd
        self.owner = os.getpid()
        self.pages: mmap.mmap | None = None
        self.bytes_of_tensors: list[weakref.ref[Any]] = []
        _open_at_exit.add(self)

    def map(self, nbytes: int, flags: int) -> None:
        with _out_of(f"{nbytes} bytes of {self.name} cannot be mapped"):
            self.pages = mmap.mmap(self.fd, nbytes, flags)

    def bytes(self) -> Any:
        """The bytes of the mapping, which keep this alive."""
        assert self.pages is not None

        kind: Any = type("Bytes", (ctypes.c_uint8 * len(self.pages),), {})
        held = kind.from_buffer(self.pages)
        held.hold = self
        return held

    def tensors(self) -> int:
        return sum(kept() is not None for kept in self.bytes_of_tensors)

    def leave(self) -> None:
        """Unlock, unmap and close; the name goes with the last one (SHM-8, SHM-9, SHM-16)."""
        if self.fd < 0:
            return
        if self.handle._is_owner(self.owner):
            self.handle._remove_if_alone(self.name, self.fd)
        if self.pages is not None:
            with suppress(BufferError):  # the bytes of the last tensor are about to go
                self.pages.close()
        os.close(self.fd)
        self.pages, self.fd = None, -1

    def __del__(self) -> None:
        self.leave()


_open_at_exit: "weakref.WeakSet[_Hold]" = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    for hold in list(_open_at_exit):
        hold.leave()


class SharedSegment:
    """A handle of one process on a segment (SHM-1, SHM-14)."""

    _serials: ClassVar[Iterator[int]] = itertools.count()
    _attached: ClassVar[int] = mmap.MAP_SHARED

    def __init__(self, hold: _Hold, nbytes: int) -> None:
        self._hold = hold
        self.name, self.nbytes = hold.name, nbytes

    # -- locks -----------------------------------------------------------------------------------

    @staticmethod
    def _leads_to(name: str, fd: int) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.lstat(f"{FOLDER}/{name}"), os.fstat(fd))
        return False

    @staticmethod
    def _lock(fd: int, kind: int) -> bool:
        """Whether the lock was to be had, without waiting (SHM-20)."""
        with suppress(BlockingIOError):
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return True
        return False

    @classmethod
    def _remove_if_alone(cls, name: str, fd: int) -> bool | None:
        """False if others hold it; True if the name went now, None if it was gone (SHM-9, SHM-14).

        A shared lock of this description is lost first, so of two that close at once the kernel
        makes one the last.
        """
        if not cls._lock(fd, fcntl.LOCK_EX):
            return False
        if not cls._leads_to(name, fd):
            return None
        os.unlink(f"{FOLDER}/{name}")
        return True

    @staticmethod
    def _is_owner(opened_by: int) -> bool:
        """Whether this process opened the handle, and did not inherit it (SHM-16)."""
        return opened_by == os.getpid()

    @staticmethod
    def _is_ours(fd: int) -> bool:
        found = os.fstat(fd)
        return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def create(cls, label: str, nbytes: int, populate: bool = False) -> Self:
        """A new segment of zeros, all of it reserved (SHM-1 to SHM-5, SHM-15)."""
        size = operator.index(nbytes)
        if not LABEL.fullmatch(label):
            raise ContractError(f"SHM-4: label '{label}' is not 1 to 64 of [A-Za-z0-9_-]")
        if size < 1:
            raise ContractError(f"SHM-4: {size} bytes were asked for, not 1 or more")
        cls.reap()
        with _out_of(f"no segment can be made in {FOLDER}"):
            stem, fd = cls._stem(label), None
            while fd is None:
                name = f"{stem}.{next(cls._serials)}"
                fd = cls._take_name(name)
        hold = _Hold(cls, name, fd)
        try:
            cls._reserve(fd, size)
            hold.map(size, mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0))
        except HostMemoryError:
            cls._give_up(hold)
            raise
        return cls(hold, size)

    @staticmethod
    def _stem(label: str) -> str:
        """A new name but for its serial (SHM-1)."""
        return f"kvspec.{label}.{os.getpid()}.{_start_time()}"

    @staticmethod
    def _give_up(hold: _Hold) -> None:
        hold.leave()

    @classmethod
    def _take_name(cls, name: str) -> int | None:
        """A locked file, or None if the name is another's or a reaper took it for dead."""
        try:
            fd = _open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        except FileExistsError:
            return None
        if cls._lock(fd, fcntl.LOCK_SH) and cls._leads_to(name, fd):
            return fd
        os.close(fd)
        return None

    @staticmethod
    def _reserve(fd: int, nbytes: int) -> None:
        """All of the size, or nothing of it and HostMemoryError (SHM-3, SHM-5)."""
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and limit < nbytes:
            raise HostMemoryError(f"SHM-5: {nbytes} bytes were asked for, a file may have {limit}")
        folder = os.fstatvfs(fd)
        free = folder.f_bavail * folder.f_frsize
        with _out_of(f"{nbytes} bytes were asked for, {free} are free in {FOLDER}"):
            if folder.f_blocks and free < nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            try:
                os.posix_fallocate(fd, 0, nbytes)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @classmethod
    def attach(cls, name: str) -> Self:
        """Another handle on a segment that somebody holds (SHM-6, SHM-7)."""
        if not NAME.fullmatch(name):
            raise ContractError(
                f"SHM-7: '{name}' is not kvspec.<label>.<pid>.<start time>.<serial>"
            )
        hold = _Hold(cls, name, cls._require_alive(name))
        nbytes = os.fstat(hold.fd).st_size
        try:
            if nbytes == 0:
                raise ContractError(f"SHM-7: segment {name} is not complete")
            hold.map(nbytes, cls._attached)
        except (ContractError, HostMemoryError):
            cls._give_up(hold)
            raise
        return cls(hold, nbytes)

    @classmethod
    def _require_alive(cls, name: str) -> int:
        try:
            fd = _open(name, os.O_RDWR)
        except OSError as error:
            if error.errno in EXHAUSTION:
                text = f"SHM-5: segment {name} cannot be opened: {error.strerror}"
                raise HostMemoryError(text) from None
            raise ContractError(f"SHM-7: segment {name}: {error.strerror}") from None
        if not cls._is_ours(fd):
            fault = "is no file of this user"
        elif (
            cls._remove_if_alone(name, fd) is not False
            or not cls._lock(fd, fcntl.LOCK_SH)
            or not cls._leads_to(name, fd)
        ):
            fault = "is held by nobody any more"
        else:
            return fd
        os.close(fd)
        raise ContractError(f"SHM-7: segment {name} {fault}")

    @classmethod
    def reap(cls) -> "list[Reaped]":
        """Remove what no process holds (SHM-13, SHM-14)."""
        from kvspec.interfaces.shared_memory import Reaped

        reaped = []
        for name in cls._candidates():
            try:
                fd = _open(name, os.O_RDONLY)
            except OSError as error:
                if error.errno in EXHAUSTION:
                    text = f"SHM-5: {name} cannot be opened: {error.strerror}"
                    raise HostMemoryError(text) from None
                continue
            found = os.fstat(fd)
            if cls._is_ours(fd) and cls._remove_if_alone(name, fd):
                reaped.append(Reaped(name, found.st_size))
            os.close(fd)
        return reaped

    @staticmethod
    def _candidates() -> list[str]:
        with _out_of(f"{FOLDER} cannot be listed"):
            return sorted(name for name in os.listdir(FOLDER) if NAME.fullmatch(name))

    # -- a handle --------------------------------------------------------------------------------

    def _open_for(self, call: str) -> _Hold:
        if self._hold.fd < 0:
            raise ContractError(f"SHM-10: {call} of {self.name}, which is closed")
        return self._hold

    @property
    def address(self) -> int:
        """Where it is mapped (SHM-10)."""
        return ctypes.addressof(self._open_for("address").bytes())

    def tensor(self) -> "Tensor":
        """uint8 [nbytes] over the mapping (SHM-10, SHM-12)."""
        held = self._open_for("tensor").bytes()
        self._hold.bytes_of_tensors.append(weakref.ref(held))
        return memory_tensor(held)

    def close(self) -> None:
        """Give the handle back, unless a tensor needs it (SHM-8 to SHM-11)."""
        tensors = self._hold.tensors()
        if tensors and self._hold.fd >= 0:
            raise ContractError(f"SHM-11: {tensors} tensors over {self.name} are alive")
        self._hold.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()

    def __getstate__(self) -> str:
        return self._open_for("a copy").name

    def __setstate__(self, name: str) -> None:
        """One more owner (SHM-17)."""
        self.__dict__.update(vars(type(self).attach(name)))

    def view(self) -> "SharedSegmentView":
        """The abstract state."""
        from kvspec.interfaces.shared_memory import SharedSegmentView

        closed = self._hold.fd < 0
        there = os.path.lexists(f"{FOLDER}/{self.name}")
        linked = there if closed else self._leads_to(self.name, self._hold.fd)
        tensors = 0 if closed else self._hold.tensors()
        return SharedSegmentView(closed, linked, tensors, self._is_owner(self._hold.owner))

    def check(self) -> None:
        """Raise ContractError if the name leads elsewhere or the size changed (SHM-19)."""
        if self._hold.fd < 0:
            return
        if not self._leads_to(self.name, self._hold.fd):
            raise ContractError(f"SHM-14: segment {self.name} is held, and its name is gone")
        size = os.fstat(self._hold.fd).st_size
        if size != self.nbytes:
            text = f"SHM-2: segment {self.name} has {size} bytes, not {self.nbytes}"
            raise ContractError(text)
