"""Sequences that plant a fault, and the fault that `check_memory` must name."""

import pytest

from kvspec.conformance.suite import Conformance
from kvspec.errors import MemoryLeakError
from sequences.engine import Engine, Request, numbers
from sequences.report import report

__all__ = ["Checks"]


def check(engine: Engine, reqs: list[Request], level: str = "sets") -> None:
    """`check_memory` over all that an engine has."""
    pools = engine.allocator, engine.pool, engine.cache
    reserved = engine.slots(*engine.reserved)
    engine.impl.check_memory(*pools, reqs=reqs, reserved=reserved, level=level)


class Checks(Conformance):
    """A fault that no sum shows has a name, and an engine at work has none."""

    @report("SG-28754", clause="CHECK-7")
    def test_an_alias_and_a_leak_that_balance_are_both_named(self) -> None:
        engine = Engine(self.impl)
        left, right = engine.admit([1, 2]), engine.admit([3, 4])
        for req in (left, right):
            engine.compute(req, 2)
        lost, alias = engine.row(left)[0], engine.row(right)[0]
        engine.pool.write((left.req_pool_idx, slice(0, 1)), [alias])

        check(engine, engine.requests, level="counts")
        with pytest.raises(MemoryLeakError) as error:
            check(engine, engine.requests)

        assert f"CHECK-1: page {lost} " in str(error.value)
        assert f"CHECK-2: page {alias} " in str(error.value)

    @report("SG-22862", clause="CHECK-1")
    def test_a_slot_overwritten_in_its_row_is_a_leak(self) -> None:
        engine = Engine(self.impl)
        req = engine.admit(list(range(6)))
        engine.compute(req, 6)
        lost = engine.row(req)[5]
        engine.pool.write((req.req_pool_idx, slice(5, 6)), engine.allocator.alloc(1))

        with pytest.raises(MemoryLeakError, match=rf"CHECK-1: page {lost} "):
            check(engine, engine.requests)

    @report("JAX-1147", clause="CHECK-1")
    def test_drafts_in_no_row_are_a_leak(self) -> None:
        engine = Engine(self.impl, page_size=4)
        drafts = numbers(engine.allocator.alloc(8))

        with pytest.raises(MemoryLeakError, match=r"CHECK-1: page 1 (.|\n)*CHECK-1: page 2 "):
            check(engine, [])

        engine.keep(drafts)
        check(engine, [])

    @report("JAX-984", clause="CHECK-4")
    def test_a_request_dropped_between_its_chunks_is_a_leak(self) -> None:
        engine = Engine(self.impl, page_size=2)
        req = engine.admit(list(range(8)))
        engine.chunk(req, 5)

        check(engine, [req])
        with pytest.raises(MemoryLeakError, match="CHECK-4"):
            check(engine, [])

    @report("KVAI-44", "SG-22152", clause="CHECK-6")
    @pytest.mark.parametrize("cache", ["RadixCache", "ChunkCache"])
    def test_an_engine_at_work_has_no_leak(self, cache: str) -> None:
        engine = Engine(self.impl, page_size=2, page_count=32, cache=cache)
        for stop in (3, 4, 7):
            for tokens in ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 9, 9, 9, 9]):
                waiting = [req for req in engine.requests if req.origin_input_ids == tokens]
                engine.chunk(waiting[0] if waiting else engine.admit(tokens), stop)
                for level in ("counts", "sets"):
                    check(engine, engine.requests, level)
        for req in list(engine.requests):
            engine.sample(req, 0)
            check(engine, engine.requests)
        engine.settle()
