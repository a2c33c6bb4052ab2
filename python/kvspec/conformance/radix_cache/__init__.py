"""Conformance of the radix cache. Spec: RADIX."""

import io
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

import pytest
from hypothesis.stateful import run_state_machine_as_test

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import numbers
from kvspec.conformance.radix_cache.contents import ContentConformance
from kvspec.conformance.radix_cache.eviction import EvictionConformance
from kvspec.conformance.radix_cache.paths import POLICIES, Tree
from kvspec.conformance.suite import fuzzing
from kvspec.errors import ContractError

__all__ = ["RadixCacheConformance"]


class RadixCacheConformance(ContentConformance, EvictionConformance):
    """The clauses RADIX."""

    @clause(
        *("RADIX-1", "RADIX-2", "RADIX-3", "RADIX-4", "RADIX-5", "RADIX-6", "RADIX-7", "RADIX-8"),
        *("RADIX-9", "RADIX-11", "RADIX-13", "RADIX-16"),
    )
    def test_random_trees_are_what_the_clauses_say(self) -> None:
        run_state_machine_as_test(Tree.of(self), settings=fuzzing(15))

    @clause("RADIX-14")
    @pytest.mark.parametrize(
        "options",
        [
            {"eviction_policy": "clock"},
            {"eviction_policy": ""},
            {"eviction_granularity": "token"},
            {"eviction_policy": "LRU"},
        ],
    )
    def test_unknown_option_is_refused(self, options: dict[str, str]) -> None:
        with pytest.raises(ContractError) as caught:
            self.tree(**options)
        assert caught.value.clause == "RADIX-14"

    @clause("RADIX-14")
    @pytest.mark.parametrize("policy", POLICIES)
    def test_known_options_are_kept(self, policy: str) -> None:
        cache = self.tree(eviction_policy=policy, eviction_granularity="node").cache
        assert (cache.eviction_policy, cache.eviction_granularity) == (policy, "node")

    # Cost and reading

    @clause("RADIX-15")
    def test_work_does_not_grow_with_the_tree(self) -> None:
        costs = []
        for width in (8, 16, 32):
            system = self.tree(page_size=4, page_count=2 * width)
            for index in range(width):
                system.insert([index] * 8, 2 * index + 1, 2 * index + 2)
            before = system.cache.counters()["tokens_compared"]
            system.cache.match_prefix([width // 2] * 8)
            system.held_along([width // 2] * 8)
            system.insert([width // 2] * 8, width + 1, width + 2)
            costs.append(system.cache.counters()["tokens_compared"] - before)
            assert system.cache.evict(4 * width) == 4 * width
            assert system.cache.counters()["heap_moves"] <= 8 * width * math.log2(2 * width)
            assert 0 < system.cache.counters()["leaves_evicted"] <= width
        assert costs[0] == costs[1] == costs[2] <= 3 * 8

    @clause("RADIX-16")
    @pytest.mark.parametrize("granularity", ["page", "node"])
    def test_check_finds_nothing_in_a_sound_tree(self, granularity: str) -> None:
        system = self.tree(eviction_granularity=granularity)
        steps: Sequence[Callable[[], Any]] = (
            lambda: system.insert([1, 2, 3], 1, 2, 3),
            lambda: system.cache.inc_lock_ref(system.cache.match_prefix([1, 2]).last_device_node),
            lambda: system.insert([1, 2, 5], 7, 8, 5, extra_key="a"),
            lambda: system.cache.evict(1),
            lambda: system.cache.evict(99),
            lambda: system.cache.inc_lock_ref(system.cache.match_prefix([8]).last_device_node),
        )
        for step in steps:
            step()
            system.cache.check()
        assert system.cache.total_size() == 2

    @clause("RADIX-17")
    def test_digest_is_that_of_the_calls_and_not_of_the_slots(self) -> None:
        first, second = self.tree(), self.tree()
        for system, shift in ((first, 0), (second, 10)):
            system.insert([1, 2, 3], *range(1 + shift, 4 + shift))
            system.insert([1, 2, 4], *range(1 + shift, 3 + shift), 5 + shift)
            node = system.cache.match_prefix([1, 2]).last_device_node
            system.cache.inc_lock_ref(node)
            system.cache.evict(1)
        assert first.cache.digest() == second.cache.digest()
        assert 0 <= first.cache.digest() < 2**64

    @clause("RADIX-17")
    def test_digest_tells_namespaces_and_paths_apart(self) -> None:
        digests = set()
        for tokens, extra_key in (([1, 2], None), ([1, 2], "a"), ([1, 2], "b"), ([2, 1], None)):
            system = self.tree()
            system.insert(tokens, 1, 2, extra_key=extra_key)
            digests.add(system.cache.digest())
        assert len(digests) == 4

    @clause("RADIX-17")
    @pytest.mark.parametrize("granularity", ["page", "node"])
    def test_digest_covers_paths_namespaces_locks_and_recency(self, granularity: str) -> None:
        system = self.tree(eviction_granularity=granularity)
        digests = [system.cache.digest()]

        def step(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            digests.append(system.cache.digest())
            return result

        step(system.insert, [1, 2], 1, 2)
        step(system.insert, [3], 3)
        step(system.insert, [3], 4, extra_key="a")
        step(system.insert, [3], 5, extra_key="b")
        node = step(system.cache.match_prefix, [1, 2]).last_device_node
        receipts = [step(system.cache.inc_lock_ref, node) for _ in range(2)]
        root = system.cache.match_prefix([9]).last_device_node
        receipts.append(step(system.cache.inc_lock_ref, root))
        step(system.insert, [3], 3, priority=4)
        step(system.cache.evict, 1)
        for receipt in receipts:
            step(system.cache.dec_lock_ref, receipt)
        assert len(set(digests)) == len(digests)
        before = system.cache.digest()
        system.cache.match_prefix([9])
        system.cache.dec_lock_ref(system.cache.inc_lock_ref(node))
        assert system.cache.digest() == before

    @clause("RADIX-18")
    def test_pretty_print_prints_and_changes_nothing(self) -> None:
        system = self.tree()
        system.insert([1, 2], 1, 2)
        system.insert([1, 3], 4, 3, extra_key="a")
        before = system.state()
        with redirect_stdout(io.StringIO()) as printed:
            system.cache.pretty_print()
        assert printed.getvalue().strip()
        assert system.state() == before

    @clause("RADIX-8")
    def test_cache_without_pools_answers_questions_about_keys(self) -> None:
        cache = self.alone(page_size=2)
        cache.insert([1, 2, 3, 4], [2, 3, 4, 5])
        assert cache.evict(2) == 2
        assert numbers(cache.match_prefix([1, 2, 3, 4]).device_indices) == [2, 3]
        cache.reset()
        assert cache.total_size() == 0
