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
from kvspec.conformance.lockstep.driver import Driver
from needs import native

OPERATIONS = 200_000
SEEDS = range(40)
MINIMUM = 1000
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


def test_seeds_cover_every_size_granularity_and_headroom() -> None:
    configs = [configuration(seed) for seed in range(18)]

    seen = {(c.page_size, c.granularity, c.spare_pages) for c in configs}

    assert seen == set(product((1, 16, 64), ("page", "node"), (0, 1, 2)))
    assert {configuration(seed).policy for seed in SEEDS} == {
        *("lru", "lfu", "fifo", "mru", "filo", "slru", "priority")
    }


def test_free_lists_are_shuffled() -> None:
    config = configuration(1)._replace(need_sort=False)
    drivers = [Driver(config._replace(shuffle=n), kvspec.oracle, kvspec.oracle) for n in range(5)]

    orders = {driver.pair.allocator.oracle.view().free for driver in drivers}

    assert len(orders) == 5
    assert len({frozenset(order) for order in orders}) == 1


@pytest.mark.parametrize("seed", range(3))
def test_history_is_determined_by_its_seed(seed: int) -> None:
    first, second = (explore(seed, 400, kvspec.oracle, kvspec.oracle) for _ in range(2))

    assert first == second


@pytest.mark.parametrize("seed", range(6))
def test_every_part_of_a_history_is_a_history(seed: int) -> None:
    """Shrinking leaves operations out: what remains must stay legal."""
    rng = random.Random(seed)
    history = explore(seed, 400, kvspec.oracle, kvspec.oracle)

    part = [operation for operation in history.operations if rng.random() < 0.5]

    divergence = run(configuration(seed), part, kvspec.oracle, kvspec.oracle)
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


def test_run_that_saw_too_little_says_so() -> None:
    found = campaign([2], 50, ORACLE_TWICE)

    short = shortfalls(found, MINIMUM)

    assert any(line.startswith("trims: ") for line in short)
