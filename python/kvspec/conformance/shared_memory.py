"""What every implementation of named shared memory must do. Spec: SHM.

Other processes are played by files and locks of this one, where it makes no difference: a lock
belongs to an open file description. The children that are forked hand over what they reached.
Processes outside the test may reap at any moment, so a dead segment is looked for and not counted.
"""

import fcntl
import gc
import itertools
import os
import pickle
import re
import resource
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import reached, watch_made
from kvspec.errors import ContractError, HostMemoryError
from kvspec.interfaces.shared_memory import Reaped, SharedSegment

__all__ = ["FOLDER", "SharedMemoryConformance", "names_of", "planted"]

FOLDER = Path("/dev/shm")
NO_PROCESS = 2**22
"""No process ever has this number: it is the greatest limit there is."""

Error = type[ContractError] | type[HostMemoryError]
_serials = itertools.count()


def names_of(label: str) -> list[str]:
    """What is in /dev/shm of this label, dead or alive."""
    return sorted(name for name in os.listdir(FOLDER) if name.startswith(f"kvspec.{label}."))


@contextmanager
def planted(
    label: str, nbytes: int = 100, pid: int = 1, lock: int = fcntl.LOCK_SH
) -> Iterator[tuple[str, int]]:
    """A segment of another process: its name, and the descriptor that has the lock on it."""
    name = f"kvspec.{label}.{pid}.1.{next(_serials)}"
    fd = os.open(FOLDER / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, lock)
        if nbytes:
            os.posix_fallocate(fd, 0, nbytes)
        yield name, fd
    finally:
        os.close(fd)
        (FOLDER / name).unlink(missing_ok=True)


def _refused(kind: Error, clause_id: str, call: Callable[[], object]) -> str:
    """The text of the error, which is of this kind and names this clause."""
    try:
        call()
    except Exception as error:
        assert type(error) is kind, repr(error)
        assert str(error).startswith(f"{clause_id}: "), str(error)
        return str(error)
    raise AssertionError(f"{clause_id} is not refused")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _locked(name: str) -> bool:
    """Whether somebody has a lock on it."""
    fd = os.open(FOLDER / name, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _in_child(action: Callable[[], object]) -> None:
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


def _waits(call: Callable[[], object], fd: int) -> bool:
    """Whether the call waits for the lock of `fd`, which is given back if it does."""
    inode = os.fstat(fd).st_ino
    thread = threading.Thread(target=call)
    thread.start()
    waited = False
    while thread.is_alive():
        locks = Path("/proc/locks").read_text()
        if re.search(rf"-> FLOCK .*:{inode} ", locks):
            waited = True
            fcntl.flock(fd, fcntl.LOCK_UN)
        thread.join(0.01)
    return waited


def _start_time(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


class SharedMemoryConformance(Conformance):
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
        """Names of our label and descriptors are the same after it."""
        gc.collect(1)
        before = names_of(self.label), _descriptors()
        yield
        gc.collect(1)
        assert (names_of(self.label), _descriptors()) == before

    # -- creating --------------------------------------------------------------------------------

    @clause("SHM-1")
    def test_a_name_says_who_created_it(self) -> None:
        def named() -> str:
            with self.create() as segment:
                kvspec, label, pid, start, serial = segment.name.split(".")
                assert (kvspec, label) == ("kvspec", self.label)
                assert (int(pid), start) == (os.getpid(), _start_time(os.getpid()))
                assert serial.isdigit()
                name: str = segment.name
                return name

        assert len({named() for _ in range(3)}) == 3
        _in_child(named)

    @clause("SHM-2")
    @pytest.mark.parametrize("nbytes", [1, 4096, 4097, 1_000_001])
    def test_a_segment_is_zeros(self, nbytes: int) -> None:
        with self.left_as_it_was(), self.create(nbytes) as segment:
            found = os.stat(FOLDER / segment.name)
            assert segment.nbytes == found.st_size == nbytes
            assert found.st_mode & 0o777 == 0o600
            assert found.st_uid == os.geteuid()
            tensor = segment.tensor()
            assert not tensor.any()
            del tensor

    @clause("SHM-2")
    def test_never_on_what_was_there(self) -> None:
        with self.create() as first:
            stem, _, serial = first.name.rpartition(".")
            places = [FOLDER / f"{stem}.{int(serial) + ahead}" for ahead in (1, 2, 3)]
            kept = [os.open(place, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600) for place in places]
            for fd in kept:
                os.write(fd, b"somebody's")
                fcntl.flock(fd, fcntl.LOCK_SH)
            try:
                with self.create() as second:
                    assert FOLDER / second.name not in places
                assert [place.read_bytes() for place in places] == [b"somebody's"] * 3
            finally:
                for place, fd in zip(places, kept, strict=True):
                    os.close(fd)
                    place.unlink(missing_ok=True)

    @clause("SHM-3")
    @pytest.mark.parametrize("populate", [False, True])
    @pytest.mark.parametrize("nbytes", [1, 4097, 5_000_000])
    def test_all_of_it_is_reserved(self, nbytes: int, populate: bool) -> None:
        with self.create(nbytes, populate=populate) as segment:
            assert os.stat(FOLDER / segment.name).st_blocks * 512 >= nbytes

    @clause("SHM-4")
    @pytest.mark.parametrize(
        ("label", "nbytes"),
        [("a/b", 1), ("a.b", 1), ("é", 1), ("a\n", 1), ("a" * 65, 1), ("a", 0), ("a", -1)],
    )
    def test_what_is_no_label_or_no_size(self, label: str, nbytes: int) -> None:
        with self.left_as_it_was():
            _refused(ContractError, "SHM-4", lambda: self.create(nbytes, label))

    @clause("SHM-4")
    def test_labels(self) -> None:
        for label in ("a" * 64, f"A-z_9-{os.getpid()}"):
            with self.create(label=label) as segment:
                assert names_of(label) == [segment.name]

    @clause("SHM-5")
    def test_more_than_the_machine_has(self) -> None:
        with self.left_as_it_was():
            text = _refused(HostMemoryError, "SHM-5", lambda: self.create(2**50))
            assert str(2**50) in text
            assert "free" in text

    @clause("SHM-5")
    def test_more_than_a_file_may_have(self) -> None:
        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            with self.left_as_it_was():
                _refused(HostMemoryError, "SHM-5", lambda: self.create(4097))
                self.create(4096).close()

        _in_child(limited)

    @clause("SHM-5")
    def test_without_descriptors(self) -> None:
        def exhausted() -> None:
            name = self.create().name  # what is imported late is there
            gc.collect(1)
            held = self.create()
            before, refused = _descriptors(), 0
            resource.setrlimit(resource.RLIMIT_NOFILE, (before + 40, before + 40))
            taken: list[int] = []
            with suppress(OSError):
                while True:
                    taken.append(os.dup(1))
            for _ in range(4):
                calls = (lambda: self.create().close(), lambda: self.attach(held.name).close())
                for call in calls:
                    try:
                        call()
                    except Exception as error:
                        assert type(error) is HostMemoryError, repr(error)
                        assert str(error).startswith("SHM-5: "), str(error)
                        refused += 1
                os.close(taken.pop())
            for fd in taken:
                os.close(fd)
            assert refused >= 2
            assert name not in names_of(self.label)
            assert (names_of(self.label), _descriptors()) == ([held.name], before)
            held.close()

        _in_child(exhausted)

    # -- attaching -------------------------------------------------------------------------------

    @clause("SHM-6")
    def test_one_memory(self) -> None:
        with self.left_as_it_was(), self.create(5000) as first, self.attach(first.name) as second:
            assert (second.name, second.nbytes) == (first.name, 5000)
            assert second.address != first.address
            here, there = first.tensor(), second.tensor()
            here[4999] = 7
            there[0] = 9
            assert (here[0], there[4999]) == (9, 7)
            del here, there

    @clause("SHM-7")
    @pytest.mark.parametrize(
        "name",
        [
            *("", "kvspec", "../etc/passwd", "/kvspec.a.1.1.1", "kvspec.a.1.1", "kvspec.a.1.1.x"),
            *("kvspec.a.1.1.1.1", "kvspec.a/b.1.1.1", "kvspec..1.1.1", "kvspec.a.1.1.1\n"),
            *("kvspec.a.1.1.", "kvspec.nobody.1.1.1", "kvspec.a.1.1." + "9" * 21),
        ],
    )
    def test_names_of_no_segment(self, name: str) -> None:
        with self.left_as_it_was():
            _refused(ContractError, "SHM-7", lambda: self.attach(name))

    @clause("SHM-7")
    def test_a_segment_that_nobody_holds(self) -> None:
        with self.left_as_it_was(), planted(self.label) as (name, fd):
            self.attach(name).close()
            fcntl.flock(fd, fcntl.LOCK_UN)
            _refused(ContractError, "SHM-7", lambda: self.attach(name))

    @clause("SHM-7")
    def test_a_segment_that_is_not_complete(self) -> None:
        with self.left_as_it_was(), planted(self.label, nbytes=0) as (name, _):
            text = _refused(ContractError, "SHM-7", lambda: self.attach(name))
            assert "not complete" in text
            assert name in names_of(self.label)

    @clause("SHM-7")
    def test_what_is_no_segment_of_this_user(self) -> None:
        place = FOLDER / f"kvspec.{self.label}.1.1.{next(_serials)}"
        makers: list[Callable[[], object]] = [
            place.mkdir,
            lambda: os.mkfifo(place, 0o600),
            lambda: place.symlink_to("/etc/passwd"),
        ]
        for make in makers:
            with self.left_as_it_was():
                make()
                try:
                    _refused(ContractError, "SHM-7", lambda: self.attach(place.name))
                    assert os.path.lexists(place)
                finally:
                    place.rmdir() if place.is_dir() else place.unlink()

    @clause("SHM-7")
    def test_a_segment_of_another_user(self) -> None:
        with planted(self.label) as (name, fd):
            if os.geteuid() == 0:  # nobody else can give a file away, or open it
                os.fchown(fd, 12345, 12345)
                _refused(ContractError, "SHM-7", lambda: self.attach(name))

    # -- closing ---------------------------------------------------------------------------------

    @clause("SHM-8", "SHM-9")
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_the_last_takes_the_name(self, order: tuple[int, ...]) -> None:
        with self.left_as_it_was():
            first = self.create()
            owners = [first, self.attach(first.name), self.attach(first.name)]
            for position, index in enumerate(order):
                assert first.name in names_of(self.label)
                owners[index].close()
                for other in order[position + 1 :]:
                    owners[other].check()
                    assert owners[other].view().linked
            assert first.name not in names_of(self.label)
            assert first.name not in Path("/proc/self/maps").read_text()

    @clause("SHM-8")
    @pytest.mark.parametrize("closes", [False, True])
    def test_an_attacher_comes_and_goes(self, closes: bool) -> None:
        def visit() -> None:
            visitor = self.attach(segment.name)
            visitor.tensor()[3] = 5
            gc.collect(1)
            if closes:
                visitor.close()

        with self.left_as_it_was(), self.create() as segment:
            _in_child(visit)
            segment.check()
            late = self.attach(segment.name)
            assert late.tensor()[3] == 5
            late.close()
            segment.check()

    @clause("SHM-9")
    def test_a_name_that_leads_elsewhere_stays(self) -> None:
        segment = self.create()
        place = FOLDER / segment.name
        place.unlink()
        place.write_bytes(b"somebody's")
        try:
            segment.close()
            assert place.read_bytes() == b"somebody's"
        finally:
            place.unlink(missing_ok=True)

    @clause("SHM-9")
    def test_a_handle_that_is_dropped_is_closed(self) -> None:
        with self.left_as_it_was():
            segment = self.create()
            name = segment.name
            del segment
            gc.collect(1)
            assert name not in names_of(self.label)

    @clause("SHM-10")
    def test_a_closed_handle(self) -> None:
        segment = self.create()
        other = self.attach(segment.name)
        segment.close()
        segment.close()
        assert segment.view() == (True, True, 0, True)
        assert segment.nbytes == 100
        for call in (segment.tensor, lambda: segment.address, lambda: self.pickled(segment)):
            assert segment.name in _refused(ContractError, "SHM-10", call)
        other.close()
        assert not segment.view().linked

    @clause("SHM-11")
    def test_no_tensor_is_left_without_memory(self) -> None:
        with self.left_as_it_was(), self.create() as segment:
            first = segment.tensor()
            second = segment.tensor()[10:20].view(2, 5)
            for count in (2, 1):
                before = segment.view()
                assert before == (False, True, count, True)
                text = _refused(ContractError, "SHM-11", segment.close)
                assert f"{count} tensor" in text
                assert segment.view() == before
                second[1, 4] = 7
                del first
                first = second
            del first, second
            gc.collect(1)
            assert segment.view().tensors == 0

    @clause("SHM-12")
    def test_a_tensor_is_the_memory(self) -> None:
        with self.create(70_000) as segment:
            tensor = segment.tensor()
            assert (tensor.dtype, tensor.shape) == (torch.uint8, (70_000,))
            assert (str(tensor.device), tensor.data_ptr()) == ("cpu", segment.address)
            tensor[69_999] = 7
            assert (FOLDER / segment.name).read_bytes()[69_999] == 7
            del tensor

    @clause("SHM-12")
    def test_a_tensor_holds_the_segment(self) -> None:
        with self.left_as_it_was():
            segment = self.create()
            name, tensor = segment.name, segment.tensor()[50:]
            del segment
            gc.collect(1)
            self.reap()
            assert name in names_of(self.label)
            other = self.attach(name)
            other.tensor()[50] = 3
            gc.collect(1)
            other.close()
            assert tensor[0] == 3
            del tensor
            gc.collect(1)
            assert name not in names_of(self.label)

    # -- what the dead leave ---------------------------------------------------------------------

    @clause("SHM-13")
    @pytest.mark.parametrize("pid", [1, NO_PROCESS])
    @pytest.mark.parametrize("nbytes", [0, 5000])
    def test_the_dead_are_removed(self, pid: int, nbytes: int) -> None:
        for _ in range(20):
            with planted(self.label, nbytes, pid) as (name, fd):
                fcntl.flock(fd, fcntl.LOCK_UN)
                reaped = self.reap()
                assert name not in names_of(self.label)
                if Reaped(name, nbytes) in reaped:  # or a process beside this one was quicker
                    assert [found for found, _ in reaped] == sorted(found for found, _ in reaped)
                    return
        raise AssertionError("what was removed is not returned")

    @clause("SHM-13")
    def test_what_is_no_segment_of_this_user_stays(self) -> None:
        places = [
            FOLDER / f"kvspec.{self.label}",
            FOLDER / f"kvspec.{self.label}.1.1",
            FOLDER / f"kvspec.{self.label}.1.1.a",
            FOLDER / f"other.{self.label}.1.1.1",
        ]
        for place in places:
            place.write_bytes(b"somebody's")
        link = FOLDER / f"kvspec.{self.label}.1.1.{next(_serials)}"
        link.symlink_to(places[0])
        try:
            with planted(self.label) as (name, fd):
                if os.geteuid() == 0:
                    os.fchown(fd, 12345, 12345)
                    fcntl.flock(fd, fcntl.LOCK_UN)
                reaped = [found for found, _ in self.reap()]
                assert not {name, link.name} & set(reaped)
                assert all(os.path.lexists(place) for place in (*places, link, FOLDER / name))
        finally:
            for place in (*places, link):
                place.unlink(missing_ok=True)

    @clause("SHM-14")
    @pytest.mark.parametrize("pid", [1, NO_PROCESS])
    def test_the_living_stay(self, pid: int) -> None:
        with planted(self.label, pid=pid) as (name, _), self.create() as segment:
            reaped = [found for found, _ in self.reap()]
            assert not {name, segment.name} & set(reaped)
            assert {name, segment.name} <= set(names_of(self.label))
            segment.check()
            self.create().close()
            assert {name, segment.name} <= set(names_of(self.label))

    @clause("SHM-15")
    @pytest.mark.parametrize("nbytes", [100, 2**50])
    def test_who_starts_removes_the_dead(self, nbytes: int) -> None:
        with planted(self.label) as (name, fd):
            fcntl.flock(fd, fcntl.LOCK_UN)
            with suppress(HostMemoryError):
                self.create(nbytes).close()
            assert name not in names_of(self.label)

    # -- other processes -------------------------------------------------------------------------

    @clause("SHM-16")
    @pytest.mark.parametrize("closes", [False, True])
    def test_a_forked_child_is_no_owner(self, closes: bool) -> None:
        def inherit() -> None:
            assert not segment.view().owned
            assert segment.view().linked
            segment.tensor()[1] = 7
            gc.collect(1)
            if closes:
                segment.close()
                assert segment.name not in Path("/proc/self/maps").read_text()
            assert segment.view().linked

        with self.left_as_it_was(), self.create() as segment:
            for _ in range(2):
                _in_child(inherit)
                segment.check()
                assert _locked(segment.name)
            assert segment.tensor()[1] == 7
            gc.collect(1)

    @clause("SHM-17")
    def test_a_pickle_read_three_times_gives_three_owners(self) -> None:
        with self.left_as_it_was():
            segment = self.create(1_000_000)
            tensor = segment.tensor()
            tensor[7] = 9
            data = self.pickled(segment)
            assert len(data) < 300
            del tensor
            gc.collect(1)
            owners = [self.unpickle(data) for _ in range(3)]
            segment.close()
            for owner in owners:
                assert (owner.name, owner.nbytes) == (segment.name, 1_000_000)
                assert owner.tensor()[7] == 9
                gc.collect(1)
                owner.check()
                owner.close()
            assert segment.name not in names_of(self.label)
            _refused(ContractError, "SHM-7", lambda: self.unpickle(data))

    @clause("SHM-18")
    def test_the_resource_tracker_is_not_told(self) -> None:
        told: list[tuple[object, ...]] = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("register", "unregister", "ensure_running"):
                patch.setattr(resource_tracker, name, lambda *given: told.append(given))
            with self.create() as segment, self.attach(segment.name):
                self.unpickle(self.pickled(segment)).close()
        assert not told

    @clause("SHM-19")
    def test_check(self) -> None:
        segment = self.create()
        place = FOLDER / segment.name
        segment.check()
        os.truncate(place, 101)
        assert "101" in _refused(ContractError, "SHM-2", segment.check)
        os.truncate(place, 100)
        segment.check()
        place.unlink()
        assert not segment.view().linked
        assert segment.name in _refused(ContractError, "SHM-14", segment.check)
        place.write_bytes(bytes(100))
        _refused(ContractError, "SHM-14", segment.check)
        place.unlink()
        segment.close()
        segment.check()

    @clause("SHM-7", "SHM-20")
    @pytest.mark.parametrize("call", ["attach", "create", "reap", "close"])
    @pytest.mark.parametrize("lock", [fcntl.LOCK_SH, fcntl.LOCK_EX])
    def test_nobody_waits(self, call: str, lock: int) -> None:
        """The other process has its lock for ever. One that excludes all others is a remover's."""
        segment = self.create()
        refused: list[str] = []

        def act() -> None:
            if call == "attach":
                try:
                    self.attach(name).close()
                except ContractError as error:
                    refused.append(error.clause)
            elif call == "create":
                self.create().close()
            elif call == "reap":
                self.reap()
            else:
                segment.close()

        with planted(self.label, lock=lock) as (name, fd):
            other = os.open(FOLDER / segment.name, os.O_RDONLY)
            if call == "close":
                fcntl.flock(other, fcntl.LOCK_SH)
            assert not _waits(act, other if call == "close" else fd)
            assert refused == (["SHM-7"] if (call, lock) == ("attach", fcntl.LOCK_EX) else [])
            assert name in names_of(self.label)
            os.close(other)
        segment.close()
        (FOLDER / segment.name).unlink(missing_ok=True)
