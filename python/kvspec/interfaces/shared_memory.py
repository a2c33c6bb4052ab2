"""Named segments of POSIX shared memory. Spec: SHM."""

from typing import NamedTuple, Protocol, Self

from torch import Tensor

__all__ = ["Reaped", "SharedSegment", "SharedSegmentView"]


class Reaped(NamedTuple):
    """A segment that was removed because nobody holds it."""

    name: str
    nbytes: int


class SharedSegmentView(NamedTuple):
    """The abstract state of a handle: whether it is open, and what it sees of the machine."""

    closed: bool
    linked: bool
    """Whether the name still leads to this segment."""
    tensors: int
    """How many tensors over it are alive."""


class SharedSegment(Protocol):
    """A handle of one process on a segment: the creator's or an attacher's, which are equals."""

    name: str
    """`kvspec.<label>.<pid>.<start time>.<serial>`, in /dev/shm, without the slash."""
    nbytes: int

    @classmethod
    def create(cls, label: str, nbytes: int, populate: bool = False) -> Self:
        """A new segment of exactly `nbytes` zeros under a name that nobody had."""

    @classmethod
    def attach(cls, name: str) -> Self:
        """Another handle on a segment that somebody holds."""

    @staticmethod
    def reap() -> list[Reaped]:
        """Remove every segment of ours that no process holds any more."""

    @property
    def address(self) -> int:
        """Where it is mapped in this process."""

    def tensor(self) -> Tensor:
        """uint8 [nbytes] over the mapping, without a copy, on the CPU."""

    def close(self) -> None:
        """Give the handle back; the last one takes the name with it."""

    def view(self) -> SharedSegmentView:
        """The abstract state."""
