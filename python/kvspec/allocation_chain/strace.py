"""System calls by strace, where it is there and allowed. Spec: CHAIN-4."""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from shutil import which

import msgspec

from kvspec.allocation_chain.ring import PHASES

__all__ = ["TRACED", "TracedCall", "command", "refused_filter", "strace_calls", "why_not"]

TRACED = (
    *("mmap", "munmap", "mremap", "brk", "madvise", "mlock", "mlock2", "munlock", "mbind"),
    *("?open", "openat", "?unlink", "unlinkat", "ftruncate", "fallocate", "ioctl", "memfd_create"),
    *("prctl",),
)
"""What is looked at; `?` because not every architecture has it. prctl carries the marks."""

_TIMEOUT_S = 20
_LINE = re.compile(r"(?P<thread>\d+) +(?P<at>\d+\.\d+) (?P<call>.*)")
_WHOLE = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>.+)")
_BEGUN = re.compile(r"(?P<name>\w+)\((?P<arguments>.*?),? *<unfinished \.\.\.>")
_RESUMED = re.compile(r"<\.\.\. (?P<name>\w+) resumed>(?P<rest>.*)")
_MARK = re.compile(r"0x4b565350\b[^,]*, (?P<phase>\w+), (?P<begins>\w+)")


class TracedCall(msgspec.Struct, frozen=True):
    """One system call, in strace's words."""

    name: str
    arguments: str
    result: str
    phase: str
    thread: int
    at_ns: int
    """Of the clock of the day, to a microsecond."""


@cache
def why_not() -> str | None:
    """Why system calls cannot be traced here; None if they can."""
    if which("strace") is None:
        return "strace is not installed"
    try:
        done = subprocess.run(
            [*command("/dev/null"), "/bin/true"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"strace does not run: {error}"
    if done.returncode != 0:
        return "strace is refused: " + " ".join(done.stderr.split())[:200]
    return None


def command(output: str) -> list[str]:
    """The command line that what is traced is appended to."""
    traced = f"trace={','.join(TRACED)}"
    options = ["-f", "-y", "-qq", "-ttt", "-s", "256", "--seccomp-bpf", "-e", "signal=none"]
    return ["strace", *options, "-e", traced, "-o", output]


def refused_filter(names: str) -> str | None:
    """What strace says to `-e trace=NAMES`: the names that are no system calls. None if it takes
    them, or if there is no strace.
    """
    if which("strace") is None:
        return None
    done = subprocess.run(
        ["strace", "-o", "/dev/null", "-e", f"trace={names}", "/bin/true"],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    return " ".join(done.stderr.split()) if "invalid system call" in done.stderr else None


def strace_calls(text: str) -> list[TracedCall]:
    """The calls between the marks, by phase. What lies outside of them is somebody else's."""
    phase, found = "", []
    for thread, at, name, arguments, result in _whole(text):
        mark = _MARK.match(arguments) if name == "prctl" else None
        if mark is not None:
            phase = PHASES[int(mark["phase"], 0)] if int(mark["begins"], 0) else ""
        elif phase in PHASES[1:4] and name != "prctl":
            seconds, _, micro = at.partition(".")
            at_ns = int(seconds) * 10**9 + int(micro.ljust(9, "0"))
            found.append(TracedCall(name, arguments, result, phase, thread, at_ns))
    return found


def _whole(text: str) -> Iterator[tuple[int, str, str, str, str]]:
    """Calls in the order in which they end; one that another interrupts is put together."""
    open_calls: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        head = _LINE.fullmatch(line)
        if head is None:
            continue
        thread, at, call = head["thread"], head["at"], head["call"]
        begun, resumed = _BEGUN.fullmatch(call), _RESUMED.fullmatch(call)
        if begun:
            open_calls[thread] = (at, call[: call.rindex("<unfinished")].rstrip())
            continue
        if resumed and thread in open_calls:
            at, start = open_calls.pop(thread)
            call = start + resumed["rest"]
        whole = _WHOLE.fullmatch(call)
        if whole:
            yield int(thread), at, whole["name"], whole["arguments"].rstrip(), whole["result"]
