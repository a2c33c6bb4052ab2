"""The radix cache: the trie of pages, and what is evicted from it. Spec: RADIX."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from kvspec.errors import ContractError
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.oracle.trie import Claim, NodeHandle, Page, Root, TrieCache

__all__ = ["POLICIES", "Claim", "NodeHandle", "Page", "RadixCache", "Root"]

POLICIES: Mapping[str, Callable[[Page], tuple[int, ...]]] = {
    "lru": lambda page: (page.last,),
    "lfu": lambda page: (page.hits, page.last),
    "fifo": lambda page: (page.born,),
    "mru": lambda page: (-page.last,),
    "filo": lambda page: (-page.born,),
    "slru": lambda page: (page.hits >= 1, page.last),
    "priority": lambda page: (page.priority, page.last),
}
"""The leaf with the smallest key goes first; ties go to the one born first (RADIX-13)."""


class RadixCache(TrieCache):
    """A prefix cache that shares (RADIX-1 to RADIX-18, CACHE-1 to CACHE-18)."""

    room = "radix_cache"

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
        disable: bool = False,
        enable_kv_cache_events: bool = False,
        eviction_policy: str = "lru",
        eviction_granularity: str = "page",
    ) -> None:
        super().__init__(req_to_token_pool, token_to_kv_pool_allocator, page_size, disable)
        if enable_kv_cache_events:
            raise ContractError(
                "CACHE-17: enable_kv_cache_events=True needs the room kv_events,"
                " which does not exist yet"
            )
        _one_of("eviction_policy", eviction_policy, POLICIES)
        _one_of("eviction_granularity", eviction_granularity, ("page", "node"))
        self.eviction_policy = eviction_policy
        self.eviction_granularity = eviction_granularity

    def evict(self, num_tokens: int) -> int:
        """Give back up to `num_tokens` evictable tokens (RADIX-8 to RADIX-13)."""
        if num_tokens < 0:
            raise ContractError(f"RADIX-12: evict({num_tokens})")
        with self._changing("evict"):
            runs = self._victims(num_tokens)
            victims = [page for run in runs for page in run]
            numbers = self._in_order([page.number for page in victims])
            self._give_back(numbers)
            self._drop(victims)
            self._leaves_evicted += len(runs)
            if numbers:
                self._report_pages("evict", numbers)
            return len(victims) * self.page_size

    def _victims(self, num_tokens: int) -> list[list[Page]]:
        """Runs that `evict` takes, in order, each from its leaf upward (RADIX-8, RADIX-9)."""
        extensions = Counter(page.before for page in self._tree.values())
        leaves = [page for page in self._tree.values() if self._is_free_leaf(page, extensions)]
        runs: list[list[Page]] = []
        while leaves and sum(map(len, runs)) * self.page_size < num_tokens:
            leaf = min(leaves, key=self._order)
            leaves.remove(leaf)
            runs.append(self._run(leaf))
            above = runs[-1][-1].before
            extensions[above] -= 1
            if isinstance(above, Page) and self._is_free_leaf(above, extensions):
                leaves.append(above)
        return runs

    def _is_free_leaf(self, page: Page, extensions: Mapping[Page | Root, int]) -> bool:
        return not extensions[page] and page not in self._locks

    def _order(self, page: Page) -> tuple[int, ...]:
        """The smallest is evicted first (RADIX-13)."""
        return (*POLICIES[self.eviction_policy](page), page.born)

    def _run(self, leaf: Page) -> list[Page]:
        """A leaf and, at node granularity, its ancestors back to the last cut (RADIX-9)."""
        run = [leaf]
        while self.eviction_granularity == "node":
            above = run[-1].before
            if isinstance(above, Root) or above.cut:
                break
            run.append(above)
        return run


def _one_of(option: str, given: str, allowed: Iterable[str]) -> None:
    if given not in allowed:
        raise ContractError(f"RADIX-14: {option} is {given!r}, not one of {', '.join(allowed)}")
