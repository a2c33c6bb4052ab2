"""What a radix cache gives back, and in which order. Spec: RADIX-8 to RADIX-13."""

import math

import pytest

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import ABC, System, refused
from kvspec.conformance.radix_cache.paths import POLICIES, TreeConformance

__all__ = ["EvictionConformance"]


class EvictionConformance(TreeConformance):
    """Evict, at both granularities and under every policy."""

    def victims(self, system: System, token_count: int = 99) -> list[int]:
        """The pages that `evict` takes one by one, in order."""
        order: list[int] = []
        while system.cache.total_size() and len(order) < token_count:
            before = {page.page for page in system.cache.view().pages.values()}
            assert system.cache.evict(system.page_size) == system.page_size
            (gone,) = before - {page.page for page in system.cache.view().pages.values()}
            order.append(gone)
        return order

    @clause("RADIX-8")
    @pytest.mark.parametrize("page_size", [1, 4])
    @pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 12, 13, 99])
    def test_evict_takes_as_many_pages_as_are_asked_for(self, page_size: int, tokens: int) -> None:
        system = self.tree(page_size=page_size)
        key = list(range(4 * page_size))
        locked = system.insert(key[:page_size], 1).last_device_node
        system.cache.inc_lock_ref(locked)
        system.insert(key, 1, 2, 3, 4)

        evicted = system.cache.evict(tokens)

        pages = min(math.ceil(tokens / page_size), 3)
        assert evicted == pages * page_size
        assert system.held_along(key) == system.slots(1, 2, 3, 4)[: (4 - pages) * page_size]

    @clause("RADIX-8")
    def test_leaf_is_trimmed_page_by_page_and_grows_again(self) -> None:
        system = self.tree(page_size=4)
        system.insert(ABC, 1, 2, 3)
        assert self.victims(system, 2) == [3, 2]
        system.insert(ABC, 1, 8, 9)
        assert system.held_along(ABC) == system.slots(1, 8, 9)

    @clause("RADIX-8")
    def test_locked_leaf_does_not_stop_an_eviction(self) -> None:
        system = self.tree()
        for page in (1, 2, 3):
            node = system.insert([page], page).last_device_node
            if page != 2:
                system.cache.inc_lock_ref(node)
        assert system.cache.evict(2) == 1
        assert system.held_along([2]) == []

    @clause("RADIX-9")
    @pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7])
    def test_whole_runs_go_at_node_granularity(self, tokens: int) -> None:
        system = self.tree(eviction_granularity="node")
        system.insert([1, 2, 3, 4], 1, 2, 3, 4)
        system.cache.match_prefix([1, 2, 8])
        system.insert([1, 2, 3, 5], 1, 2, 3, 5)
        evicted = system.cache.evict(tokens)
        assert evicted == {1: 1, 2: 2, 3: 3}.get(tokens, 5)
        left = {5: 0, 3: 2, 2: 3, 1: 4}[evicted]
        assert system.cache.total_size() == left

    @clause("RADIX-9")
    @pytest.mark.parametrize("cut", [0, 1, 2, 3])
    def test_match_inside_a_run_cuts_it(self, cut: int) -> None:
        system = self.tree(eviction_granularity="node", eviction_policy="fifo")
        system.insert([1, 2, 3, 4], 1, 2, 3, 4)
        system.cache.match_prefix([1, 2, 3, 4][:cut])
        assert system.cache.evict(1) == 4 - cut
        assert system.cache.evict(1) == cut

    @clause("RADIX-9")
    def test_insert_that_leaves_a_run_cuts_it(self) -> None:
        system = self.tree(eviction_granularity="node", eviction_policy="filo")
        system.insert([1, 2, 3, 4], 1, 2, 3, 4)
        system.insert([1, 2, 7, 8], 1, 2, 7, 8)
        assert system.cache.evict(1) == 2
        assert system.held_along([1, 2, 7]) == [1, 2]
        assert system.cache.evict(1) == 2
        assert system.held_along([1, 2, 3]) == [1, 2]
        assert system.cache.evict(1) == 2

    @clause("RADIX-10")
    @pytest.mark.parametrize("granularity", ["page", "node"])
    def test_evicted_slots_come_back_in_order_of_eviction(self, granularity: str) -> None:
        system = self.tree(eviction_granularity=granularity, spy=True)
        system.insert([1, 2], 7, 3)
        system.insert([5], 9)
        system.insert([1, 4], 7, 6)
        system.cache.match_prefix([1, 2])

        assert system.cache.evict(3) == 3

        assert system.allocator.frees == [[9, 6, 3]]
        assert system.allocator.available_size() == 3

    @clause("RADIX-10")
    @pytest.mark.parametrize("page_size", [2, 4])
    def test_exactly_the_evicted_pages_come_back(self, page_size: int) -> None:
        system = self.tree(page_size=page_size, spy=True)
        key = list(range(4 * page_size))
        system.insert(key, 5, 2, 8, 3)

        assert system.cache.evict(3 * page_size - 1) == 3 * page_size

        frees = [{slot // page_size for slot in freed} for freed in system.allocator.frees]
        assert frees == [{2, 3, 8}]
        assert system.cache.evict(0) == 0
        assert len(system.allocator.frees) == 1

    @clause("RADIX-11")
    @pytest.mark.parametrize("granularity", ["page", "node"])
    @pytest.mark.parametrize("policy", POLICIES)
    def test_locked_page_stays(self, granularity: str, policy: str) -> None:
        system = self.tree(eviction_granularity=granularity, eviction_policy=policy)
        node = system.insert([1, 2, 3], 1, 2, 3).last_device_node
        system.cache.inc_lock_ref(node)
        system.insert([1, 2, 3, 4], 1, 2, 3, 4)
        system.insert([1, 2, 8], 1, 2, 8)
        middle = system.cache.inc_lock_ref(system.cache.match_prefix([1, 2]).last_device_node)
        system.insert([9], 9)
        assert system.cache.evict(99) == 3
        system.cache.dec_lock_ref(middle)
        assert system.cache.evict(99) == 0
        assert system.held_along([1, 2, 3]) == [1, 2, 3]

    @clause("RADIX-12")
    @pytest.mark.parametrize("tokens", [-1, -100])
    def test_negative_amount_is_refused(self, tokens: int) -> None:
        system = self.tree()
        system.insert([1, 2], 1, 2)
        refused(system, "RADIX-12", system.cache.evict, tokens)

    @clause("RADIX-13")
    @pytest.mark.parametrize(
        ("policy", "order"),
        [
            ("lru", [3, 2, 5, 1, 4]),
            ("mru", [4, 1, 5, 2, 3]),
            ("fifo", [1, 2, 3, 4, 5]),
            ("filo", [5, 4, 3, 2, 1]),
            ("lfu", [3, 5, 4, 2, 1]),
            ("slru", [3, 5, 2, 1, 4]),
            ("priority", [3, 1, 4, 2, 5]),
        ],
    )
    def test_order_of_eviction(self, policy: str, order: list[int]) -> None:
        """Ages after it all, oldest first: 3, 2, 5, 1, 4; hits 3, 2, 0, 1, 0."""
        system = self.tree(eviction_policy=policy)
        for page, priority in enumerate([0, 1, 0, 0, 2], 1):
            system.insert([page], page, priority=priority)
        for key in (1, 1, 2, 2):
            system.cache.match_prefix([key])
        system.insert([5], 5)
        for key in (1, 4):
            system.cache.match_prefix([key])
        assert self.victims(system) == order

    @clause("RADIX-13")
    @pytest.mark.parametrize(
        ("policy", "order"),
        [
            ("lru", [2, 3, 1]),
            ("lfu", [3, 2, 1]),
            ("slru", [3, 2, 1]),
            ("priority", [2, 3, 1]),
            ("fifo", [2, 3, 1]),
            ("mru", [2, 3, 1]),
            ("filo", [3, 2, 1]),
        ],
    )
    def test_pages_walked_by_one_operation_go_leaves_first(
        self, policy: str, order: list[int]
    ) -> None:
        """Page 2 was born before page 3; both hang under page 1."""
        system = self.tree(eviction_policy=policy)
        system.insert([1, 2], 1, 2)
        system.insert([1, 3], 1, 3)
        system.cache.match_prefix([1, 2])
        if policy in ("lru", "priority"):
            system.cache.match_prefix([1, 3])
        if policy == "mru":
            system.cache.match_prefix([1, 2])
        assert self.victims(system) == order

    @clause("RADIX-13")
    def test_eviction_depends_on_the_calls_alone(self) -> None:
        """Two caches that saw the same calls evict the same, whatever the slots are."""
        orders = []
        for pages in (range(1, 13), range(30, 18, -1)):
            system = self.tree(eviction_policy="lru")
            left = list(pages)
            for key in ([1, 2], [1, 3], [4], [5, 6, 7], [1, 2, 8], [9]):
                held = system.held_along(key)
                new = [left.pop(0) for _ in key[len(held) :]]
                system.cache.insert(key, [*held, *new])
            system.cache.match_prefix([5, 6])
            numbered = list(pages)
            orders.append([numbered.index(page) for page in self.victims(system)])
        assert orders[0] == orders[1]
