"""`python -m kvspec.conformance.lockstep`: a campaign from the command line."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvspec.conformance.lockstep.campaign import Campaign, Sides, campaign, shortfalls, table
from kvspec.conformance.lockstep.config import MEMORIES
from kvspec.conformance.lockstep.history import Failure, History, reproducer, shrink

GATED_FROM = {"full": 200_000, "swa": 500_000, "swachunk": 500_000}
"""Shorter runs are for looking: what they did not see is no failure."""


def _report(console: Console, failure: Failure, sides: Sides) -> None:
    """Print where it diverged, and the shrunk history as a test."""
    console.print(f"seed {failure.seed}, operation {failure.step}", style="bold red")
    console.print(f"{failure.config}\n{failure.divergence}", markup=False, highlight=False)
    console.print("shrinking ...")
    small = shrink(failure, *map(import_module, sides))
    console.print(f"{len(small.operations)} operations: {small.divergence}", markup=False)
    console.print(reproducer(small), markup=False, highlight=False, soft_wrap=True)


def _print(console: Console, found: Campaign) -> None:
    console.print(table(found))
    for clause, (oracle, core) in sorted(found.messages.items()):
        console.print(f"{clause}: the texts differ\n  {oracle}\n  {core}", markup=False)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    operations: Annotated[int, typer.Option(help="how many, over all seeds")] = 200_000,
    seeds: Annotated[str, typer.Option(help="first:last, without the last")] = "0:40",
    workers: Annotated[int, typer.Option(help="processes")] = 1,
    resume: Annotated[Path | None, typer.Option(help="a file of finished seeds")] = None,
    minimum: Annotated[int, typer.Option(help="of each thing seen")] = 1000,
    oracle: Annotated[str, typer.Option(help="module of the oracle")] = Sides().oracle,
    core: Annotated[str, typer.Option(help="module of the implementation")] = Sides().core,
    memory: Annotated[str, typer.Option(help=", ".join(MEMORIES))] = MEMORIES[0],
) -> None:
    """Oracle against core: exits with 1 at a divergence, printing a test that shows it."""
    console, sides = Console(), Sides(oracle, core)
    first, last = map(int, seeds.split(":"))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"seeds {seeds}, {operations:,} operations", total=last - first)

        def progress(history: History) -> None:
            bar.update(task, advance=1)

        seeds_ = range(first, last)
        found = campaign(seeds_, operations, sides, workers, resume, progress, memory)
    _print(console, found)
    if found.failure:
        _report(console, found.failure, sides)
        raise typer.Exit(1)
    short = shortfalls(found, minimum) if found.operation_count >= GATED_FROM[memory] else []
    for line in short:
        console.print(line, style="bold red")
    if short:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
