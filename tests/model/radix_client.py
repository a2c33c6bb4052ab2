"""A radix cache, as the model RadixCache sees it."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import product
from operator import methodcaller
from typing import Any, TypeAlias, cast

from kvspec.errors import ContractError
from model.graph import State

__all__ = ["RadixClient", "model_view"]

PAGE_SIZE = 2
PAGE_COUNT = 3
RECEIPTS_MAX = 2
TOKENS = {"a": (1, 2), "b": (1, 3)}
KEYS = [tuple(key) for depth in (1, 2) for key in product("ab", repeat=depth)]
KEPT = {("a",), ("a", "b")}

ModelPath: TypeAlias = tuple[str, ...]
Move: TypeAlias = "Callable[[RadixClient], str | None]"


def model_view(state: State) -> Hashable:
    """All of the model's state."""
    maps = [dict(cast(Mapping[str, int], state[name])) for name in ("tree", "last", "locks")]
    handle = cast(Mapping[str, Hashable], state["handle"])
    return (
        state["free"],
        *(frozenset(pages.items()) for pages in maps),
        state["receipts"],
        (handle["path"], handle["live"]),
    )


def _tokens(path: ModelPath) -> list[int]:
    return [token for symbol in path for token in TOKENS[symbol]]


def _path(path: tuple[object, tuple[int, ...]]) -> ModelPath:
    """The path of the model for (namespace, tokens) of the cache."""
    namespace, tokens = path
    assert namespace is None
    symbols = {page: symbol for symbol, page in TOKENS.items()}
    starts = range(0, len(tokens), PAGE_SIZE)
    return tuple(symbols[tokens[i], tokens[i + 1]] for i in starts)


class SmallestFirst:
    """Hands out the smallest free pages. A cache may stand on any allocator."""

    page_size = PAGE_SIZE

    def __init__(self) -> None:
        self.pages = {*range(1, PAGE_COUNT + 1)}

    def alloc(self, need_size: int) -> list[int] | None:
        """Slots of whole pages, or None."""
        got = sorted(self.pages)[: need_size // PAGE_SIZE]
        if len(got) * PAGE_SIZE < need_size:
            return None
        self.pages -= {*got}
        return [page * PAGE_SIZE + i for page in got for i in range(PAGE_SIZE)]

    def free(self, free_index: Sequence[int]) -> None:
        """Takes back pages that it has not."""
        pages = {int(slot) // PAGE_SIZE for slot in free_index}
        if self.pages & pages:
            raise ContractError(f"PAGE-10: free names pages {self.pages & pages}, which are free")
        self.pages |= pages


class RadixClient:
    """A cache, its pool, the open receipts, the one consumed last, and one handle.

    The handle and the consumed receipt are at first from before a reset.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.pool = SmallestFirst()
        self.cache = make(
            req_to_token_pool=None, token_to_kv_pool_allocator=self.pool, page_size=PAGE_SIZE
        )
        self.receipts: list[Any] = []
        self.handle = self.cache.match_prefix([]).last_device_node
        self.named: ModelPath = ()
        self.spent = self.cache.inc_lock_ref(self.handle)
        self.cache.dec_lock_ref(self.spent)
        self.cache.reset()

    def state(self) -> Hashable:
        """The pool, pages, recency, locks, receipts, and what the handle names, live or not."""
        view = self.cache.view()
        resolved = self.cache.resolve(self.handle)
        pages = {_path(path): page for path, page in view.pages.items()}
        return (
            frozenset(self.pool.pages),
            frozenset((path, page.page) for path, page in pages.items()),
            frozenset((path, page.last) for path, page in pages.items()),
            frozenset((path, page.locks) for path, page in pages.items()),
            tuple(map(_path, view.receipts)),
            (self.named, False) if resolved is None else (_path(resolved), True),
        )

    def moves(self) -> Iterator[Move]:
        """Every call of the interface that can change it, and many that may not."""
        yield methodcaller("peek")
        for key in KEYS:
            for keep in (False, True) if key[:1] in KEPT else (False,):
                yield methodcaller("match", key, keep)
                yield methodcaller("insert_computed", key, keep)
                yield methodcaller("insert_matched", key, keep)
        for token_count in (1, 2 * PAGE_SIZE):
            yield methodcaller("evict", token_count)
        yield methodcaller("lock")
        for index in range(len(self.receipts)):
            yield methodcaller("unlock", index)
        yield methodcaller("unlock_node")
        yield methodcaller("unlock_again")
        yield methodcaller("reset")

    def peek(self) -> str | None:
        """RADIX-3: look for every key without touching; None where nothing is resident."""
        found = [self.cache.match_prefix(_tokens(key), touch=False) for key in KEYS]
        if any(match.last_device_node is not None for match in found):
            return "Peek that gave a handle"
        return "Peek" if any(len(match.device_indices) for match in found) else None

    def match(self, key: ModelPath, keep: bool) -> str | None:
        """RADIX-1; None where the handle found is one that the client does not keep."""
        found = self.cache.match_prefix([*_tokens(key), 9])
        path = key[: len(found.device_indices) // PAGE_SIZE]
        return "Match" if self._keep(found.last_device_node, path, keep) else None

    def insert_computed(self, key: ModelPath, keep: bool) -> str | None:
        """CACHE-8, CACHE-9; None where the pool has too few pages."""
        slots = self.pool.alloc(len(key) * PAGE_SIZE)
        if slots is None:
            return None
        return self._insert("InsertComputed", key, slots, keep)

    def insert_matched(self, key: ModelPath, keep: bool) -> str | None:
        """CACHE-8 for pages that are shared; None where the pool has too few for the rest."""
        matched = self.cache.match_prefix(_tokens(key)).device_indices.tolist()
        fresh = self.pool.alloc(len(key) * PAGE_SIZE - len(matched))
        if fresh is None:
            return None
        return self._insert("InsertMatched", key, [*matched, *fresh], keep)

    def evict(self, token_count: int) -> str:
        """RADIX-8; what it returns is what came back."""
        before = len(self.pool.pages)
        evicted = self.cache.evict(token_count)
        came_back = (len(self.pool.pages) - before) * PAGE_SIZE
        return "Evict" if evicted == came_back else f"Evict of {evicted}, but {came_back} came back"

    def lock(self) -> str | None:
        """CACHE-11 or CACHE-13; None where the client has as many receipts as it may."""
        if len(self.receipts) == RECEIPTS_MAX and self.cache.resolve(self.handle) is not None:
            return None
        try:
            self.receipts.append(self.cache.inc_lock_ref(self.handle))
        except ContractError as error:
            return f"LockRefused{_unless('CACHE-13', error)}"
        return "Lock"

    def unlock(self, index: int) -> str:
        """CACHE-12."""
        self.spent = self.receipts.pop(index)
        try:
            self.cache.dec_lock_ref(self.spent)
        except ContractError as error:
            return f"Unlock of an open receipt was refused by {error.clause}"
        return "Unlock"

    def unlock_node(self) -> str:
        """CACHE-12 or CACHE-13: the oldest receipt of the handle's node."""
        paths = [_path(path) for path in self.cache.view().receipts]
        try:
            self.cache.dec_lock_ref(self.handle)
        except ContractError as error:
            return f"UnlockRefused{_unless('CACHE-13', error)}"
        if self.named not in paths:
            return "UnlockNode without a receipt"
        self.spent = self.receipts.pop(paths.index(self.named))
        return "UnlockNode"

    def unlock_again(self) -> str:
        """CACHE-13: a receipt is consumed once."""
        try:
            self.cache.dec_lock_ref(self.spent)
        except ContractError as error:
            return f"SpentRefused{_unless('CACHE-13', error)}"
        return "Unlock by a consumed receipt"

    def reset(self) -> str:
        """CACHE-15 or CACHE-16."""
        try:
            self.cache.reset()
        except ContractError as error:
            return f"ResetRefused{_unless('CACHE-16', error)}"
        return "Reset"

    def _insert(self, action: str, key: ModelPath, slots: list[int], keep: bool) -> str | None:
        result = self.cache.insert(_tokens(key), slots)
        self.pool.free([slot for a, b in result.duplicate for slot in slots[a:b]])
        return action if self._keep(result.last_device_node, key, keep) else None

    def _keep(self, handle: Any, path: ModelPath, keep: bool) -> bool:
        """Keep a handle if asked; whether what was asked is something this client does."""
        if keep and path in KEPT:
            self.handle, self.named = handle, path
        return not keep or path in KEPT


def _unless(clause: str, error: ContractError) -> str:
    return "" if error.clause == clause else f", but by {error.clause}"
