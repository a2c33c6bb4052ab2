"""Regions of memory that can be given back. Spec: SAVER.

A dict of tags to their allocations. Each is memory of its own, referred to weakly: what nobody else
refers to is freed, and its tag has one allocation less.
"""

import mmap
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from kvspec.errors import ContractError
from kvspec.interfaces.memory_saver import TaggedRegion
from kvspec.oracle.boundary import BYTES, Capture, tensor_over
from kvspec.oracle.host_memory import HostArena

if TYPE_CHECKING:
    from kvspec.memory_budget import Reservation

__all__ = ["TorchMemorySaverAdapter"]


@dataclass
class Allocation:
    """What a region captured."""

    arena: "weakref.ref[HostArena]"
    nbytes: int
    keep: bool
    backup: HostArena | None = None


@dataclass
class Tag:
    """Mapped or paused, with how many regions are open."""

    paused: bool = False
    regions: int = 0
    captured: list[Allocation] = field(default_factory=list)

    def alive(self) -> list[tuple[Allocation, HostArena]]:
        """Those that are not freed (SAVER-14)."""
        found = [(each, arena) for each in self.captured if (arena := each.arena()) is not None]
        self.captured = [each for each, _ in found]
        return found


class TorchMemorySaverAdapter:
    """What is allocated inside `region(tag)` is given back by `pause(tag)`."""

    _process: ClassVar["TorchMemorySaverAdapter"]
    enabled = True

    def __init__(self) -> None:
        self._tags: dict[str, Tag] = {}
        self._counts = {"captured": 0, "given_back": 0, "kept": 0, "put_back": 0}

    @classmethod
    def create(cls, enable: bool) -> "TorchMemorySaverAdapter":
        """One saver for a class, and a twin that does nothing (SAVER-1, SAVER-2)."""
        if not enable:
            return Twin()
        if "_process" not in cls.__dict__:
            cls._process = cls()
        return cls._process

    def region(self, tag: str, enable_cpu_backup: bool = False) -> AbstractContextManager[None]:
        """Capture what is allocated inside (SAVER-3 to SAVER-7, SAVER-14, SAVER-17)."""
        self._require_usable(tag)
        self._tags.setdefault(tag, Tag())
        return self._region(tag, enable_cpu_backup)

    @contextmanager
    def _region(self, tag: str, keep: bool) -> Iterator[None]:
        self._require_usable(tag)
        entry = self._tags[tag]
        entry.regions += 1
        try:
            with heard(lambda arena: self._capture(entry, keep, arena)), self._mode():
                yield
        finally:
            entry.regions -= 1

    def _mode(self) -> Capture:
        return Capture(HostArena)

    def _capture(self, entry: Tag, keep: bool, arena: HostArena) -> None:
        if arena.kind not in ("mmap", "shm"):
            return  # the system takes no single pages of it back (SAVER-6)
        gone = weakref.ref(arena, lambda _: entry.alive() and None)  # its backup goes with it
        entry.captured.append(Allocation(gone, arena.nbytes, keep))
        self._counts["captured"] += arena.nbytes

    def _require_usable(self, tag: str) -> None:
        if not isinstance(tag, str) or not tag:
            raise ContractError(f"SAVER-14: {tag!r} is not a tag: give a string that is not empty")
        if tag in self._tags and self._tags[tag].paused:
            raise ContractError(f"SAVER-14: {tag!r} is paused: resume it before you allocate in it")

    def pause(self, tag: str) -> None:
        """Give the pages of a tag back (SAVER-8 to SAVER-12, SAVER-15)."""
        entry = self._known(tag, "SAVER-12")
        if entry.paused:
            raise ContractError(f"SAVER-12: {tag!r} is paused already")
        if entry.regions:
            raise ContractError(
                f"SAVER-12: {tag!r} has {entry.regions} open regions: pause it outside"
            )
        alive = entry.alive()
        contents = [snapshot(arena) for _, arena in alive]
        with heard(None):
            backups = [copied(arena) if each.keep else None for each, arena in alive]
        try:
            for _, arena in alive:
                arena.discard()
        except BaseException:
            for (_, arena), before in zip(alive, contents, strict=True):
                restore(arena, before)
            raise
        for (each, arena), backup in zip(alive, backups, strict=True):
            arena.promise(None)
            each.backup = backup
            self._counts["given_back"] += each.nbytes
            self._counts["kept"] += 0 if backup is None else each.nbytes
        entry.paused = True

    def resume(self, tag: str) -> None:
        """Make a paused tag usable again (SAVER-9, SAVER-10, SAVER-13, SAVER-15)."""
        entry = self._known(tag, "SAVER-13")
        if not entry.paused:
            raise ContractError(f"SAVER-13: {tag!r} is not paused")
        alive = entry.alive()
        with ExitStack() as undo:
            reservations = []
            for _, arena in alive:  # all of them, before any is changed (SAVER-16)
                reservations.append(arena.reserved_again())
                undo.callback(release, reservations[-1])
            for each, arena in alive:
                undo.callback(restore, arena, snapshot(arena))
                arena.discard()
                if each.backup is not None:
                    arena.tensor().copy_(each.backup.tensor())
            undo.pop_all()
        for (each, arena), reservation in zip(alive, reservations, strict=True):
            arena.promise(reservation)
            self._counts["put_back"] += 0 if each.backup is None else each.nbytes
            each.backup = None
        entry.paused = False

    def _known(self, tag: str, clause: str) -> Tag:
        if tag not in self._tags:
            raise ContractError(
                f"{clause}: no region was opened for {tag!r}, there are {sorted(self._tags)}"
            )
        return self._tags[tag]

    def configure_subprocess(self) -> AbstractContextManager[None]:
        """Nothing has to be set."""
        return nullcontext()

    def view(self) -> Mapping[str, TaggedRegion]:
        """The abstract state."""
        return {tag: self._seen(entry) for tag, entry in self._tags.items()}

    def _seen(self, entry: Tag) -> TaggedRegion:
        alive = [each for each, _ in entry.alive()]
        backups = sum(each.nbytes for each in alive if each.backup is not None)
        nbytes = sum(each.nbytes for each in alive)
        return TaggedRegion(entry.paused, len(alive), nbytes, entry.regions, backups)

    def counters(self) -> dict[str, int]:
        """Exact costs so far (SAVER-19)."""
        return dict(self._counts)

    def check(self) -> None:
        """Raise ContractError if a paused tag was written (SAVER-18)."""
        for tag, entry in self._tags.items():
            for each, arena in entry.alive():
                if entry.paused and arena.resident_bytes() and arena.tensor().any():
                    raise ContractError(
                        f"SAVER-8: {tag!r} is paused, and an allocation of {each.nbytes} bytes"
                        " was written"
                    )


@contextmanager
def heard(listener: "Callable[[HostArena], None] | None") -> Iterator[None]:
    """Inside, the listener alone hears of arenas."""
    token = HostArena.made.set(listener)
    try:
        yield
    finally:
        HostArena.made.reset(token)


def copied(arena: HostArena) -> HostArena:
    """A copy in memory of its own (SAVER-10)."""
    backup = HostArena("mmap", arena.nbytes, label="backup")
    backup.tensor().copy_(arena.tensor())
    return backup


def snapshot(arena: HostArena) -> mmap.mmap:
    """What it holds, in memory that goes back to the system with the snapshot (SAVER-15)."""
    kept = mmap.mmap(-1, arena.nbytes)
    kept.write(arena.tensor().numpy().data)
    return kept


def restore(arena: HostArena, kept: mmap.mmap) -> None:
    """What it held."""
    arena.tensor().copy_(tensor_over(memoryview(kept), BYTES, [arena.nbytes]))


def release(reservation: "Reservation | None") -> None:
    """Give it back, if there is one."""
    if reservation is not None:
        reservation.release()


class Twin(TorchMemorySaverAdapter):
    """The same methods, and nothing behind them (SAVER-2)."""

    enabled = False

    def region(self, tag: str, enable_cpu_backup: bool = False) -> AbstractContextManager[None]:
        """What is allocated inside is ordinary memory."""
        return nullcontext()

    def pause(self, tag: str) -> None:
        """Nothing."""

    def resume(self, tag: str) -> None:
        """Nothing."""
