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
from kvspec.errors import ContractError, MemoryLeakError
from kvspec.flight_recorder import FlightRecorder, read_log
from kvspec.flight_recorder.events import CacheFinishedReq, MatchPrefix, Reset, Start
from kvspec.interfaces.radix_cache import EvictionPolicy
from kvspec.replay import LockstepError, Run, Trace, TraceError, TraceRequest
from kvspec.validate import validate

__all__ = ["ReplayConformance", "busy_requests", "long_requests", "trace_of"]

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


# (window, blocks of the window pool) -> hit_blocks, hit_tokens, evictions, swa_evictions, swa_left,
# tombstones of `long_requests()` at a capacity of 20 in a simulation of pages.
WINDOW_COUNTS = {
    (1, 3): (57, 223, 409, 136, 286, 12),
    (4, 20): (214, 841, 248, 248, 0, 0),
    (9, 5): (60, 235, 403, 239, 178, 10),
    (9, 12): (126, 497, 332, 272, 78, 9),
    (16, 6): (52, 205, 415, 275, 150, 8),
    (24, 8): (57, 225, 398, 316, 102, 6),
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
    draw = _drawing(seed)
    for _ in range(count):
        text = 10 * draw(5)
        kept = 6 if draw(2) else 1 + draw(6)
        ids = [*range(text, text + kept), *(100 + draw(3) for _ in range(draw(3)))]
        yield ids, 4 * len(ids) - draw(4)


def long_requests(count: int = 60, seed: int = 1) -> Iterator[tuple[list[int], int]]:
    """The same with texts of 12 blocks, so that a request can be longer than a window pool."""
    draw = _drawing(seed)
    for _ in range(count):
        text = 100 * draw(3)
        kept = (3, 12, 1 + draw(12))[draw(3)]
        ids = [*range(text, text + kept), *(1000 + draw(3) for _ in range(draw(4)))]
        yield ids, 4 * len(ids) - draw(4)


def _drawing(seed: int) -> Callable[[int], int]:
    """Numbers below what is asked for, the same everywhere."""
    state = seed

    def draw(below: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % below

    return draw


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

    @clause("REPLAY-9")
    @pytest.mark.parametrize(("window", "blocks"), WINDOW_COUNTS)
    def test_counts_of_two_pools_are_those_of_single_pages(self, window: int, blocks: int) -> None:
        run = self.replay(
            trace_of(*long_requests()), capacity=20, sliding_window=window, swa_ratio=blocks / 20
        )
        assert run.window is not None
        assert run.window.swa_capacity == blocks
        evicted = run.evictions, run.window.swa_evictions, run.window.swa_left
        counts = run.hit_blocks, run.hit_tokens, *evicted, run.window.tombstones
        assert counts == WINDOW_COUNTS[window, blocks]

    @clause("REPLAY-9")
    def test_a_request_longer_than_the_window_pool_leaves_windows_behind(self) -> None:
        trace = trace_of(([1, 2, 3, 4, 5, 6], 24), ([1, 2, 3, 4, 5, 6], 24), ([1, 2, 3], 12))
        run = self.replay(trace, capacity=8, sliding_window=8, swa_ratio=0.5)
        assert run.window is not None
        assert (run.hit_blocks, run.evictions) == (6, 1)
        assert (run.window.swa_left, run.window.swa_evictions) == (2, 3)
        assert [sample.used for sample in run.window.samples] == [(24, 16), (24, 16), (20, 16)]

    @clause("REPLAY-10")
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"sliding_window": 0}, "sliding_window is 0"),
            ({"sliding_window": 8, "swa_ratio": 0.0}, "swa_ratio is 0.0"),
            ({"sliding_window": 8, "swa_ratio": -1.0}, "swa_ratio is -1.0"),
            ({"sliding_window": 8, "swa_ratio": float("inf")}, "swa_ratio is inf"),
            ({"sliding_window": 8, "swa_ratio": float("nan")}, "swa_ratio is nan"),
            ({"sliding_window": 9, "swa_ratio": 0.5}, "of 4 blocks does not hold a window of 9"),
            ({"sliding_window": 26}, "of 8 blocks does not hold a window of 26"),
            ({"swa_ratio": 1.0}, "swa_ratio is 1.0 without a sliding_window"),
            ({"sliding_window": 8, "policy": "lfu"}, "lru by page, not lfu by page"),
            ({"sliding_window": 8, "granularity": "node"}, "lru by page, not lru by node"),
        ],
    )
    def test_what_cannot_be_served_is_refused_at_once(
        self, options: dict[str, Any], reason: str
    ) -> None:
        served: list[None] = []
        with pytest.raises(ContractError, match=f"REPLAY-10: .*{re.escape(reason)}"):
            self.replay(
                trace_of(([1], 4)), capacity=8, progress=lambda: served.append(None), **options
            )
        assert not served

    @clause("REPLAY-10")
    @pytest.mark.parametrize(("ratio", "capacity", "blocks"), [(0.29, 100, 29), (1 / 3, 9, 3)])
    def test_the_smallest_window_pool_serves(
        self, ratio: float, capacity: int, blocks: int
    ) -> None:
        window, trace = 4 * (blocks - 2), trace_of(*long_requests(30))
        run = self.replay(trace, capacity=capacity, sliding_window=window, swa_ratio=ratio)
        assert run.window is not None
        assert run.window.swa_capacity == blocks
        with pytest.raises(ContractError, match="REPLAY-10: a window pool"):
            self.replay(trace, capacity=capacity, sliding_window=window + 1, swa_ratio=ratio)

    @clause("REPLAY-11")
    @pytest.mark.parametrize("ratio", [None, 1.0])
    @pytest.mark.parametrize("leave_last_token", [False, True])
    def test_a_window_that_covers_everything_changes_no_count(
        self, ratio: float | None, leave_last_token: bool
    ) -> None:
        trace = trace_of(*long_requests())
        options: dict[str, Any] = {"capacity": 20, "leave_last_token": leave_last_token}
        plain = self.replay(trace, **options)
        run = self.replay(trace, sliding_window=60, swa_ratio=ratio, **options)
        assert plain.window is None
        assert run.window is not None
        assert run.window.swa_evictions == run.evictions
        # What is compared and what it takes may differ, what is counted may not.
        same: dict[str, Any] = {"seconds": 0, "tokens_compared": 0, "window": None}
        assert run._replace(**same) == plain._replace(**same)

    @clause("REPLAY-12")
    def test_what_is_used_is_sampled_after_every_request(self) -> None:
        trace = trace_of(([1, 2, 3, 4], 15), ([], 0), ([7, 8], 5), ([1, 2], 8))
        run = self.replay(trace, capacity=5, sliding_window=4, swa_ratio=0.6)
        assert run.window is not None
        seen = [(s.blocks, s.hit_blocks, *s.used) for s in run.window.samples]
        assert seen == [(4, 0, 16, 8), (0, 0, 16, 8), (2, 0, 20, 12), (2, 0, 16, 12)]
        assert run.window.tombstones == 1
        assert run.window.peak == (20, 12)
        assert run.window.mean == (17, 10)

    @clause("REPLAY-7")
    def test_windows_are_compared_too(self) -> None:
        trace = trace_of(*long_requests(40))
        options: dict[str, Any] = {"sliding_window": 9, "swa_ratio": 0.6, "capacity": 20}
        verified = self.replay(trace, verify=kvspec.oracle, **options)
        assert verified._replace(seconds=0) == self.replay(trace, **options)._replace(seconds=0)

        class Different(kvspec.oracle.SWARadixCache):
            def swa_evictable_size(self) -> int:
                return super().swa_evictable_size() + 1

        names = {name: getattr(kvspec.oracle, name) for name in kvspec.oracle.__all__}
        other = SimpleNamespace(**{**names, "SWARadixCache": Different, "__name__": "different"})
        with pytest.raises(LockstepError, match=r"REPLAY-7: request 0: swa_evictable_size\(\)"):
            self.function("replay")(trace, impl=self.impl, verify=other, **options)

    @clause("REPLAY-13")
    @pytest.mark.parametrize(
        ("check", "recorded", "window"),
        [
            ("off", False, None),
            ("sets", False, None),
            ("ledger", False, None),
            ("counts", True, None),
            ("ledger", True, 9),
        ],
    )
    def test_looking_and_recording_change_no_count(
        self, check: str, recorded: bool, window: int | None
    ) -> None:
        trace = trace_of(*long_requests(10))
        options: dict[str, Any] = {"capacity": 14, "sliding_window": window}
        plain = self.replay(trace, **options)
        with TemporaryDirectory() as folder:
            record = Path(folder) / "log.ndjson" if recorded else None
            run = self.replay(trace, check=check, record=record, **options)
        assert plain.evictions
        assert run._replace(seconds=0) == plain._replace(seconds=0)

    @clause("REPLAY-14")
    @pytest.mark.parametrize(
        ("check", "what"),
        [
            ("counts", "request 2: token_to_kv_pool_allocator memory leak detected"),
            ("sets", "request 2: CHECK-1: page 3 of token_to_kv_pool_allocator"),
            ("ledger", "request 2: CHECK-1: page 3 of token_to_kv_pool_allocator"),
        ],
    )
    def test_a_fault_names_the_request(self, check: str, what: str) -> None:
        with pytest.raises(MemoryLeakError, match=re.escape(what)):
            self.function("replay")(_FOUR, impl=_forgetful(), capacity=4, check=check)

    @clause("REPLAY-14")
    def test_unchecked_the_fault_is_found_at_the_end(self) -> None:
        run = self.function("replay")(_FOUR, impl=_forgetful(), capacity=4, check="off")
        assert run.requests == 4
        assert run.leaks.startswith("CHECK-1: page 3 of token_to_kv_pool_allocator is held")

    @clause("REPLAY-15")
    @pytest.mark.parametrize(
        ("kind", "tokens", "window"), [("ndjson", False, None), ("msgpack", True, 9)]
    )
    def test_what_is_recorded_is_a_valid_log_of_all_of_it(
        self, kind: str, tokens: bool, window: int | None
    ) -> None:
        requests = list(long_requests(10))
        options: dict[str, Any] = {"capacity": 14, "sliding_window": window, "tokens": tokens}
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"log.{kind}"
            run = self.replay(trace_of(*requests), record=path, **options)
            events = list(read_log(path))
            assert path.read_bytes().startswith(b"kvspec01") == (kind == "msgpack")
        assert validate(events).violation is None
        assert type(events[-1]) is Reset
        matches = [event for event in events if type(event) is MatchPrefix]
        finished = [event for event in events if type(event) is CacheFinishedReq]
        assert len(matches) == len(finished) == len(requests)
        hit = sum(stop - start for event in matches for start, stop in event.slots)
        assert hit == 4 * run.hit_blocks
        assert any(event.key.tokens for event in matches + finished) == tokens

    @clause("REPLAY-15")
    def test_a_recorder_stays_open(self) -> None:
        with FlightRecorder() as recorder:
            self.replay(trace_of(([1, 2], 8)), capacity=2, record=recorder)
            self.replay(trace_of(([1, 2], 8)), capacity=2, record=recorder)
            kinds = [type(event) for event in recorder.events()]
        assert kinds == 2 * kinds[: len(kinds) // 2]
        assert kinds[0] is Start

    @clause("REPLAY-16")
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"check": "set"}, "REPLAY-16: check is 'set', not one of off, counts, sets, ledger"),
            ({"tokens": True}, "REPLAY-16: tokens are recorded in a file, and record names none"),
            ({"record": "taken.ndjson"}, "REC-8"),
        ],
    )
    def test_what_cannot_be_looked_at_is_refused_at_once(
        self, options: dict[str, Any], reason: str
    ) -> None:
        served: list[None] = []
        with TemporaryDirectory() as folder:
            taken = Path(folder) / "taken.ndjson"
            taken.write_text("mine")
            if "record" in options:
                options = {"record": taken}
            with pytest.raises(ContractError, match=reason):
                self.replay(_FOUR, capacity=4, progress=lambda: served.append(None), **options)
            assert taken.read_text() == "mine"
        assert not served


_FOUR = trace_of(([1], 4), ([2], 4), ([3], 4), ([4], 4))


def _forgetful() -> SimpleNamespace:
    """The oracle, with a cache that loses the page of the third request."""

    class Forgetful(kvspec.oracle.RadixCache):
        def cache_finished_req(self, req: Any) -> None:
            if req.origin_input_ids[0] == 3:
                rows: Any = self.req_to_token_pool
                self.dec_lock_ref(req.lock_receipt)
                rows.free(req.req_pool_idx)
            else:
                super().cache_finished_req(req)

    names = {name: getattr(kvspec.oracle, name) for name in kvspec.oracle.__all__}
    return SimpleNamespace(**{**names, "RadixCache": Forgetful, "__name__": "forgetful"})
