"""What all prefix caches share, and all there is to one that does not share. Spec: CACHE, CHUNK.

A request's row, with its three lengths:

    row:      [0 ............ protected) [protected ........ committed) [committed ... allocated)
    owner:    the tree, held by its lock   the request                    the request

That the pages of the second and third range are in no tree is CACHE-1; a request that is not what
it says is refused before anything changes (CACHE-5).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast

from kvspec.errors import ContractError
from kvspec.interfaces import prefix_cache as interface
from kvspec.interfaces.prefix_cache import CacheView, InsertResult, MatchResult, Path, Req
from kvspec.interfaces.prefix_key import ExtraKey, Tokens
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator, Slots
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator
from kvspec.oracle.boundary import numbers, tensor
from kvspec.oracle.digest import START, mix
from kvspec.oracle.observer import Reporter
from kvspec.prefix_key import key_parts, key_words

__all__ = ["BasePrefixCache", "LockReceipt", "RequestRow", "WindowedCache", "finished_tokens"]


@dataclass(frozen=True, eq=False, slots=True)
class LockReceipt:
    """What `inc_lock_ref` returns; `dec_lock_ref` consumes it once (CACHE-11, CACHE-12)."""

    delta: int
    """Minus the number of tokens that this lock took from the evictable ones."""
    node: interface.NodeHandle
    """The handle that was locked; None where nothing is shared."""
    swa_uuid: int | None = None
    owner: object = None
    """The cache whose receipt it is."""


class RequestRow(NamedTuple):
    """What a request brings: the slots of its row, and the tokens of those that may be shared."""

    slots: list[int]
    """row[0 : allocated)"""
    tokens: list[int]
    """row[0 : committed) as tokens"""


def finished_tokens(req: Req) -> list[int]:
    """The tokens of a finished request that have KV: the last sampled one has none."""
    committed = len(req.origin_input_ids) + max(len(req.output_ids) - 1, 0)
    return [*req.origin_input_ids, *req.output_ids][:committed]


class BasePrefixCache(Reporter):
    """A cache that finds, adopts and locks nothing (CACHE-18); `RadixCache` adds the sharing."""

    room = "prefix_cache"
    row_clause = "CACHE-5"
    """What a request that may not be cached is refused with."""

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
        disable: bool = True,
    ) -> None:
        if page_size < 1:
            raise ContractError(f"CACHE-17: page_size is {page_size}")
        if token_to_kv_pool_allocator and token_to_kv_pool_allocator.page_size != page_size:
            raise ContractError(
                f"CACHE-17: page_size is {page_size},"
                f" but the allocator's is {token_to_kv_pool_allocator.page_size}"
            )
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool_allocator = token_to_kv_pool_allocator
        self.page_size = page_size
        self.disable = disable
        self._busy = ""

    # What a cache answers that shares nothing.

    def reset(self) -> None:
        """Nothing is held, and no receipt is open (CACHE-15, CACHE-16)."""

    def match_prefix(
        self, key: Tokens, *, extra_key: ExtraKey = None, touch: bool = True
    ) -> MatchResult:
        """Find nothing (CACHE-18, CHUNK-3)."""
        self._parse(key, extra_key)
        return MatchResult(tensor([]), None, None)

    def insert(
        self, key: Tokens, value: Slots, *, extra_key: ExtraKey = None, priority: int = 0
    ) -> InsertResult:
        """Call every slot tail (CACHE-18)."""
        slots = self._slots_of(self._parse(key, extra_key)[0], value)
        return InsertResult(0, None, [], [], [], [(0, len(slots))] if slots else [])

    def cache_finished_req(self, req: Req) -> None:
        """Give back the whole row, and the row (CACHE-18, CHUNK-2, CHUNK-4)."""
        with self._changing("cache_finished_req"):
            row = self._row(req, finished_tokens(req))
            pages = dict.fromkeys(slot // self.page_size for slot in row.slots)
            self._give_back(list(pages))
            self._dismiss(req)
            self._report_pages("cache_finished_req", list(pages))

    def cache_unfinished_req(self, req: Req) -> None:
        """Copy what has been computed into `prefix_indices` (CHUNK-1, CHUNK-4)."""
        with self._changing("cache_unfinished_req"):
            row = self._row(req, list(req.fill_ids))
            req.prefix_indices = tensor(row.slots[: len(row.tokens)])

    def inc_lock_ref(self, node: interface.NodeHandle) -> interface.LockReceipt:
        """Lock nothing (CACHE-18)."""
        return LockReceipt(0, node)

    def dec_lock_ref(self, node: interface.LockReceipt | interface.NodeHandle) -> int:
        """Unlock nothing; CACHE-13 is for caches that keep receipts (CACHE-18)."""
        return 0

    def resolve(self, node: interface.NodeHandle) -> Path | None:
        """No handle is given out, so none is live (CACHE-14)."""
        return None

    def evictable_size(self) -> int:
        """Tokens that `evict` could give back (RADIX-7, CHUNK-3)."""
        return 0

    def protected_size(self) -> int:
        """Tokens under a lock (RADIX-7, CHUNK-3)."""
        return 0

    def total_size(self) -> int:
        """Resident tokens (RADIX-7, CHUNK-3)."""
        return self.evictable_size() + self.protected_size()

    def pretty_print(self) -> None:
        """Print the resident paths: there are none (RADIX-18)."""
        print("#tokens: 0")

    def view(self) -> CacheView:
        """The abstract state: nothing is resident."""
        return CacheView("page", {}, ())

    def digest(self) -> int:
        """64 bits that stand for `view()` (RADIX-17)."""
        return mix(START, 0)

    def check(self) -> None:
        """There is nothing to break (RADIX-16)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far (RADIX-15)."""
        return {"tokens_compared": 0, "heap_moves": 0, "leaves_evicted": 0}

    # What the caches share.

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """A method that changes the cache runs inside this, and no other one with it (CACHE-7)."""
        self._guard(name)
        self._busy = name
        try:
            yield
        finally:
            self._busy = ""

    def _guard(self, name: str) -> None:
        if self._busy:
            raise ContractError(f"CACHE-7: {name} was called from inside {self._busy}")

    def _parse(self, key: Tokens, extra_key: ExtraKey) -> tuple[list[int], bytes]:
        """The tokens of a key and the frame of its namespace (KEY-1, KEY-2)."""
        tokens, frame = key_parts(key, extra_key)
        return key_words(tokens).tolist(), frame

    def _slots_of(self, tokens: Sequence[int], value: Slots) -> list[int]:
        slots = numbers(value, "CACHE-10")
        if len(slots) != len(tokens):
            raise ContractError(f"CACHE-10: {len(slots)} slots were given for {len(tokens)} tokens")
        return slots

    def _row(self, req: Req, tokens: list[int]) -> RequestRow:
        """The row of a request with these committed tokens (CACHE-5, CHUNK-4)."""
        slots = self._live_row(req, self.row_clause)
        if len(slots) < len(tokens):
            raise ContractError(
                f"{self.row_clause}: row {req.req_pool_idx} holds {len(slots)} slots,"
                f" but {len(tokens)} are committed"
            )
        return RequestRow(slots, tokens)

    def _live_row(self, req: Req, clause: str) -> list[int]:
        """row[0 : allocated) of a request, which is refused with `clause` if it has none."""
        if self.req_to_token_pool is None:
            raise ContractError(f"{clause}: the cache has no request pool")
        if req.req_pool_idx is None:
            raise ContractError(f"{clause}: the request has no row")
        try:
            row = self.req_to_token_pool.row(req.req_pool_idx)
        except ContractError:
            raise ContractError(f"{clause}: row {req.req_pool_idx} is not live") from None
        return numbers(row, clause)

    def _check_lengths(self, req: Req, row: RequestRow) -> None:
        """The protected length is possible, and no page is twice in the row (CACHE-5)."""
        protected, committed = req.cache_protected_len, len(row.tokens)
        if protected % self.page_size or not 0 <= protected <= committed:
            raise ContractError(
                f"CACHE-5: cache_protected_len is {protected}, not a multiple of {self.page_size}"
                f" of at most {committed} committed tokens"
            )
        pages = self._pages_of(row.slots)
        if len(set(pages)) != len(pages):
            raise ContractError(f"CACHE-5: a page is twice in row {req.req_pool_idx}")

    def _pages_of(self, slots: Sequence[int]) -> list[int]:
        """The pages of a row in order, each slot in its place in one (CACHE-5)."""
        size = self.page_size
        for position, slot in enumerate(slots):
            start = position - position % size
            if slot != slots[start] + position - start or slots[start] % size:
                raise ContractError(
                    f"CACHE-5: slot {slot} at position {position} is not in its place in a page"
                )
        return [slot // size for slot in slots[::size]]

    def _give_back(self, pages: Sequence[int]) -> None:
        """Give pages back in one `free` (CACHE-6)."""
        if pages and self.token_to_kv_pool_allocator is not None:
            self.token_to_kv_pool_allocator.free(tensor(self._slots_in(self._in_order(pages))))

    def _in_order(self, pages: Sequence[int]) -> list[int]:
        """As they are given back: ascending, unless a page is a slot (RADIX-10)."""
        return list(pages) if self.page_size == 1 else sorted(pages)

    def _slots_in(self, pages: Sequence[int]) -> list[int]:
        size = self.page_size
        return [slot for page in pages for slot in range(page * size, (page + 1) * size)]

    def _exchange(
        self, req: Req, row: RequestRow, shared: Sequence[int], duplicates: Sequence[int]
    ) -> None:
        """Point the row at the tree's slots, then give back those it named (CACHE-3, CACHE-6)."""
        if not duplicates:
            return
        self._rewrite(req, shared)
        try:
            self._give_back(duplicates)
        except BaseException:
            self._rewrite(req, row.slots[: len(shared)])
            raise

    def _rewrite(self, req: Req, shared: Sequence[int]) -> None:
        """Put the tree's slots in the row where they are not yet (CACHE-2)."""
        if self.req_to_token_pool is not None and req.req_pool_idx is not None:
            positions = slice(req.cache_protected_len, len(shared))
            self.req_to_token_pool.write((req.req_pool_idx, positions), shared[positions])

    def _report_pages(self, name: str, pages: Sequence[int]) -> None:
        """Report an operation and the slots that changed their owner or their lock (OBS-1)."""
        if self._observer is not None:
            self._report(name, self._slots_in(pages))

    def _dismiss(self, req: Req) -> None:
        """Free the row and leave nothing in the request that names it."""
        if self.req_to_token_pool is not None and req.req_pool_idx is not None:
            self.req_to_token_pool.free(req.req_pool_idx)
        req.req_pool_idx = None
        req.prefix_indices = tensor([])
        req.cache_protected_len = 0
        req.last_node = None
        req.lock_receipt = None


class WindowedCache(BasePrefixCache):
    """What the caches over an allocator with a window pool have besides (CACHE-19, CACHE-20)."""

    @property
    def _window_pool(self) -> SWATokenToKVPoolAllocator | None:
        return cast(SWATokenToKVPoolAllocator | None, self.token_to_kv_pool_allocator)

    def _require_window_pool(self, clause: str) -> None:
        if self._window_pool is not None and not hasattr(self._window_pool, "size_swa"):
            raise ContractError(f"{clause}: the allocator has no window pool")

    def _have_windows(self, slots: Sequence[int]) -> list[bool]:
        """Whether each slot has a window slot; where there is no allocator, it has."""
        if self._window_pool is None:
            return [True] * len(slots)
        windows = self._window_pool.translate_loc_from_full_to_swa(tensor(slots))
        return [window > 0 for window in windows.tolist()]

    def evict_swa(
        self,
        req: Req,
        prelen: int,
        attention_chunk_size: int | None = None,
        *,
        sliding_window_size: int | None = None,
    ) -> int:
        """Give back the window slots that a request has left behind (CACHE-19, CACHE-20)."""
        with self._changing("evict_swa"):
            row = self._live_row(req, "CACHE-20")
            if not 0 <= prelen <= len(row):
                raise ContractError(f"CACHE-20: prelen is {prelen}, not in 0 .. {len(row)}")
            first_read = self._first_read(prelen, attention_chunk_size, sliding_window_size)
            pages = self._left_behind(req, row, first_read - first_read % self.page_size)
            if pages and self._window_pool is not None:
                self._window_pool.free_swa(tensor(self._slots_in(pages)))
            if pages:
                self._report_pages("evict_swa", pages)
            return len(pages) * self.page_size

    def _left_behind(self, req: Req, row: Sequence[int], frontier: int) -> list[int]:
        """The request's own pages before the frontier, back to one without a pair (CACHE-19)."""
        firsts = row[req.cache_protected_len : frontier : self.page_size]
        windows = self._have_windows(firsts)
        start = max((at + 1 for at, has_window in enumerate(windows) if not has_window), default=0)
        return [first // self.page_size for first in firsts[start:]]

    def _first_read(self, prelen: int, chunk_size: int | None, window_size: int | None) -> int:
        """The first position that the next token's window, or its chunk, still reads (CACHE-19)."""
        sizes = {"attention_chunk_size": chunk_size, "sliding_window_size": window_size}
        given = [(option, size) for option, size in sizes.items() if size is not None]
        if len(given) != 1:
            raise ContractError(f"CACHE-20: {len(given)} of {' and '.join(sizes)} are given, not 1")
        ((option, size),) = given
        if size < 1:
            raise ContractError(f"CACHE-20: {option} is {size}")
        return max(prelen - size + 1, 0) if chunk_size is None else prelen - prelen % size

    def full_evictable_size(self) -> int:
        """Tokens that `evict` could give back to the full pool (SWARADIX-10)."""
        return self.evictable_size()

    def full_protected_size(self) -> int:
        """Tokens under a lock (SWARADIX-10)."""
        return self.protected_size()

    def swa_evictable_size(self) -> int:
        """Tokens that `evict` could give back to the window pool (SWARADIX-10)."""
        return 0

    def swa_protected_size(self) -> int:
        """Tokens with a pair under a window lock (SWARADIX-10)."""
        return 0
