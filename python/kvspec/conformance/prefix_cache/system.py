"""The least of an engine: a pool of slots, request rows, a cache over both, and requests.

The suites of the caches, the examples of spec/ and lockstep drive it as a scheduler would.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvspec.conformance.suite import Conformance
from kvspec.errors import ContractError
from kvspec.interfaces.chunk_cache import ChunkCache
from kvspec.interfaces.radix_cache import RadixCache

__all__ = [
    "ABC",
    "CacheConformance",
    "Request",
    "SpyAllocator",
    "System",
    "covered",
    "numbers",
    "refused",
]

ABC = list(range(12))
"""Three pages of four tokens."""


def numbers(tensor: Any) -> list[int]:
    """The integers of a tensor."""
    return [int(number) for number in tensor]


@dataclass(eq=False)
class Request:
    """What caches read and write of a request."""

    origin_input_ids: list[int]
    extra_key: Any = None
    output_ids: list[int] = field(default_factory=list)
    fill_ids: list[int] = field(default_factory=list)
    req_pool_idx: int | None = None
    prefix_indices: Any = field(default_factory=lambda: torch.tensor([], dtype=torch.int64))
    last_node: Any = None
    cache_protected_len: int = 0
    lock_receipt: Any = None

    @property
    def tokens(self) -> list[int]:
        """All of them, also the last one, which has no KV yet."""
        return [*self.origin_input_ids, *self.output_ids]

    def state(self) -> tuple[Any, ...]:
        """What a cache may write."""
        prefix = numbers(self.prefix_indices)
        protected, receipt = self.cache_protected_len, self.lock_receipt
        return self.req_pool_idx, prefix, self.last_node, protected, receipt


class SpyAllocator:
    """Any object with the allocator's interface will do: this one looks at each `free`."""

    def __init__(self, allocator: Any) -> None:
        self._allocator = allocator
        self.frees: list[list[int]] = []
        self.on_free: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._allocator, name)

    def free(self, free_index: Any) -> None:
        """Let the test meddle once, note the slots, then do it."""
        meddle, self.on_free = self.on_free, lambda: None
        meddle()
        self.frees.append(numbers(free_index))
        self._allocator.free(free_index)


@dataclass(eq=False)
class System:
    """A pool of slots, request rows, and a cache over both."""

    allocator: Any
    pool: Any
    cache: Any
    page_size: int
    requests: list[Request] = field(default_factory=list)
    reserved: set[int] = field(default_factory=set)
    """Pages in the hand of the test."""

    @classmethod
    def make(
        cls,
        impl: Any,
        *,
        page_size: int = 1,
        page_count: int = 16,
        kind: str = "radix",
        handed_out: bool = True,
        spy: bool = False,
        subject: Callable[..., Any] | None = None,
        **options: Any,
    ) -> "System":
        """Pools of `page_count` pages and 4 rows of an implementation, and a cache over them.

        With `handed_out` all slots are in the test's hand, so it may insert any of them. `subject`
        constructs the cache, as `Conformance.subject` does; `options` are the cache's.
        """
        memory = {"dtype": torch.float16, "device": "cpu", "kvcache": None, "need_sort": False}
        size = page_count * page_size
        if page_size <= 1:
            allocator = impl.TokenToKVPoolAllocator(size=max(size, page_count), **memory)
        else:
            allocator = impl.PagedTokenToKVPoolAllocator(size=size, page_size=page_size, **memory)
        if handed_out:
            allocator.alloc(allocator.available_size())
        if spy:
            allocator = SpyAllocator(allocator)
        pool = impl.ReqToTokenPool(
            size=4, max_context_len=max(size, 1), device="cpu", enable_memory_saver=False
        )
        arguments: dict[str, Any] = {
            "req_to_token_pool": pool,
            "token_to_kv_pool_allocator": allocator,
            "page_size": page_size,
        }
        name, interface = (
            ("ChunkCache", ChunkCache) if kind == "chunk" else ("RadixCache", RadixCache)
        )
        if kind != "chunk":
            arguments |= {
                "disable": kind == "disabled",
                "enable_kv_cache_events": False,
                "eviction_policy": "lru",
                "eviction_granularity": "page",
            }
        arguments |= options
        rooms = ("chunk_cache" if kind == "chunk" else "radix_cache", "prefix_cache")
        if subject is None:
            cache = getattr(impl, name)(**arguments)
        else:
            cache = subject(name, interface, *rooms, **arguments)
        reserved = set(range(1, page_count + 1)) if handed_out else set()
        return cls(allocator, pool, cache, page_size, reserved=reserved)

    # A request's life

    def admit(self, tokens: Sequence[int], extra_key: Any = None) -> Request:
        """Match all but the last token, lock what was found, take a row and write it there."""
        req = Request(list(tokens), extra_key)
        found = self.cache.match_prefix(req.tokens[:-1], extra_key=extra_key)
        length = len(found.device_indices)
        if length:
            req.lock_receipt = self.cache.inc_lock_ref(found.last_device_node)
        req.last_node, req.prefix_indices = found.last_device_node, found.device_indices
        req.cache_protected_len = length
        (req.req_pool_idx,) = self.pool.alloc(1)
        self.pool.write((req.req_pool_idx, slice(0, length)), found.device_indices)
        self.requests.append(req)
        return req

    def compute(self, req: Request, stop: int) -> bool:
        """Take slots for the positions up to `stop`, evicting for them; False if there are none."""
        start = self.pool.row_length(req.req_pool_idx)
        if stop <= start:
            return True
        slots = self._take(req, start, stop)
        if slots is None:
            self.cache.evict(stop - start + self.page_size)
            slots = self._take(req, start, stop)
        if slots is None:
            return False
        self.pool.write((req.req_pool_idx, slice(start, stop)), slots)
        return True

    def _take(self, req: Request, start: int, stop: int) -> Any:
        if self.page_size == 1:
            return self.allocator.alloc(stop - start)
        last = self.row(req)[-1] if start else -1
        return self.allocator.alloc_extend([start], [stop], [last], stop - start)

    def chunk(self, req: Request, stop: int) -> None:
        """Compute up to `stop` and cache that much."""
        assert self.compute(req, stop)
        req.fill_ids = req.tokens[:stop]
        self.cache.cache_unfinished_req(req)

    def step(self, req: Request, token: int) -> None:
        """Compute all there is and sample a token, which has no KV yet."""
        assert self.compute(req, len(req.tokens))
        req.output_ids.append(token)

    def finish(self, req: Request) -> None:
        """Hand the request to the cache."""
        self.cache.cache_finished_req(req)
        self.requests.remove(req)

    # Looking

    def row(self, req: Request) -> list[int]:
        """The slots of the request's row."""
        return numbers(self.pool.row(req.req_pool_idx))

    def pages(self, slots: Sequence[int]) -> list[int]:
        """The pages of slots that are in order."""
        return list(dict.fromkeys(slot // self.page_size for slot in slots))

    def slots(self, *pages: int) -> list[int]:
        """The slots of pages."""
        size = self.page_size
        return [slot for page in pages for slot in range(page * size, (page + 1) * size)]

    def held_along(self, tokens: Sequence[int], extra_key: Any = None) -> list[int]:
        """The slots that the cache holds for a prefix of the tokens; asking changes nothing."""
        return numbers(
            self.cache.match_prefix(tokens, extra_key=extra_key, touch=False).device_indices
        )

    def insert(self, tokens: Sequence[int], *pages: int, **options: Any) -> Any:
        """Insert tokens with these pages, which the test has in its hand."""
        return self.cache.insert(tokens, self.slots(*pages)[: len(tokens)], **options)

    def state(self) -> tuple[Any, ...]:
        """The abstract state of everything."""
        requests = [req.state() for req in self.requests]
        return self.allocator.view(), self.pool.view(), self.cache.view(), requests

    def settle(self) -> None:
        """Every page has exactly one owner, every row one request, and each lock what it says."""
        allocator, tree = self.allocator.view(), self.cache.view()
        owners = Counter([*allocator.free, *allocator.release, *allocator.pending])
        owners.update(page.page for page in tree.pages.values())
        owners.update(self.reserved - {page.page for page in tree.pages.values()})
        for req in self.requests:
            row, protected = self.row(req), req.cache_protected_len
            owners.update(self.pages(row[protected:]))
            assert row[:protected] == self._locked_slots(req, tree)
        assert set(owners) == set(range(1, self.allocator.size // self.page_size + 1))
        assert set(owners.values()) <= {1}, f"pages with two owners in {owners}"
        assert sorted(self.pool.view().rows) == sorted(r.req_pool_idx or 0 for r in self.requests)
        for part in (self.allocator, self.pool, self.cache):
            part.check()

    def _locked_slots(self, req: Request, tree: Any) -> list[int]:
        if req.lock_receipt is None or not req.cache_protected_len:
            return []
        path = self.cache.resolve(req.lock_receipt.node)
        assert path is not None, "a lock on a stale handle"
        namespace, tokens = path
        stops = range(self.page_size, len(tokens) + 1, self.page_size)
        assert (namespace, tokens) in tree.receipts
        return self.slots(*(tree.pages[namespace, tokens[:stop]].page for stop in stops))


def refused(system: System, id_: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """The call must be refused on this clause, and nothing may have changed."""
    before = system.state()
    with pytest.raises(ContractError) as caught:
        call(*args, **kwargs)
    assert caught.value.clause == id_
    assert system.state() == before


def covered(result: Any) -> list[int]:
    """The positions in the four ranges of an insert, as often as they occur."""
    ranges = [*result.shared, *result.adopted, *result.duplicate, *result.tail]
    assert all(start < stop for start, stop in ranges)
    return sorted(position for start, stop in ranges for position in range(start, stop))


class CacheConformance(Conformance):
    """What the suites of the caches have: systems of the implementation, with the cache watched."""

    def serving(self, page_size: int = 4, **options: Any) -> System:
        """Pools that are free, for requests."""
        return System.make(
            self.impl, page_size=page_size, handed_out=False, subject=self.subject, **options
        )

    def stocked(self, page_size: int = 4, **options: Any) -> System:
        """A cache over slots that are all in the test's hand."""
        return System.make(self.impl, page_size=page_size, subject=self.subject, **options)
