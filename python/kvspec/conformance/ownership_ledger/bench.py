"""A ledger with something in it, and how it is told more."""

from typing import Any

from kvspec.conformance.suite import Conformance
from kvspec.interfaces.ownership_ledger import Fault, Owner, OwnershipLedger

__all__ = [
    "ABANDONED",
    "FILLED_OWNERS",
    "FREE",
    "PAGE_SIZE",
    "PENDING",
    "RESERVED",
    "TREE",
    "Effect",
    "LedgerBench",
    "act",
    "kinds",
    "request",
    "slots_of",
]

PAGE_SIZE = 4
FREE, PENDING, RESERVED, TREE = (Owner(kind) for kind in ("free", "pending", "reserved", "tree"))
ABANDONED = Owner("request")
Effect = tuple[Any, ...]
"""The name of a method, and its arguments."""


def slots_of(*pages: int) -> list[int]:
    """All slots of these pages, in order."""
    first = [page * PAGE_SIZE for page in pages]
    return [slot for start in first for slot in range(start, start + PAGE_SIZE)]


def request(row: int) -> Owner:
    """The request of a row."""
    return Owner("request", row)


def act(ledger: Any, action: int, *effects: Effect, by_hand: bool = False) -> list[Fault]:
    """An action of these effects: its faults."""
    ledger.begin(action)
    for name, *given in effects:
        getattr(ledger, name)(*given)
    faults: list[Fault] = ledger.end(by_hand=by_hand)
    return faults


def kinds(faults: list[Fault]) -> list[tuple[str, int, int]]:
    """Kind, page and row of each fault."""
    return [(fault.kind, fault.page, fault.row) for fault in faults]


FILLED: list[Effect] = [
    ("take", "full", slots_of(1, 2, 3, 4, 5)),
    ("take_rows", [0, 1]),
    ("write", 0, 0, [*slots_of(3, 1), 8, 9]),
    ("adopt_slots", slots_of(3)),
    ("write", 1, 0, slots_of(3, 4)),
    ("take", "swa", slots_of(1)),
]
"""Row 0 names 3, 1 and half of 2, row 1 names 3 and 4; 3 is the tree's, 5 reserved, 6 to 8 free."""
FILLED_OWNERS = [request(0), request(0), TREE, request(1), RESERVED, FREE, FREE, FREE]


class LedgerBench(Conformance):
    """Makes the ledgers that the tests of the room begin with."""

    def make(self, **given: Any) -> Any:
        """Pools of 8 and 3 pages of 4 slots and 4 rows, unless told otherwise."""
        counts = {"full": 8, "swa": 3}
        defaults = {
            "page_size": PAGE_SIZE,
            "page_counts": counts,
            "row_count": 4,
            "step_count": 1_000,
        }
        arguments = defaults | given
        return self.subject("OwnershipLedger", OwnershipLedger, "ownership_ledger", **arguments)

    def filled(self, **given: Any) -> Any:
        """After action 0, `FILLED`."""
        ledger = self.make(**given)
        assert act(ledger, 0, *FILLED) == []
        return ledger
