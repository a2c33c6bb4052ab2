"""A small engine in any order of its operations, for fuzzing."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvspec.conformance.prefix_cache.system import KINDS, CacheConformance, Request, System

__all__ = ["Engine"]


class Engine(RuleBasedStateMachine):
    """Requests of a small engine in any order, over a pool that is too small for them."""

    tokens = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=14)

    suite: CacheConformance
    system: System
    width: int

    @classmethod
    def of(cls, suite: CacheConformance) -> "type[Engine]":
        """The machine for an implementation."""
        return type(cls.__name__, (cls,), {"suite": suite})

    @initialize(
        kind=st.sampled_from([*KINDS, "radix", "swaradix", "swaradix"]),
        page_size=st.sampled_from([1, 2, 4]),
        slot_count=st.sampled_from([12, 20, 36]),
        windows=st.sampled_from([8, 12, 36]),
        width=st.sampled_from([1, 2, 3, 5, 9]),
    )
    def start(self, kind: str, page_size: int, slot_count: int, windows: int, width: int) -> None:
        """Pools of slots and window slots, and a window of a width where the cache has its own."""
        own = "sliding_window_size" in KINDS[kind].options
        options = {"sliding_window_size": width} if own else {}
        counts = {
            "page_count": slot_count // page_size,
            "swa_page_count": min(windows, slot_count) // page_size,
        }
        self.width = width
        self.system = self.suite.serving(page_size, kind=kind, **counts, **options)

    @rule(tokens=tokens, extra_key=st.sampled_from([None, "a"]))
    def admit(self, tokens: list[int], extra_key: Any) -> None:
        if self.system.pool.available_size():
            self.system.admit(tokens, extra_key)

    @rule(which=st.integers(0, 3), part=st.integers(1, 14))
    def chunk(self, which: int, part: int) -> None:
        for system, req in self._chosen(which):
            length = system.pool.row_length(req.req_pool_idx)
            stop = min(max(part, length), self._committed(req))
            if stop >= length and system.compute(req, stop):
                system.chunk(req, stop)

    @rule(which=st.integers(0, 3), token=st.sampled_from([1, 2]), ahead=st.integers(0, 5))
    def step(self, which: int, token: int, ahead: int) -> None:
        """Decode, sometimes with slots taken ahead for a draft."""
        for system, req in self._chosen(which):
            if len(req.tokens) < 16 and system.compute(req, len(req.tokens) + ahead):
                req.output_ids.append(token)

    @rule(which=st.integers(0, 3))
    def finish(self, which: int) -> None:
        for system, req in self._chosen(which):
            if system.compute(req, self._committed(req)):
                system.finish(req)

    @rule(which=st.integers(0, 3), again=st.booleans())
    def retract(self, which: int, again: bool) -> None:
        """Give a request up; it may begin again at once, in the row that it had."""
        for system, req in self._chosen(which):
            system.retract(req)
            if again:
                system.begin(req)

    @rule(which=st.integers(0, 3), chunked=st.booleans())
    def leave_behind(self, which: int, chunked: bool) -> None:
        """A request moves on, by a window or by chunks."""
        for system, req in self._chosen(which):
            if hasattr(system.cache, "evict_swa"):
                before = system.available()
                option = "attention_chunk_size" if chunked else "sliding_window_size"
                count = system.evict_swa(req, **{option: self.width})
                assert system.available() == (before[0], before[1] + count)

    @rule(count=st.integers(0, 9), windows=st.integers(0, 9))
    def evict(self, count: int, windows: int) -> None:
        system = self.system
        before = system.available()
        if hasattr(system.cache, "sliding_window_size"):
            evicted = tuple(system.cache.evict(count, windows))
        else:
            evicted = (system.evict(count), 0)
        after = system.available()
        assert after == (before[0] + evicted[0], before[1] + evicted[1])

    @rule()
    def flush(self) -> None:
        if not self.system.cache.view().receipts:
            self.system.cache.reset()

    @invariant()
    def one_owner(self) -> None:
        self.system.settle()

    def _committed(self, req: Request) -> int:
        """How many of its tokens can have KV: the last sampled one has none."""
        return len(req.origin_input_ids) + max(len(req.output_ids) - 1, 0)

    def _chosen(self, which: int) -> list[tuple[System, Request]]:
        return [(self.system, req) for req in self.system.requests[which : which + 1]]
