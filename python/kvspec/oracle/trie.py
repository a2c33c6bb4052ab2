"""The caches that share, as a trie of pages, one per namespace. Spec: CACHE, RADIX.

The tree is a dict from (the page before, tokens of a page) to the page; the page before a first one
is the root of its namespace. Each page stores its own tokens once, and a record in memory is one
incarnation of it: a page that comes back after its eviction is another record.

    |resident| = |evictable| + |locked|
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, TypeAlias

from torch import Tensor

from kvspec.errors import ContractError
from kvspec.interfaces import prefix_cache as interface
from kvspec.interfaces.prefix_cache import (
    CacheView,
    InsertRanges,
    InsertResult,
    Interval,
    MatchResult,
    PageView,
    Path,
    Req,
)
from kvspec.interfaces.prefix_key import ExtraKey, Tokens
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator, Slots
from kvspec.oracle.boundary import tensor
from kvspec.oracle.digest import MASK, START, mix
from kvspec.oracle.prefix_cache import BasePrefixCache, LockReceipt, RequestRow, finished_tokens
from kvspec.prefix_key import unframe_namespace

__all__ = ["Claim", "NodeHandle", "Page", "Root", "TrieCache", "ranges"]

PageTokens: TypeAlias = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Root:
    """Where a namespace begins."""

    frame: bytes
    name: int
    """Digest of the path: of the frame alone."""


@dataclass(eq=False, slots=True)
class Page:
    """A resident page."""

    before: "Page | Root" = field(repr=False)
    tokens: PageTokens
    number: int
    """The KV page it holds."""
    name: int
    """Digest of the path up to here."""
    born: int
    last: int
    priority: int
    hits: int = 0
    cut: bool = False


@dataclass(frozen=True, slots=True)
class NodeHandle:
    """Names a path and the incarnation of its last page (CACHE-14)."""

    node: Page | Root


class Claim(NamedTuple):
    """What the reach of a key and its slots would do to the tree: nothing has happened yet."""

    root: Root
    pages: list[PageTokens]
    """The pages of the reach."""
    numbers: list[int]
    """The KV pages that the caller has for them."""
    resident: list[Page]
    """Those of them that the tree has."""
    windows: Sequence[bool] = ()
    """Whether the caller had a window slot, for each of its slots; empty without windows."""

    @property
    def kinds(self) -> list[str]:
        """For each page of the reach, what becomes of the caller's (CACHE-8)."""
        known = zip(self.resident, self.numbers, strict=False)
        kinds = ["shared" if page.number == number else "duplicate" for page, number in known]
        return kinds + ["adopted"] * (len(self.pages) - len(kinds))

    def numbers_of(self, kind: str) -> list[int]:
        """The caller's KV pages of one kind, in order."""
        pairs = zip(self.kinds, self.numbers, strict=True)
        return [number for found, number in pairs if found == kind]


class TrieCache(BasePrefixCache):
    """What the caches that share have: all but eviction; windows come in through hooks."""

    eviction_granularity = "page"

    def __init__(
        self,
        req_to_token_pool: ReqToTokenPool | None,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator | None,
        page_size: int,
        disable: bool,
    ) -> None:
        super().__init__(req_to_token_pool, token_to_kv_pool_allocator, page_size, disable)
        self._tick = 0
        self._tokens_compared = self._leaves_evicted = 0
        self._clear()

    def _clear(self) -> None:
        self._roots: dict[bytes, Root] = {}
        self._tree: dict[tuple[Page | Root, PageTokens], Page] = {}  # a page after those before it
        self._held: dict[int, Page] = {}  # KV page -> who holds it
        self._locks: dict[Page, int] = {}  # how many open receipts cover a page, if any does
        self._open: dict[interface.LockReceipt, Page | Root] = {}  # oldest first, with its node
        self._tombstones: set[Page] = set()  # without a pair; never any without windows
        self._window_locks: dict[Page, int] = {}  # how many window locks cover a page, if any does

    def reset(self) -> None:
        """Give back every page; all handles become stale (CACHE-15, CACHE-16)."""
        with self._changing("reset"):
            if self._open:
                raise ContractError(f"CACHE-16: {len(self._open)} receipts are open")
            pages = sorted(self._held)
            self._give_back(pages)
            self._clear()
            if pages:
                self._report_pages("reset", pages)

    # Match and insert

    def match_prefix(
        self, key: Tokens, *, extra_key: ExtraKey = None, touch: bool = True
    ) -> MatchResult:
        """The longest resident prefix (RADIX-1, RADIX-2, RADIX-3)."""
        if self.disable:
            return super().match_prefix(key, extra_key=extra_key, touch=touch)
        tokens, frame = self._parse(key, extra_key)
        pages = self._whole_pages(tokens)
        if not touch:
            root = self._roots.get(frame)
            found = self._usable(self._walk(root, pages)) if root else []
            return MatchResult(self._slots(found), None, None)
        with self._changing("match_prefix"):
            root = self._root(frame)
            path = self._usable(self._walk(root, pages))
            self._hit(path)
            node = NodeHandle(path[-1] if path else root)
            return MatchResult(self._slots(path), node, node)

    def insert(
        self, key: Tokens, value: Slots, *, extra_key: ExtraKey = None, priority: int = 0
    ) -> InsertResult:
        """Put the whole pages of a key in (CACHE-8, CACHE-9, CACHE-10, RADIX-4)."""
        if self.disable:
            return super().insert(key, value, extra_key=extra_key, priority=priority)
        tokens, frame = self._parse(key, extra_key)
        slots = self._slots_of(tokens, value)
        with self._changing("insert"):
            claim = self._claim(frame, tokens, slots)
            whole = len(slots) - len(slots) % self.page_size
            firsts = slots[len(claim.pages) * self.page_size : whole : self.page_size]
            self._refuse_held("CACHE-10", [slot // self.page_size for slot in firsts])
            kinds = [kind for kind in claim.kinds for _ in range(self.page_size)]
            kinds += ["tail"] * (len(slots) - len(kinds))
            windows = self._window_ranges(claim, kinds)
            with self._revived(claim) as revived:
                node = self._adopt(claim, priority)
            moved = claim.numbers[len(claim.resident) :] + revived
            if moved:
                self._report_pages("insert", moved)
        prefix_len = len(claim.resident) * self.page_size
        return InsertResult(prefix_len, NodeHandle(node), **ranges(kinds), swa=windows)

    def _root(self, frame: bytes) -> Root:
        if frame not in self._roots:
            self._roots[frame] = Root(frame, mix(START, len(frame), *frame))
        return self._roots[frame]

    def _whole_pages(self, tokens: Sequence[int]) -> list[PageTokens]:
        size = self.page_size
        return [tuple(tokens[i : i + size]) for i in range(0, len(tokens) - size + 1, size)]

    def _walk(self, root: Root, pages: Iterable[PageTokens]) -> list[Page]:
        """The resident pages along a key, the first one first."""
        path: list[Page] = []
        node: Page | Root = root
        for tokens in pages:
            self._tokens_compared += self.page_size
            page = self._tree.get((node, tokens))
            if page is None:
                break
            path.append(page)
            node = page
        return path

    def _usable(self, path: list[Page]) -> list[Page]:
        """How much of a resident path a match may return: all of it, without windows."""
        return path

    def _slots(self, path: Sequence[Page]) -> Tensor:
        return tensor(self._slots_in([page.number for page in path]))

    def _hit(self, path: Sequence[Page]) -> None:
        """A match covered these pages (RADIX-3)."""
        self._tick += 1
        for page in path:
            page.last = self._tick
            page.hits += 1
        self._cut_after(path)

    def _cut_after(self, path: Sequence[Page]) -> None:
        """An insert or a match ended or left here."""
        if path and self.eviction_granularity == "node":
            path[-1].cut = True

    def _claim(self, frame: bytes, tokens: Sequence[int], slots: Sequence[int]) -> Claim:
        """Sort out a key and its slots, or refuse them (CACHE-8, CACHE-10): the reach is all of
        its whole pages, without windows.
        """
        root, pages, size = self._root(frame), self._whole_pages(tokens), self.page_size
        resident = self._walk(root, pages)
        numbers: dict[int, None] = {}
        for index in range(len(pages)):
            here = slots[index * size : (index + 1) * size]
            number = here[0] // size
            in_order = list(here) == list(range(number * size, (number + 1) * size))
            if not in_order or abs(here[0]) >= 2**31:
                raise ContractError(f"CACHE-10: slots {list(here)} are not one page in order")
            if number < 1:
                what = "the sink" if number == 0 else "negative"
                raise ContractError(f"CACHE-10: page {number} is {what}")
            if number in numbers:
                raise ContractError(f"CACHE-10: page {number} occurs twice")
            place = resident[index] if index < len(resident) else None
            if self._held.get(number, place) is not place:
                raise ContractError(
                    f"CACHE-10: page {number} is already in the tree at another place"
                )
            numbers[number] = None
        return Claim(root, pages, list(numbers), resident)

    def _adopt(self, claim: Claim, priority: int) -> Page | Root:
        """Make every page of a claim resident, and give the last (RADIX-4)."""
        self._tick += 1
        for page in claim.resident:
            page.last = self._tick
            page.priority = max(page.priority, priority)
        self._cut_after(claim.resident)
        path = list(claim.resident)
        node: Page | Root = path[-1] if path else claim.root
        known = len(path)
        for tokens, number in zip(claim.pages[known:], claim.numbers[known:], strict=True):
            name = mix(node.name, *tokens)
            page = Page(node, tokens, number, name, self._tick, self._tick, priority)
            self._tree[node, tokens] = self._held[number] = page
            path.append(page)
            node = page
        self._cut_after(path)
        return node

    @contextmanager
    def _revived(self, claim: Claim) -> Iterator[list[int]]:
        """The pages of the tree that an adoption inside this revives: none, without windows."""
        yield []

    def _window_ranges(self, claim: Claim, kinds: Sequence[str]) -> InsertRanges | None:
        """What becomes of the caller's window slots, if there are any (SWARADIX-6)."""
        return None

    # Requests

    def cache_finished_req(self, req: Req) -> None:
        """Cache what a request computed and take it apart (CACHE-4, CACHE-5)."""
        if self.disable:
            super().cache_finished_req(req)
            return
        with self._changing("cache_finished_req"):
            row, frame = self._private(req, finished_tokens(req))
            claim, beyond = self._claim_of_row(row, frame)
            with self._revived(claim):
                self._give_back(claim.numbers_of("duplicate") + beyond)
            self._adopt(claim, priority=0)
            if req.lock_receipt is not None:
                self._unlock(req.lock_receipt)
            moved = self._pages_of(row.slots[req.cache_protected_len :])
            self._dismiss(req)
            self._report_pages("cache_finished_req", moved)

    def cache_unfinished_req(self, req: Req) -> None:
        """Cache what a request has computed so far (CACHE-2, CACHE-3, CACHE-5)."""
        if self.disable:
            super().cache_unfinished_req(req)
            return
        with self._changing("cache_unfinished_req"):
            row, frame = self._private(req, list(req.fill_ids))
            claim, _ = self._claim_of_row(row, frame)
            there = [page.number for page in claim.resident]
            shared = self._slots_in(there + claim.numbers[len(there) :])
            moved = claim.numbers[req.cache_protected_len // self.page_size :]
            with self._revived(claim):
                self._exchange(req, row, shared, claim.numbers_of("duplicate"))
            node = self._adopt(claim, priority=0)
            receipt = self._lock(node)
            if req.lock_receipt is not None:
                self._unlock(req.lock_receipt)
            req.last_node, req.lock_receipt = receipt.node, receipt
            req.cache_protected_len = len(shared)
            req.prefix_indices = tensor(shared + row.slots[len(shared) : len(row.tokens)])
            self._report_pages("cache_unfinished_req", moved)

    def _private(self, req: Req, committed: list[int]) -> tuple[RequestRow, bytes]:
        """The row and the namespace of a request, or the reason why it is refused (CACHE-5)."""
        tokens, frame = self._parse(committed, req.extra_key)
        row = self._row(req, tokens)
        self._check_lengths(req, row)
        self._check_lock(req, row, frame)
        return row, frame

    def _claim_of_row(self, row: RequestRow, frame: bytes) -> tuple[Claim, list[int]]:
        """What caching a row would do, and the pages of it beyond the reach (CACHE-5)."""
        claim = self._claim(frame, row.tokens, row.slots)
        beyond = self._pages_of(row.slots)[len(claim.pages) :]
        self._refuse_held("CACHE-5", beyond)
        return claim, beyond

    def _refuse_held(self, clause: str, beyond: Iterable[int]) -> None:
        """What is beyond the reach is the caller's to give back, so it is not the tree's."""
        for page in beyond:
            if page in self._held:
                raise ContractError(f"{clause}: page {page} beyond the reach is in the tree")

    def _check_lock(self, req: Req, row: RequestRow, frame: bytes) -> None:
        """row[0 : protected) is what the tree holds along the lock (CACHE-1, CACHE-5)."""
        protected, receipt = req.cache_protected_len, req.lock_receipt
        if receipt is None:
            if protected:
                raise ContractError(f"CACHE-5: {protected} tokens are protected without a receipt")
            return
        if receipt not in self._open:
            raise ContractError("CACHE-5: the lock_receipt is not open")
        node = self._open[receipt]
        path = self._path(node)
        if len(path) * self.page_size != protected:
            raise ContractError(
                f"CACHE-5: the lock covers {len(path) * self.page_size} tokens,"
                f" but {protected} are protected"
            )
        tokens = [token for page in path for token in page.tokens]
        slots = self._slots_in([page.number for page in path])
        foreign = self._root_of(node).frame != frame
        if foreign or tokens != row.tokens[:protected] or slots != row.slots[:protected]:
            raise ContractError(f"CACHE-5: row[0 : {protected}) is not what the lock's path holds")

    # Locks and handles

    def inc_lock_ref(self, node: interface.NodeHandle) -> interface.LockReceipt:
        """Keep the node's path from eviction (CACHE-11, CACHE-13)."""
        if self.disable:
            return super().inc_lock_ref(node)
        with self._changing("inc_lock_ref"):
            receipt = self._lock(self._live(node))
            path = self._path(self._live(node))
            taken = path[len(path) + receipt.delta // self.page_size :]
            self._report_pages("inc_lock_ref", [page.number for page in taken])
            return receipt

    def dec_lock_ref(self, node: interface.LockReceipt | interface.NodeHandle) -> int:
        """Undo one `inc_lock_ref` (CACHE-12, CACHE-13)."""
        if self.disable:
            return super().dec_lock_ref(node)
        with self._changing("dec_lock_ref"):
            unlocked = self._unlock(self._open_receipt(node))
            self._report_pages("dec_lock_ref", [page.number for page in unlocked])
            return len(unlocked) * self.page_size

    def resolve(self, node: interface.NodeHandle) -> Path | None:
        """The path a handle names, None if it is stale (CACHE-14)."""
        if not isinstance(node, NodeHandle) or not self._is_live(node.node):
            return None
        tokens = tuple(token for page in self._path(node.node) for token in page.tokens)
        return unframe_namespace(self._root_of(node.node).frame), tokens

    def _is_live(self, node: Page | Root) -> bool:
        if isinstance(node, Root):
            return self._roots.get(node.frame) is node
        return self._tree.get((node.before, node.tokens)) is node

    def _live(self, node: object) -> Page | Root:
        if not isinstance(node, NodeHandle):
            raise ContractError(f"CACHE-13: {node!r:.80} is not a handle of this cache")
        if not self._is_live(node.node):
            raise ContractError("CACHE-13: the handle is stale")
        return node.node

    def _path(self, node: Page | Root) -> list[Page]:
        """The pages up to a node, the first one first."""
        path: list[Page] = []
        while isinstance(node, Page):
            path.append(node)
            node = node.before
        return path[::-1]

    def _root_of(self, node: Page | Root) -> Root:
        while isinstance(node, Page):
            node = node.before
        return node

    def _window_lock(self, path: Sequence[Page]) -> int | None:
        """Lock the last pages of a path in the window pool too, and name that lock: nothing to do
        without windows.
        """
        return None

    def _lock(self, node: Page | Root) -> LockReceipt:
        path = self._path(node)
        name = self._window_lock(path)
        taken = sum(page not in self._locks for page in path)
        for page in path:
            self._locks[page] = self._locks.get(page, 0) + 1
        receipt = LockReceipt(-taken * self.page_size, NodeHandle(node), name, self)
        self._open[receipt] = node
        return receipt

    def _unlock(self, receipt: interface.LockReceipt) -> list[Page]:
        """Undo one lock; the pages that became evictable."""
        path = self._path(self._open.pop(receipt))
        for page in path:
            self._locks[page] -= 1
            if not self._locks[page]:
                del self._locks[page]
        return [page for page in path if page not in self._locks]

    def _open_receipt(self, node: object) -> interface.LockReceipt:
        """The receipt, or the oldest open one of a node (CACHE-12, CACHE-13)."""
        if isinstance(node, LockReceipt):
            if node.owner is not self:
                raise ContractError("CACHE-13: the receipt is of another cache")
            if node not in self._open:
                raise ContractError("CACHE-13: the receipt has been consumed")
            return node
        live = self._live(node)
        for receipt, locked in self._open.items():
            if locked is live:
                return receipt
        raise ContractError("CACHE-13: the node has no open receipt")

    def _drop(self, victims: Iterable[Page]) -> None:
        """These pages are resident no more."""
        for page in victims:
            del self._tree[page.before, page.tokens], self._held[page.number]
            self._tombstones.discard(page)

    # Reading

    def evictable_size(self) -> int:
        """Tokens that `evict` could give back (RADIX-7)."""
        return (len(self._tree) - len(self._locks)) * self.page_size

    def protected_size(self) -> int:
        """Tokens under a lock (RADIX-7)."""
        return len(self._locks) * self.page_size

    def pretty_print(self) -> None:
        """Print the resident paths, a line a page, indented by depth (RADIX-18)."""
        pages = sorted(
            (repr(space), tokens, page) for (space, tokens), page in self.view().pages.items()
        )
        for space, below in groupby(pages, key=lambda line: line[0]):
            print(f"namespace {space}")
            for _, tokens, page in below:
                indent = "  " * (len(tokens) // self.page_size)
                own = " ".join(map(str, tokens[-self.page_size :]))
                print(f"{indent}{own}  page {page.page}, locks {page.locks}, hits {page.hits}")
        print(f"#tokens: {self.total_size()}, protected: {self.protected_size()}")

    def view(self) -> CacheView:
        """The abstract state."""
        last, born = self._ranks()
        paths: dict[Page | Root, Path] = {
            root: (unframe_namespace(root.frame), ()) for root in self._roots.values()
        }
        pages: dict[Path, PageView] = {}
        for page in self._tree.values():
            namespace, tokens = paths[page.before]
            path = paths[page] = (namespace, tokens + page.tokens)
            pages[path] = PageView(
                page=page.number,
                locks=self._locks.get(page, 0),
                last=last[page.last],
                born=born[page.born],
                hits=page.hits,
                priority=page.priority,
                cut=page.cut,
                tombstone=page in self._tombstones,
                swa_locks=self._window_locks.get(page, 0),
            )
        receipts = tuple(paths[node] for node in self._open.values())
        return CacheView(self.eviction_granularity, pages, receipts)

    def _ranks(self) -> tuple[dict[int, int], dict[int, int]]:
        """Rank of each tick among the last accesses, and among the births, 0 the oldest."""
        last = sorted({page.last for page in self._tree.values()})
        born = sorted({page.born for page in self._tree.values()})
        return {t: rank for rank, t in enumerate(last)}, {t: rank for rank, t in enumerate(born)}

    def digest(self) -> int:
        """The pages in any order, and the open receipts in theirs (RADIX-17)."""
        last, born = self._ranks()
        total = mix(START, len(self._open), *(node.name for node in self._open.values()))
        for page in self._tree.values():
            ranks = last[page.last], born[page.born]
            locks = self._locks.get(page, 0)
            windows = page in self._tombstones, self._window_locks.get(page, 0)
            own = (*ranks, page.hits, page.priority, locks, page.cut, *windows)
            total += mix(page.name, *own, page.name)  # twice: no two pages' sums trade places
        return total & MASK

    def check(self) -> None:
        """Recompute what the clauses demand from the pages and the receipts (RADIX-16)."""
        for (before, tokens), page in self._tree.items():
            if not self._is_live(before) or (page.before, page.tokens) != (before, tokens):
                raise ContractError(
                    f"RADIX-5: page {page.number} is resident, what it follows is not"
                )
            if self._held.get(page.number) is not page:
                raise ContractError(f"RADIX-5: two paths hold page {page.number}")
        if len(self._held) != len(self._tree):
            raise ContractError("RADIX-5: a page is held that is not resident")
        locks = Counter(page for node in self._open.values() for page in self._path(node))
        if not all(map(self._is_live, self._open.values())):
            raise ContractError("RADIX-6: an open receipt names a path that is not resident")
        if locks != self._locks:
            raise ContractError("RADIX-6: the locks are not those of the open receipts")
        self._check_sizes()

    def _check_sizes(self) -> None:
        sizes = (self.evictable_size(), self.protected_size(), self.total_size())
        locked = sum(page in self._locks for page in self._tree.values()) * self.page_size
        total = len(self._tree) * self.page_size
        if sizes != (total - locked, locked, total):
            raise ContractError(
                f"RADIX-7: the sizes are {sizes}, but {locked} of {total} tokens are locked"
            )

    def counters(self) -> dict[str, int]:
        """Exact costs so far; a dict has no heap (RADIX-15)."""
        return {
            "tokens_compared": self._tokens_compared,
            "heap_moves": 0,
            "leaves_evicted": self._leaves_evicted,
        }


def ranges(kinds: Iterable[str]) -> dict[str, list[Interval]]:
    """Where the positions of each kind lie; one of no kind is in no range (CACHE-8)."""
    found: dict[str, list[Interval]] = {
        kind: [] for kind in ("shared", "adopted", "duplicate", "tail")
    }
    start = 0
    for kind, run in groupby(kinds):
        stop = start + len(list(run))
        if kind:
            found[kind].append((start, stop))
        start = stop
    return found
