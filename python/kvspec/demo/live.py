"""What a terminal shows while the demo runs: panels on a terminal, lines in a pipe."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from kvspec.demo.owners import EVICTABLE, FREE, LOCKED, Sample
from kvspec.demo.report import CALLED
from kvspec.demo.serving import Kind, Listener, Turn

__all__ = ["Lines", "Panels", "listening"]

COLOURS = ("cyan", "magenta", "yellow", "blue", "bright_red", "bright_cyan", "green", "white")
"""Of conversations, in order."""
_SHOWN = 320
"""Characters of an answer."""


def colour(conversation: int) -> str:
    return COLOURS[conversation % len(COLOURS)]


class Lines:
    """A line for each turn, as it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._kind = ""
        self._step = 0

    def begins(self, kind: Kind, names: Sequence[str]) -> None:
        self._kind, self._step = kind, 0
        self._console.print(Text(f"{CALLED[kind]}: {len(names)} conversations at once"))

    def said(self, turn: str, conversation: int, text: str) -> None:
        pass

    def ended(self, turn: Turn, text: str) -> None:
        words = " ".join(text.split())
        self._console.print(
            Text(
                f"  {self._kind:5} step {self._step:>3}  {turn.rid:7}"
                f" {len(turn.prompt_ids):>4} prompt {turn.cached_tokens:>4} cached"
                f" {turn.ttft_ms:>7,.0f} ms  {words}"
            ),
            no_wrap=True,
            overflow="ellipsis",
        )

    def looked(self, sample: Sample) -> None:
        self._step = sample.step

    def note(self, text: str) -> None:
        self._console.print(Text(text))


class Panels:
    """The conversations side by side, and the pool under them."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._title = ""
        self._names: Sequence[str] = ()
        self._texts: list[tuple[str, str]] = []
        self._sample: Sample | None = None

    def begins(self, kind: Kind, names: Sequence[str]) -> None:
        self._title, self._names = CALLED[kind], names
        self._texts = [("", "")] * len(names)
        self._show()

    def said(self, turn: str, conversation: int, text: str) -> None:
        self._texts[conversation] = (turn, text)

    def ended(self, turn: Turn, text: str) -> None:
        told = f"{text}\n[{turn.cached_tokens} of {len(turn.prompt_ids)} tokens cached]"
        self._texts[turn.conversation] = (turn.rid, told)

    def looked(self, sample: Sample) -> None:
        self._sample = sample
        self._show()

    def note(self, text: str) -> None:
        self._live.console.print(Text(text, style="dim"))
        self._sample, self._texts = None, []
        self._show()

    def _show(self) -> None:
        self._live.update(self._rendered())

    def _rendered(self) -> RenderableType:
        panels = [
            Panel(
                Text(text[-_SHOWN:]),
                title=turn or self._names[at],
                border_style=colour(at),
                width=max((self._live.console.width - 4) // 3, 24),
                height=7,
            )
            for at, (turn, text) in enumerate(self._texts)
        ]
        parts: list[RenderableType] = [Columns(panels)] if panels else []
        if self._sample is not None:
            title = f"{self._title}: the pool after step {self._sample.step}"
            parts.append(Panel(pool_bar(self._sample.pages), title=title))
        return Group(*parts)


def pool_bar(pages: str) -> Text:
    """Every page one character, in the colour of its owner."""
    text = Text()
    for owner, run in groupby(pages):
        count = len(list(run))
        if owner == FREE:
            text.append("·" * count, style="dim")
        elif owner in (EVICTABLE, LOCKED):
            text.append(("▒" if owner == EVICTABLE else "▓") * count, style="green")
        else:
            text.append("█" * count, style=colour(ord(owner) - ord("A")))
    return text


@contextmanager
def listening(console: Console) -> Iterator[Listener]:
    """Panels on a terminal, else lines."""
    if not console.is_terminal:
        yield Lines(console)
        return
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        yield Panels(live)
