"""Keys and page hashes: the suite, golden vectors from outside, other processes."""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.prefix_key import NAMES, PrefixKeyConformance, names
from kvspec.errors import ContractError
from kvspec.prefix_key import RadixKey, key_parts, key_words, namespace_frame, unframe_namespace


class TestOracle(PrefixKeyConformance):
    impl = kvspec.oracle


class TestNative(PrefixKeyConformance):
    impl = kvspec


@clause("KEY-3")
def test_the_rule_written_out() -> None:
    """Bytes by hand: no struct, no array, no code of ours."""
    first = hashlib.sha256(b"\x01\x00\x00\x00" + b"\xff\xff\xff\xff").digest()
    second = hashlib.sha256(first + b"\x00\x00\x00\x80" + b"\xff\xff\xff\x7f").digest()
    assert kvspec.page_hashes([1, -1, -(2**31), 2**31 - 1, 9], 2) == [first, second]


@clause("KEY-4")
def test_a_seed_written_out() -> None:
    """`kvspec namespace` (16 bytes), tag, length, name: 28 bytes with abc, so a zero follows."""
    image = b"kvspec namespace" + b"s" + b"\x03\x00\x00\x00\x00\x00\x00\x00" + b"abc" + b"\x00"
    assert len(image) == 29
    seed = hashlib.sha256(image).digest()
    page = hashlib.sha256(seed + b"\x05\x00\x00\x00").digest()
    assert kvspec.page_hashes([5], 1, "abc") == [page]


_PRINT = """
from kvspec.prefix_key import namespace_frame, page_hashes
for name in (None, "tenant", b"tenant", 7, ("lora", None, ("salt", -1))):
    print(namespace_frame(name).hex(), [h.hex() for h in page_hashes(range(-8, 8), 4, name)])
"""


@clause("KEY-6")
def test_other_processes_agree() -> None:
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    printed = subprocess.run(
        [sys.executable, "-c", _PRINT],
        env={**os.environ, "PYTHONHASHSEED": other},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(_PRINT)
    assert printed == here.getvalue()
    assert printed.count("\n") == 5


@clause("KEY-2")
@given(names)
def test_a_frame_leads_back_to_its_name(name: Any) -> None:
    assert unframe_namespace(namespace_frame(name)) == name


@clause("KEY-2")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_comes_back_with_its_type(name: Any) -> None:
    back = unframe_namespace(namespace_frame(name))
    assert back == name
    assert type(back) is type(name)


@clause("KEY-2")
@pytest.mark.parametrize(
    "frame",
    [
        b"x",
        b"s",
        b"x" + bytes(8),
        b"s" + bytes(9),
        b"i" + bytes(8),
        b"i\x02" + bytes(9),
        b"n" + bytes(8),
        b"s\x01" + bytes(7) + b"\xff",
        b"s\xff" + bytes(7) + b"a",
        namespace_frame(1) * 2,
        namespace_frame(("a", "b"))[:-1],
    ],
)
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(ContractError, match=r"^KEY-2: "):
        unframe_namespace(frame)


@clause("KEY-1")
def test_words_of_a_32_bit_buffer_are_read_in_place() -> None:
    tokens = torch.tensor([1, 2, 3], dtype=torch.int32)
    for given_ in (tokens, tokens.numpy(), memoryview(tokens.numpy())):
        words = key_words(given_)
        tokens[1] = 7
        assert words.tolist() == [1, 7, 3]
        tokens[1] = 2
    assert key_words(np.array([], dtype=np.int64)).tolist() == []
    assert key_words([]).tolist() == []


@clause("KEY-1")
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=20, max_size=40))
def test_words_are_the_tokens(tokens: list[int]) -> None:
    for given_ in (tokens, np.array(tokens), torch.tensor(tokens)):
        words = key_words(given_)
        assert words.tolist() == tokens
        assert (words.format, words.itemsize, words.c_contiguous) == ("i", 4, True)


@clause("KEY-1")
def test_parts_of_a_key() -> None:
    tokens = [1, 2, 3]
    assert key_parts(tokens) == (tokens, b"")
    assert key_parts(tokens, "a") == (tokens, namespace_frame("a"))
    assert key_parts(RadixKey(tokens, "a")) == (tokens, namespace_frame("a"))
    assert key_parts(RadixKey(RadixKey(tokens, "a"))) == (tokens, namespace_frame("a"))
    assert key_parts(RadixKey(tokens), "a") == (tokens, namespace_frame("a"))
    with pytest.raises(ContractError, match=r"^KEY-1: "):
        key_parts(RadixKey(tokens, 1), "1")
