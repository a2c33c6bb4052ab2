"""Sequences without sharing, and with sharing that must end at a namespace."""

import hashlib
import itertools
from typing import Any

import pytest

from kvspec.conformance.suite import Conformance
from sequences.engine import Engine
from sequences.report import report

__all__ = ["Keys", "Sharing"]


class Sharing(Conformance):
    """Who shares what with whom."""

    @report("VLA-2083", clause="CACHE-18")
    def test_with_sharing_off_a_reused_page_remembers_nothing(self) -> None:
        engine = Engine(self.impl, page_size=2, page_count=4, disable=True)
        for _ in range(3):
            assert engine.serve([1, 2, 3, 4, 5, 6]) == 0
            assert engine.allocator.available_size() == 8
        engine.settle()

    @report("SE-25", clause="CHUNK-2")
    @pytest.mark.parametrize("output", [(), (7,), (7, 8)])
    def test_the_whole_row_comes_back_whatever_was_sampled(self, output: Any) -> None:
        engine = Engine(self.impl, page_size=2, cache="ChunkCache")
        engine.sample(engine.admit([1, 2, 3]), *output)
        assert engine.allocator.available_size() == 32
        engine.settle()

    @report("SE-19", clause="CHUNK-1")
    def test_the_prefix_of_a_chunk_is_not_the_row_itself(self) -> None:
        engine = Engine(self.impl, cache="ChunkCache")
        req = engine.admit([1, 2, 3])
        engine.chunk(req, 2)
        row = engine.row(req)

        req.prefix_indices.fill_(7)

        assert engine.row(req) == row
        engine.settle()

    @report("SE-19", clause="CHUNK-3")
    def test_a_key_may_be_given_by_position_or_name(self) -> None:
        cache = Engine(self.impl, cache="ChunkCache").cache
        for found in (cache.match_prefix([1, 2]), cache.match_prefix(key=[1, 2])):
            assert len(found.device_indices) == 0

    @report("KT-2184", "MILES-2783", "VL-42495", "SEED-31", "SE-18", clause="RADIX-2")
    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            ("salt a", "salt b"),
            ("salt", None),
            (("salt", "ab", "c"), ("salt", "a", "bc")),
            (("adapter", "x", 1), ("adapter", "x", 2)),
            (("weights", 1), ("weights", 2)),
            (("adapter", "x"), ("salt", "x")),
            ("1", 1),
        ],
    )
    def test_requests_of_other_namespaces_share_nothing(self, ours: Any, theirs: Any) -> None:
        engine = Engine(self.impl, page_size=2)
        engine.serve([1, 2, 3, 4], extra_key=ours)

        assert engine.serve([1, 2, 3, 4], extra_key=theirs) == 0

        assert engine.serve([1, 2, 3, 4, 5], extra_key=ours) == 4
        engine.settle()

    @report("LMD-4917", clause="CACHE-15")
    def test_after_new_weights_nothing_old_is_found(self) -> None:
        engine = Engine(self.impl)
        engine.serve([1, 2, 3])
        old = engine.cache.match_prefix([1, 2, 3]).last_device_node

        engine.cache.reset()

        assert engine.cached([1, 2, 3]) == 0
        assert engine.cache.resolve(old) is None
        assert engine.allocator.available_size() == 16
        engine.settle()


class Keys(Conformance):
    """Namespaces and page hashes."""

    @report("VL-44701", "SE-18", "SEED-31", clause="KEY-2")
    def test_namespaces_of_different_parts_have_different_frames(self) -> None:
        names: list[Any] = [None, "", b"", 0, (), ("",), "ab", b"ab", ("ab",), ("a", "b")]
        names += [(("a",), "b"), ("a", ("b",)), ("x", None), (None, "x"), ("x1", 2), ("x", 12)]
        names += ["1", 1, -1, 255]
        frames = [self.impl.namespace_frame(name) for name in names]
        assert len(set(frames)) == len(names)

    @report("SG-26785", "VL-51640", clause="KEY-4")
    def test_page_hashes_cover_the_namespace(self) -> None:
        tokens = [1, 2, 3, 4]
        hashes = [self.impl.page_hashes(tokens, 2, extra_key=key) for key in (None, "a", "b")]
        assert len(set(itertools.chain.from_iterable(hashes))) == 6

    @report("VL-21161", clause="KEY-6")
    def test_page_hashes_are_those_of_any_other_process(self) -> None:
        first = hashlib.sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0])).digest()
        second = hashlib.sha256(first + bytes([3, 0, 0, 0] * 2)).digest()
        assert self.impl.page_hashes([1, 2, 3, 3], 2) == [first, second]

    @report("SE-17", clause="KEY-3")
    def test_equal_pages_at_different_positions_have_different_hashes(self) -> None:
        assert len(set(self.impl.page_hashes([5, 6] * 4, 2))) == 4
