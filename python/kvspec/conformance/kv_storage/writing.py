"""What a write does and what it refuses: KV-9 to KV-13, KV-34."""

from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvspec.conformance import clause
from kvspec.conformance.kv_storage.subjects import (
    DTYPES,
    StorageSubjects,
    dtypes,
    raw,
    rows,
    same,
    some_dtypes,
)

Kind = Callable[[list[int]], Any]
KINDS: dict[str, Kind] = {
    "list": list,
    "tuple": tuple,
    "array": lambda numbers: np.array(numbers, dtype=np.int32),
    "buffer": lambda numbers: memoryview(array("q", numbers)),
    "tensor": lambda numbers: torch.tensor(numbers, dtype=torch.int64),
    "tensor of int32": lambda numbers: torch.tensor(numbers, dtype=torch.int32),
    "strided tensor": lambda numbers: (
        torch.tensor(numbers, dtype=torch.int64).repeat(2, 1).t()[:, 0]
    ),
}
LAYERS: dict[str, tuple[Any, int | None]] = {
    "a layer": (SimpleNamespace(layer_id=1), None),
    "an int": (1, None),
    "a numpy int": (np.int64(1), None),
    "an override": (SimpleNamespace(layer_id=0), 1),
    "an override of 1 for what is not there": (SimpleNamespace(layer_id=9), 1),
}
TWO = rows(2)
BAD_WRITES: dict[str, tuple[Any, Any, Any]] = {
    "a slot below 0": ([-1, 2], TWO, TWO),
    "a slot that torch takes for the last": ([1, -9], TWO, TWO),
    "a slot beyond the rows": ([2, 12], TWO, TWO),
    "a slot that wraps": ([2, 2**32 + 5], TWO, TWO),
    "a slot of more than 64 bits": ([2, 2**70], TWO, TWO),
    "a slot twice": ([5, 5], TWO, TWO),
    "a slot twice beside the sink": ([0, 5, 3, 5], rows(4), rows(4)),
    "too few rows": ([4, 5, 6], TWO, TWO),
    "too many keys": ([4], TWO, rows(1)),
    "too many values": ([4], rows(1), TWO),
    "one row for all": ([4, 5], rows(1), TWO),
    "slots of two dimensions": (torch.tensor([[4], [5]]), TWO, TWO),
    "slots that are no integers": ([4.0, 5.0], TWO, TWO),
    "slots that are true or false": (torch.tensor([True, False]), TWO, TWO),
    "no slots": (None, TWO, TWO),
    "keys on another device": ([4, 5], TWO.to("meta"), TWO),
    "values on another device": ([4, 5], TWO, TWO.to("meta")),
    "slots on another device": (torch.tensor([4, 5], device="meta"), TWO, TWO),
    "keys that are a list": ([4, 5], TWO.tolist(), TWO),
    "no values": ([4, 5], TWO, None),
    "integers": ([4, 5], TWO.int(), TWO),
    "true and false": ([4, 5], TWO, TWO.bool()),
    "complex numbers": ([4, 5], TWO.to(torch.complex64), TWO),
    "keys of other heads": ([4, 5], rows(2, 1, 3), TWO),
    "values of another dimension": ([4, 5], TWO, rows(2, 2, 4)),
    "heads and dimension in one": ([4, 5], TWO.view(2, 6), TWO),
    "heads and dimension exchanged": ([4, 5], TWO.transpose(1, 2), TWO),
    "one dimension too many": ([4, 5], TWO[None], TWO),
}


def put(buffer: Tensor, slots: list[int]) -> Tensor:
    return buffer[torch.tensor(slots, dtype=torch.int64)]


class WritingConformance(StorageSubjects):
    """Writes."""

    @clause("KV-9")
    @dtypes
    @pytest.mark.parametrize("page_size", [1, 4, 16])
    def test_rows_are_written_and_no_others(self, dtype: torch.dtype, page_size: int) -> None:
        pool = self.mha(dtype=dtype, size=16, page_size=page_size)
        slots = [page_size + offset for offset in (5, 0, 15, 6, 7)]
        keys, values = rows(5, dtype=dtype, seed=1), rows(5, dtype=dtype, seed=2)
        others = pool.view().layers[0]
        pool.set_kv_buffer(1, torch.tensor(slots), keys, values)
        assert same(put(pool.get_key_buffer(1), slots), keys)
        assert same(put(pool.get_value_buffer(1), slots), values)
        rest = [slot for slot in range(page_size, 16 + page_size) if slot not in slots]
        for tensor in (pool.k_buffer[1], pool.v_buffer[1]):
            assert not put(tensor, rest).view(torch.uint8).any()
        assert pool.view().layers[0] == others

    @clause("KV-9")
    @dtypes
    def test_latents_are_written_and_no_others(self, dtype: torch.dtype) -> None:
        pool, slots = self.mla(dtype=dtype), [3, 8, 1]
        latents = rows(3, 1, 6, dtype=dtype, seed=3)
        pool.set_kv_buffer(0, slots, latents, None)
        assert same(put(pool.get_key_buffer(0), slots), latents)
        assert not put(pool.kv_buffer[0], [2, 4, 5, 6, 7]).view(torch.uint8).any()
        nope, rope = rows(1, 1, 4, dtype=dtype, seed=4), rows(1, 1, 2, dtype=dtype, seed=5)
        pool.set_mla_kv_buffer(0, [8], nope, rope)
        assert same(pool.get_key_buffer(0)[[8]], torch.cat([nope, rope], dim=-1))
        assert same(put(pool.get_key_buffer(0), [3, 1]), latents[[0, 2]])

    @clause("KV-9")
    @pytest.mark.parametrize("kind", KINDS)
    def test_slots_come_in_every_form(self, kind: str) -> None:
        pool = self.mha()
        pool.set_kv_buffer(0, KINDS[kind]([7, 8, 1]), rows(3), rows(3, start=5))
        assert same(put(pool.get_key_buffer(0), [7, 8, 1]), rows(3))
        assert same(put(pool.get_value_buffer(0), [7, 8, 1]), rows(3, start=5))
        pool.set_kv_buffer(0, KINDS[kind]([]), rows(0), rows(0))

    @clause("KV-9")
    @pytest.mark.parametrize("named", LAYERS)
    def test_a_layer_is_named_in_every_way(self, named: str) -> None:
        pool = self.mha()
        layer, override = LAYERS[named]
        pool.set_kv_buffer(layer, [2], rows(1), rows(1, start=5), layer_id_override=override)
        assert same(pool.get_key_buffer(1)[[2]], rows(1))
        assert not pool.get_key_buffer(0).any()

    @clause("KV-9")
    @some_dtypes
    def test_rows_need_not_lie_one_after_the_other(self, dtype: torch.dtype) -> None:
        pool = self.mha(dtype=dtype)
        both = rows(3, 4, 3, dtype=dtype, seed=6)  # K and V of one projection
        turned = rows(2, 3, 3, dtype=dtype, seed=7).transpose(0, 1)  # heads first
        pool.set_kv_buffer(0, [3, 1, 2], both[:, :2], both[:, 2:])
        assert same(put(pool.get_key_buffer(0), [3, 1, 2]), both[:, :2])
        assert same(put(pool.get_value_buffer(0), [3, 1, 2]), both[:, 2:])
        pool.set_kv_buffer(1, [3, 1, 2], turned, rows(6, dtype=dtype, seed=8)[::2])
        assert same(put(pool.get_key_buffer(1), [3, 1, 2]), turned)
        assert same(put(pool.get_value_buffer(1), [3, 1, 2]), rows(6, dtype=dtype, seed=8)[::2])
        one = rows(1, dtype=dtype, seed=9).expand(3, 2, 3)
        pool.set_kv_buffer(1, [4, 5, 6], one, one)
        assert same(put(pool.get_key_buffer(1), [4, 5, 6]), one)

    @clause("KV-9")
    def test_rows_with_a_gradient_are_written(self) -> None:
        pool, given = self.mha(), rows(1).requires_grad_()
        pool.set_kv_buffer(0, [2], given, given * 2)
        assert same(pool.get_value_buffer(0)[[2]], rows(1) * 2)
        assert not pool.get_value_buffer(0).requires_grad

    @clause("KV-9")
    def test_rows_of_the_pool_itself_are_read_before_any_is_written(self) -> None:
        pool = self.mha()
        pool.set_kv_buffer(0, list(range(1, 9)), rows(8), rows(8, start=7))
        keys, values = pool.get_key_buffer(0).clone(), pool.get_value_buffer(0).clone()
        live = pool.get_key_buffer(0), pool.get_value_buffer(0)
        pool.set_kv_buffer(0, [2, 3, 4, 5], live[1][1:5], live[0][1:5])
        assert same(pool.get_key_buffer(0)[2:6], values[1:5])
        assert same(pool.get_value_buffer(0)[2:6], keys[1:5])
        assert same(pool.get_key_buffer(0)[6:], keys[6:])
        keys = pool.get_key_buffer(0).clone()
        pool.set_kv_buffer(0, [2, 3, 4, 5], live[0][1:5], live[0][1:5])
        assert same(pool.get_key_buffer(0)[2:6], keys[1:5])

    @clause("KV-10")
    @dtypes
    @pytest.mark.parametrize("scale", [None, 3.0, torch.tensor(0.5), torch.tensor([7.0])])
    def test_another_dtype_is_scaled_and_cast(self, dtype: torch.dtype, scale: Any) -> None:
        for source in (kind for kind in DTYPES if kind.itemsize > 1 and kind != dtype):
            given = rows(4, dtype=source) / 7
            pool = self.mha(dtype=dtype)
            pool.set_kv_buffer(0, [4, 3, 2, 1], given, given, scale, None)
            quotient = given if scale is None else (given / scale).to(source)
            assert same(put(pool.get_key_buffer(0), [4, 3, 2, 1]), quotient.to(dtype))
            assert same(put(pool.get_value_buffer(0), [4, 3, 2, 1]), given.to(dtype))

    @clause("KV-10")
    @dtypes
    def test_what_has_the_dtype_is_stored_bit_for_bit(self, dtype: torch.dtype) -> None:
        pool, given = self.mha(dtype=dtype), rows(3, dtype=dtype, seed=11)
        pool.set_kv_buffer(0, [1, 2, 3], given, given, 4.0, torch.tensor(0.5))
        assert same(pool.get_key_buffer(0)[1:4], given)
        assert same(pool.get_value_buffer(0)[1:4], given)

    @clause("KV-10")
    def test_what_is_cast_is_rounded_once(self) -> None:
        """Through bfloat16 this would be a tie, and go to 1.0."""
        pool = self.mha(dtype=torch.float8_e4m3fn)
        given = torch.full((1, 2, 3), 1.0625 + 2**-12)
        pool.set_kv_buffer(0, [1], given, given)
        assert pool.get_key_buffer(0)[1].float().eq(1.125).all()
        latents = self.mla(dtype=torch.float8_e4m3fn)
        latents.set_mla_kv_buffer(0, [1], given[:1, :1, :1].expand(1, 1, 4), rows(1, 1, 2))
        assert latents.get_value_buffer(0)[1].float().eq(1.125).all()

    @clause("KV-10")
    def test_a_scale_is_one_number(self) -> None:
        pool = self.mha(dtype=torch.float16)
        for scale in (torch.ones(2), (2.0,), object()):
            self.refuses(pool, "KV-12", pool.set_kv_buffer, 0, [1], rows(1), rows(1), scale)

    @clause("KV-11")
    @dtypes
    @pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, None])
    def test_what_was_given_is_not_written(
        self, dtype: torch.dtype, source: torch.dtype | None
    ) -> None:
        pool = self.mha(dtype=dtype)
        given = [rows(2, dtype=source or dtype) for _ in range(2)]
        scale, loc = torch.tensor(4.0), torch.tensor([3, 2])
        before = [raw(each) for each in (*given, scale, loc)]
        pool.set_kv_buffer(0, loc, given[0], given[1], scale, scale)
        assert [raw(each) for each in (*given, scale, loc)] == before

    @clause("KV-11")
    def test_what_was_given_is_not_kept(self) -> None:
        pool, latents = self.mha(), self.mla()
        keys, values, loc = rows(2), rows(2, start=4), torch.tensor([3, 2])
        pool.set_kv_buffer(0, loc, keys, values)
        nope, rope = rows(2, 1, 4), rows(2, 1, 2)
        latents.set_mla_kv_buffer(0, loc, nope, rope)
        before = pool.view(), latents.view()
        for tensor in (keys, values, loc, nope, rope):
            tensor.fill_(1)
        assert (pool.view(), latents.view()) == before

    @clause("KV-12")
    @pytest.mark.parametrize("why", BAD_WRITES)
    def test_a_write_is_refused_whole(self, why: str) -> None:
        pool = self.mha(page_size=1, size=8)
        loc, keys, values = BAD_WRITES[why]
        pool.set_kv_buffer(0, [4, 5, 8], rows(3, start=2), rows(3, start=3))
        self.refuses(pool, "KV-12", pool.set_kv_buffer, 0, loc, keys, values)

    @clause("KV-12")
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_the_last_slot_is_the_last_of_the_last_page(self, page_size: int) -> None:
        pool = self.mha(page_size=page_size)
        last = 8 + page_size - 1
        pool.set_kv_buffer(0, [last], rows(1), rows(1))
        assert same(pool.get_key_buffer(0)[[last]], rows(1))
        self.refuses(pool, "KV-12", pool.set_kv_buffer, 0, [last + 1], rows(1), rows(1))
        twice = [page_size, page_size]
        self.refuses(pool, "KV-12", pool.set_kv_buffer, 0, twice, TWO, TWO)

    @clause("KV-12")
    @pytest.mark.parametrize("page_size", [1, 4, 16])
    def test_padded_tokens_may_collide_in_the_sink(self, page_size: int) -> None:
        pool = self.mha(page_size=page_size, size=16)
        slots = [0, page_size, page_size - 1, 0, page_size - 1]
        pool.set_kv_buffer(0, slots, rows(5), rows(5))
        assert same(pool.get_key_buffer(0)[page_size], rows(5)[1])
        assert not pool.get_key_buffer(0)[page_size + 1 :].any()

    @clause("KV-12")
    @pytest.mark.parametrize("name", ["set_kv_buffer", "set_mla_kv_buffer"])
    def test_a_write_of_latents_is_refused_whole(self, name: str) -> None:
        pool = self.mla()
        fits = [rows(2, 1, 6), None] if name == "set_kv_buffer" else [rows(2, 1, 4), rows(2, 1, 2)]
        write = getattr(pool, name)
        for slots in ([1, 1], [1, 9], [-1, 1], [1], [1, 2, 3]):
            self.refuses(pool, "KV-12", write, 0, slots, *fits)
        wrong = [rows(2, 1, 5), *fits[1:]]
        self.refuses(pool, "KV-12", write, 0, [1, 2], *wrong)
        if name == "set_mla_kv_buffer":
            self.refuses(pool, "KV-12", write, 0, [1, 2], fits[0], rows(2, 1, 3))

    @clause("KV-13")
    @pytest.mark.parametrize("slots", [[3, 3, 3], [3, 5, 3], [0, 3, 0]])
    def test_a_pool_that_is_not_checked_takes_the_last_row(self, slots: list[int]) -> None:
        pool = self.mha(checked=False)
        assert not pool.checked
        pool.set_kv_buffer(0, slots, rows(3), rows(3, start=5))
        last = max(at for at, slot in enumerate(slots) if slot == 3)
        assert same(pool.get_key_buffer(0)[3], rows(3)[last])
        assert same(pool.get_value_buffer(0)[3], rows(3, start=5)[last])
        latents = self.mla(checked=False)
        latents.set_kv_buffer(0, slots, rows(3, 1, 6), None)
        assert same(latents.get_key_buffer(0)[3], rows(3, 1, 6)[last])

    @clause("KV-12", "KV-13")
    @pytest.mark.parametrize(
        "why", [why for why in BAD_WRITES if not why.startswith("a slot twice")]
    )
    def test_a_pool_that_is_not_checked_refuses_everything_else(self, why: str) -> None:
        pool = self.mha(checked=False)
        loc, keys, values = BAD_WRITES[why]
        self.refuses(pool, "KV-12", pool.set_kv_buffer, 0, loc, keys, values)

    @clause("KV-34")
    @pytest.mark.parametrize("size", [8, 800])
    def test_cost_is_what_is_named(self, size: int) -> None:
        pool = self.mha(size=size)
        host = self.host(pool)
        pool.set_kv_buffer(0, [1, 2, 3], rows(3), rows(3))
        assert pool.counters() == {"rows_copied": 6}
        pool.move_kv_cache([1, 2], [2, 3])
        assert pool.counters() == {"rows_copied": 6 + 2 * 2 * 4}
        pool.load_cpu_copy(pool.get_cpu_copy([1, 2]), [3, 4])
        assert pool.counters() == {"rows_copied": 22 + 8 + 8}
        slots = host.alloc(4)
        host.backup_from_device_all_layer(pool, slots, [1, 2, 3, 4], "kernel")
        host.load_to_device_per_layer(pool, slots, [1, 2, 3, 4], 0, "kernel")
        host.free(slots)
        assert host.counters() == {"rows_copied": 16 + 8}
