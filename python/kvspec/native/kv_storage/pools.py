"""Pools of a device: torch's memory, and the core that checks slots and copies rows."""

import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvspec._core import KVStorage
from kvspec.errors import ContractError
from kvspec.interfaces.kv_storage import KVPoolView, Layer, LayerTransferCounter, Scale, Slots
from kvspec.interfaces.memory_saver import GPU_MEMORY_TYPE_KV_CACHE
from kvspec.native.memory_saver import TorchMemorySaverAdapter

__all__ = ["Copy", "KVCache", "MHATokenToKVPool", "MLATokenToKVPool", "bytes_of", "require_cpu"]

_LIMIT = 2**31
GB = 2**30
_WIDE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What can be cast to any type that KV is kept in."""
_TYPES = (*_WIDE, torch.float8_e5m2, torch.float8_e4m3fn)

Copy = list[list[list[Tensor]]]
"""[layer][chunk][tensor]"""


def require_cpu(device: object) -> None:
    """KV-2."""
    if str(device).partition(":")[0] != "cpu":
        raise ContractError(
            f"KV-2: device {device} is not the CPU, which is all that this room has so far"
        )


def _saver_region(enable: bool) -> AbstractContextManager[None]:
    """Where the tensors of a pool are allocated (KV-8)."""
    return TorchMemorySaverAdapter.create(enable).region(GPU_MEMORY_TYPE_KV_CACHE)


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of its elements, in order."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


class Part(NamedTuple):
    """Where the core has columns of every layer, and what rows of them look like."""

    first: int
    """Their place in the core for the first layer of the rank."""
    heads: int
    dim: int


class KVCache:
    """What the pools of a device share: tensors in the core, keys of all layers first (KV-3).

    `checked` is whether a slot that is named twice is refused (KV-12, KV-13).
    """

    cpu_offloading_chunk_size = 8192

    def _describe(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        device: str,
        checked: bool,
        **dimensions: int,
    ) -> None:
        """Keep what a pool was made with (KV-2)."""
        for name, value in {"page_size": page_size, **dimensions}.items():
            if value < 1:
                raise ContractError(f"KV-2: {name} {value} is not at least 1")
        if not 0 <= size < _LIMIT - page_size:
            raise ContractError(f"KV-2: size {size} is not in [0, {_LIMIT - page_size})")
        if dtype not in _TYPES:
            raise ContractError(f"KV-2: dtype {dtype} is none of {', '.join(map(str, _TYPES))}")
        require_cpu(device)
        self.size, self.page_size, self.device = size, page_size, str(device)
        self.dtype, self.checked = dtype, checked
        self.store_dtype = torch.uint8 if dtype.itemsize == 1 else dtype
        self.layer_transfer_counter: LayerTransferCounter | None = None

    def _span(self, layer_num: int, start_layer: int | None, end_layer: int | None) -> None:
        """Keep which layers of the model a pool has (KV-2)."""
        start = 0 if start_layer is None else start_layer
        if layer_num < 0 or start < 0:
            raise ContractError(f"KV-2: {layer_num} layers from {start} on are not a range")
        end = start + layer_num - 1 if end_layer is None else end_layer
        if end != start + layer_num - 1:
            raise ContractError(f"KV-2: layers {start} to {end} are not {layer_num}")
        self.layer_num, self.start_layer, self.end_layer = layer_num, start, end

    def _allocate(self, enable: bool, rows: Sequence[tuple[int, int]]) -> list[list[Tensor]]:
        """Zeros of these rows, (heads, dim), for every layer: [part][layer] (KV-1, KV-8)."""
        count = self.size + self.page_size
        self._storage = KVStorage(count, self.page_size, self.checked)
        with _saver_region(enable):
            columns = [
                [
                    torch.zeros((count, *row), dtype=self.store_dtype, device=self.device)
                    for _ in range(self.layer_num)
                ]
                for row in rows
            ]
        self._tensors = [tensor for column in columns for tensor in column]
        for tensor in self._tensors:
            self._storage.add(tensor)
        pointers, _, _ = self.get_contiguous_buf_infos()
        self.data_ptrs = torch.tensor(pointers, dtype=torch.uint64)
        self.data_strides = torch.tensor([tensor[:1].nbytes for tensor in self._tensors])
        self.mem_usage = self.kv_size_bytes() / GB
        return columns

    # -- reading ---------------------------------------------------------------------------------

    def _index(self, layer: Layer) -> int:
        """The place of a layer in the pool (KV-6)."""
        named: Any = getattr(layer, "layer_id", layer)
        index = operator.index(named) - self.start_layer
        if not 0 <= index < self.layer_num:
            raise ContractError(
                f"KV-6: layer {index + self.start_layer} is not in"
                f" [{self.start_layer}, {self.start_layer + self.layer_num})"
            )
        return index

    def _waited(self, layer_id: int) -> int:
        """The place of a layer, as soon as it is there (KV-5)."""
        index = self._index(layer_id)
        if self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(index)
        return index

    def register_layer_transfer_counter(
        self, layer_transfer_counter: LayerTransferCounter | None
    ) -> None:
        """Whom the `get_*_buffer` wait for from now on (KV-5)."""
        self.layer_transfer_counter = layer_transfer_counter

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Addresses, bytes, and bytes of a page, of every tensor (KV-7)."""
        tensors = self._tensors
        return (
            [tensor.data_ptr() for tensor in tensors],
            [tensor.nbytes for tensor in tensors],
            [tensor[:1].nbytes * self.page_size for tensor in tensors],
        )

    def kv_size_bytes(self) -> int:
        """Bytes of all tensors (KV-7)."""
        return sum(tensor.nbytes for tensor in self._tensors)

    def counters(self) -> dict[str, int]:
        """Rows that were copied, of every tensor (KV-34)."""
        return {"rows_copied": self._storage.rows_copied}

    def view(self) -> KVPoolView:
        """The abstract state: the bytes beyond the sink."""
        layers = range(self.layer_num)
        step = max(self.layer_num, 1)
        return KVPoolView(
            tuple(
                tuple(bytes_of(rows[self.page_size :]) for rows in self._tensors[layer::step])
                for layer in layers
            )
        )

    # -- writing ---------------------------------------------------------------------------------

    def _rows(self, name: str, given: Tensor, part: Part, scale: Scale = None) -> Tensor:
        """What was given, as it is stored; it is not written to (KV-10, KV-11, KV-12)."""
        if not isinstance(given, Tensor):
            raise ContractError(f"KV-12: {name} is a {type(given).__name__}, not a tensor")
        dtype = given.dtype
        if given.device.type != "cpu":
            raise ContractError(f"KV-12: {name} is on {given.device}, not on the CPU")
        if dtype != self.dtype and dtype not in _WIDE:
            raise ContractError(f"KV-12: {name} is of {dtype}, not of {self.dtype}")
        if given.dim() != 3 or given.shape[1:] != (part.heads, part.dim):
            raise ContractError(
                f"KV-12: {name} has the shape {list(given.shape)},"
                f" not [slots, {part.heads}, {part.dim}]"
            )
        if given.requires_grad:
            given = given.detach()
        if dtype != self.dtype:
            quotient = given if scale is None else given / _number(name, scale)
            return quotient.to(self.dtype).view(self.store_dtype)
        if not given.is_contiguous() and given.stride()[1:] != (part.dim, 1):
            given = given.contiguous()
        if given.is_neg():
            given = given.resolve_neg()
        return given.view(self.store_dtype) if dtype != self.store_dtype else given

    # -- moving and copying ----------------------------------------------------------------------

    def move_kv_cache(self, tgt_loc: Slots, src_loc: Slots) -> None:
        """Every row as it was before the call (KV-14, KV-15)."""
        self._storage.move("KV-15", tgt_loc, src_loc, len(self._tensors))

    def copied(self, slots: Tensor, chunk_size: int) -> Copy:
        """[layer][chunk][tensor], of slots that are rows (KV-16)."""
        chunks = [slots[at : at + chunk_size] for at in range(0, len(slots), chunk_size)]
        step = max(self.layer_num, 1)
        return [
            [
                [self._read(chunk, at) for at in range(layer, len(self._tensors), step)]
                for chunk in chunks
            ]
            for layer in range(self.layer_num)
        ]

    def _read(self, slots: Tensor, at: int) -> Tensor:
        rows = self._tensors[at].new_empty((len(slots), *self._tensors[at].shape[1:]))
        self._storage.read("KV-18", slots, at, rows)
        return rows

    def require_copy(self, copy: Copy, count: int) -> None:
        """It is one of `count` slots of such a pool (KV-18)."""
        if len(copy) != self.layer_num:
            raise ContractError(
                f"KV-18: a copy of {len(copy)} layers was given, the pool has {self.layer_num}"
            )
        for layer, chunks in enumerate(copy):
            likes = self._tensors[layer :: self.layer_num]
            for chunk in chunks:
                if not _is_like(chunk, likes):
                    raise ContractError("KV-18: a chunk of the copy is not rows of such a pool")
            held = sum(len(chunk[0]) for chunk in chunks)
            if held != count:
                raise ContractError(f"KV-18: a copy of {held} slots was given for {count}")

    def load(self, copy: Copy, slots: Tensor) -> None:
        """Write a copy that fits into slots that fit (KV-17)."""
        for layer, chunks in enumerate(copy):
            at = 0
            for chunk in chunks:
                part = slots[at : at + len(chunk[0])]
                for place, rows in enumerate(chunk):
                    self._storage.write(
                        "KV-18", part, layer + place * self.layer_num, rows.contiguous()
                    )
                at += len(part)


def _is_like(chunk: Sequence[Tensor], likes: Sequence[Tensor]) -> bool:
    """Whether it is rows of these tensors, as many of each."""
    return len(chunk) == len(likes) and all(
        isinstance(rows, Tensor)
        and rows.device.type == "cpu"
        and rows.dtype == like.dtype
        and rows.shape == (len(chunk[0]), *like.shape[1:])
        for rows, like in zip(chunk, likes, strict=True)
    )


def _number(name: str, scale: float | Tensor) -> float:
    try:
        return float(scale)
    except (TypeError, ValueError, RuntimeError):
        raise ContractError(f"KV-12: the scale of {name} is not one number") from None


def as_rows(clause: str, storage: KVStorage, slots: Slots, once: bool) -> Tensor:
    """The slots, which the core finds to be rows, as int64 in memory of their own."""
    require = storage.require_targets if once else storage.require_rows
    require(clause, slots)
    if isinstance(slots, Tensor):
        return slots.to(torch.int64, copy=True)
    return torch.tensor([*slots], dtype=torch.int64)


class MHATokenToKVPool(KVCache):
    """K and V of every head, two tensors for each layer."""

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
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
        self.k_buffer, self.v_buffer = self._allocate(
            enable_memory_saver, [(head_num, head_dim)] * 2
        )
        self._part = Part(0, head_num, head_dim)

    def get_key_buffer(self, layer_id: int) -> Tensor:
        """The live memory of the keys, in `dtype` (KV-3)."""
        return self.k_buffer[self._waited(layer_id)].view(self.dtype)

    def get_value_buffer(self, layer_id: int) -> Tensor:
        """The live memory of the values, in `dtype` (KV-3)."""
        return self.v_buffer[self._waited(layer_id)].view(self.dtype)

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Both (KV-3)."""
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

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
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: Scale = None,
        v_scale: Scale = None,
        layer_id_override: int | None = None,
    ) -> None:
        """Write K and V of a layer (KV-9 to KV-13)."""
        index = self._index(layer if layer_id_override is None else layer_id_override)
        keys, values = self.rows(cache_k, cache_v, k_scale, v_scale)
        self.put(index, loc, keys, values)

    def rows(
        self, cache_k: Tensor, cache_v: Tensor, k_scale: Scale, v_scale: Scale
    ) -> tuple[Tensor, Tensor]:
        """Both as they are stored (KV-10)."""
        keys = self._rows("cache_k", cache_k, self._part, k_scale)
        return keys, self._rows("cache_v", cache_v, self._part, v_scale)

    def put(self, index: int, loc: Slots, keys: Tensor, values: Tensor) -> None:
        """Write what `rows` gave to the layer in this place (KV-9)."""
        self._storage.write_two("KV-12", loc, index, keys, index + self.layer_num, values)

    def get_cpu_copy(self, indices: Slots) -> Copy:
        """[layer][chunk][K, V] (KV-16, KV-18)."""
        return self.copied(
            as_rows("KV-18", self._storage, indices, once=False), self.cpu_offloading_chunk_size
        )

    def load_cpu_copy(self, kv_cache_cpu: Copy, indices: Slots) -> None:
        """Write such a copy into these slots (KV-17, KV-18)."""
        slots = as_rows("KV-18", self._storage, indices, once=True)
        self.require_copy(kv_cache_cpu, len(slots))
        self.load(kv_cache_cpu, slots)


class MLATokenToKVPool(KVCache):
    """One latent for each token, one tensor for each layer (KV-4).

    The core has its two parts as tensors of their own, behind those of the latents.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
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
        latent = kv_lora_rank + qk_rope_head_dim
        (self.kv_buffer,) = self._allocate(enable_memory_saver, [(1, latent)])
        for columns in (slice(None, kv_lora_rank), slice(kv_lora_rank, None)):
            for latents in self.kv_buffer:
                self._storage.add(latents[..., columns])
        self._latent = Part(0, 1, latent)
        self._nope = Part(layer_num, 1, kv_lora_rank)
        self._rope = Part(2 * layer_num, 1, qk_rope_head_dim)

    def get_key_buffer(self, layer_id: int) -> Tensor:
        """The live memory of the latents, in `dtype` (KV-3)."""
        return self.kv_buffer[self._waited(layer_id)].view(self.dtype)

    def get_value_buffer(self, layer_id: int) -> Tensor:
        """The first kv_lora_rank columns of the live memory (KV-4)."""
        return self.get_key_buffer(layer_id)[..., : self.kv_lora_rank]

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Both (KV-3)."""
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

    def get_kv_size_bytes(self) -> int:
        """Bytes of the latents (KV-7)."""
        return self.kv_size_bytes()

    def set_kv_buffer(
        self,
        layer: Layer,
        loc: Slots,
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: Scale = None,
        v_scale: Scale = None,
        layer_id_override: int | None = None,
    ) -> None:
        """Write the latents of a layer, which are all in `cache_k` (KV-9 to KV-13)."""
        index = self._index(layer if layer_id_override is None else layer_id_override)
        rows = self._rows("cache_k", cache_k, self._latent, k_scale)
        self._storage.write("KV-12", loc, index, rows)

    def set_mla_kv_buffer(
        self, layer: Layer, loc: Slots, cache_k_nope: Tensor, cache_k_rope: Tensor
    ) -> None:
        """Write both parts of the latents of a layer (KV-9, KV-12)."""
        index = self._index(layer)
        nope = self._rows("cache_k_nope", cache_k_nope, self._nope)
        rope = self._rows("cache_k_rope", cache_k_rope, self._rope)
        self._storage.write_two(
            "KV-12", loc, self._nope.first + index, nope, self._rope.first + index, rope
        )

    def get_cpu_copy(self, indices: Slots) -> list[list[Tensor]]:
        """[layer][chunk] (KV-16, KV-18)."""
        copy = self.copied(
            as_rows("KV-18", self._storage, indices, once=False), self.cpu_offloading_chunk_size
        )
        return [[rows for (rows,) in chunks] for chunks in copy]

    def load_cpu_copy(self, kv_cache_cpu: list[list[Tensor]], indices: Slots) -> None:
        """Write such a copy into these slots (KV-17, KV-18)."""
        slots = as_rows("KV-18", self._storage, indices, once=True)
        copy = [[[rows] for rows in chunks] for chunks in kv_cache_cpu]
        self.require_copy(copy, len(slots))
        self.load(copy, slots)
