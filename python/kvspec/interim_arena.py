"""Stands for the oracle's HostArena until it is there."""

import ctypes
import mmap
from collections.abc import Callable
from contextvars import ContextVar
from typing import ClassVar

import torch
from torch import Tensor

from kvspec.memory_budget import MemoryBudget, Reservation


class HostArena:
    made: ClassVar[ContextVar[Callable[["HostArena"], None] | None]] = ContextVar(
        "kvspec_interim_arena_made", default=None
    )
    page_bytes = 4096

    def __init__(self, kind: str, nbytes: int, label: str = "arena") -> None:
        self.kind, self.nbytes = kind, nbytes
        self._reserved = [MemoryBudget.current().reserve("mmap", nbytes, label=label)]
        flags = mmap.MAP_SHARED if kind == "shm" else mmap.MAP_PRIVATE
        self._map = mmap.mmap(-1, nbytes, flags=flags | mmap.MAP_ANONYMOUS)
        listener = self.made.get()
        if listener is not None:
            listener(self)

    def tensor(self, dtype: torch.dtype = torch.uint8) -> Tensor:
        holder = (ctypes.c_uint8 * self.nbytes).from_buffer(self._map)
        holder.arena = self
        return torch.frombuffer(holder, dtype=dtype)

    def discard(self, offset: int = 0, nbytes: int | None = None) -> None:
        self._map.madvise(mmap.MADV_REMOVE if self.kind == "shm" else mmap.MADV_DONTNEED)

    def resident_bytes(self) -> int:
        return int(bool(self.tensor().any()))

    def reserved_again(self) -> Reservation | None:
        return MemoryBudget.current().reserve("mmap", self.nbytes, label="resumed")

    def promise(self, reservation: Reservation | None) -> None:
        for each in self._reserved:
            each.release()
        self._reserved = [reservation] if reservation is not None else []
