"""What an object holds, read as one of the views of `interfaces`. Spec: INSTR.

Ours say it themselves, by `view()`. Of anybody else's the attributes of the source document are
read, and what they say is what is told: duplicates, and pages outside the pool (INSTR-7).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from kvspec.interfaces.memory_checker import HostView, SystemView
from kvspec.interfaces.prefix_cache import CacheView, PageView, Path
from kvspec.interfaces.request_pool import ReqToTokenPoolView
from kvspec.interfaces.slot_allocator import AllocatorView

__all__ = [
    "RowView",
    "Tree",
    "allocator_view",
    "cache_view",
    "integers",
    "node_path",
    "pending_slots",
    "pool_view",
    "read_tree",
    "rooted",
    "system_view",
    "window_slots",
]

_Slots: TypeAlias = list[int]


class RowView(NamedTuple):
    """A value of the tree that is no copy: it shares its memory with a row of `req_to_token`."""

    path: Path
    """Of the last whole page."""
    row: int
    start: int
    """Position in the row."""
    pages: frozenset[int]
    """What the value says now."""


class Tree(NamedTuple):
    """A cache, and what of it does not fit a view."""

    view: CacheView
    misplaced: tuple[tuple[Path, tuple[int, ...]], ...] = ()
    row_views: tuple[RowView, ...] = ()
    host: tuple[int, ...] = ()
    """Host slots, once for each place that names them."""


def integers(given: Any) -> list[int]:
    """The integers of a tensor of any device, a buffer or a sequence; of None, none."""
    if given is None:
        return []
    if hasattr(given, "tolist"):
        flat = given.reshape(-1) if hasattr(given, "reshape") else given
        return cast("list[int]", flat.tolist())
    return [int(number) for number in given]


# ----------------------------------------------------------------------------------- allocators


def allocator_view(allocator: Any) -> AllocatorView:
    """The abstract state of an allocator, whoever wrote it (INSTR-7). O(pool)."""
    if hasattr(allocator, "view"):
        return cast(AllocatorView, allocator.view())
    if not hasattr(allocator, "full_attn_allocator"):
        return _lists(allocator, pending_slots(allocator))
    slots = pending_slots(allocator)
    windows = [window for window in integers(window_slots(allocator, slots)) if window > 0]
    full = _lists(allocator.full_attn_allocator, slots)
    swa = _lists(allocator.swa_attn_allocator, windows)
    mapping = integers(allocator.full_to_swa_index_mapping)[: int(allocator.size) + 1]
    waiting = set(full.pending)
    pairs = tuple(
        (page, window)
        for page, window in enumerate(mapping)
        if window > 0 and page > 0 and page not in waiting
    )
    return full._replace(swa=swa, pairs=pairs)


def _lists(allocator: Any, pending: _Slots) -> AllocatorView:
    page_size = int(allocator.page_size)
    free, release = integers(allocator.free_pages), integers(allocator.release_pages)
    waiting = [slot // page_size for slot in pending]
    if page_size > 1:  # a page that is named by several slots is given back once
        waiting = list(dict.fromkeys(waiting))
    listed = {*free, *release, *waiting}
    return AllocatorView(
        free=tuple(free),
        release=tuple(release),
        pending=tuple(waiting),
        held=frozenset(range(1, int(allocator.size) // page_size + 1)) - listed,
        group=not allocator.is_not_in_free_group,
    )


def pending_slots(allocator: Any) -> _Slots:
    """What was given back inside the open free group, slot by slot."""
    if allocator.is_not_in_free_group:
        return []
    return [slot for given in allocator.free_group for slot in integers(given)]


def window_slots(allocator: Any, slots: Any) -> Tensor:
    """The window slot of each full slot, 0 or -1 where there is none. O(slots)."""
    if hasattr(allocator, "full_attn_allocator"):
        mapping: Tensor = allocator.full_to_swa_index_mapping
        index = torch.as_tensor(slots, dtype=torch.int64, device=mapping.device)
        return mapping[index]
    return cast(Tensor, allocator.translate_loc_from_full_to_swa(slots))


# ---------------------------------------------------------------------------------- request rows


def pool_view(
    req_to_token_pool: Any, lengths: Mapping[int, int] | None = None
) -> ReqToTokenPoolView:
    """The abstract state of a request pool, whoever wrote it (INSTR-7). O(rows + slots written).

    `lengths` says how much of a row is written, where that is known; else a row ends at its first
    0, which is the slot of nobody.
    """
    if hasattr(req_to_token_pool, "view"):
        return cast(ReqToTokenPoolView, req_to_token_pool.view())
    free, table = integers(req_to_token_pool.free_slots), req_to_token_pool.req_to_token
    listed, known = set(free), lengths or {}
    rows = {}
    for row in range(table.shape[0]):
        if row in listed:
            continue
        if row in known:
            slots = integers(table[row, : known[row]])
        else:
            slots = integers(table[row])
            slots = slots[: slots.index(0)] if 0 in slots else slots
        rows[row] = tuple(slots)
    return ReqToTokenPoolView(tuple(free), rows)


# ---------------------------------------------------------------------------------------- caches


def rooted(cache: Any) -> bool:
    """Whether a cache has a tree of nodes to be read."""
    return not hasattr(cache, "view") and hasattr(cache, "root_node")


def cache_view(cache: Any, page_size: int) -> CacheView:
    """The abstract state of a cache, whoever wrote it (INSTR-7). O(pages × depth)."""
    return read_tree(cache, page_size).view


def read_tree(cache: Any, page_size: int, table: Any = None) -> Tree:
    """A cache, with what a view of it cannot say. `table` is `req_to_token`. O(pages × depth)."""
    if not rooted(cache):
        view = cache.view() if hasattr(cache, "view") else CacheView("page", {}, ())
        return Tree(view)
    return _Reading(cache, page_size, table).tree()


def _tokens(key: Any) -> tuple[int, ...]:
    return tuple(integers(getattr(key, "token_ids", key)))


def node_path(node: Any) -> Path:
    """The tokens from the root to the end of a node. O(tokens)."""
    keys = []
    while getattr(node, "parent", None) is not None:
        keys.append(_tokens(node.key))
        node = node.parent
    return None, tuple(token for key in reversed(keys) for token in key)


class _Place(NamedTuple):
    """Where a walk from the root is."""

    node: Any
    tokens: tuple[int, ...]
    """Before the node."""
    rest: tuple[int, ...]
    """Slots of a page that the nodes before have begun and not ended."""


class _Reading:
    """One walk over a tree of nodes."""

    def __init__(self, cache: Any, page_size: int, table: Any) -> None:
        self.page_size, self.table = page_size, table
        self.root = cache.root_node
        nodes = list(_nodes(self.root))
        self.last = _ranks(getattr(node, "last_access_time", 0) for node in nodes)
        self.born = _ranks(getattr(node, "id", 0) for node in nodes)
        self.pages: dict[Path, PageView] = {}
        self.misplaced: list[tuple[Path, tuple[int, ...]]] = []
        self.row_views: list[RowView] = []
        self.host: list[int] = []

    def tree(self) -> Tree:
        places = [_Place(child, (), ()) for child in self.root.children.values()]
        while places:
            place = places.pop()
            node = place.node
            tokens, rest = self._node(place)
            places += [_Place(child, tokens, rest) for child in node.children.values()]
        view = CacheView("node", self.pages, ())
        return Tree(view, tuple(self.misplaced), tuple(self.row_views), tuple(self.host))

    def _node(self, place: _Place) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Read a node; the tokens to its end, and the slots of the page that it has begun."""
        node, size = place.node, self.page_size
        tokens = place.tokens + _tokens(node.key)
        self.host += integers(getattr(node, "host_value", None))
        if node.value is None:  # it is in the next tier alone
            return tokens, ()
        slots = [*place.rest, *integers(node.value)]
        start = len(place.tokens) - len(place.rest)
        whole = len(slots) - len(slots) % size
        for at in range(0, whole, size):
            upto = start + at + size
            self._page(node, tokens[:upto], slots[at : at + size], ends=upto == len(tokens))
        rest = tuple(slots[whole:])
        if rest and not node.children:
            self.misplaced.append(((None, tokens), rest))
        self._note_row_view(node, (None, tokens[: start + whole]), slots)
        return tokens, rest

    def _page(
        self, node: Any, tokens: tuple[int, ...], slots: Sequence[int], *, ends: bool
    ) -> None:
        path: Path = (None, tokens)
        page = slots[0] // self.page_size
        if any(slot != page * self.page_size + at for at, slot in enumerate(slots)):
            self.misplaced.append((path, tuple(slots)))
        self.pages[path] = PageView(
            page=page,
            locks=int(getattr(node, "full_lock_ref", getattr(node, "lock_ref", 0))),
            last=self.last[getattr(node, "last_access_time", 0)],
            born=self.born[getattr(node, "id", 0)],
            hits=int(getattr(node, "hit_count", 0)),
            priority=int(getattr(node, "priority", 0)),
            cut=ends,
            tombstone=bool(getattr(node, "swa_tombstone", False)),
            swa_locks=int(getattr(node, "swa_lock_ref", 0)),
        )

    def _note_row_view(self, node: Any, path: Path, slots: Sequence[int]) -> None:
        """Notice a value that lies in the memory of a row: it changes with the row."""
        value, table = node.value, self.table
        if not isinstance(value, Tensor) or not isinstance(table, Tensor) or not value.numel():
            return
        if value.untyped_storage().data_ptr() != table.untyped_storage().data_ptr():
            return
        row, start = divmod(int(value.storage_offset()), int(table.shape[1]))
        pages = frozenset(slot // self.page_size for slot in slots)
        self.row_views.append(RowView(path, row, start, pages))


def _nodes(root: Any) -> Iterator[Any]:
    waiting = list(root.children.values())
    while waiting:
        node = waiting.pop()
        waiting += node.children.values()
        yield node


def _ranks(values: Iterable[float]) -> dict[float, int]:
    return {value: rank for rank, value in enumerate(sorted(set(values)))}


# ---------------------------------------------------------------------------------- all of them


def system_view(
    cache: Any,
    allocator: Any,
    req_to_token_pool: Any,
    host: Any = None,
    lengths: Mapping[int, int] | None = None,
) -> tuple[SystemView, tuple[RowView, ...]]:
    """What a check looks at, and the values of the tree that are rows. O(pool + pages × depth)."""
    page_size = int(allocator.page_size)
    books = allocator_view(allocator)
    table = req_to_token_pool.req_to_token
    tree = read_tree(cache, page_size, table)
    view = SystemView(
        allocator=books,
        rows=pool_view(req_to_token_pool, lengths),
        tree=tree.view,
        page_size=page_size,
        page_count=int(allocator.size) // page_size,
        row_count=int(table.shape[0]),
        swa_page_count=None if books.swa is None else int(allocator.size_swa) // page_size,
        sliding_window_size=getattr(cache, "sliding_window_size", None) if books.swa else None,
        host=None if host is None else _host_view(host, tree.host),
        misplaced=tree.misplaced,
    )
    return view, tree.row_views


def _host_view(host: Any, named: Collection[int]) -> HostView:
    size = int(host.page_size)
    return HostView(
        page_count=int(host.size) // size,
        free=tuple(_pages(integers(host.free_slots), size)),
        tree=tuple(_pages(named, size)),
    )


def _pages(slots: Iterable[int], page_size: int) -> list[int]:
    """The pages of slots, one for each first slot, so that a page twice is named twice."""
    return [slot // page_size for slot in slots if slot % page_size == 0]
