"""A step between its launch and its settlement. Spec: SCHED-22, SCHED-23, SCHED-25."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from kvspec.interfaces.model_runner import ForwardBatch, GenerationBatchResult, ModelWorker
from kvspec.scheduler.req import TOKEN_LIMIT, Req
from kvspec.scheduler.slots import Extension

__all__ = ["Flight", "Launcher", "Mode"]

Mode = Literal["prefill", "decode"]


@dataclass(frozen=True, eq=False)
class Flight:
    """A launched step."""

    mode: Mode
    extensions: Sequence[Extension]
    future: Future[GenerationBatchResult]

    def names(self, req: Req) -> bool:
        """Whether it reads or writes what the request owns. O(batch)."""
        return any(each.req is req for each in self.extensions)

    def sample_of(self, req: Req) -> int:
        """Which of its samples is the request's first. O(batch)."""
        at = 0
        for each in self.extensions:
            if each.req is req:
                return at
            at += len(each.sampled)
        raise AssertionError(f"SCHED-22: {req} is not in the step in flight")

    def outcome(self) -> list[int] | BaseException:
        """What it sampled, or the error of the worker; one that sampled anything but the tokens
        that were asked for is in error too.

        It waits until the step is over. Whoever is interrupted meanwhile can ask again.
        """
        error = self.future.exception()
        if error is not None:
            return error
        try:
            tokens: list[int] = self.future.result().next_token_ids.tolist()
            wanted = sum(len(each.sampled) for each in self.extensions)
            if len(tokens) != wanted:
                raise ValueError(f"the worker sampled {len(tokens)} tokens, not {wanted}")
            if tokens and not 0 <= min(tokens) <= max(tokens) < TOKEN_LIMIT:
                raise ValueError(f"the worker sampled {tokens}, not tokens of [0, 2^31)")
        except Exception as wrong:
            return wrong
        return tokens


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
        """Begin to compute a batch, whose negative tokens are samples of the step before it. An
        error of the worker is the flight's outcome (SCHED-25).
        """
        if self.pool is not None:
            return Flight(mode, extensions, self.pool.submit(self._run, batch, before))
        future: Future[GenerationBatchResult] = Future()
        try:
            future.set_result(self._run(batch, before))
        except BaseException as error:
            future.set_exception(error)
        return Flight(mode, extensions, future)

    def _run(self, batch: ForwardBatch, before: Flight | None) -> GenerationBatchResult:
        if before is not None:
            sampled = before.outcome()
            if isinstance(sampled, BaseException):
                raise RuntimeError("the step before it failed")
            known = torch.tensor([*sampled, 0])
            index = (-1 - batch.input_ids).clamp(min=0)
            ids = torch.where(batch.input_ids < 0, known[index], batch.input_ids)
            batch = batch._replace(input_ids=ids)
        return self.worker.forward_batch_generation(batch)

    def close(self) -> None:
        """End the thread; steps after that are computed where they are launched."""
        pool, self.pool = self.pool, None
        if pool is not None:
            pool.shutdown()
