"""Pools of a device: a list of tensors for each layer, written and read a row at a time."""

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from kvspec.errors import ContractError
from kvspec.interfaces.kv_storage import KVPoolView, Layer, LayerTransferCounter, Scale, Slots
from kvspec.interfaces.memory_saver import GPU_MEMORY_TYPE_KV_CACHE
from kvspec.oracle.boundary import (
    KV_TYPES,
    is_tensor,
    numbers,
    raw,
    stored_as,
    tensor,
    unsigned,
    zeros,
)
from kvspec.oracle.memory_saver import TorchMemorySaverAdapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["KVCache", "MHATokenToKVPool", "MLATokenToKVPool", "require_cpu", "saver_region"]

LIMIT = 2**31
GB = 2**30


def require_cpu(device: object) -> None:
    """KV-2."""
    if str(device).partition(":")[0] != "cpu":
        raise ContractError(
            f"KV-2: device {device} is not the CPU, which is all that this room has so far"
        )


def saver_region(enable: bool) -> AbstractContextManager[None]:
    """Where the tensors of a pool are allocated (KV-8)."""
    return TorchMemorySaverAdapter.create(enable).region(GPU_MEMORY_TYPE_KV_CACHE)


class KVCache:
    """What the pools of a device share. `_tensors[layer]` are its tensors, [rows, heads, dim]."""

    cpu_offloading_chunk_size = 8192

    def _describe(
        self,
        size: int,
        page_size: int,
        dtype: "torch.dtype",
        device: str,
        checked: bool,
        **dimensions: int,
    ) -> None:
        """Keep what a pool was made with (KV-2)."""
        for name, value in {"page_size": page_size, **dimensions}.items():
            if value < 1:
                raise ContractError(f"KV-2: {name} {value} is not at least 1")
        if not 0 <= size < LIMIT - page_size:
            raise ContractError(f"KV-2: size {size} is not in [0, {LIMIT - page_size})")
        if dtype not in KV_TYPES:
            raise ContractError(f"KV-2: dtype {dtype} is none of {', '.join(map(str, KV_TYPES))}")
        require_cpu(device)
        self.size, self.page_size, self.device = size, page_size, str(device)
        self.dtype, self.store_dtype, self.checked = dtype, stored_as(dtype), checked
        self.layer_transfer_counter: LayerTransferCounter | None = None
        self._copied = 0

    def _span(self, layer_num: int, start_layer: int | None, end_layer: int | None) -> None:
        """Keep which layers of the model a pool has (KV-2)."""
        start = 0 if start_layer is None else start_layer
        if layer_num < 0 or start < 0:
            raise ContractError(f"KV-2: {layer_num} layers from {start} on are not a range")
        end = start + layer_num - 1 if end_layer is None else end_layer
        if end != start + layer_num - 1:
            raise ContractError(f"KV-2: layers {start} to {end} are not {layer_num}")
        self.layer_num, self.start_layer, self.end_layer = layer_num, start, end

    def _allocate(self, enable: bool, rows: Sequence[tuple[int, int]]) -> None:
        """Zeros of these rows, (heads, dim), for every layer (KV-1, KV-8)."""
        count = self.size + self.page_size
        with saver_region(enable):
            columns = [
                [zeros((count, *row), self.store_dtype) for _ in range(self.layer_num)]
                for row in rows
            ]
        self._tensors = [list(layer) for layer in zip(*columns, strict=True)]
        flat = [tensor for column in columns for tensor in column]
        self.data_ptrs = unsigned([tensor.data_ptr() for tensor in flat])
        self.data_strides = tensor([tensor[:1].nbytes for tensor in flat])
        self.mem_usage = self.kv_size_bytes() / GB

    def _flat(self) -> "list[Tensor]":
        """The tensors of all layers, those of the keys first."""
        return [tensor for column in zip(*self._tensors, strict=True) for tensor in column]

    # -- reading ---------------------------------------------------------------------------------

    def _index(self, layer: Layer) -> int:
        """The place of a layer in the pool (KV-6)."""
        named: Any = getattr(layer, "layer_id", layer)
        layer_id = operator.index(named)
        if not self.start_layer <= layer_id < self.start_layer + self.layer_num:
            raise ContractError(
                f"KV-6: layer {layer_id} is not in"
                f" [{self.start_layer}, {self.start_layer + self.layer_num})"
            )
        return layer_id - self.start_layer

    def _waited(self, layer_id: int) -> "list[Tensor]":
        """The tensors of a layer, as soon as it is there (KV-5)."""
        index = self._index(layer_id)
        if self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(index)
        return self._tensors[index]

    def get_key_buffer(self, layer_id: int) -> "Tensor":
        """The live memory of the keys, in `dtype` (KV-3)."""
        return self._waited(layer_id)[0].view(self.dtype)

    def get_value_buffer(self, layer_id: int) -> "Tensor":
        """The live memory of the values, in `dtype` (KV-3)."""
        return self._waited(layer_id)[1].view(self.dtype)

    def get_kv_buffer(self, layer_id: int) -> "tuple[Tensor, Tensor]":
        """Both (KV-3)."""
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

    def register_layer_transfer_counter(
        self, layer_transfer_counter: LayerTransferCounter | None
    ) -> None:
        """Whom the `get_*_buffer` wait for from now on (KV-5)."""
        self.layer_transfer_counter = layer_transfer_counter

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Addresses, bytes, and bytes of a page, of every tensor (KV-7)."""
        tensors = self._flat()
        return (
            [tensor.data_ptr() for tensor in tensors],
            [tensor.nbytes for tensor in tensors],
            [tensor[:1].nbytes * self.page_size for tensor in tensors],
        )

    def kv_size_bytes(self) -> int:
        """Bytes of all tensors (KV-7)."""
        return sum(tensor.nbytes for tensor in self._flat())

    def counters(self) -> dict[str, int]:
        """Rows that were copied, of every tensor (KV-34)."""
        return {"rows_copied": self._copied}

    def view(self) -> KVPoolView:
        """The abstract state: the bytes beyond the sink."""
        return KVPoolView(
            tuple(
                tuple(raw(tensor[self.page_size :]) for tensor in tensors)
                for tensors in self._tensors
            )
        )

    # -- writing ---------------------------------------------------------------------------------

    def _require(self, clause: str, slots: Sequence[int], once: bool) -> None:
        """Every slot is a row and, if `once`, none beyond the sink is named twice (KV-12)."""
        rows = self.size + self.page_size
        for slot in slots:
            if not 0 <= slot < rows:
                raise ContractError(f"{clause}: slot {slot} is not in [0, {rows})")
        for at, slot in enumerate(slots):
            if once and slot >= self.page_size and slot in slots[:at]:
                raise ContractError(f"{clause}: slot {slot} is named twice")

    def _rows(self, name: str, given: "Tensor", like: "Tensor", scale: Scale = None) -> "Tensor":
        """What was given, as it is stored (KV-10, KV-12)."""
        if not is_tensor(given):
            raise ContractError(f"KV-12: {name} is a {type(given).__name__}, not a tensor")
        if given.device.type != "cpu":
            raise ContractError(f"KV-12: {name} is on {given.device}, not on the CPU")
        if given.dtype != self.dtype and (given.dtype not in KV_TYPES or given.itemsize == 1):
            raise ContractError(f"KV-12: {name} is of {given.dtype}, not of {self.dtype}")
        heads, dim = like.shape[1:]
        if given.dim() != 3 or given.shape[1:] != like.shape[1:]:
            raise ContractError(
                f"KV-12: {name} has the shape {list(given.shape)}, not [slots, {heads}, {dim}]"
            )
        if given.dtype == self.dtype:
            return given.detach().clone().view(self.store_dtype)
        if scale is not None:
            given = given / _number(name, scale)
        return given.detach().to(self.dtype).view(self.store_dtype)

    def _put(self, loc: Slots, places: "list[tuple[Tensor, Tensor]]") -> None:
        """Rows into tensors, at these slots (KV-9, KV-12, KV-13)."""
        slots = numbers(loc, "KV-12")
        for _, rows in places:
            if len(rows) != len(slots):
                raise ContractError(f"KV-12: {len(rows)} rows were given for {len(slots)} slots")
        self._require("KV-12", slots, once=self.checked)
        self._scatter(slots, places)

    def _scatter(self, slots: Sequence[int], places: "list[tuple[Tensor, Tensor]]") -> None:
        for into, rows in places:
            for slot, row in zip(slots, rows, strict=True):
                into[slot] = row
            self._copied += len(slots)

    # -- moving and copying ----------------------------------------------------------------------

    def move_kv_cache(self, tgt_loc: Slots, src_loc: Slots) -> None:
        """Every row as it was before the call (KV-14, KV-15)."""
        targets, sources = numbers(tgt_loc, "KV-15"), numbers(src_loc, "KV-15")
        self._require_move(targets, sources)
        self._move(targets, sources)

    def _require_move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        if len(targets) != len(sources):
            raise ContractError(
                f"KV-15: {len(sources)} sources were given for {len(targets)} targets"
            )
        self._require("KV-15", sources, once=False)
        self._require("KV-15", targets, once=True)

    def _move(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        for tensors in self._tensors:
            before = [self._gather(tensor, sources) for tensor in tensors]
            self._scatter(targets, list(zip(tensors, before, strict=True)))

    def _gather(self, source: "Tensor", slots: Sequence[int]) -> "Tensor":
        self._copied += len(slots)
        rows = zeros((len(slots), *source.shape[1:]), source.dtype)
        for at, slot in enumerate(slots):
            rows[at] = source[slot]
        return rows

    def _copy(self, slots: Sequence[int], step: int) -> "list[list[list[Tensor]]]":
        """[layer][chunk][tensor] (KV-16)."""
        chunks = [slots[at : at + step] for at in range(0, len(slots), step)]
        return [
            [[self._gather(tensor, chunk) for tensor in tensors] for chunk in chunks]
            for tensors in self._tensors
        ]

    def _require_copy(self, copy: Any, count: int) -> None:
        """It is one of `count` slots of such a pool (KV-18)."""
        if len(copy) != len(self._tensors):
            raise ContractError(
                f"KV-18: a copy of {len(copy)} layers was given, the pool has {len(self._tensors)}"
            )
        for tensors, chunks in zip(self._tensors, copy, strict=True):
            for chunk in chunks:
                alike = len(chunk) == len(tensors) and all(
                    is_tensor(rows)
                    and rows.device.type == "cpu"
                    and rows.dtype == like.dtype
                    and rows.shape == (len(chunk[0]), *like.shape[1:])
                    for rows, like in zip(chunk, tensors, strict=True)
                )
                if not alike:
                    raise ContractError("KV-18: a chunk of the copy is not rows of such a pool")
            held = sum(len(chunk[0]) for chunk in chunks)
            if held != count:
                raise ContractError(f"KV-18: a copy of {held} slots was given for {count}")

    def _load(self, copy: "list[list[list[Tensor]]]", slots: Sequence[int]) -> None:
        """KV-17."""
        for tensors, chunks in zip(self._tensors, copy, strict=True):
            at = 0
            for chunk in chunks:
                part = slots[at : at + len(chunk[0])]
                self._scatter(part, list(zip(tensors, chunk, strict=True)))
                at += len(part)


def _number(name: str, scale: Any) -> float:
    try:
        return float(scale)
    except (TypeError, ValueError, RuntimeError):
        raise ContractError(f"KV-12: the scale of {name} is not one number") from None


class MHATokenToKVPool(KVCache):
    """K and V of every head, two tensors for each layer."""

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: "torch.dtype",
        head_num: int,
        head_dim: int,
        layer_num: int,
        device: str,
        enable_memory_saver: bool,
        start_layer: int | None = None,
        end_layer: int | None = None,
        checked: bool = True,
    ) -> None:
        self._describe(
            size, page_size, dtype, device, checked, head_num=head_num, head_dim=head_dim
        )
        self._span(layer_num, start_layer, end_layer)
        self.head_num, self.head_dim = head_num, head_dim
        self._allocate(enable_memory_saver, [(head_num, head_dim)] * 2)

    @property
    def k_buffer(self) -> "list[Tensor]":
        """The keys of every layer, of `store_dtype`."""
        return [keys for keys, _ in self._tensors]

    @property
    def v_buffer(self) -> "list[Tensor]":
        """The values of every layer, of `store_dtype`."""
        return [values for _, values in self._tensors]

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of the keys and of the values (KV-7)."""
        keys, values = (
            sum(tensor.nbytes for tensor in each) for each in (self.k_buffer, self.v_buffer)
        )
        return keys, values

    def set_kv_buffer(
        self,
        layer: Layer,
        loc: Slots,
        cache_k: "Tensor",
        cache_v: "Tensor",
        k_scale: Scale = None,
        v_scale: Scale = None,
        layer_id_override: int | None = None,
    ) -> None:
        """Write K and V of a layer (KV-9 to KV-13)."""
        index = self._index(layer if layer_id_override is None else layer_id_override)
        self._put(loc, self._places(index, cache_k, cache_v, k_scale, v_scale))

    def _places(
        self, index: int, cache_k: "Tensor", cache_v: "Tensor", k_scale: Scale, v_scale: Scale
    ) -> "list[tuple[Tensor, Tensor]]":
        keys, values = self._tensors[index]
        return [
            (keys, self._rows("cache_k", cache_k, keys, k_scale)),
            (values, self._rows("cache_v", cache_v, values, v_scale)),
        ]

    def get_cpu_copy(self, indices: Slots) -> "list[list[list[Tensor]]]":
        """[layer][chunk][K, V] (KV-16, KV-18)."""
        slots = numbers(indices, "KV-18")
        self._require("KV-18", slots, once=False)
        return self._copy(slots, self.cpu_offloading_chunk_size)

    def load_cpu_copy(self, kv_cache_cpu: "list[list[list[Tensor]]]", indices: Slots) -> None:
        """Write such a copy into these slots (KV-17, KV-18)."""
        slots = numbers(indices, "KV-18")
        self._require("KV-18", slots, once=True)
        self._require_copy(kv_cache_cpu, len(slots))
        self._load(kv_cache_cpu, slots)


class MLATokenToKVPool(KVCache):
    """One latent for each token, one tensor for each layer (KV-4)."""

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: "torch.dtype",
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        layer_num: int,
        device: str,
        enable_memory_saver: bool,
        start_layer: int | None = None,
        end_layer: int | None = None,
        checked: bool = True,
    ) -> None:
        parts = {"kv_lora_rank": kv_lora_rank, "qk_rope_head_dim": qk_rope_head_dim}
        self._describe(size, page_size, dtype, device, checked, **parts)
        self._span(layer_num, start_layer, end_layer)
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self._allocate(enable_memory_saver, [(1, kv_lora_rank + qk_rope_head_dim)])

    @property
    def kv_buffer(self) -> "list[Tensor]":
        """The latents of every layer, of `store_dtype`."""
        return [latents for latents, *_ in self._tensors]

    def get_value_buffer(self, layer_id: int) -> "Tensor":
        """The first kv_lora_rank columns of the live memory (KV-4)."""
        return self.get_key_buffer(layer_id)[..., : self.kv_lora_rank]

    def get_kv_size_bytes(self) -> int:
        """Bytes of the latents (KV-7)."""
        return self.kv_size_bytes()

    def set_kv_buffer(
        self,
        layer: Layer,
        loc: Slots,
        cache_k: "Tensor",
        cache_v: "Tensor",
        k_scale: Scale = None,
        v_scale: Scale = None,
        layer_id_override: int | None = None,
    ) -> None:
        """Write the latents of a layer, which are all in `cache_k` (KV-9 to KV-13)."""
        index = self._index(layer if layer_id_override is None else layer_id_override)
        latents = self.kv_buffer[index]
        self._put(loc, [(latents, self._rows("cache_k", cache_k, latents, k_scale))])

    def set_mla_kv_buffer(
        self, layer: Layer, loc: Slots, cache_k_nope: "Tensor", cache_k_rope: "Tensor"
    ) -> None:
        """Write both parts of the latents of a layer (KV-9, KV-12)."""
        latents = self.kv_buffer[self._index(layer)]
        nope, rope = latents[..., : self.kv_lora_rank], latents[..., self.kv_lora_rank :]
        self._put(
            loc,
            [
                (nope, self._rows("cache_k_nope", cache_k_nope, nope)),
                (rope, self._rows("cache_k_rope", cache_k_rope, rope)),
            ],
        )

    def get_cpu_copy(self, indices: Slots) -> "list[list[Tensor]]":
        """[layer][chunk] (KV-16, KV-18)."""
        slots = numbers(indices, "KV-18")
        self._require("KV-18", slots, once=False)
        copy = self._copy(slots, self.cpu_offloading_chunk_size)
        return [[rows for (rows,) in chunks] for chunks in copy]

    def load_cpu_copy(self, kv_cache_cpu: "list[list[Tensor]]", indices: Slots) -> None:
        """Write such a copy into these slots (KV-17, KV-18)."""
        slots = numbers(indices, "KV-18")
        self._require("KV-18", slots, once=True)
        copy = [[[rows] for rows in chunks] for chunks in kv_cache_cpu]
        self._require_copy(copy, len(slots))
        self._load(copy, slots)
