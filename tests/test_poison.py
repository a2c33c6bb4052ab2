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
from kvspec.scheduler import Req, Scheduler, ServerArgs
from needs import native
from peers import sglang
from serving import Model, Shape

IMPLS = [pytest.param(kvspec, id="native", marks=native), pytest.param(kvspec.oracle, id="oracle")]
SERVED = [
    pytest.param(kvspec, "native", id="native", marks=native),
    pytest.param(kvspec.oracle, "oracle", id="oracle"),
]
SMALL = Shape(layers=2, hidden=32, heads=2, vocabulary=64, positions=64)


class TestOracle(PoisonConformance):
    impl = kvspec.oracle


class TestNative(PoisonConformance):
    impl = kvspec


def engine(impl: Any, name: str) -> tuple[Scheduler, Model]:
    model = Model(impl, SMALL, page_size=4, pages=9, rows=2)
    args = ServerArgs(chunked_prefill_size=6, max_running_requests=2, implementation=name)
    return Scheduler(args, model), model


def serve(scheduler: Scheduler) -> dict[str, list[int]]:
    """What is said to four prompts, of which more and more have the same beginning."""
    said: dict[str, list[int]] = {}
    for number in range(1, 5):
        prompt = [1, 2, 3, 4, 5, 6, 7, *range(number, number + 3 * number)]
        scheduler.add_request(Req(f"{number}", prompt, 4))
    while not scheduler.is_idle:
        for out in scheduler.step():
            said.setdefault(out.rid, []).extend(out.token_ids)
    scheduler.close()
    return said


@clause("POISON-1")
@pytest.mark.parametrize(("impl", "name"), SERVED)
def test_what_keeps_the_clauses_serves_the_same_over_poison(impl: Any, name: str) -> None:
    """Pages are shared, evicted and handed out again; nothing fresh or freed is ever read."""
    plain, _ = engine(impl, name)
    expected = serve(plain)
    assert [len(said) for said in expected.values()] == [4, 4, 4, 4]
    assert plain.tree_cache.counters()["leaves_evicted"]
    poisoned, model = engine(impl, name)
    objects = poisoned.tree_cache, model.allocator, model.rows
    poison = Poison([*model.keys, *model.values], 4)
    with instrument(*objects, poison=poison) as instrumented:
        assert serve(poisoned) == expected
        assert instrumented.reports == []
        assert not instrumented.blind
    free = model.allocator.view().free
    assert poison.check(free) == []
    rows = [4 * page for page in free]
    assert all(len(poison.stale(each[rows])) for each in model.keys + model.values)


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
