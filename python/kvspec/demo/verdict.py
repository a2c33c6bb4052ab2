"""Whether all kinds said the same, and whether that is right. Spec: DEMO-1, DEMO-2."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from kvspec.demo.serving import KindRun, Turn
from kvspec.model_runner import Comparison

__all__ = [
    "MOST_NEAR_TIES",
    "TOLERANCE",
    "Compare",
    "Difference",
    "KindVerdict",
    "Verdict",
    "judge",
    "within",
]

TOLERANCE = 1e-3
"""A logit less than this behind the reference's best is a near tie."""
MOST_NEAR_TIES = 1000
"""At most one token in so many may be one."""


class Compare(Protocol):
    """`compare_with_reference` of a model (RUN-16)."""

    def __call__(
        self,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        logits: Tensor | None = None,
        *,
        tolerance: float,
    ) -> Comparison: ...


class Difference(NamedTuple):
    """A token that should not have come out."""

    rid: str
    position: int
    """Its place in the answer."""
    token: int | None
    """None where the answer ends, or is missing."""
    expected: int | None
    behind: float | None
    """By how much its logit is less, in the reference; None if another kind says otherwise."""


class KindVerdict(NamedTuple):
    """The words of one kind."""

    identical_output: bool
    tokens: int
    near_ties: int
    differences: tuple[Difference, ...]


class Verdict(NamedTuple):
    """The words of all kinds."""

    identical_output: bool
    tokens: int
    near_ties: int
    kinds: tuple[KindVerdict, ...]
    """In the order of the runs."""


def within(tokens: int, near_ties: int) -> bool:
    """Whether there are few enough near ties (DEMO-2)."""
    return near_ties * MOST_NEAR_TIES <= tokens


_Judged: TypeAlias = dict[tuple[str, int], float]
"""(turn, place in its answer) of a token that is not the reference's -> how far behind it is."""


def judge(runs: Sequence[KindRun], compare: Compare, *, tolerance: float = TOLERANCE) -> Verdict:
    """Every token of every kind against the reference, given those before it (DEMO-1, DEMO-2).

    Where two kinds differ one of them must have had a near tie. One forward for each conversation
    that differs from those before.
    """
    known: dict[tuple[object, ...], list[tuple[str, int, int, int, float]]] = {}
    kinds = []
    near: list[set[tuple[str, int]]] = []
    for run in runs:
        found = [each for turns in _conversations(run) for each in _behind(turns, compare, known)]
        ties = {(rid, at) for rid, at, _, _, short in found if short < tolerance}
        wrong = [Difference(*each) for each in found if not each[4] < tolerance]
        wrong += _unlike(runs[0], run, near[0] | ties if near else ties)
        near.append(ties)
        tokens = sum(len(turn.output_ids) for turn in run.turns)
        good = not wrong and within(tokens, len(ties))
        kinds.append(KindVerdict(good, tokens, len(ties), tuple(wrong)))
    return Verdict(
        all(each.identical_output for each in kinds),
        sum(each.tokens for each in kinds),
        sum(each.near_ties for each in kinds),
        tuple(kinds),
    )


def _conversations(run: KindRun) -> list[list[Turn]]:
    """The turns of each, in order."""
    found: list[list[Turn]] = [[] for _ in run.conversations]
    for turn in run.turns:
        found[turn.conversation].append(turn)
    return [sorted(turns, key=lambda turn: turn.number) for turns in found]


def _behind(
    turns: Sequence[Turn],
    compare: Compare,
    known: dict[tuple[object, ...], list[tuple[str, int, int, int, float]]],
) -> list[tuple[str, int, int, int, float]]:
    """(turn, place, token, expected, behind) of each token that is not the reference's.

    The whole conversation goes through the reference at once; what the user says is passed over.
    """
    spoken = [turn for turn in turns if turn.output_ids]
    if not spoken:
        return []
    key = tuple((turn.rid, turn.prompt_ids, turn.output_ids) for turn in spoken)
    if key not in known:
        first, last = spoken[0], spoken[-1]
        tokens = (*last.prompt_ids, *last.output_ids)
        start = len(first.prompt_ids)
        places = {
            len(turn.prompt_ids) - start + at: (turn.rid, at)
            for turn in spoken
            for at in range(len(turn.output_ids))
        }
        found = compare(tokens[:start], tokens[start:], tolerance=0.0).mismatches
        known[key] = [
            (*places[each.position], each.token, each.expected, each.behind)
            for each in found
            if each.position in places
        ]
    return known[key]


def _unlike(first: KindRun, other: KindRun, near_ties: set[tuple[str, int]]) -> list[Difference]:
    """Where the words of two kinds part, unless at a near tie: what follows is judged by itself."""
    found: list[Difference] = []
    for mine, theirs in zip(_conversations(first), _conversations(other), strict=True):
        answers = {turn.rid: turn.output_ids for turn in theirs}
        for turn in mine:
            one, two = list(turn.output_ids), list(answers.get(turn.rid, ()))
            if one == two:
                continue
            pairs = enumerate(zip_longest(one, two))
            at, (expected, said) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
            if (turn.rid, at) not in near_ties:
                found.append(Difference(turn.rid, at, said, expected, None))
            break
    return found
