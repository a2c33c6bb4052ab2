"""What is left of a limit when each live process has what it reserved (BUDGET-5, BUDGET-6)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from kvspec.memory_budget.kernel import Area, LimitName, Reading
from kvspec.memory_budget.ledger import KINDS, Entry, Kind, Rank, Totals

__all__ = [
    "LIMITS_OF",
    "BudgetReport",
    "Limit",
    "RankUse",
    "Use",
    "at_most",
    "exactly",
    "limit_of",
    "promised",
    "size",
]

_EVERY: tuple[LimitName, ...] = ("ram", "commit", "cgroup", "user")
LIMITS_OF: Mapping[Kind, tuple[LimitName, ...]] = {
    **dict.fromkeys(KINDS, _EVERY),
    "shm": (*_EVERY, "shm"),
    "pinned": (*_EVERY, "memlock"),
}
"""The limits that a reservation of a kind has to fit in, all of them."""


class Use(NamedTuple):
    """Bytes that a process has reserved and that the kernel does not count as used yet."""

    reserved: int
    untouched: int
    """Without physical pages."""
    untouched_shm: int
    """The same of kind shm alone."""
    unlocked: int
    """Of kind pinned, and not locked."""
    uncommitted: int
    """Not mapped; of kind shm, which is committed page by page, untouched."""


class Limit(NamedTuple):
    """A limit, all in bytes."""

    name: LimitName
    source: str
    """The file that it was read from."""
    limit: int | None
    """None where there is none."""
    used: int | None
    """By whomever, without what the kernel gives back for the asking."""
    promised: int
    """Reserved by live processes and not in `used` yet."""
    left: int | None
    """limit - used - promised - headroom, 0 at least; None where there is no limit."""


class RankUse(NamedTuple):
    """A live process, in bytes."""

    pid: int
    own: bool
    reserved: int
    resident: int
    """Of that, what has physical pages; 0 where the process does not let us see."""


class BudgetReport(NamedTuple):
    """What there is. As text it is a table, and stands in what a refusal says."""

    limits: tuple[Limit, ...]
    ranks: tuple[RankUse, ...]
    left: Mapping[Kind, int | None]
    """For each kind the least that a limit leaves; None where nothing limits it."""
    headroom: int
    """Bytes that are left to others in RAM and in each cgroup."""
    alone: str | None
    """Why other processes cannot see what this one reserves; None if they can."""

    def __str__(self) -> str:
        rows = [["limit", "of", "used", "promised", "left", "read from"]]
        for each in self.limits:
            numbers = (each.limit, each.used, each.promised, each.left)
            rows.append([each.name, *map(size, numbers), each.source])
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:5], widths[1:]), row[5]])
            for row in rows
        ]
        lines += [
            f"process {rank.pid}{' (this one)' if rank.own else ''}: {size(rank.reserved)}"
            f" reserved, {size(rank.resident)} of it resident"
            for rank in self.ranks
        ]
        if self.headroom:
            lines.append(f"{size(self.headroom)} are left to others in ram and in each cgroup")
        if self.alone is not None:
            lines.append(f"other processes do not see this one's reservations: {self.alone}")
        return "\n".join(lines)


def at_most(totals: Totals) -> Use:
    """As if nothing of it had been touched, which costs no look at its memory."""
    reserved, shm, pinned, uncommitted = totals
    return Use(reserved, reserved, shm, pinned, uncommitted)


def exactly(rank: Rank, areas: Iterable[Area]) -> Use:
    """By its mappings. O((reservations + mappings) * log).

    The kernel says of a mapping how much of it is resident, not where, and makes one of neighbours:
    of one that is more than reservations, what may lie in the rest is not taken for theirs.
    """
    resident = locked = 0
    files: dict[int, tuple[int, int]] = {}  # a file -> bytes reserved of it, bytes that it has
    for area, inside in _shared(rank.entries, areas):
        reserved = sum(nbytes for _, nbytes in inside)
        if area.file:
            files[area.file] = (files.get(area.file, (0, 0))[0] + reserved, area.resident)
        else:
            rest = max(0, area.end - area.begin - reserved)
            resident += max(0, area.resident - rest)
        if area.locked:
            locked += sum(nbytes for entry, nbytes in inside if entry.kind == "pinned")
    resident_shm = sum(map(min, files.values()))
    sums = zip(Totals(), *map(Totals.of, rank.entries), strict=True)
    most = at_most(Totals(*map(sum, sums)))
    return Use(
        most.reserved,
        most.untouched - min(most.untouched, resident + resident_shm),
        most.untouched_shm - min(most.untouched_shm, resident_shm),
        most.unlocked - min(most.unlocked, locked),
        most.uncommitted - min(most.uncommitted, resident_shm),
    )


def _shared(
    entries: Iterable[Entry], areas: Iterable[Area]
) -> Iterator[tuple[Area, list[tuple[Entry, int]]]]:
    """Mappings that reservations lie in, with those and how many bytes of each do. By address."""
    mapped = sorted((entry for entry in entries if entry.mapped), key=_address)
    first = 0
    for area in areas:
        while first < len(mapped) and mapped[first].address + mapped[first].mapped <= area.begin:
            first += 1
        inside = []
        for number in range(first, len(mapped)):
            entry = mapped[number]
            if entry.address >= area.end:
                break
            end = min(entry.address + entry.mapped, area.end)
            if (nbytes := end - max(entry.address, area.begin)) > 0:
                inside.append((entry, nbytes))
        if inside:
            yield area, inside


def _address(entry: Entry) -> int:
    return entry.address


def promised(reading: Reading, ranks: Iterable[tuple[Rank, Use]]) -> int:
    """Bytes of a limit that live processes have reserved and that it does not count yet."""
    if reading.name == "memlock":  # each process has its own
        return sum(use.unlocked for rank, use in ranks if rank.own)
    if reading.name == "shm":
        return sum(use.untouched_shm for _, use in ranks)
    if reading.name == "commit":
        return sum(use.uncommitted for _, use in ranks)
    if reading.name == "cgroup":
        return sum(use.untouched for rank, use in ranks if rank.may_be_in(reading.cgroup))
    return sum(use.untouched for _, use in ranks)


def limit_of(reading: Reading, promised: int, headroom: int) -> Limit:
    """With what it leaves."""
    name, source, limit, used, _ = reading
    if limit is None:
        return Limit(name, source, None, used, promised, None)
    kept = headroom if name in ("ram", "cgroup") else 0
    return Limit(name, source, limit, used, promised, max(0, limit - (used or 0) - promised - kept))


def size(nbytes: int | None) -> str:
    """In the unit that suits it."""
    if nbytes is None:
        return "-"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes} B"
