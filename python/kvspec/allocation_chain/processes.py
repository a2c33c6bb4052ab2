"""The memory of a running process, by kind of mapping. Spec: CHAIN-12, CHAIN-13."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from kvspec.allocation_chain.smaps import KINDS, Kind, Mapping, read_smaps
from kvspec.errors import ContractError

__all__ = ["Group", "Named", "ProcessMemory", "by_kind", "process_memory"]


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The mappings of one file, segment or device."""

    path: str
    mappings: int
    size: int
    rss: int
    pss: int


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The mappings of one kind. Bytes."""

    kind: Kind
    mappings: int
    size: int
    rss: int
    pss: int
    swap: int
    locked: int
    huge: int
    """Transparent huge pages, private and shared, and pages of hugetlb."""
    named: tuple[Named, ...]
    """By what is resident, the most first; none for what has no name."""


class ProcessMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process, as /proc says. Bytes; None is what was not there to be read."""

    pid: int
    command: str | None
    virtual: int | None
    resident: int | None
    locked: int | None
    pinned: int | None
    """VmPin: what drivers hold in place, as CUDA does; not in Locked of any mapping."""
    groups: tuple[Group, ...]
    total: Group
    """`kind` says nothing in it."""


def process_memory(pid: int, *, proc: str | Path = "/proc") -> ProcessMemory:
    """Read /proc/PID/smaps. ContractError if there is no such process, it may not be read, or it
    ended meanwhile (CHAIN-13). Costs the kernel a walk over the page tables of the process.
    """
    folder = Path(proc) / str(pid)
    try:
        smaps = (folder / "smaps").read_text("utf-8", "replace")
        status = (folder / "status").read_text("utf-8", "replace")
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ContractError(f"CHAIN-13: there is no process {pid}") from None
    except PermissionError:
        raise ContractError(
            f"CHAIN-13: process {pid} may not be read: it is another user's"
        ) from None
    mappings = read_smaps(smaps)
    if not mappings:
        raise ContractError(
            f"CHAIN-13: process {pid} has no memory: it has ended or is the kernel's"
        )
    fields = {
        name: 1024 * int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in status.splitlines())
        if name in ("VmSize", "VmRSS", "VmLck", "VmPin")
    }
    return ProcessMemory(
        pid=pid,
        command=command.strip() or None,
        virtual=fields.get("VmSize"),
        resident=fields.get("VmRSS"),
        locked=fields.get("VmLck"),
        pinned=fields.get("VmPin"),
        groups=by_kind(mappings),
        total=_group("anonymous", mappings, named=False),
    )


def by_kind(mappings: Iterable[Mapping]) -> tuple[Group, ...]:
    """One group for each kind that there is; each mapping is in one (CHAIN-12)."""
    found: dict[Kind, list[Mapping]] = {}
    for mapping in mappings:
        found.setdefault(mapping.kind, []).append(mapping)
    return tuple(_group(kind, found[kind]) for kind in KINDS if kind in found)


def _group(kind: Kind, mappings: list[Mapping], *, named: bool = True) -> Group:
    names: dict[str, list[Mapping]] = {}
    for mapping in (
        mappings if named and kind not in ("anonymous", "heap", "stack", "kernel") else ()
    ):
        names.setdefault(mapping.path or "unnamed", []).append(mapping)
    each = [
        Named(
            path=path,
            mappings=len(those),
            size=sum(mapping.size for mapping in those),
            rss=sum(mapping.rss or 0 for mapping in those),
            pss=sum(mapping.pss or 0 for mapping in those),
        )
        for path, those in names.items()
    ]
    return Group(
        kind=kind,
        mappings=len(mappings),
        size=sum(mapping.size for mapping in mappings),
        rss=sum(mapping.rss or 0 for mapping in mappings),
        pss=sum(mapping.pss or 0 for mapping in mappings),
        swap=sum(mapping.swap or 0 for mapping in mappings),
        locked=sum(mapping.locked or 0 for mapping in mappings),
        huge=sum(_huge(mapping) for mapping in mappings),
        named=tuple(sorted(each, key=lambda one: (-one.rss, one.path))),
    )


def _huge(mapping: Mapping) -> int:
    if mapping.kind == "hugetlb":
        return mapping.rss or 0
    return (mapping.anonymous_huge or 0) + (mapping.shared_huge or 0)
