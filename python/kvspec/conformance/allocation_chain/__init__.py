"""Conformance of the allocation chain. Spec: CHAIN.

What was recorded once serves every test and every mutant: a recording is read again and again.
"""

import json
import os
import re
import subprocess
from functools import cache
from typing import Any

import msgspec
import pytest

import kvspec.allocation_chain as room
from kvspec.allocation_chain import Observation
from kvspec.allocation_chain.ring import Entry
from kvspec.clauses import spec_folder
from kvspec.conformance import clause
from kvspec.conformance.allocation_chain.claims import ClaimsConformance
from kvspec.conformance.allocation_chain.recordings import (
    KINDS,
    MAPS,
    MIB,
    PAGE,
    TRACE,
    blocks,
    own_smaps,
    recorded,
    with_trace,
)
from kvspec.errors import ContractError

__all__ = ["AllocationChainConformance"]


class AllocationChainConformance(ClaimsConformance):
    """`impl` may hold functions of the room, which then stand in for those of kvspec."""

    def observed(self, *given: Any, **options: Any) -> Observation:
        found: Observation = self.call("observe")(recorded(*given, **options))
        return found

    @clause("CHAIN-1")
    def test_what_nobody_saw_is_none_and_says_why(self) -> None:
        blind = self.observed("mmap", MIB, None, seen=False)
        assert (blind.library_calls, blind.dropped_calls, blind.system_calls) == (None, None, None)
        assert blind.timeline is None
        for kind in ("library_calls", "system_calls", "timeline"):
            assert blind.sources[kind].by is None
            assert blind.sources[kind].why_not
        assert blind.phase("allocate") is not None
        assert blind.states["allocated"].mapping is not None

    @clause("CHAIN-1")
    def test_strace_alone_may_be_missing(self) -> None:
        found = self.observed("mmap", 4 * MIB)
        assert found.library_calls
        assert found.system_calls is None
        assert found.sources["system_calls"].why_not == "it was not asked for"
        assert found.sources["library_calls"].by

    @clause("CHAIN-2")
    def test_calls_lie_in_their_phases(self) -> None:
        recording = with_trace(
            recorded("mmap", 4 * MIB), inside="brk(NULL) = 0x1000", outside="brk(0x1) = 0x1"
        )
        found = self.call("observe")(recording)
        spans = {p.name: (p.at_ns, p.at_ns + p.took_ns) for p in found.phases}
        for call in found.library_calls:
            begin, end = spans[call.phase]
            assert begin <= call.at_ns <= call.at_ns + call.took_ns <= end
        assert [c.phase for c in found.system_calls] == ["allocate", "free"]
        assert {c.arguments for c in found.system_calls} == {"NULL"}
        for call in found.system_calls:  # strace writes microseconds
            assert abs(call.at_ns - spans[call.phase][0] - 2000) < 2000
        names = {"allocate": "mmap", "free": "munmap"}
        for phase, name in names.items():
            assert name in {c.function for c in found.library_calls if c.phase == phase}

    @clause("CHAIN-3")
    def test_a_call_has_arguments_result_and_callers(self) -> None:
        found = self.observed("heap", 8 * MIB)
        calls = [c for c in found.library_calls or () if c.function == "malloc"]
        call = next(c for c in calls if c.result == found.address)
        assert call.arguments == (8 * MIB,)
        assert call.error is None
        assert call.thread == found.pid
        assert "_core" in str(call.stack[0].library)
        symbols = [frame.symbol for frame in call.stack]
        assert any(symbol and symbol.startswith("kvspec::HostArena") for symbol in symbols)
        assert any("python" in str(frame.library) for frame in call.stack)
        freed = [c for c in found.library_calls or () if c.function == "free"]
        assert (found.address,) in [c.arguments for c in freed]
        assert found.dropped_calls == 0

    @clause("CHAIN-3")
    def test_what_failed_has_its_errno(self) -> None:
        recording = recorded("mmap", 4 * MIB)
        begin = next(e for e in recording.entries if e.entry == "mark" and e.phase == 1)
        failed = Entry("call", 1, begin.begin_ns + 1, begin.begin_ns + 2, (0, 5, 0, 0, 0, 0),
                       (1 << 64) - 1, function="mmap", error=12, frames=(16,))  # fmt: skip
        refused = msgspec.structs.replace(failed, function="malloc", result=0)
        entries = [*recording.entries, failed, refused]
        found = self.call("observe")(msgspec.structs.replace(recording, entries=entries))
        assert [c.error for c in found.library_calls[-2:]] == [12, 12]
        assert found.library_calls[-1].stack[0].symbol is None
        assert found.library_calls[-1].arguments == (0,)

    @clause("CHAIN-4")
    def test_strace_is_read_between_the_marks(self) -> None:
        found = self.call("strace_calls")(TRACE)
        assert [(c.name, c.phase, c.thread) for c in found] == [
            ("brk", "allocate", 12),
            ("mmap", "allocate", 11),
            ("munmap", "free", 11),
        ]
        assert found[1].arguments == "NULL, 8192, PROT_READ, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0"
        assert found[1].result == "0x7f0000100000"
        assert found[1].at_ns == 100_000_003_000
        assert found[2].result.startswith("-1 ENOMEM")

    @clause("CHAIN-5")
    @pytest.mark.parametrize(
        ("kind", "nbytes", "where"),
        [
            ("heap", 4096, "heap"),
            ("heap", 8 * MIB, "anonymous"),
            ("mmap", 4 * MIB, "anonymous"),
            ("shm", MIB, "shared memory"),
            ("pinned", MIB, "anonymous"),
        ],
    )
    def test_the_mapping_is_the_one_that_holds_it(self, kind: str, nbytes: int, where: str) -> None:
        found = self.observed(kind, nbytes)
        for name in ("allocated", "touched"):
            mapping = found.states[name].mapping
            assert mapping is not None
            assert mapping.kind == where
            assert mapping.start <= found.address
            assert found.address + nbytes <= mapping.end
            assert str(found.states[name].line).startswith(
                f"{mapping.start:08x}-{mapping.end:08x} "
            )
            assert mapping.size == mapping.end - mapping.start
        if kind == "shm":
            assert found.name is not None
            assert mapping is not None
            assert mapping.path == f"/dev/shm/{found.name.strip('/')}"
        if where != "heap":
            assert found.states["freed"].mapping is None
            assert found.states["freed"].range_resident is None

    @clause("CHAIN-6")
    def test_a_phase_is_what_its_marks_had(self) -> None:
        recording = recorded("mmap", 4 * MIB)
        found = self.call("observe")(recording)
        for number, name in ((1, "allocate"), (3, "free")):
            marks = [e for e in recording.entries if e.entry == "mark" and e.phase == number]
            (minor, major, top, _, size, rss), after = marks[0].values, marks[1].values
            phase = found.phase(name)
            assert (phase.virtual_before, phase.virtual_after) == (size, after[4])
            assert (phase.resident_before, phase.resident_after) == (rss, after[5])
            faults = (phase.minor_faults, phase.major_faults, phase.break_moved)
            assert faults == (after[0] - minor, after[1] - major, after[2] - top)
        steps = [e for e in recording.entries if e.entry == "step"]
        touch = found.phase("touch")
        assert touch.minor_faults == sum(step.values[0] for step in steps)
        assert touch.took_ns == sum(step.end_ns - step.begin_ns for step in steps)
        assert touch.resident_after == steps[-1].values[3]

    @clause("CHAIN-6")
    def test_sizes_and_faults_are_the_allocations(self) -> None:
        """A mapping is addresses; each page comes with one fault when it is touched."""
        found = self.observed("mmap", 4 * MIB)
        allocate, touch, free = found.phases
        assert allocate.virtual_after - allocate.virtual_before == 4 * MIB
        assert free.virtual_after - free.virtual_before == -4 * MIB
        assert allocate.minor_faults < 64
        states = [found.states[name] for name in ("allocated", "touched")]
        assert [state.range_resident for state in states] == [0, 4 * MIB]
        if found.machine["transparent_huge_pages"] != "always":
            assert touch.minor_faults == 4 * MIB // PAGE
            assert [s.mapping and s.mapping.rss for s in states] == [0, 4 * MIB]
        assert found.states["freed"].range_resident is None

    @clause("CHAIN-7")
    def test_changes_are_of_ranges_and_not_of_lines(self) -> None:
        first, second = room.read_maps(MAPS)[1:3]
        merged = msgspec.structs.replace(first, start=first.start - 0x1000, size=0x401000)
        grown = msgspec.structs.replace(first, end=first.end + 0x2000, size=0x402000)
        call = self.call("changes")
        assert call([first], [first]) == []
        assert [(c.change, c.start, c.end) for c in call([first, second], [merged, second])] == [
            ("appeared", first.start - 0x1000, first.start)
        ]
        assert [(c.change, c.size) for c in call([grown], [first])] == [("vanished", 0x2000)]
        halves = [
            msgspec.structs.replace(first, end=first.start + 0x1000, size=0x1000),
            msgspec.structs.replace(first, start=first.start + 0x2000, size=0x3FE000),
        ]
        assert [(c.change, c.start, c.size) for c in call([first], halves)] == [
            ("vanished", first.start + 0x1000, 0x1000)
        ]
        locked = msgspec.structs.replace(first, permissions="r--p")
        assert [(c.change, c.permissions) for c in call([first], [locked])] == [
            ("appeared", "r--p"),
            ("vanished", "rw-p"),
        ]

    @clause("CHAIN-7")
    @pytest.mark.parametrize(("kind", "nbytes"), [("mmap", 4 * MIB), ("shm", MIB)])
    def test_an_allocation_appears_and_vanishes(self, kind: str, nbytes: int) -> None:
        recording = recorded(kind, nbytes)
        for phase, word in (("allocate", "appeared"), ("free", "vanished")):
            before, after = map(room.read_maps, recording.maps[phase])
            ranges = [(c.change, c.start, c.size) for c in self.call("changes")(before, after)]
            assert (word, recording.address, nbytes) in ranges

    @clause("CHAIN-8")
    @pytest.mark.parametrize("nbytes", [1, 4097, 4 * MIB])
    def test_the_timeline_goes_to_the_last_byte(self, nbytes: int) -> None:
        recording = recorded("mmap", nbytes)
        timeline = self.call("observe")(recording).timeline
        steps = [e for e in recording.entries if e.entry == "step"]
        assert [s.touched for s in timeline] == [step.result for step in steps]
        assert (timeline[0].touched, timeline[-1].touched) == (0, nbytes)
        assert timeline[0].range_resident == 0
        assert timeline[-1].range_resident == -(-nbytes // PAGE) * PAGE
        assert [s.at_ns for s in timeline] == sorted(s.at_ns for s in timeline)

    @clause("CHAIN-9")
    def test_sizes_are_read(self) -> None:
        call = self.call("parse_bytes")
        given = ("4096", "128KiB", "8MiB", "1GiB", "5_242_880", "2 mib", "7B", "1TiB")
        expected = [4096, 131072, 8 * MIB, 1 << 30, 5242880, 2 * MIB, 7, 1 << 40]
        assert [call(text) for text in given] == expected
        for text in (
            "",
            "0",
            "0KiB",
            "-1",
            "1.5MiB",
            "MiB",
            "8MB",
            "8M",
            "_1",
            "1_",
            "1 2",
            "０x1",
        ):
            with pytest.raises(ContractError, match=r"CHAIN-9: .* is no number of bytes"):
                call(text)

    @clause("CHAIN-10")
    def test_the_json_is_read_back(self) -> None:
        for value in _values():
            text = json.dumps(self.call("as_json")(value))
            try:
                assert msgspec.convert(json.loads(text), type(value)) == value
            except msgspec.ValidationError as error:
                pytest.fail(f"{error}: {text[:200]}")

    @clause("CHAIN-10")
    def test_every_key_is_in_the_specification(self) -> None:
        documented = (spec_folder() / "allocation_chain.md").read_text(encoding="utf-8")
        section = set(re.findall(r"\w+", documented.partition("## The JSON")[2]))
        for value in _values():
            assert not _keys(self.call("as_json")(value)) - section

    @clause("CHAIN-11")
    def test_the_chain_has_no_line_that_nobody_saw(self) -> None:
        lines = self.call("chain")(room.observe(recorded("mmap", MIB, None, seen=False)))
        assert {line.level for line in lines} == {"program", "kernel"}
        assert all(line.by for line in lines)
        assert not any(word in line.by for line in lines for word in ("strace", "interposer"))

    @clause("CHAIN-11")
    def test_the_chain_goes_from_the_caller_to_the_pages(self) -> None:
        recording = with_trace(recorded("heap", 8 * MIB), inside="mmap(NULL, 8392704) = 0x7f00")
        found = room.observe(recording)
        lines = [line for line in self.call("chain")(found) if line.phase == "allocate"]
        levels = list(dict.fromkeys(line.level for line in lines if line.at_ns is not None))
        assert sorted(levels) == sorted(["program", "library", "libc", "system call"])
        told = {level: [x for x in lines if x.level == level] for level in (*levels, "kernel")}
        assert told["program"][0].text == f"HostBlock('heap', {8 * MIB})"
        assert any("kvspec::HostArena" in line.text for line in told["library"])
        assert told["libc"][0].text == f"malloc({8 * MIB}) = {found.address:#x}"
        assert told["system call"][0].text == "mmap(NULL, 8392704) = 0x7f00"
        assert any("appeared" in line.text for line in told["kernel"])
        sources = {"program": "process", "library": "interposer", "libc": "interposer"}
        for level, who in (sources | {"system call": "strace", "kernel": ""}).items():
            assert all(who in line.by for line in told[level])

    @clause("CHAIN-12")
    def test_each_mapping_is_in_one_kind(self) -> None:
        mappings = room.read_smaps(blocks(MAPS))
        assert tuple(mapping.kind for mapping in mappings) == KINDS
        groups = self.call("by_kind")(mappings)
        assert {g.kind: g.mappings for g in groups} == {k: KINDS.count(k) for k in set(KINDS)}
        for group in groups:
            of_it = [mapping for mapping in mappings if mapping.kind == group.kind]
            assert group.size == sum(mapping.size for mapping in of_it)
            assert (group.rss, group.pss) == (8192 * len(of_it), 4096 * len(of_it))
            assert (group.swap, group.locked) == (4096 * len(of_it), 4096 * len(of_it))
        shared = next(group for group in groups if group.kind == "shared memory")
        assert {one.path for one in shared.named} == {
            "/dev/shm/kv.1 (deleted)",
            "/dev/zero (deleted)",
        }

    @clause("CHAIN-12")
    def test_of_a_process_nothing_is_lost(self) -> None:
        mappings = room.read_smaps(own_smaps())
        groups = self.call("by_kind")(mappings)
        for field in ("size", "rss", "pss", "swap", "locked"):
            told = sum(getattr(group, field) for group in groups)
            assert told == sum(getattr(mapping, field) for mapping in mappings)
        assert sum(group.mappings for group in groups) == len(mappings)
        assert {"heap", "anonymous", "file", "stack"} <= {group.kind for group in groups}

    @clause("CHAIN-13")
    def test_a_process_that_is_not_there_is_refused(self) -> None:
        for pid in (-1, 0, 1 << 30):
            with pytest.raises(ContractError, match=f"CHAIN-13: there is no process {pid}"):
                self.call("process_memory")(pid)

    @clause("CHAIN-13")
    def test_a_process_without_memory_is_refused(self) -> None:
        """As a thread of the kernel, and one that has ended and was not waited for."""
        with subprocess.Popen(["/bin/true"]) as ended:
            os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
            with pytest.raises(ContractError, match="CHAIN-13: "):
                self.call("process_memory")(ended.pid)


@cache
def _values() -> tuple[Observation | room.ProcessMemory, ...]:
    """An observation in which all was seen, one in which nothing was, and a process."""
    recording = with_trace(recorded("shm", MIB), inside="brk(NULL) = 0x1000")
    blind = recorded("mmap", MIB, None, seen=False)
    return room.observe(recording), room.observe(blind), room.process_memory(os.getpid())


def _keys(value: object) -> set[str]:
    """The names of fields, at every depth; what is keyed by other names is left out."""
    if isinstance(value, dict):
        return {key for key in value if key.isidentifier()}.union(*map(_keys, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(_keys, value))
    return set()
