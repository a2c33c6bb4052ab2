"""Memory of the host, by each of the ways that engines get it. Spec: HOST."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = ["ArenaKind", "HostArena", "HostArenaView", "HugePages"]

ArenaKind: TypeAlias = Literal["torch", "heap", "mmap", "shm", "pinned"]
HugePages: TypeAlias = Literal["no", "transparent", "explicit"]


class HostArenaView(NamedTuple):
    """The abstract state."""

    kind: ArenaKind
    nbytes: int
    closed: bool
    tensors: int
    """How many tensors over it are alive."""


class HostArena(Protocol):
    """`nbytes` of host memory of one kind, and torch tensors over it without a copy."""

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
        """`label` and `attach` (the name of a segment) are for shm alone."""

    @property
    def address(self) -> int:
        """Of the first byte, a multiple of the alignment."""

    @property
    def mapped_bytes(self) -> int:
        """Address space taken for it."""

    @property
    def name(self) -> str | None:
        """Of the segment, for shm."""

    def resident_bytes(self) -> int:
        """How much of it has physical pages now."""

    def tensor(
        self, dtype: torch.dtype = torch.uint8, shape: Sequence[int] | None = None, offset: int = 0
    ) -> Tensor:
        """A tensor over bytes [offset, offset + elements * itemsize), without a copy."""

    def discard(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Give the physical pages of whole pages back; reads there give zeros (mmap, shm)."""

    def close(self) -> None:
        """Give the memory back; refused while a tensor over it is alive."""

    def view(self) -> HostArenaView:
        """The abstract state."""
