"""The one exception a caller's fault raises, and where those go that may not be raised."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvspec.memory_checker.report import Report

__all__ = ["ContractError", "MemoryLeakError", "write_unraisable"]


class ContractError(ValueError):
    """A caller broke a clause. The text starts with its id; nothing has changed."""

    @property
    def clause(self) -> str:
        """The id of the clause that was broken, for example ``PAGE-10``."""
        return str(self).split(":", 1)[0]


class MemoryLeakError(ValueError):
    """A check found pages, rows or locks without exactly one owner (CHECK-1 to CHECK-23)."""

    reports: "tuple[Report, ...]"
    """One for each fault (CHECK-13); none at level `counts`, which knows of no page."""

    def __init__(self, text: str, reports: "Iterable[Report]" = ()) -> None:
        super().__init__(text)
        self.reports = tuple(reports)


def write_unraisable(error: BaseException) -> None:
    """Hand an error to `sys.unraisablehook`, as Python does with one that leaves a finalizer."""

    class Finalized:
        def __del__(self) -> None:
            raise error

    Finalized()
