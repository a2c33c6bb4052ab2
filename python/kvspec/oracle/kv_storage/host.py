"""Rows of host memory for those of a device pool, and a list of the free ones."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, get_args

from kvspec.errors import ContractError
from kvspec.interfaces.host_memory import ArenaKind
from kvspec.interfaces.kv_storage import HostedPool, HostPoolView, IOBackend, Layout, Slots
from kvspec.oracle.boundary import has_device, is_tensor, numbers, raw, tensor, zeros
from kvspec.oracle.host_memory import HostArena
from kvspec.oracle.kv_storage.pools import require_cpu

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["HostKVCache", "MHATokenToKVPoolHost", "MLATokenToKVPoolHost"]


def host_memory(shape: Sequence[int], dtype: "torch.dtype", pin_memory: bool) -> "Tensor":
    """The memory of a host pool, pinned where there is a device for it (KV-22)."""
    kind: ArenaKind = "pinned" if pin_memory and has_device() else "mmap"
    return HostArena(kind, prod(shape) * dtype.itemsize, label="kv").tensor(dtype, shape)


class HostKVCache(ABC):
    """What the pools of the host share. Slots are 0 .. size - 1, none of them a sink."""

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
        self._describe(device_pool)
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
        order = [self.layer_num, self.size]
        if layout == "page_first":
            order.reverse()
        self.kv_buffer = host_memory(self._shape(order), self.dtype, pin_memory)
        self._copied = 0
        self._free, self._held = list(range(self.size)), set[int]()

    def _describe(self, device_pool: Any) -> None:
        """Keep what the device pool is like (KV-23, KV-31)."""
        names = self._tensor_names
        if not all(getattr(device_pool, name, ()) for name in names):
            raise ContractError(
                f"KV-23: the device pool, a {type(device_pool).__name__}, has no {', '.join(names)}"
            )
        layers = [getattr(device_pool, name) for name in names]
        self._like = self._signature(device_pool)
        self.dtype = device_pool.store_dtype
        self.layer_num, self.start_layer = device_pool.layer_num, device_pool.start_layer
        self.end_layer = device_pool.end_layer
        self.size_per_token: int = sum(rows[:1].nbytes for column in layers for rows in column)
        self._device_rows, self._device_sink = layers[0][0].shape[0], device_pool.page_size
        self._row = list(layers[0][0].shape[1:])

    def _signature(self, device_pool: Any) -> object:
        """Equal for pools that a host pool fits (KV-31)."""
        layers = [getattr(device_pool, name, []) for name in self._tensor_names]
        tensors = [(rows.shape, rows.dtype) for column in layers for rows in column]
        return device_pool.start_layer, device_pool.page_size, tensors

    @abstractmethod
    def _shape(self, order: list[int]) -> list[int]:
        """Of `kv_buffer`."""

    @abstractmethod
    def _layer(self, index: int) -> "list[Tensor]":
        """The rows of a layer, [size, heads, dim] each, in `kv_buffer`."""

    @abstractmethod
    def _page(self, index: int) -> "Tensor":
        """The rows of a page, in `kv_buffer`."""

    def get_size_per_token(self) -> int:
        """Bytes of a slot, in all layers (KV-22)."""
        return self.size_per_token

    # -- the books -------------------------------------------------------------------------------

    def available_size(self) -> int:
        """How many slots `alloc` can hand out."""
        return len(self._free)

    def alloc(self, need_size: int) -> "Tensor | None":
        """Take the slots that have been free longest, or None (KV-25, KV-26, KV-28)."""
        count = operator.index(need_size)
        if count < 0 or count % self.page_size:
            raise ContractError(f"KV-28: alloc({count}) is not whole pages of {self.page_size}")
        if count > len(self._free):
            return None
        taken, self._free = self._free[:count], self._free[count:]
        self._held.update(taken)
        return tensor(taken)

    def free(self, indices: Slots) -> int:
        """Give whole pages back, last in the order given (KV-27, KV-28)."""
        slots = numbers(indices, "KV-28")
        self._require_pages(slots)
        for at, slot in enumerate(slots):
            if slot in slots[:at]:
                raise ContractError(f"KV-28: slot {slot} is named twice")
            if slot not in self._held:
                raise ContractError(f"KV-28: free names slot {slot}, which is free")
        self._held -= set(slots)
        self._free += slots
        return len(slots)

    def _require_pages(self, slots: Sequence[int]) -> None:
        unit = self.page_size
        for at, slot in enumerate(slots):
            if not 0 <= slot < self.size:
                raise ContractError(f"KV-28: slot {slot} is not in [0, {self.size})")
            expected = slots[at - 1] + 1 if at % unit else slot // unit * unit
            if slot != expected:
                raise ContractError(
                    f"KV-28: free names slot {slot} where slot {expected} makes whole pages in"
                    " order"
                )
        if len(slots) % unit:
            raise ContractError(
                f"KV-28: free names {len(slots)} slots, which are not whole pages of {unit}"
            )

    def clear(self) -> None:
        """Make every slot free, in ascending order (KV-27)."""
        self._free, self._held = list(range(self.size)), set[int]()

    def counters(self) -> dict[str, int]:
        """Rows that were copied, of every tensor (KV-34)."""
        return {"rows_copied": self._copied}

    def view(self) -> HostPoolView:
        """The abstract state. KV-24: every slot is in one of the two."""
        layers = [self._layer(index) for index in range(self.layer_num)]
        columns = [rows for column in zip(*layers, strict=True) for rows in column]
        held = {slot: b"".join(raw(rows[slot]) for rows in columns) for slot in sorted(self._held)}
        return HostPoolView(tuple(self._free), held)

    # -- transfers -------------------------------------------------------------------------------

    def backup_from_device_all_layer(
        self,
        device_pool: HostedPool,
        host_indices: Slots,
        device_indices: Slots,
        io_backend: IOBackend,
    ) -> None:
        """Copy rows of all layers to the host (KV-29, KV-31)."""
        here, there = self._named(device_pool, host_indices, device_indices, io_backend)
        for index in range(self.layer_num):
            self._transfer(self._layer(index), here, self._device(device_pool, index), there)

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
        here, there = self._named(device_pool, host_indices, device_indices, io_backend)
        self._transfer(self._device(device_pool, index), there, self._layer(index), here)

    def _device(self, device_pool: Any, index: int) -> "list[Tensor]":
        return [getattr(device_pool, name)[index] for name in self._tensor_names]

    def _named(
        self, device_pool: HostedPool, host: Slots, device: Slots, io_backend: IOBackend
    ) -> tuple[list[int], list[int]]:
        """The slots of either side, which fit each other (KV-31)."""
        if io_backend not in get_args(IOBackend):
            raise ContractError(
                f"KV-31: io_backend {io_backend} is none of {', '.join(get_args(IOBackend))}"
            )
        if io_backend == "direct" and self.layout != "layer_first":
            raise ContractError("KV-31: io_backend direct needs the layout layer_first")
        if self._signature(device_pool) != self._like:
            raise ContractError("KV-31: the device pool is not like that of the host pool")
        here, there = numbers(host, "KV-31"), numbers(device, "KV-31")
        if len(here) != len(there):
            raise ContractError(
                f"KV-31: {len(here)} slots of the host were given for {len(there)} of the device"
            )
        _require_once("the host", here, 0, self.size)
        for slot in here:
            if slot not in self._held:
                raise ContractError(f"KV-31: slot {slot} of the host is free")
        _require_once("the device", there, self._device_sink, self._device_rows)
        return here, there

    def _transfer(
        self, into: "list[Tensor]", to: list[int], out_of: "list[Tensor]", from_: list[int]
    ) -> None:
        for target, source in zip(into, out_of, strict=True):
            for one, other in zip(to, from_, strict=True):
                target[one] = source[other]
            self._copied += len(to)

    # -- flat pages ------------------------------------------------------------------------------

    def get_flat_data_page(self, index: int) -> "Tensor":
        """A copy of the page that begins at this slot (KV-32, KV-33)."""
        return self._page(self._require_page(index)).flatten().clone()

    def set_from_flat_data_page(self, index: int, data_page: "Tensor") -> None:
        """Write such a page (KV-32, KV-33)."""
        page = self._page(self._require_page(index))
        if not is_tensor(data_page) or data_page.device.type != "cpu":
            raise ContractError("KV-33: the data is not a tensor on the CPU")
        if data_page.shape != (page.numel(),) or data_page.dtype != self.dtype:
            raise ContractError(
                f"KV-33: data {list(data_page.shape)} of {data_page.dtype} was given, not"
                f" [{page.numel()}] of {self.dtype}"
            )
        page[:] = data_page.reshape(page.shape)

    def get_dummy_flat_data_page(self) -> "Tensor":
        """Zeros of the length of a page (KV-32)."""
        return zeros((self.page_size * self.size_per_token // self.dtype.itemsize,), self.dtype)

    def _require_page(self, index: int) -> int:
        slot = operator.index(index)
        if not 0 <= slot < self.size or slot % self.page_size:
            raise ContractError(
                f"KV-33: no page of {self.page_size} slots of {self.size} begins at {slot}"
            )
        if slot not in self._held:
            raise ContractError(f"KV-33: the page that begins at slot {slot} is free")
        return slot


def _require_once(whose: str, slots: list[int], first: int, limit: int) -> None:
    for slot in slots:
        if not first <= slot < limit:
            raise ContractError(f"KV-31: slot {slot} of {whose} is not in [{first}, {limit})")
    for at, slot in enumerate(slots):
        if slot in slots[:at]:
            raise ContractError(f"KV-31: slot {slot} of {whose} is named twice")


class MHATokenToKVPoolHost(HostKVCache):
    """K and V: [2, layers, size, heads, dim], or [2, size, layers, heads, dim] by pages."""

    _tensor_names = "k_buffer", "v_buffer"

    def _shape(self, order: list[int]) -> list[int]:
        return [2, *order, *self._row]

    def _layer(self, index: int) -> "list[Tensor]":
        by_layer = self.layout == "layer_first"
        return [part[index] if by_layer else part[:, index] for part in self.kv_buffer]

    def _page(self, index: int) -> "Tensor":
        rows = slice(index, index + self.page_size)
        by_layer = self.layout == "layer_first"
        return self.kv_buffer[:, :, rows] if by_layer else self.kv_buffer[:, rows]


class MLATokenToKVPoolHost(HostKVCache):
    """One latent: [layers, size, 1, latent], or [size, layers, 1, latent] by pages."""

    _tensor_names = ("kv_buffer",)

    def _shape(self, order: list[int]) -> list[int]:
        return [*order, *self._row]

    def _layer(self, index: int) -> "list[Tensor]":
        return [self.kv_buffer[index] if self.layout == "layer_first" else self.kv_buffer[:, index]]

    def _page(self, index: int) -> "Tensor":
        rows = slice(index, index + self.page_size)
        return self.kv_buffer[:, rows] if self.layout == "layer_first" else self.kv_buffer[rows]
