"""A channel of one writer and several readers in shared memory. Spec: CHAN.

The memory is the segment itself, laid out as CHAN-29 says, so that ends of this class and of the
core work together. Words are read and written as a whole and in program order, which on x86-64 is
all that acquire and release ask for. It polls where the core sleeps, and rings no bell: a core's
end that sleeps on this one looks every `death_check` seconds.
"""

import ctypes
import fcntl
import os
import struct
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from time import monotonic, sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvspec.errors import ContractError, PeerDiedError
from kvspec.interfaces.shm_channel import ShmChannelView
from kvspec.oracle.shared_memory import SharedSegment

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ReadBlock", "ShmChannel", "WriteBlock"]

MAGIC = int.from_bytes(b"KVCHAN01", sys.byteorder)
LINE = 128
WRITTEN, CLOSED, STATES = LINE, LINE + 8, 4 * LINE
ABSENT, ATTACHED, LEFT, DROPPED = range(4)
STATE_NAMES = ("absent", "attached", "left", "dropped")
BLOCK_HEADER = 64
LOCKS = 2**62
POLL_SECONDS = 0.001
LIMITS = {
    "block_bytes": (2**40, "2^40"),
    "block_count": (2**20, "2^20"),
    "reader_count": (256, "256"),
}


def _lines(nbytes: int) -> int:
    """Rounded up to whole lines."""
    return -(-nbytes // LINE) * LINE


class _Block:
    """A block under one end: its bytes, and whether somebody still looks at them (CHAN-16)."""

    def __init__(self, end: "ShmChannel", nbytes: int, writable: bool) -> None:
        self._end, self._writable = end, writable
        self._bytes: Any = end._bytes_of_block(nbytes)
        self._data: memoryview | None = None

    @property
    def data(self) -> memoryview:
        """The bytes, valid until the block is done with (CHAN-16)."""
        self._require_open()
        if self._data is None:
            data = memoryview(self._bytes).cast("B")
            self._data = data if self._writable else data.toreadonly()
        return self._data

    def tensor(self) -> "Tensor":
        """The bytes as a uint8 tensor, without a copy (CHAN-16)."""
        import torch

        self._require_open()
        if len(self._bytes) == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._bytes, dtype=torch.uint8)

    def _require_open(self) -> None:
        if self._end._block is not self:
            raise ContractError("CHAN-16: this block is done with")

    def _let_go(self) -> None:
        """Refuse while somebody has a view; invalidate what `data` gave (CHAN-16)."""
        try:
            if self._data is not None:
                self._data.release()
            self._data = None
            held = sys.getrefcount(self._bytes) > 2
        except BufferError:
            held = True
        if held:
            raise ContractError(
                "CHAN-16: somebody still has a view of the block:"
                " give up slices, arrays and tensors of it first"
            )
        self._end._block = None

    def __enter__(self) -> Self:
        return self


class WriteBlock(_Block):
    """A block that the writer fills in place."""

    def commit(self, nbytes: int) -> None:
        """Make the first `nbytes` bytes the next message (CHAN-13, CHAN-17)."""
        self._require_open()
        if not 0 <= nbytes <= len(self._bytes):
            raise ContractError(f"CHAN-17: {nbytes} bytes are not in [0, {len(self._bytes)}]")
        self._let_go()
        self._end._publish(nbytes)

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

    def release(self) -> None:
        """Give the block back for another message (CHAN-15)."""
        self._require_open()
        self._let_go()
        self._end._advance()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._end._block is self:
            self.release()


class ShmChannel:
    """One end of a channel."""

    def __init__(self, segment: SharedSegment, shape: tuple[int, int, int], reader: int | None):
        self.name = segment.name
        self.block_bytes, self.block_count, self.reader_count = shape
        self.reader = reader
        self._death_check = 0.1
        self._segment: SharedSegment | None = segment
        self._fd = os.open(f"/dev/shm/{segment.name}", os.O_RDWR | os.O_CLOEXEC)
        self._unlock = weakref.finalize(self, os.close, self._fd)  # and the lock goes with it
        self._map(segment)
        self._block: _Block | None = None
        self._busy = Lock()
        self._copied = self._looks = self._sleeps = 0

    def _map(self, segment: SharedSegment) -> None:
        memory = memoryview((ctypes.c_char * segment.nbytes).from_address(segment.address))
        self._memory = memory.cast("B")
        whole = self._memory[: segment.nbytes & -8]
        self._words, self._halves = whole.cast("Q"), whole.cast("I")

    @property
    def _cursors(self) -> int:
        return STATES + _lines(4 * self.reader_count)

    def _offset(self, number: int) -> int:
        """Where the block of a message lies."""
        blocks = self._cursors + LINE * self.reader_count
        return blocks + number % self.block_count * _lines(BLOCK_HEADER + self.block_bytes)

    # -- both ends -------------------------------------------------------------------------------

    @classmethod
    def create(cls, label: str, block_bytes: int, block_count: int, reader_count: int) -> Self:
        """The writer's end of a new channel (CHAN-2, CHAN-3)."""
        shape = (block_bytes, block_count, reader_count)
        for (word, (limit, text)), value in zip(LIMITS.items(), shape, strict=True):
            if not 1 <= value <= limit:
                raise ContractError(f"CHAN-3: {word} {value} is not in [1, {text}]")
        blocks = STATES + _lines(4 * reader_count) + LINE * reader_count
        nbytes = blocks + block_count * _lines(BLOCK_HEADER + block_bytes)
        self = cls(SharedSegment.create(label, nbytes), shape, None)
        self._lock(0)
        self._words[1:4] = memoryview(struct.pack("=3Q", *shape)).cast("Q")
        self._words[0] = MAGIC
        return self

    @classmethod
    def attach(cls, name: str, reader: int) -> Self:
        """The end of one reader (CHAN-4, CHAN-5)."""
        segment = SharedSegment.attach(name)
        shape = _shape(segment)
        if not 0 <= reader < shape[2]:
            raise ContractError(f"CHAN-5: reader {reader} is not in [0, {shape[2]})")
        self = cls(segment, shape, reader)
        if not self._lock(1 + reader):
            raise self._no_place("attached")
        if self._states[reader] != ABSENT:
            gone = self._states[reader] == ATTACHED
            raise self._no_place("gone" if gone else self._state_of(reader))
        self._set_state(reader, ATTACHED)
        return self

    def _no_place(self, state: str) -> ContractError:
        """Why the place is not this end's, which lets go of it: an error keeps its frames."""
        self._unlock()
        return ContractError(f"CHAN-5: the place of reader {self.reader} is {state}, not absent")

    @contextmanager
    def _turn(
        self, name: str, writes: bool | None = None, timeout: float | None = 0
    ) -> Iterator[None]:
        """A call of this end, or the reason why it may not be (CHAN-26)."""
        if not self._busy.acquire(blocking=False):
            raise ContractError(f"CHAN-26: {name}: another thread is in a call of this end")
        try:
            if self._segment is None:
                raise ContractError(f"CHAN-26: {name}: this end is closed")
            if writes is not None:
                self._require(name, writes, timeout)
            yield
        finally:
            self._busy.release()

    def _require(self, name: str, writes: bool, timeout: float | None) -> None:
        if writes and self.reader is not None:
            raise ContractError(
                f"CHAN-26: {name} is for the writer, this is the end of reader {self.reader}"
            )
        if not writes and self.reader is None:
            raise ContractError(f"CHAN-26: {name} is for readers, this is the writer's end")
        if self._block is not None:
            raise ContractError(f"CHAN-26: {name}: a block of this end is open")
        if timeout is not None and not timeout >= 0:
            raise ContractError(f"CHAN-26: {name}: timeout {timeout:f} is not a time")

    @property
    def death_check(self) -> float:
        """Seconds after which a waiting end looks again whether its peers live."""
        return self._death_check

    @death_check.setter
    def death_check(self, seconds: float) -> None:
        if not 0.001 <= seconds <= 60:
            raise ContractError(f"CHAN-26: death_check {seconds:f} is not in [0.001, 60]")
        self._death_check = seconds

    def close(self) -> None:
        """Give the end back: the channel ends, or the reader leaves (CHAN-18, CHAN-19)."""
        if self._segment is None:
            return
        with self._turn("close"):
            if self._block is not None:
                self._block._let_go()
            if self.reader is None:
                self._halves[CLOSED // 4] = 1
            else:
                self._set_state(self.reader, LEFT)
            segment, self._segment = self._segment, None
            del self._memory, self._words, self._halves
            self._unlock()
            segment.close()

    def counters(self) -> dict[str, int]:
        """Exact costs so far (CHAN-30); the oracle wakes nobody."""
        return {
            "bytes_copied": self._copied,
            "looks": self._looks,
            "sleeps": self._sleeps,
            "wakes": 0,
        }

    def _wait(
        self, ready: Callable[[], bool], over: Callable[[], bool], timeout: float | None
    ) -> bool:
        """Whether it became ready before the timeout, or before it was over (CHAN-27)."""
        end = None if timeout is None else monotonic() + timeout
        while not ready():
            self._looks += 1
            if over():
                return False
            left = POLL_SECONDS if end is None else end - monotonic()
            if left <= 0:
                return False
            self._sleeps += 1
            sleep(min(POLL_SECONDS, left))
        return True

    # -- the writer ------------------------------------------------------------------------------

    def send(self, data: Any, timeout: float | None = None) -> bool:
        """Send a copy of the bytes; False if no room came (CHAN-6, CHAN-7, CHAN-8, CHAN-24)."""
        with self._turn("send", True, timeout):
            message = _buffer(data, "CHAN-8")
            if len(message) > self.block_bytes:
                raise ContractError(
                    f"CHAN-8: a message of {len(message)} bytes was given,"
                    f" a block has {self.block_bytes}"
                )
            if not self._room(timeout):
                return False
            start = self._offset(self._written) + BLOCK_HEADER
            self._memory[start : start + len(message)] = message
            self._copied += len(message)
            self._publish(len(message))
            return True

    def write_block(self, timeout: float | None = None) -> WriteBlock | None:
        """The next block, to be filled in place; None if no room came (CHAN-7, CHAN-13)."""
        with self._turn("write_block", True, timeout):
            if not self._room(timeout):
                return None
            self._block = block = WriteBlock(self, self.block_bytes, True)
            return block

    def wait_for_readers(self, timeout: float | None = None) -> bool:
        """Whether no place is absent any more (CHAN-20, CHAN-25)."""
        with self._turn("wait_for_readers", True, timeout):
            return self._wait(lambda: ABSENT not in self._states, self._notice_the_dead, timeout)

    def drop_reader(self, reader: int) -> None:
        """Go on without a reader that is gone, or never came (CHAN-22, CHAN-23)."""
        with self._turn("drop_reader", True):
            if not 0 <= reader < self.reader_count:
                raise ContractError(f"CHAN-23: reader {reader} is not in [0, {self.reader_count})")
            if self._states[reader] in (LEFT, DROPPED):
                raise ContractError(f"CHAN-23: reader {reader} has been {self._state_of(reader)}")
            if not self._lock(1 + reader):
                raise ContractError(f"CHAN-23: reader {reader} is alive")
            self._set_state(reader, DROPPED)
            self._lock(1 + reader, fcntl.F_UNLCK)

    @property
    def _written(self) -> int:
        return self._words[WRITTEN // 8]

    @property
    def _states(self) -> list[int]:
        return self._halves[STATES // 4 : STATES // 4 + self.reader_count].tolist()

    def _set_state(self, reader: int, state: int) -> None:
        self._halves[STATES // 4 + reader] = state

    def _counted(self) -> list[int]:
        """The readers that have to receive a block before it is written again."""
        return [r for r, state in enumerate(self._states) if state in (ABSENT, ATTACHED)]

    def _read(self, reader: int) -> int:
        return self._words[(self._cursors + LINE * reader) // 8]

    def _room(self, timeout: float | None) -> bool:
        def ready() -> bool:
            counted = self._counted()
            if not counted:
                states = ", ".join(map(self._state_of, range(self.reader_count)))
                raise PeerDiedError(f"CHAN-24: no reader is left: {states}")
            return self._written - min(map(self._read, counted)) < self.block_count

        return self._wait(ready, self._notice_the_dead, timeout)

    def _notice_the_dead(self) -> bool:
        """Raise if a reader that counts is gone (CHAN-20)."""
        gone = [r for r in self._counted() if self._state_of(r) == "gone"]
        if gone:
            named = ", ".join(map(str, gone))
            raise PeerDiedError(
                f"CHAN-20: reader {named} of {self.name} is gone, {self._written} messages were"
                f" sent: drop_reader({gone[0]}) goes on without it"
            )
        return False

    def _publish(self, nbytes: int) -> None:
        """The bytes are in place; let everybody see that they are."""
        self._words[self._offset(self._written) // 8] = nbytes
        self._words[WRITTEN // 8] += 1

    # -- a reader --------------------------------------------------------------------------------

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The next message; None if none came, or none will (CHAN-9, CHAN-10, CHAN-18, CHAN-21)."""
        with self._turn("receive", False, timeout):
            if not self._message(timeout):
                return None
            message = self._memory[self._here()].tobytes()
            self._copied += len(message)
            self._advance()
            return message

    def receive_into(self, buffer: Any, timeout: float | None = None) -> int | None:
        """As `receive`, into a buffer; how many bytes (CHAN-11, CHAN-12)."""
        with self._turn("receive_into", False, timeout):
            target = _buffer(buffer, "CHAN-12")
            if target.readonly:
                raise ContractError("CHAN-12: the buffer is read-only")
            if not self._message(timeout):
                return None
            message = self._memory[self._here()]
            if len(message) > len(target):
                raise ContractError(
                    f"CHAN-12: the message has {len(message)} bytes, the buffer {len(target)}"
                )
            target[: len(message)] = message
            self._copied += len(message)
            self._advance()
            return len(message)

    def read_block(self, timeout: float | None = None) -> ReadBlock | None:
        """The next message in its place; None if none came, or none will (CHAN-15, CHAN-18)."""
        with self._turn("read_block", False, timeout):
            if not self._message(timeout):
                return None
            here = self._here()
            self._block = block = ReadBlock(self, here.stop - here.start, False)
            return block

    @property
    def ended(self) -> bool:
        """Whether the writer has closed and this reader has received everything (CHAN-18)."""
        if self._segment is None or self.reader is None or not self._closed:
            return False
        return not self._left()

    @property
    def _closed(self) -> bool:
        return bool(self._halves[CLOSED // 4])

    def _left(self) -> int:
        """How many messages this reader has not received."""
        assert self.reader is not None
        return self._written - self._read(self.reader)

    def _message(self, timeout: float | None) -> bool:
        def over() -> bool:
            # What was sent is looked at after the writer was: it may have sent before it went.
            gone, closed = self._is_gone(0), self._closed
            if self._left() or not (closed or gone):
                return False
            if closed:
                return True
            raise PeerDiedError(
                f"CHAN-21: the writer of {self.name} is gone, its {self._written} messages were"
                " received"
            )

        return self._wait(lambda: self._left() > 0, over, timeout)

    def _here(self) -> slice:
        """Where the bytes of the next message lie."""
        assert self.reader is not None
        start = self._offset(self._read(self.reader))
        nbytes = self._words[start // 8]
        if nbytes > self.block_bytes:
            raise ContractError(f"CHAN-1: a message of {nbytes} bytes in a block")
        return slice(start + BLOCK_HEADER, start + BLOCK_HEADER + nbytes)

    def _advance(self) -> None:
        assert self.reader is not None
        self._words[(self._cursors + LINE * self.reader) // 8] += 1

    def _bytes_of_block(self, nbytes: int) -> Any:
        """The bytes of the block at hand, which keep the segment alive."""
        assert self._segment is not None
        number = self._written if self.reader is None else self._read(self.reader)
        start = self._segment.address + self._offset(number) + BLOCK_HEADER
        found: Any = (ctypes.c_char * nbytes).from_address(start)
        found.segment = self._segment
        return found

    # -- who lives -------------------------------------------------------------------------------

    def _lock(self, place: int, kind: int = fcntl.F_WRLCK) -> bool:
        """Take the lock of a place, or give it back; whether nobody else has it."""
        try:
            self._control(fcntl.F_OFD_SETLK, place, kind)
        except BlockingIOError:
            return False
        return True

    def _control(self, command: int, place: int, kind: int) -> int:
        lock = struct.pack("hhqqi4x", kind, 0, LOCKS + place, 1, 0)
        found: int = struct.unpack("h", fcntl.fcntl(self._fd, command, lock)[:2])[0]
        return found

    def _is_gone(self, place: int) -> bool:
        own = 0 if self.reader is None else 1 + self.reader
        free = self._control(fcntl.F_OFD_GETLK, place, fcntl.F_WRLCK) == fcntl.F_UNLCK
        return free and place != own

    def _state_of(self, reader: int) -> str:
        state = self._states[reader]
        if state == ATTACHED and self._is_gone(1 + reader):
            # Read again: it may have left before it let go of the lock.
            state = self._states[reader]
            return "gone" if state == ATTACHED else STATE_NAMES[state]
        return STATE_NAMES[state]

    # -- checking --------------------------------------------------------------------------------

    def view(self) -> ShmChannelView:
        """The abstract state."""
        if self._segment is None:
            return ShmChannelView(True, self.reader, "", 0, (), (), None)
        readers = range(self.reader_count)
        gone = self._is_gone(0)
        return ShmChannelView(
            closed=False,
            reader=self.reader,
            writer="closed" if self._closed else "gone" if gone else "open",  # in this order
            written=self._written,
            read=tuple(map(self._read, readers)),
            readers=tuple(map(self._state_of, readers)),
            block=None if self._block is None else len(self._block._bytes),
        )

    def check(self) -> None:
        """Raise ContractError if cursors or description are broken (CHAN-28)."""
        with self._turn("check"):
            shape = (self.block_bytes, self.block_count, self.reader_count)
            if self._words[:4].tolist() != [MAGIC, *shape]:
                raise ContractError("CHAN-2: the description in the segment is not the channel's")
            for reader in self._counted():
                # Others go on meanwhile: `before` <= what was written when `read` was read.
                before, read, written = self._written, self._read(reader), self._written
                if read > written or (
                    before > read + self.block_count and reader in self._counted()
                ):
                    raise ContractError(
                        f"CHAN-1: reader {reader} has received {read} of {written} messages,"
                        f" in {self.block_count} blocks"
                    )


def _shape(segment: SharedSegment) -> tuple[int, int, int]:
    """What the segment says of itself."""
    if segment.nbytes >= STATES:
        magic, *shape = (ctypes.c_uint64 * 4).from_address(segment.address)
        limits = [limit for limit, _ in LIMITS.values()]
        if magic == MAGIC and all(1 <= n <= limit for n, limit in zip(shape, limits, strict=True)):
            block_bytes, block_count, reader_count = shape
            blocks = STATES + _lines(4 * reader_count) + LINE * reader_count
            if segment.nbytes >= blocks + block_count * _lines(BLOCK_HEADER + block_bytes):
                return block_bytes, block_count, reader_count
    raise ContractError(f"CHAN-5: the segment {segment.name} is no channel of this layout")


def _buffer(given: Any, clause: str) -> memoryview:
    """The bytes of a contiguous buffer, or of a contiguous tensor on the CPU."""
    if hasattr(given, "untyped_storage"):
        if given.device.type != "cpu" or not given.is_contiguous():
            raise ContractError(f"{clause}: a tensor was given that is not contiguous on the CPU")
        nbytes = given.numel() * given.element_size()
        found: Any = (ctypes.c_char * nbytes).from_address(given.data_ptr() or 1)
        found.tensor = given
        return memoryview(found).cast("B")
    try:
        whole = memoryview(given)
        return whole.cast("B") if whole.nbytes else memoryview(bytearray())
    except TypeError:
        raise ContractError(f"{clause}: {type(given).__name__} is no contiguous buffer") from None
