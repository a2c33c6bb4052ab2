"""Conformance of poison. Spec: POISON."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvspec.poison
from kvspec.conformance import clause
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import watch_function
from kvspec.errors import ContractError

__all__ = ["FLOATS", "INTEGERS", "PoisonConformance", "written"]

FLOATS = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = FLOATS + INTEGERS


def written(slot_count: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """KV that a model could have written: [slots, *shape], no element of it poison."""
    tensor = torch.zeros(slot_count, *(shape or (2, 3)), dtype=torch.float32)
    flat = tensor.view(-1)
    flat[:] = torch.arange(len(flat)) % 13
    return tensor.to(dtype)


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit by bit: a NaN is not equal to itself."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


class PoisonConformance(Conformance):
    """`impl` may hold a class `Poison`, which then stands in for that of kvspec."""

    def make(self, tensors: Any, page_size: int) -> Any:
        given = getattr(self.impl, "Poison", None)
        cls: Callable[..., Any] = given if inspect.isclass(given) else kvspec.poison.Poison
        if self.impl_name == MUTANT:
            return cls(tensors, page_size)

        def construct(tensors: Any, page_size: int) -> Any:
            return cls(tensors, page_size)

        construct.__name__ = "__init__"  # the call that the clauses speak of
        poison = self._watched(construct)(tensors, page_size)
        methods = (poison.fresh, poison.freed, poison.stale, poison.check)
        return SimpleNamespace(**{each.__name__: self._watched(each) for each in methods})

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return watch_function(self.impl_name, function, "poison")

    @clause("POISON-1")
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("call", ["fresh", "freed"])
    def test_a_fill_is_nan_and_of_these_slots_alone(self, call: str, dtype: torch.dtype) -> None:
        tensors = [written(12, dtype), written(12, dtype, 5)]
        before = [tensor.clone() for tensor in tensors]
        getattr(self.make(tensors, 1), call)([4, 9])
        for tensor, old in zip(tensors, before, strict=True):
            assert tensor[[4, 9]].to(torch.float32).isnan().all()
            rest = [slot for slot in range(12) if slot not in (4, 9)]
            assert _same(tensor[rest], old[rest])

    @clause("POISON-1")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_fresh_and_freed_are_different_bits(self, dtype: torch.dtype) -> None:
        tensor = written(4, dtype)
        poison = self.make([tensor], 1)
        poison.fresh([1])
        poison.freed([2])
        assert not _same(tensor[1], tensor[2])
        for slot in (1, 2):
            row = tensor[slot].flatten()
            assert _same(row, row[:1].repeat(len(row)))

    @clause("POISON-1")
    def test_what_is_freed_is_filled_page_wise_and_what_is_fresh_is_not(self) -> None:
        tensor = written(12, torch.float32, 1)
        poison = self.make([tensor], 4)
        poison.fresh(torch.tensor([5], dtype=torch.int32))
        assert torch.nonzero(tensor.isnan().flatten()).flatten().tolist() == [5]
        poison.freed([10, 8])
        assert torch.nonzero(tensor.isnan().flatten()).flatten().tolist() == [5, 8, 9, 10, 11]

    @clause("POISON-1")
    def test_a_last_page_that_is_cut_short_is_filled_to_its_end(self) -> None:
        tensor = written(6, torch.float16, 1)
        self.make([tensor], 4).freed([4])
        assert torch.nonzero(tensor.isnan().flatten()).flatten().tolist() == [4, 5]

    @clause("POISON-1")
    def test_interleaved_layers_are_filled_each_in_its_place(self) -> None:
        both = written(6, torch.bfloat16, 2, 3)
        before = both.clone()
        self.make([both[:, 0], both[:, 1, :2]], 2).freed([3])
        assert both[2:4, 0].isnan().all()
        assert both[2:4, 1, :2].isnan().all()
        both[2:4, 0], both[2:4, 1, :2] = before[2:4, 0], before[2:4, 1, :2]
        assert _same(both, before)

    @clause("POISON-1")
    def test_nothing_is_filled_where_nothing_is_named(self) -> None:
        tensor = written(6, torch.bfloat16)
        before, poison = tensor.clone(), self.make([tensor], 2)
        poison.fresh([])
        poison.freed(torch.empty(0, dtype=torch.int64))
        with pytest.raises(ContractError, match="POISON-1: slot 6 is none of the 6"):
            poison.freed([0, 6])
        with pytest.raises(ContractError, match="POISON-1: slot -1 is none of the 6"):
            poison.fresh([-1])
        assert _same(tensor, before)

    @clause("POISON-1")
    def test_keys_and_values_of_a_kvcache_are_filled(self) -> None:
        buffers = [written(8, torch.float32, 1) for _ in range(3)]
        latent = written(8, torch.float32, 4)
        pairs = [(buffers[0], buffers[1]), (latent, latent[:, :3])]
        kvcache = SimpleNamespace(
            layer_num=2,
            start_layer=3,
            get_key_buffer=lambda layer_id: pairs[layer_id - 3][0],
            get_value_buffer=lambda layer_id: pairs[layer_id - 3][1],
        )
        poison = self.make(kvcache, 2)
        poison.freed([2])
        for tensor in (buffers[0], buffers[1], latent):
            assert tensor[2:4].isnan().all()
            assert not tensor[[0, 1, 4, 5, 6, 7]].isnan().any()
        latent[3, 0] = 1.0
        assert poison.check([1]) == [(1, 2, 3)]

    @clause("POISON-2")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_row_of_poison_is_known_however_it_was_read(self, dtype: torch.dtype) -> None:
        tensor = written(12, dtype)
        poison = self.make([tensor], 2)
        poison.fresh([2, 3, 5])
        poison.freed([6, 7, 8, 9])
        slots = torch.tensor([9, 1, 5, 6, 11, 2])
        expected = [(0, "freed"), (2, "fresh"), (3, "freed"), (5, "fresh")]
        gathered = tensor[slots]
        assert poison.stale(gathered) == expected
        copied = torch.zeros_like(gathered)
        if dtype in (torch.float8_e5m2, torch.float8_e4m3fn):  # which have no index_copy
            copied[torch.arange(6)] = gathered
        else:
            copied.index_copy_(0, torch.arange(6), gathered)
        assert poison.stale(copied) == expected
        assert poison.stale(tensor[4:8]) == [(1, "fresh"), (2, "freed"), (3, "freed")]
        assert poison.stale(tensor.transpose(1, 2)[slots]) == expected
        assert poison.stale(tensor[:0]) == []

    @clause("POISON-2")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_was_written_is_not_stale(self, dtype: torch.dtype) -> None:
        tensor = written(8, dtype)
        poison = self.make([tensor], 2)
        poison.fresh(range(8))
        tensor[2:6] = written(8, dtype)[2:6]
        assert [row for row, _ in poison.stale(tensor)] == [0, 1, 6, 7]

    @clause("POISON-2")
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_a_nan_of_the_model_is_not_stale(self, dtype: torch.dtype) -> None:
        """Of one byte it may look the same, but not in every element."""
        tensor = written(3, dtype, 4)
        tensor[1, 2] = torch.tensor(float("nan")).to(dtype)
        assert self.make([tensor], 1).stale(tensor) == []

    @clause("POISON-2")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_of_wide_types_one_element_is_enough(self, dtype: torch.dtype) -> None:
        """A head that was not written; but any byte may have been written."""
        tensor = written(4, dtype, 2, 2)
        poison = self.make([tensor], 1)
        poison.freed([2])
        tensor[2, 0] = written(1, dtype, 2)[0]
        assert poison.stale(tensor) == ([(2, "freed")] if dtype.itemsize > 1 else [])

    @clause("POISON-3")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_write_after_free_is_reported_with_page_tensor_and_slot(
        self, dtype: torch.dtype
    ) -> None:
        tensors = [written(16, dtype), written(16, dtype)]
        poison = self.make(tensors, 4)
        poison.freed([4, 9])
        assert poison.check([1, 2]) == []
        tensors[1][6, 1, 0] = tensors[1][0, 0, 0]
        tensors[0][9], tensors[1][9] = tensors[0][0], tensors[1][0]
        assert poison.check(torch.tensor([2, 1])) == [(1, 1, 6), (2, 0, 9)]
        tensors[0][7] = tensors[0][0]
        assert poison.check([1]) == [(1, 1, 6)]

    @clause("POISON-1", "POISON-2", "POISON-3")
    def test_a_slot_of_one_element_is_a_slot_too(self) -> None:
        tensor = written(6, torch.float16, 1)[:, 0]
        poison = self.make([tensor], 2)
        poison.freed([2])
        assert poison.stale(tensor) == [(2, "freed"), (3, "freed")]
        tensor[3] = 1.0
        assert poison.check([1]) == [(1, 0, 3)]

    @clause("POISON-3")
    def test_of_a_page_that_was_not_freed_nothing_is_said(self) -> None:
        tensor = written(16, torch.bfloat16)
        poison = self.make([tensor], 4)
        poison.freed([4, 8])
        poison.fresh([5])
        assert poison.check([0, 1, 2, 3]) == []
        assert poison.check([]) == []
        with pytest.raises(ContractError, match="POISON-3: page 4 is none of the 4"):
            poison.check([4])

    @clause("POISON-3")
    def test_the_poison_of_the_fresh_is_not_that_of_the_freed(self) -> None:
        """As when a slot is handed out twice: what was given back was filled for somebody else."""
        tensor = written(8, torch.bfloat16)
        poison = self.make([tensor], 4)
        poison.fresh([4])
        fresh = tensor[4].clone()
        poison.freed([4])
        tensor[5] = fresh
        assert poison.check([1]) == [(1, 0, 5)]

    @clause("POISON-4")
    @pytest.mark.parametrize(
        ("tensor", "reason"),
        [
            (torch.zeros(8, 2, device="meta"), "tensor 1 is on meta, not on the CPU"),
            (torch.zeros(8, 2, dtype=torch.bool), "tensor 1 is of torch.bool"),
            (torch.zeros(9, 2), r"tensor 1 has the shape \[9, 2\]"),
            (torch.tensor(0.0), r"tensor 1 has the shape \[\]"),
            (torch.zeros(1, 2).expand(8, 2), "tensor 1 is expanded"),
        ],
        ids=["device", "dtype", "longer", "scalar", "expanded"],
    )
    def test_a_tensor_that_cannot_be_filled_is_refused(self, tensor: Tensor, reason: str) -> None:
        first = written(8, torch.float32)
        before = first.clone()
        with pytest.raises(ContractError, match=f"POISON-4: {reason}"):
            self.make([first, tensor], 2)
        assert _same(first, before)

    @clause("POISON-4")
    @pytest.mark.parametrize("which", ["itself", "a part", "one element", "other bits"])
    def test_tensors_that_share_memory_are_refused(self, which: str) -> None:
        memory = written(8, torch.float32, 2, 3)
        first = memory[:, 0]
        other = {
            "itself": first,
            "a part": memory[:, :, 1],
            "one element": memory.view(-1)[6:22].view(8, 2),
            "other bits": memory.view(torch.int16)[:, 0, 4:],
        }[which]
        with pytest.raises(ContractError, match="POISON-4: tensor 2 shares memory with tensor 0"):
            self.make([first, memory[:, 1].clone(), other], 1)

    @clause("POISON-4")
    def test_a_page_of_nothing_is_refused(self) -> None:
        with pytest.raises(ContractError, match="POISON-4: page_size is 0"):
            self.make([written(8, torch.float32)], 0)
