"""The ownership ledger: oracle and core against the suite, and against each other."""

import random
from collections import Counter
from typing import Any

import pytest

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.ownership_ledger import OwnershipLedgerConformance
from kvspec.errors import ContractError


class TestOracle(OwnershipLedgerConformance):
    impl = kvspec.oracle


class TestNative(OwnershipLedgerConformance):
    impl = kvspec


PAGE_COUNTS = {"full": 7, "swa": 2}
ROW_COUNT = 3
ILLEGAL = ["take", "begin", "copy_end", "write", "adopt", "end", "give_rows", "counts"]


class Driver:
    """Draws calls: mostly those of a system that makes mistakes, one in ten refused."""

    def __init__(self, seed: int, page_size: int) -> None:
        self.random, self.page_size = random.Random(seed), page_size
        self.begun, self.copies, self.action = False, 0, 0

    def slots(self) -> list[int]:
        """Runs of slots that cross pages, and now and then reach the sink or leave the pool."""
        chosen: list[int] = []
        strange = self.page_size + 1 if self.random.random() < 0.1 else 0
        last = (PAGE_COUNTS["full"] + 1) * self.page_size - 1
        for _ in range(self.random.choice([0, 1, 1, 1, 2, 3])):
            start = self.random.randint(self.page_size - strange, last)
            stop = min(start + self.random.randint(1, 2 * self.page_size), last + 1 + strange)
            chosen += range(start, stop)
        return chosen

    def row(self) -> int:
        strange = self.random.random() < 0.04
        return self.random.choice([-1, ROW_COUNT]) if strange else self.random.randrange(ROW_COUNT)

    def illegal(self) -> tuple[Any, ...]:
        name = self.random.choice(ILLEGAL)
        given: dict[str, tuple[Any, ...]] = {
            "take": ("host", [1]),
            "begin": (0,) if self.begun else ("x",),
            "copy_end": (self.copies + 1,),
            "write": (0, -1, [4]),
            "adopt": (0, -1),
            "end": (),
            "give_rows": ([1.5],),
            "counts": ("host",),
        }
        right = {"end": self.begun, "begin": not self.begun}.get(name, False)
        name = "take" if right else name
        return name, *given[name]

    def call(self) -> tuple[Any, ...]:
        if self.random.random() < 0.1:
            return self.illegal()
        if not self.begun:
            self.begun, self.action = True, self.action + 1
            return "begin", self.action
        name = self.random.choices(
            ["take", "give", "write", "adopt", "adopt_slots", "take_rows", "give_rows", "end"],
            [4, 4, 6, 2, 2, 3, 2, 6],
        )[0]
        if self.random.random() < 0.15:
            names = ["open_group", "close_group", "copy_begin", "copy_end", "clear", "clear_rows"]
            name = self.random.choices(names, [4, 4, 4, 4, 1, 1])[0]
        return name, *self.arguments(name)

    def arguments(self, name: str) -> tuple[Any, ...]:
        pool = self.random.choice(["full", "full", "full", "swa"])
        position = self.random.randrange(4 * self.page_size)
        if name in ("take", "give", "copy_begin"):
            self.copies += name == "copy_begin"
            return pool, self.slots()
        if name == "write":
            return self.row(), position, self.slots()
        if name == "adopt":
            return self.row(), position
        if name in ("take_rows", "give_rows"):
            return ([self.row() for _ in range(self.random.choice([1, 1, 2]))],)
        if name == "adopt_slots":
            return (self.slots(),)
        if name == "copy_end":
            return (self.random.randrange(max(1, self.copies)),)
        self.begun = self.begun and name != "end"
        return {"end": (self.random.random() < 0.3,), "clear_rows": ()}.get(name, (pool,))


def answer(ledger: Any, name: str, *given: Any) -> Any:
    """What a call gave, or the text of its refusal."""
    try:
        return getattr(ledger, name)(*given)
    except ContractError as error:
        return str(error)
    except TypeError:
        return "TypeError"


def known(ledger: Any) -> Any:
    """All that a ledger says of itself."""
    pools = [*PAGE_COUNTS, "rows"]
    histories = [ledger.history(pool, page) for pool in pools for page in range(-1, 9)]
    rows = [ledger.row_pages(row) for row in range(ROW_COUNT)]
    counts = [ledger.counts(pool) for pool in pools]
    return ledger.view(), counts, ledger.counters(), rows, histories


def play(seed: int, page_size: int, calls: int) -> Counter[str]:
    """The same calls to oracle and core, compared after each; how many faults of each kind."""
    given = {"page_size": page_size, "page_counts": PAGE_COUNTS, "row_count": ROW_COUNT}
    ledgers = [impl.OwnershipLedger(**given, step_count=40) for impl in (kvspec.oracle, kvspec)]
    driver, seen = Driver(seed, page_size), Counter[str]()
    for at in range(calls):
        call = driver.call()
        one, other = (answer(ledger, *call) for ledger in ledgers)
        assert one == other, (seed, at, call)
        assert known(ledgers[0]) == known(ledgers[1]), (seed, at, call)
        if at % 20 == 0:
            for ledger in ledgers:
                ledger.check()
        if call[0] == "end" and isinstance(one, list):
            seen.update(fault.kind for fault in one)
        seen["refused"] += isinstance(one, str)
    return seen


@clause("LEDGER-14")
@pytest.mark.parametrize("page_size", [1, 3])
def test_oracle_and_core_in_lockstep(page_size: int) -> None:
    seen = Counter[str]()
    for seed in range(6):
        seen += play(seed, page_size, 300)
    kinds = ["leak", "double free", "alias", "use after free", "dangling row", "sentinel"]
    assert all(seen[kind] >= 20 for kind in [*kinds, "refused"]), seen
