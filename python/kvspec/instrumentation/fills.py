"""Which slots are poisoned: those that nobody has, and none that somebody may read. Spec: POISON.

A page that was handed out while somebody had it is not filled: what is in it is evidence.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from kvspec.interfaces.memory_checker import Attribution, SystemView
from kvspec.interfaces.ownership_ledger import OwnershipLedger
from kvspec.memory_checker import Report
from kvspec.memory_checker.report import pools

__all__ = ["Fills", "PoisonLike"]


class PoisonLike(Protocol):
    """What fills slots that nobody may read: a `kvspec.poison.Poison`."""

    def fresh(self, slots: Tensor) -> None: ...

    def freed(self, slots: Tensor) -> None: ...

    def check(self, pages: list[int]) -> Iterable[Any]: ...


class Fills:
    """Poison for the slots of one allocator."""

    def __init__(
        self, poison: PoisonLike, page_size: int, size: int, ledger: OwnershipLedger | None
    ) -> None:
        self._poison, self._ledger, self._page_size = poison, ledger, page_size
        self._stop = (size // page_size + 1) * page_size

    def begin(self, view: SystemView) -> None:
        """Fill what is free. O(slots that are free)."""
        books = view.allocator
        pages = torch.tensor([*books.free, *books.release, *books.pending], dtype=torch.int64)
        self.freed((pages[:, None] * self._page_size + torch.arange(self._page_size)).reshape(-1))

    def fresh(self, slots: Any) -> None:
        """Slots are handed out, which the ledger does not know yet. O(slots)."""
        given = self._inside(slots)
        if self._ledger is not None:
            pages = given // self._page_size
            named = set(pages.tolist())
            free = [page for page in named if self._ledger.owner("full", page).kind == "free"]
            given = given[torch.isin(pages, torch.tensor(free, dtype=torch.int64))]
        self._poison.fresh(given)

    def freed(self, slots: Any) -> None:
        """Slots were given back. O(slots of their pages)."""
        self._poison.freed(self._inside(slots))

    def all_freed(self) -> None:
        """Everything is free. O(pool)."""
        self._poison.freed(torch.arange(self._page_size, self._stop))

    def _inside(self, slots: Any) -> Tensor:
        """Slots of the pool, without the sink."""
        given = torch.as_tensor(slots).cpu().to(torch.int64)
        return given[(given >= self._page_size) & (given < self._stop)]

    def faults(self, view: SystemView, attribution: Attribution | None) -> list[Report]:
        """A report for each free page that somebody wrote (POISON-3). O(slots that are free)."""
        books, pool = view.allocator, pools(windows=view.allocator.swa is not None)["full"]
        listed = {*books.free, *books.release, *books.pending}
        free = sorted(listed & {*range(1, view.page_count + 1)})
        return [
            Report(
                kind="use after free",
                clauses=("POISON-3",),
                pool=pool.name,
                page=found.page,
                what=f"page {found.page} of {pool.name} is free, but slot {found.slot} of tensor"
                f" {found.tensor} was written since",
            ).attributed(attribution, pool)
            for found in self._poison.check(free)
        ]
