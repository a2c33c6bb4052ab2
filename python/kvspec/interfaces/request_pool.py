"""The pool of request rows. Spec: REQ."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from kvspec.interfaces.observer import Observable

__all__ = ["Indices", "ReqToTokenPool", "ReqToTokenPoolView"]

Positions: TypeAlias = slice | Sequence[int] | Tensor
Indices: TypeAlias = tuple[int | Sequence[int] | Tensor, Positions]
"""(row, slice), (row, positions) or (rows, positions)."""


class ReqToTokenPoolView(NamedTuple):
    free: tuple[int, ...]
    """Free rows, the next to be handed out first."""
    rows: Mapping[int, tuple[int, ...]]
    """Live rows and the slots written to them."""


class ReqToTokenPool(Observable, Protocol):
    """A memory pool that maps a request to its token locations (REQ-1, REQ-11, REQ-12).

    With `enable_memory_saver` the table is in `region("kv_cache")`: after a pause and a resume it
    is zeros, and what was in it has to be given up with `clear()` (REQ-14, REQ-15).
    """

    size: int
    max_context_len: int
    device: str

    @property
    def req_to_token(self) -> Tensor:
        """int32 [rows, max_context_len] on `device` (REQ-8)."""

    @property
    def free_slots(self) -> list[int]:
        """The free rows, the next to be handed out first. O(rows)."""

    def alloc(self, need_size: int) -> list[int] | None:
        """Take rows, or None and no change (REQ-2, REQ-3, REQ-4). O(need_size)."""

    def free(self, free_index: int | Sequence[int]) -> None:
        """Give rows back (REQ-4, REQ-5). O(rows named)."""

    def available_size(self) -> int:
        """How many rows `alloc` can hand out. O(1)."""

    def write(self, indices: Indices, values: Sequence[int] | Tensor) -> None:
        """Set positions of rows to slots (REQ-6, REQ-7). O(positions named)."""

    def row(self, row: int) -> Tensor:
        """The slots of a live row: int64 [row_length(row)], a copy, on the CPU. O(length)."""

    def row_length(self, row: int) -> int:
        """How many positions of a live row are written: its allocated length. O(1)."""

    def commit(self) -> int:
        """Bring `req_to_token` up to date; the number of positions sent (REQ-8, REQ-13)."""

    def clear(self) -> None:
        """Make every row free (REQ-9). O(rows)."""

    def view(self) -> ReqToTokenPoolView:
        """The abstract state. O(rows + slots written)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `rows_moved`, `positions_written`, `positions_sent` (REQ-13)."""

    def check(self) -> None:
        """Raise ContractError if the books are broken (REQ-10). O(rows + slots written)."""
