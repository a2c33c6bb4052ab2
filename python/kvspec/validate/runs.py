"""Slots and pages of a log, which keeps them as runs."""

from collections.abc import Iterable

from kvspec.flight_recorder.events import Runs

__all__ = ["ID_BYTES", "ids_of", "named", "numbers_of", "pages_of", "runs_of"]

ID_BYTES = 16
"""Of the id of a page (REC-3)."""


def numbers_of(runs: Runs | None) -> list[int]:
    """The numbers of runs, in order."""
    return [number for start, stop in runs or () for number in range(start, stop)]


def runs_of(numbers: Iterable[int]) -> Runs:
    """The numbers as runs, in order."""
    runs: Runs = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def pages_of(runs: Runs | None, page_size: int) -> list[int]:
    """The pages of slots, each once, in the order in which they are first named."""
    pages = dict[int, None]()
    for start, stop in runs or ():
        pages.update(dict.fromkeys(range(start // page_size, (stop - 1) // page_size + 1)))
    return list(pages)


def ids_of(ids: bytes) -> list[bytes]:
    """The ids of the pages of a key, one after the other."""
    return [ids[at : at + ID_BYTES] for at in range(0, len(ids), ID_BYTES)]


def named(numbers: Iterable[int], what: str = "page") -> str:
    """Numbers for a person: `page 3`, `pages 3, 7 .. 9`, at most eight runs of them."""
    runs = runs_of(sorted(numbers))
    shown = [str(start) if stop == start + 1 else f"{start} .. {stop - 1}" for start, stop in runs]
    if not runs:
        return f"no {what}"
    more = f" and {len(shown) - 8} more runs" if len(shown) > 8 else ""
    alone = len(runs) == 1 and runs[0][1] == runs[0][0] + 1
    return f"{what}{'' if alone else 's'} {', '.join(shown[:8])}{more}"
