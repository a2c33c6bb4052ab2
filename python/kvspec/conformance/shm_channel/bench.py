"""What tests of a channel use: messages, buffers, and ends that are watched. Spec: CHAN."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import Watched, watch
from kvspec.errors import ContractError
from kvspec.interfaces.shm_channel import ReadBlock, ShmChannel, WriteBlock

__all__ = ["MESSAGES", "NO_BUFFERS", "NO_MESSAGES", "SHAPE", "ChannelBench", "Open", "peek", "poke"]

SHAPE = {"label": "suite", "block_bytes": 16, "block_count": 2, "reader_count": 2}
MESSAGES: dict[str, tuple[Callable[[], Any], bytes]] = {
    "bytes": (lambda: b"12345", b"12345"),
    "nothing": (lambda: b"", b""),
    "a whole block": (lambda: bytes(range(16)), bytes(range(16))),
    "bytearray": (lambda: bytearray(b"12345"), b"12345"),
    "memoryview": (lambda: memoryview(b"0123456789")[2:5], b"234"),
    "array": (lambda: np.array([[1, 2], [3, 4]], dtype=np.int16), struct.pack("=4h", 1, 2, 3, 4)),
    "tensor": (lambda: torch.tensor([1.5, 2.5]), struct.pack("=2f", 1.5, 2.5)),
    "tensor of bfloat16": (lambda: torch.tensor([1.0], dtype=torch.bfloat16), b"\x80\x3f"),
    "tensor of nothing": (lambda: torch.zeros(0, 3), b""),
    "row of a tensor": (lambda: torch.arange(6).view(3, 2)[1], struct.pack("=2q", 2, 3)),
}
NO_MESSAGES: dict[str, Callable[[], Any]] = {
    "a byte too many": lambda: bytes(17),
    "a long array": lambda: np.zeros(3, dtype=np.int64),
    "text": lambda: "12345",
    "a number": lambda: 5,
    "None": lambda: None,
    "a strided view": lambda: memoryview(b"0123456789")[::2],
    "a strided array": lambda: np.zeros((2, 2), dtype=np.int8)[:, 0],
    "a strided tensor": lambda: torch.zeros(2, 2)[:, 0],
    "a tensor elsewhere": lambda: torch.zeros(2, device="meta"),
}
NO_BUFFERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: bytes(16),
    "a read-only view": lambda: memoryview(bytearray(16)).toreadonly(),
    "too short": lambda: bytearray(4),
    "no room at all": lambda: bytearray(),
    "a short tensor": lambda: torch.zeros(1),
    "a strided view": lambda: memoryview(bytearray(32))[::2],
    "a strided tensor": lambda: torch.zeros(8, 8)[:, 0],
    "None": lambda: None,
}


def poke(name: str, offset: int, data: bytes) -> None:
    """Write into a segment behind everybody's back."""
    with Path("/dev/shm", name).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def peek(name: str, offset: int, form: str) -> tuple[Any, ...]:
    with Path("/dev/shm", name).open("rb") as file:
        file.seek(offset)
        return struct.unpack(form, file.read(struct.calcsize(form)))


class Open:
    """A block with the view of its end, so that a proxy can stand around it."""

    def __init__(self, block: Any, end: Any) -> None:
        self._block, self.view = block, end.view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class ChannelBench(Conformance):
    """Tests of `ShmChannel`, all ends in one process."""

    @property
    def long(self) -> float:
        """Seconds that nothing takes, unless it is broken, as a mutant is."""
        return 0.2 if self.impl_name == MUTANT else 20.0

    def end(self, make: str, **arguments: Any) -> Any:
        call = getattr(self.impl.ShmChannel, make)
        if self.impl_name == MUTANT:
            return call(**arguments)
        return watch(self.impl_name, call, ShmChannel, "shm_channel", **arguments)

    def writer(self, **given: Any) -> Any:
        return self.end("create", **(SHAPE | given))

    def channel(self, **given: Any) -> tuple[Any, list[Any]]:
        """A writer of two blocks of 16 bytes and its two readers, unless told otherwise."""
        writer = self.writer(**given)
        readers = range(given.get("reader_count", SHAPE["reader_count"]))
        return writer, [self.end("attach", name=writer.name, reader=r) for r in readers]

    def block(self, block: Any, end: Any) -> Any:
        """The block, watched unless it is a mutant's."""
        assert block is not None
        if self.impl_name == MUTANT:
            return block
        kind = WriteBlock if end.reader is None else ReadBlock
        return Watched(Open(block, end), self.impl_name, kind, ("shm_channel",))

    def refuses(self, end: Any, clause_id: str, call: Callable[[], object]) -> None:
        """It refuses, names the clause, and changes nothing."""
        before = end.view()
        with pytest.raises(ContractError) as caught:
            call()
        assert caught.value.clause == clause_id
        assert end.view() == before
