"""Fills what nobody may read, so that a stale read shows in the data. Spec: POISON.

A slot is *fresh* when it was handed out and is not written yet, *freed* when it is free. Each has a
pattern of bits for every dtype; of a floating type both are NaN, told apart by their payload:

    dtype                 fresh                 freed
    float64               7ffd 5555 5555 5555   7ffa aaaa aaaa aaaa
    float32               7fd5 5555             7fea aaaa
    bfloat16              7fd5                  7fea
    float16               7f55                  7eaa
    float8_e5m2           7f                    7e
    float8_e4m3fn         7f                    ff
    integers              55 in every byte      aa in every byte

Bits are filled and compared as integers, so the payload survives whatever copies a tensor; what
computes with it gives some NaN.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Literal, NamedTuple, NoReturn, Protocol, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvspec.errors import ContractError

__all__ = ["KVBuffers", "Overwritten", "Poison", "Stale", "Why"]

Why: TypeAlias = Literal["fresh", "freed"]
Slots: TypeAlias = Tensor | Sequence[int]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes to an element -> the type that its bits are read as."""

_PATTERNS: dict[torch.dtype, tuple[int, int]] = {
    torch.float64: (0x7FFD555555555555, 0x7FFAAAAAAAAAAAAA),
    torch.float32: (0x7FD55555, 0x7FEAAAAA),
    torch.bfloat16: (0x7FD5, 0x7FEA),
    torch.float16: (0x7F55, 0x7EAA),
    torch.float8_e5m2: (0x7F, 0x7E),
    torch.float8_e4m3fn: (0x7F, 0xFF),
    torch.uint8: (0x55, 0xAA),
    torch.int8: (0x55, 0xAA),
    torch.int16: (0x5555, 0xAAAA - 2**16),
    torch.int32: (0x55555555, 0xAAAAAAAA - 2**32),
    torch.int64: (0x5555555555555555, 0xAAAAAAAAAAAAAAAA - 2**64),
}
"""dtype -> its bits when fresh and when freed, as the integer of `_INTEGERS`."""


class Stale(NamedTuple):
    """A row of data that nobody wrote, or that was given back (POISON-2)."""

    row: int
    why: Why


class Overwritten(NamedTuple):
    """A slot that was written after it was given back (POISON-3)."""

    page: int
    tensor: int
    """Its place among those that were given."""
    slot: int


class KVBuffers(Protocol):
    """What engines keep KV in, `get_kvcache()` of an allocator: two tensors for each layer."""

    layer_num: int

    def get_key_buffer(self, layer_id: int) -> Tensor: ...

    def get_value_buffer(self, layer_id: int) -> Tensor: ...


class Poison:
    """Over tensors [slots, ...], page `slot // page_size`. Nothing is filled until it is asked for.

    A `KVBuffers` stands for its tensors, key and value of each layer in turn; a value buffer that
    lies in its key buffer, as where both are one latent, is filled with it and not counted.
    """

    def __init__(self, tensors: Iterable[Tensor] | KVBuffers, page_size: int) -> None:
        """ContractError if a tensor is not its own, on the CPU, of equal length (POISON-4)."""
        if page_size < 1:
            _refuse(f"page_size is {page_size}, not a positive number of slots")
        given = _buffers(tensors) if hasattr(tensors, "get_key_buffer") else list(tensors)
        for index, tensor in enumerate(given):
            _require_own_slots(index, tensor, given[0])
        self.page_size = page_size
        self.slot_count = len(given[0]) if given else 0
        self._bits = [_bits(tensor) for tensor in given]
        self._patterns = [_PATTERNS[tensor.dtype] for tensor in given]
        for (one, a), (other, b) in combinations(enumerate(map(_bytes, given)), 2):
            if _overlap(a, b):
                _refuse(f"tensor {other} shares memory with tensor {one}")
        page_count = -(-self.slot_count // page_size)
        self._freed = torch.zeros(page_count, dtype=torch.bool)
        """Whether a page was given back and nothing of it handed out since."""

    def fresh(self, slots: Slots) -> None:
        """These were handed out: fill them (POISON-1). O(slots * bytes of one)."""
        index = self._index(slots)
        self._freed[index // self.page_size] = False
        for bits, (pattern, _) in zip(self._bits, self._patterns, strict=True):
            bits.index_fill_(0, index, pattern)

    def freed(self, slots: Slots) -> None:
        """These were given back: fill their whole pages (POISON-1). O(pages * bytes of one)."""
        pages = torch.unique(self._index(slots) // self.page_size)
        index = self._slots_of(pages)
        self._freed[pages] = True
        for bits, (_, pattern) in zip(self._bits, self._patterns, strict=True):
            bits.index_fill_(0, index, pattern)

    def stale(self, values: Tensor) -> list[Stale]:
        """The rows of data [rows, ...], read from these tensors, that are poison (POISON-2).

        One element is enough, if it has two bytes or more: computing does not make such a NaN. Of
        one byte, which may be anything, every element must be poison. O(values).
        """
        if values.dtype not in _PATTERNS or values.dim() == 0:
            raise ContractError(
                f"POISON-2: stale of {list(values.shape)} {values.dtype}: not rows of KV"
            )
        if values.numel() == 0:
            return []
        bits = _bits(values).reshape(len(values), -1)
        of_row = torch.all if values.itemsize == 1 else torch.any
        fresh, freed = (of_row(bits == pattern, dim=1) for pattern in _PATTERNS[values.dtype])
        rows = torch.nonzero(fresh | freed).flatten().tolist()
        return [Stale(row, "fresh" if fresh[row] else "freed") for row in rows]

    def check(self, pages: Slots) -> list[Overwritten]:
        """What was written of free pages, the first place of each, by page (POISON-3).

        A page that was never `freed` here, or handed out again since, is passed over: nothing is
        known of what it held. O(pages * bytes of one).
        """
        asked = _as_index(pages)
        beyond = asked[(asked < 0) | (asked >= len(self._freed))]
        if len(beyond):
            raise ContractError(
                f"POISON-3: page {int(beyond[0])} is none of the {len(self._freed)} of the tensors"
            )
        slots = self._slots_of(torch.unique(asked[self._freed[asked]]))
        places: dict[int, Overwritten] = {}
        for tensor, (bits, (_, pattern)) in enumerate(zip(self._bits, self._patterns, strict=True)):
            poison = (bits[slots] == pattern).unsqueeze(-1).flatten(start_dim=1).all(dim=1)
            for slot in slots[~poison].tolist():
                place = Overwritten(slot // self.page_size, tensor, slot)
                if slot < places.setdefault(place.page, place).slot:
                    places[place.page] = place
        return sorted(places.values())

    def _index(self, slots: Slots) -> Tensor:
        """The slots as int64 [slots], all of them in the tensors (POISON-1)."""
        index = _as_index(slots)
        beyond = index[(index < 0) | (index >= self.slot_count)]
        if len(beyond):
            raise ContractError(
                f"POISON-1: slot {int(beyond[0])} is none of the {self.slot_count} of the tensors"
            )
        return index

    def _slots_of(self, pages: Tensor) -> Tensor:
        """Of whole pages, the last of which the tensors may cut short."""
        slots = (pages[:, None] * self.page_size + torch.arange(self.page_size)).flatten()
        return slots[slots < self.slot_count]


def _refuse(what: str) -> NoReturn:
    raise ContractError(f"POISON-4: {what}")


def _require_own_slots(index: int, tensor: Tensor, first: Tensor) -> None:
    if tensor.device.type != "cpu":
        _refuse(f"tensor {index} is on {tensor.device}, not on the CPU")
    if tensor.dtype not in _PATTERNS:
        _refuse(f"tensor {index} is of {tensor.dtype}, which has no poison")
    if tensor.dim() == 0 or len(tensor) != len(first):
        _refuse(
            f"tensor {index} has the shape {list(tensor.shape)}: its first dimension is not the"
            f" slots of tensor 0, {list(first.shape)}"
        )
    if any(
        size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        _refuse(f"tensor {index} is expanded: its slots share memory with one another")


def _buffers(kvcache: object) -> list[Tensor]:
    """The tensors of a `KVBuffers`, in order."""
    cache = cast(KVBuffers, kvcache)
    first = getattr(cache, "start_layer", None) or 0  # the rank's first layer, of a pipeline's
    buffers: list[Tensor] = []
    for layer in range(first, first + cache.layer_num):
        key, value = cache.get_key_buffer(layer), cache.get_value_buffer(layer)
        on_cpu = key.device.type == value.device.type == "cpu"
        buffers += [key] if on_cpu and _overlap(_bytes(key), _bytes(value)) else [key, value]
    return buffers


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same size."""
    return tensor.detach().view(_INTEGERS[tensor.itemsize])


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The same memory as numpy sees it, which has no name for most types that KV is stored in."""
    return tensor.detach().unsqueeze(-1).view(torch.uint8).numpy()


def _overlap(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether a byte is of both: layers that are interleaved do not overlap."""
    return np.shares_memory(one, other)


def _as_index(numbers: Slots) -> Tensor:
    return torch.as_tensor(numbers, dtype=torch.int64, device="cpu").reshape(-1)
