"""Named segments of POSIX shared memory. Spec: SHM."""

from typing import NamedTuple, Protocol, Self

from torch import Tensor

__all__ = ["Reaped", "SharedSegment", "SharedSegmentView"]


class Reaped(NamedTuple):
    """A segment that was removed because nobody holds it."""

    name: str
    nbytes: int
    """Its size; 0 if its creator died before all of it was reserved."""


class SharedSegmentView(NamedTuple):
    """The abstract state of a handle: whether it is open, and what it sees of the machine."""

    closed: bool
    linked: bool
    """Whether the name still leads to this segment; of a closed handle, whether it is there."""
    tensors: int
    """How many tensors over it are alive."""
    owned: bool
    """Whether this process opened the handle, and did not inherit it (SHM-16)."""


class SharedSegment(Protocol):
    """A handle of one process on a segment: the creator's or an attacher's, which are equals.

    It holds the segment with a lock that the kernel drops when the process dies. The last one that
    is closed takes the name with it. A handle is not thread-safe. Linux only.

    A pickle of it is its name; whoever reads it attaches, and is one more owner (SHM-17). Python's
    resource tracker knows nothing of it (SHM-18). No call waits for another process (SHM-20).
    """

    @property
    def name(self) -> str:
        """`kvspec.<label>.<pid>.<start time>.<serial>`, in /dev/shm, without the slash (SHM-1)."""

    @property
    def nbytes(self) -> int:
        """Exactly what was asked for (SHM-2)."""

    @classmethod
    def create(cls, label: str, nbytes: int, populate: bool = False) -> Self:
        """A new segment of exactly `nbytes` zeros under a name that nobody had.

        Dead segments are removed first (SHM-15). All of it is reserved when this returns, so a
        write to it never is a SIGBUS (SHM-2, SHM-3); with `populate` its pages are in the page
        tables of this process too. ContractError for a label that is not 1 to 64 of
        `[A-Za-z0-9_-]` and for nbytes < 1 (SHM-4); HostMemoryError if the machine has not the
        memory, descriptors or address space, with nothing left behind (SHM-5).
        O(names in /dev/shm + nbytes).
        """

    @classmethod
    def attach(cls, name: str) -> Self:
        """Another handle on a segment that somebody holds (SHM-6).

        ContractError unless it is one of ours, of this user, alive and complete (SHM-7);
        HostMemoryError as `create` (SHM-5). O(1).
        """

    @classmethod
    def reap(cls) -> list[Reaped]:
        """Remove every segment of ours that no process holds any more (SHM-13, SHM-14).

        Those that were removed, by name. O(names in /dev/shm).
        """

    @property
    def address(self) -> int:
        """Where it is mapped in this process; ContractError if it is closed (SHM-10)."""

    def tensor(self) -> Tensor:
        """uint8 [nbytes] over the mapping, without a copy, on the CPU (SHM-10, SHM-12). O(1)."""

    def close(self) -> None:
        """Give the handle back; the last one takes the name with it (SHM-8, SHM-9). O(nbytes).

        ContractError while a tensor over it is alive (SHM-11). A second time it does nothing. In a
        forked child it unmaps and leaves name and lock alone (SHM-16).
        """

    def __enter__(self) -> Self:
        """Itself; it is closed at the end of the block."""

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Close it."""

    def view(self) -> SharedSegmentView:
        """The abstract state."""

    def check(self) -> None:
        """Raise ContractError if the name leads elsewhere or the size has changed (SHM-19)."""
