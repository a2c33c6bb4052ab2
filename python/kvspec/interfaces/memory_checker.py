"""Who owns every page? Spec: CHECK."""

from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Literal, NamedTuple, Protocol, TypeAlias

from kvspec.interfaces.prefix_cache import (
    BasePrefixCache,
    CacheView,
    Path,
    Req,
    WindowedCache,
)
from kvspec.interfaces.request_pool import ReqToTokenPool, ReqToTokenPoolView
from kvspec.interfaces.slot_allocator import AllocatorView, BaseTokenToKVPoolAllocator
from kvspec.interfaces.swa_allocator import SWATokenToKVPoolAllocator

__all__ = [
    "Attribution",
    "CheckMemory",
    "Claims",
    "FindFaults",
    "GetSWATokenInfo",
    "HistoryStep",
    "HostView",
    "Report",
    "ReportKind",
    "RunningReq",
    "SWATokenInfo",
    "SelfTest",
    "SelfTestResult",
    "SystemView",
]

ReportKind: TypeAlias = Literal[
    "leak",
    "alias",
    "double free",
    "use after free",
    "dangling row",
    "lock imbalance",
    "sentinel",
    "tombstone",
    "host orphan",
]


class HistoryStep(NamedTuple):
    """One entry of the history of a page."""

    action: int
    """Number of the event; -1 for what was there when the ledger began."""
    name: str
    """The method that was called, `cache_finished_req`."""
    site: str
    """Who called it, `engine/scheduler.py:88 run_batch`; empty if it is no longer known."""
    owner: str
    """Who had the page after it."""


class Report(Protocol):
    """One fault, for a person and for a program (CHECK-13, CHECK-20). Immutable."""

    @property
    def kind(self) -> ReportKind: ...

    @property
    def clause(self) -> str:
        """The most special one, `CHECK-15`."""

    @property
    def pool(self) -> str:
        """As the source document names it: `token_to_kv_pool_allocator`, `req_to_token_pool`."""

    @property
    def page(self) -> int | None:
        """A row in the request pool; None where no single page is at fault."""

    @property
    def owners(self) -> tuple[str, ...]:
        """All that claim it now, once for each place."""

    @property
    def last_owner(self) -> str | None:
        """The last rightful one, by the ledger; None without one."""

    @property
    def lost_by(self) -> HistoryStep | None:
        """The action that lost it; None where no ledger saw it."""

    @property
    def history(self) -> tuple[HistoryStep, ...]:
        """The newest first."""

    @property
    def what(self) -> str:
        """The sentence, without clause."""

    def __str__(self) -> str:
        """`CHECK-1: page 4 of ... is held and has no owner`, and a line for each step below it."""

    def as_json(self) -> dict[str, object]:
        """The same for a program (CHECK-20)."""


class HostView(NamedTuple):
    """The next tier, in pages; it has no sink, so its first page is 0."""

    page_count: int
    free: tuple[int, ...]
    tree: tuple[int, ...]
    """The host pages that the tree names, once for each place."""


class SystemView(NamedTuple):
    """What three objects hold, whoever wrote them: all that a check looks at."""

    allocator: AllocatorView
    rows: ReqToTokenPoolView
    tree: CacheView
    page_size: int
    page_count: int
    row_count: int
    swa_page_count: int | None = None
    sliding_window_size: int | None = None
    host: HostView | None = None
    misplaced: tuple[tuple[Path, tuple[int, ...]], ...] = ()
    """Pages of the tree whose slots are not one page in order, with the slots."""


class RunningReq(NamedTuple):
    """A request, as far as its pages go."""

    row: int
    protected: int
    """How many of its row's slots the tree owns."""
    path: Path | None
    """What its lock holds; None if that is not known, and only the pages are compared."""


class Claims(NamedTuple):
    """Who holds pages besides the lists, the tree and what the view of the rows says."""

    running: tuple[RunningReq, ...] = ()
    reserved: frozenset[int] = frozenset()
    copies: frozenset[int] = frozenset()
    """Pages with a copy in flight: whoever else has them."""
    host_copies: frozenset[int] = frozenset()
    open_locks: Mapping[Path, tuple[str, ...]] | None = None
    """Who holds a lock on each path; None if nobody kept count."""


class Attribution(Protocol):
    """What a ledger knows of a page. `pool` is `full`, `swa`, `host` or `rows`."""

    def last_owner(self, pool: str, page: int) -> str | None:
        """The last rightful owner that is not free or pending."""

    def history(self, pool: str, page: int) -> tuple[HistoryStep, ...]:
        """The newest first."""

    def lost_by(self, pool: str, page: int) -> HistoryStep | None:
        """The action that was the last to move it."""


class SWATokenInfo(NamedTuple):
    """How full the two pools are, in tokens; a usage is a share of the pool, 0 of an empty one."""

    full_num_used: int
    """Neither available nor evictable."""
    swa_num_used: int
    full_token_usage: float
    swa_token_usage: float
    full_available_size: int
    full_evictable_size: int
    swa_available_size: int
    swa_evictable_size: int


class CheckMemory(Protocol):
    def __call__(
        self,
        token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator,
        req_to_token_pool: ReqToTokenPool,
        tree_cache: BasePrefixCache,
        reqs: Iterable[Req] = (),
        reserved: Iterable[int] = (),
        level: Literal["off", "counts", "sets", "ledger"] = "sets",
    ) -> None:
        """Raise MemoryLeakError unless every page and row has one owner (CHECK-1 to CHECK-12).

        `reserved` are slots held outside any row. At `counts` the error is the source's; `ledger`
        needs an instrument.
        """


class FindFaults(Protocol):
    def __call__(
        self,
        view: SystemView,
        claims: Claims,
        attribution: Attribution | None = None,
        *,
        idle: bool = False,
    ) -> Sequence[Report]:
        """Every fault, each as what it is (CHECK-1 to CHECK-4, CHECK-9 to CHECK-11, CHECK-14 to
        CHECK-19), and with `idle` what is left over (CHECK-23). O(pool).
        """


class SelfTestResult(NamedTuple):
    """What became of one planted fault, or of none: then nothing is to be reported."""

    allocator: str
    page_size: int
    need_sort: bool
    cache: str
    mode: str
    """`idle` or `busy`, and whether a free group is open."""
    level: str
    planted: str
    """The kind of the fault, or `nothing`."""
    page: int | None
    found: tuple[str, ...]
    """What was reported: kinds and pages; of sums, `surplus` or `deficit`."""
    seen: bool
    """Whether that is what was planted."""


class SelfTest(Protocol):
    def __call__(self, impl: ModuleType, /) -> list[SelfTestResult]:
        """Plant every fault into an implementation, and say of each whether it was reported, as
        what it is, with the page (CHECK-22).
        """


class GetSWATokenInfo(Protocol):
    def __call__(
        self, token_to_kv_pool_allocator: SWATokenToKVPoolAllocator, tree_cache: WindowedCache
    ) -> SWATokenInfo:
        """The source's eight numbers, in its order (CHECK-12). O(1)."""
