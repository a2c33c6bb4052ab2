"""Rows of requests: torch's table over the books of the core. Spec: REQ."""

import torch
from torch import Tensor

from kvspec._core import RequestRows
from kvspec.interfaces.memory_saver import GPU_MEMORY_TYPE_KV_CACHE
from kvspec.interfaces.request_pool import ReqToTokenPoolView
from kvspec.native.memory_saver import TorchMemorySaverAdapter

__all__ = ["DecodeReqToTokenPool", "ReqToTokenPool"]

_POSITION_BYTES = 8
_PACKED_BYTES = 12  # a position in the flat table, int64, and its slot, int32


class ReqToTokenPool(RequestRows):
    """A memory pool that maps a request to its token locations (REQ-1).

    The books are in the core; the table may be in a region of the memory saver, which drops it and
    not the books (REQ-14, REQ-15). In host memory the table is written with them; on a
    device it lags until `commit`.
    """

    def __init__(
        self, size: int, max_context_len: int, device: str, enable_memory_saver: bool
    ) -> None:
        self._build(size, 0, max_context_len, device, enable_memory_saver)

    def _build(
        self, size: int, more: int, max_context_len: int, device: str, enable_memory_saver: bool
    ) -> None:
        super().__init__(size, more, max_context_len)
        self.size, self.max_context_len, self.device = size, max_context_len, str(device)
        rows = size + more
        saver = TorchMemorySaverAdapter.create(enable_memory_saver)
        with saver.region(GPU_MEMORY_TYPE_KV_CACHE):
            self._table = torch.zeros((rows, max_context_len), dtype=torch.int32, device=device)
        if self._table.device.type == "cpu":
            self.mirror(self._table)

    @property
    def req_to_token(self) -> Tensor:
        """int32 [rows, max_context_len] on `device` (REQ-8)."""
        return self._table

    def commit(self) -> int:
        """Bring `req_to_token` up to date; the number of positions sent (REQ-8, REQ-13).

        One packed copy and one scatter in the current stream, or nothing; the host does not wait.
        """
        self.guard("commit")
        count = self.unsent_count()
        if count == 0:
            return 0
        table = self._table
        packed = torch.empty(
            _PACKED_BYTES * count, dtype=torch.uint8, pin_memory=table.device.type == "cuda"
        )
        self.pack(packed)
        there = packed.to(table.device, non_blocking=True)
        places = there[: _POSITION_BYTES * count].view(torch.int64)
        slots = there[_POSITION_BYTES * count :].view(torch.int32)
        table.view(-1).index_copy_(0, places, slots)
        self.sent()
        return count

    def view(self) -> ReqToTokenPoolView:
        """The abstract state: free rows in order, and the slots of the live ones."""
        rows = {row: tuple(self.row(row).tolist()) for row in self.live_rows()}
        return ReqToTokenPoolView(tuple(self.free_slots), rows)

    def check(self) -> None:
        """Raise ContractError if books or table are broken (REQ-10).

        Of the table, the committed positions are compared; one on `meta` holds nothing to compare.
        """
        self.check_books(None if self._table.is_meta else self._table.cpu())


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
