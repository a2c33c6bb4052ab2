"""The scheduler: the suite over both implementations, and random histories in lockstep."""

from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.scheduler import SchedulerConformance
from kvspec.conformance.scheduler.histories import History, draw, play, shortest
from kvspec.interfaces.prefix_cache import MatchResult
from kvspec.scheduler import Req, SchedulePolicy, Scheduler, drafts

SEEDS = range(28)
LEAST = {
    "retractions": 12,
    "resumed with hits": 8,
    "chunks": 100,
    "evicted_tokens": 500,
    "overlapped_steps": 100,
    "aborted, then leaving": 2,
    "aborted, then finished": 5,
    "flush was True": 3,
    "flush was False": 3,
    "duplicates live": 5,
    "accepted_draft_tokens": 30,
    "draft_tokens": 100,
}
"""What has to have happened in all of them together."""


class TestOracle(SchedulerConformance):
    impl = kvspec.oracle


class TestNative(SchedulerConformance):
    impl = kvspec


def told(impls: list[ModuleType], history: History, seed: int) -> Counter[str]:
    """What happened in a history; where it fails, the shortest one that does."""
    try:
        return play(impls, history)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error}\n{shortest(impls, history)}") from error


@clause("SCHED-8", "SCHED-17", "SCHED-22", "SCHED-23", "SCHED-29")
def test_random_histories_say_the_same_words_in_lockstep() -> None:
    happened: Counter[str] = Counter()
    for seed in SEEDS:
        happened += told([kvspec.oracle, kvspec], draw(seed), seed)
    print(f"seeds {SEEDS}: {dict(happened)}")
    assert {name: happened[name] for name, least in LEAST.items() if happened[name] < least} == {}
    assert happened["draft_tokens"] > happened["accepted_draft_tokens"]


def test_a_failure_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the actions that are needed, in a text that can be pasted."""
    monkeypatch.setattr(Scheduler, "flush_cache", lambda self: False)
    history = shortest([kvspec.oracle], draw(3))
    assert history.actions == ()  # the last flush fails without any
    monkeypatch.undo()
    monkeypatch.setattr(Scheduler, "abort_request", lambda self, rid: self._in_use.pop(rid))
    seed = next(seed for seed in range(100) if any(a[0] == "abort" for a in draw(seed).actions))
    history = shortest([kvspec.oracle], draw(seed))
    assert [action[0] for action in history.actions] == ["add", "abort"]
    assert str(history).startswith("import kvspec.oracle")
    assert f"{history.actions[0]!r}" in str(history)


class Prefixes:
    """A cache that has the first tokens of everything but the last."""

    def match_prefix(self, key: list[int], **_: object) -> MatchResult:
        return MatchResult(torch.arange(max(len(key) - 1, 0)), None, None)


@clause("SCHED-9")
def test_a_chain_of_prefixes_as_long_as_the_queue_is_walked() -> None:
    """The longest first, and without a call for each."""
    waiting = [Req(f"{length}", range(length), 1) for length in range(3, 1100)]
    cache: Any = Prefixes()
    policy = SchedulePolicy("dfs-weight", cache)
    order = policy.calc_priority(waiting).order
    assert [len(req.origin_input_ids) for req in order] == list(range(1099, 2, -1))


@clause("SCHED-24")
def test_a_draft_is_what_followed_before() -> None:
    assert drafts.guess([1, 2, 3, 4, 1, 2, 3], 3) == [4, 1, 2]
    assert drafts.guess([5, 3, 1, 9, 3, 1], 2) == [9, 3]
    assert drafts.guess([7, 7], 4) == [7]
    assert drafts.guess([1, 2, 3], 4) == drafts.guess([1], 4) == []
    assert drafts.accepted([4, 1], [4, 1, 8]) == [4, 1, 8]
    assert drafts.accepted([4, 1], [4, 2, 8]) == [4, 2]
    assert drafts.accepted([], [9]) == [9]
