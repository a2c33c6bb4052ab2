"""What cgroup, RAM, /dev/shm and the other ranks leave, before memory is mapped. Spec: BUDGET.

Whoever is about to map memory reserves it first. What does not fit is refused before a page is
touched; what was granted is left by everyone on the machine to the one who has it, touched or not.

    with MemoryBudget.current().reserve("mmap", nbytes) as reservation:
        address = ...                           # map it
        reservation.mapped(address, nbytes)     # so that what is touched is counted once

Linux only. `kernel` reads the limits, `ledger` keeps what processes have reserved, `account` is the
arithmetic.
"""

import itertools
import operator
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import ClassVar, NamedTuple, NoReturn, Self, SupportsIndex

from kvspec.errors import ContractError, HostMemoryError
from kvspec.memory_budget.account import (
    LIMITS_OF,
    BudgetReport,
    Limit,
    RankUse,
    Use,
    at_most,
    exactly,
    limit_of,
    promised,
    size,
)
from kvspec.memory_budget.kernel import Kernel, Reading
from kvspec.memory_budget.ledger import (
    KINDS,
    Kind,
    Ledger,
    Rank,
    Totals,
    folder_locked,
    ledgers,
    others,
)

__all__ = [
    "BudgetReport",
    "Kind",
    "Limit",
    "MemoryBudget",
    "MemoryBudgetView",
    "RankUse",
    "Reservation",
]

_LARGEST = (1 << 64) - 1
_numbers = itertools.count(1)
_active: ContextVar["MemoryBudget | None"] = ContextVar("kvspec_memory_budget", default=None)


class MemoryBudgetView(NamedTuple):
    """The abstract state: the reservations of this budget that are alive, in no order."""

    reserved: tuple[tuple[Kind, int, int], ...]
    """Kind, bytes reserved and bytes of it that are mapped, sorted."""


class Reservation:
    """Bytes that nobody else is promised, until it is released, collected or its process ends."""

    def __init__(self, kind: Kind, nbytes: int, label: str, ledger: Ledger, place: int) -> None:
        """`MemoryBudget.reserve` makes them."""
        self.kind, self.nbytes, self.label = kind, nbytes, label
        self._ledger, self._place = ledger, place
        self._end = weakref.finalize(self, ledger.dropped, place)
        self._end.atexit = False  # the ledger's file goes as a whole

    @property
    def released(self) -> bool:
        """Whether it was given back."""
        return not self._end.alive

    def mapped(self, address: int, nbytes: int) -> None:
        """It lies at [address, address + nbytes): what is touched of it is counted once (BUDGET-6).

        Of more than was reserved the beginning counts. Said again, it lies elsewhere. ContractError
        if it was given back (BUDGET-10). O(1); reads nothing, waits for nobody.
        """
        if self.released:
            _refuse(f"mapped({address:#x}, {nbytes}) of a reservation that was released")
        if not 0 <= address <= _LARGEST or nbytes < 0:
            _refuse(f"mapped({address:#x}, {nbytes}): no range of memory")
        self._ledger.mapped(self._place, address, min(nbytes, self.nbytes))

    def release(self) -> None:
        """Give it back, at once; a second time does nothing (BUDGET-9). O(1), waits for nobody."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self.released else "held"
        return f"Reservation({self.kind!r}, {self.nbytes}, {self.label!r}, {state})"


class MemoryBudget:
    """What this process may still map, by what the kernel and the other processes say.

    Budgets of one process share what it has reserved; `limit_bytes` is for what is reserved through
    this one, of every kind (BUDGET-11). `headroom_bytes` are left in RAM and in each cgroup.
    `proc`, `cgroup` and `shm` are where the files of the kernel, the cgroups and the ledgers lie.
    """

    _default: ClassVar["MemoryBudget | None"] = None

    def __init__(
        self,
        *,
        headroom_bytes: int = 0,
        limit_bytes: int | None = None,
        proc: str | os.PathLike[str] = "/proc",
        cgroup: str | os.PathLike[str] = "/sys/fs/cgroup",
        shm: str | os.PathLike[str] = "/dev/shm",
    ) -> None:
        """ContractError if a number of bytes is none (BUDGET-10). Reads nothing."""
        self.headroom_bytes = _bytes("headroom_bytes", headroom_bytes)
        self.limit_bytes = None if limit_bytes is None else _bytes("limit_bytes", limit_bytes)
        self._kernel = Kernel(os.fspath(proc), os.fspath(cgroup), os.fspath(shm))
        self._number = next(_numbers) % (1 << 32)
        self._ledger: Ledger | None = None

    @classmethod
    def current(cls) -> "MemoryBudget":
        """The budget that is active in this context, or else the process's: one for all."""
        active = _active.get()
        if active is None:
            MemoryBudget._default = active = MemoryBudget._default or MemoryBudget()
        return active

    @contextmanager
    def active(self) -> Iterator[Self]:
        """Inside, and in tasks that start there, this is `current`; other threads keep theirs."""
        token = _active.set(self)
        try:
            yield self
        finally:
            _active.reset(token)

    @property
    def files_read(self) -> int:
        """How many files were opened to be read so far, for whoever counts (BUDGET-14)."""
        return self._kernel.files_read

    def reserve(self, kind: Kind, nbytes: SupportsIndex, label: str = "arena") -> Reservation:
        """`nbytes` more, or HostMemoryError if a limit of the kind has them not left (BUDGET-3).

        What fits is granted (BUDGET-4), and on the ledger before another process asks (BUDGET-8).
        Nothing is mapped or touched. ContractError for a kind or number that is none (BUDGET-10).
        Waits while another process asks; the caller must hold no lock on the folder.

        Reads a file for each live process and those of the limits; where it would fit in none but
        for what is touched already, also the mappings of each process, once (BUDGET-14).
        """
        if kind not in KINDS:
            _refuse(f"kind is {kind!r}, none of {', '.join(KINDS)}")
        wanted = _bytes("nbytes", nbytes)
        ledger = self._own_ledger()
        with ledger.held(), self._alone():
            ranks = self._ranks(ledger)
            uses = [at_most(rank.totals) for rank in ranks]
            limits = self._limits(ranks, uses, self._readings())
            short = self._short(limits, kind, wanted)
            if short is not None:
                limits, uses = self._exact(ranks)
                short = self._short(limits, kind, wanted)
            if short is None:
                place = ledger.add(kind, wanted, self._number)
                return self._granted(kind, wanted, label, place)
            report = self._reported(ledger, ranks, uses, limits)
        raise HostMemoryError(
            f"BUDGET-3: {wanted} bytes ({size(wanted)}) of {kind} for {label!r} do not fit:"
            f" {short.name} leaves {short.left} ({size(short.left)}), by {short.source}\n{report}"
        )

    def report(self) -> BudgetReport:
        """Every limit, where it was read, what is used, promised and left (BUDGET-1, BUDGET-2).

        Looks at the mappings of every live process that has reservations: as dear as a refusal.
        """
        ledger = self._own_ledger()
        with ledger.held(), self._alone():
            ranks = self._ranks(ledger)
            limits, uses = self._exact(ranks)
            return self._reported(ledger, ranks, uses, limits)

    def view(self) -> MemoryBudgetView:
        """The abstract state. O(reservations of the process)."""
        ledger = self._own_ledger()
        with ledger.held():
            entries = ledger.rank().entries
        mine = [(e.kind, e.nbytes, e.mapped) for e in entries if e.budget == self._number]
        return MemoryBudgetView(tuple(sorted(mine)))

    def check(self) -> None:
        """ContractError if the books are not the reservations, or what others read is not them.

        O(reservations of the process).
        """
        ledger = self._own_ledger()
        with ledger.held():
            rank, written, alone = ledger.rank(), ledger.written(), ledger.alone
        sums = Totals(*map(sum, zip(Totals(), *map(Totals.of, rank.entries), strict=True)))
        if rank.totals != sums:
            raise ContractError(f"BUDGET-4: {rank.totals} of reservations that make {sums}")
        if written is None and rank.entries and alone is None:
            raise ContractError(f"BUDGET-8: {len(rank.entries)} reservations and no ledger")
        if written is not None and written != rank:
            raise ContractError(f"BUDGET-8: the ledger has {written}, the process {rank}")
        if written is not None and not rank.entries:
            raise ContractError(f"BUDGET-9: a ledger {ledger.name} without a reservation")

    def _own_ledger(self) -> Ledger:
        """Of this process, and not of the one that it was forked from (BUDGET-12)."""
        if self._ledger is not None and not self._ledger.disowned:
            return self._ledger
        key = (self._kernel.proc, self._kernel.shm)
        found = ledgers.get(key)
        if found is None:
            identity, cgroups = self._kernel.identity(), self._kernel.cgroups()
            found = ledgers.setdefault(key, Ledger(self._kernel.shm, *identity, cgroups))
        self._ledger = found
        return found

    def _ranks(self, ledger: Ledger) -> list[Rank]:
        """This process first, then the others that live (BUDGET-5, BUDGET-7)."""
        found = others(self._kernel.shm, ledger.file_name())
        self._kernel.files_read += len(found)
        return [ledger.rank(), *found]

    def _readings(self) -> list[Reading]:
        return self._kernel.readings(self._kernel.cgroups())

    def _exact(self, ranks: Sequence[Rank]) -> tuple[list[Limit], list[Use]]:
        """What is left, with what is touched counted once (BUDGET-6).

        A limit is read before and after the mappings, and the lesser counts: what is touched or
        given back between would be seen on one side alone.
        """
        before = self._readings()
        uses = [self._use(rank) for rank in ranks]
        after = self._readings()
        early, late = self._limits(ranks, uses, before), self._limits(ranks, uses, after)
        if len(early) != len(late):  # it was moved to another cgroup
            return late, uses
        return [min(pair, key=_left) for pair in zip(late, early, strict=True)], uses

    def _use(self, rank: Rank) -> Use:
        """By its mappings; if it is not seen from here or not ours to see, as if untouched."""
        if not any(entry.mapped for entry in rank.entries):
            return at_most(rank.totals)
        if not rank.own and not self._kernel.is_same(rank.pid, rank.start):
            return at_most(rank.totals)
        areas = self._kernel.areas("self" if rank.own else str(rank.pid))
        return at_most(rank.totals) if areas is None else exactly(rank, areas)

    def _limits(
        self, ranks: Sequence[Rank], uses: Sequence[Use], readings: Sequence[Reading]
    ) -> list[Limit]:
        pairs = list(zip(ranks, uses, strict=True))
        found = [limit_of(r, promised(r, pairs), self.headroom_bytes) for r in readings]
        if self.limit_bytes is None:
            return [*found, Limit("user", "limit_bytes", None, None, 0, None)]
        used = self._own_ledger().held_by(self._number)
        left = max(0, self.limit_bytes - used)
        return [*found, Limit("user", "limit_bytes", self.limit_bytes, used, 0, left)]

    def _short(self, limits: Sequence[Limit], kind: Kind, nbytes: int) -> Limit | None:
        """Of the limits that hold for a kind the one that leaves least, if that is too little."""
        tight = [each for each in limits if each.name in LIMITS_OF[kind] and each.left is not None]
        least = min(tight, key=_left, default=None)
        return least if least is not None and nbytes > _left(least) else None

    def _alone(self) -> AbstractContextManager[None]:
        """The only one on the machine that asks (BUDGET-8)."""
        return folder_locked(self._kernel.shm)

    def _granted(self, kind: Kind, nbytes: int, label: str, place: int) -> Reservation:
        return Reservation(kind, nbytes, label, self._own_ledger(), place)

    def _reported(
        self, ledger: Ledger, ranks: Sequence[Rank], uses: Sequence[Use], limits: Sequence[Limit]
    ) -> BudgetReport:
        told = [
            RankUse(rank.pid, rank.own, use.reserved, use.reserved - use.untouched)
            for rank, use in zip(ranks, uses, strict=True)
        ]
        left: dict[Kind, int | None] = {}
        for kind in KINDS:
            given = [each.left for each in limits if each.name in LIMITS_OF[kind]]
            left[kind] = min((number for number in given if number is not None), default=None)
        return BudgetReport(tuple(limits), tuple(told), left, self.headroom_bytes, ledger.alone)


def _left(limit: Limit) -> int:
    return _LARGEST if limit.left is None else limit.left


def _bytes(name: str, value: SupportsIndex) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        _refuse(f"{name} is {value!r}, not a number of bytes")
    if not 0 <= number <= _LARGEST:
        _refuse(f"{name} is {number}: a number of bytes is from 0 to {_LARGEST}")
    return number


def _refuse(what: str) -> NoReturn:
    raise ContractError(f"BUDGET-10: {what}")
