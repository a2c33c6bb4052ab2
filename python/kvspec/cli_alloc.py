"""The command `kvspec alloc`: what an allocation really does. Spec: CHAIN."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

import kvspec.allocation_chain as room
from kvspec.interfaces.host_memory import ArenaKind, HugePages

__all__ = ["alloc"]

_PIPED_WIDTH = 140
_USE = """\
Allocate memory in a process of its own and show what really happens, or look at a running process:

    kvspec alloc KIND BYTES     torch, heap, mmap, shm or pinned; 4096, 128KiB, 8MiB, 1GiB
    kvspec alloc --pid PID      the memory of a running process, by kind
    kvspec alloc --claims       what is said of these chains, and what this machine does

    kvspec alloc heap 8MiB --touch --trace     every level, from the caller down to the pages
"""


def alloc(
    kind: Annotated[
        ArenaKind | None, typer.Argument(help="torch, heap, mmap, shm or pinned.")
    ] = None,
    nbytes: Annotated[
        str | None, typer.Argument(metavar="BYTES", help="4096, 5_242_880, 128KiB, 8MiB, 1GiB.")
    ] = None,
    touch: Annotated[
        bool, typer.Option("--touch", help="Write one byte of each page, and watch.")
    ] = False,
    touch_by: Annotated[
        room.TouchBy | None,
        typer.Option(help="How to touch: write a byte of each page, write all, or read only."),
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Who called whom, level by level.")
    ] = False,
    populate: Annotated[
        bool, typer.Option("--populate", help="Have the pages at once, as the arena does.")
    ] = False,
    huge_pages: Annotated[HugePages, typer.Option(help="For mmap and pinned.")] = "no",
    numa_node: Annotated[int | None, typer.Option(metavar="NODE", help="Bind to it.")] = None,
    alignment: Annotated[int | None, typer.Option(metavar="BYTES", help="Of the address.")] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write what was seen; - is standard output."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw size and faults over time.")
    ] = None,
    pid: Annotated[
        int | None, typer.Option(metavar="PID", help="Look at this process instead.")
    ] = None,
    claims: Annotated[
        bool, typer.Option("--claims", help="Ask this machine what is often said of it.")
    ] = False,
) -> int:
    """Show what an allocation does: calls, system calls, mappings, pages; observed, not recited."""
    if pid is not None or claims:
        if kind is not None or (pid is not None and claims):
            raise typer.BadParameter("KIND, --pid and --claims: one of them")
        return _look_at(pid, json_file) if pid is not None else _judge(json_file)
    if kind is None or nbytes is None:
        if kind is not None:
            raise typer.BadParameter("BYTES is missing: kvspec alloc heap 8MiB")
        print(_USE, end="")
        return 0
    if plot is not None and find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'kvspec[plot]'")
    request = room.Request(
        kind=kind,
        nbytes=room.parse_bytes(nbytes),
        alignment=alignment,
        populate=populate,
        huge_pages=huge_pages,
        numa_node=numa_node,
        touch=touch_by or ("page" if touch else None),
    )
    with _progress(request) as progress:
        observation = room.observe(room.record(request, progress))
    if plot is not None:
        room.plot_timeline(observation, plot)
    _write(room.as_json(observation), json_file)
    if json_file != "-":
        _print(*room.as_tables(observation), room.chain_table(observation, whole=trace))
        _print(*room.not_observed(observation))
    return 0


def _look_at(pid: int, json_file: str | None) -> int:
    process = room.process_memory(pid)
    _write(room.as_json(process), json_file)
    if json_file != "-":
        _print(*room.process_tables(process))
    return 0


def _judge(json_file: str | None) -> int:
    found = room.claims(room.gather())
    _write([claim._asdict() for claim in found], json_file)
    if json_file != "-":
        _print(room.claims_table(found))
    return 0


def _write(value: Any, json_file: str | None) -> None:
    if json_file is None:
        return
    text = json.dumps(value, indent=1)
    if json_file == "-":
        print(text)
    else:
        Path(json_file).write_text(text + "\n", encoding="utf-8")


def _print(*what: Any) -> None:
    if what:
        width = None if sys.stdout.isatty() else _PIPED_WIDTH
        Console(width=width, highlight=False, markup=False).print(*what, sep="\n")


@contextmanager
def _progress(request: room.Request) -> Iterator[Callable[[int], object] | None]:
    """A bar of the bytes touched, on standard error while it is a terminal."""
    if request.touch is None:
        yield None
        return
    console = Console(stderr=True)
    columns = TextColumn("touched"), BarColumn(), DownloadColumn(binary_units=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("touch", total=request.nbytes)
        yield lambda touched: progress.update(task, completed=touched)
