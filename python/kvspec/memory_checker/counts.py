"""Sums instead of sets: what level counts compares, and the eight numbers. Spec: CHECK.

available + pending + evictable + protected + what requests own and is reserved = the pool
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

from kvspec.errors import ContractError, MemoryLeakError
from kvspec.interfaces.memory_checker import SWATokenInfo
from kvspec.interfaces.prefix_cache import BasePrefixCache, Req, WindowedCache
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator

__all__ = ["check_counts", "counting", "get_swa_token_info", "written_length"]

_LEAK = "token_to_kv_pool_allocator memory leak detected! "


def check_counts(
    allocator: BaseTokenToKVPoolAllocator,
    rows: ReqToTokenPool,
    tree_cache: BasePrefixCache,
    reqs: Iterable[Req],
    reserved: Iterable[int],
) -> None:
    """Raise MemoryLeakError unless the sums are right (CHECK-5, CHECK-12, CHECK-21).

    O(reqs), and O(slots of their rows) where there is a window pool.
    """
    page_size = allocator.page_size
    running = [req for req in reqs if req.req_pool_idx is not None] if reqs else ()
    kept = tuple({slot // page_size for slot in reserved}) if reserved else ()
    check = _check_hybrid if hasattr(allocator, "size_swa") else _check_pool
    check(allocator, rows, tree_cache, running, kept)
    free_size, total_size = rows.available_size(), rows.req_to_token.shape[0]
    if free_size + len(running) != total_size:
        raise MemoryLeakError(
            "req_to_token_pool memory leak detected!"
            f"available_size={free_size}, {total_size=}, owned_size={len(running)}\n"
        )


def counting(
    token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator,
    req_to_token_pool: ReqToTokenPool,
    tree_cache: BasePrefixCache,
) -> Callable[..., None]:
    """`check_memory(..., reqs, reserved, level="counts")` of these three, prepared: for those who
    call it after every step (CHECK-8). While nothing runs it reads the sizes, and nothing else.
    """
    pools = token_to_kv_pool_allocator, req_to_token_pool, tree_cache
    prepared = _hybrid_counting if hasattr(pools[0], "size_swa") else _pool_counting
    return prepared(*pools, req_to_token_pool.req_to_token.shape[0])


def _pool_counting(
    allocator: BaseTokenToKVPoolAllocator,
    rows: ReqToTokenPool,
    tree_cache: BasePrefixCache,
    row_count: int,
) -> Callable[..., None]:
    total = allocator.size // allocator.page_size * allocator.page_size
    available, free_rows = allocator.available_size, rows.available_size
    evictable, protected = tree_cache.evictable_size, tree_cache.protected_size
    pending = getattr(allocator, "pending_size", partial(_pending_size, allocator))

    def check(reqs: Iterable[Req] = (), reserved: Iterable[int] = ()) -> None:
        if (
            reqs
            or reserved
            or available() + pending() + evictable() + protected() != total
            or free_rows() != row_count
        ):
            check_counts(allocator, rows, tree_cache, reqs, reserved)

    return check


def _hybrid_counting(
    allocator: Any, rows: ReqToTokenPool, tree_cache: Any, row_count: int
) -> Callable[..., None]:
    full_total, swa_total = _tokens_per_layer(allocator)
    free_rows = rows.available_size
    full_pending = getattr(allocator, "pending_size", partial(_pending_size, allocator))
    swa_pending = getattr(allocator, "swa_pending_size", partial(_swa_pending_size, allocator))
    full, swa = allocator.full_available_size, allocator.swa_available_size
    full_evictable, swa_evictable = tree_cache.full_evictable_size, tree_cache.swa_evictable_size
    full_protected, swa_protected = tree_cache.full_protected_size, tree_cache.swa_protected_size

    def check(reqs: Iterable[Req] = (), reserved: Iterable[int] = ()) -> None:
        if (
            reqs
            or reserved
            or full() + full_pending() + full_evictable() + full_protected() != full_total
            or swa() + swa_pending() + swa_evictable() + swa_protected() != swa_total
            or free_rows() != row_count
        ):
            check_counts(allocator, rows, tree_cache, reqs, reserved)

    return check


def get_swa_token_info(
    token_to_kv_pool_allocator: SWATokenToKVPoolAllocator, tree_cache: WindowedCache
) -> SWATokenInfo:
    """How full the two pools are: the source's eight numbers, in its order (CHECK-12). O(1)."""
    full_tokens_per_layer, swa_tokens_per_layer = _tokens_per_layer(token_to_kv_pool_allocator)
    full_available_size = token_to_kv_pool_allocator.full_available_size()
    full_evictable_size = tree_cache.full_evictable_size()
    swa_available_size = token_to_kv_pool_allocator.swa_available_size()
    swa_evictable_size = tree_cache.swa_evictable_size()
    full_num_used = full_tokens_per_layer - (full_available_size + full_evictable_size)
    swa_num_used = swa_tokens_per_layer - (swa_available_size + swa_evictable_size)
    return SWATokenInfo(
        full_num_used=full_num_used,
        swa_num_used=swa_num_used,
        full_token_usage=full_num_used / (full_tokens_per_layer or 1),
        swa_token_usage=swa_num_used / (swa_tokens_per_layer or 1),
        full_available_size=full_available_size,
        full_evictable_size=full_evictable_size,
        swa_available_size=swa_available_size,
        swa_evictable_size=swa_evictable_size,
    )


def _tokens_per_layer(allocator: SWATokenToKVPoolAllocator) -> tuple[int, int]:
    """What the full and the window pool hold, in whole pages."""
    page_size = allocator.page_size
    full, window = allocator.size // page_size, allocator.size_swa // page_size
    return full * page_size, window * page_size


def _check_pool(
    allocator: BaseTokenToKVPoolAllocator,
    rows: ReqToTokenPool,
    tree_cache: BasePrefixCache,
    running: Sequence[Req],
    reserved: Sequence[int],
) -> None:
    """One pool: its tokens are available, pending, the tree's, or owned (CHECK-5)."""
    page_size = allocator.page_size
    max_total_num_tokens = allocator.size // page_size * page_size
    available_size = allocator.available_size()
    evictable_size = tree_cache.evictable_size()
    protected_size = tree_cache.protected_size()
    owned_size = len(reserved) * page_size
    for req in running:
        owned_size += _owned_pages(req, rows, page_size) * page_size
    pending_size = _pending_size(allocator)
    tree_size = evictable_size + protected_size
    if available_size + pending_size + tree_size + owned_size != max_total_num_tokens:
        raise MemoryLeakError(
            f"{_LEAK}{max_total_num_tokens=}, {available_size=}, {evictable_size=},"
            f" {protected_size=}, {owned_size=}{_group(pending_size=pending_size)}\n"
        )


def _check_hybrid(
    allocator: BaseTokenToKVPoolAllocator,
    rows: ReqToTokenPool,
    tree_cache: BasePrefixCache,
    running: Sequence[Req],
    reserved: Sequence[int],
) -> None:
    """The same of a full pool and a window pool (CHECK-12)."""
    pools, cache = cast(SWATokenToKVPoolAllocator, allocator), cast(WindowedCache, tree_cache)
    info = get_swa_token_info(pools, cache)
    full_protected_size = cache.full_protected_size()
    swa_protected_size = cache.swa_protected_size()
    full_owned_size = swa_owned_size = 0
    if running or reserved:
        full_owned_size, swa_owned_size = _owned_in_both(pools, rows, running, reserved)
    full_pending_size, swa_pending_size = _pending_size(pools), _swa_pending_size(pools)
    full_kept_size = full_protected_size + full_owned_size + full_pending_size
    swa_kept_size = swa_protected_size + swa_owned_size + swa_pending_size
    if (info.full_num_used, info.swa_num_used) == (full_kept_size, swa_kept_size):
        return
    full_tokens_per_layer, swa_tokens_per_layer = _tokens_per_layer(pools)
    full_available_size, full_evictable_size = info.full_available_size, info.full_evictable_size
    swa_available_size, swa_evictable_size = info.swa_available_size, info.swa_evictable_size
    raise MemoryLeakError(
        f"{_LEAK}{full_tokens_per_layer=}, {full_available_size=}, {full_evictable_size=},"
        f" {full_protected_size=}, {full_owned_size=}{_group(full_pending_size=full_pending_size)}"
        f"\n{swa_tokens_per_layer=}, {swa_available_size=}, {swa_evictable_size=},"
        f" {swa_protected_size=}, {swa_owned_size=}{_group(swa_pending_size=swa_pending_size)}\n"
    )


def _group(**sizes: int) -> str:
    """What an open free group adds to the source's message; nothing without one."""
    return "".join(f", {name}={size}" for name, size in sizes.items() if size)


def _pending_size(allocator: Any) -> int:
    """Slots given back in an open group: of the full pool, where there are two (CHECK-21).

    O(1), and O(pool) inside a group of an allocator without `pending_size`.
    """
    if hasattr(allocator, "pending_size"):
        return cast(int, allocator.pending_size())
    if allocator.is_not_in_free_group:
        return 0
    from kvspec.instrumentation.views import allocator_view  # above this room, and seldom needed

    return len(allocator_view(allocator).pending) * cast(int, allocator.page_size)


def _swa_pending_size(allocator: Any) -> int:
    """The same of the window pool."""
    if hasattr(allocator, "swa_pending_size"):
        return cast(int, allocator.swa_pending_size())
    if allocator.is_not_in_free_group:
        return 0
    from kvspec.instrumentation.views import allocator_view  # above this room, and seldom needed

    books = allocator_view(allocator).swa
    return 0 if books is None else len(books.pending) * cast(int, allocator.page_size)


def written_length(req: Any) -> int:
    """Positions of its row that a request says it has written: the last token sampled has no KV."""
    return max(len(req.fill_ids), len(req.origin_input_ids) + max(len(req.output_ids) - 1, 0))


def _owned_pages(req: Req, rows: ReqToTokenPool, page_size: int) -> int:
    """Pages of the request's row from the protected length on; 0 if the row is not live."""
    length = _row_length(req, rows)
    return -(-length // page_size) - _protected_length(req) // page_size if length else 0


def _protected_length(req: Any) -> int:
    """What of its row the tree owns; of a request that does not say, its prefix in whole pages."""
    known: int | None = getattr(req, "cache_protected_len", None)
    return len(req.prefix_indices) if known is None else known


def _row_length(req: Req, rows: Any) -> int:
    """How many positions of the request's row are written; 0 if the row is not live."""
    assert req.req_pool_idx is not None
    if not hasattr(rows, "row_length"):
        return written_length(req)
    try:
        length: int = rows.row_length(req.req_pool_idx)
    except ContractError:
        return 0
    return length


def _owned_in_both(
    allocator: SWATokenToKVPoolAllocator,
    rows: ReqToTokenPool,
    running: Sequence[Req],
    reserved: Sequence[int],
) -> tuple[int, int]:
    """Tokens of the full and of the window pool that requests own or that are reserved.

    O(slots of their rows).
    """
    page_size = allocator.page_size
    owned = [page * page_size for page in reserved]
    for req in running:
        owned += _own_slots(req, rows, page_size)
    in_pool = [slot for slot in owned if 0 <= slot < allocator.size + page_size]
    windows = int(allocator.translate_loc_from_full_to_swa(in_pool).count_nonzero())
    return len(owned) * page_size, windows * page_size


def _own_slots(req: Req, rows: Any, page_size: int) -> list[int]:
    """A slot of each page of the row from the protected length on. O(slots of the row)."""
    if not _owned_pages(req, rows, page_size):
        return []
    row, start = req.req_pool_idx, _protected_length(req) // page_size * page_size
    table = (
        rows.row(row) if hasattr(rows, "row") else rows.req_to_token[row, : _row_length(req, rows)]
    )
    own: list[int] = table[start::page_size].tolist()
    return own
