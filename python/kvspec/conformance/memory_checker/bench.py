"""Pools, a tree and running requests, in which the suites plant faults."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from kvspec.conformance.suite import Conformance
from kvspec.conformance.watch import watch_function
from kvspec.errors import MemoryLeakError
from kvspec.memory_checker import (
    Report,
    check_memory,
    find_faults,
    get_swa_token_info,
    report_of,
)
from kvspec.memory_checker.self_test import self_test
from kvspec.replay import Request

__all__ = [
    "PAGE",
    "PAGES",
    "WINDOW",
    "Bench",
    "CheckerConformance",
    "Doctored",
    "Sealed",
    "WindowBench",
    "WindowChunkBench",
    "only",
]

PAGE = 4
PAGES = 8
WINDOW_PAGES = 6
WINDOW = 6
"""Tokens: the last two pages of a path."""


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (check_memory, find_faults, get_swa_token_info, report_of, self_test)
}


class Bench:
    """A pool of 8 pages of 4 slots and 3 rows, a tree over it, and the requests that run."""

    def __init__(self, impl: Any, check: Callable[..., None]) -> None:
        self.rows = impl.ReqToTokenPool(
            size=3, max_context_len=32, device="cpu", enable_memory_saver=False
        )
        self.allocator = self.make_allocator(
            impl, dtype=torch.float16, device="cpu", kvcache=None, need_sort=False
        )
        self.cache = self.make_cache(
            impl, req_to_token_pool=self.rows, token_to_kv_pool_allocator=self.allocator
        )
        self.reqs: list[Request] = []
        self._check = check

    def make_allocator(self, impl: Any, **memory: Any) -> Any:
        return impl.PagedTokenToKVPoolAllocator(size=PAGES * PAGE + 1, page_size=PAGE, **memory)

    def make_cache(self, impl: Any, **pools: Any) -> Any:
        return impl.RadixCache(
            **pools,
            page_size=PAGE,
            disable=False,
            enable_kv_cache_events=False,
            eviction_policy="lru",
            eviction_granularity="page",
        )

    def check(self, level: str = "sets", reserved: Sequence[int] = ()) -> None:
        self._check(
            self.allocator,
            self.rows,
            self.cache,
            reqs=self.reqs,
            reserved=reserved,
            level=level,
        )

    def passes(self, level: str = "sets", reserved: Sequence[int] = ()) -> None:
        """Every page has one owner, and the checker says so."""
        try:
            self.check(level, reserved)
        except ValueError as error:
            pytest.fail(f"a leak is reported where there is none: {error}")

    def faults(self, reserved: Sequence[int] = ()) -> list[str]:
        """The lines of the report: there must be one."""
        with pytest.raises(MemoryLeakError) as caught:
            self.check("sets", reserved)
        return str(caught.value).splitlines()

    def reports(self, level: str = "sets", reserved: Sequence[int] = ()) -> list[Report]:
        """What the error has for a program: there must be one."""
        with pytest.raises(MemoryLeakError) as caught:
            self.check(level, reserved)
        reports = caught.value.reports
        text = "\n".join(map(str, reports))
        assert str(caught.value) == text, "CHECK-13: the text and the reports differ"
        return [*reports]

    def start(self, tokens: Sequence[int]) -> Request:
        """Admit a request: match, lock, and slots for what is new."""
        match = self.cache.match_prefix(tokens)
        node = match.last_device_node
        receipt = None if node is None else self.cache.inc_lock_ref(node)
        prefix = len(match.device_indices)
        (row,) = self.rows.alloc(1)
        last = int(match.device_indices[-1]) if prefix else -1
        new = len(tokens) - prefix
        slots = self.allocator.alloc_extend([prefix], [len(tokens)], [last], new)
        self.rows.write((row, slice(0, prefix)), match.device_indices)
        self.rows.write((row, slice(prefix, len(tokens))), slots)
        req = Request(tokens, row, match.device_indices, node, receipt, prefix)
        self.reqs.append(req)
        return req

    def finish(self, req: Request) -> None:
        self.cache.cache_finished_req(req)
        self.reqs.remove(req)

    def busy(self) -> Request:
        """Pages 1 and 2 in the tree, 1 locked by the request in row 1, which owns page 3 alone."""
        self.finish(self.start([1, 2, 3, 4, 5, 6, 7, 8]))
        return self.start([1, 2, 3, 4, 9, 9])


class WindowBench(Bench):
    """The same with a pool of 6 window pages, and a tree whose windows have 6 tokens."""

    def make_allocator(self, impl: Any, **memory: Any) -> Any:
        return impl.SWATokenToKVPoolAllocator(
            size=PAGES * PAGE + 1, size_swa=WINDOW_PAGES * PAGE + 3, page_size=PAGE, **memory
        )

    def make_cache(self, impl: Any, **pools: Any) -> Any:
        return impl.SWARadixCache(**pools, sliding_window_size=WINDOW, page_size=PAGE)

    def advance(self, req: Request, count: int) -> None:
        """Compute `count` tokens more, and give back what has left the window."""
        length = self.rows.row_length(req.req_pool_idx)
        last = int(self.rows.row(req.req_pool_idx)[-1])
        slots = self.allocator.alloc_extend([length], [length + count], [last], count)
        self.rows.write((req.req_pool_idx, slice(length, length + count)), slots)
        req.output_ids = [*req.output_ids, *range(20, 20 + count)]
        self.leave(req, length + count)

    def leave(self, req: Request, prelen: int) -> None:
        """A tree knows its window."""
        self.cache.evict_swa(req, prelen)


class WindowChunkBench(WindowBench):
    """The same without a tree."""

    def make_cache(self, impl: Any, **pools: Any) -> Any:
        return impl.SWAChunkCache(**pools, page_size=PAGE)

    def leave(self, req: Request, prelen: int) -> None:
        self.cache.evict_swa(req, prelen, sliding_window_size=WINDOW)


def only(reports: Sequence[Report]) -> Report:
    """The one that there is."""
    assert len(reports) == 1, f"not one report, but {[str(report) for report in reports]}"
    return reports[0]


class Doctored:
    """An allocator or a cache whose view is not what it is."""

    def __init__(self, subject: Any, **changes: Any) -> None:
        self._subject, self._changes = subject, changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)

    def view(self) -> Any:
        return self._subject.view()._replace(**self._changes)


class Sealed:
    """Lets the sizes of an object be read, and nothing that costs O(pool)."""

    def __init__(self, subject: Any) -> None:
        self._subject = subject

    def __getattr__(self, name: str) -> Any:
        assert name in {
            "size",
            "size_swa",
            "page_size",
            "req_to_token",
            "available_size",
            "pending_size",
            "evictable_size",
            "protected_size",
            "row_length",
        }, f"CHECK-8: {name} is read"
        return getattr(self._subject, name)


class CheckerConformance(Conformance):
    """What the suites have: benches of the implementation, and functions that are watched."""

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the room, watched; what an implementation has of its own is taken."""
        given = getattr(self.impl, name, None)
        function = given if inspect.isfunction(given) else FUNCTIONS[name]
        return watch_function(self.impl_name, function, "memory_checker")

    def bench(self) -> Bench:
        return Bench(self.impl, self.function("check_memory"))

    def windows(self, kind: type[WindowBench] = WindowBench) -> WindowBench:
        return kind(self.impl, self.function("check_memory"))
