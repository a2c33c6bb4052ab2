"""The model of shared memory: it holds, every step is taken, and no rule can be left out."""

from pathlib import Path

import pytest

from kvspec.conformance import clause
from model.tlc import MODEL, Exit, assert_reached, fired, reach_configurations, tlc

BROKEN = {
    "CreatesWithoutLooking": "SHM_14_HeldIsLinked",
    "AttachesWithoutLooking": "SHM_14_HeldIsLinked",
    "RefusesWithoutClosing": "SHM_9_LastTakesTheName",
    "RemovesUnasked": "SHM_14_HeldIsLinked",
    "TakesANumberForALife": "SHM_21_NothingIsLeft",
    "TakesNoNumberForADeath": "SHM_14_HeldIsLinked",
}
STEPS = {
    *("Make", "LockNew", "LookNew", "Reserve"),
    *("Open", "Probe", "LockOpened", "LookOpened"),
    *("Drop", "AskToBeLast", "Unlink", "Close", "Kill"),
    *("List", "OpenListed", "Reap", "EndOfList", "Return"),
}


class TestSharedMemoryModel:
    impl = MODEL

    @clause("SHM-3", "SHM-9", "SHM-13", "SHM-14", "SHM-21")
    def test_holds_and_every_step_is_taken(self, tmp_path: Path) -> None:
        run = tlc("MCSharedMemory", "SharedMemory", tmp_path, "-coverage", "1")

        assert run.returncode == Exit.HOLDS, run.stdout
        steps = fired(run)
        assert {step for step, count in steps.items() if count > 0} >= STEPS, run.stdout

    @pytest.mark.parametrize("config", reach_configurations("SharedMemory"))
    def test_reaches(self, config: str, tmp_path: Path) -> None:
        assert_reached(config, tlc("MCSharedMemory", config, tmp_path))

    @pytest.mark.parametrize("bug", BROKEN)
    def test_a_fault_breaks_the_invariant(self, bug: str, tmp_path: Path) -> None:
        run = tlc("MCSharedMemory", f"SharedMemoryBug{bug}", tmp_path)

        assert run.returncode == Exit.INVARIANT_VIOLATED, run.stdout
        assert f"Invariant {BROKEN[bug]} is violated" in run.stdout
