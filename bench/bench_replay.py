"""Replay of the full conversation trace, 288,500 blocks of 512 tokens. Clauses REPLAY-5, CHECK-8.

The trace is read where KVSPEC_TRACES says, or beside the checkout in shared/traces; under CI it is
an error if it is not there. Its counts are gated always; the time only with `make bench`: under 2 s
of one core with `check_memory` after each request.
"""

import json
from typing import Any

import pytest
import torch

import kvspec
import needs
from kvspec.replay import Run, read_trace, replay

FILE = "mooncake_conversation_full.jsonl.gz"
CAPACITY = 10_000
ROUNDS = 7
SECONDS = 2.0


@needs.trace(FILE)
@pytest.mark.clause("REPLAY-5")
def bench_full_conversation(benchmark: Any) -> None:
    trace = read_trace(needs.TRACES / FILE)
    golden = json.loads((needs.TRACES / "golden.json").read_text(encoding="utf-8"))
    expected = golden[FILE]["hits"]["lru"][str(CAPACITY)]
    runs: list[Run] = []

    def run() -> None:
        runs.append(replay(trace, impl=kvspec, capacity=CAPACITY))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark.pedantic(run, rounds=1 if benchmark.disabled else ROUNDS)
    finally:
        torch.set_num_threads(threads)
    assert all([r.hit_blocks, r.hit_tokens, r.evictions] == expected for r in runs)
    assert all(not r.leaks for r in runs)
    best = min(r.seconds for r in runs)
    benchmark.extra_info["seconds"] = round(best, 3)
    benchmark.extra_info["us_per_request"] = round(best / len(trace.requests) * 1e6, 1)
    assert benchmark.disabled or best < SECONDS
