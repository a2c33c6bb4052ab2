"""One writer and three readers, four processes: GiB/s against memcpy, and a message against pipes.

All bytes are checked first. Of the ratios, each of two times measured one after the other, the
median counts. Four processes share the cores that there are: with two, the four copies of a message
(one in, three out) take at least twice as long as memcpy takes for one.
"""

import hashlib
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import channel_child
import kvspec
from channel_child import pattern

PACKAGE = Path(kvspec.__file__).parent
READERS = 3
ROUNDS = 7
CHECKED_BYTES = 2**30
ROUND_BYTES = 2**28
TIMES_MEMCPY = 40.0
"""What a round may take of memcpy's time: four copies on two cores that others use too."""
TIMES_PIPE = 1.5
SMALL_COUNT = 2_000


def _child(*words: object, fds: tuple[int, ...] = ()) -> "subprocess.Popen[str]":
    command = [sys.executable, channel_child.__file__, str(PACKAGE), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=fds)


def _says(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextmanager
def _group(
    role: str, block_bytes: int, block_count: int
) -> Iterator[tuple[Any, list["subprocess.Popen[str]"]]]:
    writer = kvspec.ShmChannel.create("chan-bench", block_bytes, block_count, READERS)
    readers = [_child(role, writer.name, reader) for reader in range(READERS)]
    try:
        assert [_says(reader) for reader in readers] == ["attached"] * READERS
        yield writer, readers
        writer.close()
        for reader in readers:
            assert reader.wait(60) == 0
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()


def _drained(writer: Any, readers: list["subprocess.Popen[str]"]) -> None:
    writer.send(b"")
    assert [_says(reader) for reader in readers] == ["drained"] * READERS


@pytest.mark.parametrize("block_bytes", [2**16, 2**20], ids=["64 KiB", "1 MiB"])
def bench_throughput(benchmark: Any, block_bytes: int) -> None:
    """1 GiB, checked; then rounds of 256 MiB through the channel and through memcpy."""
    message = np.frombuffer(pattern(1, block_bytes), dtype=np.uint8)
    target = np.zeros((8, block_bytes), dtype=np.uint8)
    count = ROUND_BYTES // block_bytes
    _check(block_bytes)
    with _group("drain", block_bytes, 8) as (writer, readers):

        def channel() -> float:
            start = time.perf_counter()
            for _ in range(count):
                writer.send(message)
            _drained(writer, readers)
            return time.perf_counter() - start

        def memcpy() -> float:
            start = time.perf_counter()
            for number in range(count):
                np.copyto(target[number % 8], message)
            return time.perf_counter() - start

        channel()
        pairs = [(channel(), memcpy()) for _ in range(ROUNDS)]
        assert writer.counters()["bytes_copied"] == (ROUNDS + 1) * ROUND_BYTES
        benchmark.pedantic(channel, rounds=1)
    seconds = statistics.median(mine for mine, _ in pairs)
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    gib = ROUND_BYTES / 2**30
    benchmark.extra_info["gib_per_s_each"] = round(gib / seconds, 2)
    benchmark.extra_info["gib_per_s_delivered"] = round(READERS * gib / seconds, 2)
    memcpy_seconds = statistics.median(theirs for _, theirs in pairs)
    benchmark.extra_info["memcpy_gib_per_s"] = round(gib / memcpy_seconds, 2)
    benchmark.extra_info["times_memcpy"] = round(ratio, 2)
    assert ratio < TIMES_MEMCPY


def _check(block_bytes: int) -> None:
    """1 GiB of messages that differ: every reader has the sums that the writer has."""
    words = [pattern(number, block_bytes) for number in range(16)]
    count = CHECKED_BYTES // block_bytes
    with _group("read", block_bytes, 8) as (writer, readers):
        crc, digest = 0, hashlib.blake2b(digest_size=16)
        for number in range(count):
            message = words[number * 7 % 16]
            assert writer.send(message, timeout=60)
            crc = zlib.crc32(message, crc)
            digest.update(zlib.crc32(message).to_bytes(4, "little"))
        writer.close()
        expected = f"{count} {crc} {digest.hexdigest()} ended"
        assert [_says(reader) for reader in readers] == [expected] * READERS


def bench_small_message(benchmark: Any) -> None:
    """64 bytes that three readers have before the next is sent; against pipes and their answers."""
    pipes = [(os.pipe(), os.pipe()) for _ in range(READERS)]
    given = [Connection(pipe[0][1], readable=False) for pipe in pipes]
    back = [Connection(pipe[1][0], writable=False) for pipe in pipes]
    ends = [(pipe[0][0], pipe[1][1]) for pipe in pipes]
    answering = [_child("pipe", *fds, fds=fds) for fds in ends]
    for fds in ends:
        os.close(fds[0])
        os.close(fds[1])
    message = bytes(64)

    def through_pipes() -> float:
        start = time.perf_counter()
        for _ in range(SMALL_COUNT):
            for pipe in given:
                pipe.send_bytes(message)
            for pipe in back:
                pipe.recv_bytes()
        return time.perf_counter() - start

    try:
        assert [_says(child) for child in answering] == ["attached"] * READERS
        with _group("drain", 64, 1) as (writer, readers):

            def channel() -> float:
                start = time.perf_counter()
                for _ in range(SMALL_COUNT):
                    writer.send(message)
                _drained(writer, readers)
                return time.perf_counter() - start

            channel()
            through_pipes()
            pairs = [(channel(), through_pipes()) for _ in range(ROUNDS)]
            benchmark.pedantic(channel, rounds=1)
        for pipe in given:
            pipe.send_bytes(b"")
    finally:
        for child in answering:
            child.kill()
            child.communicate()
        for pipe in (*given, *back):
            pipe.close()
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    for name, at in (("channel_us", 0), ("pipes_us", 1)):
        median = statistics.median(pair[at] for pair in pairs)
        benchmark.extra_info[name] = round(median / SMALL_COUNT * 1e6, 1)
    benchmark.extra_info["times_pipes"] = round(ratio, 2)
    assert ratio < TIMES_PIPE
