"""The model of who may own a page: it holds, it is not vacuous, and the ledger agrees with it."""

import subprocess
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

import pytest

import kvspec.oracle
from kvspec.conformance import clause
from kvspec.interfaces.ownership_ledger import Fault
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle import OwnershipLedger
from model.graph import difference, read_dot
from model.ledger_client import LedgerClient, model_view
from model.tlc import MODEL, Exit, assert_reached, reach_configurations, tlc

BROKEN = {
    "FinishesByHalves": "LEDGER_7_NoLeak",
    "GivesWhatIsShared": "LEDGER_6_NoDanglingRow",
    "GivesDuringCopy": "LEDGER_9_CopyOfWhatIsHeld",
    "TakesFromTheTree": "LEDGER_4_NoAlias",
}


class Checked(NamedTuple):
    """What TLC says of the model, and the graph it has seen."""

    run: subprocess.CompletedProcess[str]
    first: Hashable
    edges: set[tuple[Hashable, str, Hashable]]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    folder = tmp_path_factory.mktemp("ownership")
    dot = folder / "ownership.dot"
    run = tlc("MCOwnership", "Ownership", folder, "-dump", "dot,actionlabels", dot)
    return Checked(run, *read_dot(dot.read_text(encoding="utf-8")).viewed(model_view))


class TestOwnershipModel:
    impl = MODEL

    @clause("LEDGER-1", "LEDGER-3", "LEDGER-4", "LEDGER-6", "LEDGER-7", "LEDGER-9", "LEDGER-11")
    def test_holds_and_every_action_fires(self, checked: Checked) -> None:
        assert checked.run.returncode == Exit.HOLDS, checked.run.stdout
        assert {action for _, action, _ in checked.edges} == {
            *("Take", "Give", "LetGo", "OpenGroup", "CloseGroup", "Clear"),
            *("TakeRow", "GiveRow", "LeaveRow", "ClearRows", "Write", "AdoptRow", "AdoptSlots"),
            *("CopyBegin", "CopyEnd"),
        }
        assert 1_000 < len({state for state, _, _ in checked.edges}) < 5_000

    @pytest.mark.parametrize("config", reach_configurations("Ownership"))
    def test_reaches(self, config: str, tmp_path: Path) -> None:
        run = tlc("MCOwnership", config, tmp_path)

        assert_reached(config, run)

    @pytest.mark.parametrize("bug", BROKEN)
    def test_a_fault_breaks_the_invariant(self, bug: str, tmp_path: Path) -> None:
        run = tlc("MCOwnership", f"OwnershipBug{bug}", tmp_path)

        assert run.returncode == Exit.INVARIANT_VIOLATED, run.stdout
        assert f"Invariant {BROKEN[bug]} is violated" in run.stdout


class SeesNoLeak(OwnershipLedger):
    def end(self, by_hand: bool = False) -> list[Fault]:
        return [fault for fault in super().end(by_hand) if fault.kind != "leak"]


class ForgetsRows(OwnershipLedger):
    def take(self, pool: str, slots: Slots) -> None:
        self._namers.clear()
        super().take(pool, slots)


class AdoptsUnderCopies(OwnershipLedger):
    def adopt_slots(self, slots: Slots) -> None:
        self._flights.clear()
        super().adopt_slots(slots)


class TestOwnershipLedger:
    """Two pages, two rows of one, a copy: every action that the ledger finds no fault with."""

    impl = kvspec.oracle

    @clause("LEDGER-1", "LEDGER-2", "LEDGER-3", "LEDGER-4", "LEDGER-5", "LEDGER-6", "LEDGER-7")
    @clause("LEDGER-8", "LEDGER-9", "LEDGER-11")
    def test_same_graph(self, checked: Checked) -> None:
        assert difference(LedgerClient(OwnershipLedger), checked.first, checked.edges) is None

    @pytest.mark.parametrize("fault", [SeesNoLeak, ForgetsRows, AdoptsUnderCopies])
    def test_a_fault_breaks_the_equality(
        self, fault: type[OwnershipLedger], checked: Checked
    ) -> None:
        assert difference(LedgerClient(fault), checked.first, checked.edges)
