"""A step between its launch and its settlement. Spec: SCHED-22, SCHED-23."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from kvspec.interfaces.model_runner import ForwardBatch, GenerationBatchResult, ModelWorker
from kvspec.scheduler.req import Req
from kvspec.scheduler.slots import Extension

__all__ = ["Flight", "Launcher", "Mode"]

Mode = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Flight:
    """A launched step."""

    mode: Mode
    extensions: Sequence[Extension]
    wait: Callable[[], GenerationBatchResult]

    def names(self, req: Req) -> bool:
        """Whether it reads or writes what the request owns. O(batch)."""
        return any(each.req is req for each in self.extensions)


class Launcher:
    """Has a worker compute steps, one after the other; with overlap in a thread of their own, so
    that the scheduler goes on meanwhile.
    """

    def __init__(self, worker: ModelWorker, *, overlap: bool) -> None:
        self.worker = worker
        self.pool = ThreadPoolExecutor(1, "kvspec-forward") if overlap else None

    def launch(
        self,
        mode: Mode,
        extensions: Sequence[Extension],
        batch: ForwardBatch,
        before: Flight | None,
    ) -> Flight:
        """Begin to compute a batch, whose negative tokens are samples of the step before it."""
        if self.pool is None:
            result = self.worker.forward_batch_generation(batch)
            return Flight(mode, extensions, lambda: result)
        future: Future[GenerationBatchResult] = self.pool.submit(self._run, batch, before)
        return Flight(mode, extensions, future.result)

    def _run(self, batch: ForwardBatch, before: Flight | None) -> GenerationBatchResult:
        if before is not None:
            sampled = before.wait().next_token_ids
            unknown = batch.input_ids < 0
            index = (-1 - batch.input_ids).clamp(min=0)
            ids = torch.where(unknown, sampled[index.clamp(max=len(sampled) - 1)], batch.input_ids)
            batch = batch._replace(input_ids=ids)
        return self.worker.forward_batch_generation(batch)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()
