"""What a model says of a whole sequence, in float64 and without any cache (RUN-15, RUN-16)."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kvspec.errors import ContractError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Comparison",
    "Mismatch",
    "Remembered",
    "compare_with_reference",
    "reference_logits",
    "reference_model",
]

_BLOCK = 128
"""Positions whose logits are there at once: 50 MB of 49152 words."""


class Mismatch(NamedTuple):
    """A token that the reference finds worse than another."""

    position: int
    """Its place among the output tokens."""
    token: int
    expected: int
    behind: float
    """By how much its logit is less than the expected one's, in the reference."""


Remembered: TypeAlias = dict[tuple[int, ...], Any]
"""Tokens -> what a model computed of them before its head. Of one model."""


class Comparison(NamedTuple):
    """An output against the reference, every token given those before it."""

    tokens: int
    near_ties: int
    """Tokens that are not the reference's, with a logit less than the tolerance behind it."""
    mismatches: tuple[Mismatch, ...]
    """All others that are not the reference's."""
    max_logit_difference: float | None
    """The largest, of any word at any position; None where no logits were given."""
    smallest_margin: float
    """Between the reference's best two, at any position."""


def reference_model(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy of its own in float64, by torch's attention where the model can have it.

    transformers computes norms and rotations of some models in float32 whatever their weights are.
    """
    own = copy.deepcopy(model).double().eval()
    if own._supports_sdpa:
        own.set_attn_implementation("sdpa")
    if getattr(own.config, "_experts_implementation", None) is not None:
        own.set_experts_implementation("eager")  # the others have no float64
    return own


def reference_logits(
    model64: "PreTrainedModel", tokens: Sequence[int], positions: Sequence[int] | None = None
) -> Tensor:
    """float64 [positions, vocabulary]: after each of `positions`, or of all tokens (RUN-15).

    One forward over all tokens, without a cache. The head is applied in blocks; the result is what
    needs most memory, where all of it is asked for.
    """
    at = list(range(len(tokens))) if positions is None else list(positions)
    return torch.cat([logits for _, logits in _blocks(model64, tokens, at)])


def compare_with_reference(
    model64: "PreTrainedModel",
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    logits: Tensor | None = None,
    *,
    tolerance: float = 1e-3,
    remembered: Remembered | None = None,
) -> Comparison:
    """Whether each output token is the most likely one after the prompt and those before it.

    One that is not is a near tie if its logit is less than `tolerance` behind, else a mismatch
    (RUN-16). `logits` [output tokens, vocabulary] are those it was chosen by. One forward, and the
    memory of `reference_logits` of a block; what it computes before the head is put into
    `remembered`, and taken from there where the same tokens are compared again. ContractError if
    there is nothing to compare (RUN-17).
    """
    prompt, output = list(prompt_ids), list(output_ids)
    _require_comparable(prompt, output, logits, tolerance)
    first = len(prompt) - 1
    near_ties, mismatches = 0, list[Mismatch]()
    worst, margin = torch.zeros((), dtype=torch.float64), float("inf")
    places = list(range(first, first + len(output)))
    for start, block in _blocks(model64, prompt + output[:-1], places, remembered):
        if logits is not None:
            given = logits[start : start + len(block)].to(torch.float64)
            worst = torch.maximum(worst, (given - block).abs().max())
        best, second = block.topk(2, dim=-1).values.unbind(dim=-1)
        margin = min(margin, float((best - second).min()))
        chosen = torch.tensor(output[start : start + len(block)])
        behind = (best - block[torch.arange(len(block)), chosen]).tolist()
        expected = block.argmax(dim=-1).tolist()
        for at, (token, right, short) in enumerate(
            zip(chosen.tolist(), expected, behind, strict=True)
        ):
            if token == right or short == 0:
                continue
            if short < tolerance:
                near_ties += 1
            else:
                mismatches.append(Mismatch(start + at, token, right, short))
    difference = None if logits is None else float(worst)
    return Comparison(len(output), near_ties, tuple(mismatches), difference, margin)


def _require_comparable(
    prompt: Sequence[int], output: Sequence[int], logits: Tensor | None, tolerance: float
) -> None:
    """RUN-17."""
    if not prompt or not output:
        raise ContractError(
            f"RUN-17: {len(prompt)} tokens of prompt and {len(output)} of output, not one of each"
        )
    if logits is not None and (logits.dim() != 2 or len(logits) != len(output)):
        raise ContractError(
            f"RUN-17: logits {list(logits.shape)} are not [{len(output)}, vocabulary]"
        )
    if not tolerance >= 0:
        raise ContractError(f"RUN-17: a tolerance of {tolerance}")


def _blocks(
    model64: "PreTrainedModel",
    tokens: Sequence[int],
    positions: Sequence[int],
    remembered: Remembered | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Where a block starts among the positions, and its logits."""
    ids, at = torch.tensor([list(tokens)]), torch.tensor(list(positions), dtype=torch.int64)
    with torch.no_grad(), _computed_once(model64, ids, {} if remembered is None else remembered):
        slices = "logits_to_keep" in inspect.signature(model64.forward).parameters
        for start in range(0, len(at), _BLOCK):
            block = at[start : start + _BLOCK]
            given = {"logits_to_keep": block} if slices else {}
            found: Tensor = model64(input_ids=ids, use_cache=False, **given).logits[0]
            yield start, found if slices else found[block]


@contextmanager
def _computed_once(model: "PreTrainedModel", ids: Tensor, remembered: Remembered) -> Iterator[None]:
    """Inside, the model's decoder gives what it computes for these tokens, at once.

    What is left of a forward is the head, with whatever the model does to its logits.
    """
    decoder = model.base_model
    tokens = tuple(ids[0].tolist())
    if tokens not in remembered:
        remembered[tokens] = decoder(input_ids=ids, use_cache=False)
    computed = remembered[tokens]
    decoder.forward = lambda *_, **__: computed
    try:
        yield
    finally:
        del decoder.forward
