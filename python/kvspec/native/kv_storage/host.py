"""Rows of host memory for those of a device pool; the books of them are in the core."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import get_args

import torch
from torch import Tensor

from kvspec._core import HostSlots, copy_rows
from kvspec.errors import ContractError
from kvspec.interfaces.host_memory import ArenaKind
from kvspec.interfaces.kv_storage import HostedPool, HostPoolView, IOBackend, Layout, Slots
from kvspec.native.host_memory import HostArena
from kvspec.native.kv_storage.pools import bytes_of, require_cpu

__all__ = ["HostKVCache", "MHATokenToKVPoolHost", "MLATokenToKVPoolHost"]


def _host_memory(shape: Sequence[int], dtype: torch.dtype, pin_memory: bool) -> Tensor:
    """The memory of a host pool, pinned where there is a device for it (KV-22)."""
    kind: ArenaKind = "pinned" if pin_memory and torch.cuda.is_available() else "mmap"
    return HostArena(kind, prod(shape) * dtype.itemsize, label="kv").tensor(dtype, shape)


class HostKVCache(ABC):
    """What the pools of the host share. Slots are 0 .. size - 1, none of them a sink (KV-24)."""

    _tensor_names: tuple[str, ...]
    """What a device pool calls the tensors of its layers."""

    def __init__(
        self,
        device_pool: HostedPool,
        host_to_device_ratio: float,
        host_size: float,
        page_size: int,
        layout: Layout,
        pin_memory: bool = True,
        device: str = "cpu",
    ) -> None:
        if page_size < 1:
            raise ContractError(f"KV-2: page_size {page_size} is not at least 1")
        require_cpu(device)
        if layout not in get_args(Layout):
            raise ContractError(f"KV-23: layout {layout} is none of {', '.join(get_args(Layout))}")
        self.page_size, self.layout = page_size, layout
        self.pin_memory, self.device = pin_memory, str(device)
        row = self._describe(device_pool)
        wanted = (
            int(host_size * 1e9 // self.size_per_token)
            if host_size > 0
            else int(device_pool.size * host_to_device_ratio)
        )
        self.page_num = wanted // page_size
        self.size = self.page_num * page_size
        if self.size <= device_pool.size:
            raise ContractError(
                f"KV-23: {self.size} slots on the host are not more than the {device_pool.size}"
                " of the device pool"
            )
        pages_first = layout == "page_first"
        order = (self.size, self.layer_num) if pages_first else (self.layer_num, self.size)
        self.kv_buffer = _host_memory(self._shape(order, row), self.dtype, pin_memory)
        self._layers = [self._rows(index) for index in range(self.layer_num)]
        device_rows = device_pool.size + device_pool.page_size
        self._books = HostSlots(self.size, page_size, device_pool.page_size, device_rows)
        self._copied = 0

    def _describe(self, device_pool: HostedPool) -> torch.Size:
        """Keep what the device pool is like (KV-23, KV-31); the shape of its rows."""
        names = self._tensor_names
        if not all(getattr(device_pool, name, ()) for name in names):
            raise ContractError(
                f"KV-23: the device pool, a {type(device_pool).__name__}, has no {', '.join(names)}"
            )
        self._like = self._signature(device_pool)
        self.dtype = device_pool.store_dtype
        self.layer_num, self.start_layer = device_pool.layer_num, device_pool.start_layer
        self.end_layer = device_pool.end_layer
        layers = [rows for name in names for rows in getattr(device_pool, name)]
        row: torch.Size = layers[0].shape[1:]
        self.size_per_token = prod(row) * self.dtype.itemsize * len(layers)
        return row

    def _signature(self, device_pool: HostedPool) -> object:
        """Equal for pools that a host pool fits (KV-31)."""
        layers = [rows for name in self._tensor_names for rows in getattr(device_pool, name, ())]
        tensors = [(rows.shape, rows.dtype) for rows in layers]
        return device_pool.start_layer, device_pool.page_size, tensors

    @abstractmethod
    def _shape(self, order: tuple[int, int], row: torch.Size) -> tuple[int, ...]:
        """Of `kv_buffer`."""

    @abstractmethod
    def _rows(self, index: int) -> list[Tensor]:
        """The rows of a layer, [size, heads, dim] each, in `kv_buffer`."""

    @abstractmethod
    def _page(self, index: int) -> Tensor:
        """The rows of a page, in `kv_buffer`."""

    def get_size_per_token(self) -> int:
        """Bytes of a slot, in all layers (KV-22)."""
        return self.size_per_token

    # -- the books -------------------------------------------------------------------------------

    def available_size(self) -> int:
        """How many slots `alloc` can hand out."""
        return self._books.available_size()

    def alloc(self, need_size: int) -> Tensor | None:
        """Take the slots that have been free longest, or None (KV-25, KV-26, KV-28)."""
        return self._books.alloc(need_size)

    def free(self, indices: Slots) -> int:
        """Give whole pages back, last in the order given (KV-27, KV-28)."""
        return self._books.free(indices)

    def clear(self) -> None:
        """Make every slot free, in ascending order (KV-27)."""
        self._books.clear()

    def counters(self) -> dict[str, int]:
        """Rows that were copied, of every tensor (KV-34)."""
        return {"rows_copied": self._copied}

    def view(self) -> HostPoolView:
        """The abstract state."""
        columns = [rows for column in zip(*self._layers, strict=True) for rows in column]
        held = {
            slot: b"".join(bytes_of(rows[slot]) for rows in columns)
            for slot in self._books.held_slots()
        }
        return HostPoolView(tuple(self._books.free_slots()), held)

    # -- transfers -------------------------------------------------------------------------------

    def backup_from_device_all_layer(
        self,
        device_pool: HostedPool,
        host_indices: Slots,
        device_indices: Slots,
        io_backend: IOBackend,
    ) -> None:
        """Copy rows of all layers to the host (KV-29, KV-31)."""
        self._require_fit(device_pool, io_backend)
        count = self._books.require_transfer(host_indices, device_indices)
        for index, rows in enumerate(self._layers):
            for here, there in zip(rows, self._device(device_pool, index), strict=True):
                copy_rows(here, host_indices, there, device_indices)
                self._copied += count

    def load_to_device_per_layer(
        self,
        device_pool: HostedPool,
        host_indices: Slots,
        device_indices: Slots,
        layer_id: int,
        io_backend: IOBackend,
    ) -> None:
        """Copy rows of one layer to the device (KV-30, KV-31)."""
        index = operator.index(layer_id) - self.start_layer
        if not 0 <= index < self.layer_num:
            raise ContractError(
                f"KV-6: layer {layer_id} is not in"
                f" [{self.start_layer}, {self.start_layer + self.layer_num})"
            )
        self._require_fit(device_pool, io_backend)
        count = self._books.require_transfer(host_indices, device_indices)
        for here, there in zip(self._layers[index], self._device(device_pool, index), strict=True):
            copy_rows(there, device_indices, here, host_indices)
            self._copied += count

    def _device(self, device_pool: HostedPool, index: int) -> list[Tensor]:
        """The tensors of a layer; nobody waits for one, as `get_key_buffer` does."""
        return [getattr(device_pool, name)[index] for name in self._tensor_names]

    def _require_fit(self, device_pool: HostedPool, io_backend: IOBackend) -> None:
        """KV-31."""
        if io_backend not in get_args(IOBackend):
            raise ContractError(
                f"KV-31: io_backend {io_backend} is none of {', '.join(get_args(IOBackend))}"
            )
        if io_backend == "direct" and self.layout != "layer_first":
            raise ContractError("KV-31: io_backend direct needs the layout layer_first")
        if self._signature(device_pool) != self._like:
            raise ContractError("KV-31: the device pool is not like that of the host pool")

    # -- flat pages ------------------------------------------------------------------------------

    def get_flat_data_page(self, index: int) -> Tensor:
        """A copy of the page that begins at this slot (KV-32, KV-33)."""
        self._books.require_page(index)
        page = self._page(index)
        return torch.empty(page.shape, dtype=self.dtype).copy_(page).view(-1)

    def set_from_flat_data_page(self, index: int, data_page: Tensor) -> None:
        """Write such a page (KV-32, KV-33)."""
        self._books.require_page(index)
        page = self._page(index)
        if not isinstance(data_page, Tensor) or data_page.device.type != "cpu":
            raise ContractError("KV-33: the data is not a tensor on the CPU")
        if data_page.shape != (page.numel(),) or data_page.dtype != self.dtype:
            raise ContractError(
                f"KV-33: data {list(data_page.shape)} of {data_page.dtype} was given, not"
                f" [{page.numel()}] of {self.dtype}"
            )
        page.copy_(data_page.detach().reshape(page.shape))

    def get_dummy_flat_data_page(self) -> Tensor:
        """Zeros of the length of a page (KV-32)."""
        count = self.page_size * self.size_per_token // self.dtype.itemsize
        return torch.zeros(count, dtype=self.dtype)


class MHATokenToKVPoolHost(HostKVCache):
    """K and V: [2, layers, size, heads, dim], or [2, size, layers, heads, dim] by pages."""

    _tensor_names = "k_buffer", "v_buffer"

    def _shape(self, order: tuple[int, int], row: torch.Size) -> tuple[int, ...]:
        return (2, *order, *row)

    def _rows(self, index: int) -> list[Tensor]:
        by_layer = self.layout == "layer_first"
        return [part[index] if by_layer else part[:, index] for part in self.kv_buffer]

    def _page(self, index: int) -> Tensor:
        rows = slice(index, index + self.page_size)
        by_layer = self.layout == "layer_first"
        return self.kv_buffer[:, :, rows] if by_layer else self.kv_buffer[:, rows]


class MLATokenToKVPoolHost(HostKVCache):
    """One latent: [layers, size, 1, latent], or [size, layers, 1, latent] by pages."""

    _tensor_names = ("kv_buffer",)

    def _shape(self, order: tuple[int, int], row: torch.Size) -> tuple[int, ...]:
        return (*order, *row)

    def _rows(self, index: int) -> list[Tensor]:
        return [self.kv_buffer[index] if self.layout == "layer_first" else self.kv_buffer[:, index]]

    def _page(self, index: int) -> Tensor:
        rows = slice(index, index + self.page_size)
        return self.kv_buffer[:, rows] if self.layout == "layer_first" else self.kv_buffer[rows]
