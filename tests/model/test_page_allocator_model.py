"""The model of the page allocator: it holds, it is not vacuous, and it is a pool."""

from pathlib import Path

import pytest

from kvspec.conformance import clause
from model.tlc import MODEL, Exit, assert_reached, fired, mutated, reach_configurations, tlc


class TestPageAllocatorModel:
    impl = MODEL

    @clause("PAGE-1", "PAGE-2", "PAGE-11", "PAGE-14", "PAGE-15", "PAGE-16")
    @pytest.mark.parametrize("config", ["PageAllocator", "PageAllocatorSorted"])
    def test_holds_and_every_action_fires(self, config: str, tmp_path: Path) -> None:
        run = tlc("MCPageAllocator", config, tmp_path, "-coverage", "1")

        assert run.returncode == Exit.HOLDS, run.stdout
        assert all(fired(run).values()), fired(run)

    @pytest.mark.parametrize("config", reach_configurations("PageAllocator"))
    def test_reaches(self, config: str, tmp_path: Path) -> None:
        run = tlc("MCPageAllocator", config, tmp_path)

        assert_reached(config, run)

    @clause("PAGE-11")
    def test_pending_pages_drain_if_groups_end(self, tmp_path: Path) -> None:
        unfair = mutated(
            "PageAllocator", "[][Next]_vars /\\ WF_vars(GroupEnd)", "[][Next]_vars", tmp_path
        )

        run = tlc("MCPageAllocator", "PageAllocatorDrains", tmp_path)
        without = tlc("MCPageAllocator", "PageAllocatorDrains", tmp_path, folder=unfair)

        assert run.returncode == Exit.HOLDS, run.stdout
        assert without.returncode == Exit.PROPERTY_VIOLATED, without.stdout

    @clause("PAGE-4", "PAGE-11")
    @pytest.mark.parametrize("config", ["PageAllocatorRefines", "PageAllocatorSortedRefines"])
    def test_refines_a_pool(self, config: str, tmp_path: Path) -> None:
        run = tlc("MCPageAllocator", config, tmp_path)

        assert run.returncode == Exit.HOLDS, run.stdout

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            pytest.param("(from, n + 1, Len(from))", "(from, n, Len(from))", id="steals"),
            pytest.param("held' = held \\ S", "held' = held", id="keeps_what_it_freed"),
            pytest.param("held' = held \\ S", "held' = {}", id="frees_what_is_not_named"),
        ],
    )
    def test_a_thief_is_no_pool(self, old: str, new: str, tmp_path: Path) -> None:
        thief = mutated("PageAllocator", old, new, tmp_path)

        run = tlc("MCPageAllocator", "PageAllocatorRefines", tmp_path, folder=thief)

        assert run.returncode == Exit.PROPERTY_VIOLATED, run.stdout
