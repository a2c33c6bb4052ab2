"""Rows of requests. Spec: REQ.

The books are a list of free rows and a dict of live rows to their slots. The table that an
attention kernel reads is a copy of them; `_unsent` names the positions that it does not have yet.
"""

import operator
from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

from kvspec.errors import ContractError
from kvspec.interfaces.memory_saver import GPU_MEMORY_TYPE_KV_CACHE
from kvspec.interfaces.request_pool import Indices, ReqToTokenPoolView
from kvspec.oracle.boundary import numbers, tensor
from kvspec.oracle.memory_saver import TorchMemorySaverAdapter
from kvspec.oracle.observer import Reporter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DecodeReqToTokenPool", "ReqToTokenPool"]

LIMIT = 2**31


class ReqToTokenPool(Reporter):
    """A memory pool that maps a request to its token locations."""

    room = "request_pool"

    def __init__(
        self, size: int, max_context_len: int, device: str, enable_memory_saver: bool
    ) -> None:
        self._build(size, 0, max_context_len, device, enable_memory_saver)

    def _build(
        self, size: int, more: int, max_context_len: int, device: str, enable_memory_saver: bool
    ) -> None:
        if not 0 <= size < LIMIT:
            raise ContractError(f"REQ-12: size {size} is not in [0, 2^31)")
        if not 0 <= more < LIMIT - size:
            raise ContractError(f"REQ-12: pre_alloc_size {more} is not in [0, {LIMIT - size})")
        if not 1 <= max_context_len < LIMIT:
            raise ContractError(f"REQ-12: max_context_len {max_context_len} is not in [1, 2^31)")
        self.size, self.max_context_len, self.device = size, max_context_len, str(device)
        saver = TorchMemorySaverAdapter.create(enable_memory_saver)
        with saver.region(GPU_MEMORY_TYPE_KV_CACHE):  # REQ-14
            self.req_to_token = (
                tensor([]).int().new_zeros((size + more, max_context_len), device=device)
            )
        self._free = list(range(size + more))
        self._rows: dict[int, list[int]] = {}
        self._unsent: set[tuple[int, int]] = set()
        self._moved = self._written = self._sent = 0

    # -- rows ------------------------------------------------------------------------------------

    @property
    def free_slots(self) -> list[int]:
        """The free rows, the next to be handed out first."""
        return list(self._free)

    def available_size(self) -> int:
        """How many rows `alloc` can hand out."""
        return len(self._free)

    def alloc(self, need_size: int) -> list[int] | None:
        """Take the rows that have been free longest, or None (REQ-2, REQ-3, REQ-4)."""
        self._guard("alloc")
        count = operator.index(need_size)
        if count < 0:
            raise ContractError(f"REQ-4: alloc({count}) asks for a negative number of rows")
        if count > len(self._free):
            return None
        taken, self._free = self._free[:count], self._free[count:]
        self._rows.update((row, []) for row in taken)
        self._moved += count
        if taken:
            self._report("alloc", taken)
        return taken

    def free(self, free_index: "int | Sequence[int] | Tensor") -> None:
        """Give rows back, in the order given, and forget their slots (REQ-4, REQ-5)."""
        self._guard("free")
        named = _row_or_rows(free_index, "REQ-4")
        given = [named] if isinstance(named, int) else named
        for at, row in enumerate(given):
            if row not in self._rows:
                raise ContractError(f"REQ-4: free names row {row}, which is not live")
            if row in given[:at]:
                raise ContractError(f"REQ-4: free names row {row} twice")
        for row in given:
            del self._rows[row]
        self._free += given
        self._moved += len(given)
        if given:
            self._report("free", given)

    def clear(self) -> None:
        """Make every row free, in ascending order (REQ-9)."""
        self._guard("clear")
        changed = self._rows or self._free != sorted(self._free)
        self._free = sorted([*self._free, *self._rows])
        self._rows = {}
        if changed:
            self._report("clear", self._free)

    # -- slots of a row --------------------------------------------------------------------------

    def row(self, row: int) -> "Tensor":
        """The slots of a live row, a copy (REQ-6)."""
        return tensor(self._books(row))

    def row_length(self, row: int) -> int:
        """How many positions of a live row are written."""
        return len(self._books(row))

    def _books(self, row: int) -> list[int]:
        if operator.index(row) not in self._rows:
            raise ContractError(f"REQ-1: row {operator.index(row)} is not live")
        return self._rows[operator.index(row)]

    def write(self, indices: Indices, values: "Sequence[int] | Tensor") -> None:
        """Set the named positions of rows to slots, all of them or none (REQ-6, REQ-7)."""
        self._guard("write")
        rows, positions = _named(indices, self.max_context_len)
        slots = numbers(values, "REQ-7")
        if len(slots) != len(positions):
            raise ContractError(
                f"REQ-7: {len(slots)} values were given for {len(positions)} positions"
            )
        named = [rows] if isinstance(rows, int) else rows
        for row in named:
            if row not in self._rows:
                raise ContractError(f"REQ-7: write names row {row}, which is not live")
        places = list(zip(repeat(rows) if isinstance(rows, int) else rows, positions, strict=False))
        after = {row: list(self._rows[row]) for row in named}
        for (row, position), slot in zip(places, slots, strict=True):
            self._require(row, position, len(after[row]), slot)
            after[row][position : position + 1] = [slot]
        changed = any(after[row] != self._rows[row] for row in after)
        self._rows.update(after)
        self._unsent.update(places)
        self._written += len(places)
        if self.req_to_token.device.type == "cpu":
            self._send()
        if changed:
            self._report("write", list(after))

    def _require(self, row: int, position: int, end: int, slot: int) -> None:
        if not 0 <= position < self.max_context_len:
            raise ContractError(f"REQ-7: position {position} is not in [0, {self.max_context_len})")
        if position > end:
            raise ContractError(f"REQ-7: position {position} of row {row} is beyond its end, {end}")
        if not 1 <= slot < LIMIT:
            raise ContractError(f"REQ-7: slot {slot} is not in [1, 2^31)")

    # -- the table -------------------------------------------------------------------------------

    def commit(self) -> int:
        """Bring `req_to_token` up to date; the number of positions sent, 0 on the CPU (REQ-8).

        Sent is every position written since the last commit and still in the books, once.
        """
        self._guard("commit")
        sent = self._send()
        self._sent += sent
        return sent

    def _send(self) -> int:
        known = self._rows
        sent = sorted((r, p) for r, p in self._unsent if r in known and p < len(known[r]))
        if sent:
            rows, positions = zip(*sent, strict=True)
            slots = tensor([known[row][position] for row, position in sent])
            table = self.req_to_token
            table[tensor(rows), tensor(positions)] = slots.to(table.device, table.dtype)
        self._unsent.clear()
        return len(sent)

    def counters(self) -> dict[str, int]:
        """Rows that entered or left the free list, positions set, positions sent (REQ-13)."""
        return {
            "rows_moved": self._moved,
            "positions_written": self._written,
            "positions_sent": self._sent,
        }

    # -- checking --------------------------------------------------------------------------------

    def view(self) -> ReqToTokenPoolView:
        """The abstract state: free rows in order, and the slots of the live ones."""
        return ReqToTokenPoolView(
            tuple(self._free), {row: tuple(slots) for row, slots in sorted(self._rows.items())}
        )

    def check(self) -> None:
        """Raise ContractError if books or table are broken (REQ-10).

        Of the table, the committed positions are compared; one on `meta` holds nothing to compare.
        """
        rows = range(self.req_to_token.shape[0])
        if sorted([*self._free, *self._rows]) != list(rows):
            raise ContractError(
                f"REQ-1: {len(self._free)} free and {len(self._rows)} live rows"
                f" are not the rows 0 .. {len(rows) - 1}, once each"
            )
        if self.req_to_token.is_meta:
            return
        for row, slots in sorted(self._rows.items()):
            table = numbers(self.req_to_token[row, : len(slots)].cpu(), "REQ-8")
            for position, (here, there) in enumerate(zip(slots, table, strict=True)):
                if here != there and (row, position) not in self._unsent:
                    raise ContractError(
                        f"REQ-8: req_to_token[{row}, {position}] is {there}, the books have {here}"
                    )


class DecodeReqToTokenPool(ReqToTokenPool):
    """A pool with rows beyond `size`, for requests that are received before they run (REQ-11)."""

    def __init__(
        self,
        size: int,
        max_context_len: int,
        device: str,
        enable_memory_saver: bool,
        pre_alloc_size: int,
    ) -> None:
        self._build(size, pre_alloc_size, max_context_len, device, enable_memory_saver)


def _row_or_rows(named: Any, clause: str) -> int | list[int]:
    """One row, an int of Python, numpy or torch without a dimension, or several."""
    if not hasattr(named, "__index__") or getattr(named, "ndim", 0) != 0:
        return numbers(named, clause)
    try:
        return operator.index(named)
    except TypeError:
        raise ContractError(f"{clause}: {named!r} is not a row") from None


def _named(indices: Indices, width: int) -> tuple[int | list[int], Sequence[int]]:
    """The rows and positions of an argument of `write`."""
    if not isinstance(indices, tuple) or len(indices) != 2:
        raise ContractError(
            "REQ-7: the indices are not (row, slice), (row, positions) or (rows, positions)"
        )
    rows, given = _row_or_rows(indices[0], "REQ-7"), indices[1]
    positions = _sliced(given, width) if isinstance(given, slice) else numbers(given, "REQ-7")
    if isinstance(rows, int):
        return rows, positions
    if isinstance(given, slice):
        raise ContractError("REQ-7: a slice needs one row; give several their positions")
    if len(rows) != len(positions):
        raise ContractError(f"REQ-7: {len(rows)} rows were given for {len(positions)} positions")
    return rows, positions


def _sliced(given: slice, width: int) -> range:
    """The positions of a slice. Nothing is clamped to the row, and -1 is not its last position."""
    start = 0 if given.start is None else given.start
    stop = width if given.stop is None else given.stop
    try:
        positions = range(start, stop, 1 if given.step is None else given.step)
        len(positions)  # fails beyond 64 bits
    except (TypeError, ValueError, OverflowError):
        raise ContractError(f"REQ-7: {given!r} is not a slice of 64-bit integers") from None
    return positions
