"""Moves inside a pool, and copies out of it and back: KV-14 to KV-18."""

from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.kv_storage.subjects import (
    StorageSubjects,
    dtypes,
    raw,
    rows,
    same,
    some_dtypes,
)

BAD_MOVES: dict[str, tuple[Any, Any]] = {
    "too few sources": ([1, 2], [3]),
    "too many sources": ([1], [3, 4]),
    "a target twice": ([2, 3, 2], [4, 5, 6]),
    "a target below 0": ([-1, 2], [3, 4]),
    "a target beyond the rows": ([2, 9], [3, 4]),
    "a source below 0": ([2, 3], [4, -1]),
    "a source beyond the rows": ([2, 3], [9, 4]),
    "no integers": ([2.0], [3]),
    "no sources": ([2], None),
}


class CopyConformance(StorageSubjects):
    """Moves and copies."""

    def used(self, kind: str, dtype: torch.dtype = torch.float32, **given: Any) -> Any:
        """A pool with any bits in all of its slots."""
        pool = getattr(self, kind)(dtype=dtype, **given)
        for layer in range(pool.layer_num):
            for place, buffer in enumerate(pool.get_kv_buffer(layer)[: 1 if kind == "mla" else 2]):
                bits = rows(*buffer.shape, dtype=dtype, seed=10 * layer + place)
                bits[: pool.page_size] = 0
                buffer[:] = bits
        return pool

    def stored(self, pool: Any) -> list[Any]:
        """Copies of its tensors, as they are stored."""
        return [tensor.clone() for tensor in self.tensors(pool)]

    def tensors(self, pool: Any) -> list[Any]:
        """Its tensors, as they are stored."""
        return [*pool.kv_buffer] if hasattr(pool, "kv_buffer") else [*pool.k_buffer, *pool.v_buffer]

    @clause("KV-14")
    @some_dtypes
    @pytest.mark.parametrize("kind", ["mha", "mla"])
    @pytest.mark.parametrize(
        ("targets", "sources"),
        [
            ([1, 2], [7, 8]),
            ([2, 3, 4, 5], [1, 2, 3, 4]),
            ([1, 2, 3, 4], [2, 3, 4, 5]),
            ([6, 3], [3, 6]),
            ([1, 2, 3], [5, 5, 5]),
            ([4], [4]),
            ([], []),
        ],
        ids=["apart", "up", "down", "exchange", "spread", "onto itself", "nothing"],
    )
    def test_rows_move_as_they_were(
        self, targets: list[int], sources: list[int], kind: str, dtype: torch.dtype
    ) -> None:
        pool = self.used(kind, dtype)
        expected = self.stored(pool)
        for tensor in expected:
            tensor[targets] = tensor[sources].clone()
        pool.move_kv_cache(targets, sources)
        assert [raw(tensor) for tensor in self.stored(pool)] == [raw(t) for t in expected]

    @clause("KV-14")
    def test_padding_moves_into_the_sink(self) -> None:
        pool = self.used("mha", page_size=4)
        expected = raw(pool.k_buffer[0][9])
        pool.move_kv_cache([0, 5, 0, 3], [4, 9, 6, 7])
        assert raw(pool.k_buffer[0][5]) == expected

    @clause("KV-15")
    @pytest.mark.parametrize("why", BAD_MOVES)
    @pytest.mark.parametrize("kind", ["mha", "mla"])
    @pytest.mark.parametrize("checked", [True, False])
    def test_a_move_is_refused_whole(self, checked: bool, kind: str, why: str) -> None:
        pool = self.used(kind, checked=checked)
        targets, sources = BAD_MOVES[why]
        self.refuses(pool, "KV-15", pool.move_kv_cache, targets, sources)

    @clause("KV-16")
    @dtypes
    def test_a_copy_is_the_rows_in_order(self, dtype: torch.dtype) -> None:
        pool, slots = self.used("mha", dtype), [7, 2, 2, 5, 8]
        for chunk_size, lengths in ((8192, [5]), (2, [2, 2, 1]), (5, [5]), (1, [1] * 5)):
            self._set_chunk(pool, chunk_size)
            copy = pool.get_cpu_copy(torch.tensor(slots))
            assert [[len(chunk[0]) for chunk in layer] for layer in copy] == [lengths] * 2
            for layer, chunks in enumerate(copy):
                stored = pool.k_buffer[layer], pool.v_buffer[layer]
                for place, tensor in enumerate(stored):
                    found = torch.cat([chunk[place] for chunk in chunks])
                    assert found.dtype == pool.store_dtype
                    assert same(found, tensor[slots])
        assert pool.get_cpu_copy([]) == [[], []]

    def _set_chunk(self, pool: Any, chunk_size: int) -> None:
        getattr(pool, "_subject", pool).cpu_offloading_chunk_size = chunk_size

    @clause("KV-16")
    def test_chunks_are_of_8192_slots(self) -> None:
        for kind in ("mha", "mla", "windows"):
            assert getattr(self, kind)().cpu_offloading_chunk_size == 8192

    @clause("KV-16")
    @dtypes
    def test_a_copy_of_latents_is_the_rows_in_order(self, dtype: torch.dtype) -> None:
        pool = self.used("mla", dtype)
        self._set_chunk(pool, 2)
        copy = pool.get_cpu_copy([7, 2, 5])
        assert [[len(chunk) for chunk in layer] for layer in copy] == [[2, 1]] * 2
        for layer, chunks in enumerate(copy):
            assert same(torch.cat(chunks), pool.kv_buffer[layer][[7, 2, 5]])

    @clause("KV-16")
    @pytest.mark.parametrize("kind", ["mha", "mla"])
    @pytest.mark.parametrize("slots", [[3], [1, 2, 3], [4, 1]])
    def test_a_copy_is_in_memory_of_its_own(self, kind: str, slots: list[int]) -> None:
        pool = self.used(kind)
        copy = pool.get_cpu_copy(slots)
        chunks = [chunk for layer in copy for chunk in layer]
        tensors = chunks if kind == "mla" else [tensor for chunk in chunks for tensor in chunk]
        before = [raw(tensor) for tensor in tensors], pool.view()
        for layer in range(2):
            pool.get_key_buffer(layer).fill_(9)
        assert [raw(tensor) for tensor in tensors] == before[0]
        kept = pool.view()
        for tensor in tensors:
            tensor.fill_(7)
        assert pool.view() == kept

    @clause("KV-17")
    @dtypes
    @pytest.mark.parametrize("kind", ["mha", "mla"])
    @pytest.mark.parametrize("page_size", [1, 16])
    def test_what_is_copied_comes_back_bit_for_bit(
        self, page_size: int, kind: str, dtype: torch.dtype
    ) -> None:
        pool = self.used(kind, dtype, page_size=page_size)
        slots = [page_size + offset for offset in (6, 0, 3, 4, 1)]
        self._set_chunk(pool, 2)
        copy = pool.get_cpu_copy(slots)
        before = pool.view()
        for tensor in self.tensors(pool):
            tensor[slots] = 0
        pool.load_cpu_copy(copy, torch.tensor(slots))
        assert pool.view() == before
        other = getattr(self, kind)(dtype=dtype, page_size=page_size)
        elsewhere = [page_size + offset for offset in (2, 7, 0, 1, 5)]
        other.load_cpu_copy(copy, elsewhere)
        for layer, chunks in enumerate(copy):
            stored = self.tensors(other)[layer::2]
            for place, tensor in enumerate(stored):
                parts = [chunk if kind == "mla" else chunk[place] for chunk in chunks]
                assert same(tensor[elsewhere], torch.cat(parts))
                rest = [page_size + offset for offset in (3, 4, 6)]
                assert not tensor[rest].view(torch.uint8).any()

    @clause("KV-17")
    def test_chunks_of_any_length_are_taken(self) -> None:
        pool = self.used("mha")
        copies = pool.get_cpu_copy([3, 4, 5]), pool.get_cpu_copy([6])
        copy = [[*chunks, *more] for chunks, more in zip(*copies, strict=True)]
        expected = self.stored(pool)
        for tensor in expected:
            tensor[[6, 5, 8, 1]] = tensor[[3, 4, 5, 6]].clone()
        pool.load_cpu_copy(copy, [6, 5, 8, 1])
        assert [raw(tensor) for tensor in self.stored(pool)] == [raw(t) for t in expected]

    @clause("KV-11")
    def test_a_copy_is_not_written_by_loading_it(self) -> None:
        pool = self.used("mha")
        copy = pool.get_cpu_copy([3, 4])
        before = [raw(tensor) for layer in copy for chunk in layer for tensor in chunk]
        pool.load_cpu_copy(copy, [4, 5])
        pool.get_key_buffer(0).fill_(3)
        assert [raw(tensor) for layer in copy for chunk in layer for tensor in chunk] == before

    @clause("KV-18")
    @pytest.mark.parametrize("slots", [[-1], [9], [1, 2**32 + 1], [2.0], None])
    @pytest.mark.parametrize("kind", ["mha", "mla"])
    def test_no_copy_of_what_is_no_slot(self, kind: str, slots: Any) -> None:
        pool = self.used(kind)
        copy = pool.get_cpu_copy([1] * (len(slots) if slots else 0))
        self.refuses(pool, "KV-18", pool.get_cpu_copy, slots)
        self.refuses(pool, "KV-18", pool.load_cpu_copy, copy, slots)

    @clause("KV-18")
    @pytest.mark.parametrize("kind", ["mha", "mla"])
    @pytest.mark.parametrize("slots", [[1], [1, 2, 3], [], [2, 2]])
    def test_a_copy_is_loaded_into_as_many_slots(self, slots: list[int], kind: str) -> None:
        pool = self.used(kind)
        self._set_chunk(pool, 1)
        copy = pool.get_cpu_copy([4, 5])
        self.refuses(pool, "KV-18", pool.load_cpu_copy, copy, slots)

    @clause("KV-18")
    @pytest.mark.parametrize(
        "other",
        [
            {"layer_num": 1},
            {"layer_num": 3},
            {"dtype": torch.float64},
            {"dtype": torch.float8_e5m2},
            {"head_dim": 4},
        ],
    )
    def test_a_copy_is_loaded_into_such_a_pool(self, other: dict[str, Any]) -> None:
        pool = self.used("mha")
        copy = self.mha(**other).get_cpu_copy([4, 5])
        self.refuses(pool, "KV-18", pool.load_cpu_copy, copy, [4, 5])

    @clause("KV-18")
    def test_both_halves_of_a_chunk_are_equally_long(self) -> None:
        pool = self.used("mha")
        copy = pool.get_cpu_copy([4, 5])
        copy[1][0][1] = copy[1][0][1][:1]
        self.refuses(pool, "KV-18", pool.load_cpu_copy, copy, [4, 5])
        copy[1][0].pop()
        self.refuses(pool, "KV-18", pool.load_cpu_copy, copy, [4, 5])
