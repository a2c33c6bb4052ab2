"""Who owns every page? Spec: CHECK.

    every page of 1 .. P has exactly one owner: free, pending, tree, a request, reserved

A held page of a window pool is owned by whoever owns the full page whose pair it is. The first
storey looks at what there is: it works on `view()`, changes nothing, and serves any implementation.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Literal, TypeAlias, cast

from kvspec.errors import ContractError, MemoryLeakError
from kvspec.interfaces.memory_checker import SWATokenInfo
from kvspec.interfaces.prefix_cache import BasePrefixCache, CacheView, Req, WindowedCache
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import AllocatorView, BaseTokenToKVPoolAllocator
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator

__all__ = ["Level", "SWATokenInfo", "check_memory", "get_swa_token_info"]

Level: TypeAlias = Literal["off", "counts", "sets"]
_Rows: TypeAlias = dict[int, tuple[int, ...]]
_Owners: TypeAlias = dict[int, list[str]]

_PAGES = "token_to_kv_pool_allocator"
_ROWS = "req_to_token_pool"
_FULL_POOL = f"the full pool of {_PAGES}"
_WINDOW_POOL = f"the window pool of {_PAGES}"
_LISTS = ("free", "pending")


def check_memory(
    token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator,
    req_to_token_pool: ReqToTokenPool,
    tree_cache: BasePrefixCache,
    reqs: Iterable[Req] = (),
    reserved: Iterable[int] = (),
    level: Level = "sets",
) -> None:
    """Raise MemoryLeakError unless every page and row has one owner (CHECK-1 to CHECK-12).

    `reqs` are the running requests, `reserved` the slots held outside any row. `sets` names every
    fault on a line of its own, O(pool). `counts` compares sums, O(reqs), and O(slots of their rows)
    where there is a window pool. `off` looks at nothing.
    """
    if level == "off":
        return
    running = [req for req in reqs if req.req_pool_idx is not None]
    page_size = token_to_kv_pool_allocator.page_size
    kept = {slot // page_size for slot in reserved}
    if level == "counts":
        hybrid = hasattr(token_to_kv_pool_allocator, "size_swa")
        check = _check_hybrid_counts if hybrid else _check_counts
        check(token_to_kv_pool_allocator, req_to_token_pool, tree_cache, running, kept)
        _check_row_counts(req_to_token_pool, running)
        return
    if level != "sets":
        raise ContractError(f"CHECK-8: level is {level!r}, not one of off, counts, sets")
    books, tree = token_to_kv_pool_allocator.view(), tree_cache.view()
    rows = dict(req_to_token_pool.view().rows)
    owners = _owners(books, tree, rows, running, kept, page_size)
    page_count = token_to_kv_pool_allocator.size // page_size
    if books.swa is None:
        pages = [*_page_faults(_PAGES, owners, page_count)]
    else:
        size_swa = cast(SWATokenToKVPoolAllocator, token_to_kv_pool_allocator).size_swa
        pages = [
            *_page_faults(_FULL_POOL, owners, page_count),
            *_window_page_faults(books, owners, size_swa // page_size),
            *_tombstone_faults(tree, dict(books.pairs)),
            *_window_faults(tree_cache, rows, running, dict(books.pairs), page_size),
        ]
    faults = [
        *pages,
        *_protected_faults(tree_cache, tree, rows, running, page_size),
        *_row_faults(rows, running),
    ]
    if faults:
        raise MemoryLeakError("\n".join(faults))


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


def _check_counts(
    allocator: BaseTokenToKVPoolAllocator,
    rows: ReqToTokenPool,
    tree_cache: BasePrefixCache,
    running: list[Req],
    reserved: set[int],
) -> None:
    page_size = allocator.page_size
    max_total_num_tokens = allocator.size // page_size * page_size
    available_size = allocator.available_size()
    evictable_size = tree_cache.evictable_size()
    protected_size = tree_cache.protected_size()
    owned_pages = len(reserved) + sum(_owned_pages(req, rows, page_size) for req in running)
    owned_size = owned_pages * page_size
    if available_size + evictable_size + protected_size + owned_size != max_total_num_tokens:
        raise MemoryLeakError(
            "token_to_kv_pool_allocator memory leak detected! "
            f"{max_total_num_tokens=}, {available_size=}, {evictable_size=}, {protected_size=}, "
            f"{owned_size=}\n"
        )


def _check_hybrid_counts(
    allocator: BaseTokenToKVPoolAllocator,
    rows: ReqToTokenPool,
    tree_cache: BasePrefixCache,
    running: list[Req],
    reserved: set[int],
) -> None:
    """The same of both pools (CHECK-12)."""
    pools, cache = cast(SWATokenToKVPoolAllocator, allocator), cast(WindowedCache, tree_cache)
    info = get_swa_token_info(pools, cache)
    full_tokens_per_layer, swa_tokens_per_layer = _tokens_per_layer(pools)
    full_available_size, full_evictable_size = info.full_available_size, info.full_evictable_size
    swa_available_size, swa_evictable_size = info.swa_available_size, info.swa_evictable_size
    full_protected_size = cache.full_protected_size()
    swa_protected_size = cache.swa_protected_size()
    page_size = allocator.page_size
    owned = [page * page_size for page in reserved]
    for req in running:
        owned += _own_slots(req, rows, page_size)
    in_pool = [slot for slot in owned if 0 <= slot < allocator.size + page_size]
    windows = int(pools.translate_loc_from_full_to_swa(in_pool).count_nonzero())
    full_owned_size, swa_owned_size = len(owned) * page_size, windows * page_size
    if (
        info.full_num_used != full_protected_size + full_owned_size
        or info.swa_num_used != swa_protected_size + swa_owned_size
    ):
        raise MemoryLeakError(
            "token_to_kv_pool_allocator memory leak detected! "
            f"{full_tokens_per_layer=}, {full_available_size=}, {full_evictable_size=}, "
            f"{full_protected_size=}, {full_owned_size=}\n"
            f"{swa_tokens_per_layer=}, {swa_available_size=}, {swa_evictable_size=}, "
            f"{swa_protected_size=}, {swa_owned_size=}\n"
        )


def _check_row_counts(rows: ReqToTokenPool, running: list[Req]) -> None:
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


def _own_slots(req: Req, rows: ReqToTokenPool, page_size: int) -> list[int]:
    """A slot of each page of the row from the protected length on. O(slots of the row)."""
    if not _owned_pages(req, rows, page_size):
        return []
    assert req.req_pool_idx is not None
    own: list[int] = rows.row(req.req_pool_idx)[req.cache_protected_len :: page_size].tolist()
    return own


def _owners(
    books: AllocatorView,
    tree: CacheView,
    rows: _Rows,
    running: list[Req],
    reserved: set[int],
    page_size: int,
) -> _Owners:
    """The owners of each page that has any: one entry for each place that names it."""
    owners = _listed(books)
    for resident in tree.pages.values():
        owners[resident.page].append("tree")
    for row, req in _live(rows, running):
        places = enumerate(rows[row][req.cache_protected_len :])
        named = groupby((place // page_size, slot // page_size) for place, slot in places)
        for (_, page), _ in named:
            owners[page].append(f"the request in row {row}")
    for page in reserved:
        owners[page].append("reserved")
    return owners


def _listed(books: AllocatorView) -> _Owners:
    """The pages that are in a list of the allocator, once for each time."""
    owners: _Owners = defaultdict(list)
    for name, pages in zip(_LISTS, ((*books.free, *books.release), books.pending), strict=True):
        for page in pages:
            owners[page].append(name)
    return owners


def _live(rows: _Rows, running: list[Req]) -> Iterator[tuple[int, Req]]:
    for req in running:
        if req.req_pool_idx is not None and req.req_pool_idx in rows:
            yield req.req_pool_idx, req


def _page_faults(
    pool: str, owners: _Owners, page_count: int, clauses: tuple[str, str] = ("CHECK-1", "CHECK-2")
) -> Iterator[str]:
    """A line for each page without exactly one owner: a deficit or a surplus."""
    deficit, surplus = clauses
    for page in sorted({*range(1, page_count + 1), *owners}):
        named = owners.get(page, [])
        if not 1 <= page <= page_count:
            named = ["nobody, being outside the pool", *named]
        if not named:
            yield f"{deficit}: page {page} of {pool} is held and has no owner"
        elif len(named) > 1:
            yield f"{surplus}: page {page} of {pool} has {len(named)} owners: {'; '.join(named)}"


def _window_page_faults(books: AllocatorView, owners: _Owners, page_count: int) -> Iterator[str]:
    """The same of the window pool: a pair is owned with its full page (CHECK-9).

    One that is in no list, and that only full pages in a list claim, has no owner.
    """
    assert books.swa is not None
    claims: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for full, window in books.pairs:
        claims[window] += [(owner, full) for owner in owners.get(full, ())]
    windows = _listed(books.swa)
    for window, claimed in claims.items():
        if window in windows or any(owner not in _LISTS for owner, _ in claimed):
            windows[window] += [f"{owner} with page {full}" for owner, full in claimed]
    clauses = "CHECK-9, CHECK-1", "CHECK-9, CHECK-2"
    yield from _page_faults(_WINDOW_POOL, windows, page_count, clauses)


def _tombstone_faults(tree: CacheView, pairs: Mapping[int, int]) -> Iterator[str]:
    """A line for each page that the tree takes for what it is not (CHECK-10)."""
    for page, tombstone in sorted((page.page, page.tombstone) for page in tree.pages.values()):
        if tombstone and page in pairs:
            yield (
                f"CHECK-10: page {page} of {_FULL_POOL} is a tombstone of the tree,"
                f" but has page {pairs[page]} of the window pool"
            )
        elif not tombstone and page not in pairs:
            yield f"CHECK-10: page {page} of {_FULL_POOL} is live in the tree, but has no pair"


def _window_faults(
    tree_cache: BasePrefixCache,
    rows: _Rows,
    running: list[Req],
    pairs: Mapping[int, int],
    page_size: int,
) -> Iterator[str]:
    """A line for each page without a pair that the next token of a row still reads (CHECK-11)."""
    window: int | None = getattr(tree_cache, "sliding_window_size", None)
    if window is None:
        return
    for row, _ in _live(rows, running):
        start = max(len(rows[row]) - window + 1, 0)
        named = [(slot // page_size, place) for place, slot in enumerate(rows[row])][start:]
        for page, places in groupby(named, key=itemgetter(0)):
            if page not in pairs:
                yield (
                    f"CHECK-11: row {row} of {_ROWS} has page {page} at position"
                    f" {next(places)[1]}, in the window of the next token, but it has no pair"
                )


def _protected_faults(
    tree_cache: BasePrefixCache,
    tree: CacheView,
    rows: _Rows,
    running: list[Req],
    page_size: int,
) -> Iterator[str]:
    """A line for each page of a protected row that is not the tree's (CHECK-3)."""
    for row, req in _live(rows, running):
        node = req.lock_receipt.node if req.lock_receipt is not None else None
        extra_key, tokens = (node is not None and tree_cache.resolve(node)) or (None, ())
        for start in range(0, req.cache_protected_len, page_size):
            stop = start + page_size
            resident = tree.pages.get((extra_key, tokens[:stop])) if stop <= len(tokens) else None
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
