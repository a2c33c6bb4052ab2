"""Tokens for the keys of a log, which have ids and no tokens. Spec: VALID."""

from kvspec.flight_recorder.events import Key
from kvspec.validate.runs import ids_of

__all__ = ["Names"]


class Names:
    """Each id becomes a page of tokens of its own: equal ids are equal pages, and an id names a
    path, so all namespaces fit into one.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._tokens: dict[bytes, int] = {}
        self._parents: dict[bytes, bytes] = {}

    def token(self, id_: bytes, parent: bytes) -> int:
        """The token that stands for a page, which follows another."""
        if id_ not in self._tokens:
            self._tokens[id_] = len(self._tokens) + 1
            self._parents[id_] = parent
        return self._tokens[id_]

    def tokens(self, key: Key) -> list[int]:
        """Tokens for a key. O(tokens)."""
        tokens, parent = list[int](), b""
        for id_ in ids_of(key.ids):
            tokens += [self.token(id_, parent)] * self._page_size
            parent = id_
        return tokens + [0] * (key.count - len(tokens))

    def path(self, id_: bytes) -> list[int] | None:
        """The tokens up to a page, None if no key has named it."""
        path: list[int] = []
        while id_:
            if id_ not in self._tokens:
                return None
            path.append(self._tokens[id_])
            id_ = self._parents[id_]
        return [token for token in reversed(path) for _ in range(self._page_size)]

    def depth(self, id_: bytes) -> int:
        """Pages up to this one, itself included."""
        return len(self.path(id_) or ()) // self._page_size
