"""A small engine, which drives a cache, an allocator and a request pool as engines do.

Whoever made the three: kvspec's oracle or core, a broken class of the tests, or somebody else's
with the same interface. What it asks for is drawn from a seed.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvspec.validate.request import PlayedRequest

__all__ = ["Engine", "Objects", "objects"]


class Objects(NamedTuple):
    """What is driven."""

    cache: Any
    allocator: Any
    pool: Any


def objects(
    impl: Any,
    page_size: int,
    *,
    pages: int = 24,
    rows: int = 4,
    context: int = 64,
    cache: str = "RadixCache",
    window: int = 0,
    **options: Any,
) -> Objects:
    """A cache of this name over an allocator and a pool of an implementation's namespace."""
    memory = {"dtype": torch.bfloat16, "device": "cpu", "kvcache": None, "need_sort": False}
    memory["need_sort"] = options.pop("need_sort", False)
    size = pages * page_size
    pool = impl.ReqToTokenPool(rows, context, "cpu", False)
    if window:
        allocator = impl.SWATokenToKVPoolAllocator(
            size=size, size_swa=size, page_size=page_size, **memory
        )
    elif page_size == 1:
        allocator = impl.TokenToKVPoolAllocator(size, **memory)
    else:
        allocator = impl.PagedTokenToKVPoolAllocator(size, page_size, **memory)
    if window and "Radix" in cache:
        options["sliding_window_size"] = window
    made = getattr(impl, cache)(pool, allocator, page_size=page_size, **options)
    return Objects(made, allocator, pool)


class Running(PlayedRequest):
    """A request, with what its engine knows of it."""

    def __init__(self, row: int, node: Any, receipt: Any, prefix: Tensor, tokens: list[int]):
        super().__init__(row, node, receipt, prefix)
        self.tokens = tokens
        """Its prompt, and what was decoded since."""
        self.computed = len(prefix)
        """Of these, how many have slots."""


class Engine:
    """Admits requests, computes them in chunks, decodes, caches, finishes and gives them up."""

    def __init__(
        self, given: Objects, seed: int, *, mid_page: bool = True, careless: bool = False
    ) -> None:
        self.cache, self.allocator, self.pool = given
        self.page_size = int(self.allocator.page_size)
        self.random = random.Random(seed)
        self.running: list[Running] = []
        self.mid_page = mid_page
        """Whether a chunk may end in the middle of a page."""
        self.careless = careless
        """Whether what is given up is given back twice."""
        self.windowed = hasattr(self.allocator, "size_swa")
        self.extends = hasattr(self.allocator, "alloc_extend") and hasattr(self.allocator, "view")

    def run(self, steps: int) -> None:
        """So many steps, and then all that runs finishes."""
        for _ in range(steps):
            self.step()
        while self.running:
            self.finish(self.running[0])

    def step(self) -> None:
        """One thing that an engine does."""
        draw = self.random.random()
        if not self.running or (draw < 0.25 and len(self.running) < 3):
            self.admit(self.document())
            return
        request = self.random.choice(self.running)
        if draw < 0.6:
            self.compute(request, self.random.randrange(1, 3 * self.page_size + 1))
        elif draw < 0.75:
            self.compute(request, 1)
        elif draw < 0.8:
            self.abort(request)
        elif draw < 0.85:
            self.in_group()
        elif draw < 0.9:
            self.evict(self.random.randrange(4 * self.page_size))
        else:
            self.finish(request)

    def document(self) -> list[int]:
        """Tokens of a text that others begin like."""
        size, draw = self.page_size, self.random.randrange
        text = [100 * draw(2) + at for at in range(size * draw(5) + draw(2))]
        return text + [1000] * (1 + draw(2)) + [1001] * draw(3 * size)

    def admit(self, tokens: list[int]) -> Running | None:
        """Match, lock, take a row and write what is there."""
        found = self.cache.match_prefix(key=tokens[:-1])
        prefix = found.device_indices
        taken = self.cache.inc_lock_ref(found.last_device_node)
        receipt = taken if hasattr(taken, "node") else None
        rows = self.pool.alloc(1)
        if rows is None:
            self.cache.dec_lock_ref(receipt or found.last_device_node)
            return None
        request = Running(rows[0], found.last_device_node, receipt, prefix, tokens)
        if len(prefix):
            self.pool.write((rows[0], slice(0, len(prefix))), prefix)
        self.running.append(request)
        return request

    def compute(self, request: Running, count: int) -> bool:
        """Take and write slots for some more tokens, and cache a chunk where the prompt goes on."""
        left = len(request.tokens) - request.computed
        start = request.computed
        count = min(count, left) if left else 1
        stop = start + count
        if left > count and not self.mid_page:
            stop += -stop % self.page_size
        if stop > int(self.pool.max_context_len):
            return False
        slots = self.take(request, start, stop)
        if slots is None:
            return False
        self.pool.write((request.req_pool_idx, slice(start, stop)), slots)
        request.computed = stop
        if stop > len(request.tokens):
            extra = [2000 + self.random.randrange(2) for _ in range(stop - len(request.tokens))]
            request.tokens = request.tokens + extra
        elif self.random.random() < 0.7:
            self.cache_chunk(request)
        if self.windowed and self.random.random() < 0.3:
            self.cache.evict_swa(request, request.computed, sliding_window_size=2 * self.page_size)
        return True

    def take(self, request: Running, start: int, stop: int) -> Tensor | None:
        """Slots for positions [start, stop), after eviction if there are too few."""
        slots = self.allocate(request, start, stop)
        if slots is None:
            self.evict(stop - start + self.page_size)
            slots = self.allocate(request, start, stop)
        return slots

    def allocate(self, request: Running, start: int, stop: int) -> Tensor | None:
        """The same without."""
        size = self.page_size
        row = self.row(request)
        last = row[start - 1] if start else -1
        if self.extends:
            arguments = [self.given([stop]), self.given([last])]
            if stop > start + 1 or self.random.random() < 0.5:
                before = self.given([start])
                found: Tensor | None = self.allocator.alloc_extend(before, *arguments, stop - start)
                return found
            decoded: Tensor | None = self.allocator.alloc_decode(*arguments)
            return decoded
        fresh = -(-stop // size) - -(-start // size)
        taken = self.allocator.alloc(fresh * size)
        if taken is None:
            return None
        rest = range(last + 1, last + 1 + min(-start % size, stop - start))
        return torch.tensor([*rest, *taken.tolist()][: stop - start])

    def given(self, numbers: Sequence[int]) -> Tensor:
        """An argument."""
        return torch.tensor(numbers, dtype=torch.int64)

    def row(self, request: Running) -> list[int]:
        """The slots of a request."""
        slots = self.pool.req_to_token[request.req_pool_idx, : request.computed]
        return [int(slot) for slot in slots]

    def cache_chunk(self, request: Running) -> None:
        """What has been computed is shared."""
        request.holds(request.tokens[: request.computed])
        self.cache.cache_unfinished_req(request)

    def finish(self, request: Running) -> None:
        """It is done."""
        self.running.remove(request)
        request.holds(request.tokens[: request.computed])
        self.cache.cache_finished_req(request)

    def abort(self, request: Running) -> None:
        """It is given up: what is its own goes back, then its lock, then its row."""
        self.running.remove(request)
        size = self.page_size
        protected = request.cache_protected_len
        if not hasattr(self.cache, "view"):
            protected = len(request.prefix_indices)
        own = self.row(request)[protected - protected % size :]
        for _ in range((1 + self.careless) * bool(own)):
            self.allocator.free(self.given(own))
        if request.last_node is not None:
            self.cache.dec_lock_ref(request.lock_receipt or request.last_node)
        self.pool.free(request.req_pool_idx)

    def in_group(self) -> None:
        """Finish one inside a free group."""
        self.allocator.free_group_begin()
        self.finish(self.running[0])
        self.allocator.free_group_end()

    def evict(self, tokens: int) -> None:
        """Make room."""
        if hasattr(self.cache, "sliding_window_size"):
            self.cache.evict(tokens, tokens)
        else:
            self.cache.evict(tokens)
