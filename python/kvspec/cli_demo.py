"""The command `kvspec demo`: conversations, three kinds of cache, the same words. Spec: DEMO."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

import kvspec
from kvspec.errors import ContractError

if TYPE_CHECKING:
    from kvspec.demo import Demo, Listener, Subject

__all__ = ["demo"]

_PIPED_WIDTH = 140
_PACKAGES = "pip install 'kvspec[models]'"

_Quick = Annotated[
    bool, typer.Option("--quick", help="Fewer conversations, and not the modes under pressure.")
]
_Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the figures; - is standard output."),
]
_Report = Annotated[
    Path, typer.Option("--report", metavar="FILE.html", help="Where the page goes.")
]
_Model = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="A decoder on this machine, instead of SmolLM2."),
]
_Impl = Annotated[
    Literal["native", "oracle"] | None,
    typer.Option(help="Whose pools and caches. The native core by default, if it is installed."),
]
_Page = Annotated[int, typer.Option("--page-size", metavar="TOKENS", min=1, help="To a page.")]
_Tiny = Annotated[
    bool, typer.Option("--tiny", help="Random weights: no words that make sense, and no wheel.")
]
_Seed = Annotated[int, typer.Option(min=0, help="Of the random weights of --tiny.")]


def demo(
    quick: _Quick = False,
    json_file: _Json = None,
    report: _Report = Path("kvspec-demo.html"),
    model: _Model = None,
    implementation: _Impl = None,
    page_size: _Page = 16,
    tiny: _Tiny = False,
    seed: _Seed = 0,
) -> int:
    """Chat with a model under three kinds of cache: the same words, fewer tokens, no leak."""
    if tiny and model is not None:
        raise typer.BadParameter("--tiny and --model: one of them")
    if find_spec("transformers") is None:
        raise ImportError(f"kvspec demo needs transformers: {_PACKAGES}")
    if not report.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {str(report.parent)!r}")
    if implementation == "native" and not kvspec.has_native():
        raise ContractError("the native core is absent: only the oracle can run")
    import kvspec.demo as room  # only now, as transformers may be absent

    name = implementation or ("native" if kvspec.has_native() else "oracle")
    with _listener(json_file) as listener:
        subject = _subject(model, tiny, seed, listener)
        seen = room.demo(
            subject, quick=quick, implementation=name, page_size=page_size, listener=listener
        )
    report.write_text(room.as_html(seen), encoding="utf-8")
    _tell(seen, json_file, report)
    return room.exit_code(seen)


def _subject(model: str | None, tiny: bool, seed: int, listener: "Listener | None") -> "Subject":
    import kvspec.demo as room

    if tiny:
        return room.tiny_subject(seed)
    if listener is not None:
        listener.note(f"loading {model or 'SmolLM2-135M-Instruct'}")
    return room.load(model, listener)


@contextmanager
def _listener(json_file: str | None) -> "Iterator[Listener | None]":
    """On standard output; on standard error, if it is a terminal, where the JSON goes there."""
    from kvspec.demo.live import listening

    if json_file != "-":
        with listening(_console()) as listener:
            yield listener
    elif sys.stderr.isatty():
        with listening(Console(stderr=True)) as listener:
            yield listener
    else:
        yield None


def _console() -> Console:
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(width=width, highlight=False, markup=False)


def _tell(seen: "Demo", json_file: str | None, report: Path) -> None:
    import kvspec.demo as room

    if json_file is not None:
        text = json.dumps(room.as_json(seen), indent=1, allow_nan=False)
        if json_file == "-":
            print(text)
        else:
            Path(json_file).write_text(text + "\n", encoding="utf-8")
    if json_file != "-":
        _console().print(*room.as_tables(seen), f"the whole story: {report}", sep="\n")
    for leak in room.leaks(seen):
        print(leak, file=sys.stderr)
