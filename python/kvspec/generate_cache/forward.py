"""What a forward of the model brings, read from its arguments. Spec: GEN."""

import inspect
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Module

from kvspec.errors import ContractError
from kvspec.generate_cache.attachment import CACHE
from kvspec.generate_cache.call import Call, Tokens

__all__ = ["Forward", "read_forward"]

_READ = {"input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", CACHE}
_HARMLESS = {"return_dict", "logits_to_keep", "output_attentions", "output_hidden_states"}
"""On these KV does not depend."""


class Forward(NamedTuple):
    """The tokens of each row and where they stand."""

    tokens: list[Tokens]
    """Without padding."""
    pads: list[int]
    """Columns of padding that the row begins with, all in the first forward."""
    width: int
    """Columns, padding included."""
    computed: int
    """Of the first forward, how many of the last columns are computed in any case."""
    by_column: list[str]
    """Arguments with one entry for each column."""


def read_forward(model: Module, kwargs: dict[str, Any], call: Call) -> Forward:
    """What these arguments bring; ContractError if KV is not theirs alone (GEN-9, GEN-12)."""
    _require_nothing_else(kwargs)
    ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 1:
        _refuse("GEN-9", "a forward without input_ids [batch, tokens]")
    if call.started and len(ids) != call.batch:
        _refuse("GEN-9", f"a forward of {len(ids)} rows in a call of {call.batch}")
    width, past = ids.shape[1], call.columns
    pads = _pads(kwargs.get("attention_mask"), len(ids), width + past)
    if call.started and pads != call.pads:
        _refuse("GEN-9", f"padding is {pads}, and was {call.pads} in the first forward")
    _require_positions(model, kwargs, pads, past, width)
    rows = ids.tolist()
    tokens = [row[max(pad - past, 0) :] for row, pad in zip(rows, pads, strict=True)]
    names = ("input_ids", "position_ids", "cache_position")
    by_column = [name for name in names if kwargs.get(name) is not None]
    computed = 1 if call.started else _computed(model, kwargs, width)
    return Forward(tokens, pads, width, computed, by_column)


def _require_nothing_else(kwargs: dict[str, Any]) -> None:
    other = sorted(
        name
        for name, value in kwargs.items()
        if value is not None and name not in _READ and name not in _HARMLESS
    )
    if other:
        _refuse("GEN-9", f"a forward with {', '.join(other)}, on which KV may depend")
    if kwargs.get("use_cache") is False:
        _refuse("GEN-9", "a forward with a cache and use_cache=False")
    if torch.is_grad_enabled():
        _refuse("GEN-9", "a forward with gradients: use torch.no_grad()")


def _pads(mask: Tensor | None, batch: int, columns: int) -> list[int]:
    """How many columns of padding each row begins with."""
    if mask is None:
        return [0] * batch
    if mask.dim() != 2 or tuple(mask.shape) != (batch, columns):
        _refuse(
            "GEN-9",
            f"attention_mask is {list(mask.shape)}, but there are [{batch}, {columns}] tokens:"
            " a prompt is given as a whole",
        )
    real = mask != 0
    pads = columns - real.sum(dim=1)
    if bool((real != (torch.arange(columns) >= pads[:, None])).any()) or bool(
        (pads >= columns).any()
    ):
        _refuse(
            "GEN-9",
            "padding is not on the left alone, or is all of a row: where no attention_mask is"
            " given, transformers takes every pad_token_id of a prompt for padding",
        )
    return [int(pad) for pad in pads]


def _require_positions(
    model: Module, kwargs: dict[str, Any], pads: list[int], past: int, width: int
) -> None:
    """Each token stands where it would without padding, as in any other call (GEN-9)."""
    positions = kwargs.get("position_ids")
    if positions is None:
        if any(pads):
            _refuse("GEN-9", "padding without position_ids")
        return
    expected = torch.arange(past, past + width) - torch.tensor(pads)[:, None]
    if positions.dim() != 2 or positions.shape[1] != width:
        _refuse("GEN-9", f"position_ids are {list(positions.shape)} for {width} columns")
    if bool(((positions != expected) & (expected >= 0)).any()):
        _refuse("GEN-9", "position_ids are not those of the tokens, counted from 0")


def _computed(model: Module, kwargs: dict[str, Any], width: int) -> int:
    """How many of the last columns somebody wants more of than their KV (GEN-3)."""
    if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
        return width
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return 1
    keep = kwargs.get("logits_to_keep") or 0
    return min(keep, width) if isinstance(keep, int) and keep > 0 else width


def _refuse(clause: str, what: str) -> NoReturn:
    raise ContractError(f"{clause}: {what}")
