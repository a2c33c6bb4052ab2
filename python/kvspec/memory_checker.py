"""Who owns every page? Spec: CHECK.

    every page of 1 .. P has exactly one owner: free, pending, tree, a request, reserved

The first storey looks at what there is: it works on `view()`, changes nothing, and serves any
implementation.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Literal, TypeAlias

from kvspec.errors import ContractError, MemoryLeakError
from kvspec.interfaces.prefix_cache import BasePrefixCache, Req
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import AllocatorView, BaseTokenToKVPoolAllocator

__all__ = ["Level", "check_memory"]

Level: TypeAlias = Literal["off", "counts", "sets"]
_Rows: TypeAlias = dict[int, tuple[int, ...]]

_PAGES = "token_to_kv_pool_allocator"
_ROWS = "req_to_token_pool"


def check_memory(
    token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator,
    req_to_token_pool: ReqToTokenPool,
    tree_cache: BasePrefixCache,
    reqs: Iterable[Req] = (),
    reserved: Iterable[int] = (),
    level: Level = "sets",
) -> None:
    """Raise MemoryLeakError unless every page and row has one owner (CHECK-1 to CHECK-8).

    `reqs` are the running requests, `reserved` the slots held outside any row. `sets` names every
    fault on a line of its own, O(pool); `counts` compares sums, O(reqs); `off` looks at nothing.
    """
    if level == "off":
        return
    running = [req for req in reqs if req.req_pool_idx is not None]
    page_size = token_to_kv_pool_allocator.page_size
    kept = {slot // page_size for slot in reserved}
    if level == "counts":
        _check_counts(token_to_kv_pool_allocator, req_to_token_pool, tree_cache, running, len(kept))
        return
    if level != "sets":
        raise ContractError(f"CHECK-8: level is {level!r}, not one of off, counts, sets")
    rows = dict(req_to_token_pool.view().rows)
    owners = _owners(token_to_kv_pool_allocator.view(), tree_cache, rows, running, kept, page_size)
    page_count = token_to_kv_pool_allocator.size // page_size
    faults = [
        *_page_faults(owners, page_count),
        *_protected_faults(tree_cache, rows, running, page_size),
        *_row_faults(rows, running),
    ]
    if faults:
        raise MemoryLeakError("\n".join(faults))


def _check_counts(
    allocator: BaseTokenToKVPoolAllocator,
    rows: ReqToTokenPool,
    tree_cache: BasePrefixCache,
    running: list[Req],
    reserved_pages: int,
) -> None:
    page_size = allocator.page_size
    max_total_num_tokens = allocator.size // page_size * page_size
    available_size = allocator.available_size()
    evictable_size = tree_cache.evictable_size()
    protected_size = tree_cache.protected_size()
    owned_pages = reserved_pages + sum(_owned_pages(req, rows, page_size) for req in running)
    owned_size = owned_pages * page_size
    if available_size + evictable_size + protected_size + owned_size != max_total_num_tokens:
        raise MemoryLeakError(
            "token_to_kv_pool_allocator memory leak detected! "
            f"{max_total_num_tokens=}, {available_size=}, {evictable_size=}, {protected_size=}, "
            f"{owned_size=}\n"
        )
    total_size = rows.req_to_token.shape[0]
    free_size = rows.available_size()
    if free_size + len(running) != total_size:
        raise MemoryLeakError(
            "req_to_token_pool memory leak detected!"
            f"available_size={free_size}, {total_size=}, owned_size={len(running)}\n"
        )


def _owned_pages(req: Req, rows: ReqToTokenPool, page_size: int) -> int:
    """Pages of the request's row from the protected length on; 0 if the row is not live."""
    assert req.req_pool_idx is not None
    try:
        length = rows.row_length(req.req_pool_idx)
    except ContractError:
        return 0
    return -(-length // page_size) - req.cache_protected_len // page_size


def _owners(
    allocator: AllocatorView,
    tree_cache: BasePrefixCache,
    rows: _Rows,
    running: list[Req],
    reserved: set[int],
    page_size: int,
) -> dict[int, list[str]]:
    """The owners of each page that has any: one entry for each place that names it."""
    owners: dict[int, list[str]] = defaultdict(list)

    def add(owner: str, pages: Iterable[int]) -> None:
        for page in pages:
            owners[page].append(owner)

    add("free", (*allocator.free, *allocator.release))
    add("pending", allocator.pending)
    add("tree", (resident.page for resident in tree_cache.view().pages.values()))
    for row, req in _live(rows, running):
        places = enumerate(rows[row][req.cache_protected_len :])
        named = groupby((place // page_size, slot // page_size) for place, slot in places)
        add(f"the request in row {row}", (page for (_, page), _ in named))
    add("reserved", reserved)
    return owners


def _live(rows: _Rows, running: list[Req]) -> Iterator[tuple[int, Req]]:
    for req in running:
        if req.req_pool_idx is not None and req.req_pool_idx in rows:
            yield req.req_pool_idx, req


def _page_faults(owners: dict[int, list[str]], page_count: int) -> Iterator[str]:
    """A line for each page without exactly one owner (CHECK-1, CHECK-2)."""
    for page in sorted({*range(1, page_count + 1), *owners}):
        named = owners.get(page, [])
        if not 1 <= page <= page_count:
            named = ["nobody, being outside the pool", *named]
        if not named:
            yield f"CHECK-1: page {page} of {_PAGES} is held and has no owner"
        elif len(named) > 1:
            yield f"CHECK-2: page {page} of {_PAGES} has {len(named)} owners: {'; '.join(named)}"


def _protected_faults(
    tree_cache: BasePrefixCache, rows: _Rows, running: list[Req], page_size: int
) -> Iterator[str]:
    """A line for each page of a protected row that is not the tree's (CHECK-3)."""
    pages = tree_cache.view().pages
    for row, req in _live(rows, running):
        node = req.lock_receipt.node if req.lock_receipt is not None else None
        extra_key, tokens = (node is not None and tree_cache.resolve(node)) or (None, ())
        for start in range(0, req.cache_protected_len, page_size):
            stop = start + page_size
            resident = pages.get((extra_key, tokens[:stop])) if stop <= len(tokens) else None
            slots = rows[row][start : min(stop, req.cache_protected_len)]
            for offset in range(page_size):
                expected = None if resident is None else resident.page * page_size + offset
                found = slots[offset] if offset < len(slots) else None
                if found is None or found != expected:
                    yield (
                        f"CHECK-3: row {row} of {_ROWS} has slot {found} at position"
                        f" {start + offset}, but the tree has {expected} on the path of its lock"
                    )
                    break


def _row_faults(rows: _Rows, running: list[Req]) -> Iterator[str]:
    """A line for each row without exactly one request (CHECK-4)."""
    named = Counter(req.req_pool_idx for req in running if req.req_pool_idx is not None)
    for row in sorted(rows.keys() | named.keys()):
        if row not in rows:
            yield f"CHECK-4: row {row} of {_ROWS} is named by a request, but is not live"
        elif named[row] != 1:
            yield f"CHECK-4: row {row} of {_ROWS} is live and belongs to {named[row]} requests"
