"""What is granted, refused and given back, in one process. Spec: BUDGET-3, 4, 9 to 11, 13, 14."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.memory_budget.limits import BudgetSuite
from kvspec.conformance.memory_budget.machine import GIB, MIB, Machine
from kvspec.errors import ContractError, HostMemoryError
from kvspec.memory_budget import MemoryBudget

__all__ = ["ReservingConformance"]

KINDS = ("torch", "heap", "mmap", "shm", "pinned")
LEFT = 4 * GIB


def _of_ram(machine: Machine) -> None:
    machine.take(60 * GIB)


def _of_own_cgroup(machine: Machine) -> None:
    machine.write("cgroup/box/memory.max", f"{6 * GIB}\n")
    machine.write("cgroup/box/memory.current", f"{2 * GIB}\n")


def _of_cgroup_above(machine: Machine) -> None:
    machine.process(101, "0::/up/box\n")
    machine.write("cgroup/up/memory.high", f"{6 * GIB}\n")
    machine.write("cgroup/up/memory.current", f"{2 * GIB}\n")


def _of_commit(machine: Machine) -> None:
    machine.write("proc/sys/vm/overcommit_memory", "2\n")
    with (machine.proc / "meminfo").open("a") as file:
        file.write(f"CommitLimit: {32 * MIB} kB\nCommitted_AS: {28 * MIB} kB\n")


def _of_memlock(machine: Machine) -> None:
    machine.files()
    machine.write("proc/101/limits", f"Max locked memory {6 * GIB} {6 * GIB} bytes\n")
    machine.write("proc/101/status", f"VmLck: {2 * MIB} kB\nCapEff: 0000000000000000\n")


def _nothing(machine: Machine) -> None:
    del machine


LIMITS: dict[str, tuple[Callable[[Machine], None], str, str, dict[str, int]]] = {
    "ram": (_of_ram, "ram", "mmap", {}),
    "headroom of ram": (_nothing, "ram", "heap", {"headroom_bytes": 60 * GIB}),
    "cgroup": (_of_own_cgroup, "cgroup", "torch", {}),
    "headroom of cgroup": (_of_own_cgroup, "cgroup", "heap", {"headroom_bytes": GIB}),
    "cgroup above": (_of_cgroup_above, "cgroup", "torch", {}),
    "commit": (_of_commit, "commit", "heap", {}),
    "memlock": (_of_memlock, "memlock", "pinned", {}),
    "user": (_nothing, "user", "pinned", {"limit_bytes": LEFT}),
}


class ReservingConformance(BudgetSuite):
    """One process, on a machine that says what each test wants."""

    @clause("BUDGET-3", "BUDGET-4")
    @pytest.mark.parametrize("name", LIMITS)
    def test_what_a_limit_leaves_is_granted_and_not_a_byte_more(self, name: str) -> None:
        prepare, limit, kind, arguments = LIMITS[name]
        left = LEFT - (GIB if name == "headroom of cgroup" else 0)
        with Machine(64 * GIB) as machine:
            prepare(machine)
            budget = self.make(**machine.files(), **arguments)
            with pytest.raises(HostMemoryError, match=r"^BUDGET-3: ") as raised:
                budget.reserve(kind, left + 1, "kv of layer 3")
            said = str(raised.value)
            for part in (str(left + 1), kind, "'kv of layer 3'", f"{limit} leaves {left} "):
                assert part in said
            heading = str(budget.report()).splitlines()[0].split()  # its widths are those of now
            assert heading in [line.split() for line in said.splitlines()]
            assert budget.view().reserved == ()
            assert machine.ledgers() == []
            held = budget.reserve(kind, left)
            assert budget.view().reserved == ((kind, left, 0),)
            with pytest.raises(HostMemoryError, match=r"^BUDGET-3: 1 bytes .* leaves 0 "):
                budget.reserve(kind, 1)
            held.release()
            assert machine.ledgers() == []

    @clause("BUDGET-3", "BUDGET-4")
    def test_a_limit_holds_for_its_kinds_alone(self) -> None:
        with Machine(64 * GIB) as machine:
            _of_memlock(machine)
            budget = self.make(**machine.files())
            expected = dict.fromkeys(KINDS, 64 * GIB) | {"pinned": LEFT}
            report = budget.report()
            assert {kind: report.left[kind] for kind in KINDS if kind != "shm"} == {
                kind: left for kind, left in expected.items() if kind != "shm"
            }
            with pytest.raises(HostMemoryError, match="memlock leaves"):
                budget.reserve("pinned", LEFT + 1)
            with budget.reserve("heap", 2 * LEFT), budget.reserve("mmap", LEFT):
                assert budget.report().left["pinned"] == LEFT

    @clause("BUDGET-3", "BUDGET-4")
    def test_shared_memory_fits_in_its_file_system(self) -> None:
        with Machine(1 << 60) as machine:
            budget = self.make(**machine.files())
            left = budget.report().left["shm"]
            with pytest.raises(HostMemoryError, match="shm leaves"):
                budget.reserve("shm", left + 8 * GIB)
            assert machine.ledgers() == []
            held = budget.reserve("shm", left // 2), budget.reserve("mmap", left + 8 * GIB)
            with pytest.raises(HostMemoryError, match="shm leaves"):
                budget.reserve("shm", left // 2 + 8 * GIB)
            for each in held:
                each.release()

    @clause("BUDGET-4")
    @pytest.mark.parametrize("kind", ["mmap", "shm"])
    def test_nothing_always_fits(self, kind: str) -> None:
        with Machine(GIB) as machine:
            machine.take(GIB)
            budget = self.make(**machine.files())
            with budget.reserve(kind, 0) as held:
                held.mapped(0x7F0000000000, 0)
                assert machine.ledgers() == []
            budget.check()

    @clause("BUDGET-4")
    def test_where_nothing_is_limited_everything_fits(self) -> None:
        with Machine() as machine:
            nowhere = machine.root / "nowhere"
            budget = self.make(proc=nowhere, cgroup=nowhere, shm=machine.shm / "nowhere")
            with budget.reserve("mmap", 1 << 62):
                assert budget.report().left["mmap"] is None

    @clause("BUDGET-5")
    def test_what_is_reserved_here_is_not_reserved_again(self) -> None:
        with Machine(64 * GIB) as machine:
            budget = self.make(**machine.files())
            with budget.reserve("mmap", 40 * GIB), budget.reserve("heap", 20 * GIB):
                assert budget.report().left["torch"] == 4 * GIB
                with pytest.raises(HostMemoryError, match=f"ram leaves {4 * GIB} "):
                    budget.reserve("torch", 4 * GIB + 1)
                budget.check()
            assert budget.report().left["torch"] == 64 * GIB

    @clause("BUDGET-9")
    @pytest.mark.parametrize("how", ["release", "with", "collected", "raised"])
    def test_it_is_given_back_at_once_however_it_ends(self, how: str) -> None:
        with Machine(64 * GIB) as machine:
            budget = self.make(**machine.files())
            other = budget.reserve("heap", GIB)
            held = budget.reserve("mmap", 63 * GIB)
            assert len(machine.ledgers()) == 1
            if how == "release":
                self.watched(held.release)()
            elif how == "with":
                with held:
                    pass
            elif how == "raised":
                with pytest.raises(KeyError), held:
                    raise KeyError
            held = budget if how == "collected" else held
            assert budget.view().reserved == (("heap", GIB, 0),)
            assert budget.report().left["mmap"] == 63 * GIB
            budget.reserve("mmap", 63 * GIB).release()
            assert len(machine.ledgers()) == 1
            self.watched(other.release)()
            assert machine.ledgers() == []
            budget.check()

    @clause("BUDGET-9")
    def test_once_and_not_what_somebody_else_has_since(self) -> None:
        with Machine(64 * GIB) as machine:
            budget = self.make(**machine.files())
            first = budget.reserve("mmap", 8 * GIB)
            self.watched(first.release)()
            assert first.released
            second = budget.reserve("mmap", 8 * GIB)
            self.watched(first.release)()
            assert not second.released
            assert budget.view().reserved == (("mmap", 8 * GIB, 0),)
            assert len(machine.ledgers()) == 1
            second.release()

    @clause("BUDGET-4", "BUDGET-5", "BUDGET-9")
    def test_books_are_right_after_many_in_any_order(self) -> None:
        """Seed 7: as when each tensor of a model has a reservation of its own."""
        chance = random.Random(7)
        with Machine(64 * GIB) as machine:
            budget = self.make(**machine.files())
            held: list[Any] = []
            for _ in range(120):
                if held and chance.random() < 0.4:
                    held.pop(chance.randrange(len(held))).release()
                else:
                    kind, nbytes = chance.choice(("mmap", "heap", "shm")), chance.randrange(1, MIB)
                    held.append(budget.reserve(kind, nbytes))
            expected = sorted((each.kind, each.nbytes, 0) for each in held)
            assert list(budget.view().reserved) == expected
            total = sum(each.nbytes for each in held)
            assert budget.report().left["mmap"] == 64 * GIB - total
            budget.check()
            for each in held:
                each.release()
            assert machine.ledgers() == []

    @clause("BUDGET-10")
    def test_what_is_no_kind_and_no_number_is_refused(self) -> None:
        wrong: list[tuple[Any, Any]] = [
            *(("gpu", 1), ("", 1), (3, 1)),
            *(("heap", -1), ("heap", 1.5), ("heap", 1 << 64), ("heap", "1")),
        ]
        with Machine() as machine:
            budget = self.make(**machine.files())
            held = budget.reserve("heap", 5)
            for kind, nbytes in wrong:
                with pytest.raises(ContractError, match=r"^BUDGET-10: "):
                    budget.reserve(kind, nbytes)
            assert budget.view().reserved == (("heap", 5, 0),)
            held.release()

    @clause("BUDGET-10")
    def test_a_budget_of_no_number_is_refused(self) -> None:
        for wrong in ({"limit_bytes": -1}, {"headroom_bytes": -1}, {"headroom_bytes": "1"}):
            with pytest.raises(ContractError, match=r"^BUDGET-10: "):
                self.make(**wrong)

    @clause("BUDGET-10")
    def test_what_was_given_back_lies_nowhere(self) -> None:
        with Machine() as machine:
            budget = self.make(**machine.files())
            held = budget.reserve("heap", 4096)
            for address, nbytes in ((-1, 4096), (1 << 64, 1), (4096, -1)):
                with pytest.raises(ContractError, match=r"^BUDGET-10: "):
                    self.watched(held.mapped)(address, nbytes)
            held.release()
            other = budget.reserve("heap", 4096)
            with pytest.raises(ContractError, match=r"^BUDGET-10: "):
                self.watched(held.mapped)(4096, 4096)
            assert budget.view().reserved == (("heap", 4096, 0),)
            other.release()

    @clause("BUDGET-11")
    def test_all_pools_together_are_within_what_the_user_allows(self) -> None:
        """The pool that was asked for, and those that come with it."""
        with Machine(64 * GIB) as machine:
            budget = self.make(**machine.files(), limit_bytes=10 * GIB)
            held = [budget.reserve("pinned", 6 * GIB), budget.reserve("shm", GIB)]
            held[0].mapped(0x7F0000000000, 6 * GIB)
            assert [e.left for e in budget.report().limits if e.name == "user"] == [3 * GIB]
            with pytest.raises(HostMemoryError, match=f"user leaves {3 * GIB} "):
                budget.reserve("heap", 3 * GIB + 1)
            held.append(budget.reserve("torch", 3 * GIB))
            assert sum(nbytes for _, nbytes, _ in budget.view().reserved) == 10 * GIB
            held[1].release()
            held.append(budget.reserve("mmap", GIB))
            for each in held:
                each.release()

    @clause("BUDGET-11")
    def test_a_budget_counts_what_was_reserved_through_it(self) -> None:
        with Machine(64 * GIB) as machine:
            small = self.make(**machine.files(), limit_bytes=GIB)
            large = self.make(**machine.files())
            with large.reserve("heap", 10 * GIB), small.reserve("heap", GIB):
                assert small.view().reserved == (("heap", GIB, 0),)
                assert small.report().left["heap"] == 0
                assert large.report().left["heap"] == 53 * GIB
                assert len(machine.ledgers()) == 1

    @clause("BUDGET-13")
    def test_without_a_ledger_it_keeps_to_its_own(self) -> None:
        with Machine(64 * GIB) as machine:
            budget = self.make(**machine.files() | {"shm": machine.shm / "nowhere"})
            held = budget.reserve("mmap", 40 * GIB)
            report = budget.report()
            assert report.alone is not None
            assert "nowhere" in report.alone
            assert report.alone in str(report)
            assert report.left["mmap"] == 24 * GIB
            with pytest.raises(HostMemoryError, match="do not see this one's reservations"):
                budget.reserve("mmap", 24 * GIB + 1)
            budget.check()
            held.release()
            assert budget.report().left["mmap"] == 64 * GIB
            assert budget.report().alone is None

    @clause("BUDGET-14")
    @pytest.mark.parametrize("count", [1, 30])
    def test_it_reads_as_many_files_however_many_reservations_there_are(self, count: int) -> None:
        with Machine(64 * GIB, cgroup_max=64 * GIB) as machine:
            budget = self.make(**machine.files())
            held = [budget.reserve("heap", 4096) for _ in range(count)]
            before = budget.files_read
            held.append(budget.reserve("heap", 4096))
            # meminfo, overcommit_memory, limits, cgroup; max, high, current, stat of the box; max
            # and high of the top
            assert budget.files_read - before == 10
            before = budget.files_read
            held[0].mapped(0x7F0000000000, 4096)
            held[0].release()
            assert budget.files_read == before
            for number, each in enumerate(held[1:]):
                each.mapped(0x7F0000000000 + 4096 * number, 4096)
            before = budget.files_read
            with pytest.raises(HostMemoryError):
                budget.reserve("heap", 64 * GIB)
            assert budget.files_read - before == 31  # three times the limits, and smaps once
            for each in held:
                each.release()

    @clause("BUDGET-4")
    def test_the_active_budget_is_the_current_one(self) -> None:
        with Machine() as machine:
            budget = self.make(**machine.files())
            default = MemoryBudget.current()
            assert MemoryBudget.current() is default
            with budget.active() as active:
                assert MemoryBudget.current() is active
                assert active is not default
            assert MemoryBudget.current() is default
