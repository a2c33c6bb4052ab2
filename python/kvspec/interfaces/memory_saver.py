"""Regions of memory that can be given back and taken again. Spec: SAVER."""

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, Self

__all__ = ["GPU_MEMORY_TYPE_KV_CACHE", "GPU_MEMORY_TYPE_WEIGHTS", "TorchMemorySaverAdapter"]

GPU_MEMORY_TYPE_KV_CACHE = "kv_cache"
GPU_MEMORY_TYPE_WEIGHTS = "weights"


class TaggedRegion(NamedTuple):
    """What a tag has: its allocations that are alive."""

    paused: bool
    allocations: int
    nbytes: int


class TorchMemorySaverAdapter(Protocol):
    """What is allocated inside `region(tag)` is given back by `pause(tag)`."""

    @property
    def enabled(self) -> bool:
        """Whether it does anything; a twin that does not has the same methods."""

    @classmethod
    def create(cls, enable: bool) -> Self:
        """The adapter, or its twin that does nothing."""

    def region(self, tag: str) -> AbstractContextManager[None]:
        """Capture what is allocated inside."""

    def pause(self, tag: str) -> None:
        """Give the physical pages of a tag back; the addresses stay."""

    def resume(self, tag: str) -> None:
        """Take them again."""
