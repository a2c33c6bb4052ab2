"""The command `kvspec`. Results go to standard output, progress and errors to standard error.

Exit codes: 0 done; 1 a leak, or a difference between the implementations; 2 the caller's fault,
told in one line.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperCommand

import kvspec
import kvspec.replay as room
from kvspec.cli_alloc import alloc as alloc_command
from kvspec.cli_check import check as check_command
from kvspec.cli_demo import demo as demo_command
from kvspec.cli_validate import validate as validate_command
from kvspec.errors import ContractError, HostMemoryError, MemoryLeakError
from kvspec.interfaces.instrumentation import Level
from kvspec.interfaces.radix_cache import EvictionGranularity, EvictionPolicy

__all__ = ["app", "main"]

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer has no public name for it
_PIPED_WIDTH = 120
_POLICIES: tuple[str, ...] = get_args(EvictionPolicy)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


app.command("alloc")(alloc_command)
app.command("check")(check_command)
app.command("demo")(demo_command)
app.command("validate")(validate_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. `arguments` are those of the process by default."""
    try:
        given = None if arguments is None else list(arguments)
        return int(app(args=given, prog_name="kvspec", standalone_mode=False) or 0)
    except _UsageError as error:
        return _told(error.format_message(), code=2)
    except (ContractError, HostMemoryError, ImportError, OSError) as error:
        return _told(error, code=2)
    except (MemoryLeakError, room.LockstepError) as error:
        return _told(error, code=1)
    except typer.Abort:
        return _told("interrupted", code=130)


def _told(error: object, code: int) -> int:
    print("kvspec:", " ".join(str(error).split()), file=sys.stderr)
    return code


def _version(wanted: bool) -> None:
    if wanted:
        core = "native core" if kvspec.has_native() else "oracle only: the extension is absent"
        print(f"kvspec {kvspec.__version__} ({core})")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _kvspec(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    """The KV-cache memory system of LLM servers: specification, oracle, fast core."""
    if context.invoked_subcommand is None:
        print(context.get_help())


class _Spreading(TyperCommand):
    """`--capacity 100 200` means `--capacity 100 --capacity 200`, and so for `--policy`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option, needs_value = "", False
        for argument in args:
            if argument.startswith("-"):
                option = argument if argument in ("--capacity", "--policy") else ""
                needs_value = True
            elif option and not needs_value and _belongs_to(option, argument):
                spread.append(option)
            elif needs_value:
                needs_value = False
            spread.append(argument)
        return super().parse_args(ctx, spread)


def _belongs_to(option: str, argument: str) -> bool:
    return argument.isdecimal() if option == "--capacity" else argument in _POLICIES


def _policies(given: list[str] | None) -> list[str] | None:
    for policy in given or ():
        if policy not in _POLICIES:
            raise typer.BadParameter(f"{policy!r} is not one of {', '.join(_POLICIES)}")
    return given


_Capacity = Annotated[
    list[int] | None,
    typer.Option(metavar="BLOCKS ...", min=1, help="Blocks the cache holds.  [10000]"),
]
_Policy = Annotated[
    list[str] | None,
    typer.Option(
        metavar="POLICY ...",
        callback=_policies,
        help=f"What to evict: {', '.join(_POLICIES)}.  [lru]",
    ),
]
_Impl = Annotated[
    Literal["native", "oracle"] | None,
    typer.Option(help="What is driven. The native core by default, if it is installed."),
]
_Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the counts as JSON; - is standard output."),
]


_Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE.png", help="Draw hit rate against capacity, and use with a window."),
]
_Block = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", min=1, help="Tokens to a block; inferred from a trace."),
]
_Window = Annotated[
    int | None,
    typer.Option(metavar="TOKENS", min=1, help="Windows on some layers: two pools, and lru."),
]
_Ratio = Annotated[
    float | None,
    typer.Option(metavar="RATIO", help="Blocks of the window pool to one of the full.  [1.0]"),
]


_Check = Annotated[
    Level, typer.Option(help="Look at the memory after every request; ledger says who and where.")
]
_Record = Annotated[
    Path | None,
    typer.Option(
        metavar="LOG", help="Write what is called to a new file; msgpack if it ends in .msgpack."
    ),
]
_Tokens = Annotated[
    bool, typer.Option("--tokens", help="With --record: write the tokens of each page, once.")
]


@app.command(cls=_Spreading)
def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(help="JSON lines of block ids, plain or gzip. None: a generated workload."),
    ] = None,
    capacity: _Capacity = None,
    policy: _Policy = None,
    granularity: Annotated[
        EvictionGranularity, typer.Option(help="Evict pages, or whole runs as engines do.")
    ] = "page",
    impl: _Impl = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Drive both, and compare after every request.")
    ] = False,
    leave_last_token: Annotated[
        bool, typer.Option("--leave-last-token", help="Never match the last token, as engines do.")
    ] = False,
    block: _Block = None,
    seed: Annotated[int, typer.Option(help="Of the generated workload.")] = 0,
    requests: Annotated[int, typer.Option(min=1, help="Of the generated workload.")] = 1000,
    json_file: _Json = None,
    plot: _Plot = None,
    sliding_window: _Window = None,
    swa_ratio: _Ratio = None,
    check: _Check = "counts",
    record: _Record = None,
    tokens: _Tokens = False,
) -> int:
    """Serve a trace from a cache, and count what hits."""
    if plot is not None and find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'kvspec[plot]'")
    wanted = [(each, at) for each in policy or ["lru"] for at in capacity or [10_000]]
    if record is not None and len(wanted) > 1:
        raise typer.BadParameter("--record takes one run: one capacity and one policy")
    name = impl or ("native" if kvspec.has_native() else "oracle")
    run = partial(
        room.replay,
        impl=room.implementation(name),
        granularity=granularity,
        leave_last_token=leave_last_token,
        verify=room.implementation("oracle" if name == "native" else "native") if verify else None,
        sliding_window=sliding_window,
        swa_ratio=swa_ratio,
        check=check,
        record=record,
        tokens=tokens,
    )
    traffic = room.read_trace(trace, block) if trace else room.generate(seed, requests, block or 64)
    with _progress(total=len(wanted) * len(traffic.requests)) as advance:
        runs = [run(traffic, policy=each, capacity=at, progress=advance) for each, at in wanted]
    if plot is not None:
        room.plot_hit_rates(traffic, runs, plot)
    return _tell(traffic, runs, json_file)


def _tell(traffic: room.Trace, runs: list[room.Run], json_file: str | None) -> int:
    """Write what was asked for, and return the exit code."""
    if json_file is not None:
        text = json.dumps(room.as_json(traffic, runs), indent=1)
        if json_file == "-":
            print(text)
        else:
            Path(json_file).write_text(text + "\n", encoding="utf-8")
    if json_file != "-":
        width = None if sys.stdout.isatty() else _PIPED_WIDTH
        tables = room.as_table(traffic, runs), room.as_window_table(traffic, runs)
        Console(width=width).print(*filter(None, tables), sep="\n")
    for run in runs:
        if run.leaks:
            print(f"{run.policy} at {run.capacity} blocks:\n{run.leaks}", file=sys.stderr)
    return int(any(run.leaks for run in runs))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """A bar on standard error while it is a terminal; yields what moves it by one."""
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("requests"), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("replay", total=total)
        yield lambda: progress.advance(task)
