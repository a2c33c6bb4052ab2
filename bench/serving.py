"""A small engine on the CPU: continuous batching over paged KV, with a model that really computes.

    admit       match, lock, take a row
    prefill     one chunk of one prompt: evict, alloc_extend, write, forward, cache_unfinished_req
    decode      a token for everyone who runs: evict, alloc_decode, write, forward
    finish      cache_finished_req

One step of the loop does each of these in turn. Nothing is random: equal prompts give equal tokens.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from kvspec.interfaces.prefix_cache import LockReceipt, NodeHandle
from kvspec.interfaces.prefix_key import ExtraKey

__all__ = ["Engine", "Model", "Request", "Shape", "one_thread", "prompts"]

_NO_SLOTS = torch.empty(0, dtype=torch.int64)


class Shape(NamedTuple):
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    vocabulary: int = 512
    positions: int = 1024


class Model:
    """A decoder whose weights are a function of the seed. KV is float32 [slots, heads, dim]."""

    def __init__(self, shape: Shape, slot_count: int, seed: int = 0) -> None:
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
        kv = slot_count, shape.heads, self.dim
        self.keys = [torch.zeros(kv) for _ in self.layers]
        self.values = [torch.zeros(kv) for _ in self.layers]

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


@dataclass(eq=False)
class Request:
    """A request as a cache reads and writes it: `interfaces.prefix_cache.Req`."""

    origin_input_ids: Sequence[int]
    new_tokens: int
    """How many are asked for."""
    output_ids: list[int] = field(default_factory=list)
    fill_ids: Sequence[int] = ()
    extra_key: ExtraKey = None
    req_pool_idx: int | None = None
    prefix_indices: Tensor = _NO_SLOTS
    last_node: NodeHandle | None = None
    lock_receipt: LockReceipt | None = None
    cache_protected_len: int = 0
    last_slot: int = -1

    @property
    def length(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)


class Engine:
    """Serves up to `batch` requests at a time over a cache, an allocator and a request pool.

    A request is admitted when all that it can ever need fits beside what the others can, so that
    eviction always makes room and nobody has to be put off.
    """

    def __init__(
        self, impl: Any, model: Model, *, page_size: int, pages: int, batch: int, chunk: int
    ) -> None:
        self.model, self.batch, self.chunk = model, batch, chunk
        self.page_size, self.capacity = page_size, pages * page_size
        memory = {"dtype": torch.float32, "device": "cpu", "kvcache": None, "need_sort": False}
        self.rows = impl.ReqToTokenPool(batch, model.shape.positions, "cpu", False)
        self.allocator = impl.PagedTokenToKVPoolAllocator(
            size=self.capacity, page_size=page_size, **memory
        )
        self.cache = impl.RadixCache(self.rows, self.allocator, page_size=page_size)
        self.waiting: deque[Request] = deque()
        self.prefilling: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether there is a request that is not finished."""
        return bool(self.waiting or self.prefilling or self.running)

    def serve(self, requests: Sequence[Request]) -> list[list[int]]:
        """The tokens of each request, in order."""
        self.waiting.extend(requests)
        while self.busy:
            self.step()
        return [request.output_ids for request in requests]

    def step(self) -> None:
        self._admit()
        if self.prefilling:
            self._prefill(self.prefilling[0])
        if self.running:
            self._decode(self.running)
        self._finish()

    def _admit(self) -> None:
        live = [*self.prefilling, *self.running]
        while self.waiting and self.rows.available_size():
            request = self.waiting[0]
            if sum(map(self._need, (*live, request))) > self.capacity:
                return
            tokens = request.origin_input_ids[:-1]  # one token at least is computed
            slots, node, *_ = self.cache.match_prefix(tokens)
            request.last_node, request.lock_receipt = node, self.cache.inc_lock_ref(node)
            (row,) = self.rows.alloc(1)
            self.rows.write((row, slice(0, len(slots))), slots)
            request.req_pool_idx, request.prefix_indices = row, slots
            request.cache_protected_len = len(slots)
            live.append(self.waiting.popleft())
            self.prefilling.append(request)

    def _need(self, request: Request) -> int:
        longest = len(request.origin_input_ids) + request.new_tokens
        return -(-longest // self.page_size) * self.page_size

    def _prefill(self, request: Request) -> None:
        start, row = len(request.prefix_indices), request.req_pool_idx
        stop = min(start + self.chunk, len(request.origin_input_ids))
        last = int(request.prefix_indices[-1]) if start else -1
        self._make_room(stop - start)
        slots = self.allocator.alloc_extend([start], [stop], [last], stop - start)
        self.rows.write((row, slice(start, stop)), slots)
        tokens = torch.tensor([request.origin_input_ids[start:stop]])
        context = self.rows.req_to_token[[row], :stop].long()
        sampled = self.model.forward(tokens, torch.arange(start, stop)[None], slots[None], context)
        request.fill_ids = request.origin_input_ids[:stop]
        self.cache.cache_unfinished_req(request)
        if stop == len(request.origin_input_ids):
            request.output_ids.append(int(sampled))
            request.last_slot = int(request.prefix_indices[-1])
            self.running.append(self.prefilling.popleft())

    def _decode(self, requests: Sequence[Request]) -> None:
        lengths = [request.length for request in requests]
        self._make_room(len(requests) * self.page_size)
        slots = self.allocator.alloc_decode(lengths, [request.last_slot for request in requests])
        rows = [request.req_pool_idx for request in requests]
        places = torch.tensor(lengths) - 1
        self.rows.write((rows, places), slots)
        tokens = torch.tensor([request.output_ids[-1] for request in requests])
        context = self.rows.req_to_token[rows, : max(lengths)].long()
        sampled = self.model.forward(tokens[:, None], places[:, None], slots[:, None], context)
        for request, slot, token in zip(requests, slots.tolist(), sampled.tolist(), strict=True):
            request.last_slot = slot
            request.output_ids.append(token)

    def _make_room(self, tokens: int) -> None:
        lacking = tokens - self.allocator.available_size()
        if lacking > 0:
            self.cache.evict(lacking)

    def _finish(self) -> None:
        for request in [r for r in self.running if len(r.output_ids) >= r.new_tokens]:
            self.running.remove(request)
            self.cache.cache_finished_req(request)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one core, so that two runs are alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prompts(count: int, vocabulary: int, new_tokens: int) -> list[Request]:
    """Every third has the same 96 tokens first; 40 to 200 of its own follow."""
    made = []
    for number in range(count):
        shared = [(number % 3 * 131 + at * 7) % vocabulary for at in range(96)]
        own = [(number * 37 + at * at * 11) % vocabulary for at in range(40 + number * 53 % 161)]
        made.append(Request([*shared, *own], new_tokens))
    return made
