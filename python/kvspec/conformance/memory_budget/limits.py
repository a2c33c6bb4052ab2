"""What is read of the kernel's files. Spec: BUDGET-1, BUDGET-2, BUDGET-15."""

from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.memory_budget.machine import GIB, MIB, Machine, SimulatedRank
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import watch_function
from kvspec.memory_budget import MemoryBudget

__all__ = ["BudgetSuite", "LimitsConformance"]

V1_UNLIMITED = 9223372036854771712
_STAT = """anon {anon}
file {file}
shmem {shmem}
inactive_anon {anon}
active_anon {shmem}
inactive_file {inactive}
active_file {active}
unevictable 4096
slab_reclaimable 1048576
"""
_LOCKS = "Limit                     Soft Limit           Hard Limit           Units\n"


def stat_of(prefix: str = "", **bytes_of: int) -> str:
    """memory.stat: `file` is all of the page cache, shared memory in it."""
    numbers = {"anon": 0, "file": 0, "shmem": 0, "inactive": 0, "active": 0} | bytes_of
    own = _STAT.format(**dict.fromkeys(numbers, 0)) if prefix else ""
    return own + "".join(prefix + line for line in _STAT.format(**numbers).splitlines(True))


class BudgetSuite(Conformance):
    """`impl` may hold a class `MemoryBudget`, which then stands in for that of kvspec."""

    def make(self, **arguments: Any) -> Any:
        return self.subject("MemoryBudget", MemoryBudget, "memory_budget", **arguments)

    def watched(self, function: Any) -> Any:
        """A method of a reservation, or a function that a clause speaks of."""
        if self.impl_name == MUTANT:
            return function
        return watch_function(self.impl_name, function, "memory_budget")

    def rank(self, machine: Machine, pid: int, apart: int = 0, **more: Any) -> SimulatedRank:
        return SimulatedRank(machine, self.make, pid, apart, **more)


def told(budget: Any, name: str) -> list[tuple[str, int | None, int | None]]:
    """Source, limit and use of the limits of a name."""
    return [(e.source, e.limit, e.used) for e in budget.report().limits if e.name == name]


class LimitsConformance(BudgetSuite):
    """Trees of files such as kernels show, written by hand."""

    @clause("BUDGET-1")
    def test_ram_is_what_is_available(self) -> None:
        with Machine(64 * GIB) as machine:
            machine.take(24 * GIB)
            files = machine.files()
            budget = self.make(**files)
            assert told(budget, "ram") == [(f"{files['proc']}/meminfo", 64 * GIB, 24 * GIB)]
            assert budget.report().left["heap"] == 40 * GIB
            machine.take(GIB)
            assert budget.report().left["heap"] == 39 * GIB

    @clause("BUDGET-1")
    def test_every_cgroup_above_is_a_limit(self) -> None:
        """The least of them stands in none of the process's own files."""
        with Machine(1024 * GIB) as machine:
            machine.process(101, "3:cpu:/elsewhere\n0::/pods/pod 1/work\n")
            machine.write("cgroup/pods/memory.max", f"{64 * GIB}\n")
            machine.write("cgroup/pods/memory.current", f"{60 * GIB}\n")
            machine.write("cgroup/pods/pod 1/memory.max", "max\n")
            machine.write("cgroup/pods/pod 1/memory.high", f"{32 * GIB}\n")
            machine.write("cgroup/pods/pod 1/memory.current", f"{5 * GIB}\n")
            machine.write("cgroup/pods/pod 1/work/memory.max", "max\n")
            machine.write("cgroup/pods/pod 1/work/memory.high", "max\n")
            budget, top = self.make(**machine.files()), machine.cgroup
            assert told(budget, "cgroup") == [
                (f"{top}/pods/pod 1/work/memory.max", None, None),
                (f"{top}/pods/pod 1/memory.high", 32 * GIB, 5 * GIB),
                (f"{top}/pods/memory.max", 64 * GIB, 60 * GIB),
                (f"{top}/memory.max", None, None),
            ]
            assert budget.report().left["torch"] == 4 * GIB

    @clause("BUDGET-1")
    def test_version_1_is_found_beside_version_2(self) -> None:
        """Through the mounts, of which only one has the memory controller."""
        with Machine(1024 * GIB) as machine:
            machine.process(101, "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n")
            machine.write(
                "proc/101/mountinfo",
                "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
                "33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
                "35 31 0:32 / /sys/fs/cgroup/mem\\040ory rw shared:7 - cgroup cgroup rw,memory\n"
                "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            )
            place = "cgroup/mem ory/docker"
            machine.write(f"{place}/abc/memory.limit_in_bytes", f"{8 * GIB}\n")
            machine.write(f"{place}/abc/memory.usage_in_bytes", f"{3 * GIB}\n")
            machine.write(f"{place}/memory.limit_in_bytes", f"{V1_UNLIMITED}\n")
            machine.write(f"{place}/memory.usage_in_bytes", f"{7 * GIB}\n")
            machine.write(f"{place}/../memory.limit_in_bytes", "9223372036854710272\n")
            budget, top = self.make(**machine.files()), f"{machine.cgroup}/mem ory"
            assert told(budget, "cgroup") == [
                (f"{top}/docker/abc/memory.limit_in_bytes", 8 * GIB, 3 * GIB),
                (f"{top}/docker/memory.limit_in_bytes", None, None),
                (f"{top}/memory.limit_in_bytes", None, None),
            ]

    @clause("BUDGET-1")
    def test_a_limit_above_what_is_mounted_is_known_by_the_hierarchical_one(self) -> None:
        with Machine(1024 * GIB) as machine:
            machine.process(101, "4:memory:/docker/abc\n")
            machine.write(
                "proc/101/mountinfo",
                "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            )
            machine.write("cgroup/memory/memory.limit_in_bytes", f"{V1_UNLIMITED}\n")
            machine.write("cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
            limit = f"hierarchical_memory_limit {4 * GIB}\n"
            machine.write("cgroup/memory/memory.stat", stat_of() + limit)
            budget = self.make(**machine.files())
            source = f"{machine.cgroup}/memory/memory.limit_in_bytes"
            assert told(budget, "cgroup") == [(source, 4 * GIB, GIB)]

    @clause("BUDGET-1")
    @pytest.mark.parametrize(
        ("path", "root"),
        [("/", "/"), ("/", "/../.."), ("/../other", "/"), ("/kube/pod", "/kube/pod")],
        ids=["namespace", "mount above", "process outside", "bind mount"],
    )
    def test_the_root_of_a_namespace_is_a_cgroup_with_a_limit(self, path: str, root: str) -> None:
        with Machine(1024 * GIB) as machine:
            machine.process(101, f"0::{path}\n")
            mount = f"30 24 0:26 {root} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n"
            machine.write("proc/101/mountinfo", mount)
            machine.write("cgroup/cgroup.type", "domain\n")
            machine.write("cgroup/memory.max", f"{70 * GIB}\n")
            machine.write("cgroup/memory.current", f"{GIB}\n")
            budget = self.make(**machine.files())
            assert told(budget, "cgroup")[-1] == (f"{machine.cgroup}/memory.max", 70 * GIB, GIB)

    @clause("BUDGET-1")
    def test_what_no_file_says_is_no_limit(self) -> None:
        with Machine() as machine:
            nowhere = machine.root / "nowhere"
            report = self.make(proc=nowhere, cgroup=nowhere, shm=nowhere).report()
            assert [each.name for each in report.limits] == [
                *("ram", "commit", "cgroup", "shm", "memlock", "user"),
            ]
            assert all(each.limit is each.used is each.left is None for each in report.limits)
            assert set(report.left.values()) == {None}
            machine.write("proc/meminfo", f"MemTotal: {64 * MIB} kB\nMemAvailable: kB\n")
            machine.write("cgroup/box/memory.max", "12GB\n")
            report = self.make(**machine.files()).report()
            names = ("ram", "cgroup")
            assert all(each.limit is None for each in report.limits if each.name in names)

    @clause("BUDGET-1")
    @pytest.mark.parametrize("said", ["0", "1", "2", None])
    def test_what_may_be_committed_is_a_limit_where_the_kernel_keeps_to_it(
        self, said: str | None
    ) -> None:
        with Machine(64 * GIB) as machine:
            if said:
                machine.write("proc/sys/vm/overcommit_memory", f"{said}\n")
            files = machine.files()
            with (machine.proc / "meminfo").open("a") as file:
                file.write(f"CommitLimit: {32 * MIB} kB\nCommitted_AS: {30 * MIB} kB\n")
            budget, source = self.make(**files), f"{files['proc']}/meminfo"
            strict = said == "2"
            known = (source, 32 * GIB, 30 * GIB) if strict else (source, None, None)
            assert told(budget, "commit") == [known]
            assert budget.report().left["heap"] == (2 if strict else 64) * GIB

    @clause("BUDGET-1")
    @pytest.mark.parametrize(
        ("limit", "capabilities", "users", "expected"),
        [
            ("65536", "0000000000000000", "0 0 4294967295", 65536),
            ("unlimited", "0000000000000000", "0 0 4294967295", None),
            ("65536", "0000000000004000", "         0          0 4294967295", None),
            ("65536", "000001ffffffffff", None, None),
            ("65536", "000001ffffffffff", "0 1000 1", 65536),
        ],
        ids=["plain", "unlimited", "capable", "capable, users unknown", "of a namespace"],
    )
    def test_locked_memory_is_limited_for_who_may_not_lock_more(
        self, limit: str, capabilities: str, users: str | None, expected: int | None
    ) -> None:
        with Machine() as machine:
            files = machine.files()
            row = f"Max locked memory         {limit:<20} unlimited            bytes\n"
            machine.write("proc/101/limits", f"{_LOCKS}{row}")
            machine.write("proc/101/status", f"VmLck:\t      16 kB\nCapEff:\t{capabilities}\n")
            if users:
                machine.write("proc/101/uid_map", f"{users}\n")
            budget, source = self.make(**files), f"{files['proc']}/self/limits"
            used = None if expected is None else 16384
            assert told(budget, "memlock") == [(source, expected, used)]
            left = budget.report().left
            assert left["pinned"] == (left["heap"] if expected is None else expected - 16384)

    @clause("BUDGET-1")
    def test_shared_memory_is_limited_by_its_file_system(self) -> None:
        with Machine(1 << 60) as machine:
            budget = self.make(**machine.files())
            [(source, limit, used)] = told(budget, "shm")
            assert source == str(machine.shm)
            assert limit is not None
            assert used is not None
            left = budget.report().left
            assert left["shm"] <= limit < left["mmap"]

    @clause("BUDGET-2")
    @pytest.mark.parametrize("version", [1, 2])
    def test_file_pages_are_given_back_and_shared_memory_is_not(self, version: int) -> None:
        """A checkpoint of 7 GiB was read, and 2 GiB lie in shared memory: 8 GiB are free of 10."""
        numbers = {"file": 9 * GIB, "shmem": 2 * GIB, "inactive": 4 * GIB, "active": 3 * GIB}
        with Machine(1024 * GIB) as machine:
            if version == 2:
                machine.process(101, "0::/box\n")
                machine.write("cgroup/box/memory.max", f"{10 * GIB}\n")
                machine.write("cgroup/box/memory.current", f"{9 * GIB}\n")
                machine.write("cgroup/box/memory.stat", stat_of(**numbers))
            else:
                machine.process(101, "4:memory:/box\n")
                place = "cgroup/memory/box/memory."
                machine.write(f"{place}limit_in_bytes", f"{10 * GIB}\n")
                machine.write(f"{place}usage_in_bytes", f"{9 * GIB}\n")
                machine.write(f"{place}stat", stat_of("total_", **numbers))
            budget = self.make(**machine.files())
            assert told(budget, "cgroup")[0][1:] == (10 * GIB, 2 * GIB)
            assert budget.report().left["mmap"] == 8 * GIB
            budget.reserve("mmap", 8 * GIB).release()

    @clause("BUDGET-2")
    def test_lists_that_are_ahead_of_the_usage_give_no_more_than_it(self) -> None:
        """The kernel adds them up at different times."""
        with Machine(1024 * GIB, cgroup_max=10 * GIB) as machine:
            machine.take(GIB)
            machine.write("cgroup/box/memory.stat", stat_of(inactive=GIB, active=GIB))
            assert self.make(**machine.files()).report().left["mmap"] == 10 * GIB

    @clause("BUDGET-15")
    @pytest.mark.parametrize("hidden", [False, True])
    def test_a_rank_of_another_cgroup_counts_where_it_may_be_in_this_one(
        self, hidden: bool
    ) -> None:
        with Machine(64 * GIB, cgroup_max=10 * GIB) as machine:
            if hidden:  # what is mounted at the top is the root of a namespace
                machine.write("cgroup/cgroup.type", "domain\n")
            machine.write("cgroup/other/memory.max", f"{10 * GIB}\n")
            machine.process(102, "0::/other\n")
            other = self.make(**machine.files() | {"proc": machine.root / "proc-102"})
            budget = self.make(**machine.files())
            held = other.reserve("mmap", 8 * GIB)
            left = {each.source: each.left for each in budget.report().limits if each.limit}
            assert left[f"{machine.cgroup}/box/memory.max"] == (2 if hidden else 10) * GIB
            assert left[f"{machine.root}/proc-101/meminfo"] == 56 * GIB
            held.release()
