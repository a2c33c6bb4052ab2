"""Broken arenas of host memory. Each must fail on the clause it breaks."""

import ctypes
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from unittest import mock

import kvspec.oracle
from kvspec.conformance.host_memory import HostMemoryConformance
from kvspec.conformance.mutants import Registry
from kvspec.errors import ContractError, HostMemoryError
from kvspec.interfaces.host_memory import HostCapabilities
from kvspec.memory_budget import Reservation
from kvspec.oracle import HostArena, host_memory, host_pages

registry = Registry(HostMemoryConformance, kvspec.oracle)

BYTES = ("HOST-5", "HOST-13", "HOST-14", "HOST-16", "HOST-19", "HOST-20", "HOST-21")
"""Of the state machine, which is one test."""


class AsksForSomethingElse(HostArena, ABC):
    """Checks what it was given, and then goes by something else."""

    def _reserve(self) -> Reservation | None:
        self._asked = self.instead(self._asked)
        return super()._reserve()

    @abstractmethod
    def instead(self, asked: Any) -> Any:
        """What it goes by."""


@registry.mutant("HOST-1")
class ForgetsTheAlignment(AsksForSomethingElse):
    def instead(self, asked: Any) -> Any:
        return asked._replace(alignment=None)


class _PowerOfTwo(host_memory._Asked):
    @property
    def mapped_bytes(self) -> int:
        return 1 << (self.nbytes - 1).bit_length()


@registry.mutant(
    *("HOST-2", "HOST-4", "HOST-7", "HOST-22"), reports=("PT-95823", "SG-36562", "VL-56410")
)
class PinsThePowerOfTwo(AsksForSomethingElse):
    """What an allocator does that keeps blocks for others to use."""

    def instead(self, asked: Any) -> Any:
        large = asked.kind == "pinned" and asked.nbytes > 404 * 1024
        return _PowerOfTwo(*asked) if large else asked


@registry.mutant("HOST-2")
class KeepsWhatAlignmentTook(HostArena):
    def _get(self) -> tuple[int, Callable[[], None]]:
        with mock.patch.object(host_pages, "_LIBC", _NeverUnmaps()):
            return super()._get()


class _NeverUnmaps:
    def munmap(self, address: int, nbytes: int) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(_LIBC, name)


_LIBC = host_pages._LIBC


@registry.mutant("HOST-3", "HOST-11")
class TakesANodeWithoutMemoryForNone(HostArena):
    def __init__(self, *kind: Any, **given: Any) -> None:
        try:
            super().__init__(*kind, **given)
        except ContractError as error:
            if "has no memory" not in str(error):
                raise
            super().__init__(*kind, **(given | {"numa_node": None}))


@registry.mutant("HOST-4")
class GivesWhatThereIs(HostArena):
    def __init__(self, *kind: Any, **given: Any) -> None:
        try:
            super().__init__(*kind, **given)
        except HostMemoryError as error:
            if error.clause not in ("HOST-4", "SHM-5"):
                raise
            super().__init__(*kind, **(given | {"nbytes": 4096}))


@registry.mutant("HOST-5")
class LeavesSomethingInPopulatedMemory(HostArena):
    def _settle(self, address: int, release: list[Callable[[], object]]) -> None:
        super()._settle(address, release)
        if self._asked.populate:
            ctypes.memset(address, 7, 1)


@registry.mutant("HOST-6", "HOST-7", "HOST-12", "HOST-27", *BYTES)
class PopulatesUnasked(AsksForSomethingElse):
    def instead(self, asked: Any) -> Any:
        return asked._replace(populate=True)


@registry.mutant("HOST-7", "HOST-11", "HOST-12", "HOST-19", "HOST-22", "HOST-27")
class PopulatesAllButTheLastPage(HostArena):
    def _populate(self, address: int, nbytes: int, threads: int | None) -> None:
        super()._populate(address, max(nbytes - 4096, 1), threads)


@registry.mutant("HOST-8")
class SaysNothingOfHugePages(HostArena):
    def __init__(self, *kind: Any, **given: Any) -> None:
        try:
            super().__init__(*kind, **given)
        except HostMemoryError as error:
            if error.clause != "HOST-8":
                raise
            raise HostMemoryError("HOST-8: Cannot allocate memory") from None


@registry.mutant("HOST-9", reports=("MORI-679",))
class RegistersSmallPages(AsksForSomethingElse):
    """The cost of registering is per page."""

    def instead(self, asked: Any) -> Any:
        return asked._replace(huge_pages="no") if asked.huge_pages == "transparent" else asked


@registry.mutant("HOST-10", reports=("SG-31424",))
class LetsAChildHaveThePages(HostArena):
    """So the first write after a fork moves them away from the device."""

    def _settle(self, address: int, release: list[Callable[[], object]]) -> None:
        super()._settle(address, release)
        host_pages.advise(address, self._asked.mapped_bytes, mmap.MADV_DOFORK)


@registry.mutant("HOST-11", reports=("DYN-3700",))
class TakesPagesWhereverTheThreadIs(AsksForSomethingElse):
    def instead(self, asked: Any) -> Any:
        return asked._replace(numa_node=None)


@registry.mutant("HOST-12", reports=("DYN-3700",))
class ReportsTheNodeThatWasAskedFor(HostArena):
    def numa_nodes(self) -> dict[int, int]:
        self._open("numa_nodes")
        return {self._asked.numa_node or 0: self.mapped_bytes}


@registry.mutant("HOST-13", "HOST-15", *BYTES)
class CopiesForOtherDtypes(HostArena):
    def tensor(self, dtype: Any = None, *given: Any, **named: Any) -> Any:
        made = super().tensor(dtype, *given, **named)
        return made if dtype is None or dtype.itemsize == 1 else made.clone()


@registry.mutant("HOST-14", *BYTES)
class MovesAnOffsetToWhereItFits(HostArena):
    def tensor(self, dtype: Any = None, shape: Any = None, offset: int = 0) -> Any:
        item = dtype.itemsize if dtype else 1
        return super().tensor(dtype, shape, offset // item * item)


@registry.mutant("HOST-15", "HOST-28")
class GivesTheBudgetBackWhileATensorLives(HostArena):
    def tensor(self, *given: Any, **named: Any) -> Any:
        made = super().tensor(*given, **named)
        self.promise(None)
        return made


@registry.mutant("HOST-16", *BYTES)
class SaysNothingWhenItIsInUse(HostArena):
    def close(self) -> None:
        if not self._tensors:
            super().close()


@registry.mutant("HOST-17", "HOST-22")
class RefusesToBeClosedTwice(HostArena):
    def close(self) -> None:
        self._open("close")
        super().close()


@registry.mutant("HOST-18")
class CountsPagesWhenItIsClosed(HostArena):
    def resident_bytes(self) -> int:
        return 0 if self._closed else super().resident_bytes()


@registry.mutant("HOST-19", "HOST-21")
class DiscardsForItselfAlone(HostArena):
    """The segment keeps the pages, and they are back at the next touch."""

    def discard(self, offset: int = 0, nbytes: int | None = None) -> None:
        with mock.patch.object(mmap, "MADV_REMOVE", mmap.MADV_DONTNEED):
            super().discard(offset, nbytes)


@registry.mutant("HOST-20", *BYTES)
class DiscardsThePageAround(HostArena):
    def discard(self, offset: int = 0, nbytes: int | None = None) -> None:
        self._range("discard", offset, nbytes)
        end = self.nbytes if nbytes is None else host_pages.rounded(offset + nbytes, 4096)
        whole = offset // 4096 * 4096
        super().discard(whole, min(end, self.nbytes) - whole)


@registry.mutant("HOST-21", *BYTES)
class CountsThePageOfZeros(HostArena):
    """As mincore does."""

    def resident_bytes(self) -> int:
        with mock.patch.object(host_pages, "_EXCLUSIVE", 0):
            return super().resident_bytes()


@registry.mutant("HOST-22", "HOST-23")
class LocksNothing(HostArena):
    def _settle(self, address: int, release: list[Callable[[], object]]) -> None:
        with mock.patch.object(host_pages, "lock"):
            super()._settle(address, release)


@registry.mutant("HOST-23")
class SaysNothingOfTheLimit(HostArena):
    def _settle(self, address: int, release: list[Callable[[], object]]) -> None:
        try:
            super()._settle(address, release)
        except HostMemoryError as error:
            if error.clause != "HOST-23":
                raise
            raise HostMemoryError("HOST-23: mlock: Cannot allocate memory") from None


@registry.mutant("HOST-24", "HOST-3", "HOST-19", "HOST-21", "HOST-28")
class MakesASegmentOfItsOwn(HostArena):
    def __init__(self, *kind: Any, **given: Any) -> None:
        super().__init__(*kind, **(given | {"attach": None}))


@registry.mutant("HOST-25", reports=("NV-885",))
class TakesNodesWithoutCpusForNone(HostArena):
    """Memory that only lies nearer to a device."""

    @classmethod
    def capabilities(cls) -> HostCapabilities:
        report = super().capabilities()
        return report._replace(memory_nodes=report.cpu_nodes)


@registry.mutant("HOST-25", reports=("NCCL-2190",))
class ProbesAtEveryCall(HostArena):
    @classmethod
    def capabilities(cls) -> HostCapabilities:
        return host_memory._capabilities.__wrapped__(cls.node_folder)


@registry.mutant("HOST-26", reports=("NCCL-2190", "NV-885"))
class GoesByWhatTheFirstOneHas(HostArena):
    """Ranks then choose different ways to each other."""

    @staticmethod
    def agree(reports: Sequence[HostCapabilities]) -> HostCapabilities:
        return HostArena.agree(reports[:1])


@registry.mutant("HOST-27", reports=("DYN-13710",))
class PopulatesWithOneThread(HostArena):
    def _populate(self, address: int, nbytes: int, threads: int | None) -> None:
        super()._populate(address, nbytes, 1)


@registry.mutant("HOST-28", "HOST-15", "HOST-23")
class ReservesWhatItHasMapped(HostArena):
    late: ClassVar[Reservation | None] = None

    def _reserve(self) -> Reservation | None:
        return None

    def _map(self, reservation: Reservation | None) -> None:
        super()._map(None)
        self.late = super()._reserve()
        if self.late is not None:
            self.late.mapped(self.address, self.mapped_bytes)

    def close(self) -> None:
        super().close()
        if self.late is not None:
            self.late.release()


@registry.mutant("HOST-29")
class ChecksNothing(HostArena):
    def check(self) -> None:
        pass
