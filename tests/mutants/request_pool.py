"""Broken request pools. Each must fail on the clause it breaks."""

from typing import Any

import kvspec.oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.request_pool import RequestPoolConformance
from kvspec.errors import ContractError
from kvspec.oracle import DecodeReqToTokenPool, ReqToTokenPool

registry = Registry(RequestPoolConformance, kvspec.oracle)

WRITES = ("REQ-6", "REQ-7", "REQ-8", "REQ-10")


@registry.mutant("REQ-1", "REQ-2", "REQ-5", "REQ-9", reports=("SG-10871", "INV-017"))
class LosesARowThatHasNoSlots(ReqToTokenPool):
    """A request that finishes before it wrote anything gives no row back."""

    def free(self, free_index: Any) -> None:
        before = self.view().rows
        super().free(free_index)
        self._free = [row for row in self._free if before.get(row, "free") != ()]


@registry.mutant(
    "REQ-1", "REQ-2", "REQ-4", "REQ-5", "REQ-9", "REQ-10", "REQ-13", "OBS-1", reports=("INV-017",)
)
class KeepsAFreedRowLive(ReqToTokenPool):
    def free(self, free_index: Any) -> None:
        before = dict(self._rows)
        super().free(free_index)
        self._rows = before


@registry.mutant("REQ-2", "REQ-9", "REQ-11")
class HandsOutRowsBackwards(ReqToTokenPool):
    def alloc(self, need_size: int) -> list[int] | None:
        rows = super().alloc(need_size)
        return rows and rows[::-1]


@registry.mutant("REQ-2", "REQ-5", "REQ-8", "REQ-9", reports=("VL-42273",))
class HandsOutARowWithItsOldSlots(ReqToTokenPool):
    def free(self, free_index: Any) -> None:
        before = dict(self._rows)
        super().free(free_index)
        self._old = {**getattr(self, "_old", {}), **before}

    def alloc(self, need_size: int) -> list[int] | None:
        rows = super().alloc(need_size)
        for row in rows or ():
            self._rows[row] = list(getattr(self, "_old", {}).get(row, ()))
        return rows


@registry.mutant("REQ-2", "REQ-1", "REQ-8", "REQ-9", "REQ-11", "OBS-1", "OBS-3")
class KeepsOneRowBack(ReqToTokenPool):
    def alloc(self, need_size: int) -> list[int] | None:
        return None if need_size >= self.available_size() else super().alloc(need_size)


@registry.mutant("REQ-3", "REQ-12", "OBS-1")
class HandsOutWhatThereIs(ReqToTokenPool):
    def alloc(self, need_size: int) -> list[int] | None:
        return super().alloc(min(need_size, self.available_size()))


@registry.mutant("REQ-3", "OBS-1")
class ForgetsTheOrderWhenItRefuses(ReqToTokenPool):
    def alloc(self, need_size: int) -> list[int] | None:
        rows = super().alloc(need_size)
        if rows is None:
            self._free.reverse()
        return rows


@registry.mutant("REQ-4")
class TakesANegativeAmountForNone(ReqToTokenPool):
    def alloc(self, need_size: int) -> list[int] | None:
        return super().alloc(max(need_size, 0))


@registry.mutant("REQ-4", reports=("INV-003", "INV-017"))
class FreesARowTwice(ReqToTokenPool):
    def free(self, free_index: Any) -> None:
        try:
            super().free(free_index)
        except ContractError as error:
            if error.clause != "REQ-4":
                raise
            rows = free_index if isinstance(free_index, list) else [free_index]
            self._free += rows
            for row in rows:
                self._rows.pop(row, None)


@registry.mutant("REQ-4")
class FreesTheRowsBeforeTheBadOne(ReqToTokenPool):
    def free(self, free_index: Any) -> None:
        if isinstance(free_index, list):
            for row in free_index:
                super().free(row)
        else:
            super().free(free_index)


@registry.mutant("REQ-5", reports=("INV-017",))
class FreesIntsOfPythonOnly(ReqToTokenPool):
    """A row that numpy or torch made is taken for an empty list of rows."""

    def free(self, free_index: Any) -> None:
        single = not isinstance(free_index, int) and getattr(free_index, "ndim", 1) == 0
        super().free([] if single else free_index)


@registry.mutant("REQ-5", "REQ-2")
class FreesInFront(ReqToTokenPool):
    def free(self, free_index: Any) -> None:
        count = len(self._free)
        super().free(free_index)
        self._free = self._free[count:] + self._free[:count]


@registry.mutant("REQ-6", "REQ-7", "REQ-8", "REQ-10", "OBS-1", reports=("SG-22862",))
class OverwritingCutsTheRow(ReqToTokenPool):
    """The slots behind what is written are in no row any more, and leak."""

    def write(self, indices: Any, values: Any) -> None:
        super().write(indices, values)
        if isinstance(indices[1], slice) and len(values):
            del self._rows[int(indices[0])][indices[1].stop :]


@registry.mutant("REQ-6", "REQ-7", "REQ-8", "REQ-10", "REQ-13", "OBS-1")
class GivesAllRowsTheLastPosition(ReqToTokenPool):
    def write(self, indices: Any, values: Any) -> None:
        rows, positions = indices if len(indices) == 2 else (0, [])
        if isinstance(rows, list) and isinstance(positions, list) and len(values) == len(rows):
            for row in dict.fromkeys(rows):
                super().write((row, [positions[-1]]), [values[-1]])
        else:
            super().write(indices, values)


@registry.mutant("REQ-7", reports=("SG-26972", "SEED-12"))
class ClampsASliceToTheRow(ReqToTokenPool):
    """What torch and Python do: the tail of a row that is too short is dropped in silence."""

    def write(self, indices: Any, values: Any) -> None:
        rows, positions = indices if len(indices) == 2 else (0, [])
        if isinstance(positions, slice) and not isinstance(rows, list):
            start, stop, _ = positions.indices(self.max_context_len)
            if positions.step is None and start <= stop != positions.stop:
                return super().write((rows, slice(start, stop)), values[: stop - start])
        return super().write(indices, values)


@registry.mutant("REQ-7", *WRITES, reports=("SG-26972",))
class SpillsIntoTheNextRow(ReqToTokenPool):
    def write(self, indices: Any, values: Any) -> None:
        rows, positions = indices if len(indices) == 2 else (0, [])
        width = self.max_context_len
        if isinstance(rows, int) and isinstance(positions, slice) and rows + 1 in self._rows:
            stop = positions.stop or width
            if width < stop < 2 * width and stop - (positions.start or 0) == len(values):
                super().write((rows, slice(positions.start, width)), values[: width - stop])
                return super().write((rows + 1, slice(0, stop - width)), values[width - stop :])
        return super().write(indices, values)


@registry.mutant("REQ-7", "OBS-1")
class WritesUpToTheBadPosition(ReqToTokenPool):
    def write(self, indices: Any, values: Any) -> None:
        rows, positions = indices if len(indices) == 2 else (0, [])
        if isinstance(rows, list) and isinstance(positions, list) and len(rows) == len(positions):
            for row, position, slot in zip(rows, positions, values, strict=False):
                super().write((row, [position]), [slot])
            return
        super().write(indices, values)


@registry.mutant("REQ-7", "REQ-12", reports=("INV-001",))
class TakesTheSink(ReqToTokenPool):
    def _require(self, row: int, position: int, end: int, slot: int) -> None:
        super()._require(row, position, end, slot or 1)


@registry.mutant("REQ-7", "OBS-1", reports=("INV-039",))
class LeavesHoles(ReqToTokenPool):
    def _require(self, row: int, position: int, end: int, slot: int) -> None:
        super()._require(row, min(position, end), end, slot)


@registry.mutant("REQ-8", "REQ-6", "REQ-10", reports=("VL-42273",))
class LeavesTheTableStaleWhenOverwriting(ReqToTokenPool):
    def write(self, indices: Any, values: Any) -> None:
        before = {row: len(slots) for row, slots in self._rows.items()}
        table = self.req_to_token.clone()
        super().write(indices, values)
        for row, length in before.items():
            self.req_to_token[row, :length] = table[row, :length]


@registry.mutant("REQ-9", "OBS-1")
class ClearsInTheOrderOfFrees(ReqToTokenPool):
    def clear(self) -> None:
        order = [*self._free, *self._rows]
        super().clear()
        self._free = order


@registry.mutant("REQ-9", "REQ-13", "REQ-15", "OBS-1")
class ClearKeepsTheSlotsOfRows(ReqToTokenPool):
    def clear(self) -> None:
        before = {row: slots for row, slots in self._rows.items() if slots}
        super().clear()
        self._rows = before


@registry.mutant("REQ-10", "REQ-15")
class ChecksNothing(ReqToTokenPool):
    def check(self) -> None:
        pass


@registry.mutant("REQ-10")
class ChecksBeyondTheRow(ReqToTokenPool):
    def check(self) -> None:
        super().check()
        for row in self._free:
            if not self.req_to_token.is_meta and 99 in self.req_to_token[row]:
                raise ContractError("REQ-8: a free row is not empty in the table")


@registry.mutant("REQ-11")
class CountsReceivedRequestsAsRunning(DecodeReqToTokenPool):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.size += given["pre_alloc_size"]


@registry.mutant("REQ-11", "REQ-14", reports=("INV-017",))
class HasNoRowsForReceivedRequests(DecodeReqToTokenPool):
    def __init__(self, *, pre_alloc_size: int, **given: Any) -> None:
        super().__init__(**given, pre_alloc_size=min(pre_alloc_size, 0))


@registry.mutant("REQ-14", "REQ-15")
class IgnoresTheMemorySaver(ReqToTokenPool):
    def __init__(self, **given: Any) -> None:
        super().__init__(**(given | {"enable_memory_saver": False}))


@registry.mutant("REQ-15")
class TakesAnEmptyTableForANewOne(ReqToTokenPool):
    def check(self) -> None:
        if self.req_to_token.is_meta or self.req_to_token.any():
            super().check()


@registry.mutant("REQ-12")
class TakesANegativeSizeForNone(ReqToTokenPool):
    def __init__(self, *, size: int, **given: Any) -> None:
        super().__init__(size=max(size, 0), **given)
