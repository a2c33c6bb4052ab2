"""The clauses of spec/, read from the text that people read."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

__all__ = ["Clause", "clauses", "rooms", "spec_folder"]

KINDS = ("invariant", "pre", "post", "order", "liveness", "cost", "choice", "withdrawn")
SAFETY = frozenset({"invariant", "pre", "post", "order"})

_HEAD = re.compile(r"^\*\*(?P<id>[A-Z]+-\d+)\*\* \*\((?P<kind>\w+)[^)]*\)\* ", re.M)
_WHEN = re.compile(r"^`when: (?P<expression>.+)`$", re.M)


@dataclass(frozen=True)
class Clause:
    """One clause: its id, kind, text, and the antecedent that `reached` evaluates."""

    id: str
    kind: str
    room: str
    text: str
    when: str | None
    line: int

    @property
    def safety(self) -> bool:
        """Whether all four levels of coverage are asked for."""
        return self.kind in SAFETY


def spec_folder() -> Path:
    """Where spec/ lies: in the installed package, or at the top of a checkout."""
    packaged = Path(__file__).parent / "spec"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "spec"


@cache
def rooms() -> dict[str, Any]:
    """`rooms.toml`: layers, walls and rooms."""
    return tomllib.loads((spec_folder() / "rooms.toml").read_text(encoding="utf-8"))


def _read(room: str) -> Iterator[Clause]:
    text = (spec_folder() / f"{room}.md").read_text(encoding="utf-8")
    heads = list(_HEAD.finditer(text))
    for head, following in zip_longest(heads, heads[1:]):
        body = text[head.end() : following.start() if following else len(text)].split("\n## ")[0]
        when = _WHEN.search(body)
        yield Clause(
            id=head["id"],
            kind=head["kind"],
            room=room,
            text=body.split("\n\n")[0].replace("\n", " ").strip(),
            when=when["expression"] if when else None,
            line=text.count("\n", 0, head.start()) + 1,
        )


@cache
def clauses() -> dict[str, Clause]:
    """Every clause by id, in the order of rooms.toml and of the text."""
    found: dict[str, Clause] = {}
    for room in rooms()["room"]:
        for clause in _read(room):
            if clause.id in found:
                raise ValueError(f"spec/{room}.md:{clause.line} defines {clause.id} a second time")
            if clause.kind not in KINDS:
                raise ValueError(f"spec/{room}.md:{clause.line} has the kind {clause.kind!r}")
            found[clause.id] = clause
    return found
