"""The file: records that a checksum chains, written whole, read until one is not. Spec: REC.

`format_of` knows the two formats by name, `read_log` by their first bytes.
"""

import itertools
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import BinaryIO, Literal, NamedTuple, TypeAlias
from zlib import crc32

import msgspec

from kvspec.errors import ContractError, write_unraisable
from kvspec.flight_recorder.events import SCHEMA, AnyEvent, Event, Start

__all__ = [
    "MAGIC",
    "Chain",
    "Format",
    "FormatName",
    "LogError",
    "LogWriter",
    "Path",
    "create",
    "format_of",
    "read_log",
]

MAGIC = b"kvspec01"
"""What a msgpack log begins with."""

FormatName: TypeAlias = Literal["ndjson", "msgpack"]
Path: TypeAlias = str | os.PathLike[str]

_HEAD = struct.Struct("<II")
_LINE = re.compile(rb'\{"crc":(\d{1,10}),')


class LogError(ContractError):
    """A log is truncated or corrupt; all events before that record were given (REC-6)."""

    def __init__(self, position: int, record: int, reason: str) -> None:
        super().__init__(f"REC-6: record {record}, at byte {position}: {reason}")
        self.position = position
        """Byte at which the record begins."""
        self.record = record
        """Its number in the file, from 0."""
        self.reason = reason


class Format(NamedTuple):
    """How a log is laid out. An event is encoded into a body, a body framed into a record."""

    magic: bytes
    encode: Callable[[Event], bytes]
    decode: Callable[[bytes], Event]
    frame: Callable[[bytes, int], tuple[bytes, int]]
    """(body, checksum of the record before) -> (record, its checksum)."""
    records: Callable[[BinaryIO], Iterator["Found"]]
    """The records of a file; ValueError says what is none."""


class Found(NamedTuple):
    """A record of a file."""

    crc: int
    checked: bytes
    """What the checksum is of."""
    body: bytes
    length: int
    """Bytes of the record."""


class Chain:
    """Gives each body the CRC-32 that starts with the one before it."""

    def __init__(self, layout: Format) -> None:
        self._frame = layout.frame
        self._crc = 0

    def record(self, body: bytes) -> bytes:
        record, self._crc = self._frame(body, self._crc)
        return record


def _line(body: bytes, crc: int) -> tuple[bytes, int]:
    members = body[1:]
    crc = crc32(members, crc)
    return b'{"crc":%d,%b\n' % (crc, members), crc


def _block(body: bytes, crc: int) -> tuple[bytes, int]:
    crc = crc32(body, crc)
    return _HEAD.pack(len(body), crc) + body, crc


def _lines(file: BinaryIO) -> Iterator[Found]:
    for line in file:
        if not line.endswith(b"\n"):
            raise ValueError(f"truncated: the line ends after {len(line)} bytes")
        head = _LINE.match(line)
        if head is None:
            raise ValueError('the line does not begin with {"crc":')
        members = line[head.end() : -1]
        yield Found(int(head[1]), members, b"{" + members, len(line))


def _blocks(file: BinaryIO) -> Iterator[Found]:
    while head := file.read(_HEAD.size):
        if len(head) < _HEAD.size:
            raise ValueError(f"truncated: {len(head)} of the {_HEAD.size} bytes of its head")
        length, crc = _HEAD.unpack(head)
        left = os.fstat(file.fileno()).st_size - file.tell()
        if left < length:  # asked first, for read() makes room for what it is asked for
            raise ValueError(f"truncated: {left} of {length} bytes")
        body = file.read(length)
        yield Found(crc, body, body, _HEAD.size + length)


@cache
def format_of(name: str) -> Format:
    """The format of this name; ContractError for another (REC-8)."""
    if name == "ndjson":
        return Format(
            magic=b"",
            encode=msgspec.json.Encoder().encode,
            decode=msgspec.json.Decoder(AnyEvent).decode,
            frame=_line,
            records=_lines,
        )
    if name == "msgpack":
        return Format(
            magic=MAGIC,
            encode=msgspec.msgpack.Encoder().encode,
            decode=msgspec.msgpack.Decoder(AnyEvent).decode,
            frame=_block,
            records=_blocks,
        )
    raise ContractError(f"REC-8: the format {name!r} is neither 'ndjson' nor 'msgpack'")


def create(path: Path) -> int:
    """A descriptor that appends to a new file, or to a device or pipe; else REC-8, or OSError."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        mode = os.stat(path).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
            return os.open(path, os.O_WRONLY | os.O_APPEND)
        raise ContractError(f"REC-8: {os.fspath(path)} exists, and is not overwritten") from None


class LogWriter:
    """Appends whole records to a file of its own, and never raises for it (REC-5, REC-7)."""

    def __init__(self, path: Path, layout: Format, flush_every: int) -> None:
        self.dropped = 0
        """Events that the file lacks, those not flushed yet aside."""
        self._flush_every = flush_every
        self._frame = layout.frame
        self._crc = 0
        self._head = layout.magic
        self._waiting: list[bytes] = []
        self._file: int | None = None
        self._file = create(path)

    def append(self, body: bytes) -> None:
        """Take an event, and flush where `flush_every` are waiting. O(bytes)."""
        if self._file is None:
            self.dropped += 1
            return
        record, self._crc = self._frame(body, self._crc)
        self._waiting.append(record)
        if len(self._waiting) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Give what waits to the system: after it, killing this process loses nothing (REC-5)."""
        if self._file is None or not self._waiting:
            return
        head, self._head = self._head, b""
        records, self._waiting = self._waiting, []
        data, written = head + b"".join(records), 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:] if written else data)
        except OSError as error:
            self._give_up(records, written - len(head), error)

    def _give_up(self, records: list[bytes], written: int, error: OSError) -> None:
        """Count the records not written to their end, and leave the file as it is (REC-7)."""
        ends = itertools.accumulate(map(len, records))
        self.dropped += sum(end > written for end in ends)
        self.close()
        write_unraisable(error)

    def close(self) -> None:
        """Flush, and let go of the file. Again: nothing."""
        self.flush()
        file, self._file = self._file, None
        if file is not None:
            try:
                os.close(file)
            except OSError as error:
                write_unraisable(error)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()


def read_log(path: Path) -> Iterator[Event]:
    """The events of a log of either format (REC-2), one after the other as they are read.

    Raises LogError at the first record that is not what was written (REC-6), after all before it.
    A log that ends between two records is whole: so does one of a process that was killed (REC-5).
    The memory is that of one record. `Start.first` says how many events a ring had dropped: those
    between its own number and `first` (REC-4).
    """
    with open(path, "rb") as file:
        first = file.read(len(MAGIC))
        if first == MAGIC:
            yield from _read(file, format_of("msgpack"))
        elif first and MAGIC.startswith(first):
            raise LogError(0, 0, f"truncated: {len(first)} bytes of {MAGIC.decode()}")
        else:
            file.seek(0)
            yield from _read(file, format_of("ndjson"))


def _read(file: BinaryIO, layout: Format) -> Iterator[Event]:
    position, crc, number, due = len(layout.magic), 0, 0, None
    records = layout.records(file)
    while True:
        try:
            found = next(records)
            crc = crc32(found.checked, crc)
            if found.crc != crc:
                raise ValueError(f"its checksum is {found.crc}, and {crc} that of what is there")
            event = _event(found.body, layout, due)
        except StopIteration:
            return
        except ValueError as error:
            raise LogError(position, number, str(error)) from None
        yield event
        position += found.length
        number += 1
        due = event.first if isinstance(event, Start) else event.n + 1


def _event(body: bytes, layout: Format, due: int | None) -> Event:
    """The event of a body that is as it was written; ValueError says what is wrong with it."""
    try:
        event = layout.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"not an event: {error}") from None
    if isinstance(event, Start) and event.schema != SCHEMA:
        raise ValueError(f"its schema is {event.schema}, and {SCHEMA} what is read here")
    if due is not None and event.n != due:
        raise ValueError(f"event {event.n} stands where {due} is due")
    return event
