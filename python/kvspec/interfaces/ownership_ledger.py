"""Who has every page, since when, and what could not have been right. Spec: LEDGER."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

from kvspec.interfaces.slot_allocator import Slots

__all__ = [
    "Fault",
    "FaultKind",
    "LedgerView",
    "Owner",
    "OwnerKind",
    "OwnershipLedger",
    "Step",
]

OwnerKind: TypeAlias = Literal["free", "pending", "reserved", "request", "tree", "copy"]
FaultKind: TypeAlias = Literal[
    "leak", "double free", "alias", "use after free", "dangling row", "sentinel"
]


class Owner(NamedTuple):
    kind: OwnerKind
    who: int = -1
    """The row of a request, -1 if that was given back without it; the number of a copy."""


class Step(NamedTuple):
    """What an action made of a page."""

    action: int
    owner: Owner


class Fault(NamedTuple):
    """What of an action could not have been right."""

    kind: FaultKind
    pool: str
    page: int
    """A row in the pool `rows`."""
    row: int
    """The row that names the page, or was given back; -1 without one."""
    action: int
    owner: Owner
    """Before the effect; of the sink and beyond the pool, free."""
    other: Owner
    """After it."""


class LedgerView(NamedTuple):
    owners: Mapping[str, tuple[Owner, ...]]
    """Of the pages 1 .. P of each pool, in order; in `rows` of the rows, free or reserved."""
    rows: Mapping[int, tuple[int, ...]]
    """Live rows and the page of each of their page-sized stretches, from position 0."""
    copies: tuple[int, ...]
    """In flight, the oldest first."""
    groups: frozenset[str]
    """Pools with an open group."""
    action: int | None
    """The one that has begun and not ended."""


class OwnershipLedger(Protocol):
    """`page_counts` names the pools and how many pages they have; the first is where rows point."""

    def begin(self, action: int) -> None:
        """An action begins (LEDGER-14). O(1)."""

    def end(self, by_hand: bool = False) -> list[Fault]:
        """It has ended: its faults (LEDGER-6, LEDGER-7, LEDGER-12).

        `by_hand`: the caller freed slots or rows itself, and may free the other half next.
        """

    def take(self, pool: str, slots: Slots) -> None:
        """An allocator handed these out (LEDGER-2); the sink is never (LEDGER-10). O(slots)."""

    def give(self, pool: str, slots: Slots) -> None:
        """These were given back (LEDGER-3). O(slots)."""

    def open_group(self, pool: str) -> None:
        """What is given back from here on is pending (LEDGER-3). O(1)."""

    def close_group(self, pool: str) -> None:
        """What is pending is free (LEDGER-8). O(pending pages)."""

    def clear(self, pool: str) -> None:
        """Everything is free, and no group is open (LEDGER-8). O(pages)."""

    def take_rows(self, rows: Sequence[int]) -> None:
        """These rows are live, and name nothing (LEDGER-11). O(rows named)."""

    def give_rows(self, rows: Sequence[int]) -> None:
        """These rows are free (LEDGER-7, LEDGER-11). O(pages they name)."""

    def clear_rows(self) -> None:
        """Every row is free (LEDGER-8). O(rows + pages they have)."""

    def write(self, row: int, start: int, slots: Slots) -> None:
        """The positions [start, start + len(slots)) of a row name these (LEDGER-4). O(slots)."""

    def adopt(self, row: int, stop: int) -> None:
        """The tree has the request's whole pages in [0, stop) of the row (LEDGER-5). O(pages)."""

    def adopt_slots(self, slots: Slots) -> None:
        """The tree has the pages of these slots (LEDGER-5). O(slots)."""

    def copy_begin(self, pool: str, slots: Slots) -> int:
        """A copy from or to these is in flight; its number (LEDGER-9). O(slots)."""

    def copy_end(self, copy: int) -> None:
        """It is done (LEDGER-9). O(pages of the copy)."""

    def owner(self, pool: str, page: int) -> Owner:
        """Who has a page, or a row of the pool `rows` (LEDGER-1). O(1)."""

    def counts(self, pool: str) -> dict[str, int]:
        """How many pages each kind of owner has; the kinds of `OwnerKind`, all of them. O(1)."""

    def history(self, pool: str, page: int) -> list[Step]:
        """What became of a page, the newest first (LEDGER-13). O(steps)."""

    def row_pages(self, row: int) -> list[int]:
        """The page of each page-sized stretch of a live row, from position 0. O(pages)."""

    def view(self) -> LedgerView:
        """The abstract state. O(pages)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `slots_seen`, `pages_moved`, `rows_looked_at` (LEDGER-15)."""

    def check(self) -> None:
        """Raise ContractError if the books are broken (LEDGER-1). O(pages)."""
