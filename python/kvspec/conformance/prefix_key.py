"""What every maker of keys and page hashes must do. Spec: KEY."""

import hashlib
import struct
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvspec.conformance import clause
from kvspec.conformance.suite import Conformance, fuzzing
from kvspec.conformance.watch import watch_function
from kvspec.errors import ContractError

__all__ = ["PrefixKeyConformance"]

LOW, HIGH = -(2**31), 2**31 - 1
TOKEN_KINDS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "numpy ints": lambda tokens: [np.int32(token) for token in tokens],
    "array of int32": lambda tokens: np.array(tokens, dtype=np.int32),
    "array of int64": lambda tokens: np.array(tokens, dtype=np.int64),
    "strided array": lambda tokens: np.repeat(np.array(tokens, dtype=np.int32), 2)[::2],
    "buffer": lambda tokens: memoryview(array("q", tokens)),
    "tensor of int32": lambda tokens: torch.tensor(tokens, dtype=torch.int32),
    "tensor of int64": lambda tokens: torch.tensor(tokens, dtype=torch.int64),
}
NOT_TOKENS: dict[str, Any] = {
    "too large": [1, 2**31],
    "too small": [1, -(2**31) - 1],
    "too large in a tensor": torch.tensor([2**31]),
    "too large in a buffer": np.array([2**40]),
    "floats": [1.0],
    "a tensor of floats": torch.tensor([1.0]),
    "a tensor of bools": torch.tensor([True]),
    "a buffer of floats": np.array([1.0]),
    "two dimensions": torch.tensor([[1]]),
    "no dimension": torch.tensor(1),
    "nested lists": [[1]],
    "text": "12",
    "a set": {1, 2},
    "a number": 5,
    "None": None,
    "a tensor elsewhere": torch.tensor([1], device="meta"),
}
NOT_NAMES: dict[str, Any] = {
    "a bool": True,
    "a float": 1.5,
    "a list": ["a"],
    "a float in a tuple": ("a", 1.5),
    "a bool in a tuple": (1, False),
}
NAMES: list[Any] = [
    *["", "a", "ab", "abc", "abcd", "\x00", "None", "1", "é", "\ud800"],
    *[b"", b"a", b"ab", b"\x00", b"None", b"1"],
    *[0, 1, -1, 127, 128, -128, -129, 255, 256, 2**31, 2**64, -(2**64)],
    *[(), (None,), (None, None), ((),), ("",), (b"",), (0,)],
    *[("a", "bc"), ("ab", "c"), ("abc",), ("abc", ""), ("", "abc"), ("a", b"bc"), ("a", ("bc",))],
    *[("a", None), (None, "a"), (("a",), None), (1, 2), (12,), ("1", 2), (1, "2")],
]
# Digests of pages of 2, from the rule of KEY-3 alone: printf '\1\0\0\0\2\0\0\0' | sha256sum
GOLDEN_EMPTY = [
    "34fb5c825de7ca4aea6e712f19d439c1da0c92c37b423936c5f618545ca4fa1f",
    "c57b445f90651b9a650e516ab2238c965b21af35608a31c303e6d9e407f2915c",
]
# First page of 2 in a namespace: the frame of the name and the seed do not change either.
GOLDEN_NAMED: list[tuple[Any, str]] = [
    ("", "31038c0d5c7673f8c20dee69aa48d0e8887eda2b96ad0cfea0c926765efb9105"),
    ("tenant", "9aecad92242f86f474dfc5e56a2ff8d13ee52651d586aa8747f58b9a541c872b"),
    (b"tenant", "a7750d330c0c3dc6c3696c1975314d8ceef0ccd4dae028bdf5217bbad77b832e"),
    (7, "4b0e0c8ee2f471ee48435091424b98eebc7b6a597a1568d89584dad3239f1a78"),
    (-129, "d7de5bf9bfa2fc96954009b0fddae9312ec48d641ecbe5ed6556e9c085e4bfda"),
    (2147483648, "db55042a23849dead45dc7d9af7ab4cbf7d1689cdf96d3cb52068b8af41b6c27"),
    ((), "eebd1cd27652872f24da89d78110e3a656ce5fe9f157a465a59b9da84db32db9"),
    (("lora", None), "732bc788ae2e6afc5c7ddfdbf90c1d5c6cfc548e49696e3abc8d0ed08f6addea"),
    ((None, "lora"), "6e37f05a6d64d531c1a727025bf92f01e185ed1d158d83f8348fcc8f64ad7235"),
    (("a", (7, b"b")), "3cef6f5bb3b382d5db4c11f18e79de61e233c5f0a99bbee041528f75137596b0"),
]

names = st.recursive(
    st.none() | st.text(max_size=3) | st.binary(max_size=3) | st.integers(-(2**40), 2**40),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
token_lists = st.lists(st.integers(LOW, HIGH), max_size=12)


def _typed(name: Any) -> Any:
    """A name with its types, so that 1 and True or "a" and b"a" are told apart."""
    return (type(name), tuple(map(_typed, name)) if isinstance(name, tuple) else name)


def _chain(before: bytes, tokens: list[int], page_size: int) -> list[bytes]:
    hashes = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = struct.pack(f"<{page_size}i", *tokens[start : start + page_size])
        before = hashlib.sha256(before + page).digest()
        hashes.append(before)
    return hashes


class PrefixKeyConformance(Conformance):
    """Tests of `RadixKey`, `namespace_frame` and `page_hashes`."""

    @property
    def hashes(self) -> Callable[..., list[bytes]]:
        return watch_function(self.impl_name, self.impl.page_hashes, "prefix_key")

    @property
    def frame(self) -> Callable[..., bytes]:
        return watch_function(self.impl_name, self.impl.namespace_frame, "prefix_key")

    @clause("KEY-1")
    @pytest.mark.parametrize("kind", TOKEN_KINDS)
    def test_tokens_come_in_many_kinds(self, kind: str) -> None:
        tokens = [LOW, -1, 0, HIGH]
        given = TOKEN_KINDS[kind](tokens)
        assert self.hashes(given, 2) == _chain(b"", tokens, 2)
        assert self.hashes(self.impl.RadixKey(given, "a"), 2) == self.hashes(tokens, 2, "a")

    @clause("KEY-1")
    @pytest.mark.parametrize("why", NOT_TOKENS)
    def test_what_is_no_token_is_refused(self, why: str) -> None:
        with pytest.raises(ContractError, match=r"^KEY-1: "):
            self.hashes(NOT_TOKENS[why], 1)

    @clause("KEY-1")
    @pytest.mark.parametrize("why", NOT_NAMES)
    def test_what_is_no_name_is_refused(self, why: str) -> None:
        with pytest.raises(ContractError, match=r"^KEY-1: "):
            self.frame(NOT_NAMES[why])
        with pytest.raises(ContractError, match=r"^KEY-1: "):
            self.hashes([1, 2], 1, NOT_NAMES[why])

    @clause("KEY-1")
    def test_a_key_has_one_namespace(self) -> None:
        key = self.impl.RadixKey([1, 2], "a")
        assert len(key) == 2
        assert self.hashes(key, 1, "a") == self.hashes([1, 2], 1, "a")
        assert self.hashes(self.impl.RadixKey([1, 2]), 1, "a") == self.hashes(key, 1)
        with pytest.raises(ContractError, match=r"^KEY-1: "):
            self.hashes(key, 1, "b")

    @clause("KEY-2")
    def test_frames_tell_names_apart(self) -> None:
        frames = {self.frame(name): name for name in NAMES}
        assert len(frames) == len(NAMES)
        assert self.frame(None) == b""
        assert b"" not in frames

    @clause("KEY-2")
    def test_any_two_frames(self) -> None:
        @fuzzing()
        @given(names, names)
        def compare(one: Any, other: Any) -> None:
            assert (self.frame(one) == self.frame(other)) == (_typed(one) == _typed(other))
            assert (self.frame(one) == b"") == (one is None)

        compare()

    @clause("KEY-3", "KEY-6")
    def test_golden_vectors(self) -> None:
        assert [h.hex() for h in self.hashes([1, 2, 3, 4, 5], 2)] == GOLDEN_EMPTY

    @clause("KEY-3", "KEY-5")
    def test_the_chain_of_the_empty_namespace(self) -> None:
        @fuzzing()
        @given(token_lists, st.integers(1, 5))
        def compare(tokens: list[int], page_size: int) -> None:
            assert self.hashes(tokens, page_size) == _chain(b"", tokens, page_size)

        compare()

    @clause("KEY-3", "KEY-5")
    @pytest.mark.parametrize("name", NAMES)
    def test_the_chain_of_a_namespace(self, name: Any) -> None:
        hashes = self.hashes([1, 2, 3, 4, 5], 2, name)
        assert len(hashes) == 2
        first = hashes[0]
        assert hashes[1:] == _chain(first, [3, 4], 2)
        assert len(first) == 32
        assert self.hashes([1, 2], 2, name) == [first]

    @clause("KEY-3")
    def test_namespaces_share_no_hash(self) -> None:
        hashes = [h for name in [None, *NAMES] for h in self.hashes([1, 2, 1, 2], 2, name)]
        assert len(set(hashes)) == len(hashes) == 2 * len(NAMES) + 2

    @clause("KEY-3")
    def test_a_page_size_is_positive(self) -> None:
        for page_size in (0, -1):
            with pytest.raises(ContractError, match=r"^KEY-3: "):
                self.hashes([1, 2], page_size)

    @clause("KEY-4", "KEY-6")
    @pytest.mark.parametrize("name", NAMES)
    def test_a_namespace_starts_where_no_tokens_lead(self, name: Any) -> None:
        """The seed is the digest of a text that no row of 32-bit words is, padded or not."""
        image = b"kvspec namespace" + self.frame(name)
        image += b"\x00" * (len(image) % 4 == 0)
        assert len(image) % 4 != 0
        seed = hashlib.sha256(image).digest()
        assert self.hashes([1, 2], 2, name) == _chain(seed, [1, 2], 2)

    @clause("KEY-5")
    @pytest.mark.parametrize("name", [None, "a"])
    def test_the_tail_does_not_count(self, name: Any) -> None:
        whole = self.hashes([1, 2, 3, 4], 4, name)
        for tail in ([], [5], [5, 6, 7], [0, 0, 0]):
            assert self.hashes([1, 2, 3, 4, *tail], 4, name) == whole
        assert self.hashes([1, 2, 3], 4, name) == []
        assert self.hashes([], 4, name) == []

    @clause("KEY-6")
    @pytest.mark.parametrize(("name", "digest"), GOLDEN_NAMED)
    def test_golden_vectors_of_namespaces(self, name: Any, digest: str) -> None:
        assert self.hashes([1, 2], 2, name)[0].hex() == digest
