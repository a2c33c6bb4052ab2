"""Serves the conversations from one kind of cache, and looks at the pool after every step."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

import kvspec
from kvspec.demo.owners import Sample, TreeRun, owners, shares, tree_runs
from kvspec.demo.texts import Script
from kvspec.demo.workload import Chat, next_prompt
from kvspec.errors import MemoryLeakError
from kvspec.interfaces.model_runner import ForwardBatch, GenerationBatchResult, ModelWorker
from kvspec.interfaces.prefix_cache import CacheView
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.scheduler import StepOutput
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.scheduler import Req, Scheduler, ServerArgs
from kvspec.scheduler.server_args import Implementation

__all__ = [
    "KINDS",
    "CountingWorker",
    "Kind",
    "KindRun",
    "Listener",
    "Node",
    "Turn",
    "leaked_pages",
    "serve",
    "server_args",
]

Kind: TypeAlias = Literal["none", "chunk", "radix"]
"""No cache, whole prompts; prompts in chunks, no sharing; chunks and a radix tree."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class Turn(NamedTuple):
    """A prompt and its answer."""

    rid: str
    conversation: int
    number: int
    """0 is the first of its conversation."""
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    cached_tokens: int
    """Of the prompt, what the cache had when it was admitted."""
    ttft_ms: float
    """From being added to the first token, without the time it took to look at the pool."""
    ended: str
    """Why: stop, length, reject, abort."""


class Node(NamedTuple):
    """A run of the tree, and which conversations begin with it."""

    run: TreeRun
    conversations: tuple[int, ...]


class KindRun(NamedTuple):
    """What came of all conversations under one kind of cache."""

    kind: Kind
    page_size: int
    page_count: int
    turns: tuple[Turn, ...]
    """In the order in which they ended."""
    conversations: tuple[tuple[int, ...], ...]
    """All tokens of each, prompts and answers."""
    prompt_tokens: int
    prefill_tokens: int
    """Computed, in prefill."""
    cached_tokens: int
    decode_tokens: int
    steps: int
    retractions: int
    evicted_tokens: int
    leaked_pages: int
    """Which the allocator has not got back when all is done and the cache is empty (DEMO-3)."""
    leaks: tuple[str, ...]
    """What the memory checker said, once for each thing."""
    seconds: float
    """Of all steps, without the time it took to look."""
    samples: tuple[Sample, ...]
    tree: tuple[Node, ...]
    """When it was fullest, of the steps after which somebody was live."""
    tree_step: int


class Listener(Protocol):
    """Is told what happens, for a terminal."""

    def begins(self, kind: Kind, names: Sequence[str]) -> None: ...

    def said(self, turn: str, conversation: int, text: str) -> None:
        """The answer of a turn so far."""

    def ended(self, turn: Turn, text: str) -> None: ...

    def looked(self, sample: Sample) -> None: ...

    def note(self, text: str) -> None: ...


class CountingWorker:
    """A worker that counts the tokens which it is given (DEMO-4), and may keep its logits."""

    def __init__(self, worker: ModelWorker) -> None:
        self.worker = worker
        self.max_total_num_tokens = worker.max_total_num_tokens
        self.sliding_window_size = worker.sliding_window_size
        self.results: list[GenerationBatchResult] = []
        self.tokens = 0
        self.keep = False

    def get_memory_pool(self) -> tuple[ReqToTokenPool, BaseTokenToKVPoolAllocator]:
        return self.worker.get_memory_pool()

    def forward_batch_generation(self, batch: ForwardBatch) -> GenerationBatchResult:
        result = self.worker.forward_batch_generation(batch)
        self.tokens += len(batch.input_ids)
        if self.keep:
            self.results.append(result)
        return result


def server_args(
    kind: Kind, implementation: Implementation, max_running: int, chunk: int = 128
) -> ServerArgs:
    """The scheduler's options for a kind of cache. The demo looks at the memory itself."""
    return ServerArgs(
        chunked_prefill_size=None if kind == "none" else chunk,
        disable_radix_cache=kind != "radix",
        max_running_requests=max_running,
        implementation=implementation,
        check_level="off",
    )


class _Clock:
    """Stands still while somebody looks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._begun, self._looked = clock, clock(), 0.0
        self._since = 0.0

    def __call__(self) -> float:
        return self._clock() - self._begun - self._looked

    def __enter__(self) -> None:
        self._since = self._clock()

    def __exit__(self, *_: object) -> None:
        self._looked += self._clock() - self._since


class _Service:
    """The conversations in the middle of being served."""

    def __init__(
        self,
        scheduler: Scheduler,
        scripts: Sequence[Script],
        chat: Chat,
        max_new_tokens: int,
        listener: Listener | None,
        clock: Callable[[], float],
    ) -> None:
        self.scheduler, self.scripts, self.chat = scheduler, scripts, chat
        self.max_new_tokens, self.listener = max_new_tokens, listener
        self.clock = _Clock(clock)
        self.turns: list[Turn] = []
        self.reqs: dict[str, tuple[Req, int, int]] = {}
        self.added: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.tokens: list[tuple[int, ...]] = [()] * len(scripts)
        self.samples: list[Sample] = []
        self.leaks: dict[str, None] = {}
        self.fullest: tuple[int, CacheView | None] = (0, None)

    def open(self) -> None:
        """Ask the first question of every conversation."""
        for conversation, script in enumerate(self.scripts):
            self.ask(conversation, 0, self.chat.opening(script.system, script.opening))

    def ask(self, conversation: int, number: int, prompt: list[int]) -> None:
        rid = f"{self.scripts[conversation].name}/{number + 1}"
        stops = self.chat.stop_token_ids
        req = Req(rid, prompt, self.max_new_tokens, stop_token_ids=stops)
        self.reqs[rid] = req, conversation, number
        self.added[rid] = self.clock()
        self.scheduler.add_request(req)

    def take(self, output: StepOutput) -> None:
        """What a step says of a request."""
        req, conversation, number = self.reqs[output.rid]
        if output.token_ids and output.rid not in self.first:
            self.first[output.rid] = self.clock()
        with self.clock:
            if self.listener is not None and output.token_ids:
                text = self.chat.text(req.output_ids)
                self.listener.said(output.rid, conversation, text)
        if output.finished_reason is not None:
            self.end(req, conversation, number, output.finished_reason.kind)

    def end(self, req: Req, conversation: int, number: int, why: str) -> None:
        """Note the turn, and ask what comes next."""
        waited = self.first.get(req.rid, self.clock()) - self.added[req.rid]
        turn = Turn(
            req.rid,
            conversation,
            number,
            tuple(req.origin_input_ids),
            tuple(req.output_ids),
            req.cached_tokens,
            1000 * waited,
            why,
        )
        self.turns.append(turn)
        self.tokens[conversation] = (*turn.prompt_ids, *turn.output_ids)
        if self.listener is not None:
            self.listener.ended(turn, self.chat.text(turn.output_ids))
        questions = self.scripts[conversation].questions
        if why in ("stop", "length") and number + 1 < len(questions):
            question = questions[number + 1]
            prompt = next_prompt(self.chat, turn.prompt_ids, turn.output_ids, question)
            self.ask(conversation, number + 1, prompt)

    def look(self) -> None:
        """Whose every page is, and whether that is right (DEMO-7)."""
        scheduler, allocator = self.scheduler, self.scheduler.token_to_kv_pool_allocator
        tree = scheduler.tree_cache.view()
        live = {
            req.req_pool_idx: (self.reqs[req.rid][1], req.cache_protected_len)
            for req in scheduler.live
            if req.req_pool_idx is not None
        }
        pages = owners(
            allocator.view(),
            scheduler.req_to_token_pool.view(),
            tree,
            live,
            page_count=allocator.size // allocator.page_size,
            page_size=allocator.page_size,
        )
        self.samples.append(Sample(len(self.samples) + 1, self.clock(), pages))
        most = len(self.fullest[1].pages) if self.fullest[1] else 1
        if scheduler.live and len(tree.pages) >= most:
            self.fullest = len(self.samples), tree
        try:
            kvspec.check_memory(
                allocator, scheduler.req_to_token_pool, scheduler.tree_cache, reqs=scheduler.live
            )
        except MemoryLeakError as error:
            self.leaks.update(dict.fromkeys(str(error).splitlines()))
        if self.listener is not None:
            self.listener.looked(self.samples[-1])


def serve(
    worker: CountingWorker,
    kind: Kind,
    scripts: Sequence[Script],
    chat: Chat,
    *,
    implementation: Implementation = "native",
    max_new_tokens: int = 24,
    max_running: int = 4,
    chunk: int = 128,
    listener: Listener | None = None,
    clock: Callable[[], float] = perf_counter,
) -> KindRun:
    """Serve all conversations under one kind of cache (DEMO-3, DEMO-4, DEMO-7, DEMO-8, DEMO-10).

    The worker's pools must be empty, and are again afterwards. O(steps · pool) beside the steps.
    """
    scheduler = Scheduler(server_args(kind, implementation, max_running, chunk), worker)
    service = _Service(scheduler, scripts, chat, max_new_tokens, listener, clock)
    if listener is not None:
        listener.begins(kind, [script.name for script in scripts])
    given = worker.tokens
    try:
        service.open()
        while not scheduler.is_idle:
            for output in scheduler.step():
                service.take(output)
            with service.clock:
                service.look()
    finally:
        scheduler.close()
    seconds = service.clock()
    return _told(kind, service, worker.tokens - given, seconds)


def _told(kind: Kind, service: _Service, computed: int, seconds: float) -> KindRun:
    scheduler, turns = service.scheduler, tuple(service.turns)
    counts = scheduler.counters()
    held, leaks = leaked_pages(scheduler)
    step, tree = service.fullest
    runs = tree_runs(tree) if tree is not None else []
    conversations = tuple(service.tokens)
    return KindRun(
        kind=kind,
        page_size=scheduler.page_size,
        page_count=scheduler.max_total_num_tokens // scheduler.page_size,
        turns=turns,
        conversations=conversations,
        prompt_tokens=sum(len(turn.prompt_ids) for turn in turns),
        prefill_tokens=computed - counts["decode_tokens"],
        cached_tokens=counts["cached_tokens"],
        decode_tokens=counts["decode_tokens"],
        steps=counts["steps"],
        retractions=counts["retractions"],
        evicted_tokens=counts["evicted_tokens"],
        leaked_pages=held,
        leaks=(*service.leaks, *leaks),
        seconds=seconds,
        samples=tuple(service.samples),
        tree=tuple(Node(run, tuple(shares(run, conversations))) for run in runs),
        tree_step=step,
    )


def leaked_pages(scheduler: Scheduler) -> tuple[int, list[str]]:
    """Pages that nobody gave back when the cache of an idle scheduler is emptied, and what the
    checker says of them; then all is cleared (DEMO-3). O(pool).
    """
    allocator, rows = scheduler.token_to_kv_pool_allocator, scheduler.req_to_token_pool
    scheduler.tree_cache.reset()
    held = len(allocator.view().held)
    leaks: list[str] = []
    try:
        kvspec.check_memory(allocator, rows, scheduler.tree_cache)
    except MemoryLeakError as error:
        leaks += str(error).splitlines()
    scheduler.flush_cache()
    return held, leaks
