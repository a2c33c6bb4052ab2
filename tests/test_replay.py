"""Replaying traces: the suite, a thousand random traces against single pages, and the JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest

import kvspec
import kvspec.oracle
import per_page_simulator
from kvspec.conformance import clause
from kvspec.conformance.replay import ReplayConformance, busy_requests, long_requests, trace_of
from kvspec.errors import ContractError, MemoryLeakError
from kvspec.interfaces.radix_cache import EvictionPolicy
from kvspec.replay import as_json, block_tokens, generate, replay
from needs import native

POLICIES = get_args(EvictionPolicy)
IMPLS = [
    pytest.param(kvspec, 1000, id="native", marks=native),
    pytest.param(kvspec.oracle, 50, id="oracle"),
]


class TestOracle(ReplayConformance):
    impl = kvspec.oracle


@native
class TestNative(ReplayConformance):
    impl = kvspec


def random_traces(count: int) -> Iterator[tuple[int, int, bool, list[tuple[list[int], int]]]]:
    """(seed, capacity, leave_last_token, requests): up to 8 blocks each, 3 to 14 in the cache."""
    for seed in range(count):
        requests = list(busy_requests(count=12, seed=seed))
        yield seed, 3 + seed % 12, seed % 4 == 0, requests


@clause("REPLAY-5")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("impl", "count"), IMPLS)
def test_random_traces_count_as_single_pages_do(impl: Any, count: int, policy: str) -> None:
    evictions = 0
    for seed, capacity, leave_last, requests in random_traces(count):
        run = replay(
            trace_of(*requests),
            impl=impl,
            capacity=capacity,
            policy=policy,
            leave_last_token=leave_last,
        )
        expected = per_page_simulator.simulate(
            requests, block=4, capacity=capacity, policy=policy, leave_last_token=leave_last
        )
        assert (run.hit_blocks, run.hit_tokens, run.evictions) == expected, f"{seed=}, {capacity=}"
        assert not run.leaks
        evictions += run.evictions
    assert evictions > 10 * count


def random_windows(count: int) -> Iterator[tuple[dict[str, Any], list[tuple[list[int], int]]]]:
    """Options of a replay and requests of up to 15 blocks: windows of 1 to 40 tokens, a full pool
    of up to 30 blocks, and in the window pool two blocks more than a window, or up to as many.
    """
    for seed in range(count):
        window = (1, 3, 4, 5, 8, 12, 13, 16, 40)[seed % 9]
        least = -(-window // 4) + 2
        capacity = least + seed * 7 % (31 - least)
        swa_capacity = min(least + (0, 0, 1, 2, 5, 20)[seed % 6], capacity)
        options = {
            "capacity": capacity,
            "sliding_window": window,
            "swa_ratio": swa_capacity / capacity,
            "leave_last_token": seed % 4 == 0,
        }
        yield options, list(long_requests(count=20, seed=seed))


@clause("REPLAY-9", "REPLAY-12")
@pytest.mark.parametrize(
    ("impl", "count"),
    [
        pytest.param(kvspec, 300, id="native", marks=native),
        pytest.param(kvspec.oracle, 40, id="oracle"),
    ],
)
def test_random_windows_count_as_single_pages_do(impl: Any, count: int) -> None:
    left = 0
    for options, requests in random_windows(count):
        run = replay(trace_of(*requests), impl=impl, **options)
        assert run.window is not None
        assert not run.leaks
        capacities = {"capacity": run.capacity, "swa_capacity": run.window.swa_capacity}
        expected = per_page_simulator.simulate_windows(
            requests,
            block=4,
            window=run.window.sliding_window,
            leave_last_token=options["leave_last_token"],
            **capacities,
        )
        used = [(sample.used.full // 4, sample.used.swa // 4) for sample in run.window.samples]
        evicted = run.evictions, run.window.swa_evictions, run.window.swa_left
        assert (run.hit_blocks, run.hit_tokens, *evicted, used) == expected, f"{options}"
        assert sum(sample.hit_blocks for sample in run.window.samples) == run.hit_blocks
        left += run.window.swa_left
    assert left > count


@native
@clause("REPLAY-7")
def test_oracle_and_core_replay_windows_in_lockstep() -> None:
    for options, requests in random_windows(20):
        replay(trace_of(*requests), impl=kvspec, verify=kvspec.oracle, **options)


@native
@clause("REPLAY-7")
@pytest.mark.parametrize("granularity", ["page", "node"])
@pytest.mark.parametrize("policy", POLICIES)
def test_oracle_and_core_replay_in_lockstep(policy: str, granularity: str) -> None:
    for _, capacity, leave_last, requests in random_traces(10):
        replay(
            trace_of(*requests),
            impl=kvspec,
            capacity=capacity,
            policy=policy,
            granularity=granularity,
            leave_last_token=leave_last,
            verify=kvspec.oracle,
        )


def test_a_leak_is_reported_with_the_request() -> None:
    class Leaking(kvspec.oracle.RadixCache):
        def evict(self, num_tokens: int) -> int:
            evicted = super().evict(num_tokens)
            self.token_to_kv_pool_allocator.alloc(self.page_size)
            return super().evict(num_tokens) and evicted

    class Impl:
        ReqToTokenPool = kvspec.oracle.ReqToTokenPool
        PagedTokenToKVPoolAllocator = kvspec.oracle.PagedTokenToKVPoolAllocator
        RadixCache = Leaking

    with pytest.raises(MemoryLeakError, match="request 3: token_to_kv_pool_allocator memory leak"):
        replay(trace_of(([1], 4), ([2], 4), ([3], 4), ([4], 4)), impl=Impl, capacity=3)


def test_what_is_held_after_the_reset_is_a_leak() -> None:
    class Keeping(kvspec.oracle.PagedTokenToKVPoolAllocator):
        def free(self, free_index: Any) -> None:
            super().free(free_index[self.page_size :])

    class Impl:
        ReqToTokenPool = kvspec.oracle.ReqToTokenPool
        PagedTokenToKVPoolAllocator = Keeping
        RadixCache = kvspec.oracle.RadixCache

    run = replay(trace_of(([1, 2], 8), ([3], 4)), impl=Impl, capacity=4)
    assert run.leaked_pages == 1
    assert run.leaks == "CHECK-1: page 1 of token_to_kv_pool_allocator is held and has no owner"


def test_a_leak_of_both_pools_is_counted_in_both() -> None:
    class Keeping(kvspec.oracle.SWATokenToKVPoolAllocator):
        def free(self, free_index: Any, swa_index: Any = ()) -> None:
            super().free(free_index[self.page_size :], swa_index)

    class Impl:
        ReqToTokenPool = kvspec.oracle.ReqToTokenPool
        SWATokenToKVPoolAllocator = Keeping
        SWARadixCache = kvspec.oracle.SWARadixCache

    trace = trace_of(([1, 2], 8), ([3], 4))
    run = replay(trace, impl=Impl, capacity=4, sliding_window=4)
    assert run.window is not None
    assert (run.leaked_pages, run.window.swa_leaked_pages) == (1, 1)
    assert run.leaks.splitlines() == [
        "CHECK-1: page 1 of the full pool of token_to_kv_pool_allocator is held and has no owner",
        "CHECK-9, CHECK-1: page 1 of the window pool of token_to_kv_pool_allocator is held and has"
        " no owner",
    ]


def test_a_capacity_of_nothing_is_refused() -> None:
    with pytest.raises(ContractError, match="REPLAY-3: capacity is 0"):
        replay(trace_of(([1], 4)), impl=kvspec.oracle, capacity=0)


def test_ids_that_one_token_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(ContractError, match="REPLAY-2: blocks of 1 token"):
        block_tokens([2**32], 1)


def test_progress_is_called_once_a_request() -> None:
    calls: list[None] = []
    trace = trace_of(([1], 4), ([], 0))
    replay(trace, impl=kvspec.oracle, capacity=1, progress=lambda: calls.append(None))
    assert len(calls) == 2


@clause("REPLAY-2", "REPLAY-8")
def test_tokens_and_workload_are_equal_in_another_process() -> None:
    code = (
        "from kvspec.replay import block_tokens, generate\n"
        "last = generate(seed=5, requests=50).requests[-1]\n"
        "print(last.timestamp, last.hash_ids.tolist(), block_tokens([2**40], 64).tolist())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    last = generate(seed=5, requests=50).requests[-1]
    here = f"{last.timestamp} {last.hash_ids.tolist()} {block_tokens([2**40], 64).tolist()}\n"
    assert told == here


@clause("REPLAY-8")
def test_the_workload_is_a_trace_that_shares() -> None:
    trace = generate(seed=1, requests=300, block=32)
    times = [request.timestamp for request in trace.requests]
    assert times == sorted(times)
    for request in trace.requests:
        assert 32 * (len(request.hash_ids) - 1) < request.input_length <= 32 * len(request.hash_ids)
    ids = {int(id_) for request in trace.requests for id_ in request.hash_ids}
    assert 2 * len(ids) < trace.blocks
    assert generate(seed=2, requests=300, block=32).tokens != trace.tokens


@pytest.mark.parametrize("given", [{"requests": 0}, {"block": 0}])
def test_a_workload_of_nothing_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(ContractError, match="REPLAY-8"):
        generate(**given)


def test_the_json_has_exactly_the_documented_keys_and_types() -> None:
    trace = trace_of(([1, 2], 7), ([1, 3], 8))
    runs = [
        replay(trace, impl=kvspec.oracle, capacity=capacity, policy=policy)
        for policy in ("lfu", "lru")
        for capacity in (3, 2)
    ]
    report = json.loads(json.dumps(as_json(trace, runs)))
    seconds = [run.pop("seconds") for run in report["runs"]]
    assert all(type(value) is float and value > 0 for value in seconds)
    shared = {"granularity": "page", "impl": "oracle", "hit_blocks": 1, "hit_tokens": 4}
    assert report == {
        "trace": "made here",
        "block": 4,
        "requests": 2,
        "runs": [
            {"policy": "lfu", "capacity": 3, "evictions": 0, "leaked_pages": 0, **shared},
            {"policy": "lfu", "capacity": 2, "evictions": 1, "leaked_pages": 0, **shared},
            {"policy": "lru", "capacity": 3, "evictions": 0, "leaked_pages": 0, **shared},
            {"policy": "lru", "capacity": 2, "evictions": 1, "leaked_pages": 0, **shared},
        ],
    }


def test_a_run_with_a_window_has_one_key_more() -> None:
    trace = trace_of(([1, 2, 3, 4], 15), ([], 0), ([7, 8], 5), ([1, 2], 8))
    run = replay(trace, impl=kvspec.oracle, capacity=5, sliding_window=4, swa_ratio=0.6)
    (told,) = json.loads(json.dumps(as_json(trace, [run])))["runs"]
    assert told["window"] == {
        "sliding_window": 4,
        "swa_capacity": 3,
        "swa_evictions": 3,
        "swa_left": 2,
        "tombstones": 1,
        "swa_leaked_pages": 0,
        "full_used_peak": 20,
        "full_used_mean": 17.0,
        "swa_used_peak": 12,
        "swa_used_mean": 10.0,
    }
    assert sorted(told)[-1] == "window"
