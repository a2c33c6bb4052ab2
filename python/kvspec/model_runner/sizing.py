"""How many tokens of KV the memory that is left has room for (RUN-10, RUN-11, RUN-12)."""

from typing import NamedTuple

from kvspec.errors import ContractError, HostMemoryError
from kvspec.memory_budget import MemoryBudget
from kvspec.memory_budget.account import LIMITS_OF, size

__all__ = ["MemoryFigures", "PoolSizes", "memory_figures", "pool_sizes"]

_MOST_SLOTS = 2**31 - 2**16
"""Rows have the slots as int32."""


class MemoryFigures(NamedTuple):
    """What the tightest limit of RAM, cgroup and user says, in bytes."""

    available: int
    total: int


class PoolSizes(NamedTuple):
    """Slots of the pools, multiples of the page size, without the sink."""

    full: int
    swa: int | None
    """Of the window pool, None where no layer has a window."""


def memory_figures() -> MemoryFigures:
    """Of the budget that is active here: what is left for torch, and the least limit."""
    report = MemoryBudget.current().report()
    limits = [
        each.limit
        for each in report.limits
        if each.name in LIMITS_OF["torch"] and each.limit is not None
    ]
    left = report.left["torch"]
    if left is None:
        raise HostMemoryError("RUN-12: no limit of memory is known; give max_total_tokens")
    return MemoryFigures(left, min(limits))


def pool_sizes(
    memory: MemoryFigures,
    *,
    cell_bytes: int,
    full_layers: int,
    window_layers: int = 0,
    window: int | None = None,
    page_size: int,
    mem_fraction_static: float,
    max_total_tokens: int | None = None,
    swa_full_tokens_ratio: float = 0.8,
) -> PoolSizes:
    """Slots for `available - total · (1 - mem_fraction_static)` bytes (RUN-10, RUN-11, RUN-12).

    `cell_bytes` is K and V of a token in one layer; `window` how many tokens the layers with one
    attend to. ContractError for an argument that is none (RUN-9), HostMemoryError if there is not
    room for a page. O(1).
    """
    _require(page_size, mem_fraction_static, max_total_tokens, swa_full_tokens_ratio)
    usable = int(memory.available - memory.total * (1 - mem_fraction_static))
    most = _MOST_SLOTS if max_total_tokens is None else max_total_tokens
    layer_tokens = max(usable, 0) // cell_bytes
    if window_layers == 0 or window is None:
        full, swa = min(most, layer_tokens // full_layers) // page_size * page_size, None
    else:
        least = (-(-window // page_size) + 2) * page_size
        ratio = swa_full_tokens_ratio
        full, swa = _split(layer_tokens, full_layers, window_layers, most, least, page_size, ratio)
    if full < page_size:
        layers = full_layers + window_layers
        raise HostMemoryError(
            f"RUN-12: {size(max(usable, 0))} for KV are not a page of {page_size} tokens, each"
            f" {cell_bytes} bytes in {layers} layers: {size(memory.available)} of"
            f" {size(memory.total)} are left, and mem_fraction_static {mem_fraction_static} keeps"
            f" {size(int(memory.total * (1 - mem_fraction_static)))} of it for others"
        )
    return PoolSizes(full, swa)


def _split(
    layer_tokens: int,
    full_layers: int,
    window_layers: int,
    most: int,
    least: int,
    page_size: int,
    ratio: float,
) -> tuple[int, int]:
    """Slots of the full and of the window pool, which has `least` first, if they fit (RUN-11)."""
    full = min(most, int(layer_tokens / (ratio * window_layers + full_layers)))
    full = full // page_size * page_size
    swa = int(full * ratio) // page_size * page_size
    if swa >= least:
        return full, swa
    even = layer_tokens // (full_layers + window_layers) // page_size * page_size
    if even <= least:  # both are as large as one may be
        return min(full, even), min(full, even)
    if full_layers:
        rest = (layer_tokens - least * window_layers) // full_layers
        full = min(full, rest // page_size * page_size)
    return full, min(full, least)


def _require(
    page_size: int, fraction: float, max_total_tokens: int | None, swa_full_tokens_ratio: float
) -> None:
    """RUN-9."""
    if page_size < 1:
        raise ContractError(f"RUN-9: page_size {page_size} is not at least 1")
    if not 0 < fraction <= 1:
        raise ContractError(f"RUN-9: mem_fraction_static {fraction} is not in (0, 1]")
    if max_total_tokens is not None and max_total_tokens < page_size:
        raise ContractError(
            f"RUN-9: max_total_tokens {max_total_tokens} is less than a page of {page_size}"
        )
    if not 0 < swa_full_tokens_ratio <= 1:
        raise ContractError(
            f"RUN-9: swa_full_tokens_ratio {swa_full_tokens_ratio} is not in (0, 1]"
        )
