"""What tests of segments use: other processes, and files that play them. Spec: SHM."""

import fcntl
import gc
import itertools
import os
import pickle
import re
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import reached, watch_made
from kvspec.errors import ContractError, HostMemoryError
from kvspec.interfaces.shared_memory import Reaped, SharedSegment

__all__ = [
    "FOLDER",
    "NO_PROCESS",
    "Error",
    "SegmentBench",
    "descriptor_count",
    "error_of",
    "in_child",
    "locked",
    "names_of",
    "planted",
    "refused_with",
    "serials",
    "start_time",
    "waits_for",
]

FOLDER = Path("/dev/shm")
NO_PROCESS = 2**22
"""No process ever has this number: it is the greatest limit there is."""

Error = type[ContractError] | type[HostMemoryError]
serials = itertools.count()


def names_of(label: str) -> list[str]:
    """What is in /dev/shm of this label, dead or alive."""
    return sorted(name for name in os.listdir(FOLDER) if name.startswith(f"kvspec.{label}."))


@contextmanager
def planted(
    label: str, nbytes: int = 100, pid: int = 1, lock: int = fcntl.LOCK_SH
) -> Iterator[tuple[str, int]]:
    """A segment of another process: its name, and the descriptor that has the lock on it."""
    name = f"kvspec.{label}.{pid}.1.{next(serials)}"
    fd = os.open(FOLDER / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, lock)
        if nbytes:
            os.posix_fallocate(fd, 0, nbytes)
        yield name, fd
    finally:
        os.close(fd)
        (FOLDER / name).unlink(missing_ok=True)


def error_of(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def refused_with(kind: Error, clause_id: str, call: Callable[[], object]) -> str:
    """The text of the error, which is of this kind and names this clause."""
    error = error_of(call)
    assert type(error) is kind, repr(error)
    assert str(error).startswith(f"{clause_id}: "), str(error)
    return str(error)


def descriptor_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def locked(name: str) -> bool:
    """Whether somebody has a lock on it."""
    fd = os.open(FOLDER / name, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def in_child(action: Callable[[], object]) -> None:
    """Run it in a forked child, which dies without cleaning up, and fail as it does."""
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads; none has a lock
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        before, error = Counter(reached), ""
        try:
            action()
        except BaseException as raised:
            error = f"in the child: {raised!r}"
        os.write(send, pickle.dumps((error, reached - before)))
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert answer, "the child died"
    error, counted = pickle.loads(answer)
    reached.update(counted)
    assert not error, error


def waits_for(call: Callable[[], object], fd: int) -> bool:
    """Whether the call waits for the lock of `fd`, which is given back if it does."""
    inode = os.fstat(fd).st_ino
    thread = threading.Thread(target=error_of, args=[call])
    thread.start()
    waited = False
    while thread.is_alive():
        locks = Path("/proc/locks").read_text()
        if re.search(rf"-> FLOCK .*:{inode} ", locks):
            waited = True
            fcntl.flock(fd, fcntl.LOCK_UN)
        thread.join(0.01)
    return waited


def start_time(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class SegmentBench(Conformance):
    @property
    def label(self) -> str:
        """Of this process alone, so that tests beside this one do not see it."""
        return f"{self.impl_name}-{os.getpid()}"

    def made(self, call: str, make: Callable[..., Any], **arguments: Any) -> Any:
        if self.impl_name == MUTANT:
            return make(**arguments)
        rooms = (SharedSegment, "shared_memory")
        return watch_made(self.impl_name, call, make, *rooms, **arguments)

    def create(self, nbytes: int = 100, label: str = "", populate: bool = False) -> Any:
        make = self.impl.SharedSegment.create
        given = {"label": label or self.label, "nbytes": nbytes, "populate": populate}
        return self.made("create", make, **given)

    def attach(self, name: str) -> Any:
        return self.made("attach", self.impl.SharedSegment.attach, name=name)

    def reap(self) -> list[Reaped]:
        reaped: list[Reaped] = self.made("reap", self.impl.SharedSegment.reap)
        return reaped

    def pickled(self, segment: Any) -> bytes:
        return pickle.dumps(getattr(segment, "_subject", segment), protocol=5)

    def unpickle(self, data: bytes) -> Any:
        return self.made("unpickle", lambda data: pickle.loads(data), data=data)

    @contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        """No name of our label and no descriptor is there after it that was not before."""
        gc.collect(1)
        names, descriptors = names_of(self.label), descriptor_count()
        yield
        gc.collect(1)
        assert not set(names_of(self.label)) - set(names)
        assert descriptor_count() <= descriptors
