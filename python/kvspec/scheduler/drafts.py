"""Tokens that are likely to come next, by what was said before. Spec: SCHED-24."""

from collections.abc import Sequence

__all__ = ["accepted", "guess"]

_NGRAMS = (3, 2, 1)


def guess(tokens: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the last occurrence of the newest three tokens, or of the
    newest two, or one. O(tokens).
    """
    for length in _NGRAMS:
        newest = list(tokens[-length:])
        for start in range(len(tokens) - length - 1, -1, -1):
            if len(newest) == length and list(tokens[start : start + length]) == newest:
                return list(tokens[start + length : start + length + count])
    return []


def accepted(draft: Sequence[int], sampled: Sequence[int]) -> list[int]:
    """The tokens that a step commits: what was sampled, as far as the draft was right, and the one
    after that.
    """
    right = 0
    while right < len(draft) and draft[right] == sampled[right]:
        right += 1
    return list(sampled[: right + 1])
