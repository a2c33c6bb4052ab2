"""Arenas for the suite, and what it asks of all kinds. Spec: HOST."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from kvspec.conformance.host_memory.kernel import PAGE_BYTES, locked_bytes
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import watch_function
from kvspec.errors import CLAUSE_ERRORS
from kvspec.interfaces.host_memory import HostArena
from kvspec.memory_budget import MemoryBudget
from kvspec.memory_budget.kernel import Kernel, Reading

__all__ = ["BIG", "HUGE", "KINDS", "MAPPED", "MIB", "HostMemorySuite", "device", "sysfs"]

KINDS = ("torch", "heap", "mmap", "shm", "pinned")
MAPPED = ("mmap", "shm", "pinned")
MIB = 1 << 20
HUGE = 2 * MIB
BIG = 80 * MIB
"""Above the threshold, 32 MiB at most, from which malloc maps what its heap has no room for."""

_DEFAULTS: dict[str, Any] = {
    "kind": "mmap",
    "nbytes": 5 * PAGE_BYTES,
    "alignment": None,
    "populate": False,
    "huge_pages": "no",
    "numa_node": None,
    "label": "suite",
    "attach": None,
}


def _no_device() -> bool:
    return False


def _a_device() -> bool:
    return True


def _no_limits(kernel: Kernel, cgroups: object) -> list[Reading]:
    return []


@contextmanager
def _machine(broken: bool) -> Iterator[None]:
    """Inside, torch has no CUDA device unless a test has put one there, whatever the machine has.

    For mutants, which say nothing about the limits of the machine, none is read: it takes longest.
    """
    with ExitStack() as stack:
        if torch.cuda.is_available is not _a_device:
            stack.enter_context(mock.patch.object(torch.cuda, "is_available", _no_device))
        if broken:
            stack.enter_context(mock.patch.object(Kernel, "readings", _no_limits))
        yield


@contextmanager
def device(code: int = 0) -> Iterator[list[tuple[Any, ...]]]:
    """Inside, torch has a device that registers memory, or gives an error; what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def register(address: int, nbytes: int, flags: int) -> int:
        asked.append(("register", address, nbytes))
        return code

    def unregister(address: int) -> int:
        asked.append(("unregister", address))
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    with mock.patch.multiple(torch.cuda, is_available=_a_device, cudart=lambda: runtime):
        yield asked


def sysfs(folder: str, memory: str, cpu: str) -> str:
    """A folder that says which NUMA nodes there are."""
    Path(folder, "has_memory").write_text(f"{memory}\n", encoding="ascii")
    Path(folder, "has_cpu").write_text(f"{cpu}\n", encoding="ascii")
    return folder


class Kept(NamedTuple):
    """What of this process outlives a mapping that is forgotten."""

    reserved: tuple[tuple[str, int, int], ...]
    locked_bytes: int
    segments: frozenset[str]


class HostMemorySuite(Conformance):
    """Base of the parts of the suite."""

    def make(self, kind: str = "mmap", nbytes: int = 5 * PAGE_BYTES, **given: Any) -> Any:
        """An arena, watched; on a machine without a device unless a test has put one there."""
        arguments = {**_DEFAULTS, "kind": kind, "nbytes": nbytes, **given}
        with _machine(self.impl_name == MUTANT):
            return self.subject("HostArena", HostArena, "host_memory", **arguments)

    def function(self, name: str, cls: Any = None) -> Callable[..., Any]:
        """A class method or static method, watched."""
        found: Callable[..., Any] = getattr(cls or self.impl.HostArena, name)
        if self.impl_name == MUTANT:
            return found
        return watch_function(self.impl_name, found, "host_memory")

    def elsewhere(self, folder: str) -> Any:
        """The class on a machine whose NUMA nodes a folder states."""
        return type("HostArena", (self.impl.HostArena,), {"node_folder": folder})

    def refused(self, clause_id: str, call: Callable[[], object], *words: str) -> None:
        """It raises an error that names the clause and says all the words."""
        text = "it was done"
        try:  # pytest.raises would keep the frames, and what is in them, for the collector
            call()
        except CLAUSE_ERRORS as error:
            text = str(error)
        assert text.startswith(f"{clause_id}: "), text
        assert all(word in text for word in words), text

    def unchanged(
        self, arena: Any, clause_id: str, call: Callable[[], object], *words: str
    ) -> None:
        """It refuses, and neither state nor pages nor bytes change."""

        def state() -> object:
            return arena.view(), arena.address, arena.mapped_bytes, arena.resident_bytes()

        held = arena.tensor()
        before, content = state(), held.clone()
        self.refused(clause_id, call, *words)
        assert state() == before
        assert torch.equal(held, content)

    def kept(self) -> Kept:
        """What arenas keep beside their memory: compare it before and after."""
        reserved = MemoryBudget.current().view().reserved
        mine = f".{os.getpid()}."  # others may come and go
        segments = frozenset(name for name in os.listdir("/dev/shm") if mine in name)
        return Kept(reserved, locked_bytes(), segments)

    def keeps_no_more(self, before: Kept) -> None:
        """Than before: what the collector finds meanwhile goes."""
        after = self.kept()
        assert not Counter(after.reserved) - Counter(before.reserved)
        assert after.locked_bytes <= before.locked_bytes
        assert after.segments <= before.segments
