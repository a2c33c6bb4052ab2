"""Calls of factories, and what the kernel says of pages: tools of the suite. Spec: SAVER."""

import resource
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import watch
from kvspec.errors import ContractError, HostMemoryError
from kvspec.interfaces.memory_saver import TorchMemorySaverAdapter

__all__ = [
    "BLOCK",
    "FACTORY_CALLS",
    "MIB",
    "OTHERS",
    "PAGE",
    "SEEN",
    "SEEN_TOO",
    "SHAPED_CALLS",
    "SaverBench",
    "process_bytes",
    "raw",
    "refused",
    "resident_bytes",
    "stuck",
    "where",
]

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


def raw(tensor: Tensor) -> bytes:
    """Its elements, in order."""
    return bytes(tensor.detach().contiguous().view(torch.uint8).flatten().numpy())


@contextmanager
def refused(clause_id: str) -> Iterator[None]:
    with pytest.raises(ContractError) as caught:
        yield
    assert str(caught.value).startswith(f"{clause_id}: ")


class SaverBench(Conformance):
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

    def same(
        self, saver: Any, before: Mapping[str, Any], tensors: list[Tensor], was: list[bytes]
    ) -> None:
        assert dict(saver.view()) == before
        unchanged = [raw(tensor) for tensor in tensors] == was
        assert unchanged  # and no account of where: under CI that of a few pages takes minutes


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
