"""What the tensors of a pool are, and who waits for them: KV-1 to KV-8."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.kv_storage.subjects import StorageSubjects, refused, rows, same, some_dtypes

BAD_POOLS: dict[str, dict[str, Any]] = {
    "a negative size": {"size": -1},
    "a size of 32 bits": {"size": 2**31},
    "a size that wraps": {"size": 2**32 + 8},
    "no page": {"page_size": 0},
    "a negative page": {"page_size": -1},
    "a device": {"device": "cuda"},
    "a numbered device": {"device": "cuda:1"},
    "meta": {"device": "meta"},
    "integers": {"dtype": torch.int32},
    "bytes": {"dtype": torch.uint8},
    "complex numbers": {"dtype": torch.complex64},
}
BAD_LAYERS: dict[str, dict[str, Any]] = {
    "a negative number": {"layer_num": -1},
    "a negative start": {"start_layer": -1},
    "an end beyond": {"end_layer": 2},
    "an end before": {"end_layer": 0},
    "an end without a start": {"start_layer": 3, "end_layer": 1},
}
GETTERS = ("get_key_buffer", "get_value_buffer", "get_kv_buffer")


class Counter:
    """Notes who waited for which layer."""

    def __init__(self) -> None:
        self.waited: list[int] = []

    def wait_until(self, threshold: int) -> None:
        self.waited.append(threshold)


class Broken:
    """A transfer that failed."""

    def wait_until(self, threshold: int) -> None:
        raise RuntimeError(f"layer {threshold} will never come")


class MemoryConformance(StorageSubjects):
    """The tensors."""

    @clause("KV-1", "KV-3")
    @some_dtypes
    @pytest.mark.parametrize(("size", "page_size"), [(8, 1), (0, 1), (8, 4), (6, 4), (32, 16)])
    def test_a_new_pool_is_zeros(self, dtype: torch.dtype, size: int, page_size: int) -> None:
        pool = self.mha(size=size, page_size=page_size, dtype=dtype)
        store = torch.uint8 if dtype.itemsize == 1 else dtype
        assert (pool.size, pool.page_size, pool.dtype) == (size, page_size, dtype)
        assert (pool.store_dtype, pool.layer_num, pool.device) == (store, 2, "cpu")
        assert [len(pool.k_buffer), len(pool.v_buffer)] == [2, 2]
        for layer in range(2):
            for buffer in pool.get_kv_buffer(layer):
                assert buffer.shape == (size + page_size, 2, 3)
                assert (buffer.dtype, buffer.is_contiguous()) == (dtype, True)
            for tensor in (pool.k_buffer[layer], pool.v_buffer[layer]):
                assert tensor.dtype == store
                assert not tensor.view(torch.uint8).any()

    @clause("KV-1", "KV-4")
    @some_dtypes
    def test_a_new_pool_of_latents_is_zeros(self, dtype: torch.dtype) -> None:
        pool = self.mla(dtype=dtype, page_size=4)
        assert [tensor.shape for tensor in pool.kv_buffer] == [(12, 1, 6)] * 2
        assert not any(tensor.view(torch.uint8).any() for tensor in pool.kv_buffer)

    @clause("KV-2")
    @pytest.mark.parametrize("why", BAD_POOLS)
    @pytest.mark.parametrize("kind", ["mha", "mla", "windows"])
    def test_no_pool_of_what_cannot_be(self, kind: str, why: str) -> None:
        refused("KV-2", lambda: getattr(self, kind)(**BAD_POOLS[why]))

    @clause("KV-2")
    @pytest.mark.parametrize("why", BAD_LAYERS)
    @pytest.mark.parametrize("kind", ["mha", "mla"])
    def test_layers_agree(self, kind: str, why: str) -> None:
        refused("KV-2", lambda: getattr(self, kind)(**BAD_LAYERS[why]))

    @clause("KV-2")
    @pytest.mark.parametrize("dimension", ["head_num", "head_dim"])
    def test_a_row_has_elements(self, dimension: str) -> None:
        refused("KV-2", lambda: self.mha(**{dimension: 0}))
        refused("KV-2", lambda: self.windows(**{dimension: -1}))

    @clause("KV-2")
    @pytest.mark.parametrize("dimension", ["kv_lora_rank", "qk_rope_head_dim"])
    def test_a_latent_has_both_parts(self, dimension: str) -> None:
        refused("KV-2", lambda: self.mla(**{dimension: 0}))

    @clause("KV-2")
    @pytest.mark.parametrize(
        ("full", "windows"), [([0, 1], [1]), ([0], [2]), ([0, 0], []), ([], [-1, 0])]
    )
    def test_layers_with_and_without_a_window_are_a_range(
        self, full: list[int], windows: list[int]
    ) -> None:
        ids = {"full_attention_layer_ids": full, "swa_attention_layer_ids": windows}
        refused("KV-2", lambda: self.windows(None, **ids))

    @clause("KV-3")
    @some_dtypes
    def test_the_memory_stays_where_it_is(self, dtype: torch.dtype) -> None:
        pool = self.mha(dtype=dtype)
        pointers = [buffer.data_ptr() for buffer in pool.get_kv_buffer(1)]
        pool.set_kv_buffer(1, [3], rows(1, dtype=dtype), rows(1, dtype=dtype))
        pool.move_kv_cache([1, 2], [3, 1])
        pool.load_cpu_copy(pool.get_cpu_copy([3]), [2])
        assert [buffer.data_ptr() for buffer in pool.get_kv_buffer(1)] == pointers
        assert pool.get_key_buffer(1).data_ptr() == pool.k_buffer[1].data_ptr() == pointers[0]
        assert pool.get_value_buffer(1).data_ptr() == pool.v_buffer[1].data_ptr() == pointers[1]

    @clause("KV-3")
    @some_dtypes
    def test_what_is_written_through_it_is_there(self, dtype: torch.dtype) -> None:
        pool, given = self.mha(dtype=dtype), rows(2, dtype=dtype)
        pool.get_value_buffer(0)[2:4] = given
        assert same(pool.get_value_buffer(0)[2:4], given)
        chunk = pool.get_cpu_copy([2, 3])[0][0]
        assert same(chunk[1].view(dtype), given)
        assert not chunk[0].any()

    @clause("KV-4")
    @some_dtypes
    def test_the_value_of_a_latent_is_a_part_of_it(self, dtype: torch.dtype) -> None:
        pool = self.mla(dtype=dtype)
        keys, values = pool.get_kv_buffer(1)
        assert (keys.shape, values.shape) == ((9, 1, 6), (9, 1, 4))
        assert keys.data_ptr() == values.data_ptr() == pool.get_value_buffer(1).data_ptr()
        keys[5] = rows(1, 1, 6, dtype=dtype)[0]
        assert same(values[5], rows(1, 1, 6, dtype=dtype)[0, :, :4])

    @clause("KV-4")
    @some_dtypes
    def test_both_parts_of_a_latent_are_side_by_side(self, dtype: torch.dtype) -> None:
        pool = self.mla(dtype=dtype)
        nope, rope = rows(2, 1, 4, start=3), rows(2, 1, 2, start=9)
        pool.set_mla_kv_buffer(1, [6, 2], nope, rope)
        expected = torch.cat([nope, rope], dim=-1).to(dtype)
        assert same(pool.get_key_buffer(1)[[6, 2]], expected)
        assert same(pool.get_value_buffer(1)[[6, 2]], nope.to(dtype))
        assert not pool.kv_buffer[0].view(torch.uint8).any()

    @clause("KV-5")
    @pytest.mark.parametrize("kind", ["mha", "mla"])
    def test_reading_a_layer_waits_for_it(self, kind: str) -> None:
        pool, counter = getattr(self, kind)(start_layer=4), Counter()
        pool.register_layer_transfer_counter(counter)
        pool.get_key_buffer(5)
        pool.get_value_buffer(4)
        assert counter.waited == [1, 0]
        pool.get_kv_buffer(5)
        assert set(counter.waited[2:]) == {1}
        pool.register_layer_transfer_counter(Broken())
        for getter in GETTERS:
            with pytest.raises(RuntimeError, match="layer 1 will never come"):
                getattr(pool, getter)(5)
        pool.register_layer_transfer_counter(None)
        assert pool.get_key_buffer(5).shape[0] == 9

    @clause("KV-5")
    def test_reading_a_layer_with_a_window_waits_for_it(self) -> None:
        pool, counter = self.windows(), Counter()
        pool.register_layer_transfer_counter(counter)
        for layer in (3, 1, 2, 0):
            pool.get_key_buffer(layer)
        assert counter.waited == [3, 1, 2, 0]
        pool.get_kv_buffer(2)
        assert set(counter.waited[4:]) == {2}

    @clause("KV-5")
    @pytest.mark.parametrize("kind", ["mha", "mla", "windows"])
    def test_who_writes_moves_or_copies_does_not_wait(self, kind: str) -> None:
        pool = getattr(self, kind)()
        pool.register_layer_transfer_counter(Broken())
        given = rows(1, 1, 6) if kind == "mla" else rows(1)
        pool.set_kv_buffer(1, [1], given, given)
        pool.move_kv_cache([3], [1])
        pool.load_cpu_copy(pool.get_cpu_copy([1]), [4])
        if kind != "windows":
            host = self.host(pool)
            slots = host.alloc(4)
            host.backup_from_device_all_layer(pool, slots, [1, 2, 3, 4], "kernel")
            host.load_to_device_per_layer(pool, slots, [1, 2, 3, 4], 1, "kernel")

    @clause("KV-6")
    @pytest.mark.parametrize("layer", [-1, 3, 6, 0, 2**40])
    @pytest.mark.parametrize("kind", ["mha", "mla"])
    def test_no_layer_of_another_rank(self, kind: str, layer: int) -> None:
        pool = getattr(self, kind)(start_layer=4, end_layer=5)
        assert (pool.start_layer, pool.end_layer) == (4, 5)
        given = rows(1, 1, 6) if kind == "mla" else rows(1)
        host = self.host(pool)
        calls: list[Callable[[], object]] = [
            *(partial(getattr(pool, name), layer) for name in GETTERS),
            lambda: pool.set_kv_buffer(layer, [1], given, given),
            lambda: pool.set_kv_buffer(4, [1], given, given, None, None, layer),
            lambda: host.load_to_device_per_layer(pool, [], [], layer, "kernel"),
        ]
        if kind == "mla":
            parts = rows(1, 1, 4), rows(1, 1, 2)
            calls.append(lambda: pool.set_mla_kv_buffer(layer, [1], *parts))
        for call in calls:
            self.refuses(pool, "KV-6", call)

    @clause("KV-6")
    @pytest.mark.parametrize("layer", [-1, 4])
    def test_no_layer_that_no_pool_has(self, layer: int) -> None:
        pool = self.windows()
        for name in GETTERS:
            self.refuses(pool, "KV-6", getattr(pool, name), layer)
        self.refuses(pool, "KV-6", pool.set_kv_buffer, layer, [1], rows(1), rows(1))

    @clause("KV-7")
    @some_dtypes
    def test_sizes_and_addresses(self, dtype: torch.dtype) -> None:
        pool = self.mha(dtype=dtype, page_size=4)
        pointers, sizes, pages = pool.get_contiguous_buf_infos()
        assert pointers == [tensor.data_ptr() for tensor in (*pool.k_buffer, *pool.v_buffer)]
        row = 6 * dtype.itemsize
        assert (sizes, pages) == ([12 * row] * 4, [4 * row] * 4)
        assert pool.kv_size_bytes() == 4 * 12 * row
        assert pool.get_kv_size_bytes() == (2 * 12 * row, 2 * 12 * row)
        assert pool.mem_usage == 4 * 12 * row / 2**30
        assert pool.data_ptrs.tolist() == pointers
        assert pool.data_strides.tolist() == [row] * 4

    @clause("KV-7")
    def test_sizes_and_addresses_of_latents(self) -> None:
        pool = self.mla(page_size=4)
        pointers, sizes, pages = pool.get_contiguous_buf_infos()
        assert pointers == [tensor.data_ptr() for tensor in pool.kv_buffer]
        assert (sizes, pages) == ([12 * 24] * 2, [4 * 24] * 2)
        assert pool.kv_size_bytes() == pool.get_kv_size_bytes() == 2 * 12 * 24

    @clause("KV-7")
    def test_sizes_and_addresses_with_windows(self) -> None:
        pool = self.windows()
        pointers, sizes, _ = pool.get_contiguous_buf_infos()
        keys, values = pool.get_kv_size_bytes()
        assert keys == values == 2 * 9 * 24 + 2 * 4 * 24
        assert pool.kv_size_bytes() == sum(sizes) == keys + values
        known = {buffer.data_ptr() for layer in range(4) for buffer in pool.get_kv_buffer(layer)}
        assert len(pointers) == 8
        assert set(pointers) == known

    @clause("KV-8")
    @pytest.mark.parametrize("kind", ["mha", "mla", "windows"])
    def test_the_saver_gives_the_memory_back(self, kind: str) -> None:
        saver = self.impl.TorchMemorySaverAdapter.create(True)

        def captured() -> int:
            tag = saver.view().get("kv_cache")
            return tag.nbytes if tag else 0

        before = captured()
        given: dict[str, Any] = {"mapping": None} if kind == "windows" else {}
        pool = getattr(self, kind)(size=2048, enable_memory_saver=True, **given)
        plain = getattr(self, kind)(size=2048, **given)
        assert captured() - before == pool.kv_size_bytes() == plain.kv_size_bytes()
        for each in (pool, plain):
            each.get_key_buffer(0).fill_(5)
        pointers = pool.get_contiguous_buf_infos()
        saver.pause("kv_cache")
        saver.resume("kv_cache")
        assert pool.get_contiguous_buf_infos() == pointers
        assert not pool.get_key_buffer(0).any()
        assert plain.get_key_buffer(0).eq(5).all()
        row = rows(1, 1, 6) if kind == "mla" else rows(1)
        pool.get_key_buffer(0)[3] = row[0]
        assert same(pool.get_key_buffer(0)[[3]], row)
