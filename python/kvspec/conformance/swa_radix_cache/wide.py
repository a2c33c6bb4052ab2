"""The clauses RADIX that hold with windows too, by the tests of the radix cache.

With a window that is wider than any key there is never a tombstone, and what is left is the radix
cache at page granularity under lru.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from kvspec.conformance.prefix_cache.system import WIDE, System
from kvspec.conformance.radix_cache import RadixCacheConformance
from kvspec.interfaces.prefix_cache import CacheView
from kvspec.interfaces.swa_radix_cache import SWARadixCache

__all__ = ["WideConformance"]

KEPT = frozenset(f"RADIX-{n}" for n in (2, 3, 4, 5, 6, 7, 11, 15, 16, 17, 18))
CASES = {"granularity": "page", "policy": "lru"}
"""What a test is given where it asks for one of these."""


class WideCache:
    """A cache with windows, with the options of the radix cache that it is."""

    eviction_policy, eviction_granularity = "lru", "page"

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def evict(self, num_tokens: int) -> int:
        """What goes, goes from both pools."""
        result = self._cache.evict(num_tokens)
        assert result.full_num_tokens == result.swa_num_tokens
        evicted: int = result.full_num_tokens
        return evicted

    def view(self) -> CacheView:
        """Nothing is a tombstone, and a window lock is on all that its lock is on."""
        view = self._cache.view()
        assert not any(page.tombstone for page in view.pages.values())
        assert all(page.swa_locks == page.locks for page in view.pages.values())
        pages = {path: page._replace(swa_locks=0) for path, page in view.pages.items()}
        return CacheView(view.granularity, pages, view.receipts)


class WideConformance(RadixCacheConformance):
    """The tests of the clauses kept: the others are taken out below."""

    def tree(self, **options: Any) -> System:
        """A cache with windows that reach everywhere, all its slots in the test's hand."""
        given = {name: value for name, value in options.items() if "eviction" not in name}
        system = super().tree(kind="swaradix", **given)
        system.cache = WideCache(system.cache)
        return system

    def alone(self, page_size: int, **options: str) -> Any:
        """The same without pools."""
        cache = self.subject(
            "SWARadixCache",
            SWARadixCache,
            "swa_radix_cache",
            "prefix_cache",
            req_to_token_pool=None,
            token_to_kv_pool_allocator=None,
            sliding_window_size=WIDE,
            page_size=page_size,
            disable=False,
        )
        return WideCache(cache)


def _narrowed(test: Callable[..., None]) -> Callable[..., None] | None:
    """The test with the clauses and the cases that are kept, None if that is no clause."""
    marks: list[pytest.Mark] = getattr(test, "pytestmark", [])
    ids = [id_ for mark in marks if mark.name == "clause" for id_ in mark.args if id_ in KEPT]
    if not ids:
        return None

    @functools.wraps(test)
    def run(self: WideConformance, **case: Any) -> None:
        test(self, **case)

    kept = [pytest.mark.clause(*ids).mark]
    for mark in marks:
        if mark.name == "parametrize":
            name, values = mark.args
            one = CASES.get(name)
            kept.append(pytest.mark.parametrize(name, [one] if one else values).mark)
    vars(run)["pytestmark"] = kept
    return run


for _name, _test in inspect.getmembers(RadixCacheConformance, inspect.isfunction):
    if _name.startswith("test_"):
        setattr(WideConformance, _name, _narrowed(_test))
