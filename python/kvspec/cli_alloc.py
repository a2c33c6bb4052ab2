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


_Kind = Annotated[
    ArenaKind | None, typer.Argument(help="torch, heap, mmap, shm or pinned.", show_default=False)
]
_Bytes = Annotated[
    str | None, typer.Argument(metavar="BYTES", help="4096, 5_242_880, 128KiB, 8MiB, 1GiB.")
]
_Touch = Annotated[bool, typer.Option("--touch", help="Write one byte of each page, and watch.")]
_TouchBy = Annotated[
    room.TouchBy | None,
    typer.Option(
        "--touch-by",
        help="Touch so: write a byte of each page, write all, read a byte of each page.",
    ),
]
_Trace = Annotated[bool, typer.Option("--trace", help="Who called whom, level by level.")]
_Populate = Annotated[bool, typer.Option("--populate", help="Have the pages at once.")]
_HugePages = Annotated[HugePages, typer.Option("--huge-pages", help="For mmap and pinned.")]
_Node = Annotated[
    int | None, typer.Option("--numa-node", metavar="NODE", help="Bind it to a NUMA node.")
]
_Alignment = Annotated[
    int | None, typer.Option("--alignment", metavar="BYTES", help="Of the address.")
]
_Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write what was seen; - is standard output."),
]
_Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw sizes and faults over time.")
]
_Pid = Annotated[
    int | None, typer.Option("--pid", metavar="PID", help="Look at this process instead.")
]
_Claims = Annotated[
    bool, typer.Option("--claims", help="Ask this machine what is often said of it.")
]


def alloc(
    kind: _Kind = None,
    nbytes: _Bytes = None,
    touch: _Touch = False,
    touch_by: _TouchBy = None,
    trace: _Trace = False,
    populate: _Populate = False,
    huge_pages: _HugePages = "no",
    numa_node: _Node = None,
    alignment: _Alignment = None,
    json_file: _Json = None,
    plot: _Plot = None,
    pid: _Pid = None,
    claims: _Claims = False,
) -> int:
    """Show what an allocation does: calls, system calls, mappings, pages; observed, not recited."""
    if pid is not None or claims:
        if kind is not None or (pid is not None and claims):
            raise typer.BadParameter("KIND, --pid and --claims: one of them")
        return _look_at(pid, json_file) if pid is not None else _judge(json_file)
    if kind is None:
        print(_USE, end="")
        return 0
    if nbytes is None:
        raise typer.BadParameter("BYTES is missing: kvspec alloc heap 8MiB")
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
    _tell(observation, trace, json_file, plot)
    return 0


def _tell(
    observation: room.Observation, trace: bool, json_file: str | None, plot: Path | None
) -> None:
    if plot is not None:
        room.plot_timeline(observation, plot)
    _write(room.as_json(observation), json_file)
    if json_file != "-":
        _print(*room.as_tables(observation), room.chain_table(observation, whole=trace))
        _print(*room.not_observed(observation))


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
