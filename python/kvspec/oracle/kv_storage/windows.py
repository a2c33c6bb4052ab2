"""Two pools: the layers of full attention in one, those with a window in the other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvspec.errors import ContractError
from kvspec.interfaces.kv_storage import KVPoolView, Layer, PairMapping, Scale, Slots
from kvspec.oracle.boundary import is_tensor, numbers, tensor
from kvspec.oracle.kv_storage.pools import GB, KVCache, MHATokenToKVPool

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["SWAKVPool"]


class SWAKVPool(KVCache):
    """Slots are those of the full pool; a window layer has its rows at their pairs (KV-19)."""

    def __init__(
        self,
        size: int,
        size_swa: int,
        dtype: "torch.dtype",
        head_num: int,
        head_dim: int,
        swa_attention_layer_ids: Sequence[int],
        full_attention_layer_ids: Sequence[int],
        device: str,
        page_size: int = 1,
        enable_memory_saver: bool = False,
        checked: bool = True,
    ) -> None:
        full, windows = list(full_attention_layer_ids), list(swa_attention_layer_ids)
        self._ids = full, windows
        both = sorted(full + windows)
        if both != list(range(min(both, default=0), min(both, default=0) + len(both))):
            raise ContractError(
                f"KV-2: layers {full} and {windows} are not a range of layers, each of them once"
            )
        self._describe(
            size, page_size, dtype, device, checked, head_num=head_num, head_dim=head_dim
        )
        self._span(len(both), min(both, default=0), None)
        self.full_kv_pool, self.swa_kv_pool = (
            MHATokenToKVPool(
                slots,
                page_size,
                dtype,
                head_num,
                head_dim,
                len(ids),
                device,
                enable_memory_saver,
                checked=checked,
            )
            for slots, ids in ((size, full), (size_swa, windows))
        )
        self.size_swa, self.head_num, self.head_dim = size_swa, head_num, head_dim
        self.layers_mapping = {
            layer: (at, bool(is_swa))
            for is_swa, ids in enumerate(self._ids)
            for at, layer in enumerate(ids)
        }
        self.full_to_swa_index_mapping: PairMapping | None = None
        self.mem_usage = self.kv_size_bytes() / GB

    @property
    def _pools(self) -> tuple[MHATokenToKVPool, MHATokenToKVPool]:
        return self.full_kv_pool, self.swa_kv_pool

    def register_mapping(self, full_to_swa_index_mapping: PairMapping) -> None:
        """Who knows the pairs from now on (KV-19, KV-21)."""
        given: Any = full_to_swa_index_mapping
        rows = self.size + self.page_size
        if is_tensor(given):
            fits = given.device.type == "cpu" and given.dtype == tensor([]).dtype
            if not fits or given.dim() != 1 or len(given) < rows:
                raise ContractError(
                    f"KV-21: a mapping {list(given.shape)} of {given.dtype} on {given.device} was"
                    f" given, not of int64 [at least {rows}] on the CPU"
                )
        elif not hasattr(given, "translate_loc_from_full_to_swa"):
            raise ContractError(f"KV-21: a {type(given).__name__} knows no pairs")
        self.full_to_swa_index_mapping = given

    def _require_mapping(self) -> None:
        if self.full_to_swa_index_mapping is None and self.swa_kv_pool.layer_num:
            raise ContractError("KV-21: no mapping is registered, so no slot has a pair")

    def _pairs(self, slots: Sequence[int]) -> list[int]:
        """The window slot of every slot, one of the sink if it has none (KV-19, KV-20)."""
        given: Any = self.full_to_swa_index_mapping
        if given is None:
            return [0] * len(slots)
        if is_tensor(given):
            return [int(given[slot]) for slot in slots]
        return numbers(given.translate_loc_from_full_to_swa(tensor(slots)), "KV-21")

    # -- reading ---------------------------------------------------------------------------------

    def _place(self, layer: Layer) -> tuple[MHATokenToKVPool, int, bool]:
        at, is_swa = self.layers_mapping[self._index(layer) + self.start_layer]
        return self._pools[is_swa], at, is_swa

    def _waited(self, layer_id: int) -> "list[Tensor]":
        pool, at, _ = self._place(layer_id)
        if self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(layer_id - self.start_layer)
        return pool._tensors[at]

    def _flat(self) -> "list[Tensor]":
        return [
            *(keys for pool in self._pools for keys in pool.k_buffer),
            *(values for pool in self._pools for values in pool.v_buffer),
        ]

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of the keys and of the values (KV-7)."""
        full, windows = (pool.get_kv_size_bytes() for pool in self._pools)
        return full[0] + windows[0], full[1] + windows[1]

    def counters(self) -> dict[str, int]:
        """Rows that were copied, of every tensor (KV-34)."""
        return {"rows_copied": sum(pool.counters()["rows_copied"] for pool in self._pools)}

    def view(self) -> KVPoolView:
        """The abstract state, of the layers in order."""
        views = [pool.view().layers for pool in self._pools]
        return KVPoolView(
            tuple(views[is_swa][at] for _, (at, is_swa) in sorted(self.layers_mapping.items()))
        )

    # -- writing ---------------------------------------------------------------------------------

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
        """Write K and V of a layer, of one with a window at the pairs (KV-9 to KV-13, KV-19)."""
        named = layer if layer_id_override is None else layer_id_override
        pool, at, is_swa = self._place(named)
        places = pool._places(at, cache_k, cache_v, k_scale, v_scale)
        slots = numbers(loc, "KV-12")
        if is_swa:
            self._require_mapping()
            self.full_kv_pool._require("KV-12", slots, once=self.checked)
            slots = self._pairs(slots)
        pool._put(slots, places)

    def move_kv_cache(self, tgt_loc: Slots, src_loc: Slots) -> None:
        """Rows of window layers move where target and source have a pair (KV-14, KV-20)."""
        targets, sources = numbers(tgt_loc, "KV-15"), numbers(src_loc, "KV-15")
        self._require_mapping()
        self.full_kv_pool._require_move(targets, sources)
        both = zip(self._pairs(targets), self._pairs(sources), strict=True)
        pairs = [(to, from_) for to, from_ in both if min(to, from_) >= self.page_size]
        into, out_of = [to for to, _ in pairs], [from_ for _, from_ in pairs]
        self.swa_kv_pool._require_move(into, out_of)
        self.full_kv_pool._move(targets, sources)
        self.swa_kv_pool._move(into, out_of)

    def get_cpu_copy(self, indices: Slots) -> "list[list[list[Tensor]]]":
        """[layer][chunk][K, V], of layers with a window at the pairs (KV-16, KV-19)."""
        slots = numbers(indices, "KV-18")
        self._require_mapping()
        self.full_kv_pool._require("KV-18", slots, once=False)
        pairs = self._pairs(slots)
        self.swa_kv_pool._require("KV-18", pairs, once=False)
        copies = [
            pool._copy(at, self.cpu_offloading_chunk_size)
            for pool, at in zip(self._pools, (slots, pairs), strict=True)
        ]
        return [copies[is_swa][at] for _, (at, is_swa) in sorted(self.layers_mapping.items())]

    def load_cpu_copy(self, kv_cache_cpu: "list[list[list[Tensor]]]", indices: Slots) -> None:
        """Write such a copy into these slots and their pairs (KV-17, KV-18, KV-20)."""
        slots = numbers(indices, "KV-18")
        self._require_mapping()
        if len(kv_cache_cpu) != self.layer_num:
            raise ContractError(
                f"KV-18: a copy of {len(kv_cache_cpu)} layers was given,"
                f" the pool has {self.layer_num}"
            )
        self.full_kv_pool._require("KV-18", slots, once=True)
        places = slots, self._pairs(slots)
        self.swa_kv_pool._require("KV-18", places[1], once=True)
        parts = [[kv_cache_cpu[layer - self.start_layer] for layer in ids] for ids in self._ids]
        for pool, part in zip(self._pools, parts, strict=True):
            pool._require_copy(part, len(slots))
        for pool, part, at in zip(self._pools, parts, places, strict=True):
            pool._load(part, at)
