"""Page allocator and radix cache have the state graph of their models, edge for edge."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import pytest

import kvspec.oracle
from kvspec.conformance import clause
from kvspec.oracle import PagedTokenToKVPoolAllocator, RadixCache
from model import page_client, radix_client
from model.faults import HANDLES, LOCKS, MERGES, ORDER, RECENCY, TICKETS
from model.graph import Graph, State, difference
from model.page_client import PageClient
from model.radix_client import RadixClient
from model.tlc import dump


class Viewed(NamedTuple):
    """A model's graph in the terms of the implementation's view."""

    state_count: int
    first: Hashable
    edges: set[tuple[Hashable, str, Hashable]]

    @property
    def actions(self) -> set[str]:
        return {action for _, action, _ in self.edges}


def viewed(graph: Graph, view: Callable[[State], Hashable]) -> Viewed:
    return Viewed(len(graph.states), *graph.viewed(view))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    graph = dump("MCPageAllocator", "PageAllocator", tmp_path_factory.mktemp("plain"))
    return viewed(graph, page_client.model_view)


@pytest.fixture(scope="module")
def need_sort(tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    graph = dump("MCPageAllocator", "PageAllocatorSorted", tmp_path_factory.mktemp("sorted"))
    return viewed(graph, page_client.model_view)


@pytest.fixture(scope="module")
def radix(tmp_path_factory: pytest.TempPathFactory) -> Viewed:
    graph = dump("MCRadixCache", "RadixCacheGraph", tmp_path_factory.mktemp("radix"))
    return viewed(graph, radix_client.model_view)


class TestPageAllocator:
    """Four pages, every call that changes the allocator or is refused by it."""

    impl = kvspec.oracle

    def difference(self, make: Callable[..., Any], graph: Viewed, need_sort: bool) -> str | None:
        client = PageClient(make, page_count=4, need_sort=need_sort)
        return difference(client, graph.first, graph.edges)

    @clause("PAGE-1", "PAGE-3", "PAGE-4", "PAGE-9", "PAGE-10", "PAGE-11", "PAGE-12", "PAGE-13")
    @clause("PAGE-14", "PAGE-15", "PAGE-16")
    def test_same_graph(self, plain: Viewed) -> None:
        assert self.difference(PagedTokenToKVPoolAllocator, plain, need_sort=False) is None

    @clause("PAGE-1", "PAGE-3", "PAGE-4", "PAGE-9", "PAGE-10", "PAGE-11", "PAGE-12", "PAGE-13")
    @clause("PAGE-14", "PAGE-15", "PAGE-16")
    def test_same_graph_under_need_sort(self, need_sort: Viewed) -> None:
        assert self.difference(PagedTokenToKVPoolAllocator, need_sort, need_sort=True) is None

    def test_the_scope_means_something(self, plain: Viewed, need_sort: Viewed) -> None:
        allocs = {"Alloc", "AllocExtend", "AllocDecode", "AllocWithin", "AllocRefused"}
        groups = {"GroupBegin", "GroupEnd", "BeginRefused", "EndRefused"}
        tickets = {"Backup", "Restore", "RestoreRefused"}
        every = allocs | groups | tickets | {"Free", "FreeRefused", "Clear"}
        assert plain.actions == need_sort.actions == every
        assert plain.state_count > 1_000
        assert need_sort.state_count > 2_000

    @pytest.mark.parametrize("fault", [*ORDER, *TICKETS])
    def test_a_fault_breaks_the_equality(self, fault: str, plain: Viewed) -> None:
        assert self.difference({**ORDER, **TICKETS}[fault], plain, need_sort=False)

    @pytest.mark.parametrize("fault", MERGES)
    def test_a_fault_of_need_sort_breaks_the_equality(self, fault: str, need_sort: Viewed) -> None:
        assert self.difference(MERGES[fault], need_sort, need_sort=True)


class TestRadixCache:
    """Three pages, two symbols, depth two, two open receipts; eviction of pages, under lru."""

    impl = kvspec.oracle

    @clause("RADIX-1", "RADIX-3", "RADIX-4", "RADIX-5", "RADIX-6", "RADIX-8", "RADIX-10")
    @clause("RADIX-11", "RADIX-13", "CACHE-8", "CACHE-9", "CACHE-11", "CACHE-12", "CACHE-13")
    @clause("CACHE-14", "CACHE-15", "CACHE-16")
    def test_same_graph(self, radix: Viewed) -> None:
        assert difference(RadixClient(RadixCache), radix.first, radix.edges) is None

    def test_the_scope_means_something(self, radix: Viewed) -> None:
        assert radix.actions == {
            *("Match", "Peek", "InsertComputed", "InsertMatched", "Evict"),
            *("Lock", "LockRefused", "Unlock", "UnlockNode", "UnlockRefused", "SpentRefused"),
            *("Reset", "ResetRefused"),
        }
        assert 1_500 < radix.state_count < 5_000

    @pytest.mark.parametrize("fault", [*LOCKS, *RECENCY, *HANDLES])
    def test_a_fault_breaks_the_equality(self, fault: str, radix: Viewed) -> None:
        make = {**LOCKS, **RECENCY, **HANDLES}[fault]
        assert difference(RadixClient(make), radix.first, radix.edges)
