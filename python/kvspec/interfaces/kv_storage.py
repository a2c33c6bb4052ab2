"""The tensors that KV is kept in, of a device and of the host. Spec: KV."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "HostKVCache",
    "HostPoolView",
    "HostedPool",
    "IOBackend",
    "KVCache",
    "KVPoolView",
    "Layer",
    "LayerTransferCounter",
    "Layout",
    "MHATokenToKVPool",
    "MLATokenToKVPool",
    "PairMapping",
    "SWAKVPool",
    "Slots",
    "Translator",
]

Slots: TypeAlias = Sequence[int] | Tensor | memoryview
"""Slots as an argument: a list, a buffer or a one-dimensional integer tensor on the CPU."""

Layout: TypeAlias = Literal["layer_first", "page_first"]
IOBackend: TypeAlias = Literal["kernel", "direct"]


class AttentionLayer(Protocol):
    """What a model's layer says of itself."""

    @property
    def layer_id(self) -> int: ...


Layer: TypeAlias = AttentionLayer | int


class LayerTransferCounter(Protocol):
    """Knows which layers of a transfer have arrived."""

    def wait_until(self, threshold: int) -> None:
        """Return when this layer of the rank, counted from 0, is there."""


class Translator(Protocol):
    """An allocator of full and window slots (SWA-20)."""

    def translate_loc_from_full_to_swa(self, kv_indices: Slots, /) -> Tensor:
        """The pair of every slot, 0 where there is none."""


PairMapping: TypeAlias = Tensor | Translator
"""The window slot of every full slot, int64 [at least size + page_size], read at every call; or
the allocator that has the pairs.
"""

Scale: TypeAlias = float | Tensor | None


class KVPoolView(NamedTuple):
    """The abstract state of a pool."""

    layers: tuple[tuple[bytes, ...], ...]
    """Of each layer, in order, the bytes of each of its tensors beyond the sink."""


class HostPoolView(NamedTuple):
    """The abstract state of a host pool."""

    free: tuple[int, ...]
    """Free slots, the next to be handed out first."""
    rows: Mapping[int, bytes]
    """Held slots, ascending, and their bytes: keys of all layers, then values."""


class KVCache(Protocol):
    """What every pool has: rows [size + page_size] in each of its layers (KV-1, KV-2).

    Slots in arguments are lists, buffers or integer tensors of one dimension on the CPU. What is
    refused changes nothing. Writes, moves and copies cost O(rows named) (KV-34).
    """

    size: int
    page_size: int
    dtype: torch.dtype
    store_dtype: torch.dtype
    """What the tensors are made of: uint8 for types of one byte, else `dtype`."""
    device: str
    layer_num: int
    checked: bool
    """Whether a slot that is named twice is refused (KV-12, KV-13)."""
    cpu_offloading_chunk_size: int
    """Rows in a chunk of `get_cpu_copy`: 8192."""
    mem_usage: float
    """In units of 2^30 bytes."""

    def get_key_buffer(self, layer_id: int) -> Tensor:
        """[size + page_size, heads, dim] of `dtype`, the live memory (KV-3 to KV-6)."""

    def get_value_buffer(self, layer_id: int) -> Tensor:
        """[size + page_size, heads, dim] of `dtype`, the live memory (KV-3 to KV-6)."""

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Both (KV-3 to KV-6)."""

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
        """Write K and V [slots, heads, dim] of a layer at these slots (KV-6, KV-9 to KV-13)."""

    def move_kv_cache(self, tgt_loc: Slots, src_loc: Slots) -> None:
        """Move rows of all layers; the slots may overlap (KV-14, KV-15)."""

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Addresses, bytes, and bytes of a page, of every tensor (KV-7)."""

    def kv_size_bytes(self) -> int:
        """Bytes of all tensors (KV-7)."""

    def register_layer_transfer_counter(
        self, layer_transfer_counter: LayerTransferCounter | None
    ) -> None:
        """Whom the `get_*_buffer` wait for from now on; None for nobody (KV-5)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `rows_copied` (KV-34)."""

    def view(self) -> KVPoolView:
        """The abstract state. O(bytes)."""


class MHATokenToKVPool(KVCache, Protocol):
    """K and V of every head, two tensors for each layer.

    Allocated under the memory saver if `enable_memory_saver` (KV-8), as is every pool.
    """

    head_num: int
    head_dim: int
    start_layer: int
    end_layer: int

    @property
    def k_buffer(self) -> Sequence[Tensor]:
        """The keys of the rank's layers, of `store_dtype`."""

    @property
    def v_buffer(self) -> Sequence[Tensor]:
        """The values of the rank's layers, of `store_dtype`."""

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of the keys and of the values (KV-7)."""

    def get_cpu_copy(self, indices: Slots) -> list[list[list[Tensor]]]:
        """[layer][chunk][K, V]: copies of rows, of `store_dtype` (KV-16, KV-18)."""

    def load_cpu_copy(self, kv_cache_cpu: list[list[list[Tensor]]], indices: Slots) -> None:
        """Write such copies into these slots (KV-17, KV-18)."""


class MLATokenToKVPool(KVCache, Protocol):
    """One latent for each token, one tensor for each layer; V is a part of it (KV-4)."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    start_layer: int
    end_layer: int

    @property
    def kv_buffer(self) -> Sequence[Tensor]:
        """The latents of the rank's layers, of `store_dtype`."""

    def set_mla_kv_buffer(
        self, layer: Layer, loc: Slots, cache_k_nope: Tensor, cache_k_rope: Tensor
    ) -> None:
        """Write both parts, [slots, 1, kv_lora_rank] and [slots, 1, qk_rope_head_dim] (KV-9)."""

    def get_kv_size_bytes(self) -> int:
        """Bytes of the latents (KV-7)."""

    def get_cpu_copy(self, indices: Slots) -> list[list[Tensor]]:
        """[layer][chunk]: copies of rows, of `store_dtype` (KV-16, KV-18)."""

    def load_cpu_copy(self, kv_cache_cpu: list[list[Tensor]], indices: Slots) -> None:
        """Write such copies into these slots (KV-17, KV-18)."""


class SWAKVPool(KVCache, Protocol):
    """Layers of full attention in one pool, layers with a window in another (KV-19 to KV-21)."""

    size_swa: int

    @property
    def layers_mapping(self) -> Mapping[int, tuple[int, bool]]:
        """Of a layer: its place in its pool, and whether it is one with a window."""

    @property
    def full_kv_pool(self) -> MHATokenToKVPool:
        """Where the layers of full attention are."""

    @property
    def swa_kv_pool(self) -> MHATokenToKVPool:
        """Where the layers with a window are."""

    def register_mapping(self, full_to_swa_index_mapping: PairMapping) -> None:
        """Who knows the pairs from now on (KV-19, KV-21)."""

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of the keys and of the values (KV-7)."""

    def get_cpu_copy(self, indices: Slots) -> list[list[list[Tensor]]]:
        """[layer, ascending][chunk][K, V] (KV-16, KV-18 to KV-21)."""

    def load_cpu_copy(self, kv_cache_cpu: list[list[list[Tensor]]], indices: Slots) -> None:
        """Write such copies into these slots (KV-17 to KV-21)."""


HostedPool: TypeAlias = MHATokenToKVPool | MLATokenToKVPool


class HostKVCache(Protocol):
    """Rows of host memory for those of a device pool, and the books of them (KV-22 to KV-24).

    `kv_buffer` is, of `store_dtype`,

             layer_first                     page_first
        MHA  [2, layers, size, heads, dim]   [2, size, layers, heads, dim]
        MLA  [layers, size, 1, latent]       [size, layers, 1, latent]
    """

    size: int
    page_size: int
    page_num: int
    dtype: torch.dtype
    layout: Layout
    pin_memory: bool
    device: str
    layer_num: int
    start_layer: int
    end_layer: int
    size_per_token: int
    """Bytes of a slot, in all layers."""
    kv_buffer: Tensor

    def alloc(self, need_size: int) -> Tensor | None:
        """Take slots, or None and no change (KV-25, KV-26, KV-28). O(need_size)."""

    def free(self, indices: Slots) -> int:
        """Give whole pages back; how many slots (KV-27, KV-28). O(slots named)."""

    def available_size(self) -> int:
        """How many slots `alloc` can hand out. O(1)."""

    def clear(self) -> None:
        """Make every slot free (KV-27). O(size)."""

    def get_size_per_token(self) -> int:
        """Bytes of a slot, in all layers (KV-22)."""

    def backup_from_device_all_layer(
        self,
        device_pool: HostedPool,
        host_indices: Slots,
        device_indices: Slots,
        io_backend: IOBackend,
    ) -> None:
        """Copy rows of all layers to the host (KV-29, KV-31)."""

    def load_to_device_per_layer(
        self,
        device_pool: HostedPool,
        host_indices: Slots,
        device_indices: Slots,
        layer_id: int,
        io_backend: IOBackend,
    ) -> None:
        """Copy rows of one layer to the device (KV-6, KV-30, KV-31)."""

    def get_flat_data_page(self, index: int) -> Tensor:
        """A copy of the page that begins at this slot, in one dimension (KV-32, KV-33)."""

    def set_from_flat_data_page(self, index: int, data_page: Tensor) -> None:
        """Write such a page (KV-32, KV-33)."""

    def get_dummy_flat_data_page(self) -> Tensor:
        """Zeros of the length of a page (KV-32)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `rows_copied` (KV-34)."""

    def view(self) -> HostPoolView:
        """The abstract state. O(size)."""
