"""Regions of memory that can be given back and taken again. Spec: SAVER.

A captured tensor is made over a `HostArena` of its own, which lives as long as the tensor's
storage does. The saver refers to arenas weakly, so that it keeps nothing alive.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvspec.errors import ContractError
from kvspec.interfaces.memory_saver import FACTORIES, TaggedRegion
from kvspec.memory_budget import Reservation
from kvspec.native.host_memory import HostArena

__all__ = ["TorchMemorySaverAdapter"]

_PACKAGE = "torch_memory_saver"
_asked = threading.local()  # inside: whether this thread is in a region of the package
_OnDevice: TypeAlias = Callable[[Callable[[], Any]], Any]
_FRESH = frozenset(
    (
        *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty"),
        *("new_empty_strided", "zeros", "zeros_like", "new_zeros"),
    )
)
"""Factories whose result a fresh arena is already, once it has its shape."""


@dataclass
class _Allocation:
    """What a region captured; `arena` is None when it is freed."""

    arena: weakref.ref[HostArena]
    nbytes: int
    keep: bool
    backup: HostArena | None = None


@dataclass
class _Tag:
    paused: bool = False
    regions: int = 0
    on_devices: bool = False  # whether the package was asked to have memory of it
    captured: dict[int, _Allocation] = field(default_factory=dict)

    def alive(self) -> list[tuple[_Allocation, HostArena]]:
        """The allocations that are not freed, held so that they stay (SAVER-14)."""
        captured = list(self.captured.values())
        return [(each, arena) for each in captured if (arena := each.arena()) is not None]


class TorchMemorySaverAdapter:
    """What is allocated inside `region(tag)` is given back by `pause(tag)`.

    SAVER-1 to SAVER-21.
    """

    _process: ClassVar["TorchMemorySaverAdapter"]
    _creation: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        """`create` is how to get one."""
        self._lock = threading.RLock()
        self._tags: dict[str, _Tag] = {}
        self._numbers = 0
        self._counts = {"captured": 0, "given_back": 0, "kept": 0, "put_back": 0}
        self._package: Any = _package() if self.enabled else None

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
            with ExitStack() as inside:
                inside.enter_context(_told(lambda arena: self._capture(tag, keep, arena)))
                on_device = None if self._package is None else self._on_device(tag, keep)
                inside.enter_context(_Capture(on_device))
                yield
        finally:
            with self._lock:
                self._tags[tag].regions -= 1

    def _on_device(self, tag: str, keep: bool) -> _OnDevice:
        """What makes a device's tensor in a region of the package, which has one at a time."""

        def make(factory: Callable[[], Any]) -> Any:
            if getattr(_asked, "inside", False):  # by a region inside this one
                return factory()
            with self._lock, self._package.region(tag=tag, enable_cpu_backup=keep):
                self._tags[tag].on_devices = _asked.inside = True
                try:
                    return factory()
                finally:
                    _asked.inside = False

        return make

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
            if entry.on_devices:
                self._package.pause(tag)
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
                if entry.on_devices:
                    self._package.resume(tag)
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
        """Around the start of a process that is to have a saver: what its package needs is set."""
        if self._package is None:
            return nullcontext()
        around: AbstractContextManager[None] = import_module(_PACKAGE).configure_subprocess()
        return around

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


def _package() -> Any:
    """What saves the memory of CUDA devices, None without CUDA or without it (SAVER-21).

    It is asked to work through torch's allocator where it was not loaded before libc.
    """
    if not torch.cuda.is_available() or find_spec(_PACKAGE) is None:
        return None
    saver = import_module(_PACKAGE).torch_memory_saver
    if _PACKAGE not in os.environ.get("LD_PRELOAD", ""):
        with suppress(AssertionError, AttributeError):  # somebody uses it already, as they chose
            saver.hook_mode = "torch"
    return saver


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

    def __init__(self, on_device: _OnDevice | None) -> None:
        """`on_device` is what makes a CUDA device's tensor; None where no package would save it."""
        TorchDispatchMode.__init__(self)
        self._on_device = on_device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports the compiler, for seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in FACTORIES or "out" in given:
            return func(*args, **given)
        device = _device(args, given).type
        if device == "meta":
            return func(*args, **given)
        if device == "cuda" and self._on_device is not None:
            return self._on_device(lambda: func(*args, **given))
        _require(name, device, given)
        dense = not any(isinstance(each, Tensor) and each.is_quantized for each in args)
        fresh = name in _FRESH and dense
        model = func(*args, **{**given, "device": "meta"}) if fresh else func(*args, **given)
        if not _captures(model):
            return func(*args, **given) if fresh else model
        made = _over_arena(model)
        return made if fresh else made.copy_(model)


def _over_arena(model: Tensor) -> Tensor:
    """A tensor like the model over an arena as large as its storage: all zeros."""
    storage = HostArena("mmap", model.untyped_storage().nbytes()).tensor().untyped_storage()
    return torch.empty(0, dtype=model.dtype).set_(storage, 0, model.shape, model.stride())


def _device(args: Sequence[Any], given: Mapping[str, Any]) -> torch.device:
    """Where the result of a factory will be."""
    device = given.get("device")
    if device is None:
        device = next((each.device for each in args if isinstance(each, Tensor)), "cpu")
    return torch.device(device)


def _require(name: str, device: str, given: Mapping[str, Any]) -> None:
    """Refuse what could not be given back: the memory of a device, and pinned memory (SAVER-7)."""
    if device != "cpu":
        raise ContractError(
            f"SAVER-7: {name} on {device} inside a region needs CUDA and the package"
            " torch_memory_saver"
        )
    if given.get("pin_memory"):
        raise ContractError(f"SAVER-7: {name} of pinned memory, which cannot be given back")


def _captures(model: Tensor) -> bool:
    """Whether a factory's result, or its model on `meta`, is new dense memory, and any of it."""
    if model.layout != torch.strided or model.is_quantized:
        return False
    storage = model.untyped_storage()  # one that cannot grow is somebody else's: a numpy array's
    return storage.nbytes() > 0 and (model.is_meta or storage.resizable())
