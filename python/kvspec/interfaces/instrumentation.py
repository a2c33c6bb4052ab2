"""Looking over the shoulder of three objects, whoever wrote them. Spec: INSTR."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Literal, Protocol, Self, TypeAlias

from kvspec.interfaces.memory_checker import Report
from kvspec.interfaces.ownership_ledger import Owner, OwnershipLedger
from kvspec.interfaces.prefix_cache import Req
from kvspec.interfaces.slot_allocator import Slots

__all__ = ["Instrument", "Level"]

Level: TypeAlias = Literal["off", "counts", "sets", "ledger"]


class Instrument(Protocol):
    """What `kvspec.instrument(cache, allocator, pool, ...)` returns, or refuses (INSTR-5).

    What is called on the three returns and raises what it does without (INSTR-1), and is an event
    with its call site (INSTR-2, INSTR-3). An object without `view()` is read by its attributes
    (INSTR-7). Level `off` costs nothing (INSTR-10).
    """

    level: Level
    """What `check` does; may be set between actions (INSTR-6)."""
    ledger: OwnershipLedger | None
    """None below level `ledger`."""
    reports: list[Report]
    """What actions did that could not be right, the oldest first (INSTR-9)."""
    blind: bool
    """Whether an error inside kvspec ended the recording (INSTR-8)."""

    def check(
        self, reqs: Iterable[Req] = (), reserved: Iterable[int] = (), *, idle: bool = False
    ) -> None:
        """Raise MemoryLeakError unless every page and row has one owner (CHECK-13, CHECK-21).

        At `ledger` the requests and what is reserved are known and need not be given; with `idle`
        there must be none: no live row, nothing reserved, no open lock, no copy in flight.
        """

    def copying(self, slots: Slots) -> AbstractContextManager[None]:
        """Inside, a copy from or to these slots is in flight (LEDGER-9)."""

    def owner(self, page: int, pool: str = "full") -> Owner:
        """Who has a page (LEDGER-1). O(1)."""

    def history(self, page: int, pool: str = "full") -> list[str]:
        """What became of a page, the newest first, a line each (LEDGER-13)."""

    def detach(self) -> None:
        """Leave the three objects as they were before (INSTR-4)."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: object) -> None: ...
