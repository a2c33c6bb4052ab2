"""Faults planted into every allocator, under every cache, in every mode. Spec: CHECK-22.

Ours refuse what breaks a clause, so what is tested are their subclasses that do not (`careless`).
A fault is seen if it is reported as what it is, with its page, and nothing else is reported.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch

from kvspec.errors import MemoryLeakError
from kvspec.instrumentation import instrument
from kvspec.interfaces.memory_checker import Report, SelfTestResult
from kvspec.memory_checker.careless import careless, careless_cache
from kvspec.memory_checker.check import Level, check_memory
from kvspec.replay import Request

__all__ = ["NOTHING", "PLANTS", "SelfTestResult", "Setting", "self_test", "settings"]

PAGES, ROWS = 8, 4
NOTHING = "nothing"
"""What is planted into a system that is to stay sound."""


Look: TypeAlias = Callable[..., None]
"""What takes the arguments of `check_memory`, and raises as it does."""


class Setting(NamedTuple):
    """What is built, and in what state."""

    allocator: str
    page_size: int
    need_sort: bool
    cache: str
    options: Mapping[str, object]
    """Of the constructor of the cache."""
    busy: bool
    group: bool

    @property
    def shares(self) -> bool:
        """Whether the cache keeps anything."""
        return "Chunk" not in self.cache and not self.options.get("disable", False)

    @property
    def windows(self) -> bool:
        """Whether there is a window pool."""
        return self.allocator.startswith("SWA")

    @property
    def named_cache(self) -> str:
        """Its class and what is special, as a table calls it."""
        granularity = self.options.get("eviction_granularity")
        special = "disabled" if self.options.get("disable") else f"{granularity}s"
        return self.cache if special == "Nones" else f"{self.cache}, {special}"

    @property
    def mode(self) -> str:
        """As a table calls it."""
        return f"{'busy' if self.busy else 'idle'}{', free group' * self.group}"


class Planted(NamedTuple):
    """Where a fault was put."""

    page: int
    row: int | None = None
    """A live row that is touched by it."""


class System:
    """Pools, a cache and requests, with a page or two of each owner."""

    def __init__(self, impl: Any, setting: Setting, level: Level, look: Look) -> None:
        self.setting, self.level, self._look = setting, level, look
        size = setting.page_size
        memory: dict[str, object] = {"dtype": torch.float16, "device": "cpu", "kvcache": None}
        memory["need_sort"] = setting.need_sort
        if setting.windows:
            memory["size_swa"] = PAGES * size
        if setting.allocator != "TokenToKVPoolAllocator":
            memory["page_size"] = size
        kind = careless(getattr(impl, setting.allocator))
        self.allocator = kind(size=PAGES * size, **memory)
        self.rows = impl.ReqToTokenPool(
            size=ROWS, max_context_len=PAGES * size, device="cpu", enable_memory_saver=False
        )
        cache_kind = careless_cache(getattr(impl, setting.cache))
        self.cache = cache_kind(
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=size,
            **setting.options,
        )
        self.reqs: list[Request] = []
        self.reserved: list[int] = []
        self.instrument: Any = None
        if level == "ledger":
            self.instrument = instrument(self.cache, self.allocator, self.rows)
        self._fill()

    def _fill(self) -> None:
        """A page or two of each owner that there is in this mode."""
        self.cache.cache_finished_req(self.start(1, 2))
        self.reqs.clear()
        if self.setting.busy:
            self.start(1, 3)
        if self.setting.group:
            self.allocator.free_group_begin()
            self.allocator.free(self.allocator.alloc(self.setting.page_size))

    def start(self, *pages: int) -> Request:
        """Admit a request with a token page for each of these numbers."""
        size = self.setting.page_size
        tokens = [page * size + offset for page in pages for offset in range(size)]
        found, node, *_ = self.cache.match_prefix(tokens)
        receipt = None if node is None else self.cache.inc_lock_ref(node)
        prefix = len(found)
        (row,) = self.rows.alloc(1)
        self.rows.write((row, slice(0, prefix)), found)
        slots = self.allocator.alloc(len(tokens) - prefix)
        self.rows.write((row, slice(prefix, len(tokens))), slots)
        req = Request(tokens, row, found, node, receipt, prefix)
        self.reqs.append(req)
        return req

    def own(self, req: Request) -> list[int]:
        """The slots of the last page of a request's row."""
        slots: list[int] = self.rows.row(req.req_pool_idx)[-self.setting.page_size :].tolist()
        return slots

    def page(self, slots: Any) -> int:
        """Of the first slot."""
        return int(slots[0]) // self.setting.page_size

    def slots(self, page: int) -> list[int]:
        """Of a page."""
        size = self.setting.page_size
        return [*range(page * size, (page + 1) * size)]

    def tree_page(self) -> int:
        """A page of the tree that nobody has locked."""
        pages = self.cache.view().pages.values()
        return int(max(pages, key=lambda page: (not page.locks, page.page)).page)

    def reports(self) -> list[Report]:
        """What is found at level sets, and with a ledger what it saw before."""
        seen = [] if self.instrument is None else [*self.instrument.reports]
        try:
            self.check()
        except MemoryLeakError as error:
            seen += error.reports
        return seen

    def check(self) -> None:
        """At the level of the test."""
        self._look(
            self.allocator,
            self.rows,
            self.cache,
            reqs=self.reqs,
            reserved=self.reserved,
            level=self.level,
        )


# ------------------------------------------------------------------------- what is planted


def _leak(system: System) -> Planted:
    """A request is forgotten: its row is given back, and its page is not."""
    req = system.start(4)
    page = system.page(system.own(req))
    if req.lock_receipt is not None:
        system.cache.dec_lock_ref(req.lock_receipt)
    system.rows.free(req.req_pool_idx)
    system.reqs.remove(req)
    return Planted(page)


def _double_free(system: System) -> Planted:
    """A free page is given back."""
    page = int(system.allocator.view().free[-1])
    system.allocator.free(system.slots(page))
    return Planted(page)


def _alias(system: System) -> Planted:
    """A page that somebody has is handed out, and used."""
    page = system.page(system.own(system.reqs[0])) if system.reqs else system.tree_page()
    system.allocator.handing = page
    slots = system.allocator.alloc(system.setting.page_size)
    if not system.reqs:
        system.reserved += slots.tolist()
        return Planted(page)
    (row,) = system.rows.alloc(1)
    system.rows.write((row, slice(0, len(slots))), slots)
    tokens = [*range(len(slots))]
    system.reqs.append(Request(tokens, row, slots[:0], None, None, 0))
    return Planted(page, row)


def _use_after_free(system: System) -> Planted:
    """A page of the tree is given back."""
    page = system.tree_page()
    system.allocator.free(system.slots(page))
    return Planted(page)


def _dangling_row(system: System) -> Planted:
    """The page of a request that runs is given back."""
    slots = system.own(system.reqs[0])
    system.allocator.free(slots)
    return Planted(system.page(slots), system.reqs[0].req_pool_idx)


def _lock_imbalance(system: System) -> Planted:
    """A page of the tree has a lock that nobody took."""
    system.cache.overlocked = page = system.tree_page()
    return Planted(page)


def _sentinel(system: System) -> Planted:
    """A row names a slot beyond the pool."""
    row, end = system.reqs[0].req_pool_idx, 2 * system.setting.page_size
    system.rows.write((row, slice(end, end + 1)), system.slots(PAGES + 1)[:1])
    return Planted(PAGES + 1, row)


def _tombstone(system: System) -> Planted:
    """A live page of the tree loses its pair."""
    page = system.tree_page()
    system.allocator.free_swa(system.slots(page))
    return Planted(page)


class Plant(NamedTuple):
    """How to plant a fault, and where it can exist."""

    put: Callable[[System], Planted]
    exists: Callable[[Setting], bool]
    shown_by_sums: bool = True


PLANTS: Mapping[str, Plant] = MappingProxyType(
    {
        "leak": Plant(_leak, lambda _: True),
        "double free": Plant(_double_free, lambda _: True),
        "alias": Plant(_alias, lambda setting: setting.busy or setting.shares),
        "use after free": Plant(_use_after_free, lambda setting: setting.shares),
        "dangling row": Plant(_dangling_row, lambda setting: setting.busy),
        "lock imbalance": Plant(_lock_imbalance, lambda setting: setting.shares, False),
        "sentinel": Plant(_sentinel, lambda setting: setting.busy),
        "tombstone": Plant(_tombstone, lambda setting: setting.shares and setting.windows),
    }
)
"""By kind. No implementation of the specification has a next tier, so no host orphan is planted."""


# ------------------------------------------------------------------------- what is found


def self_test(
    impl: Any,
    *,
    levels: tuple[Level, ...] = ("counts", "sets", "ledger"),
    among: Iterable[Setting] | None = None,
    check: Look = check_memory,
    progress: Callable[[], object] = lambda: None,
) -> list[SelfTestResult]:
    """Plant every kind of fault wherever it can exist, and say of each whether it was seen; of what
    is sound, whether nothing was (CHECK-22, CHECK-21).

    `impl` is a namespace with the classes of the specification, as `kvspec` and `kvspec.oracle`
    are; `among` are some of `settings()`, and `check` is what has to see it. `progress` is called
    after each setting.
    """
    results = list[SelfTestResult]()
    for setting in settings() if among is None else among:
        for level in levels:
            results.append(_tested(System(impl, setting, level, check), NOTHING))
            results += (
                _tested(System(impl, setting, level, check), kind)
                for kind, plant in PLANTS.items()
                if plant.exists(setting) and (plant.shown_by_sums or level != "counts")
            )
        progress()
    return results


def settings() -> list[Setting]:
    """Every allocator under every cache, idle and busy, inside a free group and not."""
    return [
        Setting(allocator, page_size, need_sort, cache, options, busy, group)
        for allocator, page_size, caches in _PAIRINGS
        for need_sort, (cache, options), busy, group in product(
            (False, True), caches, (False, True), (False, True)
        )
    ]


_CACHES: tuple[tuple[str, dict[str, object]], ...] = (
    ("RadixCache", {"eviction_granularity": "page"}),
    ("RadixCache", {"eviction_granularity": "node"}),
    ("RadixCache", {"disable": True}),
    ("ChunkCache", {}),
)
_WINDOW_CACHES: tuple[tuple[str, dict[str, object]], ...] = (
    ("SWARadixCache", {"sliding_window_size": 2}),
    ("SWARadixCache", {"sliding_window_size": 2, "disable": True}),
    ("SWAChunkCache", {}),
)
_PAIRINGS = (
    ("TokenToKVPoolAllocator", 1, _CACHES),
    ("PagedTokenToKVPoolAllocator", 1, _CACHES),
    ("PagedTokenToKVPoolAllocator", 4, _CACHES),
    ("SWATokenToKVPoolAllocator", 1, _WINDOW_CACHES),
    ("SWATokenToKVPoolAllocator", 4, _WINDOW_CACHES),
)


def _tested(system: System, kind: str) -> SelfTestResult:
    """Plant one fault, or nothing, and look."""
    setting, level = system.setting, system.level
    planted = None if kind == NOTHING else PLANTS[kind].put(system)
    found: tuple[str, ...]
    if level == "counts":
        found = _sums(system)
        expected = () if planted is None else ("deficit",) if kind == "leak" else ("surplus",)
        seen = found == expected
    else:
        reports = system.reports()
        found = tuple(dict.fromkeys(f"{report.kind}, page {report.page}" for report in reports))
        seen = _is_seen(kind, planted, reports)
    return SelfTestResult(
        allocator=setting.allocator,
        page_size=setting.page_size,
        need_sort=setting.need_sort,
        cache=setting.named_cache,
        mode=setting.mode,
        level=level,
        planted=kind,
        page=None if planted is None else planted.page,
        found=found,
        seen=seen,
    )


def _is_seen(kind: str, planted: Planted | None, reports: list[Report]) -> bool:
    """Whether the fault is reported as what it is, and nothing of another page or row."""
    if planted is None:
        return not reports
    exact = any(report.kind == kind and report.page == planted.page for report in reports)
    return exact and all(
        report.page == (planted.row if report.pool == "req_to_token_pool" else planted.page)
        or "window pool" in report.pool
        for report in reports
    )


def _sums(system: System) -> tuple[str, ...]:
    """What level counts says: that there is too much or too little of it."""
    try:
        system.check()
    except MemoryLeakError as error:
        lines = [[int(n) for n in re.findall(r"=(\d+)", line)] for line in str(error).splitlines()]
        lacking = [total - sum(parts) for total, *parts in filter(None, lines)]
        return tuple(
            dict.fromkeys("deficit" if each > 0 else "surplus" for each in lacking if each)
        )
    return ()
