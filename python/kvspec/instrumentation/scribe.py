"""Actions as events of a flight recorder. Spec: REC, INSTR-2.

What a call was asked is read before it, where it changes it; what came of it, after it.
"""

import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, TypeAlias

from msgspec.structs import replace

from kvspec.errors import ContractError
from kvspec.flight_recorder import FlightRecorder, events
from kvspec.flight_recorder.runs import slot_runs
from kvspec.instrumentation.calls import Arguments, Objects, Options
from kvspec.instrumentation.effects import argument, committed_count, places_of
from kvspec.instrumentation.locks import node_of
from kvspec.instrumentation.sites import Mark, told
from kvspec.instrumentation.views import integers

__all__ = ["Scribe", "runs_of"]

_KNOWN = 65_536
_ID_BYTES = 16
_Facts: TypeAlias = dict[str, Any]


def runs_of(slots: Any) -> events.Runs:
    """Slots as runs [start, stop), in their order: of any device and any shape. O(slots)."""
    try:
        return slot_runs(slots)
    except ContractError:
        return slot_runs([int(slot) for slot in integers(slots)])


def _runs(given: Any) -> events.Runs:
    """The same of an argument that may be anything, since the call was refused."""
    try:
        return runs_of(given)
    except (TypeError, ValueError):
        return []


def _integer(given: Any, default: int = 0) -> int:
    try:
        return operator.index(given)
    except TypeError:
        return default


def _integers(given: Any) -> list[int]:
    try:
        return [_integer(given)] if _is_one(given) else integers(given)
    except (TypeError, ValueError):
        return []


def _is_one(given: Any) -> bool:
    return isinstance(given, int) or getattr(given, "ndim", 1) == 0


class Scribe:
    """Writes down each action of the objects, and what a cache did to the others within it."""

    def __init__(
        self, objects: Objects, recorder: FlightRecorder, lengths: Mapping[int, int]
    ) -> None:
        self._cache, self._table = objects.cache, objects.pool.req_to_token
        self._recorder = recorder
        self._lengths = lengths
        """Of the live rows."""
        self._page_size = int(objects.allocator.page_size)
        self._nodes: OrderedDict[Any, bytes] = OrderedDict()
        """Nodes that were in a result, and the id of the last page of their path."""
        self._numbers: OrderedDict[int, tuple[object, int]] = OrderedDict()
        """Receipts and tickets, and the events that gave them."""
        self._sites: dict[tuple[int, int], tuple[CodeType, str]] = {}
        self._forget()

    def _forget(self) -> None:
        self._freed: events.Runs = []
        self._swa_freed: events.Runs = []
        self._rows_freed: list[int] = []
        self._places: list[events.Written] = []

    # -------------------------------------------------------------------- what a cache does

    def freed(self, slots: Any) -> None:
        """Slots were given to `free`."""
        self._freed += runs_of(slots)

    def swa_freed(self, slots: Any) -> None:
        """Full slots were given to `free_swa`, or to `free` as its second argument."""
        self._swa_freed += runs_of(slots)

    def rows_freed(self, rows: Sequence[int]) -> None:
        """Rows were given back."""
        self._rows_freed += rows

    def written(self, row: int, start: int, slots: Any) -> None:
        """Positions of a row were written."""
        self._places.append(events.Written(row, start, runs_of(slots)))

    def _did(self) -> events.Effects | None:
        if not (self._freed or self._swa_freed or self._rows_freed or self._places):
            return None
        effects = events.Effects(self._freed, self._swa_freed, self._rows_freed, self._places)
        self._forget()
        return effects

    # ------------------------------------------------------------------------------ actions

    def before(self, op: str, args: Arguments, options: Options) -> _Facts:
        """What of an event has to be known before the call."""
        facts: Callable[[Arguments, Options], _Facts] | None = getattr(self, f"_facts_{op}", None)
        return facts(args, options) if facts is not None else {}

    def write(
        self,
        op: str,
        mark: Mark,
        args: Arguments,
        options: Options,
        facts: _Facts,
        result: Any,
        error: BaseException | None = None,
    ) -> None:
        """Record an action: what it returned, or what it raised (INSTR-2)."""
        make: Callable[..., events.Event] | None = getattr(self, f"_{op}", None)
        if make is not None:
            text = "" if error is None else f"{type(error).__name__}: {error}"
            event = make(args, options, facts, result)
            number, at = self._recorder.recorded, self._at(mark)
            self._recorder.record(replace(event, n=number, at=at, error=text, did=self._did()))

    def copied(self, mark: Mark, event: events.Event) -> None:
        """Record that a copy begins or ends."""
        self._recorder.record(replace(event, at=self._at(mark)))

    def _at(self, mark: Mark) -> str:
        """The call site of an action; each is told once, and its code kept, and so its identity."""
        _, _, code, instruction = mark
        key = id(code), instruction
        if key not in self._sites:
            if len(self._sites) == _KNOWN:
                self._sites.clear()
            self._sites[key] = code, told(mark).at
        return self._sites[key][1]

    def _note(self, given: object) -> None:
        """This receipt or ticket is of the event that comes; it is kept, and so its identity."""
        self._numbers[id(given)] = given, self._recorder.recorded
        if len(self._numbers) > _KNOWN:
            self._numbers.popitem(last=False)

    def _number(self, given: object) -> int:
        return self._numbers.get(id(given), (None, -1))[1]

    # --------------------------------------------------------------------------- allocators

    def _alloc(self, args: Arguments, options: Options, facts: _Facts, result: Any) -> events.Event:
        need_size = _integer(argument(args, options, 0, "need_size"))
        return events.Alloc(need_size=need_size, slots=None if result is None else runs_of(result))

    def _alloc_extend(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        return events.AllocExtend(
            prefix_lens=_integers(argument(args, options, 0, "prefix_lens")),
            seq_lens=_integers(argument(args, options, 1, "seq_lens")),
            last_loc=_integers(argument(args, options, 2, "last_loc")),
            extend_num_tokens=_integer(argument(args, options, 3, "extend_num_tokens")),
            slots=None if result is None else runs_of(result),
        )

    def _alloc_decode(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        return events.AllocDecode(
            seq_lens=_integers(argument(args, options, 0, "seq_lens")),
            last_loc=_integers(argument(args, options, 1, "last_loc")),
            slots=None if result is None else runs_of(result),
        )

    def _free(self, args: Arguments, options: Options, facts: _Facts, result: Any) -> events.Event:
        alone = argument(args, options, 1, "swa_index")
        return events.Free(
            slots=_runs(argument(args, options, 0, "free_index")),
            swa_slots=None if alone is None else _runs(alone),
        )

    def _free_swa(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        return events.FreeSwa(slots=_runs(argument(args, options, 0, "free_index")))

    def _move_swa(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        return events.MoveSwa(
            source=_runs(argument(args, options, 1, "src_loc")),
            target=_runs(argument(args, options, 0, "tgt_loc")),
        )

    def _free_group_begin(self, *_: Any) -> events.Event:
        return events.FreeGroupBegin()

    def _free_group_end(self, *_: Any) -> events.Event:
        return events.FreeGroupEnd()

    def _backup_state(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        self._note(result)
        return events.BackupState(ticket=self._recorder.recorded)

    def _restore_state(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        return events.RestoreState(ticket=self._number(argument(args, options, 0, "state")))

    def _clear(self, *_: Any) -> events.Event:
        return events.Clear()

    # --------------------------------------------------------------------------------- rows

    def _alloc_rows(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        need_size = _integer(argument(args, options, 0, "need_size"))
        return events.AllocRows(
            need_size=need_size, rows=None if result is None else integers(result)
        )

    def _free_rows(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        return events.FreeRows(rows=_integers(argument(args, options, 0, "free_index")))

    def _write(self, args: Arguments, options: Options, facts: _Facts, result: Any) -> events.Event:
        indices, slots = argument(args, options, 0, "indices"), argument(args, options, 1, "values")
        try:
            places = [
                events.Written(row, start, runs_of(values))
                for row, start, _, values in places_of(indices, slots)
            ]
        except (TypeError, ValueError):
            places = []
        return events.Write(places=places)

    def _clear_rows(self, *_: Any) -> events.Event:
        return events.ClearRows()

    # -------------------------------------------------------------------------------- cache

    def _key(self, tokens: Any, extra_key: Any) -> events.Key:
        try:
            return self._recorder.key(tokens, self._page_size, extra_key)
        except (ContractError, TypeError, ValueError):
            return events.Key()

    def _facts_match_prefix(self, args: Arguments, options: Options) -> _Facts:
        key = argument(args, options, 0, "key")
        return {"key": self._key(key, options.get("extra_key"))}

    def _match_prefix(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        key: events.Key = facts["key"]
        slots = getattr(result, "device_indices", ())
        self._meet(getattr(result, "last_device_node", None), key, len(slots))
        touch = bool(options.get("touch", True))
        return events.MatchPrefix(key=key, slots=runs_of(slots), touch=touch)

    def _facts_insert(self, args: Arguments, options: Options) -> _Facts:
        key = argument(args, options, 0, "key")
        return {"key": self._key(key, options.get("extra_key"))}

    def _insert(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        key: events.Key = facts["key"]
        prefix_len = result if isinstance(result, int) else getattr(result, "prefix_len", None)
        self._meet(getattr(result, "last_device_node", None), key, key.count)
        slots = _runs(argument(args, options, 1, "value"))
        return events.Insert(key=key, slots=slots, prefix_len=prefix_len)

    def _meet(self, node: Any, key: events.Key, count: int) -> None:
        """A result names a node, which stands for the first `count` tokens of a key."""
        if node is None:
            return
        stop = count // self._page_size * _ID_BYTES
        self._nodes[node] = key.ids[max(stop - _ID_BYTES, 0) : stop]
        if len(self._nodes) > _KNOWN:
            self._nodes.popitem(last=False)

    def _path(self, node: Any) -> tuple[bytes, bool]:
        """The id of the last page of a node's path, and whether it is known."""
        node = node_of(node)
        if node is not None and node is getattr(self._cache, "root_node", self):
            return b"", True
        try:
            return (self._nodes[node], True) if node in self._nodes else (b"", False)
        except TypeError:  # not hashable, so nothing that a cache gave
            return b"", False

    def _request(self, req: Any, tokens: Any) -> _Facts:
        row = getattr(req, "req_pool_idx", None)
        protected = getattr(req, "cache_protected_len", None)
        if protected is None:
            prefix = len(getattr(req, "prefix_indices", ()))
            protected = prefix - prefix % self._page_size
        path, _ = self._path(getattr(req, "last_node", None))
        return {
            "row": _integer(row, -1),
            "key": self._key(tokens, getattr(req, "extra_key", None)),
            "protected": protected,
            "path": path,
        }

    def _facts_cache_unfinished_req(self, args: Arguments, options: Options) -> _Facts:
        req = argument(args, options, 0, "req")
        return self._request(req, getattr(req, "fill_ids", ()))

    def _cache_unfinished_req(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        req, key = argument(args, options, 0, "req"), facts["key"]
        if getattr(req, "last_node", None) is not None:
            self._meet(req.last_node, key, key.count)
        receipt = getattr(req, "lock_receipt", None)
        if receipt is not None:
            self._note(receipt)
        ours = hasattr(self._cache, "view")
        after = getattr(req, "prefix_indices", ()) if ours else self._row(facts["row"], key.count)
        return events.CacheUnfinishedReq(**facts, after=runs_of(after))

    def _row(self, row: int, count: int) -> Any:
        return self._table[row, :count] if 0 <= row < self._table.shape[0] else ()

    def _facts_cache_finished_req(self, args: Arguments, options: Options) -> _Facts:
        req = argument(args, options, 0, "req")
        always = bool(getattr(self._cache, "disable", True)) or hasattr(self._cache, "view")
        if not hasattr(req, "origin_input_ids"):
            return self._request(req, ()) | {"allocated": 0}
        count = committed_count(req, always=always)
        tokens = req.origin_input_ids
        if count != len(tokens):
            tokens = [*integers(tokens), *integers(req.output_ids)][: max(count, 0)]
        facts = self._request(req, tokens)
        return facts | {"allocated": self._lengths.get(facts["row"], 0)}

    def _cache_finished_req(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        return events.CacheFinishedReq(**facts)

    def _inc_lock_ref(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        path, known = self._path(argument(args, options, 0, "node"))
        if hasattr(result, "delta"):
            self._note(result)
        return events.IncLockRef(path=path, known=known)

    def _dec_lock_ref(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        given = argument(args, options, 0, "node")
        path, known = self._path(given)
        lock = self._number(given)
        self._numbers.pop(id(given), None)
        return events.DecLockRef(path=path, known=known, lock=lock)

    def _evict(self, args: Arguments, options: Options, facts: _Facts, result: Any) -> events.Event:
        return events.Evict(
            num_tokens=_integer(argument(args, options, 0, "num_tokens", "full_num_tokens")),
            swa_num_tokens=_integer(argument(args, options, 1, "swa_num_tokens")),
        )

    def _evict_swa(
        self, args: Arguments, options: Options, facts: _Facts, result: Any
    ) -> events.Event:
        chunk = argument(args, options, 2, "attention_chunk_size")
        window = options.get("sliding_window_size")
        req = argument(args, options, 0, "req")
        return events.EvictSwa(
            row=_integer(getattr(req, "req_pool_idx", None), -1),
            prelen=_integer(argument(args, options, 1, "prelen")),
            attention_chunk_size=None if chunk is None else _integer(chunk),
            sliding_window_size=None if window is None else _integer(window),
        )

    def _reset(self, *_: Any) -> events.Event:
        return events.Reset()
