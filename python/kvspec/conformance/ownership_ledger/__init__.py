"""What every ownership ledger must do. Spec: LEDGER."""

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from kvspec.conformance import clause
from kvspec.conformance.ownership_ledger.actions import ActionConformance
from kvspec.conformance.ownership_ledger.bench import (
    FREE,
    PAGE_SIZE,
    RESERVED,
    TREE,
    Effect,
    act,
    kinds,
    request,
    slots_of,
)
from kvspec.conformance.ownership_ledger.effects import EffectConformance
from kvspec.conformance.ownership_ledger.histories import Histories
from kvspec.conformance.suite import fuzzing
from kvspec.errors import ContractError
from kvspec.interfaces.ownership_ledger import Fault, Step

__all__ = ["OwnershipLedgerConformance"]

SENTINELS: dict[str, Effect] = {
    "the sink handed out": ("take", "full", [0, 1]),
    "the sink given back": ("give", "full", [3]),
    "the sink adopted": ("adopt_slots", [2]),
    "the sink written": ("write", 0, 10, [0]),
    "the sink copied": ("copy_begin", "full", [0]),
    "a page beyond the pool handed out": ("take", "full", slots_of(9)),
    "a page beyond the pool given back": ("give", "full", [36]),
    "a page beyond the pool adopted": ("adopt_slots", [36]),
    "a page beyond the pool written": ("write", 0, 10, [39]),
    "a page beyond the pool copied": ("copy_begin", "full", [36]),
    "a page of the first pool in another": ("give", "swa", slots_of(4)),
    "a page below the pool": ("give", "full", [-1, -4]),
    "a page far beyond": ("take", "full", [4 * 2**40]),
}
OUTSIDE: list[Effect] = [
    ("take", "full", [4]),
    ("give", "full", [4]),
    ("open_group", "full"),
    ("close_group", "full"),
    ("clear", "full"),
    ("take_rows", [3]),
    ("give_rows", [0]),
    ("clear_rows",),
    ("write", 0, 0, [4]),
    ("adopt", 0, 4),
    ("adopt_slots", [4]),
    ("copy_begin", "full", [4]),
    ("copy_end", 0),
    ("end",),
]
UNKNOWN: list[Effect] = [
    ("take", "host", [4]),
    ("take", "rows", [4]),
    ("give", "host", [4]),
    ("open_group", ""),
    ("close_group", "host"),
    ("clear", "rows"),
    ("copy_begin", "host", [4]),
    ("copy_end", 0),
    ("copy_end", -1),
    ("begin", 7),
    ("owner", "host", 1),
    ("counts", "host"),
    ("history", "host", 1),
    ("write", 0, -1, [4, 5]),
    ("write", 0, 2**31 - 1, [4, 5]),
    ("adopt", 0, -1),
    ("adopt", 0, 2**31 + 1),
    ("take", "full", [4.0]),
    ("give", "full", torch.tensor([[4]])),
    ("take_rows", ["0"]),
]


class OwnershipLedgerConformance(EffectConformance, ActionConformance):
    """Tests of `OwnershipLedger`: those of effects and actions, and what holds for all of them."""

    @clause("LEDGER-10")
    @pytest.mark.parametrize("what", SENTINELS)
    def test_sentinels_change_nothing(self, what: str) -> None:
        ledger = self.filled()
        before, (name, *given) = ledger.view(), SENTINELS[what]
        pool = given[0] if isinstance(given[0], str) else "full"
        row = given[0] if name == "write" else -1
        page = given[-1][0] // PAGE_SIZE
        sentinel = Fault("sentinel", pool, page, row, 1, FREE, FREE)
        assert act(ledger, 1, SENTINELS[what]) == [sentinel]
        assert ledger.view()[:2] == before[:2]
        assert ledger.owner(pool, page) == FREE
        assert ledger.history(pool, page) == []

    @clause("LEDGER-10", "LEDGER-6")
    def test_a_sentinel_leaves_the_rest_of_an_effect(self) -> None:
        ledger = self.filled()
        faults = act(ledger, 1, ("write", 0, 8, [0, 20, 0, 21, 36, 0]))
        assert kinds(faults) == [("sentinel", 0, 0), ("sentinel", 9, 0)]
        assert ledger.row_pages(0) == [3, 1, 5]
        assert kinds(act(ledger, 2, ("give", "full", slots_of(2)))) == [("dangling row", 2, 0)]

    @clause("LEDGER-12")
    def test_the_last_effect_is_believed(self) -> None:
        ledger = self.filled()
        wrong: list[Effect] = [
            ("take", "full", slots_of(1)),
            ("give", "full", slots_of(6)),
            ("write", 0, 12, slots_of(7)),
            ("adopt_slots", slots_of(8)),
            ("write", 3, 0, slots_of(4)),
        ]
        faults = act(ledger, 1, *wrong)
        assert [fault.kind for fault in faults] == [
            "alias",
            "double free",
            "dangling row",
            "use after free",
            "dangling row",
            "alias",
        ]
        assert all(fault.action == 1 for fault in faults)
        owners = [RESERVED, request(0), TREE, request(3), RESERVED, FREE, request(0), TREE]
        assert list(ledger.view().owners["full"]) == owners
        assert ledger.row_pages(3) == [4]
        ledger.check()

    @clause("LEDGER-12")
    def test_a_fault_is_reported_once(self) -> None:
        ledger = self.filled()
        assert len(act(ledger, 1, ("give", "full", slots_of(1, 6)), ("take", "full", [12]))) == 3
        assert act(ledger, 2) == []
        assert act(ledger, 3, ("write", 0, 12, [12])) == []
        assert act(ledger, 4, ("give", "full", slots_of(5))) == []
        assert act(ledger, 5, ("take", "full", slots_of(1, 6))) == []

    # -- history -----------------------------------------------------------------------------------

    @clause("LEDGER-13")
    def test_history_is_the_newest_first(self) -> None:
        ledger = self.filled()
        act(ledger, 5, ("adopt", 0, 8), ("give", "full", slots_of(4)))
        act(ledger, 7, ("give", "full", slots_of(1)), ("give", "full", slots_of(1)))
        assert ledger.history("full", 1) == [
            Step(7, FREE),
            Step(7, FREE),
            Step(5, TREE),
            Step(0, request(0)),
            Step(0, RESERVED),
        ]
        assert ledger.history("full", 3) == [Step(0, TREE), Step(0, request(0)), Step(0, RESERVED)]
        assert ledger.history("swa", 1) == [Step(0, RESERVED)]
        assert ledger.history("rows", 1) == [Step(0, RESERVED)]
        assert ledger.history("full", 6) == ledger.history("swa", 3) == []

    @clause("LEDGER-13")
    def test_history_reaches_as_far_as_the_last_steps(self) -> None:
        ledger = self.make(step_count=3)
        act(ledger, 1, ("take", "full", slots_of(1, 2)))
        act(ledger, 2, ("give", "full", slots_of(1)), ("take", "swa", slots_of(1)))
        assert ledger.history("full", 1) == [Step(2, FREE)]
        assert ledger.history("full", 2) == [Step(1, RESERVED)]
        for action in (3, 4, 5):
            act(ledger, action, ("take", "full", [4]), ("give", "full", [4]))
        assert ledger.history("full", 1) == [Step(5, FREE), Step(5, RESERVED), Step(4, FREE)]
        assert ledger.history("full", 2) == ledger.history("swa", 1) == []

    # -- refusals and costs ------------------------------------------------------------------------

    def refuses(self, ledger: Any, name: str, *given: Any) -> None:
        """It refuses, and is as before."""
        before, costs = ledger.view(), ledger.counters()
        with pytest.raises(ContractError, match=r"^LEDGER-14: "):
            getattr(ledger, name)(*given)
        assert (ledger.view(), ledger.counters()) == (before, costs)
        ledger.check()

    @clause("LEDGER-14")
    @pytest.mark.parametrize("effect", OUTSIDE, ids=lambda effect: effect[0])
    def test_outside_an_action_nothing_happens(self, effect: Effect) -> None:
        self.refuses(self.filled(), *effect)

    @clause("LEDGER-14")
    @pytest.mark.parametrize("effect", UNKNOWN, ids=str)
    def test_what_is_not_there_is_refused(self, effect: Effect) -> None:
        ledger = self.filled()
        ledger.begin(6)
        ledger.give("full", slots_of(6))
        self.refuses(ledger, *effect)
        assert ledger.view().action == 6
        assert kinds(ledger.end()) == [("double free", 6, -1)]

    @clause("LEDGER-14")
    @pytest.mark.parametrize(
        "given",
        [
            {"page_size": 0},
            {"page_size": -4},
            {"row_count": 0},
            {"step_count": 0},
            {"step_count": 2**31},
            {"page_counts": {"full": 4, "swa": 0}},
            {"page_counts": {}},
            {"page_counts": {"full": 4, "rows": 4}},
        ],
        ids=str,
    )
    def test_constructor_refuses(self, given: dict[str, Any]) -> None:
        with pytest.raises(ContractError, match=r"^LEDGER-14: "):
            self.make(**given)

    @clause("LEDGER-15")
    @pytest.mark.parametrize("more", [0, 400])
    def test_cost_is_what_is_named(self, more: int) -> None:
        counts = {"full": 8 + more, "swa": 3 + more}
        ledger = self.filled(page_counts=counts, row_count=4 + more)
        start = ledger.counters()
        act(ledger, 1, ("give", "full", slots_of(3, 5)), ("adopt", 0, 8))
        act(ledger, 2, ("take", "full", slots_of(6)), ("write", 1, 8, [24, 25, 26]))
        act(ledger, 3, ("give_rows", [1]), ("open_group", "swa"))
        act(ledger, 4, ("copy_begin", "full", [4]), ("close_group", "swa"))
        cost = {name: count - start[name] for name, count in ledger.counters().items()}
        assert cost == {"slots_seen": 16, "pages_moved": 9, "rows_looked_at": 2}

    @clause(
        "LEDGER-1",
        "LEDGER-2",
        "LEDGER-3",
        "LEDGER-4",
        "LEDGER-5",
        "LEDGER-8",
        "LEDGER-9",
        "LEDGER-10",
        "LEDGER-12",
        "LEDGER-13",
    )
    def test_histories(self) -> None:
        class HistoriesOfThis(Histories):
            suite = self

        fewer = settings(fuzzing(), max_examples=fuzzing().max_examples // 3)
        run_state_machine_as_test(HistoriesOfThis, settings=fewer)
