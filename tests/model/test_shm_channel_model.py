"""The model of the channel: it holds, nobody waits for ever, and it is not vacuous."""

from pathlib import Path

import pytest

from kvspec.conformance import clause
from model.tlc import MODEL, Exit, assert_reached, fired, reach_configurations, tlc

BROKEN = {
    "PublishesBeforeTheData": "CHAN_9_PrefixWithoutHoles",
    "IgnoresTheSlowest": "CHAN_1_NothingOverwritten",
    "LosesWhatIsLeft": "CHAN_21_EndsWithEverything",
}
HANGS = ["NeverLooks", "SleepsOnAnOldLook", "SleepsOnAnOldBell"]


class TestShmChannelModel:
    impl = MODEL

    @clause("CHAN-1", "CHAN-9", "CHAN-13", "CHAN-15")
    def test_holds_in_a_ring_of_two_blocks(self, tmp_path: Path) -> None:
        run = tlc("MCShmChannel", "ShmChannel", tmp_path)

        assert run.returncode == Exit.HOLDS, run.stdout

    @clause("CHAN-14", "CHAN-20", "CHAN-21", "CHAN-22")
    def test_holds_if_a_reader_dies_and_every_action_fires(self, tmp_path: Path) -> None:
        run = tlc("MCShmChannel", "ShmChannelDeaths", tmp_path, "-coverage", "1")

        assert run.returncode == Exit.HOLDS, run.stdout
        assert all(fired(run).values()), fired(run)

    @clause("CHAN-27")
    @pytest.mark.parametrize("config", ["ShmChannelWaits", "ShmChannelNobodyDies"])
    def test_every_wait_ends(self, config: str, tmp_path: Path) -> None:
        """Whoever dies; and where nobody does, by bells alone: no wake-up is lost."""
        run = tlc("MCShmChannel", config, tmp_path)

        assert run.returncode == Exit.HOLDS, run.stdout

    @pytest.mark.parametrize("config", reach_configurations("ShmChannel"))
    def test_reaches(self, config: str, tmp_path: Path) -> None:
        run = tlc("MCShmChannel", config, tmp_path)

        assert_reached(config, run)

    @pytest.mark.parametrize("bug", BROKEN)
    def test_a_fault_breaks_the_invariant(self, bug: str, tmp_path: Path) -> None:
        run = tlc("MCShmChannel", f"ShmChannelBug{bug}", tmp_path)

        assert run.returncode == Exit.INVARIANT_VIOLATED, run.stdout
        assert f"Invariant {BROKEN[bug]} is violated" in run.stdout

    @clause("CHAN-27")
    @pytest.mark.parametrize("bug", HANGS)
    def test_a_fault_makes_somebody_wait_for_ever(self, bug: str, tmp_path: Path) -> None:
        run = tlc("MCShmChannel", f"ShmChannelBug{bug}", tmp_path)

        assert run.returncode == Exit.PROPERTY_VIOLATED, run.stdout
