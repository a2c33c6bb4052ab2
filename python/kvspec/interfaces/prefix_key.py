"""Keys of cached prefixes. Spec: KEY."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

__all__ = ["ExtraKey", "PageHashes", "RadixKeyLike", "Tokens"]

ExtraKey: TypeAlias = "str | bytes | int | tuple[ExtraKey, ...] | None"
"""What selects a namespace. None is the empty namespace (KEY-2)."""


class RadixKeyLike(Protocol):
    @property
    def token_ids(self) -> "Sequence[int] | Tensor | memoryview": ...

    @property
    def extra_key(self) -> ExtraKey: ...


Tokens: TypeAlias = Sequence[int] | Tensor | memoryview | RadixKeyLike
"""Tokens of a key: a list, a buffer, a one-dimensional CPU tensor or a RadixKey (KEY-1)."""


class PageHashes(Protocol):
    def __call__(
        self, token_ids: Tokens, page_size: int, extra_key: ExtraKey = None
    ) -> list[bytes]:
        """The digest of each whole page, 32 bytes each (KEY-3, KEY-4, KEY-5, KEY-6)."""
