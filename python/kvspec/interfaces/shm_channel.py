"""A channel of one writer and several readers in shared memory. Spec: CHAN."""

from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Bytes", "ReadBlock", "ShmChannel", "ShmChannelView", "WriteBlock"]

Bytes: TypeAlias = "bytes | bytearray | memoryview | Tensor"
"""What is sent, or received into: any contiguous buffer, or a contiguous tensor on the CPU."""


class ShmChannelView(NamedTuple):
    """The abstract state, as one end sees it."""

    closed: bool
    """This end; nothing else is seen from a closed one."""
    reader: int | None
    """Whose end this is; None for the writer's."""
    writer: str
    """`open`, `closed`, or `gone`: its process ended without closing."""
    written: int
    """Messages sent."""
    read: tuple[int, ...]
    """Of each reader, the messages received."""
    readers: tuple[str, ...]
    """Of each place: `absent`, `attached`, `gone`, `left` or `dropped`."""
    block: int | None
    """Bytes of the block that this end holds, or None."""


class WriteBlock(Protocol):
    """A block that the writer fills in place. Left without a commit it is given up (CHAN-14)."""

    @property
    def data(self) -> memoryview:
        """The block: `block_bytes` bytes, valid until the block is done with (CHAN-16)."""

    def tensor(self) -> "Tensor":
        """The block as uint8 [block_bytes] on the CPU, without a copy (CHAN-16)."""

    def commit(self, nbytes: int) -> None:
        """Make the first `nbytes` bytes the next message (CHAN-13, CHAN-16, CHAN-17)."""

    def give_up(self) -> None:
        """Send nothing (CHAN-14); nothing happens to a block that is done with."""

    def __enter__(self) -> Self:
        """Itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the block up unless it was committed (CHAN-14)."""


class ReadBlock(Protocol):
    """A message in its place. It counts as received when it is released (CHAN-15)."""

    @property
    def data(self) -> memoryview:
        """The message, read-only, valid until the block is released (CHAN-16)."""

    def tensor(self) -> "Tensor":
        """The message as uint8 on the CPU, without a copy; not to be written to (CHAN-16)."""

    def release(self) -> None:
        """Give the block back for another message (CHAN-15, CHAN-16)."""

    def __enter__(self) -> Self:
        """Itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the block unless that was done (CHAN-15)."""


class ShmChannel(Protocol):
    """One end of a channel (CHAN-29 says what lies in the segment).

    Calls that wait take `timeout` in seconds; None waits until there is something to do or a peer
    is seen to have died (CHAN-20, CHAN-21). Calls on a closed end, on an end of the other kind and
    from a second thread are refused (CHAN-26). A call that need not wait makes no system call
    unless somebody sleeps (CHAN-30).
    """

    death_check: float
    """Seconds after which a waiting end looks again whether its peers live."""

    @property
    def name(self) -> str:
        """Of the segment: what `attach` is given."""

    @property
    def block_bytes(self) -> int:
        """The most bytes that a message has."""

    @property
    def block_count(self) -> int:
        """Messages that a reader can be behind."""

    @property
    def reader_count(self) -> int:
        """Places of readers."""

    @property
    def reader(self) -> int | None:
        """Whose end this is; None for the writer's."""

    @classmethod
    def create(cls, label: str, block_bytes: int, block_count: int, reader_count: int) -> Self:
        """The writer's end of a new channel (CHAN-2, CHAN-3).

        Raises HostMemoryError if /dev/shm has no room for all of it, and ContractError for a label
        that a segment cannot have.
        """

    @classmethod
    def attach(cls, name: str, reader: int) -> Self:
        """The end of one reader, which has the messages from the first on (CHAN-4, CHAN-5)."""

    @property
    def ended(self) -> bool:
        """Whether the writer has closed and this reader has received everything (CHAN-18)."""

    def send(self, data: Bytes, timeout: float | None = None) -> bool:
        """Send a copy of the bytes; False if no room came (CHAN-6, CHAN-7, CHAN-8, CHAN-24)."""

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The next message; None if none came, or none will (CHAN-9, CHAN-10, CHAN-18, CHAN-21)."""

    def receive_into(self, buffer: Bytes, timeout: float | None = None) -> int | None:
        """As `receive`, into a buffer; how many bytes (CHAN-11, CHAN-12)."""

    def write_block(self, timeout: float | None = None) -> WriteBlock | None:
        """The next block, to be filled in place; None if no room came (CHAN-7, CHAN-13)."""

    def read_block(self, timeout: float | None = None) -> ReadBlock | None:
        """The next message in its place; None if none came, or none will (CHAN-15, CHAN-18)."""

    def wait_for_readers(self, timeout: float | None = None) -> bool:
        """Whether no place is absent any more (CHAN-20, CHAN-25)."""

    def drop_reader(self, reader: int) -> None:
        """Go on without a reader that is gone, or never came (CHAN-22, CHAN-23)."""

    def close(self) -> None:
        """Give the end back: of the writer's, the channel ends; a reader leaves (CHAN-18, CHAN-19).

        A block that is open is given up; a second close does nothing.
        """

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `bytes_copied`, `looks`, `sleeps`, `wakes` (CHAN-30)."""

    def view(self) -> ShmChannelView:
        """The abstract state. O(reader_count) system calls."""

    def check(self) -> None:
        """Raise ContractError if cursors or description are broken (CHAN-28). O(reader_count)."""
