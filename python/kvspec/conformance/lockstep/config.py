"""What a run is made with, and the documents that its requests hold."""

import random
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch

from kvspec.interfaces.prefix_key import ExtraKey
from kvspec.prefix_key import RadixKey

__all__ = [
    "MEMORIES",
    "NAMESPACES",
    "Config",
    "Operation",
    "as_key",
    "as_slots",
    "configuration",
    "document_tokens",
]

Operation: TypeAlias = tuple[str | int, ...]
"""A name and integers. Objects are meant by number, modulo how many there are."""

POLICIES = ("lru", "lfu", "fifo", "mru", "filo", "slru", "priority")
NAMESPACES: tuple[ExtraKey, ...] = (None, "a", b"a", ("a", 1))
PAGE_SIZES = (1, 16, 64)
WINDOW_PAGE_SIZES = (1, 4, 16)
MEMORIES = ("full", "swa", "swachunk")
"""A radix cache; one over an allocator with a window pool; a chunk cache over such a one."""
_SYMBOLS = (7, -(2**31), 2**31 - 1)


class Config(NamedTuple):
    """What a run is made with."""

    page_size: int = 1
    granularity: str = "page"
    policy: str = "lru"
    need_sort: bool = False
    request_pages: int = 4
    """Pages of the largest request."""
    spare_pages: int = 0
    rows: int = 4
    symbols: int = 2
    """How many different pages of tokens there are."""
    form: str = "list"
    """How slots and keys are given: list, tensor, buffer or key."""
    shuffle: int = 0
    """Seed of the first order of the free list."""
    observed: bool = False
    """Whether all rooms report their operations, and the reports are compared too."""
    memory: str = "full"
    """One of MEMORIES."""
    window: int = 0
    """Tokens of the sliding window; 0 where there is none."""
    window_pages: int = 0
    """Pages of the window pool."""

    @property
    def page_count(self) -> int:
        """Pages of the (full) pool."""
        return self.request_pages + self.spare_pages

    @property
    def windowed(self) -> bool:
        """Whether there is a window pool."""
        return self.memory != "full"

    @property
    def pages_of_window(self) -> int:
        """k: the pages that a window lock covers."""
        return -(-self.window // self.page_size)


def configuration(seed: int, memory: str = "full") -> Config:
    """The configuration of a seed: 18 in a row have every size, granularity and headroom.

    With a window pool, 36 in a row have every page size, kind of window and room for windows.
    """
    rng = random.Random(seed)
    config = _configuration(seed, rng)
    return config if memory == "full" else _windowed(seed, config._replace(memory=memory), rng)


def _windowed(seed: int, config: Config, rng: random.Random) -> Config:
    """A window below, of, and above a page, and its pool from just enough to more than enough."""
    page_size = WINDOW_PAGE_SIZES[seed % 3]
    windows = (
        max(page_size // 2, 1),
        page_size,
        page_size + 1 + rng.randrange(page_size),
        2 * page_size + 1 + rng.randrange(page_size),
    )
    pages = config.request_pages + 3
    config = config._replace(
        page_size=page_size,
        granularity="page",
        policy="lru",
        request_pages=pages,
        spare_pages=rng.choice((0, pages // 2, pages)),
        window=windows[seed // 3 % 4],
    )
    least, most = 2 * config.pages_of_window + 2, config.page_count
    sizes = (least, (least + most) // 2, most + rng.choice((0, 0, 3)))
    return config._replace(window_pages=sizes[(seed + seed // 3 + seed // 12) % 3])


def _configuration(seed: int, rng: random.Random) -> Config:
    return Config(
        page_size=PAGE_SIZES[seed % 3],
        granularity=("page", "node")[seed // 3 % 2],
        policy=rng.choice(POLICIES),
        need_sort=rng.random() < 0.4,
        request_pages=rng.randrange(5, 13),
        spare_pages=seed // 6 % 3,
        rows=rng.randrange(3, 6),
        symbols=rng.choice((2, 2, 3)),
        form=rng.choice(("list", "tensor", "buffer", "key")),
        shuffle=rng.randrange(1 << 16),
        observed=rng.random() < 0.25,
    )


@lru_cache(maxsize=4096)
def document_tokens(page_size: int, symbols: int, document: int, page_count: int) -> list[int]:
    """The tokens of a document: its digits choose its pages, which differ in their middle."""
    tokens = []
    for _ in range(page_count):
        document, symbol = divmod(document, symbols)
        page = [3] * page_size
        page[(page_size // 2 + 5 * symbol) % page_size] = _SYMBOLS[symbol]
        tokens += page
    return tokens


def as_slots(form: str, slots: Sequence[int]) -> Any:
    """Slots in the form of the run: a list, a tensor or a buffer."""
    if form == "tensor":
        return torch.tensor(slots, dtype=torch.int64)
    return array("q", slots) if form == "buffer" else list(slots)


def as_key(form: str, tokens: list[int], extra_key: ExtraKey) -> tuple[Any, dict[str, ExtraKey]]:
    """A key in the form of the run, and the keywords that go with it."""
    if form == "key":
        return RadixKey(tokens, extra_key), {}
    if form == "tensor":
        return torch.tensor(tokens, dtype=torch.int64), {"extra_key": extra_key}
    return array("q", tokens) if form == "buffer" else tokens, {"extra_key": extra_key}
