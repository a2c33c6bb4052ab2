"""What decides which tokens are computed when, and where their KV goes. Spec: SCHED."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from kvspec.interfaces.memory_checker import SWATokenInfo
from kvspec.interfaces.prefix_cache import BasePrefixCache
from kvspec.interfaces.prefix_cache import Req as CachedReq
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator

__all__ = [
    "FinishReason",
    "LiveReq",
    "Req",
    "Scheduler",
    "SchedulerView",
    "ServerArgs",
    "StepOutput",
    "TokenInfo",
]

FinishKind: TypeAlias = Literal["stop", "length", "abort", "reject", "error"]
State: TypeAlias = Literal["new", "waiting", "chunked", "running", "leaving", "finished"]


class FinishReason(NamedTuple):
    """Why a request has ended."""

    kind: FinishKind
    """A stop token, max_new_tokens, `abort_request`, too large for the pool, the worker's error."""
    message: str = ""


class StepOutput(NamedTuple):
    """What a step says of a request that has new tokens or has ended."""

    rid: str
    token_ids: tuple[int, ...]
    """The new ones."""
    finished_reason: FinishReason | None


class TokenInfo(NamedTuple):
    """How full the pool is, in tokens."""

    num_used: int
    """Neither available nor evictable."""
    token_usage: float
    """A share of the pool."""
    available_size: int
    evictable_size: int


class LiveReq(NamedTuple):
    """A request that owns something."""

    row: int
    protected: int
    committed: int
    """Tokens whose KV is computed."""
    allocated: int
    """Slots in its row."""
    output: int
    """Tokens that came out."""


class SchedulerView(NamedTuple):
    """The abstract state."""

    waiting: tuple[str, ...]
    """In the order of the queue as it was last sorted, new ones at the end."""
    chunked: str | None
    running: tuple[str, ...]
    leaving: tuple[str, ...]
    in_flight: tuple[str, ...]
    """Those that a step names which is launched and not settled."""
    live: Mapping[str, LiveReq]
    """The chunked, the running and the leaving."""
    finished: int
    """How many have ended so far."""
    failed: int
    """How many of them by an error of the worker."""
    retractions: int
    evicted_tokens: int
    """Of both pools, asked for by the scheduler, so far."""
    swa_left: int
    """Window tokens that requests gave back as they moved on, so far."""


class ServerArgs(Protocol):
    """The options; immutable (SCHED-1, SCHED-2). Sizes are in tokens."""

    @property
    def chunked_prefill_size(self) -> int | None:
        """Most tokens of prompts in a step; None for whole prompts (SCHED-14)."""

    @property
    def max_prefill_tokens(self) -> int:
        """Tokens of prompts from which a step takes no further request."""

    @property
    def disable_radix_cache(self) -> bool: ...

    @property
    def max_running_requests(self) -> int: ...

    @property
    def schedule_policy(self) -> Literal["lpm", "fcfs", "dfs-weight"]:
        """How the queue is ordered (SCHED-9, SCHED-10)."""

    @property
    def disable_overlap_schedule(self) -> bool:
        """Whether every step is settled before the next is launched (SCHED-22)."""

    @property
    def speculative_num_draft_tokens(self) -> int:
        """Tokens that are guessed for a request in a decode step (SCHED-24)."""

    @property
    def implementation(self) -> Literal["native", "oracle"]:
        """Whose prefix cache it is (SCHED-1)."""

    @property
    def check_level(self) -> Literal["off", "counts", "sets", "ledger"]:
        """What `check_memory` looks at (SCHED-4)."""

    @property
    def check_every_step(self) -> bool:
        """Whether it is called while requests are live, too (SCHED-5)."""


class Req(CachedReq, Protocol):
    """A request, as it is handed in and as a cache reads and writes it."""

    rid: str
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    state: State
    finished_reason: FinishReason | None
    kv_committed_len: int
    cached_tokens: int
    """Tokens that the cache had when it was first admitted."""
    retraction_count: int


GivenReq = TypeVar("GivenReq", bound=Req, contravariant=True)
GivenArgs = TypeVar("GivenArgs", bound=ServerArgs, contravariant=True)


class Scheduler(Protocol[GivenReq, GivenArgs]):
    """One replica's loop, for its own classes of requests and options. Not for several threads
    (SCHED-8).

    A step settles before anything but the next decode step is launched (SCHED-22, SCHED-23).
    """

    req_to_token_pool: ReqToTokenPool
    token_to_kv_pool_allocator: BaseTokenToKVPoolAllocator
    tree_cache: BasePrefixCache
    is_hybrid: bool
    max_total_num_tokens: int

    def init_memory_pool_and_cache(self, server_args: GivenArgs) -> None:
        """Take the worker's pools and make the cache over them (SCHED-1)."""

    def add_request(self, req: GivenReq) -> None:
        """Queue a request, or reject it (SCHED-6, SCHED-7). O(tokens)."""

    def step(self) -> Sequence[StepOutput]:
        """Order the queue, admit, make room, launch a step, and settle what is to be settled
        (SCHED-5, SCHED-9 to SCHED-18, SCHED-21 to SCHED-25, SCHED-28 to SCHED-30).
        """

    def abort_request(self, rid: str) -> None:
        """End a request in whatever state it is (SCHED-19, SCHED-20). O(its row)."""

    def retract_all(self) -> Sequence[StepOutput]:
        """Make every live request wait (SCHED-27); what came out of the step in flight."""

    def flush_cache(self) -> bool:
        """Empty everything, unless somebody is live (SCHED-26). O(pool)."""

    def check_memory(self) -> None:
        """Raise MemoryLeakError unless everything has one owner (SCHED-4). O(pool)."""

    def _get_token_info(self) -> TokenInfo:
        """The source's four numbers (SCHED-3). O(1)."""

    def _get_swa_token_info(self) -> SWATokenInfo:
        """The source's eight numbers (SCHED-3). O(1)."""

    def view(self) -> SchedulerView:
        """The abstract state. O(waiting + live)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `steps`, `prefill_tokens`, `cached_tokens`, `decode_tokens`,
        `draft_tokens`, `accepted_draft_tokens`, `chunks`, `retractions`, `overlapped_steps`,
        `evicted_tokens` (SCHED-30).
        """
