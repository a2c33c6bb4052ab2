"""What every memory saver must do. Spec: SAVER."""

import copy
import pickle
import resource
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvspec.conformance import clause
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import watch
from kvspec.errors import ContractError, HostMemoryError
from kvspec.interfaces.memory_saver import TorchMemorySaverAdapter
from kvspec.memory_budget import MemoryBudget

__all__ = ["MemorySaverConformance"]

PAGE = resource.getpagesize()
MIB = 1 << 20
BLOCK = 16 << 10
SEEN = torch.arange(6, dtype=torch.float32).reshape(2, 3)
SEEN_TOO = torch.ones(6)

FACTORY_CALLS: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(3, 5),
    "zeros of a dtype": lambda: torch.zeros(7, dtype=torch.bfloat16),
    "zeros of one bit's worth": lambda: torch.zeros(1, dtype=torch.bool),
    "zeros that need a gradient": lambda: torch.zeros(3, requires_grad=True),
    "zeros of more than a page": lambda: torch.zeros(3_000, dtype=torch.int64),
    "ones": lambda: torch.ones(4, dtype=torch.complex64),
    "full": lambda: torch.full((2, 3), 2.5),
    "arange": lambda: torch.arange(5),
    "linspace": lambda: torch.linspace(0, 1, 9),
    "eye": lambda: torch.eye(4),
    "rand": lambda: torch.rand(4, 4),
    "randn": lambda: torch.randn(9),
    "randint": lambda: torch.randint(0, 9, (7,)),
    "randperm": lambda: torch.randperm(11),
    "normal": lambda: torch.normal(0.0, 1.0, (3,)),
    "a scalar": lambda: torch.scalar_tensor(3.5),
    "tensor": lambda: torch.tensor([[1, 2], [3, 4]]),
    "as_tensor": lambda: torch.as_tensor([1.5, 2.5]),
    "tensor of an array": lambda: torch.tensor(np.arange(3.0)),
    "new_zeros": lambda: SEEN.new_zeros(4),
    "new_ones": lambda: SEEN.new_ones(4),
    "new_full": lambda: SEEN.new_full((2,), 7.0),
    "new_tensor": lambda: SEEN.new_tensor([1.0]),
    "zeros_like": lambda: torch.zeros_like(SEEN),
    "zeros_like, transposed": lambda: torch.zeros_like(SEEN.t()),
    "ones_like": lambda: torch.ones_like(SEEN, dtype=torch.int8),
    "full_like": lambda: torch.full_like(SEEN, 3.0),
    "rand_like": lambda: torch.rand_like(SEEN),
    "clone": SEEN.clone,
    "clone, transposed": lambda: SEEN.t().clone(),
    "contiguous": lambda: SEEN.t().contiguous(),
    "half": SEEN.half,
    "to": lambda: SEEN.to(torch.float64),
}
"""Calls whose result can be compared with that of another."""

SHAPED_CALLS: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(3, 5),
    "empty_strided": lambda: torch.empty_strided((2, 3), (1, 4)),
    "empty_permuted": lambda: torch.empty_permuted((2, 3), (1, 0)),
    "empty, channels last": lambda: torch.empty(2, 3, 4, 5, memory_format=torch.channels_last),
    "empty_like": lambda: torch.empty_like(SEEN.t()),
    "new_empty": lambda: SEEN.new_empty(4),
    "new_empty_strided": lambda: SEEN.new_empty_strided((2, 2), (1, 2)),
    "Tensor": lambda: torch.Tensor(4),
}
"""Calls whose result has a form and no values."""

OTHERS: dict[str, Callable[[], object]] = {
    "arithmetic": lambda: SEEN + 1,
    "cat": lambda: torch.cat([SEEN, SEEN]),
    "a view": lambda: SEEN[1:],
    "from_numpy": lambda: torch.from_numpy(np.ones(3)),
    "frombuffer": lambda: torch.frombuffer(array("q", [1, 2]), dtype=torch.int64),
    "a storage": lambda: torch.UntypedStorage(16),
    "no bytes": lambda: torch.zeros(0, 4),
    "meta": lambda: torch.zeros(4, device="meta"),
    "like meta": lambda: torch.empty_like(torch.empty(4, device="meta")),
    "out": lambda: torch.ones(6, out=SEEN_TOO),
}
"""What makes no memory of a size that was asked for, on the CPU."""


def resident_bytes(address: int, nbytes: int) -> int:
    """How many bytes of pages the kernel has for a range of addresses, by its pagemap."""
    first, last = address // PAGE, (address + nbytes - 1) // PAGE
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        pages.seek(8 * first)
        entries = np.frombuffer(pages.read(8 * (last - first + 1)), dtype=np.uint64)
    return int((entries >> 63).sum()) * PAGE


def process_bytes() -> int:
    """What of the process is resident."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def where(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def raw(tensor: Tensor) -> list[int]:
    numbers: list[int] = tensor.detach().contiguous().view(torch.uint8).flatten().tolist()
    return numbers


@contextmanager
def refused(clause_id: str) -> Iterator[None]:
    with pytest.raises(ContractError) as caught:
        yield
    assert str(caught.value).startswith(f"{clause_id}: ")


class MemorySaverConformance(Conformance):
    """Tests of `TorchMemorySaverAdapter`, each with a saver that no other test shares."""

    def make(self, enable: bool = True) -> Any:
        """A saver of a class of its own, which no other test has."""
        return self.of(self.fresh(), enable)

    def fresh(self) -> Any:
        return type("Fresh", (self.impl.TorchMemorySaverAdapter,), {})

    def of(self, saver: Any, enable: bool = True) -> Any:
        if self.impl_name == MUTANT:
            return saver.create(enable=enable)
        interface = TorchMemorySaverAdapter
        return watch(self.impl_name, saver.create, interface, "memory_saver", enable=enable)

    def arena(self, kind: str = "mmap", nbytes: int = 3 * PAGE) -> Any:
        return self.impl.HostArena(kind, nbytes)

    def two(self) -> tuple[Any, Tensor, Tensor]:
        """A saver with a table that is dropped and weights that are kept, in two tags."""
        saver = self.make()
        with saver.region("kv_cache"):
            table = torch.full((5_000,), 7, dtype=torch.int32)
        with saver.region("weights", enable_cpu_backup=True):
            weights = torch.arange(3_000)
        return saver, table, weights

    def same(self, saver: Any, before: Mapping[str, Any], tensors: list[Tensor], was: Any) -> None:
        assert dict(saver.view()) == before
        assert [raw(tensor) for tensor in tensors] == was

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

    # -- pause and resume ------------------------------------------------------------------------

    @clause("SAVER-8")
    def test_a_pause_gives_the_pages_back(self) -> None:
        saver = self.make()
        with saver.region("kv_cache"):
            tensors = [torch.ones(4 * MIB, dtype=torch.uint8) for _ in range(3)]
        places = [where(tensor) for tensor in tensors]
        assert [resident_bytes(*place) for place in places] == [4 * MIB] * 3
        before = process_bytes()
        saver.pause("kv_cache")
        assert [resident_bytes(*place) for place in places] == [0] * 3
        assert before - process_bytes() > 10 * MIB
        assert [where(tensor) for tensor in tensors] == places
        assert not tensors[2][5 * PAGE]
        assert sum(resident_bytes(*place) for place in places) <= PAGE
        assert not any(tensor.any() for tensor in tensors)

    @clause("SAVER-9", "SAVER-8")
    def test_contents_are_dropped_or_kept(self) -> None:
        saver, table, weights = self.two()
        for tag in ("kv_cache", "weights"):
            saver.pause(tag)
        assert not table.any()
        assert not weights.any()
        for tag in ("weights", "kv_cache"):
            saver.resume(tag)
        assert not table.any()
        assert torch.equal(weights, torch.arange(3_000))

    @clause("SAVER-9")
    def test_what_is_written_while_paused_is_lost(self) -> None:
        saver, table, weights = self.two()
        for tensor, tag in ((table, "kv_cache"), (weights, "weights")):
            saver.pause(tag)
            tensor[17] = 99
            saver.resume(tag)
        assert not table.any()
        assert torch.equal(weights, torch.arange(3_000))

    @clause("SAVER-9")
    def test_one_tag_may_keep_and_drop(self) -> None:
        saver = self.make()
        with saver.region("weights"):
            dropped = torch.ones(4)
            with saver.region("weights", enable_cpu_backup=True):
                kept = torch.ones(4)
        for turn in range(3):
            kept += turn
            expected = kept.tolist()
            saver.pause("weights")
            saver.resume("weights")
            assert kept.tolist() == expected
            assert dropped.tolist() == [0] * 4
            dropped.fill_(turn)

    @clause("SAVER-10")
    def test_a_backup_is_held_from_pause_to_resume(self) -> None:
        saver = self.make()
        with saver.region("weights", enable_cpu_backup=True):
            weights = torch.ones(8 * MIB, dtype=torch.uint8)
        before = process_bytes()
        for _ in range(2):
            saver.pause("weights")
            assert saver.view()["weights"].backup_bytes == 8 * MIB
            assert resident_bytes(*where(weights)) == 0
            assert abs(process_bytes() - before) < 3 * MIB
            saver.resume("weights")
            assert saver.view()["weights"].backup_bytes == 0
            assert abs(process_bytes() - before) < 3 * MIB
        assert weights.sum() == 8 * MIB

    @clause("SAVER-11")
    @pytest.mark.parametrize("paused", [False, True])
    def test_what_is_freed_is_gone_at_once(self, paused: bool) -> None:
        budget = MemoryBudget()
        with budget.active():
            saver = self.make()
            with saver.region("weights", enable_cpu_backup=True):
                first = torch.ones(4 * MIB, dtype=torch.uint8)
                second = torch.ones(100)
            if paused:
                saver.pause("weights")
            view = first[5:]
            del first
            assert saver.view()["weights"].allocations == 2, "a view has it"
            before = process_bytes()
            del view
            assert before - process_bytes() > 3 * MIB  # of it, or of its backup
            left = 400 if paused else 0
            assert saver.view()["weights"] == (paused, 1, 400, 0, left)
            assert [entry[1] for entry in budget.view().reserved] in ([400], [PAGE])
            if paused:
                saver.resume("weights")
            assert second.sum() == 100
            assert saver.view()["weights"] == (False, 1, 400, 0, 0)

    @clause("SAVER-11", "SAVER-13")
    def test_a_tag_outlives_its_allocations(self) -> None:
        saver, table, weights = self.two()
        saver.pause("kv_cache")
        del table
        assert saver.view()["kv_cache"] == (True, 0, 0, 0, 0)
        saver.resume("kv_cache")
        saver.pause("kv_cache")
        saver.resume("kv_cache")
        assert saver.view()["kv_cache"] == (False, 0, 0, 0, 0)
        assert weights.sum() == 4_498_500

    @clause("SAVER-12")
    def test_a_second_pause_is_refused(self) -> None:
        saver, table, weights = self.two()
        saver.pause("weights")
        before, counts = dict(saver.view()), saver.counters()
        with refused("SAVER-12"):
            saver.pause("weights")
        assert dict(saver.view()) == before
        assert saver.counters() == counts
        saver.resume("weights")
        assert torch.equal(weights, torch.arange(3_000))
        assert (table == 7).all()

    @clause("SAVER-12")
    def test_an_unknown_tag_is_not_paused(self) -> None:
        saver, table, weights = self.two()
        before = dict(saver.view())
        with refused("SAVER-12"):
            saver.pause("kvcache")
        self.same(saver, before, [table, weights], [raw(table), raw(weights)])

    @clause("SAVER-12")
    def test_a_tag_with_an_open_region_is_not_paused(self) -> None:
        saver, table, weights = self.two()
        with saver.region("kv_cache"):
            with saver.region("weights"), refused("SAVER-12"):
                saver.pause("kv_cache")
            saver.pause("weights")
            saver.resume("weights")
        assert (table == 7).all()
        assert torch.equal(weights, torch.arange(3_000))
        assert saver.view()["kv_cache"] == (False, 1, 20_000, 0, 0)

    @clause("SAVER-12")
    def test_a_region_of_another_thread_is_open_too(self) -> None:
        saver, table, _ = self.two()
        opened, done = threading.Event(), threading.Event()

        def work() -> None:
            with saver.region("kv_cache"):
                opened.set()
                done.wait(60)

        thread = threading.Thread(target=work)
        thread.start()
        assert opened.wait(60)
        try:
            with refused("SAVER-12"):
                saver.pause("kv_cache")
        finally:
            done.set()
            thread.join()
        saver.pause("kv_cache")
        assert not table.any()

    @clause("SAVER-13")
    @pytest.mark.parametrize("tag", ["kv_cache", "kvcache"])
    def test_only_what_is_paused_is_resumed(self, tag: str) -> None:
        saver, table, weights = self.two()
        before = dict(saver.view())
        with refused("SAVER-13"):
            saver.resume(tag)
        saver.pause("weights")
        saver.resume("weights")
        with refused("SAVER-13"):
            saver.resume("weights")
        self.same(saver, before, [table, weights], [raw(table), raw(weights)])
        assert (table == 7).all()

    @clause("SAVER-14")
    def test_nothing_is_allocated_in_a_paused_tag(self) -> None:
        saver, table, _ = self.two()
        early = saver.region("kv_cache")
        saver.pause("kv_cache")
        before = dict(saver.view())
        with refused("SAVER-14"):
            saver.region("kv_cache")
        with refused("SAVER-14"), early:
            pytest.fail("a region of a paused tag was entered")
        assert dict(saver.view()) == before
        saver.resume("kv_cache")
        with saver.region("kv_cache"):
            more = torch.ones(2)
        assert saver.view()["kv_cache"].allocations == 2
        assert more.sum() == 2
        assert not table.any()

    @clause("SAVER-14")
    @pytest.mark.parametrize("tag", ["", None, 3])
    def test_a_tag_is_a_string(self, tag: Any) -> None:
        saver = self.make()
        with refused("SAVER-14"):
            saver.region(tag)
        assert dict(saver.view()) == {}

    # -- all or nothing --------------------------------------------------------------------------

    def filled(self, saver: Any, keep: bool) -> tuple[list[Any], list[Tensor]]:
        """Four arenas of a tag and a tensor over each, none of them zeros."""
        with saver.region("weights", enable_cpu_backup=keep):
            arenas = [self.arena(nbytes=(1 + i) * PAGE) for i in range(4)]
        tensors = [arena.tensor() for arena in arenas]
        for number, tensor in enumerate(tensors):
            tensor.fill_(number + 1)
        return arenas, tensors

    @clause("SAVER-15")
    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("at", range(4))
    def test_a_pause_that_fails_changes_nothing(self, at: int, keep: bool) -> None:
        budget = MemoryBudget()
        with budget.active():
            saver = self.make()
            arenas, tensors = self.filled(saver, keep)
            before, was = dict(saver.view()), [raw(tensor) for tensor in tensors]
            reserved, counts = budget.view(), saver.counters()
            with stuck(arenas[at]), pytest.raises(HostMemoryError):
                saver.pause("weights")
            self.same(saver, before, tensors, was)
            assert budget.view() == reserved
            assert saver.counters() == counts
            saver.pause("weights")
            assert sum(arena.resident_bytes() for arena in arenas) == 0

    @clause("SAVER-15")
    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("at", range(4))
    def test_a_resume_that_fails_changes_nothing(self, at: int, keep: bool) -> None:
        budget = MemoryBudget()
        with budget.active():
            saver = self.make()
            arenas, tensors = self.filled(saver, keep)
            was = [raw(tensor) if keep else [0] * len(tensor) for tensor in tensors]
            saver.pause("weights")
            before, counts, reserved = dict(saver.view()), saver.counters(), budget.view()
            with stuck(arenas[at]), pytest.raises(HostMemoryError):
                saver.resume("weights")
            assert budget.view() == reserved
            assert saver.counters() == counts
            self.same(saver, before, tensors, [[0] * len(tensor) for tensor in tensors])
            saver.resume("weights")
            assert [raw(tensor) for tensor in tensors] == was

    @clause("SAVER-15")
    def test_a_pause_without_room_for_the_backups_changes_nothing(self) -> None:
        with MemoryBudget(limit_bytes=3 * BLOCK).active():
            saver = self.make()
            with saver.region("weights", enable_cpu_backup=True):
                tensors = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(2)]
            before, was = dict(saver.view()), [raw(tensor) for tensor in tensors]
            with pytest.raises(HostMemoryError):
                saver.pause("weights")
            self.same(saver, before, tensors, was)
            tensors.pop()
            saver.pause("weights")
            assert saver.view()["weights"] == (True, 1, BLOCK, 0, BLOCK)

    @clause("SAVER-16", "SAVER-15")
    def test_a_resume_has_all_of_it_or_nothing(self) -> None:
        budget = MemoryBudget(limit_bytes=3 * BLOCK)
        with budget.active():
            saver = self.make()
            with saver.region("kv_cache"):
                tensors = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(3)]
            saver.pause("kv_cache")
            assert budget.view().reserved == (), "what is given back is promised to nobody"
            tensors[0][3] = 5
            before = dict(saver.view())
            with budget.reserve("mmap", BLOCK):
                with pytest.raises(HostMemoryError):
                    saver.resume("kv_cache")
                assert dict(saver.view()) == before
                assert tensors[0][3] == 5, "nothing was changed"
                assert len(budget.view().reserved) == 1
            saver.resume("kv_cache")
            assert sum(entry[1] for entry in budget.view().reserved) == 3 * BLOCK
            del tensors
            assert budget.view().reserved == ()

    # -- what is left ----------------------------------------------------------------------------

    @clause("SAVER-17")
    def test_a_region_that_is_left_captures_nothing_more(self) -> None:
        saver, made = self.make(), []

        def failing() -> None:
            with saver.region("kv_cache"):
                made.append(torch.ones(4))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            failing()
        outside = torch.ones(4)
        assert saver.view()["kv_cache"] == (False, 1, 16, 0, 0)
        saver.pause("kv_cache")
        assert made[0].sum() == 0
        assert outside.sum() == 4

    @clause("SAVER-18")
    def test_check_finds_what_was_written_while_paused(self) -> None:
        saver, table, weights = self.two()
        saver.check()
        saver.pause("weights")
        saver.pause("kv_cache")
        saver.check()
        assert table.sum() == 0
        saver.check()
        table[4_000] = 1
        with refused("SAVER-8"):
            saver.check()
        saver.resume("kv_cache")
        table[4_000] = 1
        saver.check()
        assert not weights.any()

    @clause("SAVER-19")
    def test_other_tags_are_left_alone(self) -> None:
        saver, table, weights = self.two()
        saver.pause("kv_cache")
        assert saver.view()["weights"] == (False, 1, 24_000, 0, 0)
        assert torch.equal(weights, torch.arange(3_000))
        weights += 1
        saver.resume("kv_cache")
        assert torch.equal(weights, torch.arange(1, 3_001))
        saver.pause("weights")
        table.fill_(3)
        saver.resume("weights")
        assert (table == 3).all()

    @clause("SAVER-20")
    def test_each_byte_is_given_back_and_copied_once(self) -> None:
        saver, table, weights = self.two()
        captured = table.nbytes + weights.nbytes
        for turn in (1, 2):
            for tag in ("kv_cache", "weights"):
                saver.pause(tag)
                saver.resume(tag)
            assert saver.counters() == {
                "captured": captured,
                "given_back": turn * captured,
                "kept": turn * weights.nbytes,
                "put_back": turn * weights.nbytes,
            }
        assert resident_bytes(*where(table)) == 0, "a resume touches what was kept alone"


@contextmanager
def stuck(arena: Any) -> Iterator[None]:
    """Inside, an arena's memory cannot be given back, as where it is locked."""

    def discard(*_: object, **__: object) -> None:
        raise HostMemoryError("HOST-4: planted")

    arena.discard = discard
    try:
        yield
    finally:
        del arena.discard
