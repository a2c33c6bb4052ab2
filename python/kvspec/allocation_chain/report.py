"""An observation, a process and the claims, for people and as JSON. Spec: CHAIN-9 to CHAIN-11."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from rich import box
from rich.table import Table
from rich.text import Text

from kvspec.allocation_chain.chain import Line, chain, hexadecimal, sizes
from kvspec.allocation_chain.claims import Claim
from kvspec.allocation_chain.observation import Observation, State
from kvspec.allocation_chain.processes import Group, ProcessMemory
from kvspec.errors import ContractError

__all__ = [
    *("as_json", "as_tables", "chain_table", "claims_table", "not_observed", "parse_bytes"),
    "process_tables",
]

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_NAMED = 12
"""How many files, segments and devices of a kind are named."""


def parse_bytes(text: str) -> int:
    """`4096`, `5_242_880`, `128KiB`, `8 MiB`, `1GiB`; ContractError for anything else (CHAIN-9)."""
    found = re.fullmatch(r"(\d+(?:_\d+)*) ?([A-Za-z]*)", text.strip())
    unit = next((u for u in _UNITS if found and u.lower() == found[2].lower()), None)
    if found is None or unit is None or int(found[1]) == 0:
        raise ContractError(
            f"CHAIN-9: {text!r} is no number of bytes: a whole number above 0, and KiB, MiB, GiB"
            " or TiB if it is not bytes"
        )
    return int(found[1]) * _UNITS[unit]


def as_json(value: Observation | ProcessMemory) -> dict[str, Any]:
    """With the keys that spec/allocation_chain.md has; None is null (CHAIN-10)."""
    found: dict[str, Any] = msgspec.to_builtins(value)
    return found


def _table(title: str, **options: Any) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), **options
    )


def as_tables(observation: Observation) -> Iterator[Table]:
    """What the phases did to the process, and what the mapping is."""
    asked = observation.request
    name = f", segment {observation.name}" if observation.name else ""
    table = _table(
        f"{observation.arena}({asked.kind!r}, {asked.nbytes:,} bytes) in process {observation.pid}"
        f" at {hexadecimal(observation.address)}{name}",
        caption="of the whole process, between the marks of each phase",
        caption_justify="left",
    )
    for heading in ("phase", "took", "virtual size", "resident set", "minor faults"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    table.add_column("major faults", justify="right")
    table.add_column("program break", justify="right")
    for phase in observation.phases:
        table.add_row(
            phase.name,
            _time(phase.took_ns),
            sizes(phase.virtual_after - phase.virtual_before),
            sizes(phase.resident_after - phase.resident_before),
            f"{phase.minor_faults:,}",
            f"{phase.major_faults:,}",
            "-" if phase.break_moved is None else sizes(phase.break_moved),
        )
    yield table
    yield _mapping_table(observation)


def _mapping_table(observation: Observation) -> Table:
    """A column for each state in which something is mapped at the address."""
    states = {name: s for name, s in observation.states.items() if name != "before"}
    table = _table("The mapping that holds it")
    table.add_column("")
    for name in states:
        table.add_column(f"when {name}", justify="right")
    for label, cell in _ROWS:
        table.add_row(label, *(cell(state) for state in states.values()))
    for state in states.values():
        if state.line is not None:
            table.caption, table.caption_justify = state.line, "left"
            break
    return table


def _of_mapping(name: str) -> Any:
    def cell(state: State) -> str:
        value = getattr(state.mapping, name) if state.mapping is not None else None
        if value is None:
            return "-"
        return sizes(value, sign=False) if isinstance(value, int) else str(value)

    return cell


def _of_state(name: str) -> Any:
    def cell(state: State) -> str:
        value = getattr(state, name)
        return "-" if value is None else sizes(value, sign=False)

    return cell


_ROWS: tuple[tuple[str, Any], ...] = (
    ("kind", _of_mapping("kind")),
    ("size", _of_mapping("size")),
    ("resident (Rss)", _of_mapping("rss")),
    ("locked", _of_mapping("locked")),
    ("in transparent huge pages", _of_mapping("anonymous_huge")),
    ("page of the kernel", _of_mapping("kernel_page")),
    ("of the allocation itself (mincore)", _of_state("range_resident")),
    ("locked by the process (VmLck)", _of_state("locked")),
)


def chain_table(observation: Observation, *, whole: bool) -> Table:
    """The chain, a line for each thing that was seen; without `whole` nothing of who called."""
    table = _table("The chain, as it was observed")
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("level", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("seen by", overflow="fold")
    phase = ""
    for line in chain(observation):
        if not whole and line.level == "library":
            continue
        if line.phase != phase:
            table.add_section()
            phase = line.phase
        table.add_row(*_cells(line))
    return table


_INDENT = {"program": 0, "library": 1, "libc": 2, "system call": 3, "kernel": 4}


def _cells(line: Line) -> tuple[str | Text, ...]:
    at = "" if line.at_ns is None else f"{line.at_ns / 1000:,.0f} µs"
    what = Text("  " * _INDENT[line.level] + line.text)
    return at, line.level, what, Text(line.by, style="dim")


def not_observed(observation: Observation) -> list[str]:
    """A line for each kind of fact that nobody saw, with the reason."""
    return [
        f"not observed: {kind.replace('_', ' ')}: {source.why_not}"
        for kind, source in observation.sources.items()
        if source.by is None
    ]


def claims_table(claims: Sequence[Claim]) -> Table:
    """What is claimed, whether it holds, and what was seen."""
    table = _table("What is said of these chains, and what this machine does", show_lines=False)
    for heading in ("clause", "claimed", "holds", "observed"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("clause", "holds"))
    words = {True: Text("yes", "green"), False: Text("no", "red"), None: Text("-", "dim")}
    for claim in claims:
        table.add_row(claim.clause, claim.claimed, words[claim.holds], claim.observed)
    return table


def process_tables(process: ProcessMemory) -> Iterator[Table]:
    """By kind, and what of each kind has a name."""
    command = (process.command or "").split(" ")[0]
    table = _table(
        f"Process {process.pid} {command}: {_size(process.virtual)} of addresses,"
        f" {_size(process.resident)} resident, {_size(process.locked)} locked,"
        f" {_size(process.pinned)} pinned by drivers"
    )
    table.add_column("kind")
    for heading in ("mappings", "size", "resident", "its share (Pss)", "swapped", "locked"):
        table.add_column(heading, justify="right")
    table.add_column("huge pages", justify="right")
    for group in process.groups:
        table.add_row(group.kind, *_of_group(group))
    table.add_section()
    table.add_row("all", *_of_group(process.total))
    yield table
    named = [group for group in process.groups if group.named]
    if not named:
        return
    table = _table("Of these, by name")
    table.add_column("kind")
    for heading in ("mappings", "size", "resident"):
        table.add_column(heading, justify="right")
    table.add_column("name", overflow="fold")
    for group in named:
        for one in group.named[:_NAMED]:
            table.add_row(group.kind, str(one.mappings), _size(one.size), _size(one.rss), one.path)
        if len(group.named) > _NAMED:
            rest = group.named[_NAMED:]
            resident = sum(one.rss for one in rest)
            table.add_row(
                *(group.kind, str(sum(one.mappings for one in rest))),
                *(_size(sum(one.size for one in rest)), _size(resident)),
                f"and {len(rest)} others",
            )
    yield table


def _of_group(group: Group) -> tuple[str, ...]:
    numbers = (group.size, group.rss, group.pss, group.swap, group.locked, group.huge)
    return f"{group.mappings:,}", *map(_size, numbers)


def _size(value: int | None) -> str:
    return "unknown" if value is None else sizes(value, sign=False)


def _time(ns: int) -> str:
    return f"{ns / 1e6:,.1f} ms" if ns >= 10**6 else f"{ns / 1000:,.0f} µs"
