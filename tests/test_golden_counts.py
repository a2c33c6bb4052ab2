"""Real traces: the counts of the core equal golden.json, number for number.

The traces are read where KVSPEC_TRACES says, or beside the checkout in shared/traces; the project
ships none of them.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import kvspec
import per_page_simulator
from kvspec.conformance import clause
from kvspec.replay import Trace, read_trace, replay
from needs import native

DEFAULT = Path(__file__).parents[2] / "shared" / "traces"
FOLDER = Path(os.environ.get("KVSPEC_TRACES", DEFAULT))
FILES = [
    "mooncake_conversation_first2000.jsonl",
    "mooncake_conversation_full.jsonl.gz",
    "weka_mix24_2h_blk64.jsonl.gz",
]
POLICIES = ["lru", "lfu", "slru", "fifo"]


@cache
def golden() -> dict[str, Any]:
    """golden.json. Without the folder a run under CI fails, and any other is skipped."""
    if not (FOLDER / "golden.json").exists():
        reason = f"no golden.json in {FOLDER}; KVSPEC_TRACES says where the traces are"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    counts: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
    return counts


@cache
def trace(file: str) -> Trace:
    return read_trace(FOLDER / file)


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
