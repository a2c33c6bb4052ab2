"""Regions of memory that can be given back and taken again. Spec: SAVER."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, Self

__all__ = [
    "FACTORIES",
    "GPU_MEMORY_TYPE_KV_CACHE",
    "GPU_MEMORY_TYPE_WEIGHTS",
    "TaggedRegion",
    "TorchMemorySaverAdapter",
]

GPU_MEMORY_TYPE_KV_CACHE = "kv_cache"
GPU_MEMORY_TYPE_WEIGHTS = "weights"

FACTORIES = frozenset(
    (
        *("arange", "empty", "empty_like", "empty_permuted", "empty_strided", "eye", "full"),
        *("full_like", "lift_fresh", "linspace", "logspace", "new_empty", "new_empty_strided"),
        *("new_full", "new_ones", "new_zeros", "normal", "ones", "ones_like", "rand", "rand_like"),
        *("randint", "randint_like", "randn", "randn_like", "randperm", "scalar_tensor"),
        *("tril_indices", "triu_indices", "zeros", "zeros_like", "clone", "_to_copy"),
    )
)
"""The operators of torch whose results a region captures (SAVER-3).

`lift_fresh` is what `torch.tensor` ends with, `clone` and `_to_copy` are behind `clone()`,
`contiguous()`, `to()`, `half()` and their like.
"""


class TaggedRegion(NamedTuple):
    """What a tag has: its allocations that are alive."""

    paused: bool
    allocations: int
    nbytes: int
    """Of the allocations, exactly what was asked for."""
    regions: int = 0
    """How many regions of the tag are open now, in all threads."""
    backup_bytes: int = 0
    """What is held outside the allocations, to be put back by `resume` (SAVER-10)."""


class TorchMemorySaverAdapter(Protocol):
    """What is allocated inside `region(tag)` is given back by `pause(tag)` (SAVER-1 to SAVER-20).

    A tag is *mapped* or *paused*, and so is each of its allocations; an allocation that nobody
    refers to is *freed*, and gone from its tag. All methods may be called by every thread.
    """

    @property
    def enabled(self) -> bool:
        """Whether it does anything; a twin that does not has the same methods (SAVER-2)."""

    @classmethod
    def create(cls, enable: bool) -> Self:
        """The process's one saver of this class, or its twin that does nothing (SAVER-1, SAVER-2).

        With CUDA and the package `torch_memory_saver`, CUDA's memory is the package's (SAVER-21).
        """

    def region(self, tag: str, enable_cpu_backup: bool = False) -> AbstractContextManager[None]:
        """Capture what this thread allocates inside (SAVER-3 to SAVER-7, SAVER-14, SAVER-17).

        Of regions in each other the innermost captures. With `enable_cpu_backup` the contents
        outlast a pause, else they are zeros after it (SAVER-9). Captured are the results of
        `FACTORIES` on the CPU and `HostArena` of the kinds mmap and shm. ContractError for a tag
        that is empty or paused. A captured tensor costs a mapping of whole pages, and one pass
        more over it unless it is made by one of the empty or zeros kinds.
        """

    def pause(self, tag: str) -> None:
        """Give the physical pages of a tag back; the addresses stay (SAVER-8 to SAVER-12).

        All of them or none, and of this tag alone (SAVER-15, SAVER-19).

        ContractError for a tag that is unknown, paused already, or has an open region;
        HostMemoryError where there is no room for the backups. O(resident bytes given back), and
        a copy of what is to be kept, for which there must be room beside it (SAVER-20).
        """

    def resume(self, tag: str) -> None:
        """Make a paused tag usable again (SAVER-9, SAVER-10, SAVER-13, SAVER-15, SAVER-16).

        ContractError for a tag that is not paused; HostMemoryError where the machine has not the
        memory for all of it. Pages come when they are touched. O(allocations), and a copy of what
        was kept (SAVER-20).
        """

    def configure_subprocess(self) -> AbstractContextManager[None]:
        """Around the start of a process that is to have a saver: sets what the package needs."""

    def view(self) -> Mapping[str, TaggedRegion]:
        """The abstract state: every tag that a region was opened for. O(allocations)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far, in bytes (SAVER-20).

        `captured`, `given_back` by pauses, `kept` in backups, `put_back` from them.
        """

    def check(self) -> None:
        """Raise ContractError if the books are broken or a paused tag was written (SAVER-18).

        O(allocations), and O(bytes) of those with resident pages while paused.
        """
