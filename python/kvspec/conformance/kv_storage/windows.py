"""Layers with a window: KV-19 to KV-21."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.kv_storage.subjects import StorageSubjects, raw, rows, same, some_dtypes

FULL, WINDOWS = (0, 3), (1, 2)
PAIRS = {1: 2, 3: 1, 4: 3}
"""Of `StorageSubjects.windows`."""


class WindowStorageConformance(StorageSubjects):
    """Two pools behind one."""

    def filled(self, dtype: torch.dtype = torch.float32, **given: Any) -> Any:
        """Any bits in every slot of every layer."""
        pool = self.windows(dtype=dtype, **given)
        for layer in range(4):
            for place, buffer in enumerate(pool.get_kv_buffer(layer)):
                buffer[:] = rows(*buffer.shape, dtype=dtype, seed=10 * layer + place)
        return pool

    @clause("KV-19")
    def test_layers_of_two_lengths(self) -> None:
        pool = self.windows(page_size=1)
        assert [len(pool.get_key_buffer(layer)) for layer in range(4)] == [9, 4, 4, 9]
        assert pool.layers_mapping == {0: (0, False), 3: (1, False), 2: (0, True), 1: (1, True)}
        assert (pool.size, pool.size_swa, pool.layer_num) == (8, 3, 4)
        first = pool.swa_kv_pool.get_key_buffer(0).data_ptr()
        assert pool.get_key_buffer(2).data_ptr() == first

    @clause("KV-19")
    @some_dtypes
    def test_window_layers_are_written_at_the_pairs(self, dtype: torch.dtype) -> None:
        pool = self.windows(dtype=dtype)
        keys, values = rows(3, dtype=dtype, seed=1), rows(3, dtype=dtype, seed=2)
        pool.set_kv_buffer(2, [4, 1, 3], keys, values)
        assert same(pool.get_key_buffer(2)[[3, 2, 1]], keys)
        assert same(pool.get_value_buffer(2)[[3, 2, 1]], values)
        assert not pool.get_key_buffer(1).view(torch.uint8).any()
        pool.set_kv_buffer(SimpleNamespace(layer_id=3), [4, 1, 3], keys, values)
        assert same(pool.get_key_buffer(3)[[4, 1, 3]], keys)
        assert not pool.get_key_buffer(0).view(torch.uint8).any()

    @clause("KV-19")
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_an_allocator_says_the_pairs(self, page_size: int) -> None:
        allocator = self.impl_or_oracle().SWATokenToKVPoolAllocator(
            size=8,
            size_swa=8,
            dtype=torch.float32,
            device="cpu",
            kvcache=None,
            need_sort=False,
            page_size=page_size,
        )
        pool = self.windows(allocator, size_swa=8, page_size=page_size)
        first = allocator.alloc(4)
        allocator.free(first)
        slots = allocator.alloc(8)
        pairs = allocator.translate_loc_from_full_to_swa(slots).long()
        pool.set_kv_buffer(1, slots, rows(8), rows(8))
        assert same(pool.get_key_buffer(1)[pairs], rows(8))
        allocator.free_swa(slots[:page_size])
        before = pool.view()
        pool.set_kv_buffer(1, slots[:page_size], rows(page_size), rows(page_size))
        assert pool.view() == before

    def impl_or_oracle(self) -> Any:
        """Where the allocator comes from."""
        import kvspec.oracle

        return self.impl if hasattr(self.impl, "SWATokenToKVPoolAllocator") else kvspec.oracle

    @clause("KV-19")
    def test_the_mapping_is_read_at_every_call(self) -> None:
        mapping = torch.zeros(9, dtype=torch.int64)
        pool = self.windows(mapping)
        mapping[5] = 2
        pool.set_kv_buffer(1, [5], rows(1), rows(1))
        assert same(pool.get_key_buffer(1)[[2]], rows(1))
        mapping[5] = 3
        pool.set_kv_buffer(1, [5], rows(1, start=4), rows(1))
        assert same(pool.get_key_buffer(1)[[2, 3]], torch.cat([rows(1), rows(1, start=4)]))

    @clause("KV-19")
    @some_dtypes
    def test_rows_move_at_their_pairs(self, dtype: torch.dtype) -> None:
        pool = self.filled(dtype)
        before = {layer: pool.get_kv_buffer(layer)[1].clone() for layer in range(4)}
        pool.move_kv_cache([3, 4], [4, 1])
        for layer in FULL:
            before[layer][[3, 4]] = before[layer][[4, 1]].clone()
        for layer in WINDOWS:
            before[layer][[1, 3]] = before[layer][[3, 2]].clone()
        for layer in range(4):
            assert same(pool.get_value_buffer(layer)[1:], before[layer][1:])

    @clause("KV-20")
    @pytest.mark.parametrize("loc", [[2], [2, 5, 6], [7, 0]])
    def test_a_write_without_a_pair_goes_nowhere(self, loc: list[int]) -> None:
        pool = self.filled()
        before = pool.view()
        pool.set_kv_buffer(1, loc, rows(len(loc)), rows(len(loc)))
        assert pool.view() == before
        pool.set_kv_buffer(1, [*loc, 1], rows(len(loc) + 1), rows(len(loc) + 1))
        assert same(pool.get_key_buffer(1)[2], rows(len(loc) + 1)[-1])

    @clause("KV-20")
    def test_rows_move_only_from_pair_to_pair(self) -> None:
        pool = self.filled()
        windows = [pool.get_key_buffer(layer).clone() for layer in WINDOWS]
        expected = pool.get_key_buffer(0).clone()
        expected[[1, 5]] = expected[[2, 3]].clone()
        pool.move_kv_cache([1, 5], [2, 3])  # the source has no pair, then the target
        assert same(pool.get_key_buffer(0), expected)
        for layer, before in zip(WINDOWS, windows, strict=True):
            assert same(pool.get_key_buffer(layer)[1:], before[1:])

    @clause("KV-17", "KV-19", "KV-20")
    @some_dtypes
    def test_what_is_copied_comes_back_at_the_pairs(self, dtype: torch.dtype) -> None:
        pool = self.filled(dtype)
        getattr(pool, "_subject", pool).cpu_offloading_chunk_size = 2
        copy = pool.get_cpu_copy([3, 2, 1])
        assert [[len(chunk[1]) for chunk in layer] for layer in copy] == [[2, 1]] * 4
        other = self.windows((0, 0, 0, 3, 0, 0, 1, 0, 2), dtype=dtype)
        other.load_cpu_copy(copy, [8, 3, 5])
        for layer in FULL:
            for here, there in zip(
                other.get_kv_buffer(layer), pool.get_kv_buffer(layer), strict=True
            ):
                assert same(here[[8, 3, 5]], there[[3, 2, 1]])
                assert not here[[1, 2, 4, 6, 7]].view(torch.uint8).any()
        for layer in WINDOWS:
            keys = other.get_key_buffer(layer)
            assert same(keys[2], pool.get_key_buffer(layer)[1])
            assert raw(keys[1]) == bytes(6 * dtype.itemsize)  # the pair of a slot not named

    @clause("KV-21")
    @pytest.mark.parametrize("name", ["set", "move", "copy", "load"])
    def test_pairs_have_to_be_known(self, name: str) -> None:
        pool, copy = self.windows(None), self.windows().get_cpu_copy([1])
        calls = {
            "set": lambda: pool.set_kv_buffer(1, [1], rows(1), rows(1)),
            "move": lambda: pool.move_kv_cache([1], [2]),
            "copy": lambda: pool.get_cpu_copy([1]),
            "load": lambda: pool.load_cpu_copy(copy, [1]),
        }
        self.refuses(pool, "KV-21", calls[name])
        pool.set_kv_buffer(0, [1], rows(1), rows(1))
        assert same(pool.get_key_buffer(0)[[1]], rows(1))

    @clause("KV-21")
    @pytest.mark.parametrize(
        "mapping",
        [
            torch.zeros(8).long(),
            torch.zeros(9).int(),
            torch.zeros(9),
            torch.zeros(3, 3).long(),
            [0] * 9,
        ],
        ids=["short", "int32", "floats", "two dimensions", "a list"],
    )
    def test_a_mapping_is_of_every_slot(self, mapping: object) -> None:
        pool = self.windows()
        self.refuses(pool, "KV-21", pool.register_mapping, mapping)
        self.refuses(pool, "KV-21", pool.register_mapping, torch.zeros(9).long().to("meta"))
        pool.set_kv_buffer(1, [1], rows(1), rows(1))
        assert same(pool.get_key_buffer(1)[[2]], rows(1))

    @clause("KV-12", "KV-15", "KV-18")
    def test_slots_are_those_of_the_full_pool(self) -> None:
        pool = self.filled()
        for layer in range(4):
            for loc in ([9], [-1]):
                self.refuses(pool, "KV-12", pool.set_kv_buffer, layer, loc, rows(1), rows(1))
        self.refuses(pool, "KV-12", pool.set_kv_buffer, 1, [2, 2], rows(2), rows(2))
        self.refuses(pool, "KV-12", pool.set_kv_buffer, 1, [2], rows(2), rows(2))
        self.refuses(pool, "KV-15", pool.move_kv_cache, [5, 5], [1, 2])
        self.refuses(pool, "KV-15", pool.move_kv_cache, [5, 9], [1, 2])
        copy = pool.get_cpu_copy([1, 2])
        self.refuses(pool, "KV-18", pool.get_cpu_copy, [9])
        for slots in ([5, 5], [9, 1], [5], [5, 6, 7]):
            self.refuses(pool, "KV-18", pool.load_cpu_copy, copy, slots)
        self.refuses(pool, "KV-18", pool.load_cpu_copy, copy[:3], [1, 2])

    @clause("KV-12", "KV-15", "KV-18")
    def test_a_broken_mapping_is_found_before_a_row_is_written(self) -> None:
        """Two slots with one pair, and a pair that is none."""
        for mapping in ((0, 2, 0, 2, 3, 0, 0, 0, 0), (0, 2, 0, 4, 3, 0, 0, 0, 0)):
            pool = self.filled(mapping=mapping)
            copy = self.filled().get_cpu_copy([1, 3])
            self.refuses(pool, "KV-12", pool.set_kv_buffer, 1, [1, 3], rows(2), rows(2))
            self.refuses(pool, "KV-15", pool.move_kv_cache, [1, 3], [4, 4])
            self.refuses(pool, "KV-18", pool.load_cpu_copy, copy, [1, 3])
