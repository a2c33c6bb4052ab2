"""The self-test sees what is planted, and says so if a checker does not. Spec: CHECK-22."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.memory_checker.bench import CheckerConformance
from kvspec.conformance.suite import MUTANT
from kvspec.errors import MemoryLeakError
from kvspec.memory_checker import check_memory, raise_faults
from kvspec.memory_checker.self_test import NOTHING, PLANTS, SelfTestResult, Setting, settings

__all__ = ["SelfTestConformance"]

_known: dict[tuple[object, ...], list[SelfTestResult]] = {}
"""A self-test takes a second, and says the same as long as it is the same."""


def _few() -> list[Setting]:
    """Every allocator under every cache: one that is at rest, and one in the middle of it all."""
    return [each for each in _many() if each.busy == each.group]


def _many() -> list[Setting]:
    """Every allocator under every cache, idle and busy, inside a free group and not."""
    return [each for each in settings() if each.need_sort == each.group]


def _blind(*pools: Any, **options: Any) -> None:
    """Sees nothing."""


def _muddled(*pools: Any, **options: Any) -> None:
    """Takes a leak for an alias, and all else for a leak."""
    try:
        check_memory(*pools, **options)
    except MemoryLeakError as error:
        raise_faults(
            [replace(r, kind="alias" if r.kind == "leak" else "leak") for r in error.reports]
        )


def _misled(*pools: Any, **options: Any) -> None:
    """Names the page after the one."""
    try:
        check_memory(*pools, **options)
    except MemoryLeakError as error:
        raise_faults([replace(r, page=(r.page or 0) + 1) for r in error.reports])


class SelfTestConformance(CheckerConformance):
    """`impl` may hold a `self_test` of its own."""

    def results(self, level: str, check: Callable[..., None] | None = None) -> list[SelfTestResult]:
        """Of the self-test: of many settings, of few if there is a ledger or another check."""
        key = self.impl_name, getattr(self.impl, "self_test", None), level, check
        if key not in _known:
            slow = level == "ledger" or check is not None or self.impl_name == MUTANT
            among = _few() if slow else _many()
            options = {} if check is None else {"check": check}
            self_test = self.function("self_test")
            _known[key] = self_test(self.impl, levels=(level,), among=among, **options)
        return _known[key]

    @clause("CHECK-22")
    @pytest.mark.parametrize("level", ["counts", "sets", "ledger"])
    def test_whatever_is_planted_is_seen_as_what_it_is(self, level: str) -> None:
        results = self.results(level)
        missed = [result for result in results if not result.seen]
        assert not missed
        planted = {
            (result.allocator, result.page_size, result.cache, result.planted) for result in results
        }
        for each in _few():
            for kind, plant in PLANTS.items():
                exists = plant.exists(each) and (plant.shown_by_sums or level != "counts")
                place = (each.allocator, each.page_size, each.named_cache, kind)
                assert place in planted or not exists, f"CHECK-22: {place} is not planted"

    @clause("CHECK-22")
    def test_every_result_has_its_page(self) -> None:
        for result in self.results("sets"):
            assert (result.page is None) == (result.planted == NOTHING)
            named = (f"{result.planted}, page {result.page}",)
            assert result.found == () if result.page is None else {*named} <= {*result.found}

    @clause("CHECK-22")
    @pytest.mark.parametrize("check", [_blind, _muddled, _misled])
    def test_a_checker_that_is_wrong_is_found_out(self, check: Callable[..., None]) -> None:
        for result in self.results("sets", check):
            assert result.seen == (result.planted == NOTHING)
