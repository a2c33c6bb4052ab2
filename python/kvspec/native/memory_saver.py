"""Regions of memory that can be given back and taken again. Spec: SAVER.

A captured tensor is made over a `HostArena` of its own, which lives as long as the tensor's
storage does. The saver refers to arenas weakly, so that it keeps nothing alive.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvspec.errors import ContractError
from kvspec.interfaces.memory_saver import FACTORIES, TaggedRegion
from kvspec.memory_budget import Reservation
from kvspec.native.host_memory import HostArena

__all__ = ["TorchMemorySaverAdapter"]

_FRESH = frozenset(
    (
        *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty"),
        *("new_empty_strided", "zeros", "zeros_like", "new_zeros"),
    )
)
"""Factories whose result a fresh arena is already, once it has its shape."""

_TRIED_BYTES = 4096
"""How much of an allocation `pause` gives back to see whether it can be given back."""


@dataclass
class _Allocation:
    """What a region captured; `arena` is None when it is freed."""

    arena: "weakref.ref[HostArena]"
    nbytes: int
    keep: bool
    backup: HostArena | None = None


@dataclass
class _Tag:
    paused: bool = False
    regions: int = 0
    captured: dict[int, _Allocation] = field(default_factory=dict)

    def alive(self) -> list[tuple[_Allocation, HostArena]]:
        """The allocations that are not freed, held so that they stay (SAVER-14)."""
        captured = list(self.captured.values())
        return [(each, arena) for each in captured if (arena := each.arena()) is not None]


class TorchMemorySaverAdapter:
    """What is allocated inside `region(tag)` is given back by `pause(tag)` (SAVER-1 to SAVER-20)."""

    _process: ClassVar["TorchMemorySaverAdapter"]
    _creation: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        """`create` is how to get one."""
        self._lock = threading.RLock()
        self._tags: dict[str, _Tag] = {}
        self._numbers = 0
        self._counts = {"captured": 0, "given_back": 0, "kept": 0, "put_back": 0}

    @classmethod
    def create(cls, enable: bool) -> "TorchMemorySaverAdapter":
        """The process's one saver of this class, or a twin that does nothing (SAVER-1, SAVER-2)."""
        if not enable:
            return _Twin()
        with cls._creation:
            if "_process" not in cls.__dict__:
                cls._process = cls()
            return cls._process

    @property
    def enabled(self) -> bool:
        """True: it does what it says."""
        return True

    # -- regions ---------------------------------------------------------------------------------

    def region(self, tag: str, enable_cpu_backup: bool = False) -> AbstractContextManager[None]:
        """Capture what this thread allocates inside (SAVER-3 to SAVER-7, SAVER-14, SAVER-17)."""
        with self._lock:
            self._enterable(tag)
            self._tags.setdefault(tag, _Tag())
        return self._region(tag, enable_cpu_backup)

    def _enterable(self, tag: str) -> None:
        if not isinstance(tag, str) or not tag:
            raise ContractError(f"SAVER-14: {tag!r} is not a tag: give a string that is not empty")
        if tag in self._tags and self._tags[tag].paused:
            raise ContractError(f"SAVER-14: {tag!r} is paused: resume it before you allocate in it")

    @contextmanager
    def _region(self, tag: str, keep: bool) -> Iterator[None]:
        with self._lock:
            self._enterable(tag)  # again: it may have been paused since
            self._tags[tag].regions += 1
        try:
            with _told(lambda arena: self._capture(tag, keep, arena)), _Capture():
                yield
        finally:
            with self._lock:
                self._tags[tag].regions -= 1

    def _capture(self, tag: str, keep: bool, arena: HostArena) -> None:
        if arena.kind not in ("mmap", "shm"):
            return  # the system takes no single pages of it back (SAVER-6)
        with self._lock:
            self._numbers += 1
            captured, number = self._tags[tag].captured, self._numbers
            gone = weakref.ref(arena, lambda _: captured.pop(number, None))
            captured[number] = _Allocation(gone, arena.nbytes, keep)
            self._counts["captured"] += arena.nbytes

    # -- pause and resume ------------------------------------------------------------------------

    def pause(self, tag: str) -> None:
        """Give the physical pages of a tag back (SAVER-8 to SAVER-12, SAVER-15)."""
        with self._lock, _told(None):
            entry = self._known(tag, "SAVER-12")
            if entry.paused:
                raise ContractError(f"SAVER-12: {tag!r} is paused already")
            if entry.regions:
                raise ContractError(
                    f"SAVER-12: {tag!r} has {entry.regions} open regions: pause it outside"
                )
            alive = entry.alive()
            backups = [_copied(arena) if each.keep else None for each, arena in alive]
            _try([arena for _, arena in alive])
            for (each, arena), backup in zip(alive, backups, strict=True):
                arena.discard()
                arena.promise(None)
                each.backup = backup
                self._counts["given_back"] += each.nbytes
                self._counts["kept"] += 0 if backup is None else each.nbytes
            entry.paused = True

    def resume(self, tag: str) -> None:
        """Make a paused tag usable again (SAVER-9, SAVER-10, SAVER-13, SAVER-15, SAVER-16)."""
        with self._lock, _told(None):
            entry = self._known(tag, "SAVER-13")
            if not entry.paused:
                raise ContractError(f"SAVER-13: {tag!r} is not paused")
            alive = entry.alive()
            reservations = _reserved([arena for _, arena in alive])
            try:
                for each, arena in alive:
                    _restore(arena, each.backup)
            except BaseException:
                _undo([arena for _, arena in alive], reservations)
                raise
            for (each, arena), reservation in zip(alive, reservations, strict=True):
                arena.promise(reservation)
                self._counts["put_back"] += 0 if each.backup is None else each.nbytes
                each.backup = None
            entry.paused = False

    def _known(self, tag: str, clause: str) -> _Tag:
        if tag not in self._tags:
            raise ContractError(
                f"{clause}: no region was opened for {tag!r}, there are {sorted(self._tags)}"
            )
        return self._tags[tag]

    # -- what there is ---------------------------------------------------------------------------

    def configure_subprocess(self) -> AbstractContextManager[None]:
        """Around the start of a process that is to have a saver."""
        return nullcontext()

    def view(self) -> Mapping[str, TaggedRegion]:
        """The abstract state: every tag that a region was opened for."""
        with self._lock:
            return MappingProxyType({tag: _seen(entry) for tag, entry in self._tags.items()})

    def counters(self) -> dict[str, int]:
        """Exact costs so far, in bytes (SAVER-20)."""
        return dict(self._counts)

    def check(self) -> None:
        """Raise ContractError if a paused tag was written (SAVER-18)."""
        with self._lock:
            for tag, entry in self._tags.items():
                for each, arena in entry.alive():
                    if entry.paused and arena.resident_bytes() and arena.tensor().any():
                        raise ContractError(
                            f"SAVER-8: {tag!r} is paused, and an allocation of {each.nbytes} bytes"
                            " was written"
                        )


def _seen(entry: _Tag) -> TaggedRegion:
    alive = [each for each, _ in entry.alive()]
    backups = sum(each.nbytes for each in alive if each.backup is not None)
    nbytes = sum(each.nbytes for each in alive)
    return TaggedRegion(entry.paused, len(alive), nbytes, entry.regions, backups)


@contextmanager
def _told(listener: Callable[[HostArena], None] | None) -> Iterator[None]:
    """Inside, and in this thread, the listener alone hears of arenas."""
    token = HostArena.made.set(listener)
    try:
        yield
    finally:
        HostArena.made.reset(token)


def _copied(arena: HostArena) -> HostArena:
    """A copy in memory of its own, which goes back to the system when it is dropped (SAVER-10)."""
    backup = HostArena("mmap", arena.nbytes, label="backup")
    backup.tensor().copy_(arena.tensor())
    return backup


def _try(arenas: Sequence[HostArena]) -> None:
    """Raise if one of them cannot be given back, before anything of any is (SAVER-15).

    Whether the kernel takes memory back, which it does not where it is locked, is seen only by
    giving it: the first page of each is, and put back.
    """
    for arena in arenas:
        first = arena.tensor(shape=(min(arena.page_bytes, arena.nbytes),))
        kept = first.clone()
        arena.discard(0, first.numel())
        first.copy_(kept)


def _reserved(arenas: Sequence[HostArena]) -> list[Reservation | None]:
    """The bytes of all of them in the budget, or none (SAVER-16)."""
    taken: list[Reservation | None] = []
    try:
        for arena in arenas:
            taken.append(arena.reserved_again())
    except BaseException:
        _undo([], taken)
        raise
    return taken


def _restore(arena: HostArena, backup: HostArena | None) -> None:
    """What was written since the pause goes, what was kept comes (SAVER-9)."""
    arena.discard()
    if backup is not None:
        arena.tensor().copy_(backup.tensor())


def _undo(arenas: Sequence[HostArena], reservations: Sequence[Reservation | None]) -> None:
    """Back to sleep, after a resume that failed halfway (SAVER-15)."""
    for arena in arenas:
        with suppress(Exception):  # the one that cannot be given back, which is why
            arena.discard()
    for reservation in reservations:
        if reservation is not None:
            reservation.release()


class _Twin(TorchMemorySaverAdapter):
    """The same methods, and nothing behind them (SAVER-2)."""

    @property
    def enabled(self) -> bool:
        """False: it does nothing."""
        return False

    def region(self, tag: str, enable_cpu_backup: bool = False) -> AbstractContextManager[None]:
        """What is allocated inside is ordinary memory."""
        return nullcontext()

    def pause(self, tag: str) -> None:
        """Nothing."""

    def resume(self, tag: str) -> None:
        """Nothing."""


class _Capture(TorchDispatchMode):
    """Inside, the results of factories are over arenas (SAVER-3)."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in FACTORIES or "out" in given:
            return func(*args, **given)
        _require_device(name, args, given)
        plain = not any(isinstance(each, Tensor) and each.is_quantized for each in args)
        fresh = name in _FRESH and plain and given.get("device") != torch.device("meta")
        model = func(*args, **{**given, "device": "meta"}) if fresh else func(*args, **given)
        if not _captures(name, model, fresh):
            return func(*args, **given) if fresh else model
        made = _over_arena(model)
        return made if fresh else made.copy_(model)


def _over_arena(model: Tensor) -> Tensor:
    """A tensor like the model over an arena as large as its storage: all zeros."""
    storage = HostArena("mmap", model.untyped_storage().nbytes()).tensor().untyped_storage()
    return torch.empty(0, dtype=model.dtype).set_(storage, 0, model.shape, model.stride())


def _require_device(name: str, args: Sequence[Any], given: Mapping[str, Any]) -> None:
    """Refuse what could not be captured: the memory of a device, and pinned memory (SAVER-7)."""
    device = given.get("device")
    if device is None:
        device = next((each.device for each in args if isinstance(each, Tensor)), None)
    if device is not None and torch.device(device).type not in ("cpu", "meta"):
        raise ContractError(
            f"SAVER-7: {name} on {device} inside a region needs CUDA and the package"
            " torch_memory_saver"
        )
    if given.get("pin_memory"):
        raise ContractError(f"SAVER-7: {name} of pinned memory, which cannot be given back")


def _captures(name: str, model: Tensor, fresh: bool) -> bool:
    """Whether a factory's result is new dense memory of the CPU, and any of it."""
    if model.layout != torch.strided or model.is_quantized:
        return False
    if not fresh and (model.device.type != "cpu" or not model.untyped_storage().resizable()):
        return False  # what is not resizable is somebody else's: a numpy array
    return model.untyped_storage().nbytes() > 0
