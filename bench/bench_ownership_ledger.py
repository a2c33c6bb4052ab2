"""What a ledger costs beside a scheduler: microseconds a request of 13,700 slots, core against
oracle, and the gates that need no clock.
"""

import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kvspec
import kvspec.oracle
from bench_against_peers import seconds
from kvspec.conformance import clause
from kvspec.flight_recorder.runs import python_slot_runs, slot_runs

PAGES, PAGE_SIZE, SLOTS, ROWS = 10_000, 512, 13_700, 256
ROUNDS, REPEAT = 9, 5
TIMES_FASTER = 50.0


def _ledger(impl: Any, pages: int = PAGES, page_size: int = PAGE_SIZE) -> Any:
    return impl.OwnershipLedger(page_size, {"full": pages, "swa": pages}, ROWS, 65_536)


def _slots(pages: int = PAGES, page_size: int = PAGE_SIZE, count: int = SLOTS) -> Tensor:
    """The slots of a request: its pages lie anywhere in the pool."""
    chosen = random.Random(7).sample(range(1, pages + 1), -(-count // page_size))
    starts = torch.tensor(chosen, dtype=torch.int64) * page_size
    return (starts[:, None] + torch.arange(page_size)).flatten()[:count].clone()


def _request(ledger: Any, slots: Tensor) -> list[Any]:
    """A request comes, computes, is cached and evicted: five actions. Their faults."""
    whole = len(slots) - len(slots) % PAGE_SIZE
    actions: list[list[tuple[str, tuple[Any, ...]]]] = [
        [("take", ("full", slots))],
        [("take_rows", ([3],))],
        [("write", (3, 0, slots))],
        [("adopt", (3, whole)), ("give", ("full", slots[whole:])), ("give_rows", ([3],))],
        [("give", ("full", slots[:whole]))],
    ]
    faults: list[Any] = []
    for number, effects in enumerate(actions):
        ledger.begin(number)
        for name, given in effects:
            getattr(ledger, name)(*given)
        faults += ledger.end()
    return faults


def _ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """How many times slower theirs is: the median of interleaved ratios."""
    pairs = [(seconds(ours, REPEAT), seconds(theirs, REPEAT)) for _ in range(ROUNDS)]
    return statistics.median(slow / fast for fast, slow in pairs)


def _compare(benchmark: Any, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    if not benchmark.disabled:
        ratio = _ratio(ours, theirs)
        benchmark.extra_info["times_faster"] = round(ratio, 1)
        print(benchmark.name, benchmark.extra_info)
        assert ratio > TIMES_FASTER
    benchmark(ours)


def bench_request(benchmark: Any) -> None:
    """13,700 slots taken, written, cached and given back, at least 50 times as fast as told."""
    slots = _slots()
    ledgers = [_ledger(impl) for impl in (kvspec, kvspec.oracle)]
    for _ in range(2):
        assert [_request(ledger, slots) for ledger in ledgers] == [[], []]
    assert ledgers[0].view() == ledgers[1].view()
    assert ledgers[0].counters() == ledgers[1].counters()
    core, oracle = ledgers
    _compare(benchmark, lambda: _request(core, slots), lambda: _request(oracle, slots))


@pytest.mark.parametrize("effect", ["take", "write", "give"])
def bench_effect(benchmark: Any, effect: str) -> None:
    """One effect of 13,700 slots, and the empty action around it."""
    ledger, slots = _ledger(kvspec), _slots()
    given = (3, 0, slots) if effect == "write" else ("full", slots)

    def ready() -> None:
        ledger.begin(0)
        ledger.clear("full")
        ledger.clear_rows()
        ledger.take_rows([3])
        if effect != "take":
            ledger.take("full", slots)
        assert ledger.end() == []

    def act() -> None:
        ledger.begin(1)
        getattr(ledger, effect)(*given)
        assert not ledger.end()

    benchmark.pedantic(act, setup=ready, rounds=200)


def bench_action_without_effects(benchmark: Any) -> None:
    ledger = _ledger(kvspec)

    def act() -> None:
        ledger.begin(1)
        ledger.end()

    benchmark(act)


def bench_slot_runs(benchmark: Any) -> None:
    """The runs of 13,700 slots, for the flight recorder."""
    slots = _slots()
    assert slot_runs(slots) == python_slot_runs(slots)
    _compare(benchmark, lambda: slot_runs(slots), lambda: python_slot_runs(slots))


def _counted(impl: Any, pages: int, count: int) -> tuple[int, int, int]:
    """What `count` slots cost in a pool of so many pages: slots seen, pages moved, rows looked at.

    Besides the request, ten rows name what is given back under them.
    """
    ledger, slots = _ledger(impl, pages), _slots(pages, count=count)
    assert not _request(ledger, slots)
    ledger.begin(9)
    ledger.take("full", slots[:PAGE_SIZE])
    ledger.take_rows(list(range(10)))
    ledger.adopt_slots(slots[:PAGE_SIZE])
    for row in range(10):
        ledger.write(row, 0, slots[:PAGE_SIZE])
    assert not ledger.end()
    ledger.begin(10)
    ledger.give("full", slots[:PAGE_SIZE])
    assert len(ledger.end()) == 10
    return tuple(ledger.counters().values())


@clause("LEDGER-15")
@pytest.mark.parametrize("impl", [kvspec, kvspec.oracle], ids=["core", "oracle"])
def test_costs_do_not_grow_with_the_pool(impl: Any) -> None:
    """Exact counters at N, 2N and 4N pages, and twice the slots cost twice the pages."""
    pages = -(-SLOTS // PAGE_SIZE)
    # Taken, written, cached or given back, and given back: the last page is never the tree's.
    request, rows = 4 * pages - 1, 2
    shared = 1 + 10 + 1 + 1  # a page taken, ten rows, the page adopted and given back
    seen = 3 * SLOTS + PAGE_SIZE * (1 + 1 + 10 + 1)
    expected = (seen, request + rows + shared, 10)
    assert {_counted(impl, size, SLOTS) for size in (PAGES, 2 * PAGES, 4 * PAGES)} == {expected}
    double = _counted(impl, PAGES, 2 * SLOTS - SLOTS % PAGE_SIZE)
    assert double[1] - expected[1] == 4 * (-(-(2 * SLOTS - SLOTS % PAGE_SIZE) // PAGE_SIZE) - pages)
