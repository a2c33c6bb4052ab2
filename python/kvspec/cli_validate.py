"""`kvspec validate LOG`. Spec: VALID."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kvspec.validate.command import judge, tell

__all__ = ["validate"]

_STEP = 256
"""Events from one movement of the bar to the next."""


def validate(
    log: Annotated[Path, typer.Argument(help="What a flight recorder wrote.")],
    tlc: Annotated[
        bool, typer.Option("--tlc", help="Have the model checker follow it too (2,000 events).")
    ] = False,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Say it as JSON; - is standard output."),
    ] = None,
    test_file: Annotated[
        Path | None,
        typer.Option("--pytest", metavar="FILE", help="Write the test here, and do not print it."),
    ] = None,
) -> int:
    """Follow a recorded log, and find the first event that breaks a clause."""
    with _progress(log) as advance:
        judgement = judge(log, tlc=tlc, progress=advance)
    return tell(judgement, log, json_file, test_file)


@contextmanager
def _progress(log: Path) -> Iterator[Callable[[], object]]:
    """A bar on standard error while it is a terminal; yields what is called for each event."""
    console = Console(stderr=True)
    columns = TextColumn(str(log)), BarColumn(), MofNCompleteColumn(), TextColumn("events")
    if not console.is_terminal or not log.is_file():
        yield lambda: None
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("validate", total=_line_count(log))
        seen = 0

        def advance() -> None:
            nonlocal seen
            seen += 1
            if seen % _STEP == 0:
                progress.update(task, completed=seen)

        yield advance


def _line_count(log: Path) -> int | None:
    """How many events a log of lines has; None for another, which does not tell."""
    with log.open("rb") as file:
        return sum(1 for _ in file) if file.peek(1)[:1] == b"{" else None
