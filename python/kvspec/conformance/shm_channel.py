"""What every channel in shared memory must do. Spec: CHAN."""

import random
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import Watched, watch
from kvspec.errors import ContractError, PeerDiedError
from kvspec.interfaces.shm_channel import ReadBlock, ShmChannel, WriteBlock

__all__ = ["ShmChannelConformance", "poke"]

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


class _Open:
    """A block with the view of its end, so that a proxy can stand around it."""

    def __init__(self, block: Any, end: Any) -> None:
        self._block, self.view = block, end.view

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class ShmChannelConformance(Conformance):
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
        return Watched(_Open(block, end), self.impl_name, kind, ("shm_channel",))

    def refuses(self, end: Any, clause_id: str, call: Callable[[], object]) -> None:
        """It refuses, names the clause, and changes nothing."""
        before = end.view()
        with pytest.raises(ContractError) as caught:
            call()
        assert caught.value.clause == clause_id
        assert end.view() == before

    # -- ends ------------------------------------------------------------------------------------

    @clause("CHAN-2", "CHAN-4")
    def test_a_new_channel_is_empty_and_its_readers_come_one_by_one(self) -> None:
        writer = self.writer()
        assert writer.view()[1:] == (None, "open", 0, (0, 0), ("absent", "absent"), None)
        assert (writer.block_bytes, writer.block_count, writer.reader_count) == (16, 2, 2)
        assert Path("/dev/shm", writer.name).exists()
        reader = self.end("attach", name=writer.name, reader=1)
        assert (reader.name, reader.reader, reader.block_bytes) == (writer.name, 1, 16)
        assert reader.view() == writer.view()._replace(reader=1)
        assert reader.view().readers == ("absent", "attached")
        name = writer.name
        writer.close()
        reader.close()
        assert not Path("/dev/shm", name).exists()

    @clause("CHAN-3")
    @pytest.mark.parametrize("word", ["block_bytes", "block_count", "reader_count"])
    @pytest.mark.parametrize("value", [-1, 0, 2**40 + 1])
    def test_create_refuses_what_no_channel_has(self, word: str, value: int) -> None:
        before = set(Path("/dev/shm").glob("kvspec.chan-3.*"))
        with pytest.raises(ContractError, match=f"CHAN-3: {word} {value} is not in"):
            self.writer(label="chan-3", **{word: value})
        assert set(Path("/dev/shm").glob("kvspec.chan-3.*")) == before

    @clause("CHAN-4")
    def test_a_reader_has_what_was_sent_before_it_came(self) -> None:
        writer = self.writer()
        assert writer.send(b"one")
        assert writer.send(b"two")
        assert not writer.send(b"three", timeout=0)
        for number in range(2):
            reader = self.end("attach", name=writer.name, reader=number)
            assert (reader.receive(timeout=0), reader.receive(timeout=0)) == (b"one", b"two")
        assert writer.send(b"three", timeout=0)

    @clause("CHAN-5")
    @pytest.mark.parametrize("reader", [-1, 2, 2**40])
    def test_attach_refuses_a_place_that_there_is_not(self, reader: int) -> None:
        writer = self.writer()
        name = writer.name
        self.refuses(writer, "CHAN-5", lambda: self.end("attach", name=name, reader=reader))

    @clause("CHAN-5")
    @pytest.mark.parametrize("state", ["attached", "gone", "left", "dropped"])
    def test_a_place_is_taken_once(self, state: str) -> None:
        writer = self.writer()
        ends = [] if state == "dropped" else [self.end("attach", name=writer.name, reader=0)]
        if state == "dropped":
            writer.drop_reader(0)
        elif state == "left":
            ends[0].close()
        elif state == "gone":
            ends.clear()
        assert writer.view().readers[0] == state
        self.refuses(writer, "CHAN-5", lambda: self.end("attach", name=writer.name, reader=0))

    @clause("CHAN-5")
    @pytest.mark.parametrize(
        ("offset", "data"),
        [(0, b"X"), (16, bytes(8)), (24, b"\xff\xff\xff\xff"), (8, b"\xff\xff\xff")],
        ids=["another magic", "no blocks", "many readers", "blocks beyond the segment"],
    )
    def test_attach_refuses_what_is_no_channel(self, offset: int, data: bytes) -> None:
        writer = self.writer()
        poke(writer.name, offset, data)
        with pytest.raises(ContractError, match=r"CHAN-5: the segment .* is no channel"):
            self.end("attach", name=writer.name, reader=0)

    # -- messages --------------------------------------------------------------------------------

    @clause("CHAN-6", "CHAN-9")
    @pytest.mark.parametrize("kind", MESSAGES)
    def test_everybody_receives_a_copy(self, kind: str) -> None:
        writer, readers = self.channel()
        make, expected = MESSAGES[kind]
        assert writer.send(make(), timeout=0) is True
        assert writer.view().written == 1
        for reader in readers:
            assert reader.receive(timeout=0) == expected
            assert reader.receive(timeout=0) is None

    @clause("CHAN-6")
    def test_what_is_sent_is_a_copy(self) -> None:
        writer, (reader, _) = self.channel()
        data = bytearray(b"before")
        writer.send(data)
        data[:] = b"after!"
        assert reader.receive() == b"before"

    @clause("CHAN-7")
    @pytest.mark.parametrize("timeout", [0, 0.01])
    def test_a_full_ring_takes_nothing(self, timeout: float) -> None:
        writer, (fast, slow) = self.channel()
        for message in (b"one", b"two"):
            writer.send(message)
            fast.receive()
        before = writer.view()
        assert writer.send(b"three", timeout=timeout) is False
        assert writer.write_block(timeout=timeout) is None
        assert writer.view() == before
        assert fast.receive(timeout=0) is None
        assert slow.receive() == b"one"
        assert writer.send(b"three", timeout=timeout) is True
        assert (slow.receive(), slow.receive(), fast.receive()) == (b"two", b"three", b"three")

    @clause("CHAN-8")
    @pytest.mark.parametrize("kind", NO_MESSAGES)
    def test_what_is_no_message_is_not_sent(self, kind: str) -> None:
        writer, (reader, _) = self.channel()
        writer.send(b"one")
        self.refuses(writer, "CHAN-8", lambda: writer.send(NO_MESSAGES[kind]()))
        assert (reader.receive(timeout=0), reader.receive(timeout=0)) == (b"one", None)

    @clause("CHAN-1", "CHAN-9")
    def test_random_histories_lose_nothing(self) -> None:
        for seed in range(8):
            self._play(random.Random(seed))

    def _play(self, draw: random.Random) -> None:
        count = draw.randint(1, 3)
        writer, readers = self.channel(block_count=draw.randint(1, 3), reader_count=count)
        sent: list[bytes] = []
        received: list[list[bytes]] = [[] for _ in readers]
        for step in range(60):
            if draw.random() < 0.5:
                message = step.to_bytes(2, "big") * draw.randint(0, 8)
                room = len(sent) - min(map(len, received)) < writer.block_count
                assert writer.send(message, timeout=0) == room
                sent += [message] * room
            else:
                number = draw.randrange(count)
                message_or_none = readers[number].receive(timeout=0)
                behind = len(received[number]) < len(sent)
                assert (message_or_none is not None) == behind
                received[number] += [message_or_none] * behind
            assert all(each == sent[: len(each)] for each in received)
            assert writer.view().read == tuple(map(len, received))
            writer.check()

    @clause("CHAN-10")
    @pytest.mark.parametrize("timeout", [0, 0.01])
    @pytest.mark.parametrize("call", ["receive", "receive_into", "read_block"])
    def test_nothing_comes(self, call: str, timeout: float) -> None:
        writer, (reader, _) = self.channel()
        writer.send(b"one")
        reader.receive()
        before = reader.view()
        arguments = [bytearray(b"kept")] if call == "receive_into" else []
        assert getattr(reader, call)(*arguments, timeout=timeout) is None
        assert arguments == [b"kept"][: len(arguments)]
        assert reader.view() == before
        assert not reader.ended

    @clause("CHAN-11")
    def test_a_message_comes_into_a_buffer(self) -> None:
        writer, (reader, other) = self.channel()
        writer.send(b"12345")
        writer.send(b"")
        buffer = bytearray(b"........")
        assert reader.receive_into(buffer) == 5
        assert buffer == b"12345..."
        assert reader.receive_into(bytearray()) == 0
        tensor = torch.zeros(2, 3, dtype=torch.uint8)
        assert other.receive_into(tensor) == 5
        assert tensor.flatten().tolist() == [*b"12345", 0]
        array = np.zeros(3, dtype=np.int64)
        assert other.receive_into(array) == 0
        assert reader.receive_into(array, timeout=0) is None

    @clause("CHAN-12")
    @pytest.mark.parametrize("kind", NO_BUFFERS)
    def test_a_message_that_does_not_fit_stays(self, kind: str) -> None:
        writer, (reader, _) = self.channel()
        writer.send(b"12345")
        self.refuses(reader, "CHAN-12", lambda: reader.receive_into(NO_BUFFERS[kind]()))
        assert reader.receive(timeout=0) == b"12345"

    # -- blocks ----------------------------------------------------------------------------------

    @clause("CHAN-13")
    def test_a_block_is_a_message_once_it_is_committed(self) -> None:
        writer, (reader, _) = self.channel()
        raw = writer.write_block()
        block = self.block(raw, writer)
        assert len(raw.data) == 16
        assert not raw.data.readonly
        raw.data[:5] = b"12345"
        raw.tensor()[4] = ord("6")
        assert reader.receive(timeout=0) is None
        assert writer.view()[3:] == (0, (0, 0), ("attached", "attached"), 16)
        block.commit(5)
        assert writer.view().written == 1
        assert reader.receive(timeout=0) == b"12346"
        with writer.write_block() as block:
            block.data[:2] = b"ok"
            block.commit(2)
        assert reader.receive(timeout=0) == b"ok"

    @clause("CHAN-14")
    def test_a_block_that_is_given_up_is_no_message(self) -> None:
        writer, (reader, _) = self.channel()
        raw = writer.write_block()
        raw.data[:] = b"x" * 16
        self.block(raw, writer).give_up()
        assert writer.view().written == 0
        with writer.write_block() as block:
            block.data[:] = b"y" * 16
        assert writer.view().written == 0
        self._fail_in_a_block(writer)
        assert writer.view().written == 0
        assert writer.send(b"one")
        raw = writer.write_block()
        raw.data[:] = b"x" * 16
        writer.close()
        assert (reader.receive(), reader.receive()) == (b"one", None)

    def _fail_in_a_block(self, writer: Any) -> None:
        with suppress(KeyError), writer.write_block() as block:
            block.data[:] = b"z" * 16
            raise KeyError

    @clause("CHAN-15")
    def test_a_message_is_read_in_its_place(self) -> None:
        writer, (reader, other) = self.channel()
        for message in (b"one", b"", b"three"):
            assert writer.send(message)
            raw = reader.read_block(timeout=0)
            assert bytes(raw.data) == message
            assert raw.data.readonly
            assert bytes(raw.tensor().tolist()) == message
            before = reader.view().read[0]
            assert reader.view().block == len(message)
            other.receive()
            assert writer.send(b"next")
            assert not writer.send(b"overwrites", timeout=0)
            assert bytes(raw.data) == message
            self.block(raw, reader).release()
            assert reader.view().read[0] == before + 1
            assert (reader.receive(), other.receive()) == (b"next", b"next")
        writer.send(b"last")
        with reader.read_block() as block:
            assert block.data[0] == ord("l")
        assert reader.receive(timeout=0) is None
        assert reader.read_block(timeout=0) is None

    @clause("CHAN-16")
    @pytest.mark.parametrize(
        "look",
        [
            pytest.param(lambda block: block.data[1:2], id="slice"),
            pytest.param(lambda block: np.frombuffer(block.data, dtype=np.uint8), id="array"),
            pytest.param(lambda block: block.tensor(), id="tensor"),
            pytest.param(lambda block: block.tensor()[1:], id="part of a tensor"),
        ],
    )
    @pytest.mark.parametrize("writes", [True, False], ids=["write", "read"])
    def test_a_block_is_done_with_when_nobody_looks(
        self, writes: bool, look: Callable[[Any], Any]
    ) -> None:
        writer, (reader, _) = self.channel()
        writer.send(b"12345")
        end = writer if writes else reader
        raw = end.write_block() if writes else end.read_block()
        block = self.block(raw, end)
        done = (lambda: block.commit(4)) if writes else block.release
        view = look(raw)
        self.refuses(end, "CHAN-16", done)
        self.refuses(end, "CHAN-16", end.close)
        del view
        done()
        self.refuses(end, "CHAN-16", done)

    @clause("CHAN-16")
    def test_a_block_is_not_used_twice(self) -> None:
        writer, (reader, _) = self.channel()
        raw = writer.write_block()
        data = raw.data
        data[:3] = b"one"
        self.block(raw, writer).commit(3)
        with pytest.raises(ValueError, match="released"):
            data[0] = 0
        with pytest.raises(ContractError, match="CHAN-16: this block is done with"):
            _ = raw.data
        with pytest.raises(ContractError, match="CHAN-16: this block is done with"):
            raw.tensor()
        raw.give_up()
        second = writer.write_block()
        self.refuses(writer, "CHAN-16", lambda: self.block(raw, writer).commit(3))
        second.commit(0)
        message = reader.read_block()
        data = message.data
        message.release()
        with pytest.raises(ValueError, match="released"):
            bytes(data)
        self.refuses(reader, "CHAN-16", message.release)
        assert reader.view().read == (1, 0)

    @clause("CHAN-17")
    @pytest.mark.parametrize("nbytes", [-1, 17])
    def test_no_more_than_a_block_is_committed(self, nbytes: int) -> None:
        writer, (reader, _) = self.channel()
        raw = writer.write_block()
        self.refuses(writer, "CHAN-17", lambda: self.block(raw, writer).commit(nbytes))
        assert reader.receive(timeout=0) is None
        raw.commit(16)

    # -- ends of ends ----------------------------------------------------------------------------

    @clause("CHAN-18")
    @pytest.mark.parametrize("call", ["receive", "receive_into", "read_block"])
    def test_after_the_writer_closed_what_is_left_is_received(self, call: str) -> None:
        writer, (reader, late) = self.channel()
        writer.send(b"one")
        writer.send(b"two")
        writer.close()
        writer.close()
        assert writer.view().closed
        assert (reader.view().writer, reader.ended) == ("closed", False)
        assert (reader.receive(), reader.receive()) == (b"one", b"two")
        assert reader.ended
        arguments = [bytearray(16)] if call == "receive_into" else []
        assert getattr(reader, call)(*arguments) is None
        assert getattr(reader, call)(*arguments, timeout=self.long) is None
        assert not late.ended
        assert late.receive(timeout=0) == b"one"

    @clause("CHAN-19")
    def test_nobody_waits_for_a_reader_that_left(self) -> None:
        writer, (reader, other) = self.channel()
        other.close()
        other.close()
        assert writer.view().readers == ("attached", "left")
        for message in (b"one", b"two", b"three"):
            assert writer.send(message, timeout=0)
            assert reader.receive(timeout=0) == message
        assert writer.wait_for_readers(timeout=0)

    @clause("CHAN-20")
    @pytest.mark.parametrize("call", ["send", "write_block", "wait_for_readers"])
    def test_a_writer_that_would_wait_notices_the_dead(self, call: str) -> None:
        writer, readers = self.channel(reader_count=4)
        if call == "wait_for_readers":
            writer = self.writer(reader_count=4)
            readers = [self.end("attach", name=writer.name, reader=r) for r in range(3)]
        del readers[1:3]
        assert writer.view().readers[:3] == ("attached", "gone", "gone")
        assert writer.send(b"one", timeout=0)
        assert writer.send(b"two", timeout=0)
        arguments = [b"three"] if call == "send" else []
        for timeout in (0, self.long, None):
            with pytest.raises(PeerDiedError, match=r"CHAN-20: reader 1, 2 of .* is gone"):
                getattr(writer, call)(*arguments, timeout=timeout)
        assert writer.view().written == 2

    @clause("CHAN-21")
    @pytest.mark.parametrize("call", ["receive", "receive_into", "read_block"])
    def test_a_reader_notices_a_dead_writer_and_has_what_was_sent(self, call: str) -> None:
        writer, (reader, _) = self.channel()
        writer.send(b"one")
        raw = writer.write_block()
        raw.data[:] = b"half-written ..."
        del raw
        ends = [writer]
        self._die(ends)
        del writer
        assert reader.view().writer == "gone"
        assert reader.receive() == b"one"
        arguments = [bytearray(16)] if call == "receive_into" else []
        for timeout in (0, self.long, None):
            with pytest.raises(PeerDiedError, match=r"CHAN-21: the writer of .* is gone, its 1"):
                getattr(reader, call)(*arguments, timeout=timeout)
        assert not reader.ended

    def _die(self, ends: list[Any]) -> None:
        """Let go of an end that holds a block: the two refer to each other."""
        end = ends.pop()
        end = getattr(end, "_subject", end)
        end._block._end = None
        end._block = None

    @clause("CHAN-22")
    @pytest.mark.parametrize("state", ["gone", "absent"])
    def test_a_writer_goes_on_without_a_reader(self, state: str) -> None:
        writer = self.writer()
        readers = [self.end("attach", name=writer.name, reader=r) for r in range(2)]
        if state == "absent":
            writer = self.writer()
            readers = [self.end("attach", name=writer.name, reader=0)]
        del readers[1:]
        assert writer.send(b"one")
        assert readers[0].receive() == b"one"
        assert writer.send(b"two")
        assert readers[0].receive() == b"two"
        writer.drop_reader(1)
        assert writer.view().readers == ("attached", "dropped")
        assert writer.send(b"three", timeout=0)
        assert readers[0].receive() == b"three"
        assert writer.wait_for_readers(timeout=0)
        writer.check()

    @clause("CHAN-23")
    @pytest.mark.parametrize("reader", [-1, 0, 1, 2, 3])
    def test_only_the_gone_and_the_absent_are_dropped(self, reader: int) -> None:
        writer, readers = self.channel(reader_count=3)
        readers[1].close()
        del readers[2]
        writer.drop_reader(2)
        assert writer.view().readers == ("attached", "left", "dropped")
        self.refuses(writer, "CHAN-23", lambda: writer.drop_reader(reader))

    @clause("CHAN-24")
    @pytest.mark.parametrize("call", ["send", "write_block"])
    def test_there_is_nobody_to_send_to(self, call: str) -> None:
        writer, readers = self.channel()
        readers[0].close()
        del readers[1]
        writer.drop_reader(1)
        arguments = [b"one"] if call == "send" else []
        with pytest.raises(PeerDiedError, match="CHAN-24: no reader is left: left, dropped"):
            getattr(writer, call)(*arguments)
        assert writer.view().written == 0

    @clause("CHAN-25")
    def test_the_writer_knows_who_has_come(self) -> None:
        writer = self.writer()
        first = self.end("attach", name=writer.name, reader=1)
        assert writer.wait_for_readers(timeout=0) is False
        assert writer.wait_for_readers(timeout=0.01) is False
        second = self.end("attach", name=writer.name, reader=0)
        assert writer.wait_for_readers() is True
        assert (first.reader, second.reader) == (1, 0)

    # -- calls that may not be -------------------------------------------------------------------

    @clause("CHAN-26")
    def test_ends_do_what_is_theirs(self) -> None:
        writer, (reader, _) = self.channel()
        for call in (
            lambda: reader.send(b"x"),
            reader.write_block,
            reader.wait_for_readers,
            lambda: reader.drop_reader(1),
        ):
            self.refuses(reader, "CHAN-26", call)
        for call in (writer.receive, lambda: writer.receive_into(bytearray(9)), writer.read_block):
            self.refuses(writer, "CHAN-26", call)
        assert not writer.ended

    @clause("CHAN-26")
    @pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), float("-inf")])
    def test_a_timeout_is_a_time(self, timeout: float) -> None:
        writer, (reader, _) = self.channel()
        self.refuses(writer, "CHAN-26", lambda: writer.send(b"x", timeout=timeout))
        self.refuses(writer, "CHAN-26", lambda: writer.write_block(timeout))
        self.refuses(writer, "CHAN-26", lambda: writer.wait_for_readers(timeout))
        writer.send(b"one", timeout=float("inf"))
        self.refuses(reader, "CHAN-26", lambda: reader.receive(timeout))
        self.refuses(reader, "CHAN-26", lambda: reader.receive_into(bytearray(9), timeout))
        self.refuses(reader, "CHAN-26", lambda: reader.read_block(timeout))

    @clause("CHAN-26")
    @pytest.mark.parametrize("seconds", [0, -1, 61, float("nan")])
    def test_a_death_check_is_between_a_millisecond_and_a_minute(self, seconds: float) -> None:
        writer = self.impl.ShmChannel.create(**SHAPE)
        assert writer.death_check == 0.1
        with pytest.raises(ContractError, match="CHAN-26: death_check"):
            writer.death_check = seconds
        writer.death_check = 0.05
        assert writer.death_check == 0.05

    @clause("CHAN-26")
    def test_a_closed_end_does_nothing(self) -> None:
        writer, (reader, _) = self.channel()
        writer.close()
        reader.close()
        for call in (lambda: writer.send(b"x"), writer.write_block, writer.wait_for_readers):
            self.refuses(writer, "CHAN-26", call)
        for call in (lambda: writer.drop_reader(0), writer.check):
            self.refuses(writer, "CHAN-26", call)
        for call in (reader.receive, lambda: reader.receive_into(bytearray(9)), reader.read_block):
            self.refuses(reader, "CHAN-26", call)
        assert not reader.ended

    @clause("CHAN-26")
    def test_while_a_block_is_open_there_is_no_other(self) -> None:
        writer, (reader, _) = self.channel()
        writer.send(b"one")
        block = writer.write_block()
        for call in (lambda: writer.send(b"x"), writer.write_block, writer.wait_for_readers):
            self.refuses(writer, "CHAN-26", call)
        self.refuses(writer, "CHAN-26", lambda: writer.drop_reader(0))
        block.give_up()
        message = reader.read_block()
        for call in (reader.receive, lambda: reader.receive_into(bytearray(9)), reader.read_block):
            self.refuses(reader, "CHAN-26", call)
        message.release()
        assert writer.send(b"two")

    @clause("CHAN-26")
    def test_one_thread_at_a_time(self) -> None:
        writer, (reader, _) = self.channel()
        got: list[bytes] = []

        def wait() -> None:
            while not got:
                try:
                    got.append(reader.receive(timeout=self.long))
                except ContractError:
                    time.sleep(0.001)

        thread = threading.Thread(target=wait)
        thread.start()
        refused = None
        end = time.monotonic() + self.long
        while refused is None and time.monotonic() < end:
            try:
                reader.receive(timeout=0)
                time.sleep(0.001)
            except ContractError as error:
                refused = str(error)
        with pytest.raises(ContractError, match="CHAN-26: close: another thread"):
            reader.close()
        writer.send(b"one")
        thread.join(self.long)
        assert got == [b"one"]
        assert refused == "CHAN-26: receive: another thread is in a call of this end"

    # -- waits -----------------------------------------------------------------------------------

    def later(self, action: Callable[[], object]) -> threading.Timer:
        timer = threading.Timer(0.02, action)
        timer.start()
        return timer

    @clause("CHAN-27")
    def test_a_wait_ends_with_what_it_waits_for(self) -> None:
        writer, readers = self.channel(block_count=1)
        timer = self.later(lambda: writer.send(b"one"))
        assert readers[0].receive(timeout=self.long) == b"one"
        timer.join()
        timer = self.later(lambda: readers[1].receive())
        assert writer.send(b"two", timeout=self.long)
        timer.join()
        readers[0].receive()
        timer = self.later(writer.close)
        assert readers[0].receive(timeout=self.long) is None
        timer.join()
        assert readers[0].ended

    @clause("CHAN-20", "CHAN-27")
    def test_a_wait_for_room_ends_with_the_notice_of_a_death(self) -> None:
        writer, readers = self.channel(block_count=1)
        writer.send(b"one")
        readers.pop(0).receive()
        timer = self.later(readers.clear)
        with pytest.raises(PeerDiedError, match="CHAN-20: reader"):
            writer.send(b"two", timeout=self.long)
        timer.join()

    @clause("CHAN-21", "CHAN-27")
    def test_a_wait_for_a_message_ends_with_the_notice_of_a_death(self) -> None:
        writer, (reader, _) = self.channel(block_count=1)
        ends = [writer]
        del writer
        timer = self.later(ends.clear)
        with pytest.raises(PeerDiedError, match="CHAN-21: the writer"):
            reader.receive(timeout=self.long)
        timer.join()

    # -- checking --------------------------------------------------------------------------------

    @clause("CHAN-28")
    @pytest.mark.parametrize(
        ("offset", "data", "named"),
        [
            (0, b"XX", "CHAN-2"),
            (8, b"\x11", "CHAN-2"),
            (16, b"\x03", "CHAN-2"),
            (24, b"\x01", "CHAN-2"),
            (128, b"\x04", "CHAN-1"),
            (128, b"\x00", "CHAN-1"),
            (640, b"\x02", "CHAN-1"),
            (768, b"\x00", None),
        ],
    )
    def test_check_finds_what_is_broken(self, offset: int, data: bytes, named: str | None) -> None:
        writer, (reader, other) = self.channel()
        writer.send(b"one")
        reader.receive()
        other.receive()
        writer.check()
        reader.check()
        poke(writer.name, offset, data)
        for end in (writer, reader):
            if named is None:
                end.check()
                continue
            with pytest.raises(ContractError) as caught:
                end.check()
            assert caught.value.clause == named

    @clause("CHAN-29")
    def test_everything_lies_where_it_should(self) -> None:
        writer, (reader, other) = self.channel(block_bytes=100, reader_count=2, block_count=3)
        for message in (b"one", b"two2", b"three", b"four44"):
            writer.send(message)
            reader.receive()
            if message != b"four44":
                other.receive()
        other.close()
        name = writer.name
        assert peek(name, 0, "=8s3Q") == (b"KVCHAN01", 100, 3, 2)
        assert peek(name, 128, "=QI") == (4, 0)
        assert peek(name, 512, "=2I") == (1, 2)
        assert (peek(name, 640, "=Q"), peek(name, 768, "=Q")) == ((4,), (3,))
        assert peek(name, 896, "=Q56x6s") == (6, b"four44")
        assert peek(name, 896 + 256, "=Q56x4s") == (4, b"two2")
        assert peek(name, 896 + 512, "=Q56x5s") == (5, b"three")
        assert Path("/dev/shm", name).stat().st_size >= 896 + 768
        writer.close()
        assert peek(name, 128, "=QI") == (4, 1)

    @clause("CHAN-30")
    def test_bytes_are_copied_once_and_nobody_is_woken(self) -> None:
        writer, (reader, other) = self.channel()
        for _ in range(10):
            writer.send(b"12345")
            reader.receive()
            other.receive_into(bytearray(9))
        for end in (writer, reader, other):
            assert end.counters() == {"bytes_copied": 50, "looks": 0, "sleeps": 0, "wakes": 0}
        for _ in range(3):
            with writer.write_block() as block:
                block.data[:] = bytes(16)
                block.commit(16)
            for end in (reader, other):
                with end.read_block() as block:
                    assert len(block.data) == 16
        for end in (writer, reader, other):
            assert end.counters()["bytes_copied"] == 50
