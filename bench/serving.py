"""A worker on the CPU with a model that really computes, and what it is asked.

Nothing is random: equal prompts give equal tokens.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from kvspec.interfaces.model_runner import ForwardBatch, GenerationBatchResult
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.scheduler import Req

__all__ = ["Model", "Shape", "prompts"]


class Shape(NamedTuple):
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    vocabulary: int = 512
    positions: int = 1024


class Model:
    """A decoder whose weights are a function of the seed, over pools of an implementation:
    `interfaces.model_runner.ModelWorker`. KV is float32 [slots, heads, dim].
    """

    def __init__(
        self, impl: Any, shape: Shape, *, page_size: int, pages: int, rows: int, seed: int = 0
    ) -> None:
        memory = {"dtype": torch.float32, "device": "cpu", "kvcache": None, "need_sort": False}
        self.max_total_num_tokens = pages * page_size
        self.sliding_window_size: int | None = None
        self.rows = impl.ReqToTokenPool(rows, shape.positions, "cpu", False)
        self.allocator = impl.PagedTokenToKVPoolAllocator(
            size=self.max_total_num_tokens, page_size=page_size, **memory
        )
        draw = torch.Generator().manual_seed(seed)
        self.shape, self.dim = shape, shape.hidden // shape.heads

        def weights(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=draw) / math.sqrt(rows)

        wide = 4 * shape.hidden
        self.tokens = weights(shape.vocabulary, shape.hidden) * math.sqrt(shape.vocabulary)
        self.places = weights(shape.positions, shape.hidden) * math.sqrt(shape.positions)
        self.head = weights(shape.hidden, shape.vocabulary)
        self.layers = [
            (
                weights(shape.hidden, 3 * shape.hidden),
                weights(shape.hidden, shape.hidden),
                weights(shape.hidden, wide),
                weights(wide, shape.hidden),
            )
            for _ in range(shape.layers)
        ]
        kv = (pages + 1) * page_size, shape.heads, self.dim
        self.keys = [torch.zeros(kv) for _ in self.layers]
        self.values = [torch.zeros(kv) for _ in self.layers]

    def get_memory_pool(self) -> tuple[ReqToTokenPool, BaseTokenToKVPoolAllocator]:
        return self.rows, self.allocator

    def forward_batch_generation(self, batch: ForwardBatch) -> GenerationBatchResult:
        """Requests with as many new tokens together; sampled is after the last one of each."""
        ends = torch.tensor(batch.extend_lens).cumsum(0)
        if len(set(batch.extend_lens)) == 1:
            groups = [range(len(batch.extend_lens))]
        else:
            groups = [range(at, at + 1) for at in range(len(batch.extend_lens))]
        said = torch.cat([self._group(batch, ends, group) for group in groups])
        sampled = torch.isin(ends - 1, batch.sample_indices)
        assert int(sampled.sum()) == len(batch.sample_indices)
        return GenerationBatchResult(said[sampled])

    def _group(self, batch: ForwardBatch, ends: Tensor, group: range) -> Tensor:
        new = batch.extend_lens[group.start]
        span = slice(int(ends[group.start]) - new, int(ends[group.stop - 1]))
        context = torch.nn.utils.rnn.pad_sequence(
            list(batch.token_slots[group.start : group.stop]), batch_first=True
        )
        parts = (
            part[span].view(len(group), new)
            for part in (batch.input_ids, batch.positions, batch.out_cache_loc)
        )
        return self.forward(*parts, context)

    def forward(self, tokens: Tensor, places: Tensor, slots: Tensor, context: Tensor) -> Tensor:
        """The next token of each request: int64 [batch].

        `tokens`, `places` and `slots` are [batch, new]: what to compute, its positions in the
        requests, and where its KV goes. `context` [batch, longest] are the slots of all positions
        of each request, anything beyond its last one.
        """
        batch, new = tokens.shape
        seen = torch.arange(context.shape[1]) <= places[:, :, None]
        x = self.tokens[tokens] + self.places[places]
        for (qkv, out, up, down), keys, values in zip(
            self.layers, self.keys, self.values, strict=True
        ):
            parts = (_norm(x) @ qkv).view(batch, new, 3, self.shape.heads, self.dim)
            keys[slots], values[slots] = parts[:, :, 1], parts[:, :, 2]
            attended = scaled_dot_product_attention(
                parts[:, :, 0].transpose(1, 2),
                keys[context].transpose(1, 2),
                values[context].transpose(1, 2),
                attn_mask=seen[:, None],
            )
            x = x + attended.transpose(1, 2).reshape(batch, new, -1) @ out
            x = x + silu(_norm(x) @ up) @ down
        return (_norm(x[:, -1]) @ self.head).argmax(dim=-1)


def _norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


def prompts(count: int, vocabulary: int, new_tokens: int) -> list[Req]:
    """Every third has the same 96 tokens first; 40 to 200 of its own follow."""
    made = []
    for number in range(count):
        shared = [(number % 3 * 131 + at * 7) % vocabulary for at in range(96)]
        own = [(number * 37 + at * at * 11) % vocabulary for at in range(40 + number * 53 % 161)]
        made.append(Req(f"{number}", [*shared, *own], new_tokens))
    return made
