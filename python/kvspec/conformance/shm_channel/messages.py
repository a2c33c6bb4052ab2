"""What ends are, and what becomes of messages and blocks (CHAN-2 to CHAN-17)."""

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.shm_channel.bench import (
    MESSAGES,
    NO_BUFFERS,
    NO_MESSAGES,
    ChannelBench,
    poke,
)
from kvspec.errors import ContractError

__all__ = ["MessagesConformance"]


class MessagesConformance(ChannelBench):
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
