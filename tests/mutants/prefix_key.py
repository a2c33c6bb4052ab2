"""Broken keys. Each must fail on the clause it breaks."""

import hashlib
import zlib
from typing import Any

import kvspec.oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.prefix_key import PrefixKeyConformance
from kvspec.oracle import namespace_frame, page_hashes
from kvspec.prefix_key import key_parts, key_words, namespace_seed

registry = Registry(PrefixKeyConformance, kvspec.oracle)


def _chain(seed: bytes, token_ids: Any, page_size: int, extra_key: Any = None) -> list[bytes]:
    """The rule of KEY-3 after another seed."""
    if page_size < 1 or extra_key is None:
        return page_hashes(token_ids, page_size, extra_key)
    words, hashes = key_words(key_parts(token_ids, extra_key)[0]).tolist(), []
    for start in range(0, len(words) - page_size + 1, page_size):
        page = b"".join(w.to_bytes(4, "little", signed=True) for w in words[start:][:page_size])
        hashes.append(seed := hashlib.sha256(seed + page).digest())
    return hashes


def _named(token_ids: Any, extra_key: Any) -> tuple[Any, Any]:
    own = getattr(token_ids, "extra_key", None)
    return getattr(token_ids, "token_ids", token_ids), extra_key if own is None else own


@registry.mutant("KEY-1", replaces="page_hashes")
def wraps_large_tokens(token_ids: Any, page_size: int, extra_key: Any = None) -> list[bytes]:
    if isinstance(token_ids, list) and all(type(token) is int for token in token_ids):
        token_ids = [(token + 2**31) % 2**32 - 2**31 for token in token_ids]
    return page_hashes(token_ids, page_size, extra_key)


@registry.mutant("KEY-1", replaces="page_hashes", reports=("KT-2184",))
def drops_the_namespace_of_a_key(
    token_ids: Any, page_size: int, extra_key: Any = None
) -> list[bytes]:
    """Carried along by the request, and never delivered."""
    return page_hashes(getattr(token_ids, "token_ids", token_ids), page_size, extra_key)


@registry.mutant(
    "KEY-2", "KEY-4", "KEY-6", replaces="namespace_frame", reports=("SEED-31", "SE-18")
)
def joins_parts(extra_key: Any) -> bytes:
    """('ab', 'c') is ('a', 'bc')."""
    if isinstance(extra_key, tuple) and all(isinstance(part, str) for part in extra_key):
        return namespace_frame("".join(extra_key))
    return namespace_frame(extra_key)


@registry.mutant("KEY-2", "KEY-4", "KEY-6", replaces="namespace_frame", reports=("VL-44701",))
def leaves_out_what_is_none(extra_key: Any) -> bytes:
    """(name, None) is (None, name): a LoRA's name is a tenant's salt."""
    if isinstance(extra_key, tuple):
        extra_key = tuple(part for part in extra_key if part is not None)
    return namespace_frame(extra_key)


@registry.mutant("KEY-2", "KEY-4", "KEY-6", replaces="namespace_frame", reports=("VL-42495",))
def forgets_types(extra_key: Any) -> bytes:
    """Reloading weights as version 1 or '1' is the same namespace."""
    return namespace_frame(str(extra_key) if type(extra_key) is int else extra_key)


@registry.mutant("KEY-2", "KEY-4", "KEY-6", replaces="namespace_frame", reports=("INV-029",))
def takes_an_empty_name_for_none(extra_key: Any) -> bytes:
    return namespace_frame(None if extra_key == "" else extra_key)


@registry.mutant(
    "KEY-3",
    "KEY-1",
    "KEY-4",
    "KEY-6",
    replaces="page_hashes",
    reports=("SG-26785", "VL-51640", "INV-076"),
)
def leaves_the_namespace_out(token_ids: Any, page_size: int, extra_key: Any = None) -> list[bytes]:
    key_parts(token_ids, extra_key)
    return page_hashes(getattr(token_ids, "token_ids", token_ids), page_size)


@registry.mutant(
    "KEY-3", "KEY-1", "KEY-5", "KEY-6", "KEY-4", replaces="page_hashes", reports=("SE-17",)
)
def hashes_pages_alone(token_ids: Any, page_size: int, extra_key: Any = None) -> list[bytes]:
    """A hash that does not know what comes before its page."""
    return [
        hashlib.sha256(h + bytes(key_words(key_parts(token_ids)[0])[i * page_size :][:1])).digest()
        for i, h in enumerate(page_hashes(token_ids, page_size, extra_key))
    ]


@registry.mutant("KEY-4", "KEY-6", replaces="page_hashes")
def pads_the_name_to_whole_words(
    token_ids: Any, page_size: int, extra_key: Any = None
) -> list[bytes]:
    """A first page of tokens in the empty namespace can have the digest that is the seed."""
    tokens, name = _named(token_ids, extra_key)
    page_hashes(token_ids, page_size, extra_key)
    image = b"kvspec namespace" + namespace_frame(name)
    return _chain(hashlib.sha256(image + bytes(-len(image) % 4)).digest(), tokens, page_size, name)


@registry.mutant("KEY-5", "KEY-3", replaces="page_hashes")
def pads_the_last_page(token_ids: Any, page_size: int, extra_key: Any = None) -> list[bytes]:
    page_hashes(token_ids, page_size, extra_key)
    tokens, name = _named(token_ids, extra_key)
    words = key_words(tokens).tolist()
    return page_hashes([*words, *[0] * (-len(words) % page_size)], page_size, name)


@registry.mutant("KEY-6", "KEY-4", replaces="page_hashes", reports=("VL-21161",))
def seeds_with_the_hash_of_python(
    token_ids: Any, page_size: int, extra_key: Any = None
) -> list[bytes]:
    """hash() of a text has another value in every process."""
    tokens, name = _named(token_ids, extra_key)
    page_hashes(token_ids, page_size, extra_key)
    seed = zlib.crc32(repr(hash(namespace_frame(name))).encode()).to_bytes(4, "little")
    return _chain(namespace_seed(b"seeded" + seed), tokens, page_size, name)
