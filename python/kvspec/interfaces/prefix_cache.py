"""What all prefix caches share. Spec: CACHE."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from kvspec.interfaces.observer import Observable
from kvspec.interfaces.prefix_key import ExtraKey, Tokens
from kvspec.interfaces.slot_allocator import Slots

__all__ = [
    "BasePrefixCache",
    "CacheView",
    "EvictResult",
    "InsertRanges",
    "InsertResult",
    "Interval",
    "LockReceipt",
    "MatchResult",
    "NodeHandle",
    "PageView",
    "Path",
    "Req",
    "WindowedCache",
]

Interval: TypeAlias = tuple[int, int]
"""Positions [start, stop) of the caller's slots."""
Path: TypeAlias = tuple[ExtraKey, tuple[int, ...]]
"""A namespace and the tokens of whole pages from the first on."""


class NodeHandle(Protocol):
    """Names a path and the incarnation of its last page (CACHE-14). Hashable, compares by both."""

    def __hash__(self) -> int: ...


class LockReceipt(Protocol):
    """What `inc_lock_ref` returns; `dec_lock_ref` consumes it once (CACHE-11, CACHE-12)."""

    @property
    def delta(self) -> int:
        """Minus the number of tokens that this lock took from the evictable ones."""

    @property
    def node(self) -> NodeHandle:
        """The handle that was locked."""

    @property
    def swa_uuid(self) -> int | None:
        """Names where a window lock ends; None where it reaches the root, and without windows."""


class MatchResult(NamedTuple):
    device_indices: Tensor
    """int64 [matched tokens], on the CPU, a copy."""
    last_device_node: NodeHandle | None
    last_host_node: NodeHandle | None
    host_hit_length: int = 0


class InsertRanges(NamedTuple):
    """What became of the caller's window slots, where it had one (SWARADIX-6)."""

    shared: list[Interval]
    adopted: list[Interval]
    """The tree has them now: of adopted full slots, or of tombstones that they revived."""
    duplicate: list[Interval]
    tail: list[Interval]


class InsertResult(NamedTuple):
    """What became of the caller's slots: four disjoint sets of positions (CACHE-8)."""

    prefix_len: int
    """Tokens of the reach that were resident before."""
    last_device_node: NodeHandle | None
    shared: list[Interval]
    adopted: list[Interval]
    duplicate: list[Interval]
    tail: list[Interval]
    swa: InsertRanges | None = None
    """The same of the window pool; None in a cache without windows."""


class EvictResult(NamedTuple):
    """What an eviction gave back to each pool, in tokens (SWARADIX-12, SWARADIX-13)."""

    full_num_tokens: int
    swa_num_tokens: int


class PageView(NamedTuple):
    page: int
    locks: int
    last: int
    """Rank of the last access, 0 the oldest."""
    born: int
    """Rank of the insertion, 0 the oldest."""
    hits: int
    priority: int
    cut: bool
    """False for every page at page granularity."""
    tombstone: bool = False
    """Whether it is without a pair; never in a cache without windows."""
    swa_locks: int = 0
    """How many window locks cover it."""


class CacheView(NamedTuple):
    granularity: str
    pages: Mapping[Path, PageView]
    receipts: tuple[Path, ...]
    """Paths of the open receipts, oldest first."""


class Req(Protocol):
    """What a cache reads and writes of a request."""

    # read
    origin_input_ids: Sequence[int]
    output_ids: Sequence[int]
    fill_ids: Sequence[int]
    extra_key: ExtraKey
    # read and written: `cache_finished_req` leaves None, 0 and an empty tensor
    req_pool_idx: int | None
    prefix_indices: Tensor
    last_node: NodeHandle | None
    cache_protected_len: int
    lock_receipt: LockReceipt | None


class BasePrefixCache(Observable, Protocol):
    """Whatever an operation gives back goes in one `free`, and if that fails nothing has changed
    (CACHE-6); an operation from inside another one is refused (CACHE-7), and so is an option whose
    room does not exist (CACHE-17).
    """

    page_size: int
    disable: bool

    def reset(self) -> None:
        """Give back every page; all handles become stale (CACHE-15, CACHE-16). O(pages)."""

    def match_prefix(
        self, key: Tokens, *, extra_key: ExtraKey = None, touch: bool = True
    ) -> MatchResult:
        """The longest resident prefix (RADIX-1, RADIX-2, RADIX-3, CACHE-18). O(tokens compared)."""

    def insert(
        self, key: Tokens, value: Slots, *, extra_key: ExtraKey = None, priority: int = 0
    ) -> InsertResult:
        """Put the whole pages of a key in (CACHE-8, CACHE-9, CACHE-10, RADIX-4). O(tokens)."""

    def cache_finished_req(self, req: Req) -> None:
        """Cache what a request computed and take it apart (CACHE-4, CACHE-5). O(row)."""

    def cache_unfinished_req(self, req: Req) -> None:
        """Cache what a request has computed so far (CACHE-2, CACHE-3, CACHE-5). O(row)."""

    def evict(self, num_tokens: int, /) -> int | EvictResult:
        """Give back evictable tokens: how many, or of a cache with windows how many of each pool
        (RADIX-8 to RADIX-13, CHUNK-3, SWARADIX-12, SWARADIX-13). O(log n) a leaf.
        """

    def inc_lock_ref(self, node: NodeHandle) -> LockReceipt:
        """Keep the node's path from eviction (CACHE-11, CACHE-13). O(nodes on the path)."""

    def dec_lock_ref(self, node: LockReceipt | NodeHandle) -> int:
        """Undo one `inc_lock_ref` (CACHE-12, CACHE-13). O(nodes on the path)."""

    def resolve(self, node: NodeHandle) -> Path | None:
        """The path a handle names, None if it is stale (CACHE-14). O(tokens of the path)."""

    def evictable_size(self) -> int:
        """Tokens that `evict` could give back (RADIX-7). O(1)."""

    def protected_size(self) -> int:
        """Tokens under a lock (RADIX-7). O(1)."""

    def total_size(self) -> int:
        """Resident tokens (RADIX-7). O(1)."""

    def pretty_print(self) -> None:
        """Print the resident paths (RADIX-18). O(tokens)."""

    def view(self) -> CacheView:
        """The abstract state. O(pages × depth)."""

    def digest(self) -> int:
        """64 bits that stand for `view()` without slots (RADIX-17). O(tokens)."""

    def check(self) -> None:
        """Raise ContractError if the books are broken (RADIX-16). O(tokens)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `tokens_compared`, `heap_moves`, `leaves_evicted` (RADIX-15)."""


class WindowedCache(Protocol):
    """What the caches over an allocator with a window pool have besides."""

    def evict_swa(
        self,
        req: Req,
        prelen: int,
        attention_chunk_size: int | None = None,
        *,
        sliding_window_size: int | None = None,
    ) -> int:
        """Give back the window slots that a request has left behind (CACHE-19, CACHE-20).

        `prelen` tokens are computed. Of the two sizes, in tokens, one is given: that of a sliding
        window or that of chunked attention. Returns tokens. O(tokens given back), besides a copy
        of the row.
        """

    def full_evictable_size(self) -> int:
        """Tokens that `evict` could give back to the full pool (SWARADIX-10). O(1)."""

    def full_protected_size(self) -> int:
        """Tokens under a lock (SWARADIX-10). O(1)."""

    def swa_evictable_size(self) -> int:
        """Tokens that `evict` could give back to the window pool (SWARADIX-10). O(1)."""

    def swa_protected_size(self) -> int:
        """Tokens with a pair under a window lock (SWARADIX-10). O(1)."""
