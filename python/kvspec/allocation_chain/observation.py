"""What a recording says, fact by fact, each with who saw it. Spec: CHAIN-1 to CHAIN-8."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvspec.allocation_chain.recording import Recording, Request, demangled
from kvspec.allocation_chain.ring import PHASES, Entry
from kvspec.allocation_chain.smaps import Change, Mapping, changes, read_maps, read_smaps
from kvspec.allocation_chain.strace import strace_calls

__all__ = [
    *("Frame", "LibraryCall", "Observation", "Phase", "Sample", "Source", "State", "SystemCall"),
    "observe",
]

PhaseName = Literal["allocate", "touch", "free"]
StateName = Literal["before", "allocated", "touched", "freed"]

_UNKNOWN = (1 << 64) - 1
_PHASES = ("allocate", "touch", "free")


class Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One caller in a stack."""

    library: str | None
    """Path of the shared library or program; None if the loader knows of none."""
    symbol: str | None
    """Of the function, where it is exported; None if it is not."""
    offset: int
    """Into the function, or into the library if there is no symbol."""


class LibraryCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call of libc or of the CUDA runtime that the interposer saw."""

    function: str
    arguments: tuple[int, ...]
    text: str | None
    """The name that was given: shm_open and shm_unlink."""
    result: int
    """A pointer or what was returned; of posix_memalign the pointer."""
    error: int | None
    """errno, if it failed."""
    phase: PhaseName
    thread: int
    at_ns: int
    """Since the begin of the allocation."""
    took_ns: int
    stack: tuple[Frame, ...]
    """Who called, the innermost first."""


class SystemCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A system call that strace saw, in its words."""

    name: str
    arguments: str
    result: str
    phase: PhaseName
    thread: int
    at_ns: int
    """Since the begin of the allocation, to a microsecond."""


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between two marks. Sizes in bytes; of the whole process, by the kernel's counters."""

    name: PhaseName
    at_ns: int
    took_ns: int
    minor_faults: int
    major_faults: int
    virtual_before: int
    virtual_after: int
    resident_before: int
    resident_after: int
    break_moved: int | None
    """How far the program break moved; None for the touch, at which nobody looked."""


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One look during the touch."""

    at_ns: int
    touched: int
    virtual: int
    resident: int
    range_resident: int | None
    """Of the allocation, as mincore has it: a page that was only read counts."""
    minor_faults: int
    """Since the sample before."""
    major_faults: int


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the process read of itself between two phases. Bytes."""

    virtual: int | None
    resident: int | None
    resident_anonymous: int | None
    resident_file: int | None
    resident_shared: int | None
    locked: int | None
    pinned: int | None
    data: int | None
    malloc: dict[str, int] | None
    """Of mallinfo2: arena (bytes of the heap), hblks (chunks with a mapping of their own), hblkhd
    (bytes of those), uordblks (bytes in use). None where libc has no mallinfo2.
    """
    range_resident: int | None
    """Of the allocation, by mincore; None if it is not all mapped."""
    line: str | None
    """Of /proc/self/maps, for the mapping that holds the address; None if nothing does."""
    mapping: Mapping | None
    """The same with the sizes of smaps."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who saw a kind of fact, or why nobody did: one of the two is None."""

    by: str | None
    why_not: str | None


class Observation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an allocation did. The keys of the JSON. Times in ns, sizes in bytes."""

    version: int
    request: Request
    machine: dict[str, Any]
    sources: dict[str, Source]
    arena: str
    """The class that allocated: HostArena, or HostBlock, which is the part of it in the core."""
    pid: int
    address: int
    mapped_bytes: int
    """Address space that was taken for it."""
    name: str | None
    """Of the segment in /dev/shm, for shm."""
    phases: tuple[Phase, ...]
    states: dict[StateName, State]
    library_calls: tuple[LibraryCall, ...] | None
    dropped_calls: int | None
    """Calls that the ring had no room for."""
    system_calls: tuple[SystemCall, ...] | None
    mapping_changes: dict[PhaseName, tuple[Change, ...]]
    """Ranges that came and went in each phase."""
    timeline: tuple[Sample, ...] | None
    """None if it was not touched."""

    def phase(self, name: PhaseName) -> Phase | None:
        """The one of this name; None if there was no touch."""
        return next((phase for phase in self.phases if phase.name == name), None)


def observe(recording: Recording) -> Observation:
    """Read a recording. What nobody saw is None, and `sources` says why (CHAIN-1)."""
    marks = [e for e in recording.entries if e.entry == "mark" and PHASES[e.phase] in _PHASES]
    steps = [entry for entry in recording.entries if entry.entry == "step"]
    zero = marks[0].begin_ns
    states = {name: _state(given) for name, given in recording.states.items()}
    seen = recording.interposed_why is None
    return Observation(
        version=1,
        request=recording.request,
        machine=recording.machine,
        sources=_sources(recording),
        arena=recording.arena,
        pid=recording.pid,
        address=recording.address,
        mapped_bytes=recording.mapped_bytes,
        name=recording.name,
        phases=_phases(marks, steps, zero),
        states=msgspec.convert(states, dict[StateName, State]),
        library_calls=_library_calls(recording, zero) if seen else None,
        dropped_calls=recording.dropped if seen else None,
        system_calls=_system_calls(recording, marks[0]),
        mapping_changes=_mapping_changes(recording.maps),
        timeline=_timeline(steps, zero) if recording.request.touch is not None else None,
    )


def _sources(recording: Recording) -> dict[str, Source]:
    interposed = recording.interposed_why is None
    marks = "the interposer's marks" if interposed else "marks of the process, in Python"
    traced = recording.traced is not None
    return {
        "library_calls": Source("a preloaded interposer" if interposed else None,
                                recording.interposed_why),
        "system_calls": Source("strace" if traced else None, recording.traced_why),
        "phases": Source(f"{marks}: getrusage, /proc/self/statm, sbrk(0)", None),
        "states": Source("/proc/self/maps, smaps and status; mincore; mallinfo2", None),
        "mapping_changes": Source("/proc/self/maps, before and after", None),
        "timeline": Source(f"{marks}: getrusage, /proc/self/statm, mincore", None)
        if recording.request.touch is not None
        else Source(None, "it was not touched"),
    }  # fmt: skip


def _phases(marks: Sequence[Entry], steps: Sequence[Entry], zero: int) -> tuple[Phase, ...]:
    """Faults of the touch are those of its steps: what lies between them is our own reading."""
    found = []
    for begin, end in zip(marks[::2], marks[1::2], strict=True):
        minor, major, top, _, virtual, resident = begin.values
        minor_end, major_end, top_end, _, virtual_end, resident_end = end.values
        found.append(
            Phase(
                name=_phase_name(begin.phase),
                at_ns=begin.begin_ns - zero,
                took_ns=end.begin_ns - begin.begin_ns,
                minor_faults=minor_end - minor,
                major_faults=major_end - major,
                virtual_before=virtual,
                virtual_after=virtual_end,
                resident_before=resident,
                resident_after=resident_end,
                break_moved=top_end - top,
            )
        )
    if steps:
        first, last = steps[0], steps[-1]
        touch = Phase(
            name="touch",
            at_ns=first.begin_ns - zero,
            took_ns=sum(step.end_ns - step.begin_ns for step in steps),
            minor_faults=sum(step.values[0] for step in steps),
            major_faults=sum(step.values[1] for step in steps),
            virtual_before=first.values[2],
            virtual_after=last.values[2],
            resident_before=first.values[3],
            resident_after=last.values[3],
            break_moved=None,
        )
        found.append(touch)
    return tuple(sorted(found, key=lambda phase: phase.at_ns))


def _phase_name(number: int) -> PhaseName:
    name: PhaseName = msgspec.convert(PHASES[number], PhaseName)
    return name


def _timeline(steps: Sequence[Entry], zero: int) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            at_ns=step.end_ns - zero,
            touched=step.result,
            virtual=step.values[2],
            resident=step.values[3],
            range_resident=None if step.values[4] == _UNKNOWN else step.values[4],
            minor_faults=step.values[0],
            major_faults=step.values[1],
        )
        for step in steps
    )


def _library_calls(recording: Recording, zero: int) -> tuple[LibraryCall, ...]:
    """Those of the phases; what failed has its errno."""
    nothing: tuple[str | None, str | None, int] = (None, None, 0)
    calls = []
    for entry in recording.entries:
        if entry.entry != "call" or PHASES[entry.phase] not in _PHASES:
            continue
        names = [recording.names.get(str(frame), nothing) for frame in entry.frames]
        calls.append(
            LibraryCall(
                function=entry.function,
                arguments=entry.values[: _ARGUMENTS.get(entry.function, 2)],
                text=entry.text or None,
                result=entry.result,
                error=entry.error if _failed(entry) else None,
                phase=_phase_name(entry.phase),
                thread=entry.thread,
                at_ns=entry.begin_ns - zero,
                took_ns=entry.end_ns - entry.begin_ns,
                stack=tuple(
                    Frame(library, symbol and demangled(symbol), offset)
                    for library, symbol, offset in names
                ),
            )
        )
    return tuple(calls)


_ARGUMENTS = {
    **dict.fromkeys(("malloc", "free", "brk", "sbrk", "shm_unlink", "cudaFreeHost"), 1),
    "cudaHostUnregister": 1,
    "madvise": 3,
    "shm_open": 3,
    "posix_fallocate": 3,
    "cudaHostAlloc": 3,
    "cudaHostRegister": 3,
    "mremap": 4,
    "mmap": 6,
    "mmap64": 6,
}
"""How many arguments a function has; two, if it is not here."""

_POINTERS = ("malloc", "calloc", "realloc", "aligned_alloc", "posix_memalign")
_MAPPINGS = ("mmap", "mmap64", "mremap", "sbrk")


def _failed(entry: Entry) -> bool:
    """By what each kind of function returns."""
    if entry.function in _POINTERS:
        return entry.result == 0
    if entry.function in _MAPPINGS:
        return entry.result == _UNKNOWN
    if entry.function == "posix_fallocate" or entry.function.startswith("cuda"):
        return False  # the result is the error
    return entry.result == _UNKNOWN


def _system_calls(recording: Recording, first: Entry) -> tuple[SystemCall, ...] | None:
    """Times on the clock of the marks, which read both clocks."""
    if recording.traced is None:
        return None
    clock = first.values[3]
    return tuple(
        SystemCall(
            name=call.name,
            arguments=call.arguments,
            result=call.result,
            phase=msgspec.convert(call.phase, PhaseName),
            thread=call.thread,
            at_ns=call.at_ns - clock,
        )
        for call in strace_calls(recording.traced)
    )


def _state(given: dict[str, Any]) -> State:
    status = {
        name: 1024 * int(kib)
        for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", given["status"], re.M)
    }
    block = given["smaps"]
    mapping = read_smaps(block)[0] if block else None
    return State(
        virtual=status.get("VmSize"),
        resident=status.get("VmRSS"),
        resident_anonymous=status.get("RssAnon"),
        resident_file=status.get("RssFile"),
        resident_shared=status.get("RssShmem"),
        locked=status.get("VmLck"),
        pinned=status.get("VmPin"),
        data=status.get("VmData"),
        malloc=given["malloc"],
        range_resident=given["range_resident"],
        line=block.split("\n")[0] if block else None,
        mapping=mapping,
    )


def _mapping_changes(maps: dict[str, list[str]]) -> dict[PhaseName, tuple[Change, ...]]:
    """By phase: what maps says after it and did not say before."""
    found = {
        phase: tuple(changes(*map(read_maps, _differing(before, after))))
        for phase, (before, after) in maps.items()
    }
    checked: dict[PhaseName, tuple[Change, ...]] = msgspec.convert(
        found, dict[PhaseName, tuple[Change, ...]]
    )
    return checked


def _differing(before: str, after: str) -> tuple[str, str]:
    """Without the lines that both have, which are most: nothing else covers their ranges."""
    one, other = before.splitlines(), after.splitlines()
    both = set(one) & set(other)
    first, second = ("\n".join(line for line in of if line not in both) for of in (one, other))
    return first, second


def library_name(path: str | None) -> str:
    """`libc10.so` of a path; what is nowhere is unknown."""
    return Path(path).name if path else "unknown"
