"""The command `kvspec check`: does the memory checker find what is planted? Spec: CHECK-22."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import kvspec
import kvspec.memory_checker.self_test as room
from kvspec.memory_checker.self_test import NOTHING, PLANTS, SelfTestResult
from kvspec.replay import implementation

__all__ = ["as_json", "as_table", "check"]

_PIPED_WIDTH = 120
_USE = """\
The memory checker looks at a system from inside its process:

    kvspec.check_memory(allocator, pool, cache, reqs=running, level="sets")   every page, now
    kvspec.instrument(cache, allocator, pool)                                 who lost it, where

It names each leak, double free, alias, use after free, dangling row, lock imbalance, sentinel and
tombstone by page and clause, in kvspec's own pools and in any with their interface.

    kvspec check --self-test     plants all of these into every pool and cache, and looks for them
"""


def check(
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Plant faults everywhere, and look for them.")
    ] = False,
    impl: Annotated[
        Literal["native", "oracle"] | None,
        typer.Option(help="Into what. The native core by default, if it is installed."),
    ] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write what was found; - is standard output."),
    ] = None,
) -> int:
    """Test the detector of leaks, aliases and the like; exit code 1 if it misses one."""
    if not self_test:
        print(_USE, end="")
        return 0
    name = impl or ("native" if kvspec.has_native() else "oracle")
    with _progress(total=len(room.settings())) as advance:
        results = room.self_test(implementation(name), progress=advance)
    if json_file is not None:
        text = json.dumps(as_json(name, results), indent=1)
        if json_file == "-":
            print(text)
        else:
            Path(json_file).write_text(text + "\n", encoding="utf-8")
    if json_file != "-":
        width = None if sys.stdout.isatty() else _PIPED_WIDTH
        console = Console(width=width, highlight=False)
        console.print(as_table(name, results), *_misses(results), sep="\n")
    return int(not all(result.seen for result in results))


def as_json(impl: str, results: Sequence[SelfTestResult]) -> dict[str, object]:
    """What was planted, and what became of it (CHECK-22)."""
    return {
        "impl": impl,
        "planted": sum(result.planted != NOTHING for result in results),
        "missed": sum(not result.seen for result in results),
        "results": [result._asdict() for result in results],
    }


def as_table(impl: str, results: Sequence[SelfTestResult]) -> Table:
    """How many of each kind were found, of how many that were planted; a row for each allocator
    under each cache.
    """
    planted, seen = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for result in results:
        cell = (_pool(result), result.cache, result.planted)
        planted[cell] += 1
        seen[cell] += result.seen
    table = Table(
        title=f"Faults found, of those planted into {impl}",
        caption=_summary(results),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("allocator,\npage size", "cache"):
        table.add_column(heading, no_wrap=True)
    for heading in (*PLANTS, "no fault"):
        table.add_column(heading.replace(" ", "\n"), justify="right")
    before = ""
    for pool, cache in dict.fromkeys((pool, cache) for pool, cache, _ in planted):
        cells = [_cell(seen, planted, (pool, cache, kind)) for kind in (*PLANTS, NOTHING)]
        if before not in ("", pool):
            table.add_section()
        table.add_row(pool if pool != before else "", cache, *cells)
        before = pool
    return table


def _pool(result: SelfTestResult) -> str:
    """`Paged, 4`."""
    return (
        f"{result.allocator.replace('TokenToKVPoolAllocator', '') or 'Token'}, {result.page_size}"
    )


_Cell = tuple[str, str, str]


def _cell(seen: Counter[_Cell], planted: Counter[_Cell], cell: _Cell) -> Text:
    """How many were found, `11 of 12` if one was not; a dash where the fault cannot exist."""
    if not planted[cell]:
        return Text("-", style="dim")
    if seen[cell] == planted[cell]:
        return Text(str(seen[cell]), style="green")
    return Text(f"{seen[cell]} of {planted[cell]}", style="bold red")


def _summary(results: Sequence[SelfTestResult]) -> str:
    """What it comes to."""
    faults = [result for result in results if result.planted != NOTHING]
    sound = [result for result in results if result.planted == NOTHING]
    missed = sum(not result.seen for result in faults)
    alarms = sum(not result.seen for result in sound)
    told = f"{missed:,} missed" if missed else "all found"
    told_sound = f"{alarms:,} false alarms" if alarms else "no false alarm"
    return (
        f"{len(faults):,} faults, idle and busy, inside free groups and not,"
        f" at levels counts (by sign),\nsets and ledger (by kind and page): {told};"
        f" {len(sound):,} sound systems: {told_sound}"
    )


def _misses(results: Sequence[SelfTestResult]) -> Iterator[Table]:
    """A row for each that was missed, or reported as something else."""
    missed = [result for result in results if not result.seen]
    if not missed:
        return
    table = Table(title="Missed", box=box.SIMPLE_HEAD, style="red")
    for heading in ("planted", "page", "allocator", "cache", "mode", "level", "reported"):
        table.add_column(heading)
    for result in missed:
        table.add_row(
            result.planted,
            "-" if result.page is None else str(result.page),
            _pool(result) + ", need_sort" * result.need_sort,
            result.cache,
            result.mode,
            result.level,
            "; ".join(result.found) or "nothing",
        )
    yield table


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """A bar on standard error while it is a terminal; yields what moves it by one."""
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("settings")
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("check", total=total)
        yield lambda: progress.advance(task)
