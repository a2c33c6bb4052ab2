"""Prefix caches with one clause broken each."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.prefix_cache import PrefixCacheConformance
from kvspec.errors import ContractError
from kvspec.interfaces.prefix_cache import InsertResult, LockReceipt, MatchResult, Path
from kvspec.oracle import RadixCache, SWAChunkCache, SWARadixCache
from kvspec.oracle.boundary import numbers, tensor
from kvspec.oracle.prefix_cache import RequestRow, WindowedCache
from kvspec.oracle.radix_cache import Claim, NodeHandle, Page, Root

registry = Registry(PrefixCacheConformance, oracle)


# What a request owns


@registry.mutant(
    *("CACHE-1", "CACHE-2", "CACHE-3", "CACHE-5"), reports=("MINI-142", "DYN-1785", "SEED-2")
)
class LeavesFreedDuplicatesInTheRow(RadixCache):
    def _rewrite(self, req: Any, shared: Sequence[int]) -> None:
        """Forgotten."""


@registry.mutant("CACHE-1", "CACHE-2", "CACHE-5", reports=("SE-01",))
class StartsTheRewriteWhereTheLastChunkEnded(RadixCache):
    def _rewrite(self, req: Any, shared: Sequence[int]) -> None:
        protected, req.cache_protected_len = req.cache_protected_len, len(req.prefix_indices)
        if req.cache_protected_len < len(shared):
            super()._rewrite(req, shared)
        req.cache_protected_len = protected


@registry.mutant("CACHE-1", "CACHE-2", "CACHE-3", "CACHE-4", "CACHE-5")
class CallsOneMorePageProtected(RadixCache):
    def cache_unfinished_req(self, req: Any) -> None:
        super().cache_unfinished_req(req)
        if not self.disable and len(req.prefix_indices) % self.page_size:
            req.cache_protected_len += self.page_size

    def _check_lengths(self, req: Any, row: RequestRow) -> None:
        if not self.disable and req.cache_protected_len > len(row.tokens):
            req.cache_protected_len -= self.page_size
        super()._check_lengths(req, row)


@registry.mutant("CACHE-2", reports=("SE-19", "SE-04"))
class GivesAViewOfTheRow(RadixCache):
    def cache_unfinished_req(self, req: Any) -> None:
        super().cache_unfinished_req(req)
        assert self.req_to_token_pool is not None
        table = self.req_to_token_pool.req_to_token
        req.prefix_indices = table[req.req_pool_idx, : len(req.fill_ids)]


@registry.mutant("CACHE-2", "CACHE-4", "CACHE-5", "CACHE-6", reports=("SG-1858", "INV-034"))
class KeepsTheLockOfTheLastChunk(RadixCache):
    def cache_unfinished_req(self, req: Any) -> None:
        receipt = req.lock_receipt
        super().cache_unfinished_req(req)
        if receipt is not None and not self.disable:
            self._lock(self._live(receipt.node))


@registry.mutant("CACHE-3", "CACHE-1", "CACHE-2", "CACHE-5", reports=("SG-40681",))
class FreesWhatTheTreeHoldsAsADuplicate(RadixCache):
    def cache_unfinished_req(self, req: Any) -> None:
        before = req.cache_protected_len
        super().cache_unfinished_req(req)
        if not self.disable and before and req.cache_protected_len > before:
            self._give_back([int(req.prefix_indices[0]) // self.page_size])


@registry.mutant(
    *("CACHE-3", "CACHE-1", "CACHE-2", "CACHE-4", "CACHE-6", "CACHE-7"), reports=("JAX-971",)
)
class KeepsDuplicates(RadixCache):
    def _give_back(self, pages: Sequence[int]) -> None:
        if self._busy != "cache_unfinished_req":
            super()._give_back(pages)


@registry.mutant("CACHE-4", "CACHE-1", "CACHE-6", reports=("JAX-1147", "SG-31616", "SG-22862"))
class LeaksThePagesBeyondTheCommitted(RadixCache):
    def _private(self, req: Any, committed: list[int]) -> tuple[RequestRow, bytes]:
        row, frame = super()._private(req, committed)
        if self._busy == "cache_finished_req":
            row = row._replace(slots=row.slots[: len(row.tokens)])
        return row, frame


@registry.mutant("CACHE-4", "CACHE-1", "CACHE-5", "CACHE-6", reports=("SE-25",))
class LosesATokenWithoutOutput(RadixCache):
    def _private(self, req: Any, committed: list[int]) -> tuple[RequestRow, bytes]:
        row, frame = super()._private(req, committed)
        if self._busy == "cache_finished_req" and not req.output_ids:
            row = RequestRow(row.slots[:-1], row.tokens[:-1])
        return row, frame


@registry.mutant("CACHE-4", "CACHE-1", "CACHE-6", "CACHE-7", reports=("INV-084",))
class KeepsTheLockOfAFinishedRequest(RadixCache):
    def cache_finished_req(self, req: Any) -> None:
        receipt = req.lock_receipt
        super().cache_finished_req(req)
        if receipt is not None and not self.disable:
            self._lock(self._live(receipt.node))


@registry.mutant(
    *("CACHE-4", "CACHE-1", "CACHE-5", "CACHE-6", "CACHE-7", "CACHE-18"), reports=("SG-10871",)
)
class KeepsTheRowOfAFinishedRequest(RadixCache):
    def _dismiss(self, req: Any) -> None:
        pool, self.req_to_token_pool = self.req_to_token_pool, None
        super()._dismiss(req)
        self.req_to_token_pool = pool


@registry.mutant("CACHE-4", "CACHE-1", "CACHE-5", reports=("KT-2184",))
class ForgetsTheNamespaceOfARequest(RadixCache):
    def _claim(self, frame: bytes, tokens: Sequence[int], slots: Sequence[int]) -> Claim:
        return super()._claim(frame if self._busy == "insert" else b"", tokens, slots)


@registry.mutant("CACHE-5", "CACHE-1", reports=("SG-29471",))
class TakesAnyReceipt(RadixCache):
    def _check_lock(self, req: Any, row: RequestRow, frame: bytes) -> None:
        """Forgotten."""

    def _unlock(self, receipt: LockReceipt) -> list[Page]:
        return super()._unlock(receipt) if receipt in self._open else []


@registry.mutant("CACHE-5", "CACHE-1", "CACHE-4", reports=("SG-37494",))
class DemandsAReceiptOfEveryone(RadixCache):
    def _check_lock(self, req: Any, row: RequestRow, frame: bytes) -> None:
        if req.lock_receipt is None and req.last_node is None:
            raise ContractError("CACHE-5: there is no receipt")
        super()._check_lock(req, row, frame)


@registry.mutant("CACHE-5", reports=("JAX-982",))
class FinishesTwiceInSilence(RadixCache):
    def cache_finished_req(self, req: Any) -> None:
        if req.req_pool_idx is not None:
            super().cache_finished_req(req)


@registry.mutant("CACHE-5", reports=("SG-28754",))
class TakesMoreCommittedThanAllocated(RadixCache):
    def _row(self, req: Any, tokens: list[int]) -> RequestRow:
        row = super()._row(req, [])
        return row._replace(tokens=tokens[: len(row.slots)])


@registry.mutant("CACHE-5", reports=("SG-26972", "INV-013"))
class TakesARowThatIsOffThePages(RadixCache):
    def _pages_of(self, slots: Sequence[int]) -> list[int]:
        return list(dict.fromkeys(slot // self.page_size for slot in slots))

    def _claim(self, frame: bytes, tokens: Sequence[int], slots: Sequence[int]) -> Claim:
        if self._busy.startswith("cache_"):
            slots = self._slots_in(self._pages_of(slots))
        return super()._claim(frame, tokens, slots)


# Failure and re-entry


@registry.mutant("CACHE-6", "CACHE-3", "CACHE-4", "CACHE-15", "CACHE-18")
class GivesBackPageByPage(RadixCache):
    def _give_back(self, pages: Sequence[int]) -> None:
        for page in pages:
            super()._give_back([page])


@registry.mutant("CACHE-6", "CACHE-7")
class ForgetsBeforeItGivesBack(RadixCache):
    def evict(self, num_tokens: int) -> int:
        allocator, self.token_to_kv_pool_allocator = self.token_to_kv_pool_allocator, None
        before = list(self._held)
        try:
            evicted = super().evict(num_tokens)
        finally:
            self.token_to_kv_pool_allocator = allocator
        with self._changing("evict"):
            self._give_back([page for page in before if page not in self._held])
        return evicted


@registry.mutant("CACHE-7")
class LetsItselfBeMatchedFromInside(RadixCache):
    def _guard(self, name: str) -> None:
        if name != "match_prefix":
            super()._guard(name)


@registry.mutant("CACHE-6")
class LeavesThePairsThatItMoved(SWARadixCache):
    @contextmanager
    def _revived(self, claim: Claim) -> Iterator[list[int]]:
        moves = self._revivals(claim)
        self._move([target for target, _ in moves], [source for _, source in moves])
        yield [target for target, _ in moves]


# Insert


@registry.mutant("CACHE-8", "CACHE-9", reports=("MINI-142",))
class SaysOnlyHowLongThePrefixWas(RadixCache):
    def insert(self, key: Any, value: Any, **options: Any) -> InsertResult:
        result = super().insert(key, value, **options)
        prefix = [(0, result.prefix_len)] if result.prefix_len else []
        return result._replace(duplicate=prefix, shared=[])


@registry.mutant("CACHE-8", "CACHE-18")
class LosesTheTail(RadixCache):
    def insert(self, key: Any, value: Any, **options: Any) -> InsertResult:
        return super().insert(key, value, **options)._replace(tail=[])


@registry.mutant("CACHE-9", "CACHE-1", "CACHE-2", "CACHE-3", "CACHE-4", "CACHE-5", "CACHE-6")
class TakesTheSlotsOfTheLatest(RadixCache):
    def _adopt(self, claim: Claim, priority: int) -> Page | Root:
        if self._busy == "insert":
            for page, number in zip(claim.resident, claim.numbers, strict=False):
                del self._held[page.number]
                page.number, self._held[number] = number, page
        return super()._adopt(claim, priority)


@registry.mutant("CACHE-9", reports=("SE-04", "DYN-1785"))
class KeepsAViewOfTheCallersSlots(RadixCache):
    def insert(self, key: Any, value: Any, **options: Any) -> InsertResult:
        result = super().insert(key, value, **options)
        if isinstance(value, Tensor) and not self.disable:
            self.viewed = value, self._path(self._live(result.last_device_node))
        return result

    def match_prefix(self, key: Any, *, extra_key: Any = None, touch: bool = True) -> MatchResult:
        if hasattr(self, "viewed"):
            value, path = self.viewed
            for page, slot in zip(path, numbers(value, "")[:: self.page_size], strict=False):
                page.number = slot // self.page_size
        return super().match_prefix(key, extra_key=extra_key, touch=touch)


class TakesBadSlots(RadixCache):
    """Inserts as if nothing were there when the slots are refused for one reason."""

    reason: str

    def _claim(self, frame: bytes, tokens: Sequence[int], slots: Sequence[int]) -> Claim:
        try:
            return super()._claim(frame, tokens, slots)
        except ContractError as error:
            if self.reason not in str(error):
                raise
        return Claim(self._root(frame), [], [], [])

    def _refuse_held(self, clause: str, beyond: Iterable[int]) -> None:
        if clause != "CACHE-10":
            super()._refuse_held(clause, beyond)


@registry.mutant("CACHE-10", reports=("UCM-1053",))
class TakesTheSink(TakesBadSlots):
    reason = "is the sink"


@registry.mutant("CACHE-10", reports=("VL-42571",))
class TakesAPageTwice(TakesBadSlots):
    reason = "occurs twice"


@registry.mutant("CACHE-10", reports=("SG-28754",))
class TakesAPageThatItHoldsElsewhere(TakesBadSlots):
    reason = "at another place"


@registry.mutant("CACHE-10", reports=("SG-26972",))
class TakesSlotsThatAreNoPage(TakesBadSlots):
    reason = "not one page in order"


@registry.mutant("CACHE-10")
class CallsPagesOfTheTreeTail(SWARadixCache):
    """Who frees its tail then frees a page of the tree."""

    def _refuse_held(self, clause: str, beyond: Iterable[int]) -> None:
        if clause != "CACHE-10":
            super()._refuse_held(clause, beyond)


# Locks


@registry.mutant(
    *("CACHE-11", "CACHE-1", "CACHE-2", "CACHE-3", "CACHE-5", "CACHE-12"), reports=("INV-031",)
)
class LocksTheLastPageAlone(RadixCache):
    def _lock(self, node: Page | Root) -> Any:
        before = dict(self._locks)
        receipt = super()._lock(node)
        self._locks = before
        if isinstance(node, Page):
            self._locks[node] = before.get(node, 0) + 1
        return receipt

    def _unlock(self, receipt: LockReceipt) -> list[Page]:
        node = self._open.pop(receipt)
        if not isinstance(node, Page):
            return []
        self._locks[node] -= 1
        if not self._locks[node]:
            del self._locks[node]
        return [node]


@registry.mutant("CACHE-12", "CACHE-1", reports=("SG-27147", "SEED-7"))
class UnlocksWhatItWouldLockNow(RadixCache):
    def _unlock(self, receipt: LockReceipt) -> list[Page]:
        """A page that was split since is passed over, as if the lock had not covered it."""
        below = [page.before for page in self._tree.values()]
        unlocked = super()._unlock(receipt)
        for page in unlocked:
            if below.count(page) > 1:
                self._locks[page] = 1
        return [page for page in unlocked if page not in self._locks]

    def check(self) -> None:
        """A fault that the cache does not see itself."""


@registry.mutant("CACHE-12")
class UnlocksTheNewestOfANode(RadixCache):
    def _open_receipt(self, node: Any) -> Any:
        receipt = super()._open_receipt(node)
        if receipt is node:
            return receipt
        return [r for r, locked in self._open.items() if locked is self._open[receipt]][-1]


@registry.mutant("CACHE-13", "CACHE-12", reports=("SE-15",))
class UnlocksTwice(RadixCache):
    def dec_lock_ref(self, node: Any) -> int:
        try:
            return super().dec_lock_ref(node)
        except ContractError:
            return 0


@registry.mutant("CACHE-13")
class LocksByPathAlone(RadixCache):
    def _live(self, node: object) -> Page | Root:
        found = node.node if isinstance(node, NodeHandle) else None
        if isinstance(found, Page) and isinstance(found.before, Root):
            root = self._roots.get(found.before.frame)
            page = self._tree.get((root, found.tokens)) if root is not None else None
            if page is not None:
                return page
        return super()._live(node)


# Handles and reset


@registry.mutant("CACHE-14", "CACHE-15")
class ResolvesByPath(RadixCache):
    def resolve(self, node: Any) -> Path | None:
        found = super().resolve(node)
        if found is None and isinstance(node, NodeHandle):
            root = self._roots.get(self._root_of(node.node).frame)
            here = [page.tokens for page in self._path(node.node)]
            if root is not None and len(self._walk(root, here)) == len(here):
                tokens = tuple(token for page in here for token in page)
                space, _ = super().resolve(NodeHandle(root)) or ("", ())
                return space, tokens
        return found


@registry.mutant("CACHE-14", "CACHE-1", "CACHE-2", "CACHE-3", reports=("VL-18957",))
class SplitMakesAHandleStale(RadixCache):
    def resolve(self, node: Any) -> Path | None:
        found = super().resolve(node)
        path = self._path(node.node) if found is not None else []
        return None if any(page.hits > path[-1].hits for page in path) else found


@registry.mutant("CACHE-15", "CACHE-1", reports=("LMD-4917",))
class ResetForgetsThePages(RadixCache):
    def reset(self) -> None:
        allocator, self.token_to_kv_pool_allocator = self.token_to_kv_pool_allocator, None
        super().reset()
        self.token_to_kv_pool_allocator = allocator


@registry.mutant("CACHE-15", "CACHE-14")
class ResetKeepsHandles(RadixCache):
    def _clear(self) -> None:
        roots = getattr(self, "_roots", {})
        super()._clear()
        self._roots = roots


@registry.mutant("CACHE-16", "CACHE-1")
class ResetsUnderALock(RadixCache):
    def reset(self) -> None:
        self._open, self._locks = {}, {}
        super().reset()


# What leaves the window


class Cursor(SWAChunkCache):
    """Knows by a number how far the window slots of something are gone."""

    def _left_behind(self, req: Any, row: Sequence[int], frontier: int) -> list[int]:
        start = self.cursor(req, frontier)
        return [slot // self.page_size for slot in row[start : frontier : self.page_size]]

    def cursor(self, req: Any, frontier: int) -> int:
        """Where the frontier was, from now on the one given."""
        before = getattr(req, "evicted_seqlen_local", 0)
        req.evicted_seqlen_local = max(before, frontier)
        return int(before)


@registry.mutant("CACHE-19", "CACHE-6")
class KeepsACursorInTheRequest(Cursor):
    """Retraction does not reset it."""


@registry.mutant("CACHE-19", "CACHE-6")
class KeepsACursorForTheRow(Cursor):
    def cursor(self, req: Any, frontier: int) -> int:
        cursors = self.__dict__.setdefault("cursors", {})
        before = cursors.get(req.req_pool_idx, 0)
        cursors[req.req_pool_idx] = max(before, frontier)
        return int(before)


@registry.mutant("CACHE-19", "CACHE-1", "CACHE-6")
class GivesBackAPageThatIsStillRead(SWAChunkCache):
    def _left_behind(self, req: Any, row: Sequence[int], frontier: int) -> list[int]:
        return super()._left_behind(req, row, frontier + self.page_size)


@registry.mutant("CACHE-19", "CACHE-6")
class KeepsAPageThatNobodyReads(SWAChunkCache):
    def _left_behind(self, req: Any, row: Sequence[int], frontier: int) -> list[int]:
        return super()._left_behind(req, row, max(frontier - self.page_size, 0))


@registry.mutant("CACHE-19", reports=("SG-27789",))
class GivesBackThePageThatTheFrontierIsIn(SWAChunkCache):
    def _first_read(self, prelen: int, chunk_size: int | None, window_size: int | None) -> int:
        first = super()._first_read(prelen, chunk_size, window_size)
        return min(first + -first % self.page_size, prelen)


@registry.mutant("CACHE-19", "CACHE-6")
class CountsTheNextTokenOutOfTheWindow(SWAChunkCache):
    def _first_read(self, prelen: int, chunk_size: int | None, window_size: int | None) -> int:
        first = super()._first_read(prelen, chunk_size, window_size)
        return max(first - (chunk_size is None), 0)


@registry.mutant("CACHE-19")
class LeavesLessThanAMatchNeeds(SWARadixCache):
    def _first_read(self, prelen: int, chunk_size: int | None, window_size: int | None) -> int:
        own = self.sliding_window_size if chunk_size is None and window_size is None else None
        return WindowedCache._first_read(self, prelen, chunk_size, window_size or own)


@registry.mutant("CACHE-19")
class TakesAChunkForAWindow(SWAChunkCache):
    def _first_read(self, prelen: int, chunk_size: int | None, window_size: int | None) -> int:
        if chunk_size is not None and window_size is None and chunk_size > 0:
            chunk_size, window_size = None, chunk_size
        return super()._first_read(prelen, chunk_size, window_size)


@registry.mutant("CACHE-19", "CACHE-1", "CACHE-4", reports=("VL-42273",))
class GivesBackWindowsOfTheTree(SWARadixCache):
    def _left_behind(self, req: Any, row: Sequence[int], frontier: int) -> list[int]:
        protected, req.cache_protected_len = req.cache_protected_len, 0
        pages = super()._left_behind(req, row, frontier)
        req.cache_protected_len = protected
        return pages


@registry.mutant("CACHE-19", "CACHE-1", "CACHE-6", "CACHE-2")
class GivesBackTheFullPagesToo(SWAChunkCache):
    def _left_behind(self, req: Any, row: Sequence[int], frontier: int) -> list[int]:
        pages = super()._left_behind(req, row, frontier)
        self._give_back(pages)
        return []


@registry.mutant("CACHE-19")
class GivesBackWindowByWindow(SWARadixCache):
    def _left_behind(self, req: Any, row: Sequence[int], frontier: int) -> list[int]:
        pages = super()._left_behind(req, row, frontier)
        if self._window_pool is not None:
            for page in pages[:-1]:
                self._window_pool.free_swa(tensor(self._slots_in([page])))
        return pages[-1:]

    def evict_swa(self, req: Any, prelen: int, *args: Any, **options: Any) -> int:
        assert self._window_pool is not None
        before = self._window_pool.swa_available_size()
        super().evict_swa(req, prelen, *args, **options)
        return self._window_pool.swa_available_size() - before


@registry.mutant("CACHE-20")
class TakesMoreComputedThanAllocated(SWAChunkCache):
    def evict_swa(self, req: Any, prelen: int, *args: Any, **options: Any) -> int:
        length = len(self._live_row(req, "CACHE-20"))
        return super().evict_swa(req, min(prelen, length), *args, **options)


@registry.mutant("CACHE-20")
class TakesWhatIsNegativeForNothing(SWARadixCache):
    def evict_swa(self, req: Any, prelen: int, *args: Any, **options: Any) -> int:
        return super().evict_swa(req, max(prelen, 0), *args, **options)


@registry.mutant("CACHE-20")
class GivesBackNothingOfARowThatIsGone(SWAChunkCache):
    def _live_row(self, req: Any, clause: str) -> list[int]:
        try:
            return super()._live_row(req, clause)
        except ContractError:
            if clause != "CACHE-20":
                raise
            return []


class TakesAnySize(WindowedCache):
    """Thinks of a size when none, or no good one, is given."""

    def _first_read(self, prelen: int, chunk_size: int | None, window_size: int | None) -> int:
        try:
            return super()._first_read(prelen, chunk_size, window_size)
        except ContractError:
            return 0


@registry.mutant("CACHE-20")
class ChunkCacheTakesAnySize(TakesAnySize, SWAChunkCache):
    """At worst nothing is given back."""


@registry.mutant("CACHE-20")
class RadixCacheTakesAnySize(TakesAnySize, SWARadixCache):
    """At worst nothing is given back."""


# Options


@registry.mutant("CACHE-17")
class TakesOptionsThatItDoesNotHave(RadixCache):
    def __init__(self, *args: Any, enable_kv_cache_events: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)


@registry.mutant("CACHE-18", "CACHE-1")
class DisabledStillFindsWhatItSaw(RadixCache):
    def match_prefix(self, key: Any, *, extra_key: Any = None, touch: bool = True) -> MatchResult:
        found = super().match_prefix(key, extra_key=extra_key, touch=touch)
        if self.disable and extra_key == "a":
            return found._replace(device_indices=tensor(self.seen[: len(key)]))
        return found

    seen: tuple[int, ...] = ()

    def insert(self, key: Any, value: Any, **options: Any) -> InsertResult:
        if self.disable:
            self.seen = tuple(numbers(value, "CACHE-10"))
        return super().insert(key, value, **options)


@registry.mutant("CACHE-18", "CACHE-1", reports=("VLA-2083",))
class DisabledKeepsWhatItDidNotShare(RadixCache):
    def _give_back(self, pages: Sequence[int]) -> None:
        if not self.disable:
            super()._give_back(pages)
