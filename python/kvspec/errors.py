"""The one exception a caller's fault raises, and where those go that may not be raised."""

__all__ = ["ContractError", "MemoryLeakError", "write_unraisable"]


class ContractError(ValueError):
    """A caller broke a clause. The text starts with its id; nothing has changed."""

    @property
    def clause(self) -> str:
        """The id of the clause that was broken, for example ``PAGE-10``."""
        return str(self).split(":", 1)[0]


class MemoryLeakError(ValueError):
    """`check_memory` found pages or rows without exactly one owner (CHECK-1 to CHECK-7)."""


def write_unraisable(error: BaseException) -> None:
    """Hand an error to `sys.unraisablehook`, as Python does with one that leaves a finalizer."""

    class Finalized:
        def __del__(self) -> None:
            raise error

    Finalized()
