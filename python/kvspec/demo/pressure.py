"""Correctness where engines go wrong: hardly any room, poison in it, every logit looked at."""

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import kvspec
from kvspec.demo.serving import CountingWorker, leaked_pages
from kvspec.demo.texts import SCRIPTS, Script
from kvspec.demo.verdict import TOLERANCE, Compare, Difference, within
from kvspec.demo.workload import Chat
from kvspec.errors import MemoryLeakError
from kvspec.interfaces.scheduler import StepOutput
from kvspec.model_runner import ModelRunner
from kvspec.poison import Poison
from kvspec.scheduler import Req, Scheduler, ServerArgs
from kvspec.scheduler.server_args import Implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["MODES", "Ask", "Mode", "ModeCheck", "asks", "check_mode", "pool_pages"]


class Mode(NamedTuple):
    batch: int
    """Most requests that run at once."""
    page_size: int


MODES = (Mode(1, 1), Mode(1, 16), Mode(8, 1), Mode(8, 16))


RETRACT_EVERY = 50
"""Steps after which all are retracted at once, beside those that there is no room for."""


POISON_EVERY = 8
"""Steps from one look at what is free to the next."""


class Ask(NamedTuple):
    """A request. No token stops it."""

    rid: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int

    @property
    def most_slots(self) -> int:
        """How long its row becomes."""
        return len(self.prompt_ids) + self.max_new_tokens - 1


class ModeCheck(NamedTuple):
    """What came of one mode."""

    batch: int
    page_size: int
    identical_output: bool
    requests: int
    pool_tokens: int
    largest_request: int
    """Slots; the pool has room for 1.1 of it."""
    tokens: int
    near_ties: int
    differences: tuple[Difference, ...]
    max_logit_difference: float | None
    """From the reference, of any word of any token; None if one was no number."""
    steps: int
    retractions: int
    evicted_tokens: int
    overwritten: int
    """Pages that were written when they were free."""
    leaked_pages: int
    leaks: tuple[str, ...]
    seconds: float
    compare_seconds: float


def asks(
    chat: Chat, tokens: int = 1000, *, scripts: Sequence[Script] = SCRIPTS, answer: int = 40
) -> list[Ask]:
    """Requests with at least so many tokens to say: one long prompt among short ones which share a
    beginning.
    """
    opening = chat.opening(scripts[0].system, scripts[0].opening)
    long = Ask("long", tuple(opening[: 4 * answer]), 2 * answer + 16)
    questions = [question for script in scripts for question in script.questions]
    short: list[Ask] = []
    while answer * len(short) + long.max_new_tokens < tokens:
        question = questions[len(short) % len(questions)]
        head = opening[: 24 + len(short) // len(questions)]
        prompt = (*head, *chat.follow_up(question))
        short.append(Ask(f"short {len(short) + 1}", prompt, answer))
    return [*short[:3], long, *short[3:]]


def pool_pages(requests: Sequence[Ask], page_size: int) -> int:
    """1.1 of the largest request, in whole pages (DEMO-9)."""
    largest = max(each.most_slots for each in requests)
    return -(-11 * largest // (10 * page_size))


class _Logits:
    """Whose each row of logits is: steps come out in order, and a decode step one step later."""

    def __init__(self, worker: CountingWorker, scheduler: Scheduler) -> None:
        self._worker, self._scheduler = worker, scheduler
        self._flying: tuple[str, ...] = ()
        self._steps = 0
        self.rows: dict[str, list[Tensor]] = {}

    def take(self, outputs: Sequence[StepOutput]) -> None:
        """After a step: what it settled, and what is in flight now."""
        said = {each.rid: each.token_ids for each in outputs if each.token_ids}
        if self._flying:
            self._keep(self._flying, said)
            said = {rid: tokens for rid, tokens in said.items() if rid not in self._flying}
        steps = self._scheduler.counters()["steps"]
        launched, self._steps = steps > self._steps, steps
        self._flying = self._scheduler.view().in_flight
        if launched and not self._flying:
            self._keep(tuple(said), said)

    def _keep(self, rids: Sequence[str], said: dict[str, tuple[int, ...]]) -> None:
        logits = self._worker.results.pop(0).next_token_logits
        assert logits is not None, "the runner keeps its logits"
        for rid, row in zip(rids, logits, strict=False):
            if rid in said:  # else it has ended, and its last step was not wanted any more
                self.rows.setdefault(rid, []).append(row)


def check_mode(
    model: "PreTrainedModel",
    mode: Mode,
    requests: Sequence[Ask],
    compare: Compare,
    *,
    implementation: Implementation = "native",
    tolerance: float = TOLERANCE,
    progress: Callable[[int], object] | None = None,
) -> ModeCheck:
    """Serve requests from a radix cache in a pool of 1.1 times the largest, all that is free poison
    and memory checked, and compare every token and logit with the reference (DEMO-9).

    `progress` is told how many tokens came out. One forward of the reference for each request.
    """
    pages = pool_pages(requests, mode.page_size)
    runner = ModelRunner(
        model,
        page_size=mode.page_size,
        max_total_tokens=pages * mode.page_size,
        max_running_requests=mode.batch,
        context_length=pages * mode.page_size,
        implementation=implementation,
        keep_logits=True,
    )
    worker = CountingWorker(runner)
    worker.keep = True
    args = ServerArgs(
        chunked_prefill_size=48,
        max_running_requests=mode.batch,
        implementation=implementation,
        schedule_conservativeness=0.1,  # so that more are admitted than there will be room for
        check_level="off",
    )
    run = _Run(Scheduler(args, worker), worker, requests, compare, tolerance, progress)
    run.serve(runner)
    return run.told(mode)


def _poison(runner: ModelRunner) -> Poison | None:
    """Of the layers whose KV lies in the full pool; None if every layer has a window."""
    kv = runner.kv_pool
    windows = hasattr(runner.allocator, "swa_available_size")
    full = [layer.layer_id for layer in runner.layers if layer.window is None or not windows]
    tensors = [get(layer) for layer in full for get in (kv.get_key_buffer, kv.get_value_buffer)]
    return Poison(tensors, runner.page_size) if tensors else None


class _Run:
    """One mode in the middle of being served."""

    def __init__(
        self,
        scheduler: Scheduler,
        worker: CountingWorker,
        requests: Sequence[Ask],
        compare: Compare,
        tolerance: float,
        progress: Callable[[int], object] | None,
    ) -> None:
        self.scheduler, self.requests, self.compare = scheduler, requests, compare
        self.tolerance, self.progress = tolerance, progress
        self.logits = _Logits(worker, scheduler)
        self.reqs = {each.rid: Req(*each) for each in requests}
        self.steps = self.tokens = self.near_ties = self.overwritten = self.held = 0
        self.differences: list[Difference] = []
        self.worst = 0.0
        self.leaks: dict[str, None] = {}
        self.compare_seconds = self.seconds = 0.0

    def serve(self, runner: ModelRunner) -> None:
        scheduler = self.scheduler
        allocator = scheduler.token_to_kv_pool_allocator
        poison = _poison(runner)
        begun = perf_counter()
        with kvspec.instrument(  # which fills what is free already, too
            scheduler.tree_cache, allocator, scheduler.req_to_token_pool, level="off", poison=poison
        ):
            try:
                for req in self.reqs.values():
                    scheduler.add_request(req)
                while not scheduler.is_idle:
                    self.step(poison)
            finally:
                scheduler.close()
            self.counts = scheduler.counters()
            self.held, leaks = leaked_pages(scheduler)
        self.leaks.update(dict.fromkeys(leaks))
        self.seconds = perf_counter() - begun - self.compare_seconds

    def step(self, poison: Poison | None) -> None:
        self.steps += 1
        retract = self.steps % RETRACT_EVERY == 0
        outputs = self.scheduler.retract_all() if retract else self.scheduler.step()
        self.logits.take(outputs)
        self.check(poison)
        for each in outputs:
            if each.finished_reason is not None:
                self.judge(self.reqs[each.rid])
        if self.progress is not None:
            self.progress(sum(len(each.token_ids) for each in outputs))

    def check(self, poison: Poison | None) -> None:
        """The memory, and now and then that nobody wrote what is free: it would stay so."""
        scheduler = self.scheduler
        allocator = scheduler.token_to_kv_pool_allocator
        try:
            kvspec.check_memory(
                allocator,
                scheduler.req_to_token_pool,
                scheduler.tree_cache,
                reqs=scheduler.live,
            )
        except MemoryLeakError as error:
            self.leaks.update(dict.fromkeys(str(error).splitlines()))
        if poison is not None and (self.steps % POISON_EVERY == 0 or scheduler.is_idle):
            books = allocator.view()
            self.overwritten += len(poison.check([*books.free, *books.release]))

    def judge(self, req: Req) -> None:
        """An answer that is complete, and its logits, which are let go (DEMO-9)."""
        begun = perf_counter()
        rows = self.logits.rows.pop(req.rid, [])
        output = list(req.output_ids)
        if len(output) < req.max_new_tokens:
            self.differences.append(Difference(req.rid, len(output), None, None, None))
        if output:
            found = self.compare(
                req.origin_input_ids, output, torch.stack(rows), tolerance=self.tolerance
            )
            self.tokens += found.tokens
            self.near_ties += found.near_ties
            self.differences += [Difference(req.rid, *each) for each in found.mismatches]
            if found.max_logit_difference is not None:
                worst = max(self.worst, found.max_logit_difference)
                self.worst = worst if math.isfinite(found.max_logit_difference) else math.inf
        self.compare_seconds += perf_counter() - begun

    def told(self, mode: Mode) -> ModeCheck:
        good = not self.differences and within(self.tokens, self.near_ties)
        return ModeCheck(
            *mode,
            identical_output=good and self.worst < self.tolerance and not self.overwritten,
            requests=len(self.requests),
            pool_tokens=self.scheduler.max_total_num_tokens,
            largest_request=max(each.most_slots for each in self.requests),
            tokens=self.tokens,
            near_ties=self.near_ties,
            differences=tuple(self.differences),
            max_logit_difference=self.worst if math.isfinite(self.worst) else None,
            steps=self.counts["steps"],
            retractions=self.counts["retractions"],
            evicted_tokens=self.counts["evicted_tokens"],
            overwritten=self.overwritten,
            leaked_pages=self.held,
            leaks=tuple(self.leaks),
            seconds=self.seconds,
            compare_seconds=self.compare_seconds,
        )
