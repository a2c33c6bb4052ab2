"""Channels over the core: what it has not, blocks and the way in. Spec: CHAN.

A block is memory of the segment behind a buffer of ctypes. Whoever looks at it, a slice, an array,
a tensor, has a reference to that buffer, so that its count of references tells whether the block
can be given back (CHAN-16).
"""

import ctypes
import sys
from abc import ABC, abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvspec._core import ShmChannelEnd
from kvspec.errors import ContractError
from kvspec.interfaces.shm_channel import ShmChannelView

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ReadBlock", "ShmChannel", "WriteBlock"]

_VIEWS = "slices, arrays and tensors"
_VIEWED = f"CHAN-16: somebody still has a view of the block: give up {_VIEWS} of it first"


class _Block(ABC):
    """A block under one end."""

    _end: "ShmChannel"
    _buffer: Any
    """The bytes, which keep the end alive."""
    _data: memoryview | None = None

    def __init__(self, end: "ShmChannel", place: tuple[int, int]) -> None:
        address, self.nbytes = place
        self._end = end
        self._buffer = (ctypes.c_char * self.nbytes).from_address(address)
        self._buffer.end = end

    @abstractmethod
    def _viewed(self) -> memoryview:
        """The block as its end may use it: written to, or only read."""

    @property
    def data(self) -> memoryview:
        """The bytes, valid until the block is done with (CHAN-16)."""
        self._require_open()
        if self._data is None:
            self._data = self._viewed()
        return self._data

    def tensor(self) -> "Tensor":
        """The bytes as a uint8 tensor, without a copy (CHAN-16)."""
        import torch

        self._require_open()
        if self.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._buffer, dtype=torch.uint8)

    def _require_open(self) -> None:
        if self._end._block is not self:
            raise ContractError("CHAN-16: this block is done with")

    def _let_go(self) -> None:
        """Refuse while somebody has a view; invalidate what `data` gave (CHAN-16)."""
        try:
            if self._data is not None:
                self._data.release()
        except BufferError:
            raise ContractError(_VIEWED) from None
        self._data = None
        if sys.getrefcount(self._buffer) > 2:  # ours, and the argument's
            raise ContractError(_VIEWED)
        self._end._block = None
        self._end.let_go()

    def __enter__(self) -> Self:
        return self


class WriteBlock(_Block):
    """A block that the writer fills in place."""

    def _viewed(self) -> memoryview:
        return memoryview(self._buffer).cast("B")

    def commit(self, nbytes: int) -> None:
        """Make the first `nbytes` bytes the next message (CHAN-13, CHAN-17)."""
        self._require_open()
        if not 0 <= nbytes <= self.nbytes:
            raise ContractError(f"CHAN-17: {nbytes} bytes are not in [0, {self.nbytes}]")
        self._let_go()
        self._end.publish(nbytes)

    def give_up(self) -> None:
        """Send nothing (CHAN-14)."""
        if self._end._block is self:
            self._let_go()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give_up()


class ReadBlock(_Block):
    """A message in its place."""

    def _viewed(self) -> memoryview:
        return memoryview(self._buffer).cast("B").toreadonly()

    def release(self) -> None:
        """Give the block back for another message (CHAN-15)."""
        self._require_open()
        self._let_go()
        self._end.advance()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._end._block is self:
            self.release()


class ShmChannel(ShmChannelEnd):
    """One end of a channel of one writer and several readers in shared memory."""

    _block: WriteBlock | ReadBlock | None = None

    @classmethod
    def create(cls, label: str, block_bytes: int, block_count: int, reader_count: int) -> Self:
        """The writer's end of a new channel (CHAN-2, CHAN-3)."""
        return cls(label, block_bytes, block_count, reader_count)

    @classmethod
    def attach(cls, name: str, reader: int) -> Self:
        """The end of one reader (CHAN-4, CHAN-5)."""
        return cls(name, reader)

    def write_block(self, timeout: float | None = None) -> WriteBlock | None:
        """The next block, to be filled in place; None if no room came (CHAN-7, CHAN-13)."""
        place = self.hold_room(timeout)
        if place is None:
            return None
        self._block = block = WriteBlock(self, place)
        return block

    def read_block(self, timeout: float | None = None) -> ReadBlock | None:
        """The next message in its place; None if none came, or none will (CHAN-15, CHAN-18)."""
        place = self.hold_message(timeout)
        if place is None:
            return None
        self._block = block = ReadBlock(self, place)
        return block

    def close(self) -> None:
        """Give the end back: the channel ends, or the reader leaves (CHAN-18, CHAN-19)."""
        if self._block is not None:
            self._block._let_go()
        self.close_end()

    def view(self) -> ShmChannelView:
        """The abstract state."""
        if self.closed:
            return ShmChannelView(True, self.reader, "", 0, (), (), None)
        block = None if self._block is None else self._block.nbytes
        return ShmChannelView(False, self.reader, *self.seen(), block)
