"""What every channel in shared memory must do. Spec: CHAN."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.shm_channel.bench import (
    SHAPE,
    peek,
    poke,
)
from kvspec.conformance.shm_channel.messages import MessagesConformance
from kvspec.errors import ContractError, PeerDiedError

__all__ = ["ShmChannelConformance", "poke"]


class ShmChannelConformance(MessagesConformance):
    """Tests of `ShmChannel`, all ends in one process."""

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
