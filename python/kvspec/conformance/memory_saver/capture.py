"""What a region captures, and what it does not (SAVER-1 to SAVER-7)."""

import copy
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvspec.conformance import clause
from kvspec.conformance.memory_saver.bench import (
    FACTORY_CALLS,
    OTHERS,
    PAGE,
    SHAPED_CALLS,
    SaverBench,
    refused,
    where,
)

__all__ = ["CaptureConformance"]


class CaptureConformance(SaverBench):
    # -- one saver, and its twin -----------------------------------------------------------------

    @clause("SAVER-1")
    def test_there_is_one_saver(self) -> None:
        kind = self.fresh()
        self.of(kind)
        first, second = kind.create(True), kind.create(enable=True)
        assert first is second
        assert first.enabled is True
        with first.region("kv_cache"):
            table = torch.ones(4)
        assert second.view()["kv_cache"].allocations == 1
        assert table.sum() == 4

    @clause("SAVER-2")
    def test_the_twin_does_nothing(self) -> None:
        twin = self.make(enable=False)
        with twin.region("kv_cache", enable_cpu_backup=True):
            table = torch.ones(5_000)
        twin.pause("kv_cache")
        twin.pause("kv_cache")
        with twin.region("kv_cache"):
            table += 1
        twin.resume("never seen")
        with twin.configure_subprocess():
            twin.check()
        assert twin.enabled is False
        assert dict(twin.view()) == {}
        assert table.sum() == 10_000
        assert table.untyped_storage().resizable()
        assert set(twin.counters().values()) == {0}

    @clause("SAVER-2")
    def test_the_twin_is_no_saver(self) -> None:
        kind = self.fresh()
        saver = self.of(kind)
        with saver.region("kv_cache"):
            table = torch.ones(4)
        twin = kind.create(False)
        twin.pause("kv_cache")
        assert saver.view()["kv_cache"].paused is False
        assert table.sum() == 4

    # -- what is captured ------------------------------------------------------------------------

    @clause("SAVER-3", "SAVER-4")
    @pytest.mark.parametrize("name", FACTORY_CALLS)
    def test_a_factory_gives_what_it_gives_outside(self, name: str) -> None:
        saver, call = self.make(), FACTORY_CALLS[name]
        torch.manual_seed(3)
        outside = call()
        torch.manual_seed(3)
        with saver.region("kv_cache"):
            inside = call()
        assert torch.equal(inside, outside)
        self.alike(saver, inside, outside)

    @clause("SAVER-3", "SAVER-4")
    @pytest.mark.parametrize("name", SHAPED_CALLS)
    def test_an_empty_tensor_has_the_form_it_has_outside(self, name: str) -> None:
        saver, call = self.make(), SHAPED_CALLS[name]
        with saver.region("kv_cache"):
            inside = call()
        self.alike(saver, inside, call())

    def alike(self, saver: Any, inside: Tensor, outside: Tensor) -> None:
        """The same in everything but where it lies, and captured as one allocation."""
        assert inside.dtype == outside.dtype
        assert inside.shape == outside.shape
        assert inside.stride() == outside.stride()
        assert inside.requires_grad == outside.requires_grad
        assert inside.is_leaf == outside.is_leaf
        address, nbytes = where(inside)
        assert nbytes == outside.untyped_storage().nbytes()
        assert address % PAGE == 0
        assert saver.view()["kv_cache"][:3] == (False, 1, nbytes)
        assert saver.counters()["captured"] == nbytes
        saver.pause("kv_cache")

    @clause("SAVER-3")
    def test_constructors_of_modules_are_captured(self) -> None:
        saver = self.make()
        with saver.region("weights", enable_cpu_backup=True):
            model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
        assert saver.view()["weights"].allocations == 4
        assert saver.view()["weights"].nbytes == 4 * (32 + 4 + 4 + 4)
        given = torch.ones(2, 8)
        before = model(given).tolist()
        saver.pause("weights")
        assert all(not parameter.any() for parameter in model.parameters())
        saver.resume("weights")
        assert model(given).tolist() == before
        model(given).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    @clause("SAVER-3")
    def test_the_innermost_region_captures(self) -> None:
        saver = self.make()
        with saver.region("outer"):
            first = torch.zeros(1, dtype=torch.uint8)
            with saver.region("inner"):
                second = torch.zeros(2, dtype=torch.uint8)
                with saver.region("outer"):
                    third = torch.zeros(4, dtype=torch.uint8)
                    assert saver.view()["outer"].regions == 2
            fourth = torch.zeros(8, dtype=torch.uint8)
        assert saver.view() == {"outer": (False, 3, 13, 0, 0), "inner": (False, 1, 2, 0, 0)}
        assert sum(map(len, (first, second, third, fourth))) == 15

    @clause("SAVER-4")
    def test_a_captured_tensor_is_a_tensor(self) -> None:
        saver = self.make()
        with saver.region("kv_cache"):
            table = torch.zeros(4, 8)
            parameter = torch.nn.Parameter(torch.ones(3))
        table[1:3] += 2
        table.t()[0].fill_(5)
        assert table.view(32)[8:10].tolist() == [5, 2]
        for again in (copy.deepcopy(table), pickle.loads(pickle.dumps(table)), table.clone()):
            assert torch.equal(again, table)
            assert again.data_ptr() != table.data_ptr()
        table.numpy()[0, 0] = 9
        assert table[0, 0] == 9
        (parameter * 2).sum().backward()
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [2, 2, 2]
        assert saver.view()["kv_cache"].allocations == 2

    @clause("SAVER-5", "SAVER-8")
    @pytest.mark.parametrize("kind", ["mmap", "shm"])
    def test_an_arena_is_captured(self, kind: str) -> None:
        saver = self.make()
        with saver.region("kv_cache"):
            arena = self.arena(kind)
        tensor = arena.tensor()
        try:
            tensor.fill_(3)
            assert saver.view()["kv_cache"] == (False, 1, 3 * PAGE, 0, 0)
            saver.pause("kv_cache")
            assert arena.resident_bytes() == 0
            assert not tensor.any()
            saver.resume("kv_cache")
            arena = None
            assert saver.view()["kv_cache"].allocations == 1, "its tensor has the memory"
        finally:  # when it fails too, the segment goes
            arena = tensor = None
        assert saver.view()["kv_cache"].allocations == 0

    @clause("SAVER-6")
    @pytest.mark.parametrize("name", OTHERS)
    def test_other_things_are_not_captured(self, name: str) -> None:
        saver = self.make()
        with saver.region("kv_cache"):
            made = OTHERS[name]()
        assert saver.view()["kv_cache"].allocations == 0
        assert made is not None

    @clause("SAVER-6")
    def test_an_array_is_shared_as_ever(self) -> None:
        saver, numbers = self.make(), np.ones(3)
        with saver.region("kv_cache"):
            tensor = torch.from_numpy(numbers)
        numbers[1] = 5
        assert tensor.tolist() == [1, 5, 1]

    @clause("SAVER-6")
    def test_an_arena_of_the_heap_is_not_captured(self) -> None:
        saver = self.make()
        with saver.region("kv_cache"):
            arena = self.arena("heap")
        assert saver.view()["kv_cache"].allocations == 0
        arena.close()

    @clause("SAVER-6")
    def test_a_region_is_its_threads(self) -> None:
        saver, made = self.make(), []
        with saver.region("kv_cache"):
            thread = threading.Thread(target=lambda: made.append(torch.zeros(5)))
            thread.start()
            thread.join()
        assert len(made) == 1
        assert saver.view()["kv_cache"].allocations == 0

    @clause("SAVER-7")
    def test_pinned_memory_is_refused(self) -> None:
        saver = self.make()
        with saver.region("kv_cache"), refused("SAVER-7"):
            torch.empty(4, pin_memory=True)
        assert saver.view()["kv_cache"] == (False, 0, 0, 0, 0)
