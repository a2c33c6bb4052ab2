"""What the native caches share, and all there is to one that does not share. Spec: CACHE, CHUNK.

A request's row, with its three lengths:

    row:      [0 ............ protected) [protected ........ committed) [committed ... allocated)
    owner:    the tree, held by its lock   the request                    the request

A cache that does not share keeps a tree that stays empty, so reading is the same for all caches.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ClassVar, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from kvspec import _core
from kvspec.errors import ContractError, write_unraisable
from kvspec.interfaces import prefix_cache as interface
from kvspec.interfaces.observer import Observer, Operation
from kvspec.interfaces.prefix_cache import (
    CacheView,
    InsertResult,
    MatchResult,
    PageView,
    Path,
    Req,
)
from kvspec.interfaces.prefix_key import ExtraKey, Tokens
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator, Slots
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator
from kvspec.prefix_key import key_parts, key_words, unframe_namespace

__all__ = [
    "LockReceipt",
    "PrefixCache",
    "RequestRow",
    "WindowedCache",
    "changing",
    "finished_tokens",
]

Cache = TypeVar("Cache", bound="PrefixCache")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False, slots=True)
class LockReceipt:
    """The receipt of a cache that locks nothing (CACHE-18)."""

    delta: int
    node: interface.NodeHandle
    swa_uuid: int | None = None


class RequestRow(NamedTuple):
    """What a request brings."""

    slots: Tensor
    """row[0 : allocated), a copy."""
    tokens: Tokens
    """Those of row[0 : committed)."""
    committed: int


def finished_tokens(req: Req) -> Tokens:
    """The tokens of a finished request that have KV: the last sampled one has none.

    O(1) without output, else O(tokens).
    """
    count = len(req.output_ids) - 1
    if count <= 0:
        return req.origin_input_ids
    words = array("i")
    words.frombytes(key_words(req.origin_input_ids).cast("B"))
    words.frombytes(key_words(req.output_ids)[:count].cast("B"))
    return words


def changing(
    method: Callable[Concatenate[Cache, Parameters], Result],
) -> Callable[Concatenate[Cache, Parameters], Result]:
    """Refuse the method from inside another one that changes the cache (CACHE-7)."""

    @wraps(method)
    def alone(cache: Cache, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        cache.refuse_inside(method.__name__)
        cache.busy = method.__name__
        try:
            return method(cache, *args, **kwargs)
        finally:
            cache.busy = ""

    return alone


class PrefixCache:
    """A cache that finds, adopts and locks nothing (CACHE-18); `RadixCache` adds the sharing."""

    room: ClassVar[str] = "prefix_cache"
    row_clause: ClassVar[str] = "CACHE-5"
    """What a request that may not be cached is refused with."""

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
        disable: bool = True,
        eviction_policy: str = "lru",
        eviction_granularity: str = "page",
        sliding_window_size: int = 0,
    ) -> None:
        self._tree = _core.RadixTree(
            page_size, eviction_policy, eviction_granularity, sliding_window_size
        )
        allocator = token_to_kv_pool_allocator
        if allocator is not None and allocator.page_size != page_size:
            raise ContractError(
                f"CACHE-17: page_size is {page_size}, but the allocator's is {allocator.page_size}"
            )
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool_allocator = allocator
        self.page_size = page_size
        self.disable = disable
        self.eviction_policy = eviction_policy
        self.eviction_granularity = eviction_granularity
        self.busy = ""
        """The method that is changing the cache, if one is."""
        self._observer: Observer | None = None
        self._reported = 0

    # What a cache answers that shares nothing.

    def reset(self) -> None:
        """Nothing is held (CACHE-15)."""

    def match_prefix(
        self, key: Tokens, *, extra_key: ExtraKey = None, touch: bool = True
    ) -> MatchResult:
        """Find nothing (CACHE-18, CHUNK-3)."""
        tokens, frame = key_parts(key, extra_key)
        return MatchResult(self._tree.peek(frame, tokens), None, None)

    def insert(
        self, key: Tokens, value: Slots, *, extra_key: ExtraKey = None, priority: int = 0
    ) -> InsertResult:
        """Call every slot tail (CACHE-18)."""
        tokens, _ = key_parts(key, extra_key)
        count = len(key_words(tokens))
        if len(value) != count:
            raise ContractError(f"CACHE-10: {len(value)} slots were given for {count} tokens")
        return InsertResult(0, None, [], [], [], [(0, count)] if count else [])

    @changing
    def cache_finished_req(self, req: Req) -> None:
        """Give back the whole row, and the row (CACHE-18, CHUNK-2, CHUNK-4). O(row)."""
        row = self._row(req, finished_tokens(req))
        slots = _core.whole_pages(row.slots, self.page_size, self.row_clause)
        self._give_back(self._in_order(slots))
        self._dismiss(req)
        self._report("cache_finished_req", slots)

    @changing
    def cache_unfinished_req(self, req: Req) -> None:
        """Copy what has been computed into `prefix_indices` (CHUNK-1, CHUNK-4). O(row)."""
        row = self._row(req, req.fill_ids)
        req.prefix_indices = row.slots[: row.committed]

    def inc_lock_ref(self, node: interface.NodeHandle) -> interface.LockReceipt:
        """Lock nothing (CACHE-18)."""
        return LockReceipt(0, node)

    def dec_lock_ref(self, node: interface.LockReceipt | interface.NodeHandle) -> int:
        """Unlock nothing (CACHE-18)."""
        return 0

    # Reading, in every cache.

    def resolve(self, node: interface.NodeHandle) -> Path | None:
        """The path a handle names, None if it is stale (CACHE-14). O(tokens of the path)."""
        if not isinstance(node, _core.NodeHandle):
            return None
        found = self._tree.resolve(node)
        return None if found is None else (unframe_namespace(found[0]), found[1])

    def evictable_size(self) -> int:
        """Tokens that `evict` could give back (RADIX-7, CHUNK-3). O(1)."""
        return self._tree.evictable_size()

    def protected_size(self) -> int:
        """Tokens under a lock (RADIX-7, CHUNK-3). O(1)."""
        return self._tree.protected_size()

    def total_size(self) -> int:
        """Resident tokens (RADIX-7, CHUNK-3). O(1)."""
        return self.evictable_size() + self.protected_size()

    def pretty_print(self) -> None:
        """Print the resident paths, a line a page, indented by depth (RADIX-18)."""
        named = [(repr(name), tokens, page) for (name, tokens), page in self.view().pages.items()]
        namespace = None
        for name, tokens, page in sorted(named):
            if name != namespace:
                namespace = name
                print(f"namespace {name}")
            indent = "  " * (len(tokens) // self.page_size)
            own = " ".join(map(str, tokens[-self.page_size :]))
            print(f"{indent}{own}  page {page.page}, locks {page.locks}, hits {page.hits}")
        print(f"#tokens: {self.total_size()}, protected: {self.protected_size()}")

    def view(self) -> CacheView:
        """The abstract state. O(pages × depth)."""
        pages = {
            (unframe_namespace(frame), tokens): PageView(*page)
            for (frame, tokens), page in self._tree.pages()
        }
        receipts = ((unframe_namespace(frame), path) for frame, path in self._tree.open_receipts())
        return CacheView(self.eviction_granularity, pages, tuple(receipts))

    def digest(self) -> int:
        """64 bits that stand for `view()` without slots (RADIX-17). O(tokens)."""
        return self._tree.digest()

    def check(self) -> None:
        """Raise ContractError if the books are broken (RADIX-16). O(tokens)."""
        self._tree.check()

    def counters(self) -> dict[str, int]:
        """Exact costs so far (RADIX-15)."""
        return self._tree.counters()

    # Observers.

    def attach(self, observer: Observer | None) -> None:
        """Report every operation from now on to `observer`; None detaches (OBS-1, OBS-4)."""
        self.refuse_inside("attach")
        self._observer, self._reported = observer, 0

    def refuse_inside(self, name: str) -> None:
        """Refuse a call from inside a method that is changing the cache (CACHE-7)."""
        if self.busy:
            raise ContractError(f"CACHE-7: {name} was called from inside {self.busy}")

    def _report(self, name: str, slots: Tensor) -> None:
        """Report an operation and the slots that changed their owner or their lock (OBS-1)."""
        if self._observer is None:
            return
        try:
            self._observer(Operation(self.room, name, slots, self._reported))
        except BaseException as error:  # OBS-2: whatever it raises, the operation stands
            write_unraisable(error)
        self._reported += 1

    # Requests.

    def _row(self, req: Req, tokens: Tokens) -> RequestRow:
        """The row of a request with these committed tokens (CACHE-5, CHUNK-4)."""
        pool, row, allocated = self._live_row(req, self.row_clause)
        committed = _length(tokens)
        if allocated < committed:
            raise ContractError(
                f"{self.row_clause}: row {row} holds {allocated} slots,"
                f" but {committed} are committed"
            )
        return RequestRow(pool.row(row), tokens, committed)

    def _live_row(self, req: Req, clause: str) -> tuple[ReqToTokenPool, int, int]:
        """The pool, the row of a request in it and its length; without one it is refused. O(1)."""
        pool, row = self.req_to_token_pool, req.req_pool_idx
        if pool is None:
            raise ContractError(f"{clause}: the cache has no request pool")
        if row is None:
            raise ContractError(f"{clause}: the request has no row")
        try:
            return pool, row, pool.row_length(row)
        except ContractError:
            raise ContractError(f"{clause}: row {row} is not live") from None

    def _give_back(self, slots: Tensor, swa_slots: Tensor | None = None) -> None:
        """Give slots back, and the window slots alone of others, in one `free` (CACHE-6)."""
        allocator = self.token_to_kv_pool_allocator
        if allocator is not None and swa_slots is not None:
            cast(SWATokenToKVPoolAllocator, allocator).free(slots, swa_slots)
        elif allocator is not None and slots.numel():
            allocator.free(slots)

    def _in_order(self, slots: Tensor) -> Tensor:
        """Whole pages of slots in ascending order, unless a page is a slot."""
        ordered = self.page_size == 1 or len(slots) <= self.page_size
        return slots if ordered else slots.sort().values

    def _dismiss(self, req: Req) -> None:
        """Free the row and leave nothing in the request that names it (CACHE-4)."""
        if self.req_to_token_pool is not None and req.req_pool_idx is not None:
            self.req_to_token_pool.free(req.req_pool_idx)
        req.req_pool_idx = None
        req.prefix_indices = torch.empty(0, dtype=torch.int64)
        req.cache_protected_len = 0
        req.last_node = None
        req.lock_receipt = None


class WindowedCache(PrefixCache):
    """What the caches over an allocator with a window pool have besides (CACHE-19, CACHE-20)."""

    @property
    def _window_pool(self) -> SWATokenToKVPoolAllocator | None:
        return cast(SWATokenToKVPoolAllocator | None, self.token_to_kv_pool_allocator)

    def _require_window_pool(self, clause: str) -> None:
        if self._window_pool is not None and not hasattr(self._window_pool, "size_swa"):
            raise ContractError(f"{clause}: the allocator has no window pool")

    @changing
    def evict_swa(
        self,
        req: Req,
        prelen: int,
        attention_chunk_size: int | None = None,
        *,
        sliding_window_size: int | None = None,
    ) -> int:
        """Give back the window slots that a request has left behind (CACHE-19, CACHE-20).

        O(tokens given back), besides a copy of the row.
        """
        pool, row, allocated = self._live_row(req, "CACHE-20")
        if not 0 <= prelen <= allocated:
            raise ContractError(f"CACHE-20: prelen is {prelen}, not in 0 .. {allocated}")
        frontier = self._frontier(prelen, attention_chunk_size, sliding_window_size)
        stop = frontier - frontier % self.page_size
        if stop <= req.cache_protected_len:
            return 0
        own = pool.row(row)[req.cache_protected_len : stop]
        count = self._paired_count(own[:: self.page_size]) * self.page_size
        if count:
            left = own[own.numel() - count :]
            if self._window_pool is not None:
                self._window_pool.free_swa(left)
            self._report("evict_swa", left)
        return count

    def _frontier(self, prelen: int, chunk_size: int | None, window_size: int | None) -> int:
        """The first position that the next token's window, or chunk, may still read (CACHE-19)."""
        sizes = {"attention_chunk_size": chunk_size, "sliding_window_size": window_size}
        given = [(option, size) for option, size in sizes.items() if size is not None]
        if len(given) != 1:
            raise ContractError(f"CACHE-20: {len(given)} of {' and '.join(sizes)} are given, not 1")
        ((option, size),) = given
        if size < 1:
            raise ContractError(f"CACHE-20: {option} is {size}")
        return max(prelen - size + 1, 0) if chunk_size is None else prelen - prelen % size

    def _paired_count(self, pages: Tensor) -> int:
        """How many of a request's pages, from the last one back, have a pair.

        A request leaves its pages in order, so that before one without a pair there is none with
        one; twice as many are looked at each time.
        """
        count = stop = pages.numel()
        step = 1
        while stop > 0 and self._window_pool is not None:
            start = max(stop - step, 0)
            windows = self._window_pool.translate_loc_from_full_to_swa(pages[start:stop])
            without = (windows <= 0).nonzero()
            if without.numel():
                return count - start - int(without[-1]) - 1
            stop, step = start, step * 2
        return count

    def full_evictable_size(self) -> int:
        """Tokens that `evict` could give back to the full pool (SWARADIX-10). O(1)."""
        return self._tree.evictable_size()

    def full_protected_size(self) -> int:
        """Tokens under a lock (SWARADIX-10). O(1)."""
        return self._tree.protected_size()

    def swa_evictable_size(self) -> int:
        """Tokens that `evict` could give back to the window pool (SWARADIX-10). O(1)."""
        return self._tree.swa_evictable_size()

    def swa_protected_size(self) -> int:
        """Tokens with a pair under a window lock (SWARADIX-10). O(1)."""
        return self._tree.swa_protected_size()


def _length(tokens: Tokens) -> int:
    return len(tokens) if isinstance(tokens, Sequence | Tensor) else len(key_words(tokens))
