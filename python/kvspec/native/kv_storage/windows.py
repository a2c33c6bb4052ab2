"""Two pools: the layers of full attention in one, those with a window in the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvspec.errors import ContractError
from kvspec.interfaces.kv_storage import KVPoolView, Layer, PairMapping, Scale, Slots
from kvspec.native.kv_storage.pools import GB, Copy, KVCache, MHATokenToKVPool, as_rows

__all__ = ["SWAKVPool"]


class SWAKVPool(KVCache):
    """Slots are those of the full pool; a window layer has its rows at their pairs (KV-19).

    A slot without a pair has one of the sink, where nobody reads (KV-20).
    """

    def __init__(
        self,
        size: int,
        size_swa: int,
        dtype: torch.dtype,
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
        start = both[0] if both else 0
        if both != list(range(start, start + len(both))):
            raise ContractError(
                f"KV-2: layers {full} and {windows} are not a range of layers, each of them once"
            )
        self._describe(
            size, page_size, dtype, device, checked, head_num=head_num, head_dim=head_dim
        )
        self._span(len(both), start, None)
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
        self._pools = self.full_kv_pool, self.swa_kv_pool
        self.size_swa, self.head_num, self.head_dim = size_swa, head_num, head_dim
        self.layers_mapping = {
            layer: (at, bool(is_swa))
            for is_swa, ids in enumerate(self._ids)
            for at, layer in enumerate(ids)
        }
        self.full_to_swa_index_mapping: PairMapping | None = None
        self._tensors = [
            *(keys for pool in self._pools for keys in pool.k_buffer),
            *(values for pool in self._pools for values in pool.v_buffer),
        ]
        self.mem_usage = self.kv_size_bytes() / GB

    def register_mapping(self, full_to_swa_index_mapping: PairMapping) -> None:
        """Who knows the pairs from now on (KV-19, KV-21)."""
        given = full_to_swa_index_mapping
        rows = self.size + self.page_size
        if isinstance(given, Tensor):
            fits = given.device.type == "cpu" and given.dtype == torch.int64
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

    def _pairs(self, slots: Tensor) -> Tensor:
        """The window slot of slots that are rows of the full pool, int64."""
        given = self.full_to_swa_index_mapping
        if given is None:
            return torch.zeros_like(slots)
        if isinstance(given, Tensor):
            return given[slots]
        return given.translate_loc_from_full_to_swa(slots).long()

    # -- reading ---------------------------------------------------------------------------------

    def _place(self, layer: Layer) -> tuple[MHATokenToKVPool, int, bool]:
        """The pool of a layer, the layer's place there, and whether it has a window (KV-6)."""
        at, is_swa = self.layers_mapping[self._index(layer) + self.start_layer]
        return self._pools[is_swa], at, is_swa

    def get_key_buffer(self, layer_id: int) -> Tensor:
        """The live memory of the keys, in `dtype` (KV-3, KV-5)."""
        self._waited(layer_id)
        pool, at, _ = self._place(layer_id)
        return pool.get_key_buffer(at)

    def get_value_buffer(self, layer_id: int) -> Tensor:
        """The live memory of the values, in `dtype` (KV-3, KV-5)."""
        self._waited(layer_id)
        pool, at, _ = self._place(layer_id)
        return pool.get_value_buffer(at)

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """Both (KV-3, KV-5)."""
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

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
        cache_k: Tensor,
        cache_v: Tensor,
        k_scale: Scale = None,
        v_scale: Scale = None,
        layer_id_override: int | None = None,
    ) -> None:
        """Write K and V of a layer, of one with a window at the pairs (KV-9 to KV-13, KV-19)."""
        pool, at, is_swa = self._place(layer if layer_id_override is None else layer_id_override)
        keys, values = pool.rows(cache_k, cache_v, k_scale, v_scale)
        if is_swa:
            self._require_mapping()
            slots = as_rows("KV-12", self.full_kv_pool._storage, loc, once=self.checked)
            loc = self._pairs(slots)
        pool.put(at, loc, keys, values)

    # -- moving and copying ----------------------------------------------------------------------

    def move_kv_cache(self, tgt_loc: Slots, src_loc: Slots) -> None:
        """Rows of window layers move where target and source have a pair (KV-14, KV-20)."""
        self._require_mapping()
        full, windows = (pool._storage for pool in self._pools)
        full.require_move("KV-15", tgt_loc, src_loc)
        targets = as_rows("KV-15", full, tgt_loc, once=True)
        sources = as_rows("KV-15", full, src_loc, once=False)
        into, out_of = self._pairs(targets), self._pairs(sources)
        both = (into >= self.page_size) & (out_of >= self.page_size)
        into, out_of = into[both], out_of[both]
        windows.require_move("KV-15", into, out_of)
        full.move("KV-15", targets, sources, 2 * self.full_kv_pool.layer_num)
        windows.move("KV-15", into, out_of, 2 * self.swa_kv_pool.layer_num)

    def get_cpu_copy(self, indices: Slots) -> Copy:
        """[layer][chunk][K, V], of layers with a window at the pairs (KV-16, KV-19)."""
        self._require_mapping()
        slots = as_rows("KV-18", self.full_kv_pool._storage, indices, once=False)
        pairs = self._pairs(slots)
        copies = [
            pool.copied(at, self.cpu_offloading_chunk_size)
            for pool, at in zip(self._pools, (slots, pairs), strict=True)
        ]
        return [copies[is_swa][at] for _, (at, is_swa) in sorted(self.layers_mapping.items())]

    def load_cpu_copy(self, kv_cache_cpu: Copy, indices: Slots) -> None:
        """Write such a copy into these slots and their pairs (KV-17, KV-18, KV-20)."""
        self._require_mapping()
        if len(kv_cache_cpu) != self.layer_num:
            raise ContractError(
                f"KV-18: a copy of {len(kv_cache_cpu)} layers was given,"
                f" the pool has {self.layer_num}"
            )
        slots = as_rows("KV-18", self.full_kv_pool._storage, indices, once=True)
        pairs = as_rows("KV-18", self.swa_kv_pool._storage, self._pairs(slots), once=True)
        parts = [[kv_cache_cpu[layer - self.start_layer] for layer in ids] for ids in self._ids]
        for pool, part in zip(self._pools, parts, strict=True):
            pool.require_copy(part, len(slots))
        for pool, part, at in zip(self._pools, parts, (slots, pairs), strict=True):
            pool.load(part, at)
