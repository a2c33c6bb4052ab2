"""Who holds a lock, since which action. Spec: CHECK-17, INSTR.

A lock is known by what undoes it: a receipt, a node, or a number that stands for a node.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from kvspec.instrumentation.sites import Mark, told
from kvspec.interfaces.prefix_cache import Path

__all__ = ["Hold", "Locks", "node_of"]

_Key: TypeAlias = int | tuple[int]


def node_of(given: Any) -> Any:
    """The node of a receipt; a node is its own."""
    return given.node if hasattr(given, "delta") else given


class Hold(NamedTuple):
    """One lock that was taken and not given back."""

    given: object
    """The receipt or node that undoes it; kept, so that no other object takes its identity."""
    node: object
    mark: Mark | None
    """The action that took it."""

    def __str__(self) -> str:
        if self.mark is None:
            return "a lock from before the ledger began"
        site = told(self.mark)
        return f"{site.name} at {site.at} (action {site.action})"


def _key(given: object) -> _Key:
    return (given,) if type(given) is int else id(given)


class Locks:
    """The open locks of one cache."""

    def __init__(self) -> None:
        self._open: dict[_Key, list[tuple[object, object, Mark | None]]] = {}
        """As `Hold` has them."""
        self._before: Counter[Path] = Counter()
        """Locks that were there when the book was opened."""

    def begin(self, paths: Iterable[Path]) -> None:
        """These are open, and nobody knows since when. O(paths)."""
        self._open.clear()
        self._before = Counter(paths)

    def opened(self, given: object, node: object, mark: Mark | None) -> None:
        """A lock was taken. O(1)."""
        key = (given,) if type(given) is int else id(given)
        holds = self._open.get(key)
        if holds is None:
            self._open[key] = [(given, node, mark)]
        else:
            holds.append((given, node, mark))

    def closed(self, given: object, path_of: Callable[[object], Path | None]) -> None:
        """A lock was given back. O(1) by what took it, else O(open locks)."""
        holds = self._open.get(_key(given))
        if holds is None:  # a receipt's lock is undone by its node too
            holds = next((h for h in self._open.values() if h[-1][1] == given), None)
        if holds is not None:
            taken_by, _, _ = holds.pop()
            if not holds:
                del self._open[_key(taken_by)]
            return
        path = path_of(node_of(given))
        if path is not None and self._before[path] > 0:
            self._before[path] -= 1

    def holders(
        self, path_of: Callable[[object], Path | None]
    ) -> Mapping[Path, tuple[str, ...]] | None:
        """Who holds a lock on each path; None if the path of one is not known. O(open tokens)."""
        held: defaultdict[Path, list[str]] = defaultdict(list)
        for path, count in (+self._before).items():
            held[path] += [str(Hold(None, None, None))] * count
        for hold in (Hold(*hold) for holds in self._open.values() for hold in holds):
            found = path_of(hold.node)
            if found is None:
                return None
            held[found].append(str(hold))
        return {path: tuple(names) for path, names in held.items() if path[1]}
