"""Conformance of replaying a trace. Spec: REPLAY."""

import gzip
import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

import kvspec.oracle
import kvspec.replay
from kvspec.conformance import clause
from kvspec.conformance.suite import Conformance
from kvspec.conformance.watch import watch_function
from kvspec.interfaces.radix_cache import EvictionPolicy
from kvspec.replay import LockstepError, Run, Trace, TraceError, TraceRequest

__all__ = ["ReplayConformance", "busy_requests", "trace_of"]

GOOD = {"timestamp": 0, "input_length": 6, "output_length": 1, "hash_ids": [7, 8]}
BROKEN = gzip.compress(json.dumps(GOOD).encode())[:-9]

# policy -> hit_blocks, hit_tokens, evictions of `busy_requests()` in a simulation of pages.
COUNTS = {
    "lru": (542, 2120, 365),
    "mru": (475, 1867, 432),
    "fifo": (523, 2044, 384),
    "filo": (542, 2119, 365),
    "lfu": (582, 2290, 325),
    "slru": (571, 2243, 336),
    "priority": (542, 2120, 365),
}


def trace_of(*requests: tuple[Sequence[int], int], block: int = 4) -> Trace:
    """A trace of (hash_ids, input_length)."""
    made = [
        TraceRequest(float(at), length, 0, np.array(ids, dtype=np.uint64))
        for at, (ids, length) in enumerate(requests)
    ]
    return Trace(name="made here", block=block, requests=made)


def busy_requests(count: int = 150, seed: int = 1) -> Iterator[tuple[list[int], int]]:
    """(ids, input_length) in blocks of 4: texts come whole, cut anywhere, or cut and continued."""
    state = seed

    def draw(below: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % below

    for _ in range(count):
        text = 10 * draw(5)
        kept = 6 if draw(2) else 1 + draw(6)
        ids = [*range(text, text + kept), *(100 + draw(3) for _ in range(draw(3)))]
        yield ids, 4 * len(ids) - draw(4)


@contextmanager
def _file(content: bytes) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        path.write_bytes(content)
        yield path


class ReplayConformance(Conformance):
    """`impl` may also hold functions of the room, which then stand in for those of kvspec."""

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the room, watched."""
        given = getattr(self.impl, name, None)
        function = given if inspect.isfunction(given) else getattr(kvspec.replay, name)
        return watch_function(self.impl_name, function, "replay")

    def replay(self, trace: Trace, capacity: int, **options: Any) -> Run:
        run: Run = self.function("replay")(trace, impl=self.impl, capacity=capacity, **options)
        assert run.leaks == ""
        return run

    @clause("REPLAY-1")
    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("", "the line is empty"),
            ("{", "not JSON"),
            ("\xff", "not JSON"),
            ("[" * 100_000, "not JSON"),
            ("[1, 2]", "not an object but list"),
            (json.dumps({**GOOD, "timestamp": -1}), "timestamp is -1"),
            (json.dumps({**GOOD, "timestamp": float("nan")}), "NaN is not a number"),
            (json.dumps({**GOOD, "timestamp": "now"}), 'timestamp is "now"'),
            (json.dumps({k: v for k, v in GOOD.items() if k != "hash_ids"}), "hash_ids is missing"),
            (json.dumps({**GOOD, "input_length": 6.0}), "input_length is 6.0"),
            (json.dumps({**GOOD, "input_length": True}), "input_length is true"),
            (json.dumps({**GOOD, "output_length": -1}), "output_length is -1"),
            (json.dumps({**GOOD, "hash_ids": 7}), "hash_ids is 7, not a list"),
            (json.dumps({**GOOD, "hash_ids": [7, "8"]}), 'hash_ids has "8"'),
            (json.dumps({**GOOD, "hash_ids": [7, -8]}), "hash_ids has -8"),
            (json.dumps({**GOOD, "hash_ids": [7, 2**64]}), f"hash_ids has {2**64}"),
            (json.dumps({**GOOD, "input_length": 4}), "4 and 2 hash_ids do not fit blocks of 4"),
            (json.dumps({**GOOD, "input_length": 9}), "9 and 2 hash_ids do not fit blocks of 4"),
            (json.dumps({**GOOD, "hash_ids": []}), "6 and 0 hash_ids do not fit"),
            (json.dumps({**GOOD, "input_length": 0, "hash_ids": [7]}), "0 and 1 hash_ids do not"),
        ],
    )
    def test_a_malformed_line_is_refused_with_file_line_and_reason(
        self, line: str, reason: str
    ) -> None:
        good = json.dumps(GOOD)
        with (
            _file(f"{good}\n{good}\n{line}\n{good}\n".encode("latin-1")) as path,
            pytest.raises(TraceError, match=re.escape(f"REPLAY-1: {path}:3: ")) as caught,
        ):
            self.function("read_trace")(path, 4)
        assert reason in str(caught.value)

    @clause("REPLAY-1")
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "1: the file holds no request"),
            (gzip.compress(b""), "1: the file holds no request"),
            (BROKEN, "1: the gzip stream is broken"),
            (b"\x1f\x8bnonsense", "1: the gzip stream is broken"),
            (json.dumps(GOOD).encode(), "1: blocks of 3 to 5 tokens fit every line"),
            (
                b'{"timestamp":0,"input_length":6,"output_length":1,"hash_ids":[7]}',
                "6 tokens or more",
            ),
        ],
        ids=["empty", "empty-gz", "cut-gz", "no-gz", "ambiguous", "unbounded"],
    )
    def test_a_file_that_says_too_little_is_refused(self, content: bytes, reason: str) -> None:
        with _file(content) as path, pytest.raises(TraceError, match=re.escape(reason)):
            self.function("read_trace")(path)

    @clause("REPLAY-1")
    @pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
    def test_what_fits_is_read_and_the_block_inferred(self, end: str, packed: bool) -> None:
        lines = [GOOD, {**GOOD, "input_length": 17, "hash_ids": [1, 2, 3, 4, 5], "more": None}]
        content = end.join(map(json.dumps, lines)).encode()
        with _file(gzip.compress(content) if packed else content) as path:
            trace = self.function("read_trace")(path)
        assert trace.block == 4
        assert [list(request.hash_ids) for request in trace.requests] == [[7, 8], [1, 2, 3, 4, 5]]
        assert (trace.tokens, trace.blocks) == (23, 7)

    @clause("REPLAY-2")
    def test_tokens_are_the_same_everywhere(self) -> None:
        tokens = self.function("block_tokens")([0, 1, 2**40 + 5], 64)
        assert tokens.dtype == np.int32
        assert tokens[:3].tolist() == [0, 0, 2]
        assert hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()[:16] == "8041ba0b90558cee"

    @clause("REPLAY-2")
    @pytest.mark.parametrize("block", [1, 2, 3, 64])
    def test_different_ids_give_different_pages(self, block: int) -> None:
        ids = [0, 1, 2, 2**31, 2**32 - 1, *([2**32, 2**32 + 1, 2**63, 2**64 - 1] * (block > 1))]
        pages = self.function("block_tokens")(ids, block).reshape(len(ids), block)
        assert len({page.tobytes() for page in pages}) == len(ids)
        again = self.function("block_tokens")(ids[::-1], block).reshape(len(ids), block)
        assert (again[::-1] == pages).all()

    @clause("REPLAY-3")
    def test_a_short_last_block_takes_a_page_and_its_padding_is_not_counted(self) -> None:
        run = self.replay(trace_of(([1, 2, 3], 9), ([1, 2, 3], 9)), capacity=4)
        assert (run.tokens, run.blocks, run.slots_allocated) == (18, 6, 12)
        assert (run.hit_blocks, run.hit_tokens) == (3, 9)

    @clause("REPLAY-3")
    def test_a_request_longer_than_the_cache_keeps_its_first_blocks(self) -> None:
        run = self.replay(trace_of(([1, 2, 3, 4], 16), ([1, 2, 3, 4], 13), ([5], 1)), capacity=2)
        assert (run.hit_blocks, run.hit_tokens, run.evictions) == (2, 8, 1)
        assert run.slots_allocated == 12

    @clause("REPLAY-3")
    def test_a_request_without_tokens_takes_nothing(self) -> None:
        run = self.replay(trace_of(([], 0), ([1], 1), ([], 0)), capacity=1)
        assert (run.requests, run.slots_allocated, run.hit_blocks) == (3, 4, 0)

    @clause("REPLAY-4")
    def test_hits_and_evictions_are_counted_in_blocks_and_tokens(self) -> None:
        trace = trace_of(([1, 2, 3], 12), ([1, 2, 4], 10), ([9], 4), ([1, 2], 7))
        run = self.replay(trace, capacity=4)
        assert (run.hit_blocks, run.hit_tokens, run.evictions) == (4, 15, 1)

    @clause("REPLAY-5")
    @pytest.mark.parametrize("policy", get_args(EvictionPolicy))
    def test_counts_are_those_of_single_pages(self, policy: str) -> None:
        run = self.replay(trace_of(*busy_requests()), capacity=24, policy=policy)
        assert (run.hit_blocks, run.hit_tokens, run.evictions) == COUNTS[policy]

    @clause("REPLAY-6")
    @pytest.mark.parametrize("length", [5, 8])
    def test_the_last_token_is_left(self, length: int) -> None:
        trace = trace_of(*itertools.repeat(([1, 2], length), 3))
        run = self.replay(trace, capacity=2, leave_last_token=True)
        assert (run.hit_blocks, run.hit_tokens) == (2, 8)

    @clause("REPLAY-6")
    def test_a_whole_input_hits_where_its_last_token_is_cut_off(self) -> None:
        trace = trace_of(([1, 2, 3], 12), ([1, 2, 3], 12))
        assert self.replay(trace, capacity=2, leave_last_token=True).hit_blocks == 2

    @clause("REPLAY-7")
    @pytest.mark.parametrize("granularity", ["page", "node"])
    def test_equal_implementations_pass(self, granularity: str) -> None:
        trace = trace_of(*busy_requests(60))
        options: dict[str, Any] = {"granularity": granularity, "policy": "slru"}
        verified = self.replay(trace, capacity=9, verify=kvspec.oracle, **options)
        plain = self.replay(trace, capacity=9, **options)
        assert verified._replace(seconds=0) == plain._replace(seconds=0)

    @clause("REPLAY-7")
    @pytest.mark.parametrize(
        ("broken", "what"),
        [("evict", "request 2: evicted tokens"), ("digest", "request 0: cache.digest()")],
    )
    def test_a_difference_names_the_request(self, broken: str, what: str) -> None:
        class Different(kvspec.oracle.RadixCache):
            pass

        def different(self: Any, *arguments: Any) -> int:
            result: int = getattr(kvspec.oracle.RadixCache, broken)(self, *arguments)
            return result + 1

        setattr(Different, broken, different)
        names = {name: getattr(kvspec.oracle, name) for name in kvspec.oracle.__all__}
        other = SimpleNamespace(**{**names, "RadixCache": Different, "__name__": "different"})
        trace = trace_of(([1], 4), ([1, 2], 8), ([3], 4))
        with pytest.raises(LockstepError, match=re.escape(f"REPLAY-7: {what}")):
            self.function("replay")(trace, impl=self.impl, capacity=2, verify=other)

    @clause("REPLAY-8")
    def test_the_workload_is_the_same_everywhere(self) -> None:
        trace = self.function("generate")(seed=3, requests=200, block=16)
        text = json.dumps([[*r[:3], r.hash_ids.tolist()] for r in trace.requests])
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e4042aaffc9ab8fc"
