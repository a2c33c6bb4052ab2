"""The sink that rooms report operations to. Spec: OBS."""

from typing import NamedTuple, Protocol

from torch import Tensor

__all__ = ["Observable", "Observer", "Operation"]


class Operation(NamedTuple):
    """One operation that took effect."""

    room: str
    name: str
    slots: Tensor
    """What it moved: slots, or rows in the request pool. int64, on the CPU."""
    number: int
    """Operations reported before it since the observer was attached."""


class Observer(Protocol):
    def __call__(self, operation: Operation, /) -> object:
        """See one operation; what is returned is not used (OBS-1, OBS-2, OBS-3)."""


class Observable(Protocol):
    def attach(self, observer: Observer | None) -> None:
        """Report every operation from now on to `observer`; None detaches (OBS-1, OBS-4)."""
