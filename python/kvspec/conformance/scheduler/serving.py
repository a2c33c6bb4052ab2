"""A scheduler with a worker whose steps can be held up, and what came out of it. Spec: SCHED."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from kvspec.conformance.scheduler.worker import WordWorker, words
from kvspec.conformance.suite import Conformance, is_short
from kvspec.errors import MemoryLeakError
from kvspec.interfaces import scheduler as interface
from kvspec.interfaces.model_runner import ForwardBatch, GenerationBatchResult
from kvspec.interfaces.observer import Operation
from kvspec.interfaces.scheduler import SchedulerView, StepOutput
from kvspec.scheduler import Req, ServerArgs

__all__ = [
    "MODES",
    "HeldWorker",
    "SchedulerSuite",
    "Serving",
    "each_of",
    "in_modes",
    "leaks_are_failures",
    "tokens",
]

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap": {"disable_overlap_schedule": False},
    "drafts": {"speculative_num_draft_tokens": 3},
    "alone": {"disable_radix_cache": True},
    "windows": {"window": 5, "swa_pages": 8},
    "windows alone": {"window": 5, "swa_pages": 8, "disable_radix_cache": True},
    "windows in flight": {"window": 5, "swa_pages": 8, "disable_overlap_schedule": False},
}

_SECONDS = 20
"""After which a test that waits has failed."""


def tokens(first: int, count: int) -> list[int]:
    """A prompt like no other that begins with another number, over many words."""
    return [first * 1000 + at for at in range(count)]


def each_of(name: str, every: Iterable[Any], *few: Any) -> Callable[[Any], Any]:
    """Run a test with each value of an argument; with a few of them, if a mutant is tried."""

    def decorate(test: Any) -> Any:
        @wraps(test)
        def run(self: Any, **arguments: Any) -> None:
            for value in few if is_short() else every:
                try:
                    test(self, **{name: value}, **arguments)
                except BaseException as error:
                    error.add_note(f"with {name} = {value!r}")
                    raise

        del run.__wrapped__  # its arguments are no fixtures
        return run

    return decorate


def in_modes(*few: str) -> Callable[[Any], Any]:
    """Run a test in all modes; in a few, if a mutant is tried."""
    return each_of("mode", MODES, *few)


@contextmanager
def leaks_are_failures() -> Iterator[None]:
    """A leak where there should be none is a failure, not an accident of the test."""
    try:
        yield
    except MemoryLeakError as error:
        raise AssertionError(f"SCHED-4: {error}") from error


class HeldWorker(WordWorker):
    """Notes what it computes; held, it begins a step only when it is let. `errors` says which
    step fails, counted from 0, and `wrong` which samples something else.
    """

    def __init__(self, impl: Any, **options: Any) -> None:
        super().__init__(impl, **options)
        self.held = False
        self.begun: list[ForwardBatch] = []
        self.computing: ForwardBatch | None = None
        self.errors: dict[int, BaseException] = {}
        self.wrong: dict[int, Any] = {}
        self._news = threading.Condition()
        self._let = threading.Semaphore(0)

    def forward_batch_generation(self, batch: ForwardBatch) -> GenerationBatchResult:
        with self._news:
            number = len(self.begun)
            self.begun.append(batch)
            self.computing = batch
            self._news.notify_all()
        if self.held:
            assert self._let.acquire(timeout=_SECONDS), "nobody let the worker go on"
        try:
            if number in self.errors:
                raise self.errors[number]
            result = super().forward_batch_generation(batch)
            return result._replace(next_token_ids=self.wrong.get(number, result.next_token_ids))
        finally:
            self.computing = None

    def let(self, steps: int = 1) -> None:
        self._let.release(steps)

    def release(self) -> None:
        """Hold nothing any more."""
        self.held = False
        self.let(100)

    def wait_until_begun(self, steps: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self.begun) >= steps, _SECONDS)


class Serving:
    """A watched scheduler of the suite's implementation, over 16 pages of 4 slots and 4 rows,
    without overlap, first come first served, unless it is said otherwise.
    """

    def __init__(
        self,
        suite: Conformance,
        *,
        pages: int = 16,
        page_size: int = 4,
        rows: int = 4,
        window: int | None = None,
        swa_pages: int = 0,
        context: int = 512,
        vocabulary: int = 50,
        **options: Any,
    ) -> None:
        self.worker = HeldWorker(
            suite.impl,
            pages=pages,
            page_size=page_size,
            rows=rows,
            window=window,
            swa_pages=swa_pages,
            context=context,
            vocabulary=vocabulary,
        )
        defaults: dict[str, Any] = {
            "max_running_requests": rows,
            "schedule_policy": "fcfs",
            "disable_overlap_schedule": True,
            "implementation": "native" if suite.impl_name == "native" else "oracle",
        }
        self.args = ServerArgs(**{**defaults, **options})
        self.scheduler: Any = suite.subject(
            "Scheduler",
            interface.Scheduler,
            "scheduler",
            server_args=self.args,
            tp_worker=self.worker,
        )
        self.reqs: dict[str, Req] = {}
        self.said: dict[str, list[int]] = {}

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, *raised: object) -> None:
        self.worker.release()
        self.scheduler.close()

    @property
    def view(self) -> SchedulerView:
        view: SchedulerView = self.scheduler.view()
        return view

    @property
    def cache(self) -> Any:
        return self.scheduler.tree_cache

    @property
    def free_pages(self) -> int:
        free: int = self.worker.allocator.available_size()
        return free // self.worker.page_size

    def add(self, rid: str, prompt: Sequence[int], new: int = 4, **options: Any) -> Req:
        req = Req(rid, prompt, new, **options)
        self.reqs[rid], self.said[rid] = req, []
        self.scheduler.add_request(req)
        return req

    def step(self, times: int = 1) -> list[StepOutput]:
        """Rounds; what came out of them."""
        outputs: list[StepOutput] = []
        for _ in range(times):
            with leaks_are_failures():
                outputs += self.hear(self.scheduler.step())
        return outputs

    def hear(self, outputs: list[StepOutput]) -> list[StepOutput]:
        for each in outputs:
            self.said[each.rid] += each.token_ids
        return outputs

    def finish(self, most: int = 300) -> int:
        """Rounds until nothing waits; how many."""
        return sum(1 for _ in self.rounds(most))

    def rounds(self, most: int = 300) -> Iterator[SchedulerView]:
        """The same, one by one; what the view was before each."""
        rounds = 0
        while not self.scheduler.is_idle:
            assert rounds < most, f"SCHED-29: not done after {most} rounds: {self.view}"
            before = self.view
            self.step()
            rounds += 1
            yield before

    def serve(self, rid: str, prompt: Sequence[int], new: int = 1, **options: Any) -> Req:
        """One request from beginning to end."""
        req = self.add(rid, prompt, new, **options)
        self.finish()
        return req

    def right(self, rid: str) -> list[int]:
        """What a request says, if nothing is wrong."""
        req = self.reqs[rid]
        return words(
            req.origin_input_ids,
            req.max_new_tokens,
            vocabulary=self.worker.vocabulary,
            window=self.worker.sliding_window_size,
            stop_token_ids=req.stop_token_ids,
        )

    def assert_right(self, *rids: str) -> None:
        for rid in rids or self.reqs:
            assert self.said[rid] == self.right(rid), f"{self.reqs[rid]} says something else"

    def cached(self, prompt: Sequence[int], extra_key: Any = None) -> int:
        """How many tokens the cache has of these."""
        found = self.cache.match_prefix(list(prompt), extra_key=extra_key, touch=False)
        length: int = found.device_indices.numel()
        return length

    def observe(self, see: Any) -> None:
        """Be told of every operation of the allocator."""
        self.worker.allocator.attach(see)

    def watch_what_flies(self) -> list[str]:
        """Faults, noted as they happen: something of a step that is being computed is given back
        or handed to somebody.
        """
        faults: list[str] = []

        size, window = self.worker.page_size, self.worker.sliding_window_size

        def see(operation: Operation) -> None:
            batch = self.worker.computing
            if batch is None:
                return
            books = self.worker.allocator.view()
            free, paired = {*books.free, *books.pending}, {full for full, _ in books.pairs}
            for slots, new in zip(batch.token_slots, batch.extend_lens, strict=True):
                pages = [slot // size for slot in slots.tolist()]
                gone = free.intersection(pages)
                if window is not None:
                    gone |= set(pages[max(len(pages) - new - window + 1, 0) :]) - paired
                if gone:
                    faults.append(f"{operation.name}: pages {sorted(gone)}, which a step names")

        self.observe(see)
        return faults

    def assert_empty(self) -> None:
        """Nothing is live, and all that has pages is the cache."""
        assert not self.view.live
        info = self.scheduler._get_token_info()
        assert info.num_used == 0
        assert self.worker.rows.available_size() == len(self.worker.rows.req_to_token)
        with leaks_are_failures():
            self.scheduler.check_memory()


class SchedulerSuite(Conformance):
    """What the parts of the suite share."""

    def serving(self, **options: Any) -> Serving:
        return Serving(self, **options)
