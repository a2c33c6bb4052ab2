"""Ids of the pages of a key, hashed once. Spec: REC.

SHA-256 costs a microsecond a page at least, comparing bytes next to nothing. So keys of late are
remembered in a tree of pages, and only what no remembered key begins with is hashed.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvspec.errors import ContractError
from kvspec.prefix_key import (
    key_parts,
    key_words,
    little_endian,
    namespace_seed,
    next_hashes,
)

if TYPE_CHECKING:
    from kvspec.interfaces.prefix_key import ExtraKey, Tokens

__all__ = ["ID_BYTES", "PageIds"]

ID_BYTES = 16
"""Of the 32 bytes of a page hash (REC-3)."""

_BUDGET = 64 << 20
_NODE_BYTES = 500


class _Edge:
    """Pages that follow each other in all remembered keys that have the first of them."""

    __slots__ = ("children", "home", "ids", "name", "octets", "rests")

    def __init__(
        self, home: "dict[bytes, _Edge]", name: bytes, octets: bytes, ids: bytes, rests: bytes
    ) -> None:
        self.home = home
        self.name = name
        """Under which it stands in `home`, the children of the edge before: its first page."""
        self.octets = octets
        """The tokens of its pages."""
        self.ids = ids
        """First half of each page's hash."""
        self.rests = rests
        """Second half of each."""
        self.children: dict[bytes, _Edge] = {}
        home[name] = self

    @property
    def size(self) -> int:
        return _NODE_BYTES + len(self.octets) + len(self.ids) + len(self.rests)


class PageIds:
    """Page ids of keys of any page size and namespace."""

    def __init__(self, budget: int = _BUDGET) -> None:
        self.hashed = 0
        """Pages that were hashed."""
        self._budget = budget
        self.used = 0
        """Bytes that are remembered, at most `budget` between calls."""
        self._roots: dict[bytes, _Edge] = {}
        self._order: OrderedDict[_Edge, None] = OrderedDict()
        """Least recently used first: an edge stands before the one that leads to it."""

    def of(
        self, tokens: "Tokens", page_size: int, extra_key: "ExtraKey"
    ) -> tuple[bytes, memoryview, bytes]:
        """(ids of the whole pages, all the tokens, frame of the namespace) of a key (REC-3).

        The ids are the first 16 bytes of `page_hashes`. O(tokens compared + pages hashed), the
        latter those that no remembered key has.
        """
        if page_size < 1:
            raise ContractError(f"KEY-3: page_size {page_size} is not positive")
        given, frame = key_parts(tokens, extra_key)
        words = key_words(given)
        octets = bytes(little_endian(words[: len(words) - len(words) % page_size]))
        ids = self._ids(octets, 4 * page_size, frame) if octets else b""
        return ids, words, frame

    def _ids(self, octets: bytes, step: int, frame: bytes) -> bytes:
        edge = self._root(step, frame)
        path, parts, at = [edge], [], 0
        while at < len(octets):
            child = edge.children.get(octets[at : at + step])
            if child is None:
                edge, new = self._hash(edge, octets[at:], step, frame)
                path.append(edge)
                parts.append(new)
                break
            same = _common(child.octets, octets, at, step)
            if same < len(child.octets):
                child = self._split(child, same, step)
            path.append(child)
            parts.append(child.ids)
            at += same
            edge = child
        for used in reversed(path):
            self._order.move_to_end(used)
        self._forget()
        return b"".join(parts)

    def _root(self, step: int, frame: bytes) -> _Edge:
        name = step.to_bytes(8, "little") + frame
        root = self._roots.get(name)
        if root is None:
            root = self._remember(self._roots, name, b"", b"", b"")
        return root

    def _remember(
        self, home: dict[bytes, _Edge], name: bytes, octets: bytes, ids: bytes, rests: bytes
    ) -> _Edge:
        edge = _Edge(home, name, octets, ids, rests)
        self._order[edge] = None
        self.used += edge.size
        return edge

    def _hash(self, edge: _Edge, octets: bytes, step: int, frame: bytes) -> tuple[_Edge, bytes]:
        """Hash the pages that follow an edge; (the edge they are in now, their ids)."""
        before = edge.ids[-ID_BYTES:] + edge.rests[-ID_BYTES:] or namespace_seed(frame)
        hashes = next_hashes(before, octets, step // 4)
        self.hashed += len(hashes)
        new = b"".join(digest[:ID_BYTES] for digest in hashes)
        rests = b"".join(digest[ID_BYTES:] for digest in hashes)
        if edge.children or not edge.octets:
            return self._remember(edge.children, octets[:step], octets, new, rests), new
        longer = edge.octets + octets, edge.ids + new, edge.rests + rests
        self.used -= edge.size
        edge.octets, edge.ids, edge.rests = longer
        self.used += edge.size
        return edge, new

    def _split(self, edge: _Edge, length: int, step: int) -> _Edge:
        """Cut an edge after `length` bytes of tokens: a new one leads to it, and is returned."""
        cut = length // step * ID_BYTES
        lower = edge.octets[length:], edge.ids[cut:], edge.rests[cut:]
        self.used -= edge.size
        upper = self._remember(
            edge.home, edge.name, edge.octets[:length], edge.ids[:cut], edge.rests[:cut]
        )
        edge.octets, edge.ids, edge.rests = lower
        edge.home, edge.name = upper.children, edge.octets[:step]
        edge.home[edge.name] = edge
        self.used += edge.size
        return upper

    def _forget(self) -> None:
        while self.used > self._budget:
            edge, _ = self._order.popitem(last=False)
            del edge.home[edge.name]
            self.used -= edge.size


def _common(edge: bytes, octets: bytes, at: int, step: int) -> int:
    """Length of the common start of an edge and a key, in whole pages; the first one is."""
    if octets.startswith(edge, at):
        return len(edge)
    low, high = 1, min(len(edge), len(octets) - at) // step
    while low < high:
        middle = (low + high + 1) // 2
        if octets.startswith(edge[: middle * step], at):
            low = middle
        else:
            high = middle - 1
    return low * step
