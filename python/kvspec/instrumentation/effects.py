"""What calls do to pages, rows and locks, told to a ledger. Spec: INSTR, LEDGER.

The methods are named after the operations: `before_free` is called before a `free`, `after_free`
after it, and `own_inc_lock_ref` after one that a cache makes itself.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from kvspec.instrumentation.calls import Arguments, Hooks, Objects, Options
from kvspec.instrumentation.fills import Fills
from kvspec.instrumentation.locks import Locks
from kvspec.instrumentation.sites import Mark
from kvspec.instrumentation.views import (
    allocator_view,
    integers,
    node_path,
    pending_slots,
    read_tree,
    rooted,
    window_slots,
)
from kvspec.interfaces.ownership_ledger import OwnershipLedger
from kvspec.interfaces.prefix_cache import Path
from kvspec.interfaces.slot_allocator import Slots

__all__ = ["Did", "Effects", "argument", "committed_count", "places_of"]

_TICKETS = 8
_TAKEN = 1024
_TAKES_ROWS = frozenset({"cache_unfinished_req", "cache_finished_req"})
_FULL, _WINDOWS, _HOST = "full", "swa", "host"


class Did(Protocol):
    """Who wants to know what a cache does to the others."""

    def freed(self, slots: Any) -> None: ...

    def swa_freed(self, slots: Any) -> None: ...

    def rows_freed(self, rows: Sequence[int]) -> None: ...

    def written(self, row: int, start: int, slots: Any) -> None: ...


class _Ticket(NamedTuple):
    """What was handed out since `backup_state` gave this."""

    state: object
    taken: list[Slots]


class _Finishing(NamedTuple):
    """A request that a cache is about to take over."""

    row: int
    stop: int
    receipt: object
    lock_count: int
    """Locks that the cache had taken and given back by itself, before."""


def argument(args: Arguments, options: Options, index: int, *names: str) -> Any:
    """An argument by its place or by one of its names; None if it was not given."""
    if len(args) > index:
        return args[index]
    return next((options[name] for name in names if name in options), None)


def committed_count(req: Any, *, always: bool) -> int:
    """How many tokens of a finished request have KV: the last sampled one has none.

    Without output it is the last of the prompt, unless `always` counts that.
    """
    output = len(req.output_ids) - 1
    return len(req.origin_input_ids) + (max(output, 0) if always else output)


def _here(slots: Any) -> Any:
    """Slots on the CPU."""
    return slots.cpu() if isinstance(slots, Tensor) and not slots.is_cpu else slots


class Effects:
    """What the calls on three objects do, entered in a ledger as they return."""

    def __init__(
        self,
        objects: Objects,
        ledger: OwnershipLedger | None,
        fills: Fills | None,
    ) -> None:
        self._allocator, self._pool, self._cache = objects.allocator, objects.pool, objects.cache
        self._ledger, self._fills = ledger, fills
        self.did: Did | None = None
        self.page_size = int(objects.allocator.page_size)
        self.windowed = hasattr(objects.allocator, "size_swa")
        self._foreign = not hasattr(objects.allocator, "view")
        self.foreign_rows = not hasattr(objects.pool, "view")
        """Whether a row may be written past `write`."""
        self._foreign_cache = not hasattr(objects.cache, "view")
        self.shares = rooted(objects.cache) or not self._foreign_cache
        if getattr(objects.cache, "disable", False):
            self.shares = False
        self._counts_last = not (self._foreign_cache and self.shares)
        """Whether the cache takes the last token of a prompt that has no output."""
        self._host_page = int(objects.host.page_size) if objects.host is not None else 1
        self._tickets: deque[_Ticket] = deque(maxlen=_TICKETS)
        self._finishing: _Finishing | None = None
        self._lock_count = 0
        self._number_paths: dict[int, tuple[Any, int]] = {}
        self.by_cache = False
        """Whether what happens is an effect of a call on the cache."""
        self.mark: Mark | None = None
        """The action that has begun."""
        self.locks = Locks()
        self.lengths: dict[int, int] = {}
        """Live rows, and how far they are written."""
        self.requests: dict[int, Any] = {}
        """Requests that the cache has seen, by their rows."""
        self.forgotten = -1
        """The last action in which a cache forgot its tree and gave nothing back."""

    def hooks(self, op: str) -> Hooks:
        """What is made of the calls of a method; a node says itself what it was found for."""
        if op == "match_prefix" and (not self._foreign_cache or rooted(self._cache)):
            return Hooks()
        return Hooks(*(getattr(self, f"{when}_{op}", None) for when in ("before", "after", "own")))

    # ------------------------------------------------------------------------------ allocators

    def _taken(self, slots: Any, named: Any) -> None:
        """`slots` were handed out; `named` are those that begin a page, or all of them."""
        ledger = self._ledger
        if self._fills is not None:
            self._fills.fresh(slots)
        if ledger is not None:
            ledger.take(_FULL, _here(named))
            if self.windowed:
                windows = window_slots(self._allocator, _first_slots(named, self.page_size))
                ledger.take(_WINDOWS, _present(windows))
        if self._tickets:
            self._note_taken(named)

    def _note_taken(self, named: Any) -> None:
        if len(self._tickets[0].taken) == _TAKEN:  # nobody comes back for it
            self._tickets.popleft()
        for ticket in self._tickets:
            ticket.taken.append(named)

    def _given(self, slots: Any, windows: Any) -> None:
        some = _count(slots) > 0
        if self._ledger is not None:
            if some:
                self._ledger.give(_FULL, _here(slots))
            if windows is not None:
                self._ledger.give(_WINDOWS, _present(windows))
        if self._fills is not None and some:
            self._fills.freed(slots)

    def _windows(self, slots: Any) -> Tensor | None:
        """The window slots that go with full slots, before they are given back."""
        if not self.windowed or slots is None:
            return None
        try:
            return window_slots(self._allocator, slots) if _count(slots) else None
        except (ValueError, TypeError, IndexError, RuntimeError):  # the call will say so
            return None

    def after_alloc(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """Slots were handed out, or refused."""
        if result is not None:
            self._taken(result, result)

    def after_alloc_extend(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """The same, some of them behind what a request has on its last page."""
        if result is None:
            return
        size = self.page_size
        prefixes = args[0] if args else options.get("prefix_lens")
        if type(prefixes) is not list:
            prefixes = integers(prefixes)
        if len(prefixes) == 1 and prefixes[0] % size == 0:
            pages = -(-result.numel() // size)  # the rest of each is read when it is written
            self._taken(result, result.as_strided((pages,), (size,)))
            return
        parts, start = [], 0
        lengths = integers(argument(args, options, 1, "seq_lens"))
        for prefix, length in zip(prefixes, lengths, strict=True):
            stop = start + length - prefix
            parts.append(result[min(start + -prefix % size, stop) : stop])
            start = stop
        self._taken(result, torch.cat(parts))

    def after_alloc_decode(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """One slot each; one that begins a page is new."""
        if result is not None:
            begun = [slot for slot in integers(result) if slot % self.page_size == 0]
            self._taken(result, begun)

    def before_free(self, args: Arguments, options: Options) -> Any:
        """The window slots that go with them."""
        if not self.windowed:
            return None
        if self._foreign and not self._allocator.is_not_in_free_group:
            return None
        windows = self._windows(argument(args, options, 0, "free_index"))
        alone = self._windows(argument(args, options, 1, "swa_index"))
        both = [part for part in (windows, alone) if part is not None]
        return torch.cat(both) if both else None

    def after_free(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """Slots were given back, and their window slots."""
        slots = args[0] if args else options["free_index"]
        self._given(slots, seen)
        if self.did is not None and self.by_cache:
            self.did.freed(slots)
            alone = argument(args, options, 1, "swa_index")
            if alone is not None:
                self.did.swa_freed(alone)

    def before_free_swa(self, args: Arguments, options: Options) -> Any:
        """The window slots that go with them."""
        return self._windows(argument(args, options, 0, "free_index"))

    def after_free_swa(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """Window slots alone were given back."""
        if seen is not None and self._ledger is not None:
            self._ledger.give(_WINDOWS, _present(seen))
        if self.did is not None and self.by_cache:
            self.did.swa_freed(argument(args, options, 0, "free_index"))

    def after_free_group_begin(self, *_: Any) -> None:
        """What is given back from here on is pending."""
        if self._ledger is not None:
            self._ledger.open_group(_FULL)
            if self.windowed and not self._foreign:
                self._ledger.open_group(_WINDOWS)

    def before_free_group_end(self, args: Arguments, options: Options) -> Any:
        """What a group of somebody else's gives back at its end."""
        if not self._foreign:
            return None
        slots = pending_slots(self._allocator)
        again = [slot for given in self._allocator.free_group for slot in integers(given)]
        closed = bool(self._allocator.is_not_in_free_group)
        return again if closed else [], self._windows(again if closed else slots)

    def after_free_group_end(
        self, args: Arguments, options: Options, seen: Any, result: Any
    ) -> None:
        """What is pending is free."""
        if self._ledger is None:
            return
        self._ledger.close_group(_FULL)
        if self._foreign:
            again, windows = seen
            self._given(again, windows)
        elif self.windowed:
            self._ledger.close_group(_WINDOWS)

    def after_backup_state(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """What is handed out from here on can be undone."""
        self._tickets.append(_Ticket(result, []))

    def before_restore_state(self, args: Arguments, options: Options) -> Any:
        """What it will undo, with the window slots; None if that is not known."""
        state = argument(args, options, 0, "state")
        taken = [ticket.taken for ticket in self._tickets if ticket.state is state]
        return [(slots, self._windows(slots)) for slots in taken[-1]] if taken else None

    def after_restore_state(
        self, args: Arguments, options: Options, seen: Any, result: Any
    ) -> None:
        """What was handed out since then is free again."""
        self._tickets.clear()
        for slots, windows in seen if seen is not None else [(self._free_but_held(), None)]:
            self._given(slots, windows)

    def _free_but_held(self) -> list[int]:
        """A slot of each page that is free, and that the ledger does not know of. O(pool)."""
        if self._ledger is None:
            return []
        view = allocator_view(self._allocator)
        owners = {
            page: self._ledger.owner(_FULL, page).kind for page in (*view.free, *view.release)
        }
        return [page * self.page_size for page, kind in owners.items() if kind != "free"]

    def after_clear(self, *_: Any) -> None:
        """Everything is free."""
        self._tickets.clear()
        if self._ledger is not None:
            self._ledger.clear(_FULL)
            if self.windowed:
                self._ledger.clear(_WINDOWS)
        if self._fills is not None:
            self._fills.all_freed()

    def after_alloc_host(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """Slots of the next tier were handed out."""
        if result is not None and self._ledger is not None:
            self._ledger.take(_HOST, self._host_slots(result))

    def after_free_host(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """They were given back."""
        if self._ledger is not None and args:
            self._ledger.give(_HOST, self._host_slots(args[0]))

    def _host_slots(self, slots: Any) -> list[int]:
        """As a ledger counts them, which has a sink."""
        return [slot + self._host_page for slot in integers(slots)]

    # ------------------------------------------------------------------------------------ rows

    def after_alloc_rows(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """Rows were handed out; nothing is written to them."""
        if result is None:
            return
        rows = result if type(result) is list else integers(result)
        for row in rows:
            self.lengths[row] = 0
        if self._ledger is not None:
            self._ledger.take_rows(rows)

    def after_free_rows(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """Rows were given back; what a cache took of them it has by now."""
        given = args[0] if args else options["free_index"]
        rows = [given] if isinstance(given, int) else _rows(given)
        for row in rows:
            self.lengths.pop(row, None)
            self.requests.pop(row, None)
            if self._finishing is not None and self._finishing.row == row:
                self._adopt(self._finishing)
        if self._ledger is not None:
            self._ledger.give_rows(rows)
        if self.did is not None and self.by_cache:
            self.did.rows_freed(rows)

    def after_write(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """Positions of rows name slots."""
        if len(args) == 2:
            indices, slots = args
        else:
            indices = argument(args, options, 0, "indices")
            slots = argument(args, options, 1, "values")
        if not isinstance(indices, tuple) or len(indices) != 2:
            return  # it shows when the rows are read
        row, positions = indices
        if type(positions) is slice and positions.step is None:
            start, count = positions.start or 0, _count(slots)
            if count:
                self._written(int(row), start, start + count, slots)
            return
        for place, start, stop, values in places_of(indices, slots):
            self._written(place, start, stop, values)

    def _written(self, row: int, start: int, stop: int, slots: Any) -> None:
        if stop > self.lengths.get(row, 0):
            self.lengths[row] = stop
        if self._ledger is not None:
            self._ledger.write(row, start, _here(slots))
        if self.did is not None and self.by_cache:
            self.did.written(row, start, slots)

    def after_clear_rows(self, *_: Any) -> None:
        """Every row is free."""
        self.lengths.clear()
        self.requests.clear()
        if self._ledger is not None:
            self._ledger.clear_rows()

    # ----------------------------------------------------------------------------------- cache

    def _begin_request(self, req: Any, stop: int) -> _Finishing | None:
        """A request comes to the cache, which adopts up to `stop`."""
        if req.req_pool_idx is None:
            return None
        receipt = getattr(req, "lock_receipt", None)
        return _Finishing(
            int(req.req_pool_idx), stop if self.shares else 0, receipt, self._lock_count
        )

    def unseen(self, op: str, args: Arguments, options: Options) -> tuple[int, int, Any] | None:
        """What a row got past `write`, as from a kernel, and a cache is about to take: (row, start,
        slots). O(tokens it got).
        """
        if op not in _TAKES_ROWS:
            return None
        req = argument(args, options, 0, "req")
        if not _is_request(req) or req.req_pool_idx is None:
            return None
        row = int(req.req_pool_idx)
        count, known = self._count_of(op, req), self.lengths.get(row)
        if known is None or known >= count:
            return None
        return row, known, _here(self._pool.req_to_token[row, known:count])

    def _count_of(self, op: str, req: Any) -> int:
        """How many tokens of a request have KV."""
        if op == "cache_unfinished_req":
            return len(req.fill_ids)
        return committed_count(req, always=self._counts_last)

    def written(self, row: int, start: int, slots: Any) -> None:
        """Positions of a row name slots."""
        self._written(row, start, start + _count(slots), slots)

    def _adopt(self, request: _Finishing) -> None:
        self._finishing = None
        if self._ledger is not None and request.stop > 0:
            self._ledger.adopt(request.row, request.stop)

    def before_cache_finished_req(self, args: Arguments, options: Options) -> Any:
        """What the cache will have of its row."""
        req = args[0] if args else options.get("req")
        if _is_request(req):
            count = committed_count(req, always=self._counts_last)
            self._finishing = self._begin_request(req, count)
        return self._finishing

    def after_cache_finished_req(
        self, args: Arguments, options: Options, seen: Any, result: Any
    ) -> None:
        """The cache has it, and the request's lock is open no more."""
        if self._finishing is not None:  # the row is still live
            self._adopt(self._finishing)
        if seen is not None and self.shares and seen.lock_count == self._lock_count:
            self._unlocked(seen)

    def before_cache_unfinished_req(self, args: Arguments, options: Options) -> Any:
        """What the cache will have of its row."""
        req = argument(args, options, 0, "req")
        if not _is_request(req):
            return None
        count = len(req.fill_ids)
        return self._begin_request(req, count - count % self.page_size)

    def after_cache_unfinished_req(
        self, args: Arguments, options: Options, seen: Any, result: Any
    ) -> None:
        """The cache has it, and the request's lock has moved."""
        if seen is None or not self.shares:
            return
        req = argument(args, options, 0, "req")
        self.requests[seen.row] = req
        self._adopt(seen)
        if seen.lock_count != self._lock_count:
            return  # the cache moved the lock by calls of its own
        receipt = getattr(req, "lock_receipt", None)
        if receipt is not None and receipt is not seen.receipt:
            self._unlocked(seen)
            self.locks.opened(receipt, receipt.node, self.mark)

    def _unlocked(self, request: _Finishing) -> None:
        if request.receipt is not None:
            self.locks.closed(request.receipt, self.path_of)

    def after_insert(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """The tree has what is not the caller's any more."""
        if self._ledger is None or not self.shares:
            return
        slots = argument(args, options, 1, "value")
        if slots is None:
            return
        slots = _here(slots)
        for start, stop in self._adopted(result, slots):
            self._ledger.adopt_slots(slots[start:stop])

    def _adopted(self, result: Any, slots: Any) -> list[tuple[int, int]]:
        """Positions of a caller's slots that the tree has now: beyond what it had, and what it put
        in the place of tombstones.
        """
        if not isinstance(result, int):
            return list(result.adopted)
        adopted = [(result, len(slots))] if result < len(slots) else []
        if self.windowed and self._ledger is not None:
            resident = set(allocator_view(self._allocator).held)
            mine = read_tree(self._cache, 1).view.pages.values() if result else ()
            named = {page.page for page in mine} & resident
            adopted += [
                (at, at + 1) for at, slot in enumerate(integers(slots[:result])) if slot in named
            ]
        return adopted

    def after_match_prefix(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """A node that is a number says nothing by itself: what it was found for does."""
        node = getattr(result, "last_device_node", None)
        if isinstance(node, int):
            key = argument(args, options, 0, "key")
            self._number_paths[node] = key, len(result.device_indices)

    def after_inc_lock_ref(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """A lock is open."""
        if not self.shares:
            return
        node = args[0] if args else options["node"]
        receipt = node if self._foreign_cache else result
        if receipt is not None:
            self.locks.opened(receipt, node, self.mark)

    def own_inc_lock_ref(self, args: Arguments, options: Options, result: Any) -> None:
        """The cache took one itself."""
        self._lock_count += 1
        self.after_inc_lock_ref(args, options, None, result)

    def after_dec_lock_ref(self, args: Arguments, options: Options, seen: Any, result: Any) -> None:
        """A lock is open no more."""
        given = argument(args, options, 0, "node")
        if self.shares and given is not None:
            self.locks.closed(given, self.path_of)

    def own_dec_lock_ref(self, args: Arguments, options: Options, result: Any) -> None:
        """The cache gave one back itself."""
        self._lock_count += 1
        self.after_dec_lock_ref(args, options, None, result)

    def after_reset(self, *_: Any) -> None:
        """No lock is open; somebody else's cache forgets its pages without giving them back."""
        self.locks.begin(())
        if self.mark is not None and self._foreign_cache:
            self.forgotten = self.mark[0]

    def path_of(self, node: Any) -> Path | None:
        """The path that a node, receipt or number names, None if nobody knows. O(tokens)."""
        if isinstance(node, int):
            if node not in self._number_paths:
                return None
            key, count = self._number_paths[node]
            return None, tuple(integers(getattr(key, "token_ids", key)))[:count]
        if hasattr(self._cache, "resolve"):
            return cast("Path | None", self._cache.resolve(node))
        return node_path(node) if hasattr(node, "parent") else None

    def give_up(self) -> None:
        """The action raised: what was about to be taken over was not."""
        self._finishing = None


def _is_request(req: Any) -> bool:
    """Whether a cache can make something of it; what it refuses may be anything."""
    return hasattr(req, "req_pool_idx") and hasattr(req, "fill_ids") and hasattr(req, "output_ids")


def _rows(given: Any) -> list[int]:
    return [int(given)] if getattr(given, "ndim", 1) == 0 else integers(given)


def places_of(indices: Any, slots: Any) -> list[tuple[int, int, int, Any]]:
    """What `write` names, (row, slice), (row, positions) or (rows, positions), as (row, start,
    stop, slots) without holes. O(1) for a slice, else O(positions).
    """
    row, positions = indices
    if isinstance(positions, slice):
        start, count = positions.start or 0, _count(slots)
        if positions.step in (None, 1):
            return [(int(row), start, start + count, slots)] if count else []
        positions = range(start, start + count * positions.step, positions.step)
    at, several = integers(positions), getattr(row, "ndim", int(hasattr(row, "__len__")))
    rows = integers(row) if several else [int(row)] * len(at)
    places: list[tuple[int, int, int, list[int]]] = []
    for place, position, slot in zip(rows, at, integers(slots), strict=True):
        if places and places[-1][0] == place and places[-1][2] == position:
            _, start, _, before = places.pop()
            places.append((place, start, position + 1, [*before, slot]))
        else:
            places.append((place, position, position + 1, [slot]))
    return places


def _count(slots: Any) -> int:
    """How many slots there are; `len` of a tensor costs a microsecond."""
    return slots.numel() if isinstance(slots, Tensor) else len(slots)


def _first_slots(slots: Any, page_size: int) -> Any:
    """A slot of each page, of slots that begin theirs."""
    if page_size == 1 or not isinstance(slots, Tensor):
        return slots
    return slots[slots % page_size == 0]


def _present(windows: Tensor) -> Tensor:
    present: Tensor = _here(windows[windows > 0])
    return present.to(torch.int64)
