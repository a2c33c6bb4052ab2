"""Broken pools of KV. Each must fail on the clause it breaks."""

from typing import Any

import torch

import kvspec.oracle
from kvspec.conformance.kv_storage import FocusedKVStorageConformance
from kvspec.conformance.mutants import Registry
from kvspec.errors import ContractError
from kvspec.oracle import (
    MHATokenToKVPool,
    MHATokenToKVPoolHost,
    MLATokenToKVPool,
    MLATokenToKVPoolHost,
    SWAKVPool,
)

registry = Registry(FocusedKVStorageConformance, kvspec.oracle)

WRITES = tuple(f"KV-{n}" for n in (9, 10, 11, 12, 13))
MOVES = tuple(f"KV-{n}" for n in (14, 15))
COPIES = tuple(f"KV-{n}" for n in (16, 17, 18))


@registry.mutant("KV-1", "KV-2", *WRITES, *COPIES, "KV-3", "KV-8", reports=("VL-43990",))
class LeavesNewPagesAsTheyCome(MHATokenToKVPool):
    """What the memory held before is read with a page that is not full."""

    def _allocate(self, enable: bool, rows: Any) -> None:
        super()._allocate(enable, rows)
        for tensor in (tensor for layer in self._tensors for tensor in layer):
            tensor[-1:].view(torch.uint8).fill_(0x3C)


@registry.mutant("KV-2", "KV-1")
class TakesANegativeSizeForNone(MHATokenToKVPool):
    def __init__(self, *, size: int, **given: Any) -> None:
        super().__init__(size=max(size, 0), **given)


@registry.mutant("KV-2", "KV-6")
class IgnoresTheEndOfTheLayers(MHATokenToKVPool):
    def __init__(self, *, end_layer: int | None = None, **given: Any) -> None:
        super().__init__(**given)


@registry.mutant("KV-2")
class AllocatesOnTheCPUWhateverIsAsked(MLATokenToKVPool):
    def __init__(self, *, device: str, **given: Any) -> None:
        super().__init__(device="cpu", **given)


@registry.mutant("KV-3", "KV-8", "KV-16", "KV-17", *WRITES, "KV-14", "KV-15", "KV-18")
class GivesCopiesOfItsMemory(MHATokenToKVPool):
    def get_key_buffer(self, layer_id: int) -> Any:
        return super().get_key_buffer(layer_id).clone()


@registry.mutant("KV-4", "KV-10")
class GivesTheLastColumnsAsTheValue(MLATokenToKVPool):
    def get_value_buffer(self, layer_id: int) -> Any:
        return self.get_key_buffer(layer_id)[..., -self.kv_lora_rank :]


@registry.mutant("KV-5")
class WaitsForTheLayerOfTheModel(MHATokenToKVPool):
    """Counted from the first layer of the model, not of the rank."""

    def _waited(self, layer_id: int) -> Any:
        if self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(layer_id)
        return self._tensors[self._index(layer_id)]


@registry.mutant("KV-5")
class ReadsTheValuesBeforeTheyAreThere(MHATokenToKVPool):
    def get_value_buffer(self, layer_id: int) -> Any:
        return self.v_buffer[self._index(layer_id)].view(self.dtype)


@registry.mutant("KV-6")
class CountsLayersFromTheEnd(MHATokenToKVPool):
    """What an index of Python does with -1."""

    def _index(self, layer: Any) -> int:
        layer_id = getattr(layer, "layer_id", layer)
        first, last = self.start_layer, self.start_layer + self.layer_num
        below = first - self.layer_num <= layer_id < first
        return super()._index(layer_id + self.layer_num if below and last else layer_id)


@registry.mutant("KV-7")
class MixesKeysAndValues(MHATokenToKVPool):
    def get_contiguous_buf_infos(self) -> Any:
        pointers, sizes, pages = super().get_contiguous_buf_infos()
        return pointers[::2] + pointers[1::2], sizes, pages


@registry.mutant("KV-7")
class CountsARowAsAPage(MLATokenToKVPool):
    def get_contiguous_buf_infos(self) -> Any:
        pointers, sizes, pages = super().get_contiguous_buf_infos()
        return pointers, sizes, [size // self.page_size for size in pages]


@registry.mutant("KV-8")
class AllocatesOutsideOfTheSaver(MHATokenToKVPool):
    """So a pause gives nothing back."""

    def _allocate(self, enable: bool, rows: Any) -> None:
        super()._allocate(False, rows)


@registry.mutant("KV-9", *WRITES, "KV-3", *COPIES, "KV-14", "KV-29", "KV-30", "KV-20", "KV-34")
class ForgetsTheValues(MHATokenToKVPool):
    def _places(self, *given: Any) -> Any:
        return super()._places(*given)[:1]


@registry.mutant("KV-9", *WRITES, "KV-14", "KV-17", "KV-29", "KV-30")
class IsOffByAPage(MHATokenToKVPool):
    """The sink is not counted."""

    def _scatter(self, slots: Any, places: Any) -> None:
        super()._scatter(
            [slot - self.page_size if slot > self.page_size else slot for slot in slots], places
        )


@registry.mutant("KV-9", "KV-6")
class IgnoresTheOverride(MHATokenToKVPool):
    def set_kv_buffer(self, layer: Any, *given: Any, layer_id_override: Any = None) -> None:
        super().set_kv_buffer(layer, *given[:5])


@registry.mutant("KV-9")
class ReadsRowsOfThePoolWhileItWrites(MHATokenToKVPool):
    def _rows(self, name: str, given: Any, like: Any, scale: Any = None) -> Any:
        stored = super()._rows(name, given, like, scale)
        return given.detach().view(self.store_dtype) if given.dtype == self.dtype else stored


@registry.mutant("KV-9", "KV-4", "KV-10", "KV-11", "KV-12")
class WritesThePartsInTheOtherOrder(MLATokenToKVPool):
    def set_mla_kv_buffer(self, layer: Any, loc: Any, cache_k_nope: Any, cache_k_rope: Any) -> None:
        super().set_mla_kv_buffer(layer, loc, cache_k_nope, cache_k_rope)
        latents = self.kv_buffer[self._index(layer)]
        for slot in loc:
            latents[int(slot)] = latents[int(slot)].roll(self.qk_rope_head_dim, dims=-1).clone()


@registry.mutant("KV-10", "KV-13")
class ScalesTwice(MHATokenToKVPool):
    def _rows(self, name: str, given: Any, like: Any, scale: Any = None) -> Any:
        once = getattr(given, "dtype", None) != self.dtype and isinstance(
            scale, float | torch.Tensor
        )
        if once and getattr(scale, "ndim", 0) == 0:
            given = (given / scale).to(given.dtype)
        return super()._rows(name, given, like, scale)


@registry.mutant("KV-10")
class ScalesWhatHasTheDtype(MHATokenToKVPool):
    def _rows(self, name: str, given: Any, like: Any, scale: Any = None) -> Any:
        stored = super()._rows(name, given, like, scale)
        if given.dtype == self.dtype and scale is not None:
            return (given.float() / scale).to(self.dtype).view(self.store_dtype)
        return stored


@registry.mutant("KV-10")
class RoundsTwice(MHATokenToKVPool):
    """A type of one byte is reached through bfloat16."""

    def _rows(self, name: str, given: Any, like: Any, scale: Any = None) -> Any:
        if self.dtype.itemsize == 1 and getattr(given, "dtype", None) == torch.float32:
            super()._rows(name, given, like, scale)
            given = given.bfloat16()
        return super()._rows(name, given, like, scale)


@registry.mutant("KV-10", "KV-11")
class KeepsTheBytesOfTheNumbers(MHATokenToKVPool):
    """A type of one byte that is stored as the integer part."""

    def _rows(self, name: str, given: Any, like: Any, scale: Any = None) -> Any:
        stored = super()._rows(name, given, like, scale)
        if self.dtype.itemsize == 1 and given.dtype == torch.float32:
            return (given if scale is None else given / float(scale)).to(torch.uint8)
        return stored


@registry.mutant("KV-11", "KV-10", reports=("SE-22",))
class DividesInPlace(MHATokenToKVPool):
    """What SGLang 0.5.2 does: the next reader of k sees the quotient."""

    def _rows(self, name: str, given: Any, like: Any, scale: Any = None) -> Any:
        stored = super()._rows(name, given, like, scale)
        if scale is not None and given.dtype != self.dtype:
            given.div_(scale)
        return stored


@registry.mutant("KV-11")
class KeepsWhatItLoaded(MHATokenToKVPool):
    """Rows of the copy become those of the pool, in place."""

    def load_cpu_copy(self, kv_cache_cpu: Any, indices: Any) -> None:
        super().load_cpu_copy(kv_cache_cpu, indices)
        for layer in kv_cache_cpu:
            for chunk in layer:
                chunk[0].zero_()


@registry.mutant("KV-12", "KV-13")
class WrapsNegativeSlots(MHATokenToKVPool):
    """What torch does: -1 is the last row."""

    def _put(self, loc: Any, places: Any) -> None:
        rows = self.size + self.page_size
        if isinstance(loc, list) and all(isinstance(slot, int) for slot in loc):
            loc = [slot + rows if -rows <= slot < 0 else slot for slot in loc]
        super()._put(loc, places)


@registry.mutant("KV-12", "KV-16", "KV-17", "KV-18")
class WritesTheRowsBeforeTheBadOne(MHATokenToKVPool):
    def _put(self, loc: Any, places: Any) -> None:
        try:
            super()._put(loc, places)
        except ContractError:
            first = loc[:1] if isinstance(loc, list) and isinstance(loc[0], int) else []
            if first and 0 < first[0] < self.size and all(len(rows) for _, rows in places):
                self._scatter(first, [(into, rows[:1]) for into, rows in places])
            raise


@registry.mutant("KV-12", "KV-15", "KV-18")
class TakesASlotTwice(MHATokenToKVPool):
    def _require(self, clause: str, slots: Any, once: bool) -> None:
        super()._require(clause, slots, once=False)


@registry.mutant("KV-12", "KV-14")
class RefusesPaddingInTheSink(MHATokenToKVPool):
    def _require(self, clause: str, slots: Any, once: bool) -> None:
        super()._require(clause, slots, once)
        if once and list(slots).count(0) > 1:
            raise ContractError(f"{clause}: slot 0 is named twice")


@registry.mutant("KV-12")
class SpreadsOneRow(MHATokenToKVPool):
    """What torch does with one row for several slots."""

    def _put(self, loc: Any, places: Any) -> None:
        if isinstance(loc, list):
            places = [
                (into, rows.expand(len(loc), *rows.shape[1:]) if len(rows) == 1 else rows)
                for into, rows in places
            ]
        super()._put(loc, places)


@registry.mutant("KV-12", "KV-13")
class CastsIntegers(MHATokenToKVPool):
    def _rows(self, name: str, given: Any, like: Any, scale: Any = None) -> Any:
        if getattr(given, "dtype", None) in (torch.int32, torch.bool):
            given = given.float()
        return super()._rows(name, given, like, scale)


@registry.mutant("KV-13", "KV-12")
class KeepsTheFirstRowOfASlot(MHATokenToKVPool):
    def _scatter(self, slots: Any, places: Any) -> None:
        order = range(len(slots) - 1, -1, -1)
        back = [(into, rows[[*order]]) for into, rows in places] if len(slots) else places
        super()._scatter([slots[at] for at in order], back)


@registry.mutant("KV-14", "KV-34")
class ScattersWhileItGathers(MHATokenToKVPool):
    """Rows that were moved already are moved on."""

    def _move(self, targets: Any, sources: Any) -> None:
        for target, source in zip(targets, sources, strict=True):
            super()._move([target], [source])


@registry.mutant("KV-14", "KV-17", "KV-29", "KV-30", "KV-34", "KV-3")
class MovesTheKeysAlone(MHATokenToKVPool):
    def _move(self, targets: Any, sources: Any) -> None:
        for keys, _ in self._tensors:
            self._scatter(targets, [(keys, self._gather(keys, sources))])


@registry.mutant("KV-14")
class MovesTheFirstLayer(MLATokenToKVPool):
    def _move(self, targets: Any, sources: Any) -> None:
        latents = self.kv_buffer[0]
        self._scatter(targets, [(latents, self._gather(latents, sources))])


@registry.mutant("KV-15")
class MovesWhatThereIs(MHATokenToKVPool):
    """The rest of the longer list is dropped in silence."""

    def move_kv_cache(self, tgt_loc: Any, src_loc: Any) -> None:
        if src_loc is not None:
            count = min(len(tgt_loc), len(src_loc))
            tgt_loc, src_loc = tgt_loc[:count], src_loc[:count]
        super().move_kv_cache(tgt_loc, src_loc)


@registry.mutant("KV-16", "KV-11", "KV-14", "KV-17")
class CopiesAViewOfARow(MHATokenToKVPool):
    """A copy of one slot, or of slots in a row, is the pool's memory."""

    def _gather(self, source: Any, slots: Any) -> Any:
        rows = super()._gather(source, slots)
        first = slots[0] if len(slots) else 0
        run = list(slots) == list(range(first, first + len(slots)))
        return source[first : first + len(slots)] if run and len(slots) else rows


@registry.mutant("KV-16", "KV-17")
class SortsTheSlots(MHATokenToKVPool):
    def _copy(self, slots: Any, step: int) -> Any:
        return super()._copy(sorted(slots), step)


@registry.mutant("KV-16", "KV-17", "KV-18")
class CopiesInOneChunk(MHATokenToKVPool):
    def _copy(self, slots: Any, step: int) -> Any:
        return super()._copy(slots, max(len(slots), 1))


@registry.mutant("KV-17")
class LoadsEveryChunkIntoTheFirstSlots(MHATokenToKVPool):
    def _load(self, copy: Any, slots: Any) -> None:
        for tensors, chunks in zip(self._tensors, copy, strict=True):
            for chunk in chunks:
                part = slots[: len(chunk[0])]
                self._scatter(part, list(zip(tensors, chunk, strict=True)))


@registry.mutant("KV-17")
class LosesWhatIsNoNumber(MLATokenToKVPool):
    """Through float32 and back: the payload of a NaN is gone."""

    def _load(self, copy: Any, slots: Any) -> None:
        def through(rows: Any) -> Any:
            numbers = rows.view(self.dtype).float().nan_to_num()
            return numbers.to(self.dtype).view(self.store_dtype)

        super()._load([[[through(rows) for rows in c] for c in chunks] for chunks in copy], slots)


@registry.mutant("KV-18", "KV-17")
class LoadsWhateverTheLength(MHATokenToKVPool):
    def _require_copy(self, copy: Any, count: int) -> None:
        held = [sum(len(chunk[0]) for chunk in chunks) for chunks in copy]
        super()._require_copy(copy, held[0] if len(set(held)) == 1 else count)

    def _load(self, copy: Any, slots: Any) -> None:
        held = sum(len(chunk[0]) for chunk in copy[0]) if copy else 0
        if held == len(slots):
            super()._load(copy, slots)


@registry.mutant("KV-19", "KV-12", "KV-14", "KV-15", "KV-17", "KV-18", "KV-20", "KV-21")
class WritesWindowsAtTheFullSlot(SWAKVPool):
    def _pairs(self, slots: Any) -> list[int]:
        return [slot if slot <= self.size_swa else 0 for slot in slots]


@registry.mutant("KV-19", "KV-20")
class KeepsTheFirstMapping(SWAKVPool):
    """A copy, which is stale when the next slot is paired."""

    def register_mapping(self, full_to_swa_index_mapping: Any) -> None:
        super().register_mapping(full_to_swa_index_mapping)
        if isinstance(full_to_swa_index_mapping, torch.Tensor):
            self.full_to_swa_index_mapping = full_to_swa_index_mapping.clone()


@registry.mutant("KV-20", "KV-19")
class WritesATombstoneSomewhere(SWAKVPool):
    def _pairs(self, slots: Any) -> list[int]:
        return [pair or self.size_swa for pair in super()._pairs(slots)]


@registry.mutant("KV-21")
class TakesEverySlotForOneWithoutAPair(SWAKVPool):
    def _require_mapping(self) -> None:
        pass


@registry.mutant("KV-22", "KV-23", "KV-25", "KV-24", "KV-26", "KV-27", "KV-28", "KV-31", "KV-33")
class HasMoreThanWasGranted(MHATokenToKVPoolHost):
    """Rounded up to pages."""

    def __init__(self, *, host_to_device_ratio: float, host_size: float, **given: Any) -> None:
        page = given["page_size"] * 2 * 2 * 6 * 4e-9 if host_size else 0
        ratio = host_to_device_ratio + 0.49
        super().__init__(host_to_device_ratio=ratio, host_size=host_size + page, **given)


@registry.mutant("KV-22", *(f"KV-{n}" for n in (29, 30, 32)))
class IgnoresTheLayout(MLATokenToKVPoolHost):
    def __init__(self, *, layout: Any, **given: Any) -> None:
        super().__init__(layout="layer_first" if layout == "page_first" else layout, **given)


@registry.mutant("KV-23")
class TakesAHostAsSmallAsTheDevice(MHATokenToKVPoolHost):
    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ContractError:
            if given["host_to_device_ratio"] != 1.0:
                raise
            super().__init__(**given | {"host_to_device_ratio": 2.0})


@registry.mutant("KV-24", "KV-27", "KV-25", "KV-26", "KV-28", "KV-32")
class LosesAPageNowAndThen(MHATokenToKVPoolHost):
    def free(self, indices: Any) -> int:
        count = super().free(indices)
        if count == self.page_size and len(self._free) > 8:
            del self._free[-count:]
        return count


@registry.mutant("KV-25", reports=("SG-21624",))
class HandsOutAViewOfTheFreeList(MHATokenToKVPoolHost):
    """Who keeps four slots keeps the list of all of them."""

    def alloc(self, need_size: int) -> Any:
        slots = super().alloc(need_size)
        if slots is None:
            return None
        return torch.cat([slots, torch.tensor(self._free, dtype=torch.int64)])[: len(slots)]


@registry.mutant("KV-25", "KV-27")
class FreesInFront(MHATokenToKVPoolHost):
    def free(self, indices: Any) -> int:
        before = list(self._free)
        count = super().free(indices)
        self._free = self._free[len(before) :] + before
        return count


@registry.mutant("KV-26")
class HandsOutWhatThereIs(MHATokenToKVPoolHost):
    def alloc(self, need_size: int) -> Any:
        if need_size > 0 and need_size % self.page_size == 0:
            need_size = min(need_size, len(self._free))
        return super().alloc(need_size)


@registry.mutant("KV-27")
class ClearsInTheOrderOfFrees(MHATokenToKVPoolHost):
    def clear(self) -> None:
        self._free, self._held = [*self._free, *sorted(self._held)], set()


@registry.mutant("KV-28")
class FreesAPageTwice(MHATokenToKVPoolHost):
    def free(self, indices: Any) -> int:
        try:
            return super().free(indices)
        except ContractError as error:
            if "which is free" not in str(error):
                raise
            return 0


@registry.mutant("KV-28", "KV-24", "KV-27")
class FreesPartOfAPage(MHATokenToKVPoolHost):
    def _require_pages(self, slots: Any) -> None:
        try:
            super()._require_pages(slots)
        except ContractError as error:
            if "not whole pages" not in str(error):
                raise


@registry.mutant("KV-29", "KV-30", "KV-32", "KV-34")
class BacksUpTheFirstLayer(MHATokenToKVPoolHost):
    def backup_from_device_all_layer(self, *given: Any, **named: Any) -> None:
        count, self.layer_num = self.layer_num, 1
        try:
            super().backup_from_device_all_layer(*given, **named)
        finally:
            self.layer_num = count


@registry.mutant("KV-30", "KV-29", "KV-34")
class LoadsEveryLayer(MHATokenToKVPoolHost):
    """Layers that the attention is reading are written again."""

    def load_to_device_per_layer(
        self,
        device_pool: Any,
        host_indices: Any,
        device_indices: Any,
        layer_id: int,
        io_backend: Any,
    ) -> None:
        given = device_pool, host_indices, device_indices
        super().load_to_device_per_layer(*given, layer_id, io_backend)
        for layer in range(self.start_layer, self.start_layer + self.layer_num):
            super().load_to_device_per_layer(*given, layer, io_backend)


@registry.mutant("KV-30", "KV-29", "KV-32")
class LoadsInTheOrderOfTheHost(MHATokenToKVPoolHost):
    def load_to_device_per_layer(
        self,
        device_pool: Any,
        host_indices: Any,
        device_indices: Any,
        layer_id: int,
        io_backend: Any,
    ) -> None:
        if all(isinstance(slot, int) for slot in host_indices):
            host_indices = sorted(host_indices)
        given = device_pool, host_indices, device_indices
        super().load_to_device_per_layer(*given, layer_id, io_backend)


@registry.mutant("KV-31")
class CopiesWhatIsFree(MHATokenToKVPoolHost):
    """A copy for a page that somebody else may take."""

    def _named(self, *given: Any) -> Any:
        held, self._held = self._held, set(range(self.size))
        try:
            return super()._named(*given)
        finally:
            self._held = held


@registry.mutant("KV-31")
class TakesAPoolOfAnotherRank(MHATokenToKVPoolHost):
    """Rows of layers 0 and 1 for those of layers 3 and 4."""

    def _signature(self, device_pool: Any) -> object:
        found: Any = super()._signature(device_pool)
        return found[1:]


@registry.mutant("KV-32")
class FlattensByTheLayerAlways(MHATokenToKVPoolHost):
    """So a page written with one layout is read with another."""

    def get_flat_data_page(self, index: int) -> Any:
        page = super().get_flat_data_page(index)
        if self.layout == "layer_first":
            return page
        shape = 2, self.page_size, self.layer_num, -1
        return page.view(shape).transpose(1, 2).reshape(-1)


@registry.mutant("KV-32")
class GivesTheLivePage(MLATokenToKVPoolHost):
    """Where a page is of one piece, flattening it copies nothing."""

    def get_flat_data_page(self, index: int) -> Any:
        return self._page(self._require_page(index)).flatten()


@registry.mutant("KV-33")
class RoundsDownToAPage(MHATokenToKVPoolHost):
    def _require_page(self, index: int) -> int:
        return super()._require_page(index // self.page_size * self.page_size)


@registry.mutant("KV-33")
class CastsAPage(MLATokenToKVPoolHost):
    def set_from_flat_data_page(self, index: int, data_page: Any) -> None:
        if isinstance(data_page, torch.Tensor) and data_page.dtype == torch.float64:
            data_page = data_page.to(self.dtype)
        super().set_from_flat_data_page(index, data_page)


@registry.mutant("KV-34")
class CopiesEveryRowOfThePool(MHATokenToKVPool):
    def _scatter(self, slots: Any, places: Any) -> None:
        super()._scatter(slots, places)
        self._copied += self.size
