"""One end of a channel in a process of its own, which imports the core and no torch.

`python channel_child.py FOLDER ROLE ...`: FOLDER is that of the package, so that its `__init__`,
which needs a second, is left out.
"""

import hashlib
import importlib
import os
import signal
import sys
import zlib
from types import ModuleType
from typing import Any


def channel_class(folder: str) -> Any:
    """`kvspec.native.shm_channel.ShmChannel`, without what else is in kvspec."""
    for name in ("kvspec", "kvspec.native", "kvspec.interfaces"):
        package = ModuleType(name)
        package.__path__ = [os.path.join(folder, *name.split(".")[1:])]
        sys.modules[name] = package
    return importlib.import_module("kvspec.native.shm_channel").ShmChannel


def pattern(number: int, nbytes: int) -> bytes:
    """The bytes of a message: no two are alike."""
    word = (number * 2_654_435_761 % 2**32).to_bytes(4, "little")
    return (word * (nbytes // 4 + 1))[:nbytes]


def read(channel: Any) -> str:
    """Count, CRC of everything, and how it ended."""
    count, crc, digest, end = 0, 0, hashlib.blake2b(digest_size=16), "ended"
    try:
        while (message := channel.receive(timeout=60)) is not None:
            crc = zlib.crc32(message, crc)
            digest.update(zlib.crc32(message).to_bytes(4, "little"))
            count += 1
        end = "ended" if channel.ended else "late"
    except ConnectionError as error:
        end = str(error).partition(":")[0]
    return f"{count} {crc} {digest.hexdigest()} {end}"


def die(phase: str, channel: Any) -> None:
    """Be killed at a phase of the protocol, having said so."""
    if phase == "in a block of its own":
        block = channel.write_block()
        block.data[: channel.block_bytes // 2] = b"x" * (channel.block_bytes // 2)
    elif phase == "before the commit":
        block = channel.write_block()
        block.data[:] = b"x" * channel.block_bytes
    elif phase == "in a message":
        block = channel.read_block(timeout=60)
        bytes(block.data)
    elif phase == "after a message":
        channel.receive(timeout=60)
    os.kill(os.getpid(), signal.SIGKILL)


def drain(channel: Any) -> None:
    """Receive into one buffer, and say so at every empty message."""
    buffer = bytearray(channel.block_bytes)
    while (nbytes := channel.receive_into(buffer)) is not None:
        if nbytes == 0:
            print("drained", flush=True)


def acknowledge(given: str, back: str) -> None:
    """What comes through a pipe is answered by a byte, until nothing comes."""
    from multiprocessing.connection import Connection

    messages, answers = Connection(int(given)), Connection(int(back))
    print("attached", flush=True)
    while messages.recv_bytes():
        answers.send_bytes(b"1")


def main(folder: str, role: str, name: str, *more: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    if role == "pipe":
        return acknowledge(name, *more)
    ends = channel_class(folder)
    if role == "write":
        shape, count, phase = [int(word) for word in more[:3]], more[3], more[4:]
        channel = ends.create(name, *shape)
        print(channel.name, flush=True)
        channel.wait_for_readers(timeout=60)
        for number in range(int(count)):
            channel.send(pattern(number, 1 + number * 7919 % shape[0]), timeout=60)
        if phase:
            die(phase[0], channel)
        return channel.close()
    channel = ends.attach(name, int(more[0]))
    print("attached", flush=True)
    if role == "read":
        print(read(channel), flush=True)
    elif role == "drain":
        drain(channel)
    elif role == "sleep":
        sys.stdin.read()
        print("slept", flush=True)
    else:
        die(role, channel)
    return channel.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
