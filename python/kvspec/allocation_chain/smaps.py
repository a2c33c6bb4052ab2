"""/proc/PID/maps and smaps: what they say, by kind of mapping. Spec: CHAIN-5, CHAIN-7, CHAIN-12."""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import msgspec

__all__ = ["KINDS", "Change", "Kind", "Mapping", "changes", "holding", "read_maps", "read_smaps"]

Kind: TypeAlias = Literal[
    "heap", "anonymous", "shared memory", "hugetlb", "file", "device", "stack", "kernel"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_LINE = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<perms>\S{4}) (?P<offset>[0-9a-f]+) "
    r"(?P<device>\S+) (?P<inode>\d+) *(?P<path>.*)"
)
_FIELD = re.compile(r"(?P<name>\w+): +(?P<kib>\d+) kB")


class Mapping(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One mapping. Sizes are bytes; None is what was not read (maps has no sizes but `size`)."""

    start: int
    end: int
    permissions: str
    """As the kernel prints them: rwx, then p for private or s for shared."""
    path: str
    kind: Kind
    size: int
    rss: int | None = None
    """What of it has physical pages that this process has mapped; the zero page does not count."""
    pss: int | None = None
    """Each page divided by how many processes map it."""
    swap: int | None = None
    locked: int | None = None
    anonymous_huge: int | None = None
    shared_huge: int | None = None
    kernel_page: int | None = None
    """Size of its pages as the kernel manages them: larger than 4096 for hugetlb alone."""
    flags: tuple[str, ...] | None = None
    """VmFlags: `lo` is locked, `hg` advised huge, `ht` hugetlb, `sh` shared."""


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A range of addresses that came or went between two looks at maps."""

    change: Literal["appeared", "vanished"]
    start: int
    end: int
    size: int
    permissions: str
    path: str
    kind: Kind


def read_maps(text: str) -> list[Mapping]:
    """The lines of maps."""
    return [_mapping(found) for line in text.splitlines() if (found := _LINE.fullmatch(line))]


def read_smaps(text: str) -> list[Mapping]:
    """The blocks of smaps."""
    mappings: list[Mapping] = []
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        head, _, rest = block.partition("\n")
        found = _LINE.fullmatch(head)
        if found is None:
            continue
        kib = {match["name"]: 1024 * int(match["kib"]) for match in _FIELD.finditer(rest)}
        flags = re.search(r"^VmFlags: (.*)$", rest, re.M)
        mappings.append(_mapping(found, kib, tuple(flags[1].split()) if flags else None))
    return mappings


def _mapping(
    found: re.Match[str],
    kib: dict[str, int] | None = None,
    flags: tuple[str, ...] | None = None,
) -> Mapping:
    start, end = int(found["start"], 16), int(found["end"], 16)
    sizes = kib or {}
    huge_page = sizes.get("KernelPageSize", 0) > 64 * 1024
    rss = sizes.get("Rss")
    if huge_page and rss is not None:  # hugetlb pages are counted in fields of their own
        rss += sizes.get("Private_Hugetlb", 0) + sizes.get("Shared_Hugetlb", 0)
    return Mapping(
        start=start,
        end=end,
        permissions=found["perms"],
        path=found["path"],
        kind=_kind(found["path"], found["perms"], huge_page or "ht" in (flags or ())),
        size=end - start,
        rss=rss,
        pss=sizes.get("Pss"),
        swap=sizes.get("Swap"),
        locked=sizes.get("Locked"),
        anonymous_huge=sizes.get("AnonHugePages"),
        shared_huge=sizes.get("ShmemPmdMapped"),
        kernel_page=sizes.get("KernelPageSize"),
        flags=flags,
    )


def _kind(path: str, permissions: str, huge: bool) -> Kind:
    """What kind of memory a mapping is, by what the kernel calls it."""
    name = path.removesuffix(" (deleted)")
    kind: Kind = "file"
    if huge or name.startswith(("/anon_hugepage", "/dev/hugepages/")):
        kind = "hugetlb"
    elif name == "[heap]":
        kind = "heap"
    elif name.startswith("[stack"):
        kind = "stack"
    elif name.startswith("[v") or name == "[uprobes]":
        kind = "kernel"
    elif name.startswith(("/dev/shm/", "/memfd:", "/SYSV", "/dev/zero", "[anon_shmem:")):
        kind = "shared memory"
    elif name.startswith(("/dev/", "anon_inode:")):
        kind = "device"
    elif not name or name.startswith("["):
        kind = "shared memory" if not name and permissions[3] == "s" else "anonymous"
    return kind


def holding(mappings: Sequence[Mapping], address: int) -> Mapping | None:
    """The one that holds an address: none if it is not mapped."""
    return next((each for each in mappings if each.start <= address < each.end), None)


def changes(before: Sequence[Mapping], after: Sequence[Mapping]) -> list[Change]:
    """Ranges that came and went. The kernel merges neighbours, so lines cannot be compared."""
    found = [
        *(("appeared", part) for part in _less(after, before)),
        *(("vanished", part) for part in _less(before, after)),
    ]
    return [
        Change(
            "appeared" if word == "appeared" else "vanished",
            *(start, end, end - start),
            *(of.permissions, of.path, of.kind),
        )
        for word, (start, end, of) in sorted(found, key=lambda each: each[1][0])
    ]


def _less(these: Sequence[Mapping], those: Sequence[Mapping]) -> Iterator[tuple[int, int, Mapping]]:
    """The parts of these that no one of those with the same permissions and path covers."""
    for mapping in these:
        at = mapping.start
        for other in those:
            if (other.permissions, other.path) != (mapping.permissions, mapping.path):
                continue
            if other.end <= at or other.start >= mapping.end:
                continue
            if other.start > at:
                yield at, other.start, mapping
            at = max(at, other.end)
        if at < mapping.end:
            yield at, mapping.end, mapping
