"""The model of requests in a scheduler: none leaves anything behind, and every one is finished."""

from pathlib import Path

import pytest

from kvspec.conformance import clause
from model.tlc import MODEL, TLA, Exit, assert_reached, fired, mutated, reach_configurations, tlc

BROKEN = {
    "AbortOfChunkedKeepsRow": "SCHED_8_NothingLeftBehind",
    "ForgetsTheTail": "CACHE_1_OneOwner",
    "FreesCommittedOnly": "CACHE_1_OneOwner",
    "KeepsLockOnRetract": "SCHED_8_NothingLeftBehind",
    "ReleasesInFlight": "SCHED_22_NamedIsHeld",
    "ResumesWithoutOutputs": "SCHED_17_KvIsComplete",
}
STUCK = {
    "AdmitsWithoutRoom": "Back to state",
    "ForgetsWhatIsSpeculated": "Stuttering",
    "SparesTheChunked": "Stuttering",
}
"""What keeps a request from its end: to go round in a circle, or that nothing can be done."""


class TestRequestLifecycleModel:
    impl = MODEL

    @clause(
        "CACHE-1", "CACHE-4", "REQ-1", "SCHED-8", "SCHED-16", "SCHED-19", "SCHED-22", "SCHED-26"
    )
    @pytest.mark.parametrize("config", ["RequestLifecycle", "RequestLifecycleSpeculates"])
    def test_holds_and_every_action_fires(self, config: str, tmp_path: Path) -> None:
        """With steps that overlap, and with steps that speculate."""
        run = tlc("MCRequestLifecycle", config, tmp_path, "-coverage", "1")

        assert run.returncode == Exit.HOLDS, run.stdout
        assert all(fired(run).values()), fired(run)

    @clause("SCHED-29")
    @pytest.mark.parametrize("config", ["", "InSmallChunks", "Speculating"])
    def test_every_request_is_finished(self, config: str, tmp_path: Path) -> None:
        """Nothing but that the scheduler goes on is assumed: not even in which order."""
        run = tlc("MCRequestLifecycle", f"RequestLifecycleFinishes{config}", tmp_path)

        assert run.returncode == Exit.HOLDS, run.stdout

    @pytest.mark.parametrize("config", reach_configurations("RequestLifecycle"))
    def test_reaches(self, config: str, tmp_path: Path) -> None:
        run = tlc("MCRequestLifecycle", config, tmp_path)

        assert_reached(config, run)

    @pytest.mark.parametrize("bug", BROKEN)
    def test_a_fault_breaks_the_invariant(self, bug: str, tmp_path: Path) -> None:
        run = tlc("MCRequestLifecycle", f"RequestLifecycleBug{bug}", tmp_path)

        assert run.returncode == Exit.INVARIANT_VIOLATED, run.stdout
        assert f"Invariant {BROKEN[bug]} is violated" in run.stdout

    @pytest.mark.parametrize("bug", STUCK)
    def test_a_fault_keeps_a_request_from_its_end(self, bug: str, tmp_path: Path) -> None:
        run = tlc("MCRequestLifecycle", f"RequestLifecycleBug{bug}", tmp_path)

        assert run.returncode == Exit.PROPERTY_VIOLATED, run.stdout
        assert STUCK[bug] in run.stdout

    def test_who_has_the_most_outputs_is_not_retracted(self, tmp_path: Path) -> None:
        run = tlc("MCRequestLifecycle", "RequestLifecycleBugRetractsTheMostOutputs", tmp_path)

        assert run.returncode == Exit.PROPERTY_VIOLATED, run.stdout
        assert "Action property SCHED_16_MostOutputsStays is violated" in run.stdout

    def test_every_configuration_is_checked(self) -> None:
        bugs = {path.stem for path in TLA.glob("RequestLifecycleBug*.cfg")}

        known = {*BROKEN, *STUCK, "RetractsTheMostOutputs"}
        assert bugs == {f"RequestLifecycleBug{bug}" for bug in known}

    @pytest.mark.parametrize(
        ("config", "old", "new", "broken"),
        [
            pytest.param(
                "FinishesInSmallChunks",
                "/\\ Idle /\\ DOMAIN tree # {}",
                "/\\ DOMAIN tree # {}",
                "CACHE_1_RowFollowsTree",
                id="flushes_while_somebody_runs",
            ),
            pytest.param(
                "Speculates",
                '![r] = IF next = "waiting" THEN @ ELSE 0]',
                "![r] = 0]",
                "SCHED_17_OutputsStay",
                id="retracts_the_outputs_too",
            ),
            pytest.param(
                "",
                "DecodeFrom == [r \\in Batch |-> committed[r] + Cardinality(StepsOf(r))]",
                "DecodeFrom == [r \\in Batch |-> committed[r]]",
                "SCHED_23_WrittenOnce",
                id="overlapping_steps_write_one_slot",
            ),
        ],
    )
    def test_a_change_breaks_the_law(
        self, config: str, old: str, new: str, broken: str, tmp_path: Path
    ) -> None:
        faulty = mutated("RequestLifecycle", old, new, tmp_path)

        run = tlc("MCRequestLifecycle", f"RequestLifecycle{config}", tmp_path, folder=faulty)

        assert run.returncode in {Exit.INVARIANT_VIOLATED, Exit.PROPERTY_VIOLATED}, run.stdout
        assert f"{broken} is violated" in run.stdout
