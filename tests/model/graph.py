"""Labelled state graphs: reading the one TLC writes, and walking an implementation along it."""

import pickle
import re
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple, Protocol, Self, TypeAlias, TypeVar

__all__ = ["Client", "Graph", "State", "Value", "difference", "read_dot"]

Value: TypeAlias = "bool | int | str | tuple[Value, ...] | frozenset[Value] | dict[Value, Value]"
State: TypeAlias = dict[str, Value]
"""The variables of a model; what a test compares is a hashable view of it."""


class Graph(NamedTuple):
    states: dict[str, State]
    """By the name that TLC gives them."""
    edges: set[tuple[str, str, str]]
    """(from, action, to)"""
    first: str

    def viewed(
        self, view: Callable[[State], Hashable]
    ) -> tuple[Hashable, set[tuple[Hashable, str, Hashable]]]:
        """The first state and the edges, as `view` shows the states; it must tell all apart."""
        shown = {name: view(state) for name, state in self.states.items()}
        assert len(set(shown.values())) == len(shown), "the view confuses states of the model"
        edges = {(shown[a], action, shown[b]) for a, action, b in self.edges}
        return shown[self.first], edges


_TOKEN = re.compile(r'\s*(<<|>>|:>|@@|\|->|\.\.|-?\d+|\w+|"[^"]*"|[{}()\[\],])')


class _Reader:
    """A value as TLC prints it. The empty function prints as the empty sequence."""

    def __init__(self, text: str) -> None:
        self.tokens = _TOKEN.findall(text)
        self.at = 0

    def take(self) -> str:
        self.at += 1
        return str(self.tokens[self.at - 1])

    def items(self, end: str, *separators: str) -> Iterator[Value]:
        while self.tokens[self.at] != end:
            if self.tokens[self.at] in separators:
                self.take()
            yield self.value()
        self.take()

    def value(self) -> Value:
        match token := self.take():
            case "<<":
                return tuple(self.items(">>", ","))
            case "{":
                return frozenset(self.items("}", ","))
            case "(":
                return self.pairs(")", ":>", "@@")
            case "[":
                return self.pairs("]", "|->", ",")
            case "TRUE" | "FALSE":
                return token == "TRUE"
        if not token.lstrip("-").isdigit():
            return token.strip('"')
        if self.tokens[self.at : self.at + 1] != [".."]:
            return int(token)
        self.take()
        return frozenset(range(int(token), int(self.take()) + 1))

    def pairs(self, end: str, arrow: str, separator: str) -> dict[Value, Value]:
        flat = list(self.items(end, arrow, separator))
        return dict(zip(flat[::2], flat[1::2], strict=True))


def read_dot(text: str) -> Graph:
    """The graph of `-dump dot,actionlabels`."""
    states: dict[str, State] = {}
    first = ""
    for name, label, style in re.findall(r'^(-?\d+) \[label="(.*)"(.*)\];?$', text, re.MULTILINE):
        lines = label.replace('\\"', '"').replace("\\\\", "\\")
        variables = (line.split(" = ", 1) for line in lines.removeprefix("/\\ ").split("\\n/\\ "))
        states[name] = {
            variable: _Reader(value.replace("\\n", " ")).value() for variable, value in variables
        }
        if "filled" in style:
            first = name
    edges = re.findall(r'^(-?\d+) -> (-?\d+) \[label="(\w+)"', text, re.MULTILINE)
    return Graph(states, {(a, action, b) for a, b, action in edges}, first)


class Client(Protocol):
    """An implementation, and what its user remembers."""

    def state(self) -> Hashable:
        """What the model's state is viewed as."""

    def moves(self) -> "Iterator[Callable[[Self], str | None]]":
        """Every call to try here.

        Making it tells which action of the model it turned out to be; None if it was none.
        """


AnyClient = TypeVar("AnyClient", bound=Client)


def difference(
    client: AnyClient, first: Hashable, edges: set[tuple[Hashable, str, Hashable]]
) -> str | None:
    """The first point where the client's graph is not (first, edges); None if they are equal.

    Breadth first over copies, and over at the first difference, so that it ends even if the
    client's graph does not. A pickle is a copy that costs a tenth of `copy.deepcopy`.
    """
    if client.state() != first:
        return f"begins in {client.state()}, the model in {first}"
    seen, walked, todo = {first}, set[tuple[Hashable, str, Hashable]](), deque([client])
    while todo:
        here = todo.popleft()
        before, frozen = here.state(), pickle.dumps(here)
        for move in here.moves():
            there: AnyClient = pickle.loads(frozen)
            action = move(there)
            if action is None:
                continue
            edge = before, action, there.state()
            if edge not in edges:
                return f"{action} leads from {before} to {edge[2]}; in the model it does not"
            walked.add(edge)
            if edge[2] not in seen:
                seen.add(edge[2])
                todo.append(there)
    missing = edges - walked
    return f"{len(missing)} edges are missing, such as {next(iter(missing))}" if missing else None
