"""Whether three objects can be looked at, and belong together. Spec: INSTR-5."""

from collections.abc import Iterable
from typing import Any

from kvspec.errors import ContractError
from kvspec.instrumentation.calls import Objects

__all__ = ["refuse_unreadable"]

_ALLOCATOR = ("alloc", "free", "size", "page_size")
_LISTS = ("free_pages", "release_pages", "free_group", "is_not_in_free_group")
_WINDOWS = ("swa_attn_allocator", "full_to_swa_index_mapping", "size_swa")
_POOL = ("alloc", "free", "write", "req_to_token")
_CACHE = ("cache_finished_req", "cache_unfinished_req")
_NODE = ("children", "key", "value", "parent")
_HOST = ("size", "page_size", "free_slots")


def refuse_unreadable(objects: Objects) -> None:
    """Refuse objects that lack what is needed, or are of different systems (INSTR-5)."""
    cache, allocator, pool, host = objects
    _require("the allocator", allocator, (*_ALLOCATOR, *_read_through(allocator)))
    _require("the request pool", pool, (*_POOL, *(() if _views(pool) else ("free_slots",))))
    _require("the cache", cache, _CACHE)
    if not _views(cache) and getattr(cache, "disable", True) is False:
        _require("a cache that shares", cache, ("root_node",))
    if hasattr(cache, "root_node") and not _views(cache):
        _require("the root of the cache", cache.root_node, _NODE)
    if host is not None:
        _require("the next tier", host, _HOST)
    _require_one_system(cache, allocator, pool)


def _views(given: Any) -> bool:
    return hasattr(given, "view")


def _read_through(allocator: Any) -> tuple[str, ...]:
    if _views(allocator):
        return ()
    return _WINDOWS if hasattr(allocator, "full_attn_allocator") else _LISTS


def _require(what: str, given: Any, names: Iterable[str]) -> None:
    lacking = [name for name in names if not hasattr(given, name)]
    if lacking:
        kind = type(given).__name__
        raise ContractError(f"INSTR-5: {what}, a {kind}, has no {', '.join(lacking)}")


def _require_one_system(cache: Any, allocator: Any, pool: Any) -> None:
    theirs = getattr(cache, "token_to_kv_pool_allocator", allocator)
    if theirs is not allocator:
        raise ContractError("INSTR-5: the cache has another allocator")
    if getattr(cache, "req_to_token_pool", pool) is not pool:
        raise ContractError("INSTR-5: the cache has another request pool")
    ours, page_size = int(getattr(cache, "page_size", allocator.page_size)), allocator.page_size
    if ours != page_size:
        raise ContractError(
            f"INSTR-5: page_size of the cache is {ours}, but the allocator's is {page_size}"
        )
