"""Pools that fit a model's layers, and steps over their slots."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from kvspec.errors import ContractError
from kvspec.interfaces.kv_storage import MHATokenToKVPool, SWAKVPool
from kvspec.interfaces.model_runner import ForwardBatch
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator

__all__ = ["KVPool", "LayerFacts", "Pairs", "kv_pool", "make_allocator", "packed", "require_batch"]

KVPool: TypeAlias = MHATokenToKVPool | SWAKVPool
Pairs: TypeAlias = Callable[[Tensor], Tensor]
"""The window slots of full slots, less than a page's where there is none."""


class LayerFacts(NamedTuple):
    """What a layer asks of its attention."""

    layer_id: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    """How many tokens it attends to, itself included; None for all."""
    plain: bool
    """Whether it is the softmax of scaled products and nothing else: no cap, no sinks."""


def kv_pool(
    space: ModuleType,
    layers: Sequence[LayerFacts],
    size: int,
    size_swa: int | None,
    dtype: torch.dtype,
    page_size: int,
    *,
    saver: bool = False,
    checked: bool = True,
) -> KVPool:
    """Of a namespace's classes; one with a window pool where a layer has a window (RUN-1)."""
    heads, dim = layers[0].kv_heads, layers[0].head_dim
    if size_swa is None:
        plain: MHATokenToKVPool = space.MHATokenToKVPool(
            size, page_size, dtype, heads, dim, len(layers), "cpu", saver, checked=checked
        )
        return plain
    windows = [layer.layer_id for layer in layers if layer.window is not None]
    full = [layer.layer_id for layer in layers if layer.window is None]
    hybrid: SWAKVPool = space.SWAKVPool(
        *(size, size_swa, dtype, heads, dim, windows, full, "cpu", page_size),
        enable_memory_saver=saver,
        checked=checked,
    )
    return hybrid


def make_allocator(
    space: ModuleType, kv: KVPool, size: int, size_swa: int | None, need_sort: bool
) -> tuple[BaseTokenToKVPoolAllocator, Pairs | None]:
    """The allocator of a pool's slots, and who knows the pairs (RUN-1)."""
    dtype, page_size = kv.dtype, kv.page_size
    if size_swa is not None:
        paired = space.SWATokenToKVPoolAllocator(
            size, size_swa, dtype, "cpu", kv, need_sort, page_size=page_size
        )
        cast(SWAKVPool, kv).register_mapping(paired)
        return paired, paired.translate_loc_from_full_to_swa
    if page_size == 1:
        return space.TokenToKVPoolAllocator(size, dtype, "cpu", kv, need_sort), None
    return space.PagedTokenToKVPoolAllocator(size, page_size, dtype, "cpu", kv, need_sort), None


def packed(
    requests: Sequence[tuple[Sequence[int], Tensor]], sampled: Sequence[int] | None = None
) -> ForwardBatch:
    """A step of requests, each its new tokens and the slots [all its tokens]; of all new tokens
    those `sampled`, or every one.
    """
    lengths = [len(slots) for _, slots in requests]
    new = [len(tokens) for tokens, _ in requests]
    ids = torch.tensor([token for tokens, _ in requests for token in tokens], dtype=torch.int64)
    places = [torch.arange(n - k, n) for n, k in zip(lengths, new, strict=True)]
    written = [slots[len(slots) - len(tokens) :] for tokens, slots in requests]
    return ForwardBatch(
        input_ids=ids,
        positions=torch.cat(places),
        out_cache_loc=torch.cat(written),
        seq_lens=tuple(lengths),
        extend_lens=tuple(new),
        token_slots=tuple(slots.clone() for _, slots in requests),
        sample_indices=torch.arange(len(ids)) if sampled is None else torch.tensor(sampled).long(),
    )


def require_batch(batch: ForwardBatch, kv: KVPool, context_length: int) -> None:
    """RUN-6. O(context)."""
    count, new = len(batch.input_ids), sum(batch.extend_lens)
    if not count == new == len(batch.positions) == len(batch.out_cache_loc) or not count:
        raise ContractError(
            f"RUN-6: {count} tokens, {len(batch.positions)} positions and"
            f" {len(batch.out_cache_loc)} slots to write, where the requests bring {new}"
        )
    if not len(batch.seq_lens) == len(batch.extend_lens) == len(batch.token_slots):
        raise ContractError(
            f"RUN-6: {len(batch.seq_lens)} lengths, {len(batch.extend_lens)} of new tokens and"
            f" {len(batch.token_slots)} rows of slots are not of the same requests"
        )
    for request, (length, new, slots) in enumerate(
        zip(batch.seq_lens, batch.extend_lens, batch.token_slots, strict=True)
    ):
        if not 0 <= new <= length == len(slots) <= context_length:
            raise ContractError(
                f"RUN-6: request {request} has {length} tokens, {new} of them new, and"
                f" {len(slots)} slots, of at most {context_length}"
            )
    _require_places(batch, kv)


def _require_places(batch: ForwardBatch, kv: KVPool) -> None:
    """RUN-6: what is written and sampled is of the requests, and all slots are of the pool."""
    pairs = list(zip(batch.seq_lens, batch.extend_lens, strict=True))
    places = torch.cat([torch.arange(length - new, length) for length, new in pairs])
    if not torch.equal(batch.positions, places):
        raise ContractError(f"RUN-6: positions {batch.positions.tolist()}, not {places.tolist()}")
    written = torch.cat(
        [slots[n - k :] for slots, (n, k) in zip(batch.token_slots, pairs, strict=True)]
    )
    if not torch.equal(batch.out_cache_loc, written):
        raise ContractError(
            f"RUN-6: slots {batch.out_cache_loc.tolist()} to write, not those of the new tokens,"
            f" {written.tolist()}"
        )
    first, last = kv.page_size, kv.size + kv.page_size
    slots = torch.cat(batch.token_slots)
    if int(slots.min()) < first or int(slots.max()) >= last:
        raise ContractError(
            f"RUN-6: slots from {int(slots.min())} to {int(slots.max())} are not in"
            f" [{first}, {last})"
        )
    samples = batch.sample_indices
    if len(samples) and not 0 <= int(samples.min()) <= int(samples.max()) < len(batch.input_ids):
        raise ContractError(
            f"RUN-6: sample_indices {samples.tolist()} of {len(batch.input_ids)} new tokens"
        )
