"""Memory of the host, by each of the ways that engines get it. Spec: HOST."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import ClassVar, Literal, NamedTuple, Protocol, Self, TypeAlias

import torch
from torch import Tensor

__all__ = ["ArenaKind", "HostArena", "HostArenaView", "HostCapabilities", "HugePages"]

ArenaKind: TypeAlias = Literal["torch", "heap", "mmap", "shm", "pinned"]
HugePages: TypeAlias = Literal["no", "transparent", "explicit"]


class HostArenaView(NamedTuple):
    """The abstract state."""

    kind: ArenaKind
    nbytes: int
    closed: bool
    tensors: int
    """How many tensors over it are alive."""


class HostCapabilities(NamedTuple):
    """What this process can have, in words that every rank can compare (HOST-25, HOST-26)."""

    page_bytes: int
    huge_page_bytes: int
    explicit_huge_pages: bool
    """Whether the machine has set any aside."""
    transparent_huge_pages: Literal["never", "madvise", "always"]
    populates_on_request: bool
    """MADV_POPULATE_WRITE, Linux 5.14; without it pages are touched."""
    memory_nodes: tuple[int, ...] | None
    """NUMA nodes that have memory, ascending; None where the kernel has no NUMA."""
    cpu_nodes: tuple[int, ...] | None
    """NUMA nodes that have CPUs: a device is near to one of these."""
    pins_by: Literal["mlock", "cuda"]
    lockable_bytes: int | None
    """By mlock, in all (RLIMIT_MEMLOCK); None: as many as there are."""


class HostArena(Protocol):
    """`nbytes` of host memory of one kind, and torch tensors over it without a copy (HOST-1)."""

    node_folder: ClassVar[str]
    """Where the kernel lists NUMA nodes: /sys/devices/system/node."""

    kind: ArenaKind
    nbytes: int
    """Exactly what was asked for."""

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
        """Reserve in the budget, then map (HOST-28, HOST-2), populate (HOST-7), bind (HOST-11).

        What the kernel maps is zeros (HOST-5), and of mmap nothing is touched unasked (HOST-6).
        Huge pages are asked for with `transparent` (HOST-9) and had with `explicit` (HOST-8).
        `label` is the reservation's, and stands in the name of a new segment; `attach` is the name
        of a segment that somebody holds, for shm alone (HOST-24). `alignment` in bytes, a power of
        two up to 64 for torch, a page for shm, 2 MiB for the others. ContractError for what no
        machine could give (HOST-3), HostMemoryError for what this one has not (HOST-4, HOST-8,
        HOST-23). O(1), or O(pages) if populated or pinned.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """`close`."""

    @property
    def address(self) -> int:
        """Of the first byte, a multiple of the alignment (HOST-1)."""

    @property
    def mapped_bytes(self) -> int:
        """Address space taken for it, nothing rounded up to a power of two (HOST-2); 0 if closed.

        `nbytes` for torch and heap, beside what malloc keeps for itself; whole pages for the rest.
        """

    @property
    def pinned_bytes(self) -> int:
        """How much of it is locked, or registered with the device (HOST-22)."""

    @property
    def page_bytes(self) -> int:
        """The size of its pages, which `discard` goes by: 4096, or that of explicit huge pages."""

    @property
    def name(self) -> str | None:
        """Of the segment, for shm (HOST-24)."""

    def resident_bytes(self) -> int:
        """How many of `mapped_bytes` are on pages that have memory now (HOST-21).

        O(pages): the kernel's pagemap is read, 8 bytes a page. Of shm it is what the segment has,
        whoever touched it, and O(1).
        """

    def numa_nodes(self) -> Mapping[int, int] | None:
        """For each NUMA node how many bytes are on its pages; None without NUMA (HOST-12).

        Of shm only the pages that this process has touched are known. O(pages).
        """

    def tensor(
        self, dtype: torch.dtype = torch.uint8, shape: Sequence[int] | None = None, offset: int = 0
    ) -> Tensor:
        """A tensor over bytes [offset, offset + elements * itemsize), without a copy (HOST-13).

        On the CPU, contiguous; without a shape one dimension, as much as there is room for. It and
        its views keep the memory (HOST-15). ContractError for bytes that the arena has not, or an
        offset that is no multiple of the item size (HOST-14). O(1).
        """

    def discard(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Give the memory of whole pages back; they read as zeros (HOST-19): mmap and shm alone.

        `nbytes` is to the end if not given. The address stays, and so do tensors. ContractError for
        other kinds and for parts of pages (HOST-20). O(pages).
        """

    def populate(
        self, offset: int = 0, nbytes: int | None = None, threads: int | None = None
    ) -> None:
        """Give every page of these bytes memory of its own, and leave the bytes (HOST-7).

        Any bytes of the arena will do (HOST-20). `threads`: one for each 64 MiB, at most one for
        each CPU of the process, if not given. HostMemoryError if there is not the memory (HOST-4).
        """

    def close(self) -> None:
        """Give the memory back; refused while a tensor over it is alive (HOST-16, HOST-17).

        What is called afterwards is refused, but `close`, `check` and `view` (HOST-18).
        """

    def view(self) -> HostArenaView:
        """The abstract state."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `pages_populated`, `populate_threads` (HOST-27)."""

    def check(self) -> None:
        """Raise ContractError if the memory is not mapped as it must be (HOST-29). O(mappings)."""

    @classmethod
    def capabilities(cls) -> HostCapabilities:
        """What this process can have, found out once (HOST-25)."""

    @staticmethod
    def agree(reports: Sequence[HostCapabilities]) -> HostCapabilities:
        """What all who report can have, whichever of them works it out (HOST-26)."""
