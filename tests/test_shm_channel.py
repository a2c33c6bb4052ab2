"""The channel: oracle and core against the suite, against each other, and processes that die."""

import gc
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvspec
import kvspec.oracle
from channel_child import pattern
from kvspec.conformance import clause
from kvspec.conformance.shm_channel import ShmChannelConformance
from kvspec.errors import CLAUSE_ERRORS, HostMemoryError, PeerDiedError

CHILD = Path(__file__).with_name("channel_child.py")
PACKAGE = Path(kvspec.__file__).parent
IMPLS = {"oracle": kvspec.oracle, "native": kvspec}
BOUND_SECONDS = 60
"""Nothing of this takes a tenth of it; a wait that never ends does."""


class TestOracle(ShmChannelConformance):
    impl = kvspec.oracle


class TestNative(ShmChannelConformance):
    impl = kvspec


def child(*words: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(CHILD), str(PACKAGE), *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ended(process: "subprocess.Popen[str]", status: int = 0) -> str:
    """What it still said; it must end by itself."""
    assert process.stdout is not None
    assert process.stderr is not None
    killer = threading.Timer(BOUND_SECONDS, process.kill)
    killer.start()
    out, error = process.stdout.read(), process.stderr.read()
    assert process.wait() == status, error
    killer.cancel()
    killer.join()
    return out.strip()


@pytest.fixture
def children() -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes that do not outlive the test; neither does a segment."""
    started: list[subprocess.Popen[str]] = []
    before = set(os.listdir("/dev/shm"))
    yield started
    for process in started:
        process.kill()
        process.communicate()
    gc.collect()
    kvspec.SharedSegment.reap()
    left = {name for name in set(os.listdir("/dev/shm")) - before if ".chan-" in name}
    assert not left


def make(impl: str = "native", **given: Any) -> Any:
    shape = {"label": "chan-test", "block_bytes": 64, "block_count": 2, "reader_count": 2}
    return IMPLS[impl].ShmChannel.create(**(shape | given))


# -- oracle and core ---------------------------------------------------------------------------


class Player:
    """A writer, two readers and what they said; calls are drawn, and the same for each player."""

    def __init__(self, writes: Any, reads: Any) -> None:
        self.writer = writes.ShmChannel.create("chan-lockstep", 8, 2, 2)
        self.reads, self.ends = reads, [self.writer, None, None]

    def play(self, call: str, number: int, value: int) -> object:
        try:
            return self._play(call, number, value)
        except CLAUSE_ERRORS as error:
            return str(error).replace(self.writer.name, "NAME")

    def _play(self, call: str, number: int, value: int) -> object:
        end = self.ends[number]
        if call == "attach":
            if self.ends[1 + value % 2] is not None:
                return None
            end = self.reads.ShmChannel.attach(self.writer.name, value % 2)
            self.ends[1 + value % 2] = end
            return end.reader
        if end is None:
            return None
        if call == "send":
            return end.send(bytes([value]) * (value % 10), timeout=0 if value % 9 else -1)
        if call == "drop_reader":
            return end.drop_reader(value % 4 - 1)
        if call == "receive_into":
            buffer = bytearray(value % 10)
            return end.receive_into(buffer, timeout=0), bytes(buffer)
        if call == "block":
            open_block = end.read_block if number else end.write_block
            found = open_block(timeout=0)
            if found is None:
                return "nothing"
            with found as block:
                if number:
                    return bytes(block.data)
                block.data[:] = bytes([value]) * 8
                return block.commit(value % 9) if value % 3 else None
        if call == "die":
            self.ends[number] = None
            return None
        return getattr(end, call)(timeout=0) if call != "close" else end.close()

    def view(self) -> object:
        return [
            end and (end.view(), end.ended, end.counters()["bytes_copied"]) for end in self.ends
        ]


CALLS = ["send"] * 6 + ["receive"] * 6 + ["receive_into"] * 3 + ["block"] * 4 + ["attach"] * 3
RARE = ["drop_reader", "wait_for_readers", "die", "close"]


@clause("CHAN-29")
@pytest.mark.parametrize("pair", ["native-oracle", "oracle-native", "native-native"])
def test_lockstep(pair: str) -> None:
    """Whoever writes and whoever reads: the same results, texts and views as the oracle alone."""
    writes, _, reads = pair.partition("-")
    for seed in range(12):
        draw = random.Random(seed)
        players = [
            Player(kvspec.oracle, kvspec.oracle),
            Player(IMPLS[writes], IMPLS[reads]),
        ]
        for step in range(120):
            call = draw.choice(RARE if draw.random() < 0.04 else CALLS)
            number = 0 if call in ("send", "drop_reader") else draw.randrange(3)
            if call in ("receive", "receive_into") and draw.random() < 0.95:
                number = draw.choice([1, 2])
            value = draw.randrange(1, 250)
            results = [player.play(call, number, value) for player in players]
            assert results[0] == results[1], f"seed {seed}, step {step}: {call}"
            assert players[0].view() == players[1].view(), f"seed {seed}, step {step}: {call}"


@pytest.mark.parametrize(("writes", "reads"), [("native", "oracle"), ("oracle", "native")])
def test_a_native_end_and_one_of_the_oracle_work_together(writes: str, reads: str) -> None:
    writer = make(writes, block_bytes=4096)
    readers = [IMPLS[reads].ShmChannel.attach(writer.name, r) for r in range(2)]
    received: list[list[bytes]] = [[], []]
    for end in (writer, *readers):
        end.death_check = 0.002

    def read(number: int) -> None:
        received[number] += iter(readers[number].receive, None)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    sent = [pattern(number, number * 97 % 4097) for number in range(60)]
    assert all(writer.send(message, timeout=BOUND_SECONDS) for message in sent)
    writer.close()
    for thread in threads:
        thread.join(BOUND_SECONDS)
    assert received == [sent, sent]


# -- processes ---------------------------------------------------------------------------------


@clause("CHAN-9", "CHAN-18")
def test_four_processes_and_64_mib(children: list["subprocess.Popen[str]"]) -> None:
    block_bytes, count = 256 * 1024, 512
    writer = child("write", "chan-four", block_bytes, 4, 3, count)
    children.append(writer)
    name = said(writer)
    children += [child("read", name, reader) for reader in range(3)]
    crc, total, digest = 0, 0, hashlib.blake2b(digest_size=16)
    for number in range(count):
        message = pattern(number, 1 + number * 7919 % block_bytes)
        total += len(message)
        crc = zlib.crc32(message, crc)
        digest.update(zlib.crc32(message).to_bytes(4, "little"))
    assert total > 60 * 2**20
    for reader in children[1:]:
        assert said(reader) == "attached"
        assert ended(reader) == f"{count} {crc} {digest.hexdigest()} ended"
    ended(writer)
    assert not Path("/dev/shm", name).exists()


@clause("CHAN-20", "CHAN-22", "CHAN-27")
@pytest.mark.parametrize("phase", ["at once", "in a message", "after a message", "while it sleeps"])
def test_a_reader_that_is_killed(phase: str, children: list["subprocess.Popen[str]"]) -> None:
    writer = make()
    survivor = kvspec.ShmChannel.attach(writer.name, 0)
    killed = child("sleep" if phase == "while it sleeps" else phase, writer.name, 1)
    children.append(killed)
    assert said(killed) == "attached"
    writer.send(b"first")
    assert survivor.receive() == b"first"
    if phase == "while it sleeps":
        timer = threading.Timer(0.1, killed.kill)
        timer.start()

    def send_until_it_is_noticed() -> None:
        while writer.view().written < 9 and writer.send(b"more", timeout=BOUND_SECONDS):
            assert survivor.receive() == b"more"

    with pytest.raises(PeerDiedError, match=r"CHAN-20: reader 1 of .* is gone"):
        send_until_it_is_noticed()
    assert writer.view().written <= 3
    assert killed.wait(BOUND_SECONDS) == -signal.SIGKILL
    writer.drop_reader(1)
    for _ in range(5):
        assert writer.send(b"on", timeout=0)
        assert survivor.receive(timeout=0) == b"on"
    writer.close()
    assert survivor.receive() is None


@clause("CHAN-14", "CHAN-21", "CHAN-27")
@pytest.mark.parametrize(
    "phase", ["between messages", "in a block of its own", "before the commit"]
)
def test_a_writer_that_is_killed(phase: str, children: list["subprocess.Popen[str]"]) -> None:
    writer = child("write", "chan-killed", 64, 4, 1, 3, phase)
    children.append(writer)
    reader = kvspec.ShmChannel.attach(said(writer), 0)
    for number in range(3):
        assert reader.receive(timeout=BOUND_SECONDS) == pattern(number, 1 + number * 7919 % 64)
    with pytest.raises(PeerDiedError, match=r"CHAN-21: the writer of .* is gone, its 3 messages"):
        reader.receive(timeout=BOUND_SECONDS)
    assert writer.wait(BOUND_SECONDS) == -signal.SIGKILL
    assert reader.view().writer == "gone"


@clause("CHAN-27")
def test_ends_that_are_killed_at_random(children: list["subprocess.Popen[str]"]) -> None:
    """Whenever it happens, everybody else ends, and with a prefix of what was sent."""
    draw = random.Random(7)
    for victim in (0, 1):
        writer = child("write", "chan-random", 1024, 2, 2, 10**6)
        name = said(writer)
        group = [writer, *(child("read", name, reader) for reader in range(2))]
        children += group
        assert [said(reader) for reader in group[1:]] == ["attached"] * 2
        time.sleep(draw.random() / 10)
        group[victim].kill()
        if victim:
            _, error = writer.communicate(timeout=BOUND_SECONDS)
            assert "CHAN-20: reader 0" in error
        reports = [ended(reader).split() for reader in group[1:] if reader is not group[victim]]
        for count, crc, *_, end in reports:
            assert end == "CHAN-21"
            expected = 0
            for number in range(int(count)):
                expected = zlib.crc32(pattern(number, 1 + number * 7919 % 1024), expected)
            assert int(crc) == expected


@clause("CHAN-27")
def test_a_signal_ends_a_wait(children: list["subprocess.Popen[str]"]) -> None:
    writer = make("native", label="chan-signal")
    reader = child("read", writer.name, 0)
    children.append(reader)
    assert said(reader) == "attached"
    reader.send_signal(signal.SIGINT)
    _, error = reader.communicate(timeout=BOUND_SECONDS)
    assert "KeyboardInterrupt" in error
    assert reader.returncode == -signal.SIGINT


@pytest.mark.parametrize("impl", IMPLS)
def test_what_dev_shm_cannot_hold_fails_at_once(impl: str) -> None:
    with pytest.raises(HostMemoryError):
        make(impl, block_bytes=2**38, block_count=2**10)


def test_other_threads_run_while_one_waits() -> None:
    writer = make()
    reader = kvspec.ShmChannel.attach(writer.name, 0)
    received: list[bytes | None] = []
    thread = threading.Thread(target=lambda: received.append(reader.receive(BOUND_SECONDS)))
    thread.start()
    assert writer.send(b"from another thread")
    thread.join(BOUND_SECONDS)
    assert received == [b"from another thread"]


def test_a_child_that_inherits_an_end_says_nothing_for_it() -> None:
    """It closes the end, which is still its parent's."""
    writer = make()
    reader = kvspec.ShmChannel.attach(writer.name, 0)
    pid = os.fork()
    if pid == 0:
        reader.close()
        writer.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert reader.view().writer == "open"
    assert writer.view().readers == ("attached", "absent")
    writer.send(b"still here")
    assert reader.receive() == b"still here"
