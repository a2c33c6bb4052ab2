"""What a reservation costs. Clause BUDGET-14: files that are read are gated, microseconds reported.

make bench
"""

from collections.abc import Iterator
from typing import Any

import pytest

from kvspec.conformance.memory_budget.machine import GIB, Machine, SimulatedRank
from kvspec.errors import HostMemoryError
from kvspec.memory_budget import MemoryBudget, Reservation

READ = 8
"""Files that say the limits of a process without a cgroup of its own, of which two are absent."""


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(64 * GIB) as made:
        yield made


def _rank(machine: Machine, pid: int, reservations: int = 0) -> SimulatedRank:
    rank = SimulatedRank(machine, MemoryBudget, pid)
    for _ in range(reservations):
        rank.reserve(4096)
    return rank


@pytest.mark.clause("BUDGET-14")
@pytest.mark.parametrize("entries", [0, 10, 1_000])
def bench_reserve_and_release(benchmark: Any, machine: Machine, entries: int) -> None:
    """The same however many reservations the process has."""
    rank = _rank(machine, 101, entries)
    budget = rank.budget

    def turn() -> Reservation:
        reservation: Reservation = budget.reserve("mmap", GIB)
        reservation.release()
        return reservation

    turn()
    before = budget.files_read
    turn()
    assert budget.files_read - before == READ
    assert benchmark(turn).released
    assert len(budget.view().reserved) == len(rank.held) == entries


@pytest.mark.clause("BUDGET-14")
@pytest.mark.parametrize("peers", [0, 1, 7])
def bench_reserve_among_ranks(benchmark: Any, machine: Machine, peers: int) -> None:
    """A file more for each process that has reservations, a thousand each."""
    others = [_rank(machine, 102 + number, 1_000) for number in range(peers)]
    budget = _rank(machine, 101).budget

    def turn() -> None:
        budget.reserve("mmap", GIB).release()

    turn()
    before = budget.files_read
    turn()
    assert budget.files_read - before == READ + peers
    benchmark(turn)
    assert all(len(other.held) == 1_000 for other in others)


@pytest.mark.clause("BUDGET-14")
@pytest.mark.parametrize("entries", [1, 1_000])
def bench_refusal(benchmark: Any, machine: Machine, entries: int) -> None:
    """Where it does not fit, mappings are looked at: the limits twice more, and smaps once."""
    rank = _rank(machine, 101, entries)
    rank.apart = 4096
    for number in range(entries):
        address = 0x7F00_0000_0000 + 8192 * number
        rank.held[number][0].mapped(address, 4096)
        rank.held[number] = rank.held[number][0], address
        rank.touched[address] = 4096
    rank.show()
    machine.take(4096 * entries)

    def turn() -> None:
        with pytest.raises(HostMemoryError):
            rank.budget.reserve("mmap", 64 * GIB)

    turn()
    before = rank.budget.files_read
    turn()
    assert rank.budget.files_read - before == 3 * READ + 1
    benchmark(turn)
    assert rank.budget.report().ranks[0].resident == 4096 * entries
