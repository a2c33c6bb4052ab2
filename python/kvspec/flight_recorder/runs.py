"""Slots as runs: `[start, stop)`, in the order of the slots, as few as can be. Spec: REC."""

from collections.abc import Callable

from kvspec import has_native
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle.boundary import numbers

__all__ = ["python_slot_runs", "slot_runs"]


def python_slot_runs(slots: Slots) -> list[tuple[int, int]]:
    """What `slot_runs` gives where the extension is absent. O(slots)."""
    runs: list[tuple[int, int]] = []
    start = stop = 0
    for slot in numbers(slots, "REC-2"):
        if slot != stop or start == stop:
            if start != stop:
                runs.append((start, stop))
            start = slot
        stop = slot + 1
    if start != stop:
        runs.append((start, stop))
    return runs


def _fastest() -> Callable[[Slots], list[tuple[int, int]]]:
    if not has_native():
        return python_slot_runs
    from kvspec import _core

    return _core.slot_runs


slot_runs = _fastest()
"""The runs of slots: `slot_runs([4, 5, 6, 9]) == [(4, 7), (9, 10)]`. O(slots)."""
