"""The radix cache of models with sliding-window layers. Spec: SWARADIX.

A resident page is live while the allocator has a pair for it, else a tombstone; no leaf is one. A
match ends in a whole window of live pages, or has no tombstone.

    k            ceil(W / page_size): the pages of a window
    window lock  what an open receipt has on the last k pages of its path
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from kvspec.errors import ContractError
from kvspec.interfaces import prefix_cache as interface
from kvspec.interfaces.prefix_cache import EvictResult, InsertRanges
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.oracle.boundary import tensor
from kvspec.oracle.prefix_cache import WindowedCache
from kvspec.oracle.trie import Claim, Page, Root, TrieCache, ranges

__all__ = ["Eviction", "SWARadixCache"]


class Eviction:
    """What an eviction takes, page by page: nothing has happened yet."""

    def __init__(self, pages: Iterable[Page], tombstones: Iterable[Page]) -> None:
        self.left = dict.fromkeys(pages)
        self.tombstones = set(tombstones)
        self.extensions = Counter(page.before for page in self.left)
        self.gone: list[Page] = []
        """Pages that leave both pools, in order."""
        self.made: list[Page] = []
        """Pages that become tombstones, in order, also those that leave after that."""
        self.leaf_count = self.window_count = 0

    def take_leaf(self, leaf: Page) -> None:
        """Take a live leaf, and the tombstones that this makes leaves (SWARADIX-12)."""
        self.leaf_count += 1
        self.window_count += 1
        self._leave(leaf)
        above = leaf.before
        while isinstance(above, Page) and above in self.tombstones and not self.extensions[above]:
            self._leave(above)
            above = above.before

    def take_window(self, page: Page) -> None:
        """Take the pair of a live page; a leaf leaves as a whole (SWARADIX-13)."""
        if not self.extensions[page]:
            self.take_leaf(page)
            return
        self.window_count += 1
        self.tombstones.add(page)
        self.made.append(page)

    def _leave(self, page: Page) -> None:
        self.gone.append(page)
        del self.left[page]
        self.extensions[page.before] -= 1


class SWARadixCache(TrieCache, WindowedCache):
    """A prefix cache that shares, over two pools (SWARADIX-1 to SWARADIX-21)."""

    room = "swa_radix_cache"

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        sliding_window_size: int,
        page_size: int,
        disable: bool = False,
    ) -> None:
        super().__init__(req_to_token_pool, token_to_kv_pool_allocator, page_size, disable)
        if sliding_window_size < 1:
            raise ContractError(f"SWARADIX-19: sliding_window_size is {sliding_window_size}")
        self._require_window_pool("SWARADIX-19")
        self.sliding_window_size = sliding_window_size
        self._window_lock_count = 0

    def _window_of(self, path: Sequence[Page]) -> Sequence[Page]:
        """The last k pages of a path, or all if it has fewer."""
        return path[-self.sliding_window_size // self.page_size :]  # rounded down: -k

    # Match and insert

    def _usable(self, path: list[Page]) -> list[Page]:
        """The longest prefix that ends in a live window, or has no tombstone (SWARADIX-1)."""
        prefixes = (path[:length] for length in range(len(path), -1, -1))
        return next(p for p in prefixes if self._tombstones.isdisjoint(self._window_of(p)))

    def _claim(self, frame: bytes, tokens: Sequence[int], slots: Sequence[int]) -> Claim:
        """The claim of the reach: up to the last page that is live after it (SWARADIX-3)."""
        claim = super()._claim(frame, tokens, slots)
        windows = self._have_windows(slots)
        live = windows[: len(claim.pages) * self.page_size : self.page_size]
        for index, page in enumerate(claim.resident):
            live[index] |= page not in self._tombstones
        reach = max((index + 1 for index, is_live in enumerate(live) if is_live), default=0)
        pages, numbers = claim.pages[:reach], claim.numbers[:reach]
        return Claim(claim.root, pages, numbers, claim.resident[:reach], windows)

    def _revivals(self, claim: Claim) -> list[tuple[int, int]]:
        """Pages of the tree that are revived, each with the caller's (SWARADIX-5)."""
        windows = claim.windows[:: self.page_size]
        return [
            (page.number, number)
            for page, number, window in zip(claim.resident, claim.numbers, windows, strict=False)
            if window and page in self._tombstones
        ]

    @contextmanager
    def _revived(self, claim: Claim) -> Iterator[list[int]]:
        """Move the pairs that revive, and move them back if what is inside fails (CACHE-6)."""
        moves = self._revivals(claim)
        targets, sources = [target for target, _ in moves], [source for _, source in moves]
        self._move(targets, sources)
        try:
            yield targets
        except BaseException:
            self._move(sources, targets)
            raise

    def _move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        if targets and self._window_pool is not None:
            firsts = [tensor([page * self.page_size for page in p]) for p in (targets, sources)]
            self._window_pool.move_swa(*firsts)

    def _adopt(self, claim: Claim, priority: int) -> Page | Root:
        """Where the caller had a pair the page is live, and where not a new one is a tombstone
        (SWARADIX-4, SWARADIX-5).
        """
        node = super()._adopt(claim, priority)
        known = len(claim.resident)
        for index, page in enumerate(self._path(node)):
            if claim.windows[index * self.page_size]:
                self._tombstones.discard(page)
            elif index >= known:
                self._tombstones.add(page)
        return node

    def _window_ranges(self, claim: Claim, kinds: Sequence[str]) -> InsertRanges:
        """What becomes of the caller's window slots (SWARADIX-6)."""
        found = [kind if window else "" for kind, window in zip(kinds, claim.windows, strict=True)]
        revived = {number for _, number in self._revivals(claim)}
        for index, number in enumerate(claim.numbers):
            if number in revived:
                start = index * self.page_size
                found[start : start + self.page_size] = ["adopted"] * self.page_size
        return InsertRanges(**ranges(found))

    # Locks

    def inc_lock_ref(self, node: interface.NodeHandle) -> interface.LockReceipt:
        """Lock a path that a match would give as a whole (CACHE-11, SWARADIX-11)."""
        if not self.disable:
            self._guard("inc_lock_ref")
            path = self._path(self._live(node))
            if self._usable(path) != path:
                raise ContractError("SWARADIX-11: the window of the handle's path is not live")
        return super().inc_lock_ref(node)

    def _window_lock(self, path: Sequence[Page]) -> int | None:
        """A window lock on the last k pages, tombstones included (SWARADIX-9)."""
        window = self._window_of(path)
        for page in window:
            self._window_locks[page] = self._window_locks.get(page, 0) + 1
        self._window_lock_count += 1
        return self._window_lock_count if len(window) < len(path) else None

    def _unlock(self, receipt: interface.LockReceipt) -> list[Page]:
        for page in self._window_of(self._path(self._open[receipt])):
            self._window_locks[page] -= 1
            if not self._window_locks[page]:
                del self._window_locks[page]
        return super()._unlock(receipt)

    # Eviction

    def evict(self, full_num_tokens: int, swa_num_tokens: int = 0) -> EvictResult:
        """Make room in both pools (SWARADIX-12 to SWARADIX-17)."""
        if full_num_tokens < 0 or swa_num_tokens < 0:
            raise ContractError(f"SWARADIX-17: evict({full_num_tokens}, {swa_num_tokens})")
        with self._changing("evict"):
            eviction = self._victims(full_num_tokens, swa_num_tokens)
            made = [page for page in eviction.made if page in eviction.left]
            gone = self._in_order([page.number for page in eviction.gone])
            windows = self._in_order([page.number for page in made])
            self._give_back(gone, windows)
            self._tombstones.update(made)
            self._drop(eviction.gone)
            self._leaves_evicted += eviction.leaf_count
            if gone or windows:
                self._report_pages("evict", gone + windows)
            size = self.page_size
            return EvictResult(len(gone) * size, eviction.window_count * size)

    def _victims(self, full_num_tokens: int, swa_num_tokens: int) -> Eviction:
        """Leaves until enough full tokens go, then pairs until enough window tokens do."""
        eviction, size = Eviction(self._tree.values(), self._tombstones), self.page_size
        while len(eviction.gone) * size < full_num_tokens:
            leaves = [page for page in eviction.left if not eviction.extensions[page]]
            leaves = [page for page in leaves if page not in self._locks]
            if not leaves:
                break
            eviction.take_leaf(min(leaves, key=lambda page: page.last))
        while eviction.window_count * size < swa_num_tokens:
            live = [page for page in eviction.left if page not in eviction.tombstones]
            live = [page for page in live if page not in self._window_locks]
            if not live:
                break
            eviction.take_window(min(live, key=self._window_order))
        return eviction

    def _window_order(self, page: Page) -> tuple[int, int]:
        """The smallest goes first: walked longest ago, then nearest to the root (SWARADIX-14)."""
        return page.last, len(self._path(page))

    def _give_back(self, pages: Sequence[int], windows: Sequence[int] = ()) -> None:
        """Give pages back, and the pairs of others, in one `free` (CACHE-6, SWARADIX-16)."""
        if windows and self._window_pool is not None:
            both = (tensor(self._slots_in(each)) for each in (pages, windows))
            self._window_pool.free(*both)
        else:
            super()._give_back(pages)

    def _first_read(self, prelen: int, chunk_size: int | None, window_size: int | None) -> int:
        if chunk_size is None and window_size is None:
            window_size = self.sliding_window_size
        read = super()._first_read(prelen, chunk_size, window_size)
        window = -(-self.sliding_window_size // self.page_size) * self.page_size
        return min(read, max(prelen - prelen % self.page_size - window, 0))

    # Reading

    def swa_evictable_size(self) -> int:
        """Live tokens without a window lock (SWARADIX-10)."""
        live_count = len(self._tree) - len(self._tombstones)
        return live_count * self.page_size - self.swa_protected_size()

    def swa_protected_size(self) -> int:
        """Live tokens with a window lock (SWARADIX-10)."""
        return sum(page not in self._tombstones for page in self._window_locks) * self.page_size

    def check(self) -> None:
        """Recompute what the clauses demand from the pages and the receipts (SWARADIX-21)."""
        super().check()
        extended = {page.before for page in self._tree.values()}
        resident = list(self._tree.values())
        for page in resident:
            if page in self._tombstones and page not in extended:
                raise ContractError(f"SWARADIX-7: page {page.number} is a tombstone and a leaf")
        firsts = [page.number * self.page_size for page in resident]
        for page, paired in zip(resident, self._have_windows(firsts), strict=True):
            if self._window_pool is not None and paired == (page in self._tombstones):
                what = "a tombstone and has a pair" if paired else "live and has no pair"
                raise ContractError(f"SWARADIX-8: page {page.number} is {what}")
        paths = map(self._path, self._open.values())
        if Counter(page for path in paths for page in self._window_of(path)) != self._window_locks:
            raise ContractError("SWARADIX-9: the window locks are not those of the open receipts")

    def _check_sizes(self) -> None:
        """The sizes of both pools (SWARADIX-10)."""
        size, pages = self.page_size, self._tree.values()
        locked = sum(page in self._locks for page in pages) * size
        live = [page for page in pages if page not in self._tombstones]
        guarded = sum(page in self._window_locks for page in live) * size
        found = (
            *(self.full_evictable_size(), self.full_protected_size()),
            *(self.swa_evictable_size(), self.swa_protected_size()),
        )
        expected = (len(pages) * size - locked, locked, len(live) * size - guarded, guarded)
        if found != expected:
            raise ContractError(f"SWARADIX-10: the sizes are {found}, not {expected}")
