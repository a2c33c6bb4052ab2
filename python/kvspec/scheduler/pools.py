"""Which cache stands over a worker's pools. Spec: SCHED-1, SCHED-2."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import cast

from kvspec.errors import ContractError
from kvspec.implementations import implementation
from kvspec.interfaces.prefix_cache import BasePrefixCache
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator
from kvspec.scheduler.server_args import ServerArgs

__all__ = ["has_windows", "make_cache", "refuse_misfits", "shares", "usable_size"]


def has_windows(allocator: BaseTokenToKVPoolAllocator) -> bool:
    """Whether it has a window pool."""
    return hasattr(allocator, "swa_available_size")


def usable_size(allocator: BaseTokenToKVPoolAllocator) -> int:
    """Slots in whole pages; of the full pool, if there are two."""
    return allocator.size // allocator.page_size * allocator.page_size


def shares(server_args: ServerArgs) -> bool:
    """Whether the cache is a tree, by the choice of the source document (SCHED-1)."""
    return server_args.chunked_prefill_size is None or not server_args.disable_radix_cache


def refuse_misfits(
    server_args: ServerArgs,
    rows: ReqToTokenPool,
    allocator: BaseTokenToKVPoolAllocator,
    window: int | None,
) -> None:
    """Raise ContractError for pools that the options do not fit, or that are in use (SCHED-2)."""
    if server_args.max_running_requests > len(rows.req_to_token):
        raise ContractError(
            f"SCHED-2: max_running_requests {server_args.max_running_requests}, but the worker"
            f" has {len(rows.req_to_token)} rows"
        )
    _refuse_used(rows, allocator)
    if server_args.experimental_cpp_radix_tree and server_args.implementation == "oracle":
        raise ContractError("SCHED-2: experimental_cpp_radix_tree=True, but the oracle has none")
    if has_windows(allocator):
        size = allocator.page_size
        pages = cast(SWATokenToKVPoolAllocator, allocator).size_swa // size
        new = server_args.speculative_num_draft_tokens + 1
        if window is None or pages < -(-window // size) + 1 + -(-new // size):
            raise ContractError(
                f"SCHED-2: a window pool of {pages} pages of {size} is smaller than what one"
                f" request needs: a window of {window} tokens, a page begun, and {new} new tokens"
            )


def _refuse_used(rows: ReqToTokenPool, allocator: BaseTokenToKVPoolAllocator) -> None:
    used_rows = len(rows.req_to_token) - rows.available_size()
    if has_windows(allocator):
        used = (
            usable_size(allocator)
            - cast(SWATokenToKVPoolAllocator, allocator).full_available_size()
        )
    else:
        used = usable_size(allocator) - allocator.available_size()
    if used_rows or used:
        raise ContractError(
            f"SCHED-2: {used_rows} rows and {used} slots of the worker are in use already"
        )


def make_cache(
    server_args: ServerArgs,
    rows: ReqToTokenPool,
    allocator: BaseTokenToKVPoolAllocator,
    window: int | None,
) -> BasePrefixCache:
    """The cache that the source document chooses (SCHED-1)."""
    impl = implementation(server_args.implementation)
    over = {
        "req_to_token_pool": rows,
        "token_to_kv_pool_allocator": allocator,
        "page_size": allocator.page_size,
    }
    is_hybrid, disable = has_windows(allocator), server_args.disable_radix_cache
    if not shares(server_args):
        return _made(impl.SWAChunkCache if is_hybrid else impl.ChunkCache, **over)
    if is_hybrid:
        return _made(impl.SWARadixCache, **over, sliding_window_size=window, disable=disable)
    if server_args.experimental_cpp_radix_tree:
        return _cpp_tree(impl, over, disable)
    return _made(
        impl.RadixCache,
        **over,
        disable=disable,
        enable_kv_cache_events=False,
        eviction_policy=server_args.eviction_policy,
        eviction_granularity=server_args.eviction_granularity,
    )


def _made(cls: Callable[..., BasePrefixCache], /, **options: object) -> BasePrefixCache:
    return cls(**options)


def _cpp_tree(impl: ModuleType, over: Mapping[str, object], disable: bool) -> BasePrefixCache:
    """The native tree under the source's name, with the source's options."""
    return _made(
        impl.RadixCacheCpp,
        disable=disable,
        use_hicache=False,
        req_to_token_pool=over["req_to_token_pool"],
        token_to_kv_pool=over["token_to_kv_pool_allocator"],
        tp_cache_group=None,
        page_size=over["page_size"],
        hicache_ratio=2.0,
        hicache_size=0,
        hicache_write_policy="write_through",
        enable_kv_cache_events=False,
    )
