"""A seeded workload of chats, agents and long documents, for when there is no trace."""

import random
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from kvspec.errors import ContractError
from kvspec.replay.trace import Trace, TraceRequest

__all__ = ["generate"]


class _Kind(NamedTuple):
    """What sessions of one kind have in common. Lengths are tokens, times milliseconds."""

    share: float
    """Of new sessions."""
    texts: int
    """How many different first texts there are: system prompts, or documents."""
    text: int
    """The mean length of a first text."""
    turns: int
    said: int
    """The mean length that a turn adds to the input."""
    answered: int
    """The mean length of an output."""
    pause: float
    """The mean time between two turns."""


_KINDS = (
    _Kind(share=0.6, texts=8, text=600, turns=6, said=150, answered=300, pause=30_000),  # chat
    _Kind(share=0.25, texts=3, text=4_000, turns=20, said=900, answered=150, pause=4_000),  # agent
    _Kind(
        share=0.15, texts=40, text=12_000, turns=3, said=60, answered=400, pause=45_000
    ),  # document
)
_ARRIVAL_MS = 2_000
"""The mean time between two new sessions."""


@dataclass
class _Session:
    kind: _Kind
    blocks: list[int]
    """Ids of the whole blocks so far."""
    tokens: int
    turns: int


@dataclass
class _Workload:
    """Only `random()` is drawn from: its sequence is the same in every version of Python."""

    rng: random.Random
    block: int
    id_count: int = 0
    texts: dict[tuple[int, int], tuple[list[int], int]] = field(default_factory=dict)

    def length(self, mean: float) -> int:
        """Of [mean / 2, 3 mean / 2)."""
        return 1 + int(mean * (0.5 + self.rng.random()))

    def new_ids(self, count: int) -> list[int]:
        self.id_count += count
        return list(range(self.id_count - count, self.id_count))

    def start(self) -> _Session:
        draw, kind = self.rng.random(), 0
        while kind < len(_KINDS) - 1 and draw >= _KINDS[kind].share:
            draw -= _KINDS[kind].share
            kind += 1
        # The square makes the first texts popular and the last ones rare.
        text = kind, int(_KINDS[kind].texts * self.rng.random() ** 2)
        if text not in self.texts:
            tokens = self.length(_KINDS[kind].text)
            self.texts[text] = self.new_ids(tokens // self.block), tokens
        blocks, tokens = self.texts[text]
        return _Session(_KINDS[kind], list(blocks), tokens, self.length(_KINDS[kind].turns))

    def turn(self, session: _Session, time: float) -> TraceRequest:
        """The next request of a session. A partial last block is content of its own."""
        session.tokens += self.length(session.kind.said)
        whole, partial = divmod(session.tokens, self.block)
        session.blocks += self.new_ids(whole - len(session.blocks))
        ids = session.blocks + self.new_ids(1 if partial else 0)
        length, answer = session.tokens, self.length(session.kind.answered)
        session.tokens += answer
        session.turns -= 1
        return TraceRequest(time, length, answer, np.array(ids, dtype=np.uint64))


def generate(seed: int = 0, requests: int = 1000, block: int = 64) -> Trace:
    """Sessions of the three kinds, interleaved in time; a pure function (REPLAY-8).

    Each turn repeats all of its session's inputs and outputs before it; sessions share their first
    text with others of their kind. O(requests * (log requests + blocks of one)).
    """
    if requests < 1 or block < 1:
        raise ContractError(f"REPLAY-8: generate({requests=}, {block=}) but both must be positive")
    workload = _Workload(random.Random(seed), block)
    waiting: list[tuple[float, int, _Session]] = []
    made: list[TraceRequest] = []
    arrival, number = 0.0, 0
    while len(made) < requests:
        while not waiting or arrival <= waiting[0][0]:
            heappush(waiting, (arrival, number, workload.start()))
            arrival += workload.length(_ARRIVAL_MS)
            number += 1
        time, order, session = heappop(waiting)
        made.append(workload.turn(session, time))
        if session.turns > 0:
            heappush(waiting, (time + workload.length(session.kind.pause), order, session))
    return Trace(name=f"generated, seed {seed}", block=block, requests=made)
