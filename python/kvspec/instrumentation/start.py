"""The first event of a log: what is instrumented, and what it holds. Spec: REC."""

from collections.abc import Collection, Mapping
from typing import Any

import kvspec
from kvspec.flight_recorder import events
from kvspec.flight_recorder.keys import ID_BYTES
from kvspec.instrumentation.calls import Objects
from kvspec.instrumentation.scribe import runs_of
from kvspec.interfaces.memory_checker import SystemView
from kvspec.interfaces.prefix_cache import Path
from kvspec.interfaces.slot_allocator import AllocatorView
from kvspec.prefix_key import (
    key_words,
    little_endian,
    namespace_frame,
    namespace_seed,
    next_hashes,
)

__all__ = ["start_event", "state_of"]


def start_event(objects: Objects, view: SystemView) -> events.Start:
    """What a log begins with. O(pool + pages × depth)."""
    cache, allocator, pool = objects.cache, objects.allocator, objects.pool
    sizes = getattr(allocator, "size_swa", None)
    return events.Start(
        schema=events.SCHEMA,
        kvspec=kvspec.__version__,
        allocator=_name(allocator),
        pool=_name(pool),
        cache=_name(cache),
        page_size=view.page_size,
        size=int(allocator.size),
        rows=view.row_count,
        max_context_len=int(pool.req_to_token.shape[1]),
        size_swa=None if sizes is None else int(sizes),
        sliding_window_size=getattr(cache, "sliding_window_size", None),
        need_sort=bool(getattr(allocator, "need_sort", False)),
        disable=bool(getattr(cache, "disable", not hasattr(cache, "root_node"))),
        state=None if _is_new(view) else state_of(view),
    )


def _name(given: Any) -> str:
    return f"{type(given).__module__}.{type(given).__qualname__}"


def _is_new(view: SystemView) -> bool:
    """Whether everything is free, in the order of a new pool, and the tree empty."""
    books, count = view.allocator, view.page_count
    swa = books.swa
    return (
        (*books.free, *books.release) == tuple(range(1, count + 1))
        and (swa is None or (*swa.free, *swa.release) == tuple(range(1, len(swa.free) + 1)))
        and view.rows.free == tuple(range(view.row_count))
        and not (books.group or view.tree.pages)
    )


def state_of(view: SystemView) -> events.State:
    """What three objects hold, in pages. O(pool + pages × depth)."""
    books = view.allocator
    swa = books.swa or AllocatorView((), (), (), frozenset(), group=False)
    return events.State(
        free=runs_of((*books.free, *books.release)),
        pending=runs_of(books.pending),
        group=books.group,
        rows=[events.LiveRow(row, runs_of(slots)) for row, slots in view.rows.rows.items()],
        free_rows=runs_of(view.rows.free),
        tree=_tree(view),
        swa_free=runs_of((*swa.free, *swa.release)),
        swa_pending=runs_of(swa.pending),
        pairs=list(books.pairs),
    )


def _tree(view: SystemView) -> list[events.TreePage]:
    """The pages of the tree, parents before children."""
    size, digests = view.page_size, dict[Path, bytes]()
    misplaced: Mapping[Path, Collection[int]] = dict(view.misplaced)
    pages = []
    for path, page in sorted(view.tree.pages.items(), key=lambda item: len(item[0][1])):
        extra_key, tokens = path
        parent = digests.get((extra_key, tokens[:-size]), b"")
        before = parent or namespace_seed(namespace_frame(extra_key))
        octets = little_endian(key_words(tokens[-size:]))
        (digests[path],) = next_hashes(before, octets, size)
        slots = misplaced.get(path, range(page.page * size, (page.page + 1) * size))
        id_, above = digests[path][:ID_BYTES], parent[:ID_BYTES]
        pages.append(events.TreePage(id_, above, runs_of(list(slots)), page.locks, page.tombstone))
    return pages
