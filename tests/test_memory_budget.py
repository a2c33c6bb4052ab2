"""The budget of host memory: the suite, and what the kernel itself has to say."""

import errno
import fcntl
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from ctypes import addressof, c_char
from pathlib import Path
from typing import Any

import pytest

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.memory_budget import MemoryBudgetConformance
from kvspec.conformance.memory_budget.machine import GIB, MIB, Forked, Machine
from kvspec.errors import HostMemoryError
from kvspec.memory_budget import MemoryBudget
from needs import root

Say = Callable[[object], None]


class TestOracle(MemoryBudgetConformance):
    impl = kvspec.oracle


class TestNative(MemoryBudgetConformance):
    impl = kvspec


class RealProcesses(Machine):
    """A machine that says what memory there is, and shows the mappings of real processes."""

    def __init__(self) -> None:
        super().__init__(64 * GIB)
        (self.proc / "self").symlink_to("/proc/self")

    def budget(self, **more: Any) -> MemoryBudget:
        return MemoryBudget(proc=self.proc, cgroup=self.cgroup, shm=self.shm, **more)

    def start(self, child: Callable[[Say], None]) -> Forked:
        process = self.fork(child)
        (self.proc / str(process.pid)).symlink_to(f"/proc/{process.pid}")
        return process


def mapped(nbytes: int, touched: int, file: int = -1) -> tuple[int, mmap.mmap]:
    """Private memory, or a file's, the first part of it touched; it must be kept."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if file < 0 else mmap.MAP_SHARED
    memory = mmap.mmap(file, nbytes, flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for page in range(0, touched, mmap.PAGESIZE):
        memory[page] = 1
    return addressof(c_char.from_buffer(memory)), memory


@clause("BUDGET-5", "BUDGET-6")
def test_what_a_real_process_touched_is_seen_by_another() -> None:
    with RealProcesses() as machine:

        def child(say: Say) -> None:
            reservation = machine.budget().reserve("mmap", 64 * MIB)
            address, memory = mapped(64 * MIB, 32 * MIB)
            reservation.mapped(address, 64 * MIB)
            say("mapped")
            signal.pause()
            del memory

        process = machine.start(child)
        assert process.said.readline() == "mapped\n"
        budget = machine.budget()
        own, peer = budget.report().ranks
        assert (own.pid, own.reserved) == (os.getpid(), 0)
        assert (peer.pid, peer.reserved) == (process.pid, 64 * MIB)
        assert 31 * MIB <= peer.resident <= 32 * MIB  # what a neighbour might have is not counted
        assert process.kill() == (-signal.SIGKILL, [])
        assert [rank.pid for rank in budget.report().ranks] == [os.getpid()]
        assert machine.ledgers() == []


@clause("BUDGET-6")
def test_of_its_own_memory_too_and_of_a_file_what_it_has() -> None:
    with RealProcesses() as machine:
        budget = machine.budget()
        with (machine.shm / "segment").open("w+b") as file:
            file.truncate(8 * MIB)
            address, memory = mapped(8 * MIB, 0, file.fileno())
            with budget.reserve("shm", 8 * MIB) as reservation:
                reservation.mapped(address, 8 * MIB)
                assert budget.report().ranks[0].resident == 0
                os.posix_fallocate(file.fileno(), 0, 2 * MIB)  # no page of it is mapped
                assert 2 * MIB <= budget.report().ranks[0].resident <= 2 * MIB + 65536
            del memory
        assert budget.report().left["mmap"] == 64 * GIB


@clause("BUDGET-7", "BUDGET-8")
def test_killed_at_any_step_of_a_reservation_it_leaves_nothing() -> None:
    """At the first call that changes or locks a file, at the second, and so on until it is done."""
    ended = []
    with RealProcesses() as machine:
        for step in range(1, 30):

            def child(say: Say, step: int = step) -> None:
                left = [step]

                def counted(function: Any) -> Any:
                    def call(*args: Any, **kwargs: Any) -> Any:
                        left[0] -= 1
                        if not left[0]:
                            os.kill(os.getpid(), signal.SIGKILL)
                        return function(*args, **kwargs)

                    return call

                for module, name in (
                    *((os, name) for name in ("open", "close", "pwrite", "fchmod", "listdir")),
                    (fcntl, "flock"),
                ):
                    setattr(module, name, counted(getattr(module, name)))
                budget = machine.budget()
                held = [budget.reserve("mmap", GIB), budget.reserve("heap", 60 * GIB)]
                say(len(held))

            ended.append(machine.start(child).wait()[0])
            budget = machine.budget()
            assert budget.report().left["mmap"] == 64 * GIB
            assert machine.ledgers() == []
            if ended[-1] == 0:
                break
    assert ended[-1] == 0, ended
    assert set(ended[:-1]) == {-signal.SIGKILL}
    assert len(ended) > 10


@clause("BUDGET-9")
def test_a_process_that_ends_takes_its_ledger_along() -> None:
    code = (
        "import sys, os; from kvspec.memory_budget import MemoryBudget;"
        " kept = MemoryBudget(shm=sys.argv[1]).reserve('heap', 4096);"
        " print(*os.listdir(sys.argv[1]))"
    )
    with Machine() as machine:
        command = [sys.executable, "-c", code, str(machine.shm)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        assert done.stdout.startswith("kvspec-budget.")
        assert machine.ledgers() == []


@clause("BUDGET-9")
def test_threads_that_reserve_and_drop_at_once_end_with_nothing() -> None:
    with RealProcesses() as machine:
        budget = machine.budget(limit_bytes=GIB)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(40):
                    held = [budget.reserve("heap", MIB) for _ in range(3)]
                    held[0].release()
                    held.clear()  # the others are collected
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not errors
        gc.collect()
        assert budget.view().reserved == ()
        assert machine.ledgers() == []
        budget.check()


@clause("BUDGET-9")
def test_a_finalizer_in_the_middle_of_anything_does_not_wait() -> None:
    """It may run while its own thread has the lock, or one that waits for ours."""
    with RealProcesses() as machine:
        budget = machine.budget()
        first, second = budget.reserve("heap", 1), budget.reserve("heap", 2)
        with budget._own_ledger().held():
            second.mapped(4096, 2)
            first.release()
            del first
        assert budget.view().reserved == (("heap", 2, 2),)
        with budget._own_ledger().held():
            second.release()
        assert machine.ledgers() == []


@clause("BUDGET-13")
def test_a_full_tmpfs_makes_it_count_alone_until_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RealProcesses() as machine:
        budget = machine.budget()
        first = budget.reserve("heap", GIB)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            second = budget.reserve("heap", GIB)
            assert budget.report().alone == f"{machine.shm}: No space left on device"
            assert machine.ledgers() == []
            third = budget.reserve("heap", GIB)
            budget.check()
            with pytest.raises(HostMemoryError, match=f"ram leaves {61 * GIB} "):
                budget.reserve("heap", 61 * GIB + 1)
        fourth = budget.reserve("heap", GIB)
        assert budget.report().alone is None
        assert len(machine.ledgers()) == 1
        budget.check()
        for held in (first, second, third, fourth):
            held.release()
        assert machine.ledgers() == []


@clause("BUDGET-5", "BUDGET-7")
def test_a_name_that_is_taken_is_left_to_who_has_it() -> None:
    """Two containers that share /dev/shm, each with a process 1 that started with the other."""
    with Machine(64 * GIB) as machine:
        views = [machine.process(101), machine.process(102)]
        machine.write("proc/102/stat", (machine.proc / "101" / "stat").read_text())
        one, other = (MemoryBudget(proc=v, cgroup=machine.cgroup, shm=machine.shm) for v in views)
        held = one.reserve("mmap", 40 * GIB), other.reserve("mmap", 20 * GIB)
        names = ["kvspec-budget.101.707", "kvspec-budget.101.707.1"]
        assert machine.ledgers() == names
        assert one.report().left["mmap"] == other.report().left["mmap"] == 4 * GIB
        held[0].release()
        assert machine.ledgers() == names[1:]
        held[1].release()


@clause("BUDGET-5")
@root
def test_users_count_one_another() -> None:
    with RealProcesses() as machine:
        machine.root.chmod(0o755)
        machine.shm.chmod(0o1777)
        mine = machine.budget()
        held = mine.reserve("mmap", 40 * GIB)
        address, memory = mapped(MIB, MIB)
        held.mapped(address, MIB)

        def child(say: Say) -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.umask(0o077)
            budget = machine.budget()
            say(budget.report().left["mmap"])
            theirs = budget.reserve("mmap", 20 * GIB)
            say(theirs.nbytes)
            signal.pause()

        process = machine.start(child)
        assert [int(process.said.readline()) for _ in range(2)] == [24 * GIB, 20 * GIB]
        assert mine.report().left["mmap"] == 4 * GIB + mine.report().ranks[0].resident
        process.kill()
        held.release()
        assert mine.report().left["mmap"] == 64 * GIB
        assert machine.ledgers() == []
        del memory


@clause("BUDGET-1")
def test_this_machine_is_read() -> None:
    report = MemoryBudget().report()
    [ram] = [each for each in report.limits if each.name == "ram"]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert ram.limit is not None
    assert abs(ram.limit - total) < 4 * MIB
    [shm] = [each for each in report.limits if each.name == "shm"]
    assert shm.limit == os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    for each in report.limits:
        if each.name == "cgroup" and each.limit is not None:
            assert Path(each.source).read_text()
    assert str(report).startswith("limit ")
