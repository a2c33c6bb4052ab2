"""Two systems that are called as one: oracle and core, each a pool of rows, an allocator, a cache.

A handle, a receipt or a ticket is an object on either side. Only what it resolves to is compared,
never the object or its number.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from kvspec.conformance.lockstep.config import Config
from kvspec.errors import ContractError
from kvspec.interfaces.prefix_cache import NodeHandle

__all__ = ["Answer", "Divergence", "Pair", "Request", "Twin"]


class Divergence(Exception):
    """Oracle and core disagree, or both do what they must not."""

    def __init__(self, where: str, oracle: object, core: object) -> None:
        super().__init__(where, oracle, core)
        self.where, self.oracle, self.core = where, oracle, core

    def __str__(self) -> str:
        return f"{self.where}\n  oracle: {self.oracle!r}\n  core:   {self.core!r}"


class Twin(NamedTuple):
    """One thing, in both systems."""

    oracle: Any
    core: Any


class Answer(NamedTuple):
    """What both systems answered."""

    value: Any
    """What can be compared: numbers, and what handles resolve to."""
    given: Twin
    """The objects themselves."""
    error: str | None
    """Clause id of the ContractError, if there was one."""


class Request:
    """A request as one of the two caches sees it: kvspec.interfaces.prefix_cache.Req."""

    def __init__(self, tokens: list[int], row: int, extra_key: Any) -> None:
        self.origin_input_ids, self.fill_ids = tokens, tokens
        self.output_ids: list[int] = []
        self.req_pool_idx: int | None = row
        self.extra_key = extra_key
        self.prefix_indices = torch.empty(0, dtype=torch.int64)
        self.last_node: NodeHandle | None = None
        self.cache_protected_len = 0
        self.lock_receipt: Any = None


def _slots(_: Any, result: Any) -> Any:
    if not isinstance(result, torch.Tensor):
        return result
    if result.dtype is not torch.int64:
        return str(result.dtype), result.tolist()
    return result.tolist()


def _path(cache: Any, node: Any) -> Any:
    return None if node is None else cache.resolve(node)


def _match(cache: Any, result: Any) -> Any:
    nodes = _path(cache, result.last_device_node), _path(cache, result.last_host_node)
    return _slots(cache, result.device_indices), *nodes, result.host_hit_length


def _ranges(parts: Any) -> list[list[tuple[int, ...]]]:
    return [[tuple(range_) for range_ in part] for part in parts]


def _insert(cache: Any, result: Any) -> Any:
    path = _path(cache, result.last_device_node)
    ranges = result.shared, result.adopted, result.duplicate, result.tail
    windows = None if result.swa is None else _ranges(result.swa)
    return result.prefix_len, path, *_ranges(ranges), windows


def _evicted(_: Any, result: Any) -> Any:
    return result if isinstance(result, int) else tuple(result)


def _receipt(cache: Any, result: Any) -> Any:
    return result.delta, _path(cache, result.node), result.swa_uuid is None


_COMPARABLE: dict[str, Callable[[Any, Any], Any]] = {
    "alloc": _slots,
    "alloc_decode": _slots,
    "alloc_extend": _slots,
    "backup_state": lambda *_: "ticket",
    "evict": _evicted,
    "inc_lock_ref": _receipt,
    "insert": _insert,
    "match_prefix": _match,
    "row": _slots,
    "translate_loc_from_full_to_swa": _slots,
}


class Pair:
    """Both systems, and their states after the last operation."""

    def __init__(self, config: Config, oracle: Any, core: Any) -> None:
        self.config, self.namespaces = config, Twin(oracle, core)
        self.allocator = self._allocators(config.page_count, config.window_pages)
        self.other_allocator = self._allocators(2, 2)
        self.rows = Twin(
            *(
                side.ReqToTokenPool(
                    size=config.rows,
                    max_context_len=config.request_pages * config.page_size,
                    device="cpu",
                    enable_memory_saver=False,
                )
                for side in self.namespaces
            )
        )
        self.cache = self._caches(self.rows, self.allocator)
        nobodys = self.other_allocator if config.memory == "swachunk" else Twin(None, None)
        self.other_cache = self._caches(Twin(None, None), nobodys)
        self.messages: dict[str, tuple[str, str]] = {}
        """Texts of errors that differ although the clause is the same, by clause."""
        self._reports: Twin = Twin([], [])
        """What the rooms reported since the last comparison."""
        if config.observed:
            for room in (self.allocator, self.rows, self.cache):
                for subject, reports in zip(room, self._reports, strict=True):
                    subject.attach(reports.append)
        self.states = Twin(*map(self._state, range(2)))

    def _allocators(self, page_count: int, window_count: int) -> Twin:
        page_size = self.config.page_size
        arguments: dict[str, Any] = {
            "size": page_count * page_size,
            "dtype": torch.bfloat16,
            "device": "cpu",
            "kvcache": None,
            "need_sort": self.config.need_sort,
        }
        if self.config.windowed:
            arguments |= {"size_swa": window_count * page_size, "page_size": page_size}
            return self._made("SWATokenToKVPoolAllocator", arguments)
        if page_size == 1:
            return self._made("TokenToKVPoolAllocator", arguments)
        return self._made("PagedTokenToKVPoolAllocator", arguments | {"page_size": page_size})

    def _caches(self, rows: Twin, allocator: Twin) -> Twin:
        arguments: dict[str, Any] = {
            "req_to_token_pool": rows,
            "token_to_kv_pool_allocator": allocator,
            "page_size": self.config.page_size,
        }
        if self.config.memory == "swachunk":
            return self._made("SWAChunkCache", arguments)
        arguments["disable"] = False
        if self.config.memory == "swa":
            arguments["sliding_window_size"] = self.config.window
            return self._made("SWARadixCache", arguments)
        arguments["enable_kv_cache_events"] = False
        arguments["eviction_policy"] = self.config.policy
        arguments["eviction_granularity"] = self.config.granularity
        return self._made("RadixCache", arguments)

    def _made(self, name: str, arguments: Mapping[str, Any]) -> Twin:
        """An object of this class on either side; twins among the arguments are split."""
        return Twin(
            *(
                getattr(side, name)(
                    **{k: v[i] if type(v) is Twin else v for k, v in arguments.items()}
                )
                for i, side in enumerate(self.namespaces)
            )
        )

    def call(self, subjects: Twin, name: str, *args: Any, **kwargs: Any) -> Answer:
        """Make a legal call on both; twins among the arguments are split. Results must agree."""
        answer = self._call(subjects, name, *args, **kwargs)
        if answer.error is not None:
            raise Divergence(f"{name} refuses a legal call", answer.error, answer.error)
        return answer

    def _call(self, subjects: Twin, name: str, *args: Any, **kwargs: Any) -> Answer:
        outcomes: list[tuple[Any, str | None]] = []
        texts: list[str] = []
        given: list[Any] = []
        for side in range(2):
            own = [arg[side] if type(arg) is Twin else arg for arg in args]
            try:
                result = getattr(subjects[side], name)(*own, **kwargs)
            except ContractError as error:
                outcomes.append((None, error.clause))
                texts.append(str(error))
                given.append(None)
            except Exception as error:
                outcomes.append((None, f"{type(error).__name__}: {error}"))
                given.append(None)
            else:
                comparable = _COMPARABLE.get(name)
                outcomes.append(
                    (comparable(subjects[side], result) if comparable else result, None)
                )
                given.append(result)
        if outcomes[0] != outcomes[1]:
            raise Divergence(name, *outcomes)
        value, error_ = outcomes[0]
        if error_ is not None:
            if len(texts) < 2:
                raise Divergence(f"{name} raises what is not a ContractError", *outcomes)
            if texts[0] != texts[1]:
                self.messages.setdefault(error_, (texts[0], texts[1]))
        return Answer(value, Twin(*given), error_)

    def compare(self, where: str, read: Callable[[int], Any]) -> Any:
        """Read the same thing on both sides, by the number of the side; they must agree."""
        oracle, core = read(0), read(1)
        if oracle != core:
            raise Divergence(where, oracle, core)
        return oracle

    def _state(self, side: int) -> tuple[int, ...]:
        allocator, cache = self.allocator[side], self.cache[side]
        state = (
            allocator.digest(),
            cache.digest(),
            allocator.available_size(),
            self.rows[side].available_size(),
            cache.evictable_size(),
            cache.protected_size(),
            cache.total_size(),
        )
        if not self.config.windowed:
            return state
        return (
            *state,
            allocator.full_available_size(),
            allocator.swa_available_size(),
            cache.full_evictable_size(),
            cache.full_protected_size(),
            cache.swa_evictable_size(),
            cache.swa_protected_size(),
        )

    def _compare_reports(self) -> None:
        oracle, core = (
            [(room, name, slots.tolist(), count) for room, name, slots, count in reports]
            for reports in self._reports
        )
        if oracle != core:
            raise Divergence("reports to the observer", oracle, core)
        self._reports.oracle.clear()
        self._reports.core.clear()

    def compare_states(self) -> None:
        """Compare digests and sizes, and what was reported. O(pool)."""
        if self.config.observed:
            self._compare_reports()
        states = Twin(self._state(0), self._state(1))
        if states.oracle != states.core:
            self.compare_views()
            raise Divergence("digests or sizes", *states)
        self.states = states

    def compare_views(self) -> None:
        """Compare the full views, and let both check their books. O(pool)."""
        self.compare("view of the allocator", lambda side: tuple(self.allocator[side].view()))
        self.compare("view of the rows", self.rows_view)
        self.compare("view of the cache", self._cache_view)
        if self.config.windowed:
            self.compare("mapping", lambda n: self.allocator[n].full_to_swa_index_mapping.tolist())
        for room in (self.allocator, self.rows, self.cache):
            for side in range(2):
                try:
                    room[side].check()
                except ContractError as error:
                    raise Divergence(f"check of side {side}", str(error), "") from error

    def rows_view(self, side: int) -> tuple[tuple[int, ...], dict[int, tuple[int, ...]]]:
        """The view of one side's request pool."""
        view = self.rows[side].view()
        return tuple(view.free), dict(view.rows)

    def _cache_view(self, side: int) -> tuple[str, dict[Any, tuple[Any, ...]], tuple[Any, ...]]:
        view = self.cache[side].view()
        pages: Mapping[Any, Any] = view.pages
        shown = {path: tuple(page) for path, page in pages.items()}
        return view.granularity, shown, tuple(view.receipts)

    def refused(self, subjects: Twin, name: str, *args: Any, **kwargs: Any) -> str:
        """Make an illegal call: both must raise ContractError for one clause, and not change."""
        rows = self.rows_view(0)
        answer = self._call(subjects, name, *args, **kwargs)
        if answer.error is None:
            raise Divergence(f"{name} accepts an illegal call", answer.value, answer.value)
        for side in range(2):
            after = self._state(side)
            if after != self.states[side]:
                raise Divergence(f"{name} raised {answer.error} and changed", self.states, after)
        if self.compare("view of the rows", self.rows_view) != rows:
            raise Divergence(f"{name} raised {answer.error} and changed rows", rows, "changed")
        return answer.error
