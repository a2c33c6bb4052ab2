"""The options of a scheduler. Spec: SCHED-1, SCHED-2."""

from dataclasses import dataclass
from typing import Literal, get_args

from kvspec.errors import ContractError
from kvspec.interfaces.radix_cache import EvictionGranularity, EvictionPolicy
from kvspec.memory_checker.check import Level

__all__ = ["Implementation", "Policy", "ServerArgs"]

Policy = Literal["lpm", "fcfs", "dfs-weight"]
Implementation = Literal["native", "oracle"]

_CHOICES = {
    "schedule_policy": get_args(Policy),
    "implementation": get_args(Implementation),
    "check_level": get_args(Level),
    "eviction_policy": get_args(EvictionPolicy),
    "eviction_granularity": get_args(EvictionGranularity),
}


@dataclass(frozen=True, kw_only=True)
class ServerArgs:
    """Options, under the names that the field gives them. Sizes are in tokens.

    `schedule_conservativeness` scales the share of the tokens that running requests may still need
    which admission keeps for them, 0.7 of them at 1.0.
    """

    chunked_prefill_size: int | None = 512
    max_prefill_tokens: int = 16384
    max_running_requests: int = 8
    disable_radix_cache: bool = False
    experimental_cpp_radix_tree: bool = False
    enable_hierarchical_cache: bool = False
    eviction_policy: EvictionPolicy = "lru"
    eviction_granularity: EvictionGranularity = "page"
    implementation: Implementation = "native"
    schedule_policy: Policy = "lpm"
    schedule_conservativeness: float = 1.0
    disable_overlap_schedule: bool = False
    speculative_num_draft_tokens: int = 0
    check_level: Level = "sets"
    check_every_step: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                given = getattr(self, name)
                raise ContractError(f"SCHED-2: {name} {given!r} is not one of {', '.join(choices)}")
        for name in ("chunked_prefill_size", "max_prefill_tokens", "max_running_requests"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ContractError(f"SCHED-2: {name} {value} is below 1")
        if not 0 < self.schedule_conservativeness < float("inf"):
            given = self.schedule_conservativeness
            raise ContractError(f"SCHED-2: schedule_conservativeness {given} is not above 0")
        if self.speculative_num_draft_tokens < 0:
            raise ContractError(
                f"SCHED-2: speculative_num_draft_tokens {self.speculative_num_draft_tokens} is"
                " below 0"
            )
        if self.speculative_num_draft_tokens and not self.disable_overlap_schedule:
            raise ContractError(
                f"SCHED-2: speculative_num_draft_tokens {self.speculative_num_draft_tokens} needs"
                " disable_overlap_schedule: what a step commits is not known before it is settled"
            )
        if self.enable_hierarchical_cache:
            raise ContractError(
                "SCHED-2: enable_hierarchical_cache=True needs the room hierarchical_cache, which"
                " does not exist yet"
            )
