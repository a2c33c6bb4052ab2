"""Broken poison. Each must fail on the clause it breaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import kvspec.oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.poison import PoisonConformance
from kvspec.errors import ContractError
from kvspec.poison import Overwritten, Poison, Stale

registry = Registry(PoisonConformance, kvspec.oracle)


@registry.mutant("POISON-1", "POISON-3", replaces="Poison", reports=("VL-43990",))
class FillsTheSlotsAlone(Poison):
    """What else is in a page that was given back stays readable."""

    def freed(self, slots: Any) -> None:
        index = self._index(slots)
        self._freed[index // self.page_size] = True
        for bits, (_, pattern) in zip(self._bits, self._patterns, strict=True):
            bits.index_fill_(0, index, pattern)


@registry.mutant("POISON-1", "POISON-2", replaces="Poison")
class FillsWholePagesOfWhatIsFresh(Poison):
    """Which overwrites what the same request wrote before."""

    def fresh(self, slots: Any) -> None:
        super().fresh(self._slots_of(torch.unique(self._index(slots) // self.page_size)))


@registry.mutant("POISON-1", "POISON-3", replaces="Poison", reports=("VL-53856",))
class FillsTheFirstTensorAlone(Poison):
    def fresh(self, slots: Any) -> None:
        with self._first_alone():
            super().fresh(slots)

    def freed(self, slots: Any) -> None:
        with self._first_alone():
            super().freed(slots)

    @contextmanager
    def _first_alone(self) -> Iterator[None]:
        bits, patterns = self._bits, self._patterns
        self._bits, self._patterns = bits[:1], patterns[:1]
        try:
            yield
        finally:
            self._bits, self._patterns = bits, patterns


@registry.mutant("POISON-1", "POISON-2", "POISON-3", replaces="Poison")
class FillsWithZeros(Poison):
    """As memory often is when it is new, so that a stale read shows in nothing."""

    def __init__(self, tensors: Any, page_size: int) -> None:
        super().__init__(tensors, page_size)
        self._patterns = [(0, 0) for _ in self._patterns]


@registry.mutant("POISON-2", replaces="Poison")
class TakesAnyNanForPoison(Poison):
    def stale(self, values: Tensor) -> list[Stale]:
        rows = values.to(torch.float32).isnan().reshape(len(values), -1).any(dim=1)
        return [Stale(row, "freed") for row in torch.nonzero(rows).flatten().tolist()]


@registry.mutant("POISON-2", replaces="Poison", reports=("VL-42273",))
class KnowsTheFreshAlone(Poison):
    def stale(self, values: Tensor) -> list[Stale]:
        return [stale for stale in super().stale(values) if stale.why == "fresh"]


@registry.mutant("POISON-3", "POISON-1", replaces="Poison")
class ComparesTheFirstSlotOfAPage(Poison):
    def check(self, pages: Any) -> list[Overwritten]:
        return [each for each in super().check(pages) if each.slot % self.page_size == 0]


@registry.mutant("POISON-3", replaces="Poison")
class TakesEveryPageForFreed(Poison):
    def __init__(self, tensors: Any, page_size: int) -> None:
        super().__init__(tensors, page_size)
        self._freed[:] = True


@registry.mutant("POISON-4", replaces="Poison")
class FillsAndThenLooks(Poison):
    def __init__(self, tensors: Any, page_size: int) -> None:
        try:
            super().__init__(tensors, page_size)
        except ContractError:
            tensors[0].fill_(float("nan"))
            raise


@registry.mutant("POISON-4", replaces="Poison")
class TakesWhatItIsGiven(Poison):
    def __init__(self, tensors: Any, page_size: int) -> None:
        try:
            super().__init__(tensors, page_size)
        except ContractError:
            super().__init__([], 1)
