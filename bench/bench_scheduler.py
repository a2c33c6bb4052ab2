"""What the scheduler itself costs: a decode step of 8 requests with 2,000 cached tokens each.

The worker does nothing, so that all the time is the host's. The two implementations take each step
in turn, and say the same; counters are exact, and the same in a pool 16 times as large.
"""

import statistics
import time
from types import ModuleType
from typing import Any

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance.suite import one_thread
from kvspec.interfaces.model_runner import ForwardBatch, GenerationBatchResult
from kvspec.scheduler import Req, Scheduler, ServerArgs

PAGE_SIZE, BATCH, CONTEXT, STEPS, ROUNDS = 16, 8, 2000, 24, 7
PAGES = 1024
LEAST = 5.0
"""How many times as long the oracle takes at least; where this was measured it is 9.7."""
US_PER_STEP = 2000
"""The most that the native one may take."""


class IdleWorker:
    """Says 1, whatever it is asked."""

    sliding_window_size: int | None = None

    def __init__(self, impl: ModuleType, pages: int) -> None:
        memory = {"dtype": torch.float32, "device": "cpu", "kvcache": None, "need_sort": False}
        self.max_total_num_tokens = pages * PAGE_SIZE
        self.pools = (
            impl.ReqToTokenPool(BATCH, CONTEXT + 512, "cpu", False),
            impl.PagedTokenToKVPoolAllocator(
                size=self.max_total_num_tokens, page_size=PAGE_SIZE, **memory
            ),
        )

    def get_memory_pool(self) -> Any:
        return self.pools

    def forward_batch_generation(self, batch: ForwardBatch) -> GenerationBatchResult:
        return GenerationBatchResult(torch.ones(len(batch.sample_indices), dtype=torch.int64))


def decoding(impl: ModuleType, pages: int) -> Scheduler:
    """A scheduler with a full batch, whose prompts are cached and computed."""
    args = ServerArgs(
        chunked_prefill_size=None,
        max_prefill_tokens=1 << 20,
        max_running_requests=BATCH,
        disable_overlap_schedule=True,
        implementation="oracle" if impl is kvspec.oracle else "native",
        check_level="off",
    )
    scheduler = Scheduler(args, IdleWorker(impl, pages))
    prompt = [at % 1000 for at in range(CONTEXT)]
    scheduler.add_request(Req("first", [*prompt, 7], 1))
    while not scheduler.is_idle:
        scheduler.step()
    for number in range(BATCH):
        scheduler.add_request(Req(f"{number}", [*prompt, number], 400))
    scheduler.step()
    assert len(scheduler.running) == BATCH
    assert scheduler.counters()["cached_tokens"] == BATCH * CONTEXT // PAGE_SIZE * PAGE_SIZE
    return scheduler


def counters(scheduler: Scheduler) -> dict[str, int]:
    rows: Any = scheduler.req_to_token_pool
    cache: Any = scheduler.tree_cache
    return {**scheduler.counters(), **rows.counters(), **cache.counters()}


@pytest.mark.clause("SCHED-30")
def bench_step(benchmark: Any) -> None:
    """Native against oracle, and in a pool 16 times as large."""
    kinds = [(kvspec, PAGES), (kvspec.oracle, PAGES), (kvspec, 16 * PAGES)]
    rounds = 1 if benchmark.disabled else ROUNDS
    took: list[list[float]] = [[] for _ in kinds]
    with one_thread():
        schedulers = [decoding(impl, pages) for impl, pages in kinds]
        start = [counters(scheduler) for scheduler in schedulers]
        for _ in range(rounds):
            seconds = [0.0 for _ in kinds]
            for step in range(STEPS):
                outputs = []
                for at in range(len(kinds)):
                    which = (at + step) % len(kinds)
                    begin = time.process_time()
                    outputs.append(schedulers[which].step())
                    seconds[which] += time.process_time() - begin
                assert outputs[0] == outputs[1] == outputs[2]
            for times, spent in zip(took, seconds, strict=True):
                times.append(spent / STEPS)
        done = [
            {name: after[name] - before[name] for name in after}
            for before, after in zip(start, map(counters, schedulers), strict=True)
        ]
    assert done[0] == done[1] == done[2]
    assert done[0]["decode_tokens"] == done[0]["positions_written"] == rounds * STEPS * BATCH
    assert done[0]["tokens_compared"] == done[0]["evicted_tokens"] == 0
    benchmark.pedantic(lambda: None)
    if benchmark.disabled:
        return
    ratio = statistics.median(b / a for a, b in zip(took[0], took[1], strict=True))
    growth = statistics.median(b / a for a, b in zip(took[0], took[2], strict=True))
    micro = statistics.median(took[0]) * 1e6
    benchmark.extra_info.update(
        us_per_step=round(micro), times_oracle=round(ratio, 2), growth_16_pools=round(growth, 2)
    )
    print(benchmark.name, benchmark.extra_info)
    assert ratio > LEAST
    assert growth < 1.5
    assert micro < US_PER_STEP
