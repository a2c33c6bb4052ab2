"""Histories of a scheduler, drawn from a seed, played in lockstep, and cut short where they fail.

Every slot that is given back is filled at once, so that whoever reads it says another word; after
every step who owns what is checked, and that the implementations are in the same state.
"""

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from kvspec.conformance.scheduler.serving import leaks_are_failures
from kvspec.conformance.scheduler.worker import WordWorker, words
from kvspec.interfaces.observer import Operation
from kvspec.scheduler import Req, Scheduler, ServerArgs

__all__ = ["History", "draw", "play", "shortest"]

_LONGEST_PROMPTS = (20, 60)
_MOST_NEW = 20
_POISON = 7


@dataclass(frozen=True)
class History:
    """What a scheduler is made of, and what is asked of it: a pasteable reproducer.

    Actions are ("add", rid, prompt, new, stop words, namespace), ("abort", which), ("retract",),
    ("flush",) and ("step",); at the end it steps until nobody waits.
    """

    worker: dict[str, Any]
    args: dict[str, Any]
    actions: tuple[tuple[Any, ...], ...] = field(default=())

    def __str__(self) -> str:
        return (
            "import kvspec.oracle\n"
            "from kvspec.conformance.scheduler.histories import History, play\n"
            f"play([kvspec.oracle, kvspec], {self!r})"
        )


def draw(seed: int) -> History:
    """A history of up to 13 requests, in a pool that has room for one to three of them."""
    r = random.Random(seed)
    page_size, window = r.choice([1, 2, 4, 16]), r.choice([None, None, 5, 8])
    drafts = r.choice([0, 0, 2, 4])
    longest, rows = r.choice(_LONGEST_PROMPTS), r.randrange(1, 6)
    need = -(-(longest + _MOST_NEW) // page_size)
    least = -(-(window or 0) // page_size) + 1 + -(-(drafts + 1) // page_size)
    worker = {
        "pages": need + r.randrange(2 * need),
        "page_size": page_size,
        "rows": rows,
        "context": 200,
        "window": window,
        "swa_pages": least + r.randrange(need) if window else 0,
        "vocabulary": r.choice([2, 50]),
    }
    args = {
        "chunked_prefill_size": r.choice([None, 3, 7, 16, 64]),
        "max_running_requests": rows,
        "disable_radix_cache": r.random() < 0.2,
        "schedule_policy": r.choice(["lpm", "fcfs", "dfs-weight"]),
        "schedule_conservativeness": r.choice([0.01, 0.01, 1.0]),
        "disable_overlap_schedule": drafts > 0 or r.random() < 0.2,
        "speculative_num_draft_tokens": drafts,
        "eviction_policy": r.choice(["lru", "lfu"]),
    }
    return History(worker, args, tuple(_actions(r, longest // 2)))


def _actions(r: random.Random, half: int) -> list[tuple[Any, ...]]:
    bases = [[r.randrange(50) for _ in range(half)] for _ in range(3)]
    actions: list[tuple[Any, ...]] = []
    left = r.randrange(1, 14)
    number = 0
    while number < left or r.random() < 0.9:
        if number < left and r.random() < 0.5:
            base = r.choice(bases)
            own = [r.randrange(50) for _ in range(r.randrange(half))]
            prompt = tuple(base[: r.randrange(1, half + 1)] + own)
            if r.random() < 0.3:
                prompt = tuple(base)
            stop, space = r.choice([(), (1, 7)]), r.choice([None, None, "a"])
            actions.append(("add", f"r{number}", prompt, r.randrange(1, _MOST_NEW), stop, space))
            number += 1
        happens = r.random()
        if happens < 0.08 and number:
            actions.append(("abort", r.randrange(5)))
        elif happens < 0.10:
            actions.append(("retract",))
        if 0.09 < happens < 0.12:
            actions.append(("flush",))
        actions.append(("step",))
    return actions


class _Side:
    """One implementation's scheduler, and what came out of it."""

    def __init__(self, impl: ModuleType, history: History) -> None:
        name = "oracle" if impl.__name__.endswith("oracle") else "native"
        self.worker = WordWorker(impl, **history.worker)
        self.worker.allocator.attach(self._fill)
        options = {"implementation": name, "check_every_step": True, **history.args}
        self.scheduler = Scheduler(ServerArgs(**options), self.worker)
        self.said: dict[str, list[int]] = {}
        self.reqs: dict[str, Req] = {}
        self.happened: Counter[str] = Counter()

    def _fill(self, operation: Operation) -> None:
        """Whoever reads what was given back reads something else."""
        if not operation.name.startswith("free"):
            return
        size, books = self.worker.page_size, self.worker.allocator.view()
        poison = array("q", [_POISON]) * size
        for page in (*books.free, *books.pending):
            self.worker.full[page * size : (page + 1) * size] = poison
        for page in books.swa.free if books.swa is not None else ():
            self.worker.swa[page * size : (page + 1) * size] = poison

    def act(self, action: tuple[Any, ...]) -> None:
        with leaks_are_failures():
            getattr(self, action[0])(*action[1:])

    def add(self, rid: str, prompt: Sequence[int], new: int, stop: Any, space: Any) -> None:
        self.reqs[rid] = Req(rid, prompt, new, stop_token_ids=stop, extra_key=space)
        self.said[rid] = []
        self.scheduler.add_request(self.reqs[rid])

    def abort(self, which: int) -> None:
        """One of those that have not ended, the last live first."""
        view = self.scheduler.view()
        rids = [*list(view.live)[::-1], *view.waiting]
        if rids:
            rid = rids[which % len(rids)]
            self.scheduler.abort_request(rid)
            self.happened[f"aborted, then {self.reqs[rid].state}"] += 1

    def retract(self) -> None:
        self.hear(self.scheduler.retract_all())

    def flush(self) -> None:
        self.happened[f"flush was {self.scheduler.flush_cache()}"] += 1

    def step(self) -> None:
        put_back = [rid for rid in self.scheduler.view().waiting if self.reqs[rid].retraction_count]
        self.hear(self.scheduler.step())
        live = self.scheduler.view().live
        self.happened["resumed with hits"] += sum(
            rid in live and live[rid].protected > 0 for rid in put_back
        )
        prompts = Counter(tuple(self.reqs[rid].origin_input_ids) for rid in live)
        self.happened["duplicates live"] += any(count > 1 for count in prompts.values())

    def hear(self, outputs: Any) -> None:
        for each in outputs:
            self.said[each.rid] += each.token_ids

    def state(self) -> object:
        """All that can be compared."""
        parts = self.scheduler.tree_cache, self.worker.allocator, self.worker.rows
        digests = [part.digest() for part in parts if hasattr(part, "digest")]
        return self.scheduler.view(), self.scheduler.counters(), self.said, digests

    def assert_right(self) -> None:
        for rid, req in self.reqs.items():
            want = words(
                req.origin_input_ids,
                req.max_new_tokens,
                vocabulary=self.worker.vocabulary,
                window=self.worker.sliding_window_size,
                stop_token_ids=req.stop_token_ids,
            )
            assert req.finished_reason is not None, f"SCHED-29: {req} has not ended"
            kind, text = req.finished_reason
            assert kind in ("stop", "length", "abort"), f"{req} ended with {kind}"
            assert "SCHED-16" not in text, f"SCHED-16: {req} {text}"
            whole = want if kind != "abort" else want[: len(self.said[rid])]
            assert self.said[rid] == whole == list(req.output_ids), f"{req} says something else"
        assert self.scheduler.flush_cache()
        self.scheduler.check_memory()


def play(impls: Sequence[ModuleType], history: History) -> Counter[str]:
    """Play it on each implementation in turn, and compare them after every action.

    What happened, of the first. AssertionError, or whatever was raised, where something is wrong.
    """
    sides = [_Side(impl, history) for impl in impls]
    try:
        for action in history.actions:
            _act(sides, action)
        for _ in range(5000):
            if sides[0].scheduler.is_idle:
                break
            _act(sides, ("step",))
        for side in sides:
            side.assert_right()
    finally:
        for side in sides:
            side.scheduler.close()
    first = sides[0]
    return first.happened + Counter(first.scheduler.counters())


def _act(sides: Sequence[_Side], action: tuple[Any, ...]) -> None:
    for side in sides:
        side.act(action)
    for side in sides[1:]:
        assert side.state() == sides[0].state(), f"they differ after {action}"


def shortest(impls: Sequence[ModuleType], history: History, tries: int = 400) -> History:
    """With as few actions as still fail, found by leaving out one part after the other."""
    part = max(len(history.actions) // 2, 1)
    while part and tries:
        start = 0
        while start < len(history.actions) and tries:
            tries -= 1
            kept = history.actions[:start] + history.actions[start + part :]
            shorter = replace(history, actions=kept)
            if _fails(impls, shorter):
                history = shorter
            else:
                start += part
        part //= 2
    return history


def _fails(impls: Sequence[ModuleType], history: History) -> bool:
    try:
        play(impls, history)
    except Exception:
        return True
    return False
