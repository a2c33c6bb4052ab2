"""Keys of cached prefixes: tokens, namespaces, page hashes. Spec: KEY.

One function makes frames and one makes hashes, for the oracle, the core, events, stores and
routers. Neither numpy nor torch is imported: their arrays and tensors come in as buffers.

A *frame* is a namespace in bytes. The frame of None is empty; any other is made of

    tag (1 byte), length of the payload (8 bytes, little-endian), payload

    tag   payload
    s     a str, UTF-8 (a lone surrogate as its three bytes)
    b     bytes
    i     an int, two's complement, little-endian, in the fewest bytes
    t     a tuple: the frames of its items, one after the other
    n     None inside a tuple: nothing

Tag and length say where a frame ends, so no two names share one (KEY-2).
"""

import hashlib
import operator
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

from kvspec.errors import ContractError

if TYPE_CHECKING:
    from kvspec.interfaces.prefix_key import ExtraKey, RadixKeyLike, Tokens

__all__ = [
    "RadixKey",
    "key_parts",
    "key_words",
    "little_endian",
    "namespace_frame",
    "namespace_seed",
    "next_hashes",
    "page_hashes",
    "unframe_namespace",
]

_HEAD = 9
_SEED_PREFIX = b"kvspec namespace"
_INTEGER_FORMATS = frozenset("bBhHiIlLqQnN")


@dataclass(frozen=True, slots=True, eq=False)
class RadixKey:
    """Tokens and what selects their namespace (KEY-1). Two keys are compared by identity."""

    token_ids: "Tokens"
    extra_key: "ExtraKey" = None

    def __len__(self) -> int:
        return len(cast("Any", self.token_ids))  # a nested RadixKey has a length too


def key_parts(key: "Tokens", extra_key: "ExtraKey" = None) -> "tuple[Tokens, bytes]":
    """The tokens of a key as they were given, and the frame of its namespace (KEY-1, KEY-2).

    A RadixKey brings its own extra_key; another one beside it is refused. O(length of the name).
    """
    while hasattr(key, "token_ids"):
        radix_key = cast("RadixKeyLike", key)
        inner = radix_key.extra_key
        frames = {namespace_frame(name) for name in (inner, extra_key) if name is not None}
        if len(frames) == 2:
            raise ContractError(
                f"KEY-1: a key of namespace {inner!r} was given with extra_key={extra_key!r}"
            )
        extra_key = extra_key if inner is None else inner
        key = radix_key.token_ids
    return key, namespace_frame(extra_key)


def key_words(tokens: "Tokens") -> memoryview:
    """Checked tokens as contiguous native 32-bit integers (KEY-1): memoryview of format `i`.

    No copy of a contiguous buffer or CPU tensor of 32-bit integers, else O(tokens).
    """
    view = _buffer(tokens)
    if view is None:
        if not isinstance(tokens, Sequence) or isinstance(tokens, str):
            _refuse_type(tokens)
        return memoryview(_narrow(tokens))
    if view.ndim != 1:
        raise ContractError(f"KEY-1: the tokens have {view.ndim} dimensions, not 1")
    if view.format.removeprefix("@") not in _INTEGER_FORMATS:
        raise ContractError(f"KEY-1: tokens of the buffer format {view.format!r} are not integers")
    if view.format in ("i", "@i") and view.c_contiguous:
        return view
    return memoryview(_narrow(view.tolist()))


def _buffer(tokens: "Tokens") -> memoryview | None:
    """The memory of a buffer or of a CPU tensor; None for what has none."""
    try:
        return memoryview(cast("Any", tokens))  # trying is how a buffer is found out
    except TypeError:
        pass
    if not hasattr(tokens, "numpy"):
        return None
    try:
        return memoryview(cast("Any", tokens).numpy())
    except (TypeError, RuntimeError, ValueError) as error:
        raise ContractError(
            f"KEY-1: the tokens are not a CPU tensor of integers: {error}"
        ) from None


def _narrow(tokens: Sequence[int]) -> "array[int]":
    try:
        return array("i", tokens)
    except OverflowError:
        low, high = -(2**31), 2**31
        first = next(token for token in tokens if not low <= operator.index(token) < high)
        raise ContractError(f"KEY-1: token {first} is not in [-2^31, 2^31)") from None
    except TypeError:
        _refuse_type(tokens)


def _refuse_type(tokens: object) -> NoReturn:
    raise ContractError(f"KEY-1: {tokens!r:.80} is not a sequence of integers") from None


def namespace_frame(extra_key: "ExtraKey") -> bytes:
    """The name of a namespace in bytes; b"" for None alone (KEY-1, KEY-2). O(size of the name)."""
    return b"" if extra_key is None else _framed(extra_key)


def _framed(name: "ExtraKey") -> bytes:
    match name:
        case None:
            tag, payload = b"n", b""
        case bool():
            raise ContractError(f"KEY-1: {name!r} in an extra_key is a bool; give an int or a str")
        case str():
            tag, payload = b"s", name.encode("utf-8", "surrogatepass")
        case bytes():
            tag, payload = b"b", bytes(name)
        case int():
            length = (name if name >= 0 else ~name).bit_length() // 8 + 1
            tag, payload = b"i", name.to_bytes(length, "little", signed=True)
        case tuple():
            tag, payload = b"t", b"".join(map(_framed, name))
        case _:
            kind = type(name).__name__
            raise ContractError(
                f"KEY-1: {kind} in an extra_key is not None, str, bytes, int or tuple"
            )
    return tag + len(payload).to_bytes(8, "little") + payload


def unframe_namespace(frame: bytes) -> "ExtraKey":
    """The extra_key whose frame this is: the inverse of `namespace_frame` (KEY-2)."""
    if not frame:
        return None
    try:
        (name,) = _unframed(frame)
    except ValueError:
        name = None
    if namespace_frame(name) != frame:
        raise ContractError(f"KEY-2: {frame!r:.80} is not the frame of a namespace")
    return name


def _unframed(frames: bytes) -> "Iterator[ExtraKey]":
    at = 0
    while at < len(frames):
        start = at + _HEAD
        end = start + int.from_bytes(frames[at + 1 : start], "little")
        tag, payload = frames[at : at + 1], frames[start:end]
        at = end
        match tag:
            case b"s":
                yield payload.decode("utf-8", "surrogatepass")
            case b"b":
                yield payload
            case b"i":
                yield int.from_bytes(payload, "little", signed=True)
            case b"t":
                yield tuple(_unframed(payload))
            case b"n":
                yield None
            case _:
                raise ValueError(f"{tag!r} is not the tag of a frame")


def namespace_seed(frame: bytes) -> bytes:
    """What stands before the first page (KEY-3, KEY-4): b"" for the empty frame, else 32 bytes.

    SHA-256 of `kvspec namespace`, the frame, and a zero byte if their length is a multiple of four.
    Whatever the empty namespace hashes is whole tokens, and a digest before them: a multiple of
    four bytes. So a seed is no digest of the empty namespace, short of a collision of SHA-256.
    """
    if not frame:
        return b""
    image = _SEED_PREFIX + frame
    return hashlib.sha256(image + bytes(len(image) % 4 == 0)).digest()


def page_hashes(token_ids: "Tokens", page_size: int, extra_key: "ExtraKey" = None) -> list[bytes]:
    """The digest of each whole page, 32 bytes each, the first page first.

    SHA-256 of the digest before it and its tokens as little-endian 32-bit words (KEY-3); before
    the first stands the namespace's seed (KEY-4). Tokens beyond the last whole page do not count
    (KEY-5), and nothing but the arguments enters (KEY-6). O(tokens).
    """
    if page_size < 1:
        raise ContractError(f"KEY-3: page_size {page_size} is not positive")
    tokens, frame = key_parts(token_ids, extra_key)
    return next_hashes(namespace_seed(frame), little_endian(key_words(tokens)), page_size)


def next_hashes(before: bytes, octets: "bytes | memoryview", page_size: int) -> list[bytes]:
    """The digests of the whole pages that follow the page of digest `before`, or a seed (KEY-3).

    `octets` are their tokens as little-endian 32-bit words. O(tokens).
    """
    step = 4 * page_size
    hashes = []
    for start in range(0, len(octets) - step + 1, step):
        before = hashlib.sha256(before + octets[start : start + step]).digest()
        hashes.append(before)
    return hashes


def little_endian(words: memoryview) -> memoryview:
    """Words of `key_words` as bytes, the least significant first. No copy where they are."""
    if sys.byteorder == "big":
        swapped = array("i", words)
        swapped.byteswap()
        words = memoryview(swapped)
    return words.cast("B")
