"""Real traces: the counts of the core equal golden.json, number for number.

The traces are read where KVSPEC_TRACES says, or beside the checkout in shared/traces; the project
ships none of them.
"""

import json
import os
from functools import cache
from typing import Any

import pytest

import kvspec
import per_page_simulator
from kvspec.conformance import clause
from kvspec.replay import Trace, read_trace, replay
from needs import TRACES, native

FILES = [
    "mooncake_conversation_first2000.jsonl",
    "mooncake_conversation_full.jsonl.gz",
    "weka_mix24_2h_blk64.jsonl.gz",
]
POLICIES = ["lru", "lfu", "slru", "fifo"]


@cache
def golden() -> dict[str, Any]:
    """golden.json. Without the folder a run under CI fails, and any other is skipped."""
    if not (TRACES / "golden.json").exists():
        reason = f"no golden.json in {TRACES}; KVSPEC_TRACES says where the traces are"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    counts: dict[str, Any] = json.loads((TRACES / "golden.json").read_text(encoding="utf-8"))
    return counts


@cache
def trace(file: str) -> Trace:
    return read_trace(TRACES / file)


@pytest.mark.parametrize("file", FILES)
def test_the_trace_is_what_golden_counts_are_of(file: str) -> None:
    known, read = golden()[file], trace(file)
    ids = {int(id_) for request in read.requests for id_ in request.hash_ids}
    assert read.block == known["block"]
    assert len(read.requests) == known["requests"]
    assert read.blocks == known["total_blocks"]
    assert len(ids) == known["unique_blocks"]
    assert read.tokens == known["total_tokens"]


@native
@clause("REPLAY-5")
@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("file", FILES)
def test_the_core_counts_what_golden_json_says(file: str, policy: str) -> None:
    expected = golden()[file]["hits"][policy]
    counted = {}
    for capacity in expected:
        run = replay(trace(file), impl=kvspec, capacity=int(capacity), policy=policy)
        counted[capacity] = [run.hit_blocks, run.hit_tokens, run.evictions]
        assert not run.leaks
    assert counted == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_the_simulator_counts_what_golden_json_says(policy: str) -> None:
    expected = golden()[FILES[0]]["hits"][policy]["500"]
    requests = [(r.hash_ids.tolist(), r.input_length) for r in trace(FILES[0]).requests]
    counts = per_page_simulator.simulate(requests, block=512, capacity=500, policy=policy)
    assert list(counts) == expected


@native
@clause("REPLAY-9")
@pytest.mark.slow
@pytest.mark.parametrize(("window", "ratio"), [(512, 0.05), (2048, 0.2), (10_000, 0.5)])
@pytest.mark.parametrize("file", [FILES[0], FILES[2]])
def test_windows_of_a_real_trace_count_as_single_pages_do(
    file: str, window: int, ratio: float
) -> None:
    golden()
    part = trace(file)._replace(requests=trace(file).requests[:150])
    requests = [(r.hash_ids.tolist(), r.input_length) for r in part.requests]
    run = replay(part, impl=kvspec, capacity=3000, sliding_window=window, swa_ratio=ratio)
    assert run.window is not None
    expected = per_page_simulator.simulate_windows(
        requests,
        block=part.block,
        capacity=3000,
        swa_capacity=run.window.swa_capacity,
        window=window,
    )
    used = [(s.used.full // part.block, s.used.swa // part.block) for s in run.window.samples]
    evicted = run.evictions, run.window.swa_evictions, run.window.swa_left
    assert (run.hit_blocks, run.hit_tokens, *evicted, used) == expected
    assert run.window.swa_evictions
    assert not run.leaks


@native
@clause("REPLAY-11")
@pytest.mark.parametrize("file", [FILES[0], FILES[2]])
def test_a_window_larger_than_any_request_counts_as_none_does(file: str) -> None:
    golden()
    part = trace(file)._replace(requests=trace(file).requests[:600])
    longest = max(request.input_length for request in part.requests)
    capacity = 2 * longest // part.block
    plain = replay(part, impl=kvspec, capacity=capacity)
    run = replay(part, impl=kvspec, capacity=capacity, sliding_window=longest)
    counts = [(r.hit_blocks, r.hit_tokens, r.evictions, r.slots_allocated) for r in (plain, run)]
    assert counts[0] == counts[1]
    assert plain.hit_blocks
    assert plain.evictions
