"""The chain of an allocation, line by line, each observed. Spec: CHAIN-11."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from kvspec.allocation_chain.observation import (
    LibraryCall,
    Observation,
    PhaseName,
    StateName,
    SystemCall,
    library_name,
)
from kvspec.allocation_chain.ring import FUNCTIONS
from kvspec.allocation_chain.smaps import Change

__all__ = ["Level", "Line", "chain", "hexadecimal", "plain", "sizes", "told_call"]

Level = Literal["program", "library", "libc", "system call", "kernel"]

_LARGE = 4096
"""Calls for less than this, or than half of what was asked for, are counted and not told, unless
the allocation lies in what they return.
"""

_OF_MALLOC = frozenset(("malloc", "calloc", "realloc", "aligned_alloc", "posix_memalign"))
_MAPPING_CALLS = frozenset(FUNCTIONS) - _OF_MALLOC - {"free"}
_SIZE_AT = {"calloc": 1, "realloc": 1, "aligned_alloc": 1, "posix_memalign": 1}


class Line(NamedTuple):
    """One line: what happened, when, and who saw it."""

    phase: PhaseName
    at_ns: int | None
    """Since the begin of the allocation; None for what was read after the phase."""
    level: Level
    text: str
    by: str


def chain(observation: Observation) -> list[Line]:
    """By phase: the process, who called whom, libc, system calls, what maps says afterwards.

    Every line is of something that was seen; where nobody looked there is no line.
    """
    return [
        line
        for phase in observation.phases
        for line in (*_calls(observation, phase.name), *_kernel(observation, phase.name))
    ]


def _calls(observation: Observation, phase: PhaseName) -> Iterator[Line]:
    """The timed lines, in order of time."""
    lines = [_program(observation, phase)]
    calls = [call for call in observation.library_calls or () if call.phase == phase]
    told = [call for call in calls if _matters(call, observation)]
    before: list[str] = []
    for call in told:
        callers = _callers(call)
        lines += _library_lines(call, callers, before)
        before = callers
    by = observation.sources["system_calls"].by
    seen, traced = list[SystemCall](), list[SystemCall]()
    if by is not None:
        traced = [call for call in observation.system_calls or () if call.phase == phase]
        seen = [call for call in traced if _concerns(call, observation)]
        lines += [_system_line(call, by) for call in seen]
    yield from sorted(lines, key=lambda line: line.at_ns or 0)
    if by is not None and len(seen) < len(traced):
        text = f"and {len(traced) - len(seen)} calls about other files"
        yield Line(phase, None, "system call", text, by)
    rest = [call for call in calls if call not in told]
    if rest:
        yield _rest(phase, rest)


def _program(observation: Observation, phase: PhaseName) -> Line:
    asked, found = observation.request, observation.phase(phase)
    at = found.at_ns if found is not None else None
    options = "".join(
        f", {name}={value!r}"
        for name, value, usual in (
            ("alignment", asked.alignment, None),
            ("populate", asked.populate, False),
            ("huge_pages", asked.huge_pages, "no"),
            ("numa_node", asked.numa_node, None),
        )
        if value != usual
    )
    touches = {
        "page": "one byte of each page",
        "all": "every byte",
        "read": "one byte of each page",
    }
    text = {
        "allocate": f"{observation.arena}({asked.kind!r}, {asked.nbytes}{options})",
        "touch": f"{'read' if asked.touch == 'read' else 'write'} {touches.get(str(asked.touch))}",
        "free": f"{observation.arena}.close()",
    }[phase]
    return Line(phase, at, "program", text, "the process itself")


def _matters(call: LibraryCall, observation: Observation) -> bool:
    """Whether a call is told in full: it maps, it is large, or the allocation is what it gave."""
    address = observation.address
    if call.text is not None:  # of other segments: the arena takes over what the dead left
        return observation.name is not None and observation.name in call.text
    if call.function in _MAPPING_CALLS:
        return True
    if call.function == "free":
        return call.arguments[0] == address
    asked = _asked(call)
    large = asked >= max(_LARGE, observation.request.nbytes // 2)
    return large or call.result <= address < call.result + asked


def _asked(call: LibraryCall) -> int:
    size = call.arguments[_SIZE_AT.get(call.function, 0)]
    return size * call.arguments[0] if call.function == "calloc" else size


def _callers(call: LibraryCall) -> list[str]:
    """Who called, the outermost first, without the interpreter's own frames."""
    seen = [_told_frame(frame.library, frame.symbol) for frame in call.stack]
    outer = next((i for i, name in enumerate(seen) if _is_interpreter(name)), len(seen))
    return list(dict.fromkeys(reversed(seen[:outer])))


def _library_lines(call: LibraryCall, callers: list[str], before: list[str]) -> Iterator[Line]:
    """Those of the callers that the call before did not have, then the call."""
    by = "the interposer"
    same = next(
        (i for i, (one, other) in enumerate(zip(callers, before, strict=False)) if one != other),
        min(len(callers), len(before)),
    )
    for name in callers[same:]:
        yield Line(call.phase, call.at_ns, "library", name, f"{by}: return address")
    yield Line(call.phase, call.at_ns, "libc", told_call(call), by)


def _told_frame(library: str | None, symbol: str | None) -> str:
    name = library_name(library)
    return f"{plain(symbol)} in {name}" if symbol else f"a function of {name}"


def plain(symbol: str) -> str:
    """The name of a C++ function without its template arguments and parameters."""
    depth, text = 0, ""
    for letter in symbol:
        depth += (letter in "<(") - (letter in ">)")
        if depth == 0 and letter not in ">)":
            text += letter
    return text.strip()


def _is_interpreter(frame: str) -> bool:
    library = frame.rpartition(" ")[2]
    return library.startswith(("libpython", "python", "_ctypes.", "libffi"))


def told_call(call: LibraryCall) -> str:
    """`posix_memalign(64, 5242880) = 0x7f...`, sizes as numbers and pointers in hexadecimal."""
    words = _WORDS.get(call.function, {})
    given = [
        f'"{call.text}"' if call.text and i == 0 else words.get(i, _number)(argument)
        for i, argument in enumerate(call.arguments)
    ]
    result = _number(call.result)
    failed = f", errno {call.error}" if call.error is not None else ""
    name = {"mmap64": "mmap", "ftruncate64": "ftruncate"}.get(call.function, call.function)
    return f"{name}({', '.join(given)}) = {result}{failed}"


def _number(value: int) -> str:
    if value >= 1 << 63:
        return str(value - (1 << 64))
    return hexadecimal(value) if value >= 1 << 40 else str(value)


def hexadecimal(value: int) -> str:
    """As the kernel prints addresses, with 0x."""
    return f"{value:#x}"


def _flags(*names: tuple[int, str]) -> Callable[[int], str]:
    """`PROT_READ|PROT_WRITE`, with what has no name as a number."""

    def told(value: int) -> str:
        known = [(bit, name) for bit, name in names if value & bit]
        rest = value & ~sum(bit for bit, _ in known)
        words = [name for _, name in known] + ([f"{rest:#x}"] if rest or not known else [])
        return "|".join(words)

    return told


def _advice(value: int) -> str:
    return _ADVICE.get(value, str(value))


_ADVICE = {
    4: "MADV_DONTNEED",
    9: "MADV_REMOVE",
    10: "MADV_DONTFORK",
    14: "MADV_HUGEPAGE",
    15: "MADV_NOHUGEPAGE",
    22: "MADV_POPULATE_READ",
    23: "MADV_POPULATE_WRITE",
}
_PROT = _flags((1, "PROT_READ"), (2, "PROT_WRITE"), (4, "PROT_EXEC"))
_MAP = _flags(
    *((1, "MAP_SHARED"), (2, "MAP_PRIVATE"), (0x10, "MAP_FIXED"), (0x20, "MAP_ANONYMOUS")),
    *((0x8000, "MAP_POPULATE"), (0x20000, "MAP_STACK"), (0x40000, "MAP_HUGETLB")),
    (0x4000, "MAP_NORESERVE"),
)
_OPEN = _flags(
    *((1, "O_WRONLY"), (2, "O_RDWR"), (0o100, "O_CREAT"), (0o200, "O_EXCL"), (0o1000, "O_TRUNC")),
)
_WORDS: dict[str, dict[int, Callable[[int], str]]] = {
    "mmap": {2: _PROT, 3: _MAP},
    "mmap64": {2: _PROT, 3: _MAP},
    "madvise": {2: _advice},
    "shm_open": {1: _OPEN, 2: "{:#o}".format},
}


def _concerns(call: SystemCall, observation: Observation) -> bool:
    """Files that are looked at are no part of the chain; its segment and devices are."""
    if call.name == "ioctl":
        return "</dev/" in call.arguments and "</dev/pts" not in call.arguments
    if call.name in ("open", "openat", "unlink", "unlinkat"):
        own = observation.name is not None and f"{observation.name}" in call.arguments
        return own or '"/dev/nvidia' in call.arguments
    return True


def _system_line(call: SystemCall, by: str) -> Line:
    text = f"{call.name}({call.arguments}) = {call.result}"
    return Line(call.phase, call.at_ns, "system call", text, by)


def _rest(phase: PhaseName, calls: Sequence[LibraryCall]) -> Line:
    libraries = sorted({library_name(c.stack[0].library) for c in calls if c.stack})
    asked = sum(_asked(call) for call in calls if call.function in _OF_MALLOC)
    text = f"and {len(calls)} calls for other blocks, {asked:,} bytes, by {', '.join(libraries)}"
    return Line(phase, None, "libc", text, "the interposer")


def _kernel(observation: Observation, phase: PhaseName) -> Iterator[Line]:
    """What the kernel says when the phase is over."""
    found = observation.phase(phase)
    if found is not None:
        text = (
            f"{sizes(found.virtual_after - found.virtual_before)} of addresses,"
            f" {sizes(found.resident_after - found.resident_before)} resident,"
            f" {found.minor_faults:,} minor and {found.major_faults:,} major faults"
        )
        if found.break_moved:
            text += f", program break moved by {found.break_moved:+,} bytes"
        yield Line(phase, None, "kernel", text, "statm and getrusage at the marks")
    for change in observation.mapping_changes.get(phase, ()):
        yield Line(phase, None, "kernel", _told_change(change), "/proc/self/maps, compared")
    names: dict[PhaseName, StateName] = {
        "allocate": "allocated",
        "touch": "touched",
        "free": "freed",
    }
    after = observation.states.get(names[phase])
    if after is not None and after.mapping is not None:
        mapping = after.mapping
        text = (
            f"it lies in a mapping of {mapping.size:,} bytes ({mapping.kind}),"
            f" {mapping.rss or 0:,} of them resident"
        )
        if mapping.locked:
            text += f", {mapping.locked:,} locked"
        if mapping.anonymous_huge or mapping.shared_huge:
            text += (
                f", {(mapping.anonymous_huge or 0) + (mapping.shared_huge or 0):,} in huge pages"
            )
        yield Line(phase, None, "kernel", text, "/proc/self/smaps")
        if after.range_resident is not None and mapping.size > 2 * observation.mapped_bytes:
            text = f"of the allocation itself {after.range_resident:,} bytes are resident"
            yield Line(phase, None, "kernel", text, "mincore")


def _told_change(change: Change) -> str:
    where = change.path or ("shared" if change.permissions[3] == "s" else "anonymous")
    return (
        f"{hexadecimal(change.start)}-{hexadecimal(change.end)} {change.permissions} {where}"
        f" {change.change}: {change.size:,} bytes"
    )


def sizes(value: int, *, sign: bool = True) -> str:
    """`+8.0 MiB`; exact below 10 KiB."""
    mark = "+" if sign and value > 0 else "-" if value < 0 else ""
    size = float(abs(value))
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < (10240 if unit == "bytes" else 1024) or unit == "TiB":
            break
        size /= 1024
    number = f"{size:,.0f}" if unit == "bytes" or size == int(size) else f"{size:,.1f}"
    return f"{mark}{number} {unit}"
