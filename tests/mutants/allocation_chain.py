"""Readings of a recording that tell what nobody saw, or take one thing for another. Spec: CHAIN."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

import kvspec.oracle
from kvspec import allocation_chain as room
from kvspec.allocation_chain.claims import Claim, Facts
from kvspec.allocation_chain.observation import Observation, Phase, Source, SystemCall
from kvspec.allocation_chain.processes import Group, ProcessMemory
from kvspec.allocation_chain.recording import Recording
from kvspec.allocation_chain.smaps import Change, Mapping
from kvspec.allocation_chain.strace import TracedCall
from kvspec.conformance.allocation_chain import AllocationChainConformance
from kvspec.conformance.mutants import Registry

registry = Registry(AllocationChainConformance, kvspec.oracle)
replace = msgspec.structs.replace


@registry.mutant("CHAIN-1", replaces="observe")
def fills_in_what_strace_would_have_said(recording: Recording) -> Observation:
    found = room.observe(recording)
    if found.system_calls is not None:
        return found
    recited = SystemCall("mmap", "NULL, 4096", "0x7f0000000000", "allocate", found.pid, 0)
    return replace(found, system_calls=(recited,))


@registry.mutant("CHAIN-1", replaces="observe")
def claims_strace_where_there_is_none(recording: Recording) -> Observation:
    found = room.observe(recording)
    return replace(found, sources={**found.sources, "system_calls": Source("strace", None)})


@registry.mutant("CHAIN-1", replaces="observe")
def takes_no_call_for_none(recording: Recording) -> Observation:
    found = room.observe(recording)
    return replace(found, library_calls=found.library_calls or ())


@registry.mutant("CHAIN-2", replaces="observe")
def takes_all_for_the_allocation(recording: Recording) -> Observation:
    found = room.observe(recording)
    calls = tuple(replace(call, phase="allocate") for call in found.library_calls or ())
    return replace(found, library_calls=found.library_calls and calls)


@registry.mutant("CHAIN-2", replaces="observe")
def takes_the_time_of_day_for_the_time(recording: Recording) -> Observation:
    found = room.observe(recording)
    if found.system_calls is None:
        return found
    clock = next(e.values[3] for e in recording.entries if e.entry == "mark" and e.phase == 1)
    calls = tuple(replace(call, at_ns=call.at_ns + clock) for call in found.system_calls)
    return replace(found, system_calls=calls)


@registry.mutant("CHAIN-3", replaces="observe")
def knows_no_error(recording: Recording) -> Observation:
    found = room.observe(recording)
    calls = tuple(replace(call, error=None) for call in found.library_calls or ())
    return replace(found, library_calls=found.library_calls and calls)


@registry.mutant("CHAIN-3", replaces="observe")
def takes_the_outermost_for_the_caller(recording: Recording) -> Observation:
    found = room.observe(recording)
    calls = tuple(replace(c, stack=c.stack[::-1]) for c in found.library_calls or ())
    return replace(found, library_calls=found.library_calls and calls)


@registry.mutant("CHAIN-4", replaces="strace_calls")
def reads_before_the_first_mark_too(text: str) -> list[TracedCall]:
    begins = "prctl(0x4b565350 /* PR_??? */, 0x1, 0x1, 0, 0) = -1 EINVAL (Invalid argument)"
    return room.strace_calls(f"11 100.000000 {begins}\n{text}")


@registry.mutant("CHAIN-4", replaces="strace_calls")
def loses_what_was_interrupted(text: str) -> list[TracedCall]:
    lines = [line for line in text.splitlines() if " resumed>" not in line]
    return room.strace_calls("\n".join(lines))


@registry.mutant("CHAIN-5", replaces="observe")
def takes_the_largest_mapping(recording: Recording) -> Observation:
    found = room.observe(recording)
    mappings = room.read_maps(recording.maps["free"][0])
    largest = max(mappings, key=lambda mapping: mapping.size)
    states = {
        name: replace(state, mapping=state.mapping and replace(largest, rss=state.mapping.rss))
        for name, state in found.states.items()
    }
    return replace(found, states=states)


@registry.mutant("CHAIN-6", replaces="observe")
def reports_the_resident_as_virtual(recording: Recording) -> Observation:
    return _with_phases(
        recording,
        lambda phase: replace(
            phase, virtual_before=phase.resident_before, virtual_after=phase.resident_after
        ),
    )


@registry.mutant("CHAIN-6", replaces="observe")
def counts_faults_from_the_first(recording: Recording) -> Observation:
    earlier = recording.entries[0].values[0]
    return _with_phases(
        recording, lambda phase: replace(phase, minor_faults=phase.minor_faults + earlier)
    )


@registry.mutant("CHAIN-6", replaces="observe")
def counts_what_the_observer_did_between_the_steps(recording: Recording) -> Observation:
    found = room.observe(recording)
    last = found.timeline[-1].at_ns if found.timeline else 0
    return _with_phases(
        recording,
        lambda phase: (
            replace(phase, took_ns=last - phase.at_ns) if phase.name == "touch" else phase
        ),
    )


def _with_phases(recording: Recording, change: Callable[[Phase], Phase]) -> Observation:
    found = room.observe(recording)
    return replace(found, phases=tuple(change(phase) for phase in found.phases))


@registry.mutant("CHAIN-7", replaces="changes")
def compares_lines(before: Sequence[Mapping], after: Sequence[Mapping]) -> list[Change]:
    """So that a mapping that grew is one that came and one that went."""
    old, new = set(before), set(after)
    return [
        *room.changes([], [mapping for mapping in after if mapping not in old]),
        *room.changes([mapping for mapping in before if mapping not in new], []),
    ]


@registry.mutant("CHAIN-7", replaces="changes")
def sees_what_came_alone(before: Sequence[Mapping], after: Sequence[Mapping]) -> list[Change]:
    return [change for change in room.changes(before, after) if change.change == "appeared"]


@registry.mutant("CHAIN-8", "CHAIN-6", replaces="observe")
def leaves_the_last_step_out(recording: Recording) -> Observation:
    found = room.observe(recording)
    return replace(found, timeline=found.timeline and found.timeline[:-1])


@registry.mutant("CHAIN-8", replaces="observe")
def leaves_the_first_sample_out(recording: Recording) -> Observation:
    found = room.observe(recording)
    return replace(found, timeline=found.timeline and found.timeline[1:])


@registry.mutant("CHAIN-9", replaces="parse_bytes")
def takes_a_kibibyte_for_a_thousand(text: str) -> int:
    return room.parse_bytes(text) * 1000 // 1024 if "k" in text.lower() else room.parse_bytes(text)


@registry.mutant("CHAIN-9", replaces="parse_bytes")
def takes_nothing_for_a_size(text: str) -> int:
    return 0 if text == "0" else room.parse_bytes(text)


@registry.mutant("CHAIN-10", replaces="as_json")
def leaves_out_what_is_null(value: Observation | ProcessMemory) -> dict[str, Any]:
    return {key: each for key, each in room.as_json(value).items() if each is not None and each}


@registry.mutant("CHAIN-10", replaces="as_json")
def adds_a_key(value: Observation | ProcessMemory) -> dict[str, Any]:
    return {**room.as_json(value), "undocumented": 1}


@registry.mutant("CHAIN-11", replaces="chain")
def recites_the_system_call(observation: Observation) -> list[room.Line]:
    recited = room.Line("allocate", 0, "system call", "mmap(NULL, 4096) = 0x7f00", "strace")
    return [*room.chain(observation), recited]


@registry.mutant("CHAIN-11", replaces="chain")
def says_not_who_saw_it(observation: Observation) -> list[room.Line]:
    return [line._replace(by="") for line in room.chain(observation)]


@registry.mutant("CHAIN-12", replaces="by_kind")
def counts_segments_twice(mappings: Iterable[Mapping]) -> tuple[Group, ...]:
    given = list(mappings)
    shared = [replace(each, kind="file") for each in given if each.kind == "shared memory"]
    return room.by_kind([*given, *shared])


@registry.mutant("CHAIN-12", replaces="by_kind")
def loses_what_has_no_name(mappings: Iterable[Mapping]) -> tuple[Group, ...]:
    return room.by_kind([mapping for mapping in mappings if mapping.path])


@registry.mutant("CHAIN-13", replaces="process_memory")
def shows_nothing_of_nobody(pid: int) -> ProcessMemory:
    try:
        return room.process_memory(pid)
    except ValueError:
        total = Group("anonymous", 0, 0, 0, 0, 0, 0, 0, ())
        return ProcessMemory(pid, None, None, None, None, None, (), total)


def _judges(clause: str, change: Callable[[Claim, Facts], Claim]) -> Callable[..., list[Claim]]:
    """`claims`, with what it says under one clause changed."""

    def claims(facts: Facts) -> list[Claim]:
        return [
            change(claim, facts) if claim.clause == clause else claim
            for claim in room.claims(facts)
        ]

    return claims


def _recites(claim: Claim, _: Facts) -> Claim:
    """As the account has it, whatever was found."""
    return claim._replace(holds=True)


def _knows_better(claim: Claim, _: Facts) -> Claim:
    return claim._replace(holds=False)


def _says_what_others_saw(claim: Claim, _: Facts) -> Claim:
    return claim._replace(observed="as everywhere")


def _takes_mincore_for_resident(claim: Claim, facts: Facts) -> Claim:
    seen = facts.look("read_first", "read")
    return claim._replace(observed=f"{seen.faults:,} faults, {seen.mincore:,} bytes resident")


def _declare(name: str, clause: str, change: Callable[[Claim, Facts], Claim]) -> None:
    broken = _judges(clause, change)
    broken.__name__ = name
    registry.mutant(clause, replaces="claims")(broken)


_declare("recites_that_small_is_heap", "CHAIN-14", _recites)
_declare("recites_the_threshold", "CHAIN-15", _recites)
_declare("tells_what_free_does_everywhere", "CHAIN-16", _says_what_others_saw)
_declare("recites_that_mmap_allocates_pages", "CHAIN-17", _recites)
_declare("knows_that_mmap_allocates_none", "CHAIN-17", _knows_better)
_declare("recites_that_populate_fills", "CHAIN-18", _recites)
_declare("takes_mincore_for_the_resident_set", "CHAIN-19", _takes_mincore_for_resident)
_declare("recites_that_ftruncate_reserves", "CHAIN-20", _recites)
_declare("tells_of_huge_pages_everywhere", "CHAIN-21", _says_what_others_saw)
_declare("recites_what_torch_calls", "CHAIN-22", _recites)
_declare("recites_that_shm_open_opens", "CHAIN-23", _recites)
_declare("recites_that_cuda_pins", "CHAIN-24", _recites)
