"""The models of the cache with windows, alone and with requests: they hold, and are not vacuous."""

import re
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import pytest

from kvspec.conformance import clause
from model.tlc import MODEL, Exit, assert_reached, fired, mutated, reach_configurations, tlc


class Fault(NamedTuple):
    """A line of a module as it should not read, and what it breaks."""

    module: str
    old: str
    new: str
    breaks: str


FAULTS_OF_THE_CACHE = {
    "matches_short_windows": Fault(
        "Windows",
        "IF run >= Window THEN n ELSE best",
        "IF run >= 1 THEN n ELSE best",
        "SWARADIX_1_LongestUsable",
    ),
    "adopts_beyond_the_reach": Fault(
        "Windows",
        "reach   == SubSeq(key, 1, ReachLength(tree, dead, pools, key, value))",
        "reach   == key",
        "SWARADIX_7_LeavesAreLive",
    ),
    "calls_bare_pages_live": Fault(
        "Windows", "(dead \\ revived) \\cup bare", "dead \\ revived", "SWARADIX_8_LiveArePaired"
    ),
    "leaves_tombstones_behind": Fault(
        "Windows",
        "LET rest == Trimmed(S \\ {p}, dead)",
        "LET rest == S \\ {p}",
        "SWARADIX_7_LeavesAreLive",
    ),
    "shares_the_pair_it_moves": Fault(
        "Windows",
        "(DOMAIN @ \\cup DOMAIN source) \\ Range(source)",
        "DOMAIN @ \\cup DOMAIN source",
        "CACHE_1_OneOwner",
    ),
    "locks_all_windows": Fault(
        "SWARadixCache",
        "windowLocks' = More(windowLocks, WindowOf(p))",
        "windowLocks' = More(windowLocks, Prefixes(p))",
        "SWARADIX_9_WindowLocksAreReceipts",
    ),
    "locks_tombstones": Fault(
        "SWARadixCache",
        "LockReach(p) == p \\in DOMAIN tree \\ dead",
        "LockReach(p) == p \\in DOMAIN tree",
        "SWARADIX_11_LockedEndsLive",
    ),
    "counts_leaves_not_pages": Fault(
        "SWARadixCache",
        "IF went < n THEN n - went ELSE 0",
        "n - 1",
        "SWARADIX_12_OldestLeavesGo",
    ),
    "forgets_the_first_phase": Fault(
        "SWARadixCache",
        "Phase2(first, IF went < m THEN m - went ELSE 0)",
        "Phase2(first, m)",
        "SWARADIX_13_TombstonesOrLeaves",
    ),
    "takes_the_newest": Fault(
        "SWARadixCache",
        "\\A q \\in S : IsBefore(p, q)",
        "\\A q \\in S : IsBefore(q, p)",
        "SWARADIX_14_OldestFirst",
    ),
}

FAULTS_OF_THE_SYSTEM = {
    "leaves_behind_what_the_tree_owns": Fault(
        "SWAKvSystem",
        "LeftBehind(r, n) == { row[r][i] : i \\in protected[r] + 1..Frontier(n) }",
        "LeftBehind(r, n) == { row[r][i] : i \\in 1..Frontier(n) }",
        "SWARADIX_8_LiveArePaired",
    ),
    "evicts_locked_pages": Fault(
        "SWAKvSystem",
        "Leaves(DOMAIN tree) \\ Locked",
        "Leaves(DOMAIN tree)",
        "CACHE_1_RowFollowsTree",
    ),
    "locks_beyond_the_reach": Fault(
        "SWAKvSystem",
        "lock' = [lock EXCEPT ![r] = after.reach]",
        "lock' = [lock EXCEPT ![r] = PathOf(r, fill[r])]",
        "CACHE_1_RowFollowsTree",
    ),
    "finishing_leaks": Fault(
        "SWAKvSystem",
        "Given(Cached(r).pools, Own(r) \\ Range(tree'), {})",
        "Cached(r).pools",
        "CACHE_1_OneOwner",
    ),
    "retraction_leaks": Fault(
        "SWAKvSystem", "Given(pools, Own(r), {})", "pools", "CACHE_1_OneOwner"
    ),
}


def distinct_states(run: CompletedProcess[str]) -> int:
    found = re.findall(r"(\d+) distinct states found, 0 states left", run.stdout)
    assert found, run.stdout
    return int(found[-1])


def assert_broken(name: str, run: CompletedProcess[str]) -> None:
    """Fail unless TLC found a state, or a step, that breaks what is named."""
    assert run.returncode in (Exit.INVARIANT_VIOLATED, Exit.PROPERTY_VIOLATED), run.stdout
    assert re.search(rf"(Invariant|Action property) {name} is violated", run.stdout), run.stdout


class TestSWARadixCacheModel:
    """Tree, tombstones, locks and two pools; the client gives keys."""

    impl = MODEL

    @clause("SWARADIX-1", "SWARADIX-2", "SWARADIX-3", "SWARADIX-4", "SWARADIX-5", "SWARADIX-7")
    @clause("SWARADIX-8", "SWARADIX-9", "SWARADIX-11", "SWARADIX-12", "SWARADIX-13")
    @clause("SWARADIX-14", "SWARADIX-15", "SWA-1", "SWA-2", "CACHE-9", "CACHE-12")
    def test_holds(self, tmp_path: Path) -> None:
        run = tlc("MCSWARadixCache", "SWARadixCache", tmp_path)

        assert run.returncode == Exit.HOLDS, run.stdout
        assert distinct_states(run) >= 1_500

    @clause("SWARADIX-1", "SWARADIX-2", "SWARADIX-3", "SWARADIX-4", "SWARADIX-5", "SWARADIX-7")
    @clause("SWARADIX-8", "SWARADIX-9", "SWARADIX-11", "SWARADIX-12", "SWARADIX-13")
    @clause("SWARADIX-14", "SWARADIX-15", "SWA-1", "SWA-2", "CACHE-9", "CACHE-12")
    def test_a_window_of_three_holds_and_every_action_fires(self, tmp_path: Path) -> None:
        run = tlc("MCSWARadixCache", "SWARadixCacheWindow3", tmp_path, "-coverage", "1")

        assert run.returncode == Exit.HOLDS, run.stdout
        assert all(fired(run).values()), fired(run)
        assert distinct_states(run) >= 900

    @pytest.mark.parametrize("config", reach_configurations("SWARadixCache"))
    def test_reaches(self, config: str, tmp_path: Path) -> None:
        run = tlc("MCSWARadixCache", config, tmp_path)

        assert_reached(config, run)

    @clause("SWARADIX-9", "CACHE-12")
    def test_a_lock_is_not_sought_again(self, tmp_path: Path) -> None:
        """The last live pages of a path are not those that were locked, once one is a tombstone."""
        run = tlc("MCSWARadixCache", "SWARadixCacheBugUnlocksByState", tmp_path)

        assert_broken("SWARADIX_9_WindowLocksAreReceipts", run)

    @clause("SWARADIX-15")
    def test_eviction_heeds_window_locks(self, tmp_path: Path) -> None:
        run = tlc("MCSWARadixCache", "SWARadixCacheBugIgnoresWindowLocks", tmp_path)

        assert_broken("SWARADIX_15_WindowLockedStays", run)

    @pytest.mark.parametrize("name", FAULTS_OF_THE_CACHE)
    def test_a_fault_breaks_the_law(self, name: str, tmp_path: Path) -> None:
        fault = FAULTS_OF_THE_CACHE[name]
        faulty = mutated(fault.module, fault.old, fault.new, tmp_path)

        run = tlc("MCSWARadixCache", "SWARadixCache", tmp_path, folder=faulty)

        assert_broken(fault.breaks, run)


class TestSWAKvSystemModel:
    """Two requests over the cache and the two pools, and a caller without a row."""

    impl = MODEL

    @clause("CACHE-1", "CACHE-2", "CACHE-3", "CACHE-4", "CACHE-19", "SWA-1", "SWA-2", "SWA-4")
    @clause("SWARADIX-7", "SWARADIX-8", "SWARADIX-11", "SWARADIX-15", "SWARADIX-18")
    def test_holds(self, tmp_path: Path) -> None:
        run = tlc("MCSWAKvSystem", "SWAKvSystem", tmp_path)

        assert run.returncode == Exit.HOLDS, run.stdout
        assert distinct_states(run) >= 5_500

    @clause("CACHE-1", "CACHE-2", "CACHE-3", "CACHE-4", "CACHE-19", "SWA-1", "SWA-2", "SWA-4")
    @clause("SWARADIX-1", "SWARADIX-7", "SWARADIX-8", "SWARADIX-11", "SWARADIX-15", "SWARADIX-18")
    def test_a_window_of_three_holds_and_every_action_fires(self, tmp_path: Path) -> None:
        run = tlc("MCSWAKvSystem", "SWAKvSystemWindow3", tmp_path, "-coverage", "1")

        assert run.returncode == Exit.HOLDS, run.stdout
        assert all(fired(run).values()), fired(run)
        assert distinct_states(run) >= 5_100

    @pytest.mark.parametrize("config", reach_configurations("SWAKvSystem"))
    def test_reaches(self, config: str, tmp_path: Path) -> None:
        run = tlc("MCSWAKvSystem", config, tmp_path)

        assert_reached(config, run)

    @clause("SWARADIX-5", "SWARADIX-18")
    def test_a_revived_page_stays_the_same(self, tmp_path: Path) -> None:
        """Taking the caller's full page frees one that another request's row names."""
        run = tlc("MCSWAKvSystem", "SWAKvSystemBugTakesFullPage", tmp_path)

        assert_broken("CACHE_1_NoDanglingRow", run)

    @clause("SWARADIX-15", "SWARADIX-18")
    def test_eviction_heeds_window_locks(self, tmp_path: Path) -> None:
        run = tlc("MCSWAKvSystem", "SWAKvSystemBugIgnoresWindowLocks", tmp_path)

        assert_broken("SWARADIX_18_WindowKept", run)

    @clause("SWARADIX-11", "SWARADIX-18")
    def test_a_lock_asks_for_the_window(self, tmp_path: Path) -> None:
        """After a match eviction takes pairs from the root on: the last page says nothing."""
        run = tlc("MCSWAKvSystem", "SWAKvSystemBugAsksForLastPage", tmp_path)

        assert_broken("SWARADIX_18_WindowKept", run)

    @clause("CACHE-19")
    def test_a_request_keeps_a_window(self, tmp_path: Path) -> None:
        """What the next page needs is less: it could not be found again once it is cached."""
        run = tlc("MCSWAKvSystem", "SWAKvSystemBugKeepsWhatIsRead", tmp_path)

        assert_broken("SWARADIX_1_CachedIsFound", run)

    @clause("SWA-2", "SWA-8")
    def test_a_page_given_back_has_no_pair(self, tmp_path: Path) -> None:
        """One that keeps it names a window page that is soon another's."""
        run = tlc("MCSWAKvSystem", "SWAKvSystemBugStalePair", tmp_path)

        assert_broken("SWA_2_PairsAreHeld", run)

    @pytest.mark.parametrize("name", FAULTS_OF_THE_SYSTEM)
    def test_a_fault_breaks_the_law(self, name: str, tmp_path: Path) -> None:
        fault = FAULTS_OF_THE_SYSTEM[name]
        faulty = mutated(fault.module, fault.old, fault.new, tmp_path)

        run = tlc("MCSWAKvSystem", "SWAKvSystem", tmp_path, folder=faulty)

        assert_broken(fault.breaks, run)
