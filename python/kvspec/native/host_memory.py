"""Host memory: torch tensors over the arenas of the core. Spec: HOST."""

import operator
import resource
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor

from kvspec._core import HostBlock, huge_page_bytes, numa_node_lists, populates_on_request
from kvspec.errors import ContractError, HostMemoryError
from kvspec.interfaces.host_memory import (
    ArenaKind,
    HostArenaView,
    HostCapabilities,
    HugePages,
)
from kvspec.memory_budget import MemoryBudget, Reservation

__all__ = ["HostArena"]

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context
_CAP_IPC_LOCK = 14
_THP: tuple[Literal["never", "madvise", "always"], ...] = ("never", "madvise", "always")


class Pinning(NamedTuple):
    """What pinning asks of a device's runtime; both give 0 if all went well."""

    register: Callable[[int, int, int], object]
    """Pin memory that is mapped already: address, bytes, flags."""
    unregister: Callable[[int], object]
    """Undo it, by the address."""


def device_pinning() -> Pinning | None:
    """The CUDA runtime of torch, or None where there is no device."""
    if not torch.cuda.is_available():
        return None
    runtime = cast(Any, torch.cuda).cudart()
    return Pinning(runtime.cudaHostRegister, runtime.cudaHostUnregister)


class HostArena(HostBlock):
    """`nbytes` of host memory of one kind, and torch tensors over it without a copy (HOST-1).

    The core has the memory of each kind but two: torch's is a tensor that the core is lent, and
    what CUDA pins is registered here, through torch.
    """

    node_folder: ClassVar[str] = "/sys/devices/system/node"

    made: ClassVar[ContextVar[Callable[["HostArena"], None] | None]] = ContextVar(
        "kvspec_arena_made", default=None
    )
    """Who is told of every arena that is made in this context, but for attached ones (SAVER-5)."""

    def __init__(
        self,
        kind: ArenaKind,
        nbytes: int,
        *,
        alignment: int | None = None,
        populate: bool = False,
        huge_pages: HugePages = "no",
        numa_node: int | None = None,
        label: str = "arena",
        attach: str | None = None,
    ) -> None:
        given = (kind, nbytes, alignment, populate, huge_pages, numa_node, label, attach)
        super().__init__(*given, self.node_folder)
        self.kind: ArenaKind = kind
        self.nbytes = operator.index(nbytes)
        if attach is not None or huge_pages == "explicit":
            self._keep(self._map(), None)  # counted already: by the creator, or by the kernel
        else:
            self._reserve_and_map(label)
        listener = self.made.get()
        if listener is not None and attach is None:
            listener(self)

    def _reserve_and_map(self, label: str) -> None:
        reservation = MemoryBudget.current().reserve(self.kind, self.wanted_bytes, label=label)
        try:
            unpin = self._map()
        except BaseException:
            reservation.release()
            raise
        self._keep(unpin, reservation)

    def _map(self) -> Callable[[], None] | None:
        """Get the memory; what has to be called before it goes back."""
        if self.kind == "torch":
            storage = _torch_bytes(self.nbytes)
            self.adopt(storage.data_ptr(), storage)
            return None
        device = device_pinning() if self.kind == "pinned" else None
        self.open(lock=device is None)
        return None if device is None else self._register(device)

    def _register(self, device: Pinning) -> Callable[[], None]:
        """Pin exactly what is mapped, which torch's own allocator would round up (HOST-22)."""
        address, nbytes = self.address, self.mapped_bytes
        code = int(cast(int, device.register(address, nbytes, _PORTABLE)))
        if code != 0:
            self.give_back()
            raise HostMemoryError(
                f"HOST-22: cudaHostRegister of {nbytes} bytes failed with error {code}"
            )
        return lambda: _unregister(device, address)

    def _keep(self, unpin: Callable[[], None] | None, reservation: Reservation | None) -> None:
        """What is reserved stays so as long as the memory, which tensors may keep (HOST-28)."""
        held = self._reserved = [] if reservation is None else [reservation]
        for each in held:
            each.mapped(self.address, self.mapped_bytes)
        self.on_release(unpin, lambda: _release(held))

    def reserved_again(self) -> Reservation | None:
        """Its bytes in the budget once more, for `promise`; None for what is not reserved.

        For a saver, which takes the memory of many arenas again or of none (SAVER-16).
        """
        if not self._reserved:
            return None
        again = MemoryBudget.current().reserve(self.kind, self.wanted_bytes, label="resumed")
        again.mapped(self.address, self.mapped_bytes)
        return again

    def promise(self, reservation: Reservation | None) -> None:
        """Give up what is reserved, for memory that is given back, or have this in its place."""
        _release(self._reserved)
        if reservation is not None:
            self._reserved[:] = [reservation]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- tensors ---------------------------------------------------------------------------------

    def tensor(
        self, dtype: torch.dtype = torch.uint8, shape: Sequence[int] | None = None, offset: int = 0
    ) -> Tensor:
        """A tensor over bytes from `offset` on, without a copy (HOST-13, HOST-14)."""
        self.require_open("tensor")
        start, item = operator.index(offset), dtype.itemsize
        if start % item:
            raise ContractError(
                f"HOST-14: offset {start} is not a multiple of {item}, the bytes of {dtype}"
            )
        if shape is None:
            shape = (max(0, self.nbytes - start) // item,)
        lengths = [operator.index(length) for length in shape]
        if any(length < 0 for length in lengths):
            raise ContractError(f"HOST-14: shape {lengths} has a negative length")
        end = start + prod(lengths) * item
        if not 0 <= start <= end <= self.nbytes:
            raise ContractError(f"HOST-14: bytes [{start}, {end}) are not in [0, {self.nbytes})")
        memory = self.share(start, end - start)
        if not memory.numel():
            return torch.empty(lengths, dtype=dtype)
        return memory.view(dtype).view(lengths)

    # -- pages -----------------------------------------------------------------------------------

    def discard(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Give the memory of whole pages back; they read as zeros (HOST-19, HOST-20)."""
        self.discard_range(offset, self._to_end(offset) if nbytes is None else nbytes)

    def populate(
        self, offset: int = 0, nbytes: int | None = None, threads: int | None = None
    ) -> None:
        """Give every page of these bytes memory of its own (HOST-7, HOST-20, HOST-27)."""
        self.populate_range(offset, self._to_end(offset) if nbytes is None else nbytes, threads)

    def _to_end(self, offset: int) -> int:
        return max(0, self.nbytes - operator.index(offset))

    def close(self) -> None:
        """Give the memory back, or refuse while a tensor is alive (HOST-16, HOST-17)."""
        self.give_back()

    def view(self) -> HostArenaView:
        """The abstract state."""
        return HostArenaView(self.kind, self.nbytes, self.closed, self.share_count)

    # -- capabilities ----------------------------------------------------------------------------

    @classmethod
    def capabilities(cls) -> HostCapabilities:
        """What this process can have, found out once (HOST-25)."""
        return _capabilities(cls.node_folder)

    @staticmethod
    def agree(reports: Sequence[HostCapabilities]) -> HostCapabilities:
        """What all who report can have (HOST-26)."""
        if not reports:
            raise ContractError("HOST-26: nobody reports")
        limits = [r.lockable_bytes for r in reports if r.lockable_bytes is not None]
        return HostCapabilities(
            page_bytes=max(r.page_bytes for r in reports),
            huge_page_bytes=max(r.huge_page_bytes for r in reports),
            explicit_huge_pages=all(r.explicit_huge_pages for r in reports),
            transparent_huge_pages=min((r.transparent_huge_pages for r in reports), key=_THP.index),
            populates_on_request=all(r.populates_on_request for r in reports),
            memory_nodes=_common([r.memory_nodes for r in reports]),
            cpu_nodes=_common([r.cpu_nodes for r in reports]),
            pins_by="cuda" if all(r.pins_by == "cuda" for r in reports) else "mlock",
            lockable_bytes=min(limits, default=None),
        )


def _release(reservations: list[Reservation]) -> None:
    for each in reservations:
        each.release()


def _torch_bytes(nbytes: int) -> Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError:
        raise HostMemoryError(
            f"HOST-4: torch cannot have {nbytes} bytes: Cannot allocate memory"
        ) from None


def _unregister(device: Pinning, address: int) -> None:
    device.unregister(address)


def _common(lists: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    known = [set(nodes) for nodes in lists if nodes is not None]
    return tuple(sorted(set.intersection(*known))) if len(known) == len(lists) else None


@cache
def _capabilities(node_folder: str) -> HostCapabilities:
    lists = numa_node_lists(node_folder)
    return HostCapabilities(
        page_bytes=resource.getpagesize(),
        huge_page_bytes=huge_page_bytes(),
        explicit_huge_pages=_field("/proc/meminfo", "HugePages_Total", 10) > 0,
        transparent_huge_pages=_transparent(),
        populates_on_request=populates_on_request(),
        memory_nodes=lists and lists[0],
        cpu_nodes=lists and lists[1],
        pins_by="mlock" if device_pinning() is None else "cuda",
        lockable_bytes=_lockable_bytes(),
    )


def _field(path: str, name: str, base: int) -> int:
    """The number behind a name in a file of the kernel; 0 if there is none."""
    for line in Path(path).read_text(encoding="ascii").splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return int(value.split()[0], base)
    return 0


def _transparent() -> Literal["never", "madvise", "always"]:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    text = path.read_text(encoding="ascii") if path.exists() else "[never]"
    return next(word for word in _THP if f"[{word}]" in text)


def _lockable_bytes() -> int | None:
    if _field("/proc/self/status", "CapEff", 16) >> _CAP_IPC_LOCK & 1:
        return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft
