"""Attention over KV that is read by slot, under transformers' attention interface.

Whoever calls the model sets, with `attending`, who answers its layers in this context: `Survey`
looks at what they ask, `PagedAttention` is one step over the pool. Of a model of which neither is
set nobody can have this attention, as only a runner's own copy is told its name.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvspec.errors import ContractError
from kvspec.interfaces.model_runner import ForwardBatch
from kvspec.model_runner.pools import KVPool, LayerFacts, Pairs

__all__ = ["NAME", "Attends", "PagedAttention", "Survey", "attending", "register"]

NAME = "kvspec_paged"
"""What the attention is called among transformers'."""


class Call(NamedTuple):
    """One layer's call. query is [1, heads, tokens, dim], key and value [1, kv heads, ...]."""

    layer_id: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    """[heads]: logits that take part in the softmax and have no value."""
    rest: dict[str, Any]


class Attends(Protocol):
    def attend(self, call: Call) -> Tensor:
        """[1, tokens, heads, value dim]."""


_current: ContextVar[Attends | None] = ContextVar("kvspec_attention", default=None)


@contextmanager
def attending(attends: Attends) -> Iterator[None]:
    """Inside, and in no other thread, this answers the layers."""
    token = _current.set(attends)
    try:
        yield
    finally:
        _current.reset(token)


def register() -> None:
    """Make the attention known to transformers, under `NAME`. It has no mask of its own: what a
    layer sees is decided here, by slots and positions.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for each layer."""
    current = _current.get()
    if current is None:
        raise ContractError(f"RUN-13: the attention {NAME} is that of a ModelRunner's own copy")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise ContractError(f"RUN-8: a {type(module).__name__} does not say which layer it is of")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rest["is_causal"] = rest.get("is_causal", getattr(module, "is_causal", True))
    call = Call(
        layer, query, key, value, attention_mask, scale, sliding_window, softcap, s_aux, rest
    )
    return current.attend(call), None


class Survey:
    """Notes what every layer asks, and answers as if there were no context."""

    def __init__(self) -> None:
        self.layers: list[LayerFacts] = []

    def attend(self, call: Call) -> Tensor:
        query, key, value = call.query, call.key, call.value
        self._require_known(call)
        plain = call.softcap is None and call.sinks is None
        shapes = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        self.layers.append(LayerFacts(call.layer_id, *shapes, call.window, plain))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    @staticmethod
    def _require_known(call: Call) -> None:
        """RUN-8."""
        place = f"RUN-8: layer {call.layer_id}"
        if call.mask is not None:
            raise ContractError(f"{place} attends under a mask of its own")
        if call.rest["is_causal"] is False:
            raise ContractError(f"{place} attends to what comes later")
        if call.rest.get("position_bias") is not None:
            raise ContractError(f"{place} has a bias of positions")
        if call.key.shape[2] != call.query.shape[2]:
            raise ContractError(
                f"{place} has KV of {call.key.shape[2]} tokens for {call.query.shape[2]} new ones"
            )


class Group(NamedTuple):
    """Requests with equally many new tokens, attended in one call."""

    rows: Tensor
    """int64 [requests · new]: their new tokens among all of the step."""
    slots: Tensor
    """int64 [requests · longest]: what they read, in the layer's own pool; where one has less than
    the longest, its last slot stands again and is masked.
    """
    requests: int
    mask: Tensor | None
    """[requests, 1, groups · new, longest], 0 or -inf; None if everything is seen."""
    causal: bool
    """Instead of a mask: each sees what comes before it, and there is nothing else."""


class PagedAttention:
    """One step: writes KV to slots, and reads it back by slot (RUN-2, RUN-4, RUN-5)."""

    def __init__(
        self,
        batch: ForwardBatch,
        kv: KVPool,
        layers: Sequence[LayerFacts],
        pairs: Pairs | None,
        dtype: torch.dtype,
    ) -> None:
        """`pairs` is needed where a layer has a window; `dtype` is that of the queries.

        ContractError if a position within a window has no pair (RUN-7). O(context).
        """
        self._batch, self._kv, self._pairs, self._dtype = batch, kv, pairs, dtype
        self._causal = all(layer.plain for layer in layers)
        self._heads = layers[0].heads // layers[0].kv_heads
        self._groups = {window: self._grouped(window) for window in {x.window for x in layers}}
        self.rows_read = 0
        """Rows of KV that were read, keys and values of one layer as one."""
        self.attention_calls = 0

    # -- what is read ----------------------------------------------------------------------------

    def _grouped(self, window: int | None) -> list[Group]:
        """Those of equally many new tokens, and contexts less than twice as long as another's."""
        together = defaultdict[tuple[int, int], list[int]](list)
        for request, (length, new) in enumerate(
            zip(self._batch.seq_lens, self._batch.extend_lens, strict=True)
        ):
            if new:
                seen = length - self._first(request, window)
                together[new, seen.bit_length()].append(request)
        return [self._group(new, found, window) for (new, _), found in together.items()]

    def _first(self, request: int, window: int | None) -> int:
        """The first position that any new token attends to."""
        start = self._batch.seq_lens[request] - self._batch.extend_lens[request]
        return 0 if window is None else max(0, start - window + 1)

    def _group(self, new: int, requests: list[int], window: int | None) -> Group:
        batch = self._batch
        ends = torch.tensor([batch.seq_lens[each] for each in requests])
        firsts = torch.tensor([self._first(each, window) for each in requests])
        longest = int((ends - firsts).max())
        columns = torch.arange(longest)
        read = [
            batch.token_slots[each][first:].index_select(
                0, columns.clamp(max=batch.seq_lens[each] - first - 1)
            )
            for each, first in zip(requests, firsts.tolist(), strict=True)
        ]
        slots = torch.cat(read)
        if window is not None:
            slots = self._paired(slots, requests, longest)
        starts = torch.tensor([0, *batch.extend_lens]).cumsum(0)[requests]
        rows = (starts[:, None] + torch.arange(new)).flatten()
        places = (ends - new)[:, None] + torch.arange(new)
        seen = self._seen(places, firsts[:, None] + columns, window)
        mask = None
        causal = self._causal and longest == new and bool((ends - firsts == new).all())
        causal = causal and (window is None or window >= new)
        if not causal and not seen.all():
            mask = torch.zeros(seen.shape, dtype=self._dtype).masked_fill_(~seen, float("-inf"))
            mask = mask[:, None].repeat(1, 1, self._heads, 1)
        return Group(rows, slots, len(requests), mask, causal and new > 1)

    @staticmethod
    def _seen(places: Tensor, positions: Tensor, window: int | None) -> Tensor:
        """Whether the token at a place [requests, new] attends to a position [requests, longest]:
        bool [requests, new, longest].
        """
        seen = positions[:, None] <= places[:, :, None]
        if window is not None:
            seen &= positions[:, None] > places[:, :, None] - window
        return seen

    def _paired(self, slots: Tensor, requests: list[int], longest: int) -> Tensor:
        """The window slots, each of which is one (RUN-5, RUN-7)."""
        if self._pairs is None:
            raise ContractError("RUN-7: nobody knows the pairs of the slots")
        found = self._pairs(slots).to(torch.int64)
        none = torch.nonzero(found < self._kv.page_size).flatten()
        if len(none):
            at = int(none[0])
            raise ContractError(
                f"RUN-7: slot {int(slots[at])}, within the window of request"
                f" {requests[at // longest]} of the batch, has no pair"
            )
        return found

    # -- a layer ---------------------------------------------------------------------------------

    def attend(self, call: Call) -> Tensor:
        """Write what is new, then read all of it (RUN-2, RUN-3)."""
        self._write(call)
        keys, values = self._kv.get_kv_buffer(call.layer_id)
        query = call.query[0]
        heads, tokens, _ = query.shape
        attended = query.new_empty(tokens, heads, values.shape[-1])
        for group in self._groups[call.window]:
            mine = query if len(group.rows) == tokens else query.index_select(1, group.rows)
            asked = mine.reshape(heads, group.requests, -1, query.shape[-1]).transpose(0, 1)
            found = self._attend(
                call, group, asked, self._read(keys, group), self._read(values, group)
            )
            flat = found.transpose(1, 2).reshape(-1, heads, values.shape[-1])
            if len(group.rows) == tokens:
                attended = flat
            else:
                attended[group.rows] = flat
            self.rows_read += len(group.slots)
            self.attention_calls += 1
        return attended[None]

    def _write(self, call: Call) -> None:
        keys, values = call.key[0].transpose(0, 1), call.value[0].transpose(0, 1)
        self._kv.set_kv_buffer(call.layer_id, self._batch.out_cache_loc, keys, values)

    def _read(self, rows: Tensor, group: Group) -> Tensor:
        """[requests, kv heads, longest, dim], of the type that is computed with."""
        if rows.itemsize == 1:  # which has no index_select
            bits = rows.view(torch.uint8).index_select(0, group.slots)
            found = bits.view(rows.dtype)
        else:
            found = rows.index_select(0, group.slots)
        read: Tensor = found.to(self._dtype).unflatten(0, (group.requests, -1)).transpose(1, 2)
        return read

    @staticmethod
    def _attend(call: Call, group: Group, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[requests, heads, new, value dim].

        The queries of all heads that share a head of KV stand as if they were new tokens.
        """
        requests, heads, new, dim = query.shape
        kv_heads = keys.shape[1]
        if group.causal:
            whole: Tensor = scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=call.scaling, enable_gqa=heads > kv_heads
            )
            return whole
        packed = query.reshape(requests, kv_heads, -1, dim)
        found: Tensor
        if call.softcap is None and call.sinks is None:
            found = scaled_dot_product_attention(
                packed, keys, values, attn_mask=group.mask, scale=call.scaling
            )
        else:
            found = _capped(call, group, packed, keys) @ values
        return found.reshape(requests, heads, new, -1)


def _capped(call: Call, group: Group, query: Tensor, keys: Tensor) -> Tensor:
    """The weights [requests, kv heads, groups · new, longest], with a cap or sinks, or both."""
    scores = query @ keys.transpose(2, 3) * call.scaling
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if group.mask is not None:
        scores = scores + group.mask
    if call.sinks is None:
        return scores.softmax(dim=-1)
    requests, kv_heads, rows, longest = scores.shape
    sinks = call.sinks.to(scores.dtype).view(kv_heads, -1, 1)  # [kv heads, groups, 1]
    new = rows // sinks.shape[1]
    column = sinks.expand(-1, -1, new).reshape(1, kv_heads, rows, 1).expand(requests, -1, -1, -1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :longest]
