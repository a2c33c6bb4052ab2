"""The small engine of the conformance suite, sized as a sequence needs it."""

from collections.abc import Iterable
from typing import Any

import torch

from kvspec.conformance.prefix_cache.system import Request, System, numbers, refused

__all__ = ["Engine", "Request", "numbers", "refused"]


class Engine(System):
    """Pools of `page_count` pages and `row_count` rows, and a cache over them; with
    `swa_page_count` a window pool of so many too.
    """

    def __init__(
        self,
        impl: Any,
        *,
        page_size: int = 1,
        page_count: int = 16,
        row_count: int = 4,
        width: int = 64,
        cache: str = "RadixCache",
        swa_page_count: int | None = None,
        **options: Any,
    ) -> None:
        memory = {"dtype": torch.float16, "device": "cpu", "kvcache": None, "need_sort": False}
        size = page_count * page_size
        if swa_page_count is not None:
            sizes = {"size": size, "size_swa": swa_page_count * page_size, "page_size": page_size}
            allocator = impl.SWATokenToKVPoolAllocator(**sizes, **memory)
        elif page_size == 1:
            allocator = impl.TokenToKVPoolAllocator(size=size, **memory)
        else:
            allocator = impl.PagedTokenToKVPoolAllocator(size=size, page_size=page_size, **memory)
        rows = {"size": row_count, "max_context_len": width, "device": "cpu"}
        pool = impl.ReqToTokenPool(**rows, enable_memory_saver=False)
        pools = {"req_to_token_pool": pool, "token_to_kv_pool_allocator": allocator}
        made = getattr(impl, cache)(**pools, page_size=page_size, **options)
        super().__init__(allocator, pool, made, page_size)
        self.impl = impl

    def keep(self, slots: Iterable[int]) -> list[int]:
        """Take the pages of these slots, and no others, into the hand of the test."""
        kept = numbers(slots)
        self.reserved = {slot // self.page_size for slot in kept}
        return kept

    def sample(self, req: Request, *output: int) -> None:
        """Finish after these tokens, of which the last has no KV."""
        req.output_ids += output
        assert self.compute(req, len(req.origin_input_ids) + max(len(req.output_ids) - 1, 0))
        self.finish(req)

    def serve(self, tokens: list[int], extra_key: Any = None) -> int:
        """A whole request; how many of its tokens were cached already."""
        req = self.admit(tokens, extra_key)
        cached = req.cache_protected_len
        self.sample(req, 0)
        return cached

    def cached(self, tokens: list[int], extra_key: Any = None) -> int:
        """How many of the tokens the cache holds; nothing changes by asking."""
        return len(self.held_along(tokens, extra_key))

    def settle(self) -> None:
        """Each part is sound, and every page and row has one owner."""
        self.cache.check()
        super().settle()
