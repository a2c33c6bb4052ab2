"""A small engine in any order of its operations, for fuzzing."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvspec.conformance.prefix_cache.system import CacheConformance, Request, System

__all__ = ["Engine"]


class Engine(RuleBasedStateMachine):
    """Requests of a small engine in any order, over a pool that is too small for them."""

    tokens = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=14)

    suite: CacheConformance
    system: System

    @classmethod
    def of(cls, suite: CacheConformance) -> "type[Engine]":
        """The machine for an implementation."""
        return type(cls.__name__, (cls,), {"suite": suite})

    @initialize(
        kind=st.sampled_from(["radix", "radix", "radix", "disabled", "chunk"]),
        page_size=st.sampled_from([1, 2, 4]),
        slot_count=st.sampled_from([12, 20, 36]),
    )
    def start(self, kind: str, page_size: int, slot_count: int) -> None:
        count = slot_count // page_size
        self.system = self.suite.serving(page_size, kind=kind, page_count=count)

    @rule(tokens=tokens, extra_key=st.sampled_from([None, "a"]))
    def admit(self, tokens: list[int], extra_key: Any) -> None:
        if self.system.pool.available_size():
            self.system.admit(tokens, extra_key)

    @rule(which=st.integers(0, 3), part=st.integers(1, 14))
    def chunk(self, which: int, part: int) -> None:
        for system, req in self._chosen(which):
            length = system.pool.row_length(req.req_pool_idx)
            stop = min(max(part, length), len(req.tokens))
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
            committed = len(req.origin_input_ids) + max(len(req.output_ids) - 1, 0)
            if system.compute(req, committed):
                system.finish(req)

    @rule(count=st.integers(0, 9))
    def evict(self, count: int) -> None:
        before = self.system.allocator.available_size()
        evicted = self.system.cache.evict(count)
        assert self.system.allocator.available_size() == before + evicted

    @rule()
    def flush(self) -> None:
        if not self.system.cache.view().receipts:
            self.system.cache.reset()

    @invariant()
    def one_owner(self) -> None:
        self.system.settle()

    def _chosen(self, which: int) -> list[tuple[System, Request]]:
        return [(self.system, req) for req in self.system.requests[which : which + 1]]
