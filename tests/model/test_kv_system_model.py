"""The model of allocator, cache and request pool together: it holds, and it is not vacuous."""

from pathlib import Path

import pytest

from kvspec.conformance import clause
from model.tlc import MODEL, Exit, assert_reached, fired, mutated, reach_configurations, tlc


class TestKvSystemModel:
    impl = MODEL

    @clause("CACHE-1", "CACHE-2", "CACHE-3", "CACHE-4")
    def test_holds_and_every_action_fires(self, tmp_path: Path) -> None:
        run = tlc("MCKvSystem", "KvSystem", tmp_path, "-coverage", "1")

        assert run.returncode == Exit.HOLDS, run.stdout
        assert all(fired(run).values()), fired(run)

    @pytest.mark.parametrize("config", reach_configurations("KvSystem"))
    def test_reaches(self, config: str, tmp_path: Path) -> None:
        run = tlc("MCKvSystem", config, tmp_path)

        assert_reached(config, run)

    @clause("CACHE-1", "CACHE-3")
    def test_a_tail_within_a_page_belongs_to_the_request(self, tmp_path: Path) -> None:
        """Duplicates counted from len(prefix_indices) leave a row that points at a freed page."""
        run = tlc("MCKvSystem", "KvSystemBugMidPage", tmp_path)

        assert run.returncode == Exit.INVARIANT_VIOLATED, run.stdout
        assert "Invariant CACHE_1_NoDanglingRow is violated" in run.stdout

    @pytest.mark.parametrize(
        ("old", "new", "broken"),
        [
            pytest.param(
                "free' = free \\cup Own(r)",
                "free' = free",
                "CACHE_1_OneOwner",
                id="abort_leaks",
            ),
            pytest.param(
                "i \\in WholeFor(fill[r]) * PageSize + 1..Len(Row(r)) }",
                "i \\in fill[r] + 1..Len(Row(r)) }",
                "CACHE_1_OneOwner",
                id="tail_leaks",
            ),
            pytest.param(
                "        /\\ ~IsLocked(p)\n",
                "",
                "CACHE_1_RowFollowsTree",
                id="locked_pages_are_evicted",
            ),
        ],
    )
    def test_a_fault_breaks_the_invariant(
        self, old: str, new: str, broken: str, tmp_path: Path
    ) -> None:
        faulty = mutated("KvSystem", old, new, tmp_path)

        run = tlc("MCKvSystem", "KvSystem", tmp_path, folder=faulty)

        assert run.returncode == Exit.INVARIANT_VIOLATED, run.stdout
        assert f"Invariant {broken} is violated" in run.stdout
