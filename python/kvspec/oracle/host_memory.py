"""Arenas of host memory. Spec: HOST.

The memory is an array of ctypes over an address. Tensors hold it, through memoryviews that the
arena counts, and its finalizer gives the memory back: when the last of them is gone, or at `close`.
"""

import ctypes
import mmap
import operator
import os
import resource
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self, get_args

from kvspec.errors import ContractError, HostMemoryError
from kvspec.interfaces.host_memory import (
    ArenaKind,
    HostArenaView,
    HostCapabilities,
    HugePages,
)
from kvspec.memory_budget import MemoryBudget, Reservation
from kvspec.oracle import boundary
from kvspec.oracle import host_pages as pages
from kvspec.oracle.host_pages import HUGE_PAGE_BYTES, PAGE_BYTES
from kvspec.oracle.shared_memory import SharedSegment

if TYPE_CHECKING:
    import torch

__all__ = ["HostArena"]

_MALLOC: tuple[ArenaKind, ...] = ("torch", "heap")
_PRIVATE: tuple[ArenaKind, ...] = ("mmap", "pinned")
_MOST_ALIGNMENT: dict[ArenaKind, int] = {"torch": 64, "shm": PAGE_BYTES}
_BYTES_PER_THREAD, _MAX_THREADS = 64 << 20, 16
_CAP_IPC_LOCK = 14
_THP: tuple[Literal["never", "madvise", "always"], ...] = ("never", "madvise", "always")


class _Asked(NamedTuple):
    """What the constructor was given."""

    kind: ArenaKind
    nbytes: int
    alignment: int | None
    populate: bool
    huge_pages: HugePages
    numa_node: int | None
    label: str
    attach: str | None

    @property
    def page_bytes(self) -> int:
        return HUGE_PAGE_BYTES if self.huge_pages == "explicit" else PAGE_BYTES

    @property
    def mapped_bytes(self) -> int:
        """HOST-2."""
        return self.nbytes if self.kind in _MALLOC else pages.rounded(self.nbytes, self.page_bytes)

    @property
    def least_alignment(self) -> int:
        """HOST-1."""
        own = {"torch": 64, "heap": 16}.get(self.kind, self.page_bytes)
        own = HUGE_PAGE_BYTES if self.huge_pages == "transparent" else own
        return max(own, self.alignment or 1)

    def require(self, node_folder: str) -> None:
        """Refuse what no machine could give (HOST-3)."""
        kind = self.kind
        if not 1 <= self.nbytes < 2**47:
            raise ContractError(f"HOST-3: nbytes {self.nbytes} is not in [1, 2^47)")
        most = _MOST_ALIGNMENT.get(kind, 2 << 20)
        if self.alignment is not None and self.alignment not in _powers_of_two(most):
            raise ContractError(
                f"HOST-3: alignment {self.alignment} is not a power of two of at most {most},"
                f" the most that {kind} gives"
            )
        if self.huge_pages != "no" and kind not in _PRIVATE:
            raise ContractError(f"HOST-3: huge pages are for mmap and pinned, not for {kind}")
        if self.attach is not None and kind != "shm":
            raise ContractError(f"HOST-3: attach is for shm, not for {kind}")
        if self.numa_node is not None:
            self._require_node(node_folder)

    def _require_node(self, node_folder: str) -> None:
        given = f"HOST-3: numa_node {self.numa_node}"
        if self.kind in _MALLOC:
            raise ContractError(
                f"{given} is for mmap, shm and pinned: the pages of {self.kind}"
                " are shared with other blocks"
            )
        if self.attach is not None:
            raise ContractError(f"{given} is the creator's to choose, not an attacher's")
        known = pages.nodes(node_folder)
        if known is None:
            raise ContractError(f"{given} was given, and this kernel has no NUMA nodes")
        if self.numa_node not in known[0]:
            raise ContractError(
                f"{given} has no memory: the nodes with memory are {list(known[0])}"
            )


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


class HostArena:
    """`nbytes` of host memory of one kind, and torch tensors over it without a copy (HOST-1)."""

    node_folder: ClassVar[str] = "/sys/devices/system/node"

    made: ClassVar[ContextVar[Callable[["HostArena"], None] | None]] = ContextVar(
        "kvspec_oracle_arena_made", default=None
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
        if kind not in get_args(ArenaKind):
            raise ContractError(
                f"HOST-3: kind '{kind}' is not one of {', '.join(get_args(ArenaKind))}"
            )
        if huge_pages not in get_args(HugePages):
            raise ContractError(
                f"HOST-3: huge_pages '{huge_pages}' is not one of {', '.join(get_args(HugePages))}"
            )
        self.kind: ArenaKind = kind
        self.nbytes = operator.index(nbytes)
        self._asked = _Asked(
            kind, self.nbytes, alignment, populate, huge_pages, numa_node, label, attach
        )
        self._asked.require(self.node_folder)
        self.name: str | None = None
        self._tensors: list[weakref.ref[memoryview]] = []
        self._populated = self._threads = 0
        self._map(self._reserve())
        listener = self.made.get()
        if listener is not None and attach is None:
            listener(self)

    def _reserve(self) -> Reservation | None:
        """In the budget, before anything is mapped (HOST-28)."""
        asked = self._asked
        if asked.attach is not None or asked.huge_pages == "explicit":
            return None
        return MemoryBudget.current().reserve(asked.kind, asked.mapped_bytes, label=asked.label)

    def _map(self, reservation: Reservation | None) -> None:
        held = self._reserved = [] if reservation is None else [reservation]
        release: list[Callable[[], object]] = [lambda: _release(held)]
        try:
            address, give_back = self._get()
            release.insert(0, give_back)
            self._settle(address, release)
        except BaseException:
            for undo in release:
                undo()
            raise
        if reservation is not None:
            reservation.mapped(address, self._asked.mapped_bytes)
        memory = (ctypes.c_ubyte * self.nbytes).from_address(address)
        self._memory = memory
        self._end = weakref.finalize(memory, _run, os.getpid(), release)
        self._end.atexit = False

    def reserved_again(self) -> Reservation | None:
        """Its bytes in the budget once more, for `promise` (SAVER-16)."""
        again = self._reserve() if self._reserved else None
        if again is not None:
            again.mapped(self.address, self.mapped_bytes)
        return again

    def promise(self, reservation: Reservation | None) -> None:
        """Give up what is reserved, for memory that is given back, or have this in its place."""
        _release(self._reserved)
        if reservation is not None:
            self._reserved[:] = [reservation]

    def _get(self) -> tuple[int, Callable[[], None]]:
        """The address, and what gives it back."""
        asked = self._asked
        if self.kind == "torch":
            return boundary.torch_bytes(self.nbytes)
        if self.kind == "heap":
            return pages.heap(self.nbytes, asked.least_alignment)
        if self.kind == "shm":
            return self._segment()
        huge = asked.huge_pages == "explicit"
        return pages.zeros(self.kind, asked.mapped_bytes, asked.least_alignment, huge)

    def _segment(self) -> tuple[int, Callable[[], None]]:
        """Of a new segment or of one that somebody has (HOST-24)."""
        asked = self._asked
        with pages.on_node(asked.numa_node):
            segment = (
                SharedSegment.create(asked.label, self.nbytes)
                if asked.attach is None
                else SharedSegment.attach(asked.attach)
            )
        if segment.nbytes != self.nbytes:
            segment.close()
            raise ContractError(
                f"HOST-3: nbytes {self.nbytes} is not that of {segment.name},"
                f" which has {segment.nbytes}"
            )
        self.name = segment.name
        return segment.address, segment.close

    def _settle(self, address: int, release: list[Callable[[], object]]) -> None:
        """What is done to pages once: advice, node, memory, lock."""
        asked, nbytes = self._asked, self._asked.mapped_bytes
        if asked.huge_pages == "transparent":
            pages.advise(address, nbytes, mmap.MADV_HUGEPAGE)
        if asked.numa_node is not None:
            pages.bind(address, nbytes, asked.numa_node)
        undo = boundary.pin(address, nbytes) if self.kind == "pinned" else None
        if undo is not None:
            release.insert(0, undo)
        elif self.kind == "pinned":
            pages.lock(address, nbytes)
        if asked.populate or self.kind == "pinned":
            self._populate(address, self.nbytes, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- what it is ------------------------------------------------------------------------------

    @property
    def _closed(self) -> bool:
        return not self._end.alive

    def _open(self, call: str) -> int:
        """The address, or a refusal (HOST-18)."""
        if self._closed:
            raise ContractError(f"HOST-18: {call} of an arena that is closed")
        return ctypes.addressof(self._memory)

    @property
    def address(self) -> int:
        """Of the first byte (HOST-1)."""
        return self._open("address")

    @property
    def mapped_bytes(self) -> int:
        """Address space taken for it (HOST-2)."""
        return 0 if self._closed else self._asked.mapped_bytes

    @property
    def pinned_bytes(self) -> int:
        """How much of it is locked or registered (HOST-22)."""
        return self.mapped_bytes if self.kind == "pinned" else 0

    @property
    def page_bytes(self) -> int:
        """What `discard` goes by."""
        return self._asked.page_bytes

    def resident_bytes(self) -> int:
        """How many of `mapped_bytes` are on pages that have memory (HOST-21)."""
        address, nbytes = self._open("resident_bytes"), self._asked.mapped_bytes
        if self.name is not None:
            return min(os.stat(f"/dev/shm/{self.name}").st_blocks * 512, nbytes)
        return pages.resident(address, nbytes)

    def numa_nodes(self) -> Mapping[int, int] | None:
        """For each NUMA node how many bytes are on its pages (HOST-12)."""
        return pages.bytes_on_nodes(self._open("numa_nodes"), self._asked.mapped_bytes)

    # -- tensors ---------------------------------------------------------------------------------

    def tensor(
        self,
        dtype: "torch.dtype | None" = None,
        shape: Sequence[int] | None = None,
        offset: int = 0,
    ) -> "torch.Tensor":
        """A tensor over bytes from `offset` on, without a copy (HOST-13, HOST-14)."""
        self._open("tensor")
        dtype = dtype or boundary.BYTES
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
        window = (ctypes.c_ubyte * self.nbytes).from_buffer(self._memory)
        vars(window)["arena"] = self  # so that the object lives as long as the memory does
        part = memoryview(window).cast("B")[start:end]
        if start < end:
            self._tensors.append(weakref.ref(part, self._tensors.remove))
        return boundary.tensor_over(part, dtype, lengths)

    # -- pages -----------------------------------------------------------------------------------

    def _range(self, call: str, offset: int, nbytes: int | None) -> tuple[int, int]:
        """The bytes named, of which all are in the arena (HOST-20)."""
        self._open(call)
        start = operator.index(offset)
        end = start + (max(0, self.nbytes - start) if nbytes is None else operator.index(nbytes))
        if not 0 <= start <= end <= self.nbytes:
            raise ContractError(f"HOST-20: bytes [{start}, {end}) are not in [0, {self.nbytes})")
        return start, end

    def discard(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Give the memory of whole pages back; they read as zeros (HOST-19, HOST-20)."""
        start, end = self._range("discard", offset, nbytes)
        if self.kind not in ("mmap", "shm"):
            raise ContractError(f"HOST-20: discard is for mmap and shm, not for {self.kind}")
        if start % self.page_bytes or (end % self.page_bytes and end != self.nbytes):
            raise ContractError(
                f"HOST-20: bytes [{start}, {end}) are not whole pages of {self.page_bytes} bytes"
            )
        if start < end:
            advice = mmap.MADV_REMOVE if self.kind == "shm" else mmap.MADV_DONTNEED
            pages.advise(self.address + start, pages.rounded(end - start, self.page_bytes), advice)

    def populate(
        self, offset: int = 0, nbytes: int | None = None, threads: int | None = None
    ) -> None:
        """Give every page of these bytes memory of its own (HOST-7, HOST-20)."""
        start, end = self._range("populate", offset, nbytes)
        if threads is not None and threads < 1:
            raise ContractError(f"HOST-20: threads {threads} is not at least 1")
        if start < end:
            self._populate(self.address + start, end - start, threads)

    def _populate(self, address: int, nbytes: int, threads: int | None) -> None:
        """Counts the threads that it may use, and uses one."""
        reason = pages.advise(address, nbytes, pages.POPULATE_WRITE)
        if reason is not None:
            raise HostMemoryError(f"HOST-4: {self.kind} cannot populate {nbytes} bytes: {reason}")
        self._populated += pages.rounded(address % PAGE_BYTES + nbytes, PAGE_BYTES) // PAGE_BYTES
        wanted = pages.rounded(nbytes, _BYTES_PER_THREAD) // _BYTES_PER_THREAD
        self._threads += threads or min(wanted, len(os.sched_getaffinity(0)), _MAX_THREADS)

    def close(self) -> None:
        """Give the memory back, or refuse while a tensor is alive (HOST-16, HOST-17)."""
        alive = len(self._tensors)
        if alive:
            raise ContractError(
                f"HOST-16: close of an arena with {alive} tensor{'s' * (alive > 1)} alive"
            )
        self._end()

    # -- checking --------------------------------------------------------------------------------

    def view(self) -> HostArenaView:
        """The abstract state."""
        return HostArenaView(self.kind, self.nbytes, self._closed, len(self._tensors))

    def counters(self) -> dict[str, int]:
        """Pages that were populated, and threads that did it (HOST-27)."""
        return {"pages_populated": self._populated, "populate_threads": self._threads}

    def check(self) -> None:
        """Raise ContractError if the memory is not mapped as it must be (HOST-29)."""
        if self._closed:
            return
        if self.address % self._asked.least_alignment:
            raise ContractError(
                f"HOST-1: the address is not a multiple of {self._asked.least_alignment}"
            )
        if not pages.mapped(self.address, self._asked.mapped_bytes):
            raise ContractError(f"HOST-1: not all of {self.mapped_bytes} bytes are mapped")

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
        first, *others = reports
        for other in others:
            first = _both(first, other)
        return first


def _release(reservations: Sequence[Reservation]) -> None:
    for each in reservations:
        each.release()


def _run(owner: int, release: Sequence[Callable[[], object]]) -> None:
    """Undo what was done, if it was done by this process (HOST-10)."""
    if os.getpid() == owner:
        for undo in release:
            undo()


def _both(one: HostCapabilities, other: HostCapabilities) -> HostCapabilities:
    def nodes(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if a is None or b is None else tuple(sorted({*a} & {*b}))

    limits = [r.lockable_bytes for r in (one, other) if r.lockable_bytes is not None]
    return HostCapabilities(
        page_bytes=max(one.page_bytes, other.page_bytes),
        huge_page_bytes=max(one.huge_page_bytes, other.huge_page_bytes),
        explicit_huge_pages=one.explicit_huge_pages and other.explicit_huge_pages,
        transparent_huge_pages=min(
            one.transparent_huge_pages, other.transparent_huge_pages, key=_THP.index
        ),
        populates_on_request=one.populates_on_request and other.populates_on_request,
        memory_nodes=nodes(one.memory_nodes, other.memory_nodes),
        cpu_nodes=nodes(one.cpu_nodes, other.cpu_nodes),
        pins_by=one.pins_by if one.pins_by == other.pins_by else "mlock",
        lockable_bytes=min(limits, default=None),
    )


@cache
def _capabilities(node_folder: str) -> HostCapabilities:
    memory, cpu = pages.nodes(node_folder) or (None, None)
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = enabled.read_text(encoding="ascii") if enabled.exists() else "[never]"
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    status = Path("/proc/self/status").read_text(encoding="ascii")
    powers = int(status.partition("CapEff:")[2].split()[0], 16)
    free = powers >> _CAP_IPC_LOCK & 1 or soft == resource.RLIM_INFINITY
    return HostCapabilities(
        page_bytes=PAGE_BYTES,
        huge_page_bytes=HUGE_PAGE_BYTES,
        explicit_huge_pages=pages.number("/proc/meminfo", "HugePages_Total") > 0,
        transparent_huge_pages=next(word for word in _THP if f"[{word}]" in chosen),
        populates_on_request=pages.populates_on_request(),
        memory_nodes=memory,
        cpu_nodes=cpu,
        pins_by="cuda" if boundary.has_device() else "mlock",
        lockable_bytes=None if free else soft,
    )
