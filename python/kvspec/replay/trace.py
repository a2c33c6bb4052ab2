"""Traces of block ids, and the tokens that stand for a block.

A line is `{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}`. With
`block` tokens to a block, the ids name the input's blocks in order, the last one possibly partial:

    input_length in (block * (len(hash_ids) - 1), block * len(hash_ids)]
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from kvspec.errors import ContractError

__all__ = ["Trace", "TraceError", "TraceRequest", "block_tokens", "read_trace"]

_TOKENS_END = 2**31
_IDS_END = 2**64
_GZIP = b"\x1f\x8b"


class TraceError(ContractError):
    """A trace that cannot be read; the text names file, line number and reason (REPLAY-1)."""


class TraceRequest(NamedTuple):
    """One line of a trace."""

    timestamp: float
    """Milliseconds."""
    input_length: int
    """Tokens."""
    output_length: int
    """Tokens."""
    hash_ids: NDArray[np.uint64]
    """[blocks]: equal ids mean equal content and equal prefix."""


class Trace(NamedTuple):
    name: str
    block: int
    """Tokens to a block."""
    requests: Sequence[TraceRequest]

    @property
    def tokens(self) -> int:
        """Tokens of all inputs, padding not counted."""
        return sum(request.input_length for request in self.requests)

    @property
    def blocks(self) -> int:
        """Blocks of all inputs, repeats included."""
        return sum(len(request.hash_ids) for request in self.requests)


def read_trace(path: str | Path, block: int | None = None) -> Trace:
    """Read a plain or gzip file whole, or raise TraceError (REPLAY-1). O(file).

    Without `block` it is the one size that fits every line; TraceError if there are several.
    """
    requests: list[TraceRequest] = []
    low, high = (1, _TOKENS_END - 1) if block is None else (block, block)
    if low < 1:
        raise ContractError(f"REPLAY-1: block is {block}, not a positive number of tokens")
    for number, line in _lines(path):
        try:
            request = _request(line)
            low, high = _narrow(request, low, high)
        except ValueError as error:
            _refuse(path, number, str(error))
        requests.append(request)
    if not requests:
        _refuse(path, 1, "the file holds no request")
    if low < high:
        fits = f"{low} tokens or more" if high == _TOKENS_END - 1 else f"{low} to {high} tokens"
        _refuse(path, len(requests), f"blocks of {fits} fit every line; the block must be given")
    return Trace(name=str(path), block=low, requests=requests)


def block_tokens(hash_ids: "Sequence[int] | NDArray[np.uint64]", block: int) -> NDArray[np.int32]:
    """The tokens of whole blocks: int32 [blocks * block] (REPLAY-2). O(blocks * block).

    A block begins with its id, the lower 32 bits as token 0 and the upper ones as token 1; token
    `offset` beyond them is `offset` itself.
    """
    ids = np.asarray(hash_ids, dtype="<u8")
    if block == 1 and (ids >> 32).any():
        raise ContractError("REPLAY-2: blocks of 1 token cannot tell ids of 2^32 and more apart")
    tokens = np.empty((len(ids), block), dtype=np.int32)
    tokens[:] = _offsets(block)
    tokens[:, :2] = ids.view("<i4").reshape(-1, 2)[:, :block]
    return tokens.reshape(-1)


@cache
def _offsets(block: int) -> NDArray[np.int32]:
    return np.arange(block, dtype=np.int32)


def _refuse(path: str | Path, line: int, reason: str) -> NoReturn:
    raise TraceError(f"REPLAY-1: {path}:{line}: {reason}")


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        zipped = file.peek(len(_GZIP)).startswith(_GZIP)
        number = 0
        try:
            for line in gzip.GzipFile(fileobj=file) if zipped else file:
                number += 1
                yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            _refuse(path, number + 1, f"the gzip stream is broken: {error}")


def _request(line: bytes) -> TraceRequest:
    try:
        given = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}" if line.strip() else "the line is empty") from None
    if not isinstance(given, dict):
        raise ValueError(f"not an object but {type(given).__name__}")
    for name in TraceRequest._fields:
        if name not in given:
            raise ValueError(f"{name} is missing")
    for name in ("input_length", "output_length"):
        if type(given[name]) is not int or not 0 <= given[name] < _TOKENS_END:
            raise ValueError(f"{name} is {_short(given[name])}, not a number of tokens below 2^31")
    timestamp, ids = given["timestamp"], given["hash_ids"]
    if type(timestamp) not in (int, float) or not 0 <= timestamp < math.inf:
        raise ValueError(f"timestamp is {_short(timestamp)}, not a time in milliseconds")
    if not isinstance(ids, list):
        raise ValueError(f"hash_ids is {_short(ids)}, not a list")
    for id_ in ids:
        if type(id_) is not int or not 0 <= id_ < _IDS_END:
            raise ValueError(f"hash_ids has {_short(id_)}, not an integer of [0, 2^64)")
    return TraceRequest(
        timestamp=float(timestamp),
        input_length=given["input_length"],
        output_length=given["output_length"],
        hash_ids=np.array(ids, dtype=np.uint64),
    )


def _narrow(request: TraceRequest, low: int, high: int) -> tuple[int, int]:
    """The block sizes of [low, high] that fit the request too; ValueError if none does."""
    length, blocks = request.input_length, len(request.hash_ids)
    if blocks == 0:
        fitting = (low, high) if length == 0 else (1, 0)
    else:
        longest = (length - 1) // (blocks - 1) if blocks > 1 else high
        fitting = max(low, -(-length // blocks)), min(high, longest)
    if length == 0 < blocks or fitting[0] > fitting[1]:
        known = f"blocks of {low} tokens" if low == high else "any block size that fits so far"
        raise ValueError(f"input_length {length} and {blocks} hash_ids do not fit {known}")
    return fitting


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
