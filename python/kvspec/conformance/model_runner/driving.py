"""Requests driven through a runner over poisoned pools, and what their logits must be."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvspec.conformance.suite import one_thread
from kvspec.model_runner import TinyKind, packed, reference_logits, reference_model, tiny_model
from kvspec.poison import Poison

__all__ = ["VOCABULARY", "Driven", "expected", "pools_of", "tiny", "tokens_of"]

VOCABULARY = 257
_SEED = 20
MOST = 2e-4
"""Of a difference of logits in float32, which are up to 8: what is measured is 2e-5 at most."""


@cache
def tiny(kind: TinyKind) -> Any:
    """One model of a kind for all tests; its window is of 8 tokens."""
    return tiny_model(kind, seed=_SEED)


@cache
def reference_of(kind: TinyKind) -> Any:
    return reference_model(tiny(kind))


@cache
def tokens_of(request: int, length: int) -> tuple[int, ...]:
    draw = torch.Generator().manual_seed(_SEED + request)
    return tuple(torch.randint(0, VOCABULARY, (length,), generator=draw).tolist())


@cache
def expected(kind: TinyKind, request: int, length: int) -> Tensor:
    """float64 [length, vocabulary] of the whole request, without a cache."""
    with one_thread():
        return reference_logits(reference_of(kind), tokens_of(request, length))


def pools_of(kvcache: Any) -> list[Any]:
    """The pools that have tensors: one, or of full and window layers."""
    both = [kvcache.full_kv_pool, kvcache.swa_kv_pool] if hasattr(kvcache, "swa_kv_pool") else []
    return [pool for pool in both or [kvcache] if pool.layer_num]


class Driven:
    """A runner whose every row is poison until it is written, and requests whose slots lie in
    random order, pages of others between.
    """

    def __init__(self, runner: Any, kind: TinyKind, lengths: Sequence[int]) -> None:
        """`lengths` are what the requests will have in the end."""
        self.runner, self.kind, self.lengths = runner, kind, lengths
        _, self.allocator = runner.get_memory_pool()
        self.kvcache = self.allocator.get_kvcache()
        page = runner.page_size
        self.poison = [Poison(pool, page) for pool in pools_of(self.kvcache)]
        for poison, pool in zip(self.poison, pools_of(self.kvcache), strict=True):
            poison.fresh(range(pool.size + page))
        draw = torch.Generator().manual_seed(_SEED)
        self._mix_pairs(draw)
        counts = [-(-length // page) for length in lengths]
        slots = self.allocator.alloc(sum(counts) * page)
        assert slots is not None
        pages = slots.view(-1, page)[torch.randperm(sum(counts), generator=draw)]
        self.slots = [part.flatten() for part in pages.split(counts)]
        self.done = [0] * len(lengths)

    def _mix_pairs(self, draw: torch.Generator) -> None:
        """Give all pages back, their pairs in an order of their own, one by one: what is given back
        at once is sorted.
        """
        if self.runner.sliding_window_size is None:
            return
        slots = self.allocator.alloc(self.allocator.available_size())
        assert slots is not None
        pages = slots.view(-1, self.runner.page_size)
        for page in torch.randperm(len(pages), generator=draw).tolist():
            self.allocator.free_swa(pages[page])
        self.allocator.free(slots)

    def step(self, new: Sequence[int], *, sample: bool = True, compare: bool = True) -> list[int]:
        """Every request brings so many tokens more; ids sampled after each, or after none.

        The logits must be those of the reference, and the most likely word the same, unless it is
        not what is being tested.
        """
        requests, right = [], []
        for request, count in enumerate(new):
            if count:
                start, end = self.done[request], self.done[request] + count
                ids = tokens_of(request, self.lengths[request])[start:end]
                requests.append((ids, self.slots[request][:end]))
                right.append(expected(self.kind, request, self.lengths[request])[start:end])
                self.done[request] = end
        result = self.runner.forward_batch_generation(packed(requests, None if sample else []))
        if sample and compare:
            self.compare(result, torch.cat(right))
        return [int(token) for token in result.next_token_ids]

    @staticmethod
    def compare(result: Any, right: Tensor) -> None:
        logits = result.next_token_logits
        assert logits.shape == right.shape
        worst = float((logits.double() - right).abs().max())
        assert worst < MOST, f"logits differ by {worst}"
        best, second = right.topk(2, dim=-1).values.unbind(dim=-1)
        clear = best - second > 2 * MOST
        assert clear.float().mean() > 0.9
        assert torch.equal(result.next_token_ids[clear], right.argmax(dim=-1)[clear])

    def bytes_of(self) -> list[Tensor]:
        """Every row of every pool: [tensors] of [slots, bytes], copies."""
        pools = pools_of(self.kvcache)
        return [
            rows.clone().view(torch.uint8).flatten(1)
            for pool in pools
            for layer in range(pool.layer_num)
            for rows in pool.get_kv_buffer(layer)
        ]
