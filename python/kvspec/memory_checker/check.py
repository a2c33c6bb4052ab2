"""One call for all levels: what to look at, and what to raise. Spec: CHECK."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from kvspec.errors import ContractError, MemoryLeakError
from kvspec.interfaces.memory_checker import Claims, RunningReq, SystemView
from kvspec.interfaces.prefix_cache import BasePrefixCache, CacheView, Path, Req
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.memory_checker.counts import check_counts, written_length
from kvspec.memory_checker.report import Report
from kvspec.memory_checker.sets import find_faults

__all__ = ["Level", "check_memory", "raise_faults"]

Level: TypeAlias = Literal["off", "counts", "sets", "ledger"]

_WITH_HISTORY = 20
"""Reports whose history is in the text of an error."""


def check_memory(
    token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator,
    req_to_token_pool: ReqToTokenPool,
    tree_cache: BasePrefixCache,
    reqs: Iterable[Req] = (),
    reserved: Iterable[int] = (),
    level: Level = "sets",
) -> None:
    """Raise MemoryLeakError unless every page and row has one owner (CHECK-1 to CHECK-21).

    `reqs` are the running requests, `reserved` the slots held outside any row. `sets` names every
    fault with a report, O(pool), and `ledger` adds who lost it: the instrument of the allocator is
    asked. `counts` compares sums, O(reqs), and O(slots of their rows) where there is a window pool.
    `off` looks at nothing.
    """
    if level == "counts":
        check_counts(token_to_kv_pool_allocator, req_to_token_pool, tree_cache, reqs, reserved)
    elif level == "sets":
        view = _system(token_to_kv_pool_allocator, req_to_token_pool, tree_cache, reqs)
        claims = _claims(tree_cache, view, reqs, reserved)
        raise_faults(find_faults(view, claims))
    elif level == "ledger":
        instrument = getattr(token_to_kv_pool_allocator, "_kvspec_instrument", None)
        if instrument is None or instrument.ledger is None:
            raise ContractError(
                "CHECK-8: level ledger needs kvspec.instrument(..., level='ledger')"
            )
        instrument.check(reqs, reserved)
    elif level != "off":
        raise ContractError(f"CHECK-8: level is {level!r}, not one of off, counts, sets, ledger")


def raise_faults(reports: list[Report]) -> None:
    """Raise MemoryLeakError with these reports, and a line for each; nothing of none.

    The text has the histories of the first 20.
    """
    if reports:
        brief = [replace(report, history=()) for report in reports[_WITH_HISTORY:]]
        text = "\n".join(map(str, [*reports[:_WITH_HISTORY], *brief]))
        raise MemoryLeakError(text, reports)


def _system(allocator: Any, rows: Any, tree_cache: Any, reqs: Iterable[Req]) -> SystemView:
    """What three objects hold; of one without `view()` its attributes say it (INSTR-7)."""
    if not all(hasattr(each, "view") for each in (allocator, rows, tree_cache)):
        from kvspec.instrumentation.views import system_view  # above this room, and seldom needed

        lengths = {
            req.req_pool_idx: written_length(req) for req in reqs if req.req_pool_idx is not None
        }
        return system_view(tree_cache, allocator, rows, lengths=lengths)[0]
    books, page_size = allocator.view(), allocator.page_size
    windows = books.swa is not None
    return SystemView(
        allocator=books,
        rows=rows.view(),
        tree=tree_cache.view(),
        page_size=page_size,
        page_count=allocator.size // page_size,
        row_count=rows.req_to_token.shape[0],
        swa_page_count=allocator.size_swa // page_size if windows else None,
        sliding_window_size=getattr(tree_cache, "sliding_window_size", None) if windows else None,
    )


def _claims(
    tree_cache: Any, view: SystemView, reqs: Iterable[Req], reserved: Iterable[int]
) -> Claims:
    """Who holds pages and locks, as the requests and the cache's own receipts say it; nobody else's
    cache knows its receipts.
    """
    if not hasattr(tree_cache, "resolve"):
        from kvspec.instrumentation.reading import given_claims  # above this room, seldom needed

        return given_claims(tree_cache, view, reqs, reserved)
    running = tuple(
        RunningReq(req.req_pool_idx, req.cache_protected_len, _locked_path(tree_cache, req))
        for req in reqs
        if req.req_pool_idx is not None
    )
    return Claims(
        running=running,
        reserved=frozenset(slot // view.page_size for slot in reserved),
        open_locks=_holders(view.tree, running),
    )


def _locked_path(tree_cache: Any, req: Req) -> Path:
    """What the lock of a request holds; the root, if it has none or its node is gone."""
    receipt = req.lock_receipt
    path: Path | None = None if receipt is None else tree_cache.resolve(receipt.node)
    return path or (None, ())


def _holders(tree: CacheView, running: Iterable[RunningReq]) -> Mapping[Path, tuple[str, ...]]:
    """Who holds the receipts that the cache has open: a request, if one has locked that path."""
    locking: dict[Path, list[str]] = {}
    for req in running:
        if req.path is not None:
            locking.setdefault(req.path, []).append(f"the request in row {req.row}")
    return {
        path: tuple((locking.get(path, []) + ["an open receipt"] * count)[:count])
        for path, count in Counter(tree.receipts).items()
    }
