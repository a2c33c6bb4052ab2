"""Oracle against core: the amount that runs with every change, and what the driver promises."""

import random
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.lockstep import (
    Sides,
    campaign,
    configuration,
    explore,
    reproducer,
    run,
    shortfalls,
    shrink,
    table,
)
from kvspec.conformance.lockstep.history import client
from needs import native

OPERATIONS = 200_000
SEEDS = range(40)
MINIMUM = 1000
WINDOW_OPERATIONS = {"swa": 80_000, "swachunk": 20_000}
WINDOW_MINIMUM = {"swa": 200, "swachunk": 100}
MEMORIES = ("full", "swa", "swachunk")
ORACLE_TWICE = Sides("kvspec.oracle", "kvspec.oracle")


@pytest.mark.slow
@native
@clause("SLOT-6", "PAGE-16", "RADIX-13", "RADIX-17", "RADIX-18")
def test_core_follows_the_oracle() -> None:
    found = campaign(SEEDS, OPERATIONS, workers=2)

    Console().print(table(found))
    if found.failure:
        pytest.fail(reproducer(shrink(found.failure, kvspec.oracle, kvspec)))
    assert found.operation_count == OPERATIONS
    assert not shortfalls(found, MINIMUM)


@pytest.mark.slow
@native
@pytest.mark.parametrize("memory", WINDOW_OPERATIONS)
@clause("SWA-22", "SWA-24", "SWARADIX-14", "SWARADIX-18", "SWARADIX-21")
def test_core_follows_the_oracle_with_windows(memory: str) -> None:
    found = campaign(SEEDS, WINDOW_OPERATIONS[memory], workers=2, memory=memory)

    Console().print(table(found))
    if found.failure:
        pytest.fail(reproducer(shrink(found.failure, kvspec.oracle, kvspec)))
    assert found.operation_count == WINDOW_OPERATIONS[memory]
    assert not shortfalls(found, WINDOW_MINIMUM[memory])


def test_seeds_cover_every_size_granularity_and_headroom() -> None:
    configs = [configuration(seed) for seed in range(18)]

    seen = {(c.page_size, c.granularity, c.spare_pages) for c in configs}

    assert seen == set(product((1, 16, 64), ("page", "node"), (0, 1, 2)))
    assert {configuration(seed).policy for seed in SEEDS} == {
        *("lru", "lfu", "fifo", "mru", "filo", "slru", "priority")
    }


@pytest.mark.parametrize("memory", WINDOW_OPERATIONS)
def test_seeds_cover_every_window_and_room_for_windows(memory: str) -> None:
    configs = [configuration(seed, memory) for seed in range(36)]

    kinds = {(c.page_size, c.window > c.page_size, c.pages_of_window) for c in configs}
    roomy = {(c.page_size, c.window_pages >= c.page_count) for c in configs}

    assert kinds == {(size, k > 1, k) for size in (1, 4, 16) for k in (1, 2, 3)}
    assert {c.window < c.page_size for c in configs if c.page_size > 1} == {False, True}
    assert roomy == set(product((1, 4, 16), (False, True)))
    assert len({c.form for c in configs}) == 4
    assert {c.need_sort for c in configs} == {c.observed for c in configs} == {False, True}


@pytest.mark.parametrize("memory", MEMORIES)
def test_free_lists_are_shuffled(memory: str) -> None:
    config = configuration(1, memory)._replace(need_sort=False, request_pages=12)
    configs = [config._replace(shuffle=n) for n in range(5)]
    drivers = [client(one, kvspec.oracle, kvspec.oracle) for one in configs]
    views = [driver.pair.allocator.oracle.view() for driver in drivers]

    for pool in [views] if memory == "full" else [views, [view.swa for view in views]]:
        orders = {view.free for view in pool}

        assert len(orders) == 5
        assert len({frozenset(order) for order in orders}) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("memory", MEMORIES)
def test_history_is_determined_by_its_seed(memory: str, seed: int) -> None:
    config = configuration(seed, memory)

    first, second = (explore(seed, 400, kvspec.oracle, kvspec.oracle, config) for _ in range(2))

    assert first == second


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_part_of_a_history_is_a_history(memory: str, seed: int) -> None:
    """Shrinking leaves operations out: what remains must stay legal."""
    rng, config = random.Random(seed), configuration(seed, memory)
    history = explore(seed, 400, kvspec.oracle, kvspec.oracle, config)

    part = [operation for operation in history.operations if rng.random() < 0.5]

    assert history.failure is None, history.failure.divergence
    divergence = run(config, part, kvspec.oracle, kvspec.oracle)
    assert divergence is None, divergence


def test_finished_seeds_are_not_run_again(tmp_path: Path) -> None:
    resume, ran = tmp_path / "seeds.jsonl", list[int]()

    first = campaign(range(3), 300, ORACLE_TWICE, resume=resume)
    second = campaign(
        range(5), 500, ORACLE_TWICE, resume=resume, progress=lambda h: ran.append(h.seed)
    )

    assert ran == [3, 4]
    assert (first.operation_count, second.operation_count) == (300, 500)
    assert second.earlier_count == 300
    assert all(second.counts[name] >= count for name, count in first.counts.items())
    with pytest.raises(ValueError, match="is of another run"):
        campaign(range(5), 1000, ORACLE_TWICE, resume=resume)
    with pytest.raises(ValueError, match="is of another run"):
        campaign(range(5), 500, ORACLE_TWICE, resume=resume, memory="swa")


def test_run_that_saw_too_little_says_so() -> None:
    found = campaign([2], 50, ORACLE_TWICE)

    short = shortfalls(found, MINIMUM)

    assert any(line.startswith("trims: ") for line in short)
