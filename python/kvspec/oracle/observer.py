"""What a room has that reports its operations. Spec: OBS."""

from collections.abc import Sequence

from kvspec.errors import ContractError, write_unraisable
from kvspec.interfaces.observer import Observer, Operation
from kvspec.oracle.boundary import tensor

__all__ = ["Reporter"]


class Reporter:
    """Base of the rooms that report: `_guard` before a change (OBS-3), `_report` after (OBS-1)."""

    room: str
    """Name of the room in what is reported."""
    _observer: Observer | None = None
    _reported = 0
    _reporting = False

    def attach(self, observer: Observer | None) -> None:
        """Report every operation from now on to `observer`; None detaches (OBS-1, OBS-4)."""
        self._guard("attach")
        self._observer, self._reported = observer, 0

    def _guard(self, name: str) -> None:
        if self._reporting:
            raise ContractError(f"OBS-3: {name} was called from inside an observer")

    def _report(self, name: str, slots: Sequence[int] = ()) -> None:
        if self._observer is None:
            return
        self._reporting = True
        try:
            self._observer(Operation(self.room, name, tensor(slots), self._reported))
        except BaseException as error:  # OBS-2: whatever it raises, the operation stands
            write_unraisable(error)
        finally:
            self._reporting = False
            self._reported += 1
