"""Recordings that serve every test, and what /proc and strace could have said. Spec: CHAIN."""

import os
from functools import cache

import msgspec

import kvspec.allocation_chain as room
from kvspec.allocation_chain import Facts, Recording, Request
from kvspec.allocation_chain.ring import Entry

__all__ = [
    "KINDS",
    "MAPS",
    "MIB",
    "PAGE",
    "TRACE",
    "blocks",
    "facts",
    "own_smaps",
    "recorded",
    "with_trace",
]

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGESIZE")


@cache
def recorded(kind: str, nbytes: int, touch: str | None = "page", *, seen: bool = True) -> Recording:
    """A recording without strace: where there is strace, tests/ looks at it too."""
    request = msgspec.convert({"kind": kind, "nbytes": nbytes, "touch": touch}, Request)
    return room.record(request, interpose=seen, trace=False)


def with_trace(recording: Recording, *, inside: str = "", outside: str = "") -> Recording:
    """The recording with what strace would have written: marks, a call in each phase that is
    `inside`, and one before, between and behind that is `outside`.
    """
    lines = [f"7 {_clock(recording.entries[0], -1000)} {outside}"] if outside else []
    for entry in recording.entries:
        if entry.entry == "call":
            continue
        phase, begins = (2, 1) if entry.entry == "step" else (entry.phase, entry.result)
        mark = "7 {} prctl(0x4b565350 /* PR_??? */, {}, {}, 0, 0) = -1 EINVAL (Invalid argument)"
        lines.append(mark.format(_clock(entry, 0), f"{phase:#x}", f"{begins:#x}"))
        if entry.entry == "step":
            lines.append(mark.format(_clock(entry, 1), "0x2", "0"))
        elif begins and inside and phase != 4:
            lines.append(f"7 {_clock(entry, 2000)} {inside}")
        elif outside:
            lines.append(f"7 {_clock(entry, 2000)} {outside}")
    return msgspec.structs.replace(recording, traced="\n".join(lines) + "\n", traced_why=None)


def _clock(entry: Entry, later_ns: int) -> str:
    clock = entry.values[3] if entry.entry == "mark" else entry.begin_ns
    return f"{(clock + later_ns) / 1e9:.6f}"


@cache
def facts() -> Facts:
    """Of this machine; the observations are the recordings of the other tests."""
    asked = room.gather(observations=False)
    shm = with_trace(recorded("shm", MIB))
    opened = (
        f'openat(AT_FDCWD, "/dev/shm/{shm.name}", O_RDWR|O_CREAT, 0600) = 5</dev/shm/{shm.name}>'
    )
    return asked._replace(
        torch=room.observe(recorded("torch", MIB)),
        shm=room.observe(with_trace(recorded("shm", MIB), inside=opened)),
        pinned=room.observe(recorded("pinned", MIB)),
    )


MAPS = """\
55d000000000-55d000021000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
7f0000800000-7f0000900000 r-xp 00001000 08:01 77                         /usr/lib/libtorch.so
7f0001000000-7f0001100000 rw-s 00000000 00:1b 12                         /dev/shm/kv.1 (deleted)
7f0001200000-7f0001300000 rw-s 00000000 00:01 99                         /dev/zero (deleted)
7f0002000000-7f0002200000 rw-p 00000000 00:0f 31                         /anon_hugepage (deleted)
7f0003000000-7f0003010000 rw-s 00000000 00:06 41                         /dev/nvidia0
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
7ffc00100000-7ffc00101000 r-xp 00000000 00:00 0                          [vdso]
"""
KINDS = (
    *("heap", "anonymous", "file", "shared memory", "shared memory", "hugetlb", "device"),
    *("stack", "kernel"),
)

TRACE = """\
11 100.000001 mmap(NULL, 4096, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000000000
11 100.000002 prctl(0x4b565350 /* PR_??? */, 0x1, 0x1, 0, 0) = -1 EINVAL (Invalid argument)
11 100.000003 mmap(NULL, 8192, PROT_READ <unfinished ...>
12 100.000004 brk(NULL)                 = 0x55d000000000
11 100.000005 <... mmap resumed>, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7f0000100000
11 100.000006 prctl(0x4b565350 /* PR_??? */, 0x1, 0, 0, 0) = -1 EINVAL (Invalid argument)
11 100.000007 munmap(0x7f0000000000, 4096) = 0
11 100.000008 prctl(0x4b565350 /* PR_??? */, 0x4, 0x1, 0, 0) = -1 EINVAL (Invalid argument)
11 100.000009 munmap(0x7f0000000000, 4096) = 0
11 100.000010 prctl(0x4b565350 /* PR_??? */, 0x4, 0, 0, 0) = -1 EINVAL (Invalid argument)
11 100.000011 prctl(0x4b565350 /* PR_??? */, 0x3, 0x1, 0, 0) = -1 EINVAL (Invalid argument)
11 100.000012 munmap(0x7f0000100000, 8192) = -1 ENOMEM (Cannot allocate memory)
11 100.000013 prctl(0x4b565350 /* PR_??? */, 0x3, 0, 0, 0) = -1 EINVAL (Invalid argument)
"""


def blocks(maps: str) -> str:
    """As smaps has them: of each, 8 KiB resident, 4 KiB its share, 4 KiB locked."""
    fields = "Rss: 8 kB\nPss: 4 kB\nSwap: 4 kB\nLocked: 4 kB\nAnonHugePages: 0 kB\n"
    lines = maps.splitlines()
    return "".join(f"{line}\n{fields}VmFlags: rd wr\n" for line in lines)


@cache
def own_smaps() -> str:
    """Of this process, once: with torch in it, it takes the kernel a while."""
    with open("/proc/self/smaps", encoding="utf-8") as file:
        return file.read()
