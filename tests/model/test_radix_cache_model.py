"""The model of the radix cache: it holds, and it is not vacuous."""

from pathlib import Path

import pytest

from kvspec.conformance import clause
from model.tlc import MODEL, Exit, assert_reached, fired, mutated, reach_configurations, tlc


class TestRadixCacheModel:
    impl = MODEL

    @clause("RADIX-5", "RADIX-6", "RADIX-8", "RADIX-10", "RADIX-11", "RADIX-13", "CACHE-14")
    def test_holds_and_every_action_fires(self, tmp_path: Path) -> None:
        run = tlc("MCRadixCache", "RadixCache", tmp_path, "-coverage", "1")

        assert run.returncode == Exit.HOLDS, run.stdout
        assert all(fired(run).values()), fired(run)

    @pytest.mark.parametrize("config", reach_configurations("RadixCache"))
    def test_reaches(self, config: str, tmp_path: Path) -> None:
        run = tlc("MCRadixCache", config, tmp_path)

        assert_reached(config, run)

    @pytest.mark.parametrize(
        ("old", "new", "broken"),
        [
            pytest.param(
                "LET gone == Victims(DOMAIN tree, n)",
                "LET gone == Leaves(DOMAIN tree)",
                "RADIX_11_LockedIsResident",
                id="evicts_locked_pages",
            ),
            pytest.param(
                "{ p \\in Leaves(resident) : locks[p] = 0 }",
                "{ p \\in resident : locks[p] = 0 }",
                "RADIX_5_PrefixClosed",
                id="evicts_what_is_no_leaf",
            ),
            pytest.param(
                "!.live = @ /\\ handle.path \\notin gone",
                "!.live = @",
                "CACHE_14_LiveIsResident",
                id="keeps_handles_live",
            ),
            pytest.param(
                "locks[p] - IF p \\in Prefixes(receipts[i])",
                "locks[p] - IF p = receipts[i]",
                "RADIX_6_LocksAreReceipts",
                id="unlocks_one_page",
            ),
        ],
    )
    def test_a_fault_breaks_the_invariant(
        self, old: str, new: str, broken: str, tmp_path: Path
    ) -> None:
        faulty = mutated("RadixCache", old, new, tmp_path)

        run = tlc("MCRadixCache", "RadixCache", tmp_path, folder=faulty)

        assert run.returncode == Exit.INVARIANT_VIOLATED, run.stdout
        assert f"Invariant {broken} is violated" in run.stdout
