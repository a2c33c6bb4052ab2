"""The least of an engine: a pool of slots, request rows, a cache over both, and requests.

The suites of the caches, the examples of spec/ and lockstep drive it as a scheduler would.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

from kvspec.conformance.suite import Conformance
from kvspec.errors import ContractError
from kvspec.interfaces.chunk_cache import ChunkCache, SWAChunkCache
from kvspec.interfaces.radix_cache import RadixCache
from kvspec.interfaces.swa_radix_cache import SWARadixCache

__all__ = [
    "ABC",
    "KINDS",
    "WIDE",
    "CacheConformance",
    "Kind",
    "Request",
    "SpyAllocator",
    "System",
    "covered",
    "numbers",
    "refused",
    "sharing",
]

ABC = list(range(12))
"""Three pages of four tokens."""
WIDE = 4096
"""A window larger than any path of a test: nothing ever leaves it."""


class Kind(NamedTuple):
    """A class of caches, and how a system makes one."""

    name: str
    interface: type
    room: str
    options: dict[str, Any]
    windowed: bool = False
    """Whether it needs an allocator with a window pool."""


_RADIX: dict[str, Any] = {
    "disable": False,
    "enable_kv_cache_events": False,
    "eviction_policy": "lru",
    "eviction_granularity": "page",
}
_WINDOWED: dict[str, Any] = {"disable": False, "sliding_window_size": WIDE}
KINDS: dict[str, Kind] = {
    "radix": Kind("RadixCache", RadixCache, "radix_cache", _RADIX),
    "disabled": Kind("RadixCache", RadixCache, "radix_cache", _RADIX | {"disable": True}),
    "chunk": Kind("ChunkCache", ChunkCache, "chunk_cache", {}),
    "swaradix": Kind("SWARadixCache", SWARadixCache, "swa_radix_cache", _WINDOWED, True),
    "swadisabled": Kind(
        "SWARadixCache", SWARadixCache, "swa_radix_cache", _WINDOWED | {"disable": True}, True
    ),
    "swachunk": Kind("SWAChunkCache", SWAChunkCache, "chunk_cache", {}, True),
}


def numbers(tensor: Any) -> list[int]:
    """The integers of a tensor."""
    return [int(number) for number in tensor]


sharing = pytest.mark.parametrize("kind", ["radix", "swaradix"])
"""Every cache that shares, the window being wider than anything."""


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
    """Any object with the allocator's interface will do: this one looks at what is given back."""

    def __init__(self, allocator: Any) -> None:
        self._allocator = allocator
        self.frees: list[list[int]] = []
        self.swa_frees: list[list[int]] = []
        """What each `free` named as `swa_index`."""
        self.pair_frees: list[list[int]] = []
        """What each `free_swa` named."""
        self.moves: list[tuple[list[int], list[int]]] = []
        """Targets and sources of each `move_swa`."""
        self.on_free: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._allocator, name)

    def free(self, free_index: Any, swa_index: Any = ()) -> None:
        """Let the test meddle once, note the slots, then do it."""
        self._meddle()
        self.frees.append(numbers(free_index))
        self.swa_frees.append(numbers(swa_index))
        windowed = (swa_index,) if len(swa_index) else ()
        self._allocator.free(free_index, *windowed)

    def free_swa(self, free_index: Any) -> None:
        """The same of window slots alone."""
        self._meddle()
        self.pair_frees.append(numbers(free_index))
        self._allocator.free_swa(free_index)

    def move_swa(self, tgt_loc: Any, src_loc: Any) -> None:
        """Note what was moved where."""
        self.moves.append((numbers(tgt_loc), numbers(src_loc)))
        self._allocator.move_swa(tgt_loc, src_loc)

    def _meddle(self) -> None:
        meddle, self.on_free = self.on_free, lambda: None
        meddle()


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
        swa_page_count: int | None = None,
        kind: str = "radix",
        handed_out: bool = True,
        spy: bool = False,
        subject: Callable[..., Any] | None = None,
        **options: Any,
    ) -> "System":
        """Pools of `page_count` pages and 4 rows of an implementation, and a cache over them.

        A kind with windows gets a window pool, as large unless `swa_page_count` says otherwise.
        With `handed_out` all slots are in the test's hand, so it may insert any of them. `subject`
        constructs the cache, as `Conformance.subject` does; `options` are the cache's.
        """
        made = KINDS[kind]
        size = page_count * page_size
        swa_count = page_count if swa_page_count is None else swa_page_count
        allocator = _allocator(impl, page_size, page_count, swa_count if made.windowed else None)
        if handed_out:
            allocator.alloc(allocator.available_size())
        reserved = set(allocator.view().held)
        if spy:
            allocator = SpyAllocator(allocator)
        pool = impl.ReqToTokenPool(
            size=4, max_context_len=max(size, 1), device="cpu", enable_memory_saver=False
        )
        arguments: dict[str, Any] = {
            "req_to_token_pool": pool,
            "token_to_kv_pool_allocator": allocator,
            "page_size": page_size,
            **made.options,
            **options,
        }
        if subject is None:
            cache = getattr(impl, made.name)(**arguments)
        else:
            cache = subject(made.name, made.interface, made.room, "prefix_cache", **arguments)
        return cls(allocator, pool, cache, page_size, reserved=reserved)

    # A request's life

    def admit(self, tokens: Sequence[int], extra_key: Any = None) -> Request:
        """A new request for these tokens, which begins."""
        req = Request(list(tokens), extra_key)
        self.begin(req)
        return req

    def begin(self, req: Request) -> None:
        """Match all but the last token, lock what was found, take a row and write it there."""
        found = self.cache.match_prefix(req.tokens[:-1], extra_key=req.extra_key)
        length = len(found.device_indices)
        if length:
            req.lock_receipt = self.cache.inc_lock_ref(found.last_device_node)
        req.last_node, req.prefix_indices = found.last_device_node, found.device_indices
        req.cache_protected_len = length
        (req.req_pool_idx,) = self.pool.alloc(1)
        self.pool.write((req.req_pool_idx, slice(0, length)), found.device_indices)
        self.requests.append(req)

    def compute(self, req: Request, stop: int) -> bool:
        """Take slots for the positions up to `stop`, evicting for them; False if there are none."""
        start = self.pool.row_length(req.req_pool_idx)
        if stop <= start:
            return True
        slots = self._take(req, start, stop)
        if slots is None:
            self._make_room(stop - start + self.page_size)
            slots = self._take(req, start, stop)
        if slots is None:
            return False
        self.pool.write((req.req_pool_idx, slice(start, stop)), slots)
        return True

    def _make_room(self, need_size: int) -> None:
        """Evict for this many slots: in a cache with windows, what each pool is short of."""
        if hasattr(self.cache, "sliding_window_size"):
            self.cache.evict(*(max(need_size - size, 0) for size in self.available()))
        else:
            self.cache.evict(need_size)

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

    def evict(self, token_count: int) -> int:
        """Evict for this many slots, of the full pool if there are two; how many tokens went."""
        result = self.cache.evict(token_count)
        count: int = result if isinstance(result, int) else result.full_num_tokens
        return count

    def retract(self, req: Request) -> None:
        """Give the request up: its own pages, its lock and its row. It may begin again."""
        self.allocator.free(self.pool.row(req.req_pool_idx)[req.cache_protected_len :])
        if req.lock_receipt is not None:
            self.cache.dec_lock_ref(req.lock_receipt)
        self.pool.free(req.req_pool_idx)
        req.req_pool_idx, req.cache_protected_len = None, 0
        req.last_node, req.lock_receipt = None, None
        self.requests.remove(req)

    def evict_swa(self, req: Request, **window: int) -> int:
        """Give back the window slots that the request, all of its row computed, has left behind."""
        prelen = self.pool.row_length(req.req_pool_idx)
        count: int = self.cache.evict_swa(req, prelen, **window)
        return count

    # Looking

    def available(self) -> tuple[int, int]:
        """The slots of each pool that can be handed out; 0 of a window pool that is not there."""
        if self.allocator.view().swa is None:
            return self.allocator.available_size(), 0
        return self.allocator.full_available_size(), self.allocator.swa_available_size()

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
        if allocator.swa is not None:
            self._settle_windows(allocator, tree)
        for part in (self.allocator, self.pool, self.cache):
            part.check()

    def _settle_windows(self, allocator: Any, tree: Any) -> None:
        """Every held window page is the pair of one full page, and those of live pages are."""
        windows = allocator.swa
        owners = Counter([*windows.free, *windows.release, *windows.pending])
        owners.update(window for _, window in allocator.pairs)
        assert set(owners) == set(range(1, self.allocator.size_swa // self.page_size + 1))
        assert set(owners.values()) <= {1}, f"window pages with two owners in {owners}"
        paired = {page for page, _ in allocator.pairs}
        assert len(paired) == len(allocator.pairs)
        assert paired <= allocator.held
        for page in tree.pages.values():
            assert page.tombstone == (page.page not in paired), f"{page} in {allocator.pairs}"

    def _locked_slots(self, req: Request, tree: Any) -> list[int]:
        if req.lock_receipt is None or not req.cache_protected_len:
            return []
        path = self.cache.resolve(req.lock_receipt.node)
        assert path is not None, "a lock on a stale handle"
        namespace, tokens = path
        stops = range(self.page_size, len(tokens) + 1, self.page_size)
        assert (namespace, tokens) in tree.receipts
        return self.slots(*(tree.pages[namespace, tokens[:stop]].page for stop in stops))


def _allocator(impl: Any, page_size: int, page_count: int, swa_page_count: int | None) -> Any:
    """An allocator of this many pages, and window pages if it has any."""
    memory = {"dtype": torch.float16, "device": "cpu", "kvcache": None, "need_sort": False}
    size = page_count * page_size
    if swa_page_count is not None:
        size_swa = swa_page_count * page_size
        return impl.SWATokenToKVPoolAllocator(
            size=size, size_swa=size_swa, page_size=page_size, **memory
        )
    if page_size <= 1:
        return impl.TokenToKVPoolAllocator(size=max(size, page_count), **memory)
    return impl.PagedTokenToKVPoolAllocator(size=size, page_size=page_size, **memory)


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
