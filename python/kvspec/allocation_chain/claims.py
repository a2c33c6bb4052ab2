"""What a common account of these chains claims, and what this machine does. Spec: CHAIN-14 to
CHAIN-24; the account is cited there.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kvspec.allocation_chain.chain import plain
from kvspec.allocation_chain.observation import Observation, observe
from kvspec.allocation_chain.recording import Request, helper, record
from kvspec.allocation_chain.smaps import Mapping, read_smaps
from kvspec.allocation_chain.strace import refused_filter

__all__ = ["Claim", "Facts", "Look", "claims", "gather"]

_TIMEOUT_S = 60
_OBSERVED_BYTES = 1 << 20
THRESHOLD = 128 * 1024


class Look(NamedTuple):
    """A range at one moment."""

    mapping: Mapping
    mincore: int
    """Bytes that mincore calls resident."""
    faults: int
    """Minor faults of what was done just before."""


class Facts(NamedTuple):
    """What was asked of this machine. None is what could not be asked."""

    malloc: dict[str, int] | None
    """Of the program malloc_facts: what glibc does in a process that has done nothing yet."""
    kernel: dict[str, Any]
    """Of the program kernel_facts: what the kernel does with ranges of `bytes`."""
    refused: str | None
    """What strace says to a filter of shm_open and shm_unlink."""
    torch: Observation | None
    shm: Observation | None
    pinned: Observation | None

    def look(self, *path: str) -> Look:
        """A range at a moment, for example `look("private", "mapped")`."""
        found: Any = self.kernel
        for name in path:
            found = found[name]
        return Look(read_smaps(found["smaps"])[0], found["mincore"], found["faults"])


class Claim(NamedTuple):
    """A sentence of the account, and what was seen."""

    clause: str
    claimed: str
    holds: bool | None
    """None if it could not be observed here."""
    observed: str


def gather(*, observations: bool = True) -> Facts:
    """Ask this machine. Starts five processes, one of which imports torch."""
    program = helper("kvspec_malloc_facts")
    malloc = _said([str(program)]) if program is not None else None
    script = Path(__file__).with_name("kernel_facts.py")
    kernel = _said([sys.executable, "-P", "-S", str(script)])
    made = [
        observe(record(Request(kind, _OBSERVED_BYTES, touch="page"))) if observations else None
        for kind in ("torch", "shm", "pinned")
    ]
    return Facts(malloc, kernel, refused_filter("shm_open,shm_unlink"), *made)


def _said(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    found: dict[str, Any] = msgspec.json.decode(done.stdout) if done.stdout else json.loads("{}")
    return found


def claims(facts: Facts) -> list[Claim]:
    """The claims, in the account's order, each judged by the facts alone."""
    return [*_of_torch(facts), *_of_malloc(facts), *_of_the_kernel(facts), *_of_shared(facts),
            *_of_pinned(facts)]  # fmt: skip


def _of_torch(facts: Facts) -> Iterator[Claim]:
    claimed = "torch on the CPU: THIntTensor_newWithSize2d, THAllocator.allocate, malloc"
    found = facts.torch
    if found is None or found.library_calls is None:
        yield Claim("CHAIN-22", claimed, None, "no library call was seen")
        return
    call = next(
        (
            call
            for call in found.library_calls
            if call.phase == "allocate" and call.result == found.address
        ),
        None,
    )
    if call is None:
        yield Claim("CHAIN-22", claimed, None, "no call returned its address")
        return
    symbols = [plain(frame.symbol) for frame in call.stack if frame.symbol]
    named = [name for name in symbols if name.startswith(("c10::", "at::", "TH"))]
    holds = call.function == "malloc" and any(name.startswith("TH") for name in named)
    chain = " > ".join([*dict.fromkeys(reversed(named)), call.function])
    yield Claim("CHAIN-22", claimed, holds, chain)


def _of_malloc(facts: Facts) -> Iterator[Claim]:
    found = facts.malloc
    below = "malloc below 128 KiB takes from the heap that brk extends"
    fixed = "malloc of 128 KiB or more is an mmap"
    physical = "brk() extends the heap and allocates physical pages"
    back = "(nothing is said of what free does)"
    if found is None:
        for clause, text in (("CHAIN-14", below), ("CHAIN-15", fixed), ("CHAIN-17", physical)):
            yield Claim(clause, text, None, "the program that asks malloc was not built")
        return
    in_heap = not found["heap_own_mapping"] and found["heap_lies_below_break"] == 1
    yield Claim(
        *("CHAIN-14", below, in_heap and found["heap_break_grew"] > 0),
        f"two of {found['heap_request']:,} bytes moved the break by"
        f" {found['heap_break_grew']:,}, and lie below it",
    )
    first, moved = found["smallest_mapped"], found["smallest_mapped_after_free_of_1MiB"]
    yield Claim(
        *("CHAIN-15", fixed, first == moved == THRESHOLD),
        f"a new process maps from {first:,} bytes, and from {moved:,} once 1 MiB was freed",
    )
    mapped = "goes at once" if found["mapped_after_free"] < 0 else "stays"
    touched = found["brk_resident_pages_after_ten_touched"]
    yield Claim(
        *("CHAIN-17", physical, found["brk_resident_pages"] * found["page"] == found["brk_bytes"]),
        f"of {found['brk_bytes']:,} new bytes {found['brk_resident_pages']} pages were resident,"
        f" and {touched} when ten had been touched",
    )
    yield Claim(
        *("CHAIN-16", back, None),
        f"a mapped chunk {mapped}; 512 KiB of heap moved the break back by"
        f" {found['break_fell_after_free_of_512KiB']:,}, 64 KiB by"
        f" {found['break_fell_after_free_of_64KiB']:,}",
    )


def _of_the_kernel(facts: Facts) -> Iterator[Claim]:
    size = facts.kernel["bytes"]
    mapped, written = facts.look("private", "mapped"), facts.look("private", "written")
    yield Claim(
        *("CHAIN-17", "mmap() allocates addresses and physical pages", mapped.mapping.rss == size),
        f"of {size:,} bytes {mapped.mapping.rss:,} were resident after mmap, and"
        f" {written.mapping.rss:,} after a write to each page, with {written.faults:,} faults",
    )
    filled = facts.look("populated", "mapped")
    later = facts.look("populated", "written")
    yield Claim(
        *("CHAIN-18", "MAP_POPULATE allocates the pages at once", filled.mapping.rss == size),
        f"{filled.mapping.rss:,} bytes resident after mmap, {later.faults:,} faults when written",
    )
    read = facts.look("read_first", "read")
    yield Claim(
        *("CHAIN-19", "(nothing is said of reading first)", None),
        f"{read.faults:,} faults, {read.mapping.rss:,} bytes resident: the page of zeros"
        f" (mincore says {read.mincore:,})",
    )
    huge, small = facts.look("huge", "advised"), facts.look("huge", "advised_against")
    yield Claim(
        *("CHAIN-21", "(nothing is said of huge pages)", None),
        f"{huge.mapping.anonymous_huge or 0:,} bytes in huge pages with MADV_HUGEPAGE,"
        f" {huge.faults:,} faults; without {small.mapping.anonymous_huge or 0:,} and"
        f" {small.faults:,}",
    )


def _of_shared(facts: Facts) -> Iterator[Claim]:
    found = facts.kernel["tmpfs"]
    yield Claim(
        *("CHAIN-20", "ftruncate makes the segment, memory and all", found["truncated"] != 0),
        f"{found['truncated']:,} bytes reserved by ftruncate, {found['reserved']:,} by"
        f" posix_fallocate; shmem grew by {found['shared_grew']:,} when written",
    )
    opened = "shm_open is open() of a file in /dev/shm"
    calls = facts.shm.system_calls if facts.shm is not None else None
    if facts.shm is None or calls is None:
        yield Claim("CHAIN-23", opened, None, "no system call was seen")
    else:
        line = next(
            (
                c
                for c in calls
                if c.name in ("open", "openat") and f"/{facts.shm.name}" in c.arguments
            ),
            None,
        )
        yield Claim("CHAIN-23", opened, line is not None, line.name if line else "no such call")
    yield Claim(
        *("CHAIN-23", "strace -e trace=shm_open,shm_unlink follows them"),
        None if facts.refused is None else False,
        facts.refused or "strace takes the filter, or is not here",
    )


def _of_pinned(facts: Facts) -> Iterator[Claim]:
    claimed = "pinned memory: cudaHostAlloc, then mmap by the driver; never swapped"
    found = facts.pinned
    if found is None or found.library_calls is None:
        yield Claim("CHAIN-24", claimed, None, "no library call was seen")
        return
    names = {call.function for call in found.library_calls if call.phase == "allocate"}
    cuda = sorted(name for name in names if name.startswith("cuda"))
    locked = found.states["allocated"].locked or 0
    if not cuda:
        yield Claim(
            *("CHAIN-24", claimed, None),
            f"no CUDA device: the process has {locked:,} bytes locked by mlock",
        )
        return
    yield Claim("CHAIN-24", claimed, "cudaHostAlloc" in names, f"{', '.join(cuda)} was called")
