"""The oracle's border with torch: everything behind it is lists, sets and dicts."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from kvspec.errors import ContractError

KV_TYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
)
"""What KV is kept in; all but those of one byte can be cast to any of them."""

_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, *_UNSIGNED)


def numbers(given: "Sequence[int] | Tensor | memoryview", clause: str) -> list[int]:
    """The integers of a list, buffer or CPU tensor of one dimension; ContractError otherwise."""
    if isinstance(given, Tensor):
        if given.device.type != "cpu":
            raise ContractError(f"{clause}: a tensor on {given.device} was given, use .cpu()")
        if given.dim() != 1 or given.dtype not in _INTEGERS:
            raise ContractError(
                f"{clause}: a tensor of shape {list(given.shape)} and {given.dtype} was given,"
                " not integers in one dimension"
            )
        return [int(number) for number in given.tolist()]
    dimensions = getattr(given, "ndim", 1)
    if dimensions != 1:
        raise ContractError(f"{clause}: {type(given).__name__} has {dimensions} dimensions, not 1")
    try:
        return [operator.index(number) for number in given]
    except TypeError:
        raise ContractError(f"{clause}: {given!r} is not a sequence of integers") from None


def tensor(given: Sequence[int]) -> Tensor:
    """An int64 tensor on the CPU."""
    return torch.tensor(given, dtype=torch.int64)


def is_tensor(given: object) -> bool:
    """Whether torch can read it."""
    return isinstance(given, Tensor)


def stored_as(dtype: torch.dtype) -> torch.dtype:
    """What tensors of KV are made of: torch has few operations for types of one byte."""
    return torch.uint8 if dtype.itemsize == 1 else dtype


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU."""
    return torch.zeros(tuple(shape), dtype=dtype)


def raw(given: Tensor) -> bytes:
    """The bytes of its elements, in order."""
    return bytes(given.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def unsigned(numbers: Sequence[int]) -> Tensor:
    """A uint64 tensor on the CPU."""
    return torch.tensor(numbers, dtype=torch.uint64)
