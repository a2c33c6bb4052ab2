"""Shared memory with one clause broken each."""

import fcntl
import itertools
import mmap
import os
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Self

import kvspec.oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.shared_memory import SharedMemoryConformance
from kvspec.errors import ContractError, HostMemoryError
from kvspec.oracle.shared_memory import FOLDER, LABEL, SharedSegment, _open, _start_time

registry = Registry(SharedMemoryConformance, kvspec.oracle)


def _pid(name: str) -> str:
    return name.split(".")[2]


def _unlink(name: str) -> None:
    Path(FOLDER, name).unlink(missing_ok=True)


@registry.mutant("SHM-1")
class GivesANameAgain(SharedSegment):
    @classmethod
    def create(cls, label: str, nbytes: int, populate: bool = False) -> Self:
        cls._serials = itertools.count()
        return super().create(label, nbytes, populate)


@registry.mutant("SHM-1")
class NamesItsParent(SharedSegment):
    @staticmethod
    def _stem(label: str) -> str:
        return f"kvspec.{label}.{os.getppid()}.{_start_time()}"


@registry.mutant("SHM-2", reports=("DGL-2456",))
class TakesWhatIsThere(SharedSegment):
    @classmethod
    def _take_name(cls, name: str) -> int | None:
        fd = _open(name, os.O_CREAT | os.O_RDWR)
        return fd if cls._lock(fd, fcntl.LOCK_SH) and cls._leads_to(name, fd) else None


@registry.mutant("SHM-2", "SHM-5", "SHM-6", "SHM-8", "SHM-14", "SHM-16", "SHM-17", "SHM-19")
class RoundsToPages(SharedSegment):
    @staticmethod
    def _reserve(fd: int, nbytes: int) -> None:
        SharedSegment._reserve(fd, -(-nbytes // 4096) * 4096)


@registry.mutant("SHM-3", "SHM-5", reports=("VL-48879", "SEED-48"))
class TruncatesAndReservesNothing(SharedSegment):
    @staticmethod
    def _reserve(fd: int, nbytes: int) -> None:
        try:
            os.ftruncate(fd, nbytes)
        except OSError as error:
            raise HostMemoryError(f"SHM-5: {nbytes} bytes: {error}") from None


@registry.mutant("SHM-4")
class TakesAnyLabel(SharedSegment):
    @classmethod
    def create(cls, label: str, nbytes: int, populate: bool = False) -> Self:
        fits = LABEL.fullmatch(label)
        return super().create(label if fits else "label", nbytes, populate)


@registry.mutant("SHM-4")
class TakesNothingForAByte(SharedSegment):
    @classmethod
    def create(cls, label: str, nbytes: int, populate: bool = False) -> Self:
        return super().create(label, max(nbytes, 1), populate)


@registry.mutant("SHM-5", "SHM-7")
class LeavesTheNameOfAFailure(SharedSegment):
    @staticmethod
    def _give_up(hold: Any) -> None:
        os.close(hold.fd)
        hold.fd = -1


@registry.mutant("SHM-5")
class RaisesWhatTheSystemDoes(SharedSegment):
    @classmethod
    def create(cls, label: str, nbytes: int, populate: bool = False) -> Self:
        try:
            return super().create(label, nbytes, populate)
        except HostMemoryError as error:
            raise OSError(str(error)) from None


@registry.mutant("SHM-6", "SHM-8", "SHM-12")
class AttachesToACopy(SharedSegment):
    _attached = mmap.MAP_PRIVATE


@registry.mutant("SHM-7", "SHM-20")
class AttachesToTheDead(SharedSegment):
    attaching = False

    @classmethod
    def _require_alive(cls, name: str) -> int:
        cls.attaching = True
        try:
            return super()._require_alive(name)
        finally:
            cls.attaching = False

    @classmethod
    def _remove_if_alone(cls, name: str, fd: int) -> bool | None:
        return False if cls.attaching else super()._remove_if_alone(name, fd)


@registry.mutant("SHM-7", "SHM-20")
class AttachesToWhatIsBeingRemoved(SharedSegment):
    @classmethod
    def _lock(cls, fd: int, kind: int) -> bool:
        return super()._lock(fd, kind) or kind == fcntl.LOCK_SH


@registry.mutant("SHM-7", "SHM-13")
class TakesWhatIsAnotherUsers(SharedSegment):
    @staticmethod
    def _is_ours(fd: int) -> bool:
        return SharedSegment._is_ours(fd) or os.fstat(fd).st_uid == 12345


@registry.mutant(
    "SHM-8", "SHM-5", "SHM-9", "SHM-10", "SHM-16", "SHM-17", reports=("SG-23022", "SEED-47")
)
class TheFirstToCloseUnlinks(SharedSegment):
    def close(self) -> None:
        was_open = self._hold.fd >= 0
        super().close()
        if was_open:
            _unlink(self.name)


@registry.mutant("SHM-8", "SHM-5", "SHM-9", "SHM-12", "SHM-17", reports=("SG-21665",))
class TheExitOfAnAttacherUnlinks(SharedSegment):
    @classmethod
    def attach(cls, name: str) -> Self:
        segment = super().attach(name)
        owner = segment._hold
        leave = owner.leave

        def leave_and_unlink() -> None:
            if owner.fd >= 0:
                leave()
                _unlink(name)

        vars(owner)["leave"] = leave_and_unlink
        return segment


@registry.mutant("SHM-9", "SHM-10", "SHM-16", "SHM-17")
class OnlyItsCreatorUnlinks(SharedSegment):
    @classmethod
    def attach(cls, name: str) -> Self:
        segment = super().attach(name)
        segment._hold.owner = -1
        return segment


@registry.mutant("SHM-9", "SHM-19")
class TakesWhateverHasTheName(SharedSegment):
    @staticmethod
    def _leads_to(name: str, fd: int) -> bool:
        return os.path.lexists(f"{FOLDER}/{name}")


@registry.mutant("SHM-10")
class SendsTheNameOfAClosedHandle(SharedSegment):
    def __getstate__(self) -> str:
        return self.name


@registry.mutant("SHM-11")
class ClosesUnderATensor(SharedSegment):
    def close(self) -> None:
        self._hold.leave()


@registry.mutant("SHM-12", "SHM-8", "SHM-11", "SHM-16", "SHM-6", "SHM-17")
class GivesACopy(SharedSegment):
    def tensor(self) -> Any:
        return super().tensor().clone()


@registry.mutant("SHM-12", "SHM-17")
class ATensorHoldsNothing(SharedSegment):
    def __del__(self) -> None:
        self._hold.leave()


@registry.mutant("SHM-13", "SHM-15", reports=("SG-28089", "SG-38638"))
class TakesANumberForALife(SharedSegment):
    """A process of that number is alive, so it must be the one; in a container 1 always is."""

    @staticmethod
    def _candidates() -> list[str]:
        names = SharedSegment._candidates()
        return [name for name in names if not os.path.exists(f"/proc/{_pid(name)}")]


@registry.mutant("SHM-13", "SHM-15", reports=("SEED-46", "VL-51317", "LLMD-364"))
class LeavesWhatTheDeadLeft(SharedSegment):
    @classmethod
    def reap(cls) -> list[Any]:
        return []


@registry.mutant("SHM-13", "SHM-15", reports=("OSRM-7312",))
class KnowsOnlyWhatItsOwnListHas(SharedSegment):
    """The list is younger than /dev/shm: it began with this container."""

    @staticmethod
    def _candidates() -> list[str]:
        names = SharedSegment._candidates()
        return [name for name in names if _pid(name) == str(os.getpid())]


@registry.mutant("SHM-14", "SHM-13")
class RemovesWhoseNumberIsNotHere(SharedSegment):
    """In another namespace it is another number."""

    @classmethod
    def reap(cls) -> list[Any]:
        for name in cls._candidates():
            if not os.path.exists(f"/proc/{_pid(name)}"):
                _unlink(name)
        return super().reap()


class _StartsWithoutReaping(SharedSegment):
    starting = False

    @classmethod
    def create(cls, label: str, nbytes: int, populate: bool = False) -> Self:
        cls.starting = True
        try:
            return super().create(label, nbytes, populate)
        finally:
            cls.starting = False

    @classmethod
    def reap(cls) -> list[Any]:
        return [] if cls.starting else super().reap()


@registry.mutant("SHM-15", reports=("SG-40723",))
class ReapsWhenAsked(_StartsWithoutReaping):
    pass


@registry.mutant("SHM-15", "SHM-5", reports=("SG-40723",))
class ReapsOnceItHasItsMemory(_StartsWithoutReaping):
    @classmethod
    def create(cls, label: str, nbytes: int, populate: bool = False) -> Self:
        segment = super().create(label, nbytes, populate)
        cls.reap()
        return segment


@registry.mutant("SHM-16")
class AChildIsAnOwner(SharedSegment):
    def close(self) -> None:
        self._hold.owner = os.getpid()
        super().close()


@registry.mutant("SHM-17", reports=("SG-19784", "SG-23022"))
class TheFirstToReadAPickleUnlinks(SharedSegment):
    def __setstate__(self, name: str) -> None:
        super().__setstate__(name)
        _unlink(name)


@registry.mutant("SHM-18", reports=("SG-21665",))
class TellsTheTracker(SharedSegment):
    @classmethod
    def attach(cls, name: str) -> Self:
        segment = super().attach(name)
        if resource_tracker.register.__module__ != resource_tracker.__name__:  # it is watched
            resource_tracker.register(f"/{name}", "shared_memory")
        return segment


@registry.mutant("SHM-19")
class ChecksNothing(SharedSegment):
    def check(self) -> None:
        pass


@registry.mutant("SHM-19", "SHM-8", "SHM-9")
class ChecksWhatIsClosed(SharedSegment):
    def check(self) -> None:
        if self._hold.fd < 0:
            raise ContractError(f"SHM-14: segment {self.name} is closed")
        super().check()


@registry.mutant("SHM-20")
class WaitsForItsLock(SharedSegment):
    @staticmethod
    def _lock(fd: int, kind: int) -> bool:
        if kind == fcntl.LOCK_SH:
            fcntl.flock(fd, kind)
            return True
        return SharedSegment._lock(fd, kind)
