"""Rooms that report wrongly: one clause of OBS broken."""

from collections.abc import Sequence

from torch import Tensor

from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.observer import ObserverConformance
from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.oracle.slot_allocator import TokenToKVPoolAllocator

registry = Registry(ObserverConformance, oracle)


@registry.mutant("OBS-1")
class ReportsWhatChangedNothing(TokenToKVPoolAllocator):
    def _report_moved(self, name: str, pages: Sequence[int]) -> None:
        self._report(name, self._slots(pages))


@registry.mutant("OBS-1")
class ReportsRefusals(TokenToKVPoolAllocator):
    def alloc(self, need_size: int) -> Tensor | None:
        slots = super().alloc(need_size)
        if slots is None:
            self._report("alloc")
        return slots


@registry.mutant("OBS-1", "OBS-2")
class ReportsTooEarly(TokenToKVPoolAllocator):
    def _put_back(self, pages: list[int]) -> None:
        self._report_moved("free", pages)
        super()._put_back(pages)


@registry.mutant("OBS-1")
class ForgetsWhatAGroupMakesFree(PagedTokenToKVPoolAllocator):
    def _report(self, name: str, slots: Sequence[int] = ()) -> None:
        super()._report(name, () if name == "free_group_end" else slots)


@registry.mutant("OBS-2")
class LetsTheObserversErrorOut(TokenToKVPoolAllocator):
    def _report(self, name: str, slots: Sequence[int] = ()) -> None:
        errors: list[Exception] = []
        observer = self._observer

        def caught(operation: object) -> None:
            try:
                if observer is not None:
                    observer(operation)
            except RuntimeError as error:
                errors.append(error)

        self._observer = caught if observer else None
        super()._report(name, slots)
        self._observer = observer
        if errors:
            raise ContractError("OBS-2: the observer raised") from errors[0]


@registry.mutant("OBS-2")
class SwallowsTheObserversError(PagedTokenToKVPoolAllocator):
    def _report(self, name: str, slots: Sequence[int] = ()) -> None:
        observer = self._observer

        def swallowed(operation: object) -> None:
            try:
                if observer is not None:
                    observer(operation)
            except RuntimeError:
                pass

        self._observer = swallowed if observer else None
        super()._report(name, slots)
        self._observer = observer


@registry.mutant("OBS-3")
class MayBeChangedWhileItReports(TokenToKVPoolAllocator):
    def free(self, free_index: Slots) -> None:
        reporting, self._reporting = self._reporting, False
        super().free(free_index)
        self._reporting = reporting


@registry.mutant("OBS-4")
class WorksMoreWhenNobodyListens(TokenToKVPoolAllocator):
    def _report(self, name: str, slots: Sequence[int] = ()) -> None:
        if self._observer is None:
            self._pages_moved += len(slots)
        super()._report(name, slots)
