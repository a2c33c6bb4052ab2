"""What is raised, each with the clause it is about, and where those go that may not be."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvspec.memory_checker.report import Report

__all__ = [
    "CLAUSE_ERRORS",
    "ContractError",
    "HostMemoryError",
    "MemoryLeakError",
    "PeerDiedError",
    "write_unraisable",
]


class _NamesItsClause(Exception):
    """An exception whose text starts with the id of a clause."""

    @property
    def clause(self) -> str:
        """The id of the clause that it is about, for example ``PAGE-10``."""
        return str(self).split(":", 1)[0]


class ContractError(_NamesItsClause, ValueError):
    """A caller broke a clause. The text starts with its id; nothing has changed."""


class HostMemoryError(_NamesItsClause, MemoryError):
    """The machine has not the memory that was asked for: a budget, a limit, a full tmpfs.

    The text starts with the id of a clause and says what was asked for and what there is; nothing
    is mapped, locked, named or touched.
    """


class PeerDiedError(_NamesItsClause, ConnectionError):
    """A process at the other end is gone. The text starts with the id of a clause and says which.

    What had arrived before can still be received.
    """


CLAUSE_ERRORS = (ContractError, HostMemoryError, PeerDiedError)
"""Those whose text starts with the id of a clause, by which a caller can tell what was refused."""


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
