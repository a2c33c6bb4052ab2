"""Poison: the suite, and what a stale read does to the output of an attention."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.poison import PoisonConformance
from kvspec.instrumentation import instrument
from kvspec.poison import Poison
from needs import native
from peers import sglang
from serving import Engine, Model, Request, Shape

IMPLS = [pytest.param(kvspec, id="native", marks=native), pytest.param(kvspec.oracle, id="oracle")]
SMALL = Shape(layers=2, hidden=32, heads=2, vocabulary=64, positions=64)


class TestOracle(PoisonConformance):
    impl = kvspec.oracle


class TestNative(PoisonConformance):
    impl = kvspec


def engine(impl: Any) -> Engine:
    return Engine(impl, Model(SMALL, 40), page_size=4, pages=9, batch=2, chunk=6)


def requests() -> list[Request]:
    shared = [1, 2, 3, 4, 5, 6, 7]
    return [Request([*shared, *range(number, number + 3 * number)], 4) for number in range(1, 5)]


@clause("POISON-1")
@pytest.mark.parametrize("impl", IMPLS)
def test_what_keeps_the_clauses_serves_the_same_over_poison(impl: Any) -> None:
    """Pages are shared, evicted and handed out again; nothing fresh or freed is ever read."""
    plain = engine(impl)
    expected = plain.serve(requests())
    assert plain.cache.counters()["leaves_evicted"]
    poisoned = engine(impl)
    objects = poisoned.cache, poisoned.allocator, poisoned.rows
    poison = Poison([*poisoned.model.keys, *poisoned.model.values], 4)
    with instrument(*objects, poison=poison) as instrumented:
        assert poisoned.serve(requests()) == expected
        assert instrumented.reports == []
        assert not instrumented.blind
    free = poisoned.allocator.view().free
    assert poison.check(free) == []
    assert all(len(poison.stale(keys[[4 * page for page in free]])) for keys in poison_of(poisoned))


def poison_of(served: Engine) -> list[Tensor]:
    return served.model.keys + served.model.values


@clause("POISON-1", "POISON-2")
@pytest.mark.parametrize("impl", IMPLS)
def test_whoever_reads_what_was_given_back_sees_it(impl: Any) -> None:
    allocator = impl.PagedTokenToKVPoolAllocator(
        16, 4, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False
    )
    pool = impl.ReqToTokenPool(2, 16, "cpu", False)
    cache = impl.RadixCache(pool, allocator, page_size=4)
    keys, values = torch.zeros(20, 1, 8), torch.zeros(20, 1, 8)
    poison = Poison([keys, values], 4)
    with instrument(cache, allocator, pool, poison=poison):
        slots = allocator.alloc(8)
        assert [why for _, why in poison.stale(keys[slots])] == 8 * ["fresh"]
        keys[slots], values[slots] = 1.0, 2.0
        assert attend(keys, values, slots).eq(2.0).all()
        allocator.free(slots[4:])
        assert attend(keys, values, slots).isnan().all()
        assert poison.stale(values[slots]) == [(row, "freed") for row in range(4, 8)]
        values[slots[6]] = 3.0
        page = int(slots[6]) // 4
        assert poison.check([page]) == [(page, 1, int(slots[6]))]


def attend(keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """What a decode step reads: one query over the KV of a row."""
    query = torch.ones(1, 1, keys.shape[-1])
    return scaled_dot_product_attention(
        query, keys[slots].transpose(0, 1), values[slots].transpose(0, 1)
    )


@clause("POISON-1")
@pytest.mark.parametrize("poisoned", [False, True])
def test_a_row_over_a_page_that_was_freed_shows_in_the_data(poisoned: bool) -> None:
    """SGLang 0.5.2 with pages: one chunk ends in mid-page, and somebody else caches that page."""
    peer = sglang()
    allocator = peer.PagedTokenToKVPoolAllocator(64, 4, torch.float32, "cpu", None, False)
    pool = peer.ReqToTokenPool(2, 16, "cpu", False)
    cache = peer.RadixCache(pool, allocator, page_size=4)
    keys, values = torch.zeros(68, 1, 8), torch.zeros(68, 1, 8)
    tokens, (mine, yours) = list(range(8)), pool.alloc(2)
    with ExitStack() as stack:
        if poisoned:
            poison = Poison([keys, values], 4)
            stack.enter_context(instrument(cache, allocator, pool, poison=poison))

        def compute(row: int, start: int, slots: Tensor) -> None:
            pool.write((row, slice(start, start + len(slots))), slots)
            keys[slots], values[slots] = 1.0, 2.0

        def request(row: int) -> Any:
            nothing = torch.empty(0, dtype=torch.int64)
            return SimpleNamespace(
                req_pool_idx=row, prefix_indices=nothing, last_node=cache.root_node, extra_key=None
            )

        slots, me, you = allocator.alloc(8), request(mine), request(yours)
        compute(mine, 0, slots[:6])
        me.fill_ids = tokens[:6]
        cache.cache_unfinished_req(me)
        compute(yours, 0, allocator.alloc(8))
        you.origin_input_ids, you.output_ids = tokens, [9]
        cache.cache_finished_req(you)
        compute(mine, 6, slots[6:])
        me.fill_ids = tokens
        cache.cache_unfinished_req(me)
        output = attend(keys, values, pool.req_to_token[mine, :8].long())
    assert output.isnan().all() if poisoned else output.eq(2.0).all()
