"""Broken ledgers: each is deaf to one kind of fault, or believes something else."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import kvspec.oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.ownership_ledger import OwnershipLedgerConformance
from kvspec.errors import ContractError
from kvspec.interfaces.ownership_ledger import Fault, FaultKind, Owner, Step
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle import OwnershipLedger

registry = Registry(OwnershipLedgerConformance, kvspec.oracle)


class Deaf(OwnershipLedger, ABC):
    """Does not hear of some faults. What happened is entered."""

    @abstractmethod
    def _hears(self, fault: Fault) -> bool:
        """Whether it hears of one."""

    def _fault(
        self, kind: FaultKind, pool: str, page: int, owner: Owner, other: Owner, row: int = -1
    ) -> None:
        super()._fault(kind, pool, page, owner, other, row)
        if not self._hears(self._faults[-1]):
            self._faults.pop()


@registry.mutant("LEDGER-1", reports=("KVAI-44", "INV-006"))
class CountsACopyTwice(OwnershipLedger):
    """A page with a copy in flight counts as the copy's and as its holder's."""

    def counts(self, pool: str) -> dict[str, int]:
        counted = super().counts(pool)
        for there, page in self._flights:
            counted[self._holders[there][page].kind] += there == pool
        return counted


@registry.mutant("LEDGER-1")
class LosesAPendingPage(OwnershipLedger):
    """The sums are those of a pool outside any group."""

    def counts(self, pool: str) -> dict[str, int]:
        return super().counts(pool) | {"pending": 0}


@registry.mutant("LEDGER-2", "LEDGER-9", "LEDGER-12", reports=("SG-28754", "MINI-142", "INV-004"))
class IsDeafToWhatIsHandedOutTwice(Deaf):
    def _hears(self, fault: Fault) -> bool:
        return fault.pool == "rows" or (fault.kind, fault.other.kind) != ("alias", "reserved")


@registry.mutant("LEDGER-2", "LEDGER-6")
class IsDeafToTheRowThatNamesWhatIsHandedOut(Deaf):
    """A page that was given back by hand, and goes to another while the row still names it."""

    def _hears(self, fault: Fault) -> bool:
        return (
            fault.pool == "rows" or fault.kind != "dangling row" or fault.other.kind != "reserved"
        )


@registry.mutant("LEDGER-3", "LEDGER-12", "LEDGER-14", reports=("VL-3347", "SE-11", "SG-38269"))
class IsDeafToASecondFree(Deaf):
    def _hears(self, fault: Fault) -> bool:
        return fault.pool == "rows" or fault.kind != "double free" or fault.owner.kind == "pending"


@registry.mutant("LEDGER-3", reports=("SE-20", "INV-016"))
class IsDeafInAGroup(Deaf):
    """Two frees of one group name the same page."""

    def _hears(self, fault: Fault) -> bool:
        return fault.kind != "double free" or fault.owner.kind != "pending"


@registry.mutant("LEDGER-3", "LEDGER-2", "LEDGER-1", "LEDGER-4", "LEDGER-5", "LEDGER-8")
class HasOneGroupForAllPools(OwnershipLedger):
    def give(self, pool: str, slots: Slots) -> None:
        closed = {} if pool in self._pending or not self._pending else {pool: list[int]()}
        self._pending |= closed
        super().give(pool, slots)
        for group in closed:
            del self._pending[group]


@registry.mutant("LEDGER-4", "LEDGER-12", reports=("MINI-142", "INV-004"))
class IsDeafToTwoRequestsWithOnePage(Deaf):
    def _hears(self, fault: Fault) -> bool:
        return (fault.kind, fault.other.kind) != ("alias", "request")


@registry.mutant("LEDGER-4", "LEDGER-12", reports=("VL-42273",))
class IsDeafToAFreePageInARow(Deaf):
    def _hears(self, fault: Fault) -> bool:
        return fault.owner.kind != "free" or fault.other.kind != "request"


@registry.mutant("LEDGER-4", "LEDGER-5", "LEDGER-6", "LEDGER-9", "LEDGER-12")
class GivesTheRequestWhatItMatched(OwnershipLedger):
    """A page of the tree belongs to the third request that names it."""

    def _sound_of(self, row: int, page: int) -> bool:
        sound = super()._sound_of(row, page)
        readers = len(self._namers.get(page, ()))
        if sound and readers > 1 and self._holders[self._pool][page].kind == "tree":
            self._hold(page, Owner("request", row))
        return sound


@registry.mutant("LEDGER-5", "LEDGER-13", reports=("SG-22862",))
class AdoptsTheTail(OwnershipLedger):
    """The page that is not whole is believed to be the tree's, and never missed."""

    def adopt(self, row: int, stop: int) -> None:
        super().adopt(row, -(-stop // self._page_size) * self._page_size if stop > 0 else stop)


@registry.mutant("LEDGER-5", "LEDGER-9", "LEDGER-12")
class IsDeafToWhatTheTreeTakes(Deaf):
    def _hears(self, fault: Fault) -> bool:
        return fault.other.kind != "tree"


@registry.mutant("LEDGER-6", reports=("SE-01", "INV-038"))
class SeesOnePageInAStretch(OwnershipLedger):
    """A row that was put right in the second half of a stretch is believed to be right."""

    def _naming(self, page: int) -> list[int]:
        return [row for row in super()._naming(page) if page in self.row_pages(row)]


@registry.mutant("LEDGER-6", "LEDGER-2")
class LooksForDanglingRowsAlways(OwnershipLedger):
    """By hand too, where the row goes next."""

    def end(self, by_hand: bool = False) -> list[Fault]:
        return super().end(by_hand and bool(self._orphans))


@registry.mutant("LEDGER-7", reports=("INV-084",))
class ForgetsDuplicates(OwnershipLedger):
    """Only what the row names at its end can leak."""

    def end(self, by_hand: bool = False) -> list[Fault]:
        named = {page for names in self._left.values() for page in names.values()}
        return [f for f in super().end(by_hand) if f.kind != "leak" or f.page in named]


@registry.mutant("LEDGER-7", "LEDGER-6")
class LeaksWhatAnotherCallGivesBack(OwnershipLedger):
    """Every request that is retracted or aborted, row first."""

    def end(self, by_hand: bool = False) -> list[Fault]:
        return super().end(by_hand and not self._orphans)


@registry.mutant("LEDGER-8", "LEDGER-3", reports=("SE-20",))
class LeavesPendingWhatAGroupHeld(OwnershipLedger):
    def close_group(self, pool: str) -> None:
        for page in self._pending.get(pool, []):
            self._pending[pool] = []
            self._move(pool, page, Owner("reserved"))
        super().close_group(pool)


@registry.mutant("LEDGER-8")
class ClearLeavesTheGroupOpen(OwnershipLedger):
    def clear(self, pool: str) -> None:
        group = pool in self._pending
        super().clear(pool)
        if group:
            self._pending[pool] = []


@registry.mutant("LEDGER-8", "LEDGER-2", "LEDGER-6")
class ClearsRowsThatGoOnNaming(OwnershipLedger):
    def clear_rows(self) -> None:
        rows = {row: dict(names) for row, names in self._rows.items()}
        super().clear_rows()
        for row, names in rows.items():
            if names:
                self.take_rows([row])
                self._rows[row] = names
                for page in names.values():
                    self._namers[page][row] += 1


@registry.mutant("LEDGER-9", "LEDGER-12")
class GivesTheCopysPagesToNobody(OwnershipLedger):
    """Its former owner is forgotten."""

    def copy_end(self, copy: int) -> None:
        pages = self._copies.get(copy, ("", []))[1]
        super().copy_end(copy)
        for page in pages:
            if self.owner(self._pool, page).kind == "tree":
                self._move(self._pool, page, Owner("reserved"))


@registry.mutant("LEDGER-9", "LEDGER-6", "LEDGER-5")
class IsDeafToACopyInFlight(Deaf):
    def _hears(self, fault: Fault) -> bool:
        return fault.owner.kind != "copy"


@registry.mutant("LEDGER-10", reports=("INV-001", "SG-38269"))
class IsDeafToTheSink(Deaf):
    def _hears(self, fault: Fault) -> bool:
        return fault.kind != "sentinel" or fault.page != 0


@registry.mutant("LEDGER-10", "LEDGER-11")
class TakesWhatIsBeyondForTheLast(OwnershipLedger):
    def _exists(self, pool: str, page: int) -> bool:
        return super()._exists(pool, page) or super()._exists(pool, page - 1 if page == 9 else page)

    def _sound(self, pool: str, page: int, row: int = -1) -> bool:
        return super()._sound(pool, page, row) and OwnershipLedger._exists(self, pool, page)


@registry.mutant("LEDGER-11", "LEDGER-12", reports=("VL-42273",))
class IsDeafToRows(Deaf):
    def _hears(self, fault: Fault) -> bool:
        return fault.pool != "rows" or fault.kind == "sentinel"


@registry.mutant("LEDGER-12", "LEDGER-2", "LEDGER-5", "LEDGER-9")
class BelievesWhatShouldHaveBeen(OwnershipLedger):
    """A page that is handed out while somebody has it stays theirs."""

    def take(self, pool: str, slots: Slots) -> None:
        before = list(self._holders.get(pool, ()))
        super().take(pool, slots)
        for page, holder in enumerate(before):
            if holder.kind == "request" and self._holders[pool][page] != holder:
                self._move(pool, page, holder)


@registry.mutant("LEDGER-12", "LEDGER-6", "LEDGER-2")
class ReportsWhatItReported(OwnershipLedger):
    """The row is dangling at the end of the action, and again when the page is handed out."""

    def end(self, by_hand: bool = False) -> list[Fault]:
        faults = super().end(by_hand)
        self._told.clear()
        return faults


@registry.mutant("LEDGER-13")
class MixesUpPools(OwnershipLedger):
    def history(self, pool: str, page: int) -> list[Step]:
        steps = super().history(pool, page)
        others = [step for _, which, step in reversed(self._steps) if which == page]
        return steps or (others if self._exists(pool, page) else [])


@registry.mutant("LEDGER-13")
class TellsTheOldestFirst(OwnershipLedger):
    def history(self, pool: str, page: int) -> list[Step]:
        return super().history(pool, page)[::-1]


@registry.mutant("LEDGER-14")
class StartsAgain(OwnershipLedger):
    """An action inside an action, which loses what the outer one found."""

    def begin(self, action: int) -> None:
        self._action = None
        super().begin(action)


@registry.mutant("LEDGER-14")
class HearsOutsideAnAction(OwnershipLedger):
    def take_rows(self, rows: Sequence[int]) -> None:
        inside = self._action is not None
        if not inside:
            self.begin(-1)
        super().take_rows(rows)
        if not inside:
            self.end()


@registry.mutant("LEDGER-14")
class ForgetsWhatItRefused(OwnershipLedger):
    """A refused effect has cost something already."""

    def copy_end(self, copy: int) -> None:
        try:
            super().copy_end(copy)
        except ContractError:
            self._slots_seen += 1
            raise


@registry.mutant("LEDGER-15")
class LooksAtEverything(OwnershipLedger):
    def end(self, by_hand: bool = False) -> list[Fault]:
        faults = super().end(by_hand)
        self._rows_looked_at += len(self._held)
        return faults
