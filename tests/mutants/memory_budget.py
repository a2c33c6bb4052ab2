"""Broken budgets. Each must fail on the clause it breaks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvspec.oracle
from kvspec.conformance.memory_budget import MemoryBudgetConformance
from kvspec.conformance.mutants import Registry
from kvspec.errors import HostMemoryError
from kvspec.memory_budget import BudgetReport, Limit, MemoryBudget, Reservation
from kvspec.memory_budget.account import Use, at_most, exactly
from kvspec.memory_budget.kernel import Cgroups, Kernel, Reading
from kvspec.memory_budget.ledger import KINDS, PREFIX, Kind, Ledger, Rank, parsed

registry = Registry(MemoryBudgetConformance, kvspec.oracle)


def _with(kernel: type[Kernel], budget: MemoryBudget) -> None:
    """Let a budget read through another class."""
    was = budget._kernel
    budget._kernel = kernel(was.proc, was.cgroup, was.shm)


class _OwnCgroupAlone(Kernel):
    def cgroups(self) -> Cgroups:
        found = super().cgroups()
        return found._replace(folders=found.folders[:1], numbers=found.numbers[:1])


class _NoCgroup(Kernel):
    def readings(self, cgroups: Cgroups) -> list[Reading]:
        return [
            each._replace(limit=None, used=None) if each.name == "cgroup" else each
            for each in super().readings(cgroups)
        ]


class _CacheIsUsed(Kernel):
    def _firm(self, used: int | None, stat: dict[str, int], prefix: str) -> int | None:
        return used


class _SharedMemoryIsCache(Kernel):
    def _firm(self, used: int | None, stat: dict[str, int], prefix: str) -> int | None:
        return None if used is None else max(0, used - stat.get(f"{prefix}file", 0))


class _CapabilitiesAnywhere(Kernel):
    def _in_initial_namespace(self) -> bool:
        return True


@registry.mutant("BUDGET-1", "BUDGET-2", "BUDGET-3", "BUDGET-5", "BUDGET-6", "BUDGET-15",
                 reports=("SG-20136",))  # fmt: skip
class SeesTheHostAlone(MemoryBudget):
    """As what asks for the machine's free memory inside a container."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _with(_NoCgroup, self)


@registry.mutant("BUDGET-1", "BUDGET-3")
class SeesItsOwnCgroupAlone(MemoryBudget):
    """The limit stands at the pod, and the container's own says max."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _with(_OwnCgroupAlone, self)


@registry.mutant("BUDGET-1")
class BelievesCapabilitiesOfANamespace(MemoryBudget):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _with(_CapabilitiesAnywhere, self)


@registry.mutant("BUDGET-2", reports=("IMP-2070",))
class CountsThePageCacheAsUsed(MemoryBudget):
    """With a checkpoint of 70 GiB mapped nothing is left of a container's memory."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _with(_CacheIsUsed, self)


@registry.mutant("BUDGET-2")
class TakesSharedMemoryForPageCache(MemoryBudget):
    """Which the kernel cannot drop: it kills."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        _with(_SharedMemoryIsCache, self)


@registry.mutant("BUDGET-3", "BUDGET-11", "BUDGET-13", reports=("SG-20136",))
class GrantsWhatDoesNotFit(MemoryBudget):
    """It finds out when a page is touched, and is killed."""

    def _short(self, limits: Sequence[Limit], kind: Kind, nbytes: int) -> Limit | None:
        del limits, kind, nbytes
        return None


@registry.mutant("BUDGET-3", "BUDGET-9", "BUDGET-11", "BUDGET-13")
class RecordsBeforeItChecks(MemoryBudget):
    """What was refused stays on the books."""

    def reserve(self, kind: Kind, nbytes: Any, label: str = "arena") -> Reservation:
        try:
            return super().reserve(kind, nbytes, label)
        except HostMemoryError:
            ledger = self._own_ledger()
            with ledger.held():
                ledger.add(kind, int(nbytes), self._number)
            raise


@registry.mutant("BUDGET-4", "BUDGET-3", "BUDGET-9", "BUDGET-11")
class KeepsAByteBack(MemoryBudget):
    def _short(self, limits: Sequence[Limit], kind: Kind, nbytes: int) -> Limit | None:
        return super()._short(limits, kind, nbytes + 1)


@registry.mutant("BUDGET-5", "BUDGET-7", "BUDGET-8", "BUDGET-6", "BUDGET-12", "BUDGET-14",
                 "BUDGET-15", reports=("SG-20136", "SG-38156"))  # fmt: skip
class SumsItsOwnRankAlone(MemoryBudget):
    """Each of eight workers finds the memory free that all of them are about to touch."""

    def _ranks(self, ledger: Ledger) -> list[Rank]:
        return super()._ranks(ledger)[:1]


@registry.mutant("BUDGET-5", "BUDGET-3", "BUDGET-4", "BUDGET-13")
class ForgetsWhatItReservedItself(MemoryBudget):
    """Until it is touched."""

    def _limits(
        self, ranks: Sequence[Rank], uses: Sequence[Use], readings: Sequence[Reading]
    ) -> list[Limit]:
        return super()._limits(ranks, [Use(0, 0, 0, 0, 0), *uses[1:]], readings)


@registry.mutant("BUDGET-6", "BUDGET-5", reports=("SG-38156",))
class SubtractsWhatIsTouchedTwice(MemoryBudget):
    """A rank that starts late finds neither the memory nor what its peers have reserved of it."""

    def _use(self, rank: Rank) -> Use:
        return at_most(rank.totals)


@registry.mutant("BUDGET-6", "BUDGET-5")
class TakesANeighboursPagesForItsOwn(MemoryBudget):
    def _use(self, rank: Rank) -> Use:
        areas = self._kernel.areas("self" if rank.own else str(rank.pid)) or []
        use = exactly(rank, areas)
        inside = [a for a in areas if any(a.begin <= e.address < a.end for e in rank.entries)]
        touched = sum(area.resident for area in inside if not area.file)
        return use._replace(untouched=max(0, min(use.untouched, use.reserved - touched)))


@registry.mutant("BUDGET-6")
class AddsUpAFileForEachOfItsMappings(MemoryBudget):
    def _use(self, rank: Rank) -> Use:
        areas = self._kernel.areas("self" if rank.own else str(rank.pid)) or []
        pieces = [area._replace(file=number + 1) if area.file else area
                  for number, area in enumerate(areas)]  # fmt: skip
        return exactly(rank, pieces)


@registry.mutant("BUDGET-7", "BUDGET-12")
class CountsTheDead(MemoryBudget):
    """A killed rank keeps its share for ever."""

    def _ranks(self, ledger: Ledger) -> list[Rank]:
        folder = Path(self._kernel.shm)
        found = sorted(folder.glob(f"{PREFIX}*")) if folder.exists() else []
        images = (path.read_bytes() for path in found if path.name != ledger.file_name())
        others = [rank for image in images if (rank := parsed(image)) is not None]
        return [ledger.rank(), *others]


@registry.mutant("BUDGET-8", reports=("SG-38156",))
class AsksWithoutTheLock(MemoryBudget):
    """Two ranks look at the same gauge, and both find what fits once."""

    @contextmanager
    def _alone(self) -> Iterator[None]:
        yield


class _ReleasedEachTime(Reservation):
    def release(self) -> None:
        self._ledger.dropped(self._place)


@registry.mutant("BUDGET-9", "BUDGET-3", "BUDGET-4", "BUDGET-10", "BUDGET-12")
class ReleasesASecondTime(MemoryBudget):
    """What somebody else has in its place since is gone."""

    def _granted(self, kind: Kind, nbytes: int, label: str, place: int) -> Reservation:
        return _ReleasedEachTime(kind, nbytes, label, self._own_ledger(), place)


@registry.mutant("BUDGET-9")
class KeepsWhatIsCollected(MemoryBudget):
    """An arena that is dropped without being closed is charged until the process ends."""

    def _granted(self, kind: Kind, nbytes: int, label: str, place: int) -> Reservation:
        made = super()._granted(kind, nbytes, label, place)
        self._kept = [*getattr(self, "_kept", []), made]
        return made


@registry.mutant("BUDGET-10")
class TakesWhatIsNoKind(MemoryBudget):
    def reserve(self, kind: Kind, nbytes: Any, label: str = "arena") -> Reservation:
        return super().reserve(kind if kind in KINDS else "heap", nbytes, label)


@registry.mutant("BUDGET-10")
class RoundsANumberOfBytes(MemoryBudget):
    def reserve(self, kind: Kind, nbytes: Any, label: str = "arena") -> Reservation:
        return super().reserve(kind, max(0, int(nbytes)), label)


@registry.mutant("BUDGET-11", "BUDGET-3", reports=("SG-30581",))
class LimitsEachPoolForItself(MemoryBudget):
    """What comes with the pool that was asked for is outside of what the user allows."""

    def _limits(
        self, ranks: Sequence[Rank], uses: Sequence[Use], readings: Sequence[Reading]
    ) -> list[Limit]:
        *found, user = super()._limits(ranks, uses, readings)
        return [*found, user._replace(left=self.limit_bytes)]


@registry.mutant("BUDGET-11")
class ChargesABudgetForTheOthers(MemoryBudget):
    def _limits(
        self, ranks: Sequence[Rank], uses: Sequence[Use], readings: Sequence[Reading]
    ) -> list[Limit]:
        *found, user = super()._limits(ranks, uses, readings)
        if self.limit_bytes is None:
            return [*found, user]
        return [*found, user._replace(left=max(0, self.limit_bytes - ranks[0].totals.reserved))]


@registry.mutant("BUDGET-12")
class KeepsItsParentsBooks(MemoryBudget):
    """The memory of a forked process is its parent's until it writes to it."""

    def _own_ledger(self) -> Ledger:
        return super()._own_ledger() if self._ledger is None else self._ledger


@registry.mutant("BUDGET-13")
class SaysNotThatItIsAlone(MemoryBudget):
    def _reported(
        self, ledger: Ledger, ranks: Sequence[Rank], uses: Sequence[Use], limits: Sequence[Limit]
    ) -> BudgetReport:
        return super()._reported(ledger, ranks, uses, limits)._replace(alone=None)
