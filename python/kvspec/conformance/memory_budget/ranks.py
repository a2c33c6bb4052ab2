"""What processes of one machine leave one another. Spec: BUDGET-5 to BUDGET-8, BUDGET-12, 14."""

import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvspec.conformance import clause
from kvspec.conformance.memory_budget.limits import BudgetSuite
from kvspec.conformance.memory_budget.machine import (
    GIB,
    MIB,
    Machine,
    SimulatedRank,
    area,
    forked,
    wait_for,
)
from kvspec.conformance.suite import fuzzing
from kvspec.errors import HostMemoryError

__all__ = ["RanksConformance"]

SHARE = 8 * GIB
Say = Callable[[object], None]


def left(rank: SimulatedRank, kind: str = "mmap") -> int | None:
    bytes_left: int | None = rank.budget.report().left[kind]
    return bytes_left


def opened_by_both(pipe: Path) -> int:
    """The end to write to of a named pipe, once somebody has opened the other."""
    for _ in range(2000):
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)
    pytest.fail(f"nobody reads {pipe.name}")


class RanksConformance(BudgetSuite):
    """Processes that are simulated, and forked where the kernel has its say."""

    @clause("BUDGET-5")
    @pytest.mark.parametrize("scarce", ["ram", "cgroup"])
    def test_what_a_peer_reserved_and_has_not_touched_is_not_promised_again(
        self, scarce: str
    ) -> None:
        total = 64 * GIB if scarce == "ram" else 1024 * GIB
        with Machine(total, cgroup_max=1024 * GIB if scarce == "ram" else 64 * GIB) as machine:
            ranks = [self.rank(machine, 101 + number) for number in range(3)]
            ranks[0].reserve(40 * GIB)
            ranks[1].reserve(20 * GIB)
            for rank in ranks:
                assert left(rank) == 4 * GIB
                with pytest.raises(HostMemoryError, match=f"{scarce} leaves {4 * GIB} "):
                    rank.reserve(4 * GIB + 1)
            ranks[2].reserve(4 * GIB)
            assert left(ranks[0]) == 0
            assert {each.pid for each in ranks[0].budget.report().ranks} == {101, 102, 103}
            ranks[1].held[0][0].release()
            assert left(ranks[2]) == 20 * GIB

    @clause("BUDGET-5")
    def test_shared_memory_of_a_peer_is_not_promised_again(self) -> None:
        with Machine(1 << 60) as machine:
            one, other = (self.rank(machine, 101 + number) for number in range(2))
            before = left(other, "shm")
            assert before is not None
            one.reserve(before // 2, "shm")
            with pytest.raises(HostMemoryError, match="shm leaves"):
                other.reserve(before // 2 + 8 * GIB, "shm")
            assert left(other, "mmap") == (1 << 60) - before // 2

    @clause("BUDGET-6")
    @pytest.mark.parametrize("apart", [0, 4096], ids=["merged", "apart"])
    def test_what_is_touched_is_counted_once(self, apart: int) -> None:
        with Machine(64 * GIB, cgroup_max=60 * GIB) as machine:
            one, other = (self.rank(machine, 101 + number, apart) for number in range(2))
            one.reserve(20 * GIB)
            one.reserve(10 * GIB)
            for number in (0, 1):
                one.map(number)
                assert left(other) == left(one) == 30 * GIB
                one.touch(number, 3 * GIB)
                assert left(other) == left(one) == 30 * GIB
            one.touch(0, 17 * GIB)
            assert left(other) == left(one) == 30 * GIB
            other.reserve(30 * GIB)
            assert left(other) == left(one) == 0
            expected = [(101, 30 * GIB, 23 * GIB), (102, 30 * GIB, 0)]
            told = [(e.pid, e.reserved, e.resident) for e in other.budget.report().ranks]
            assert sorted(told) == expected

    @clause("BUDGET-6")
    @pytest.mark.parametrize("granted_first", [0, 1, 4, 7])
    def test_late_ranks_get_the_share_that_early_ones_got(self, granted_first: int) -> None:
        """Eight ranks want a tenth each of what there was; some have touched theirs already."""
        with Machine(80 * GIB) as machine:
            ranks = [self.rank(machine, 101 + number) for number in range(8)]
            for number, rank in enumerate(ranks):
                rank.reserve(SHARE)
                rank.map(0)
                if number < granted_first:
                    rank.touch(0, SHARE)
            assert left(ranks[0]) == 16 * GIB

    @clause("BUDGET-5", "BUDGET-6")
    def test_ranks_reserve_touch_and_start_in_any_order(self) -> None:
        """Whatever they do, what is left is what there was less what is reserved."""

        def play(apart: int, moves: list[tuple[int, int]]) -> None:
            with Machine(80 * GIB, cgroup_max=72 * GIB) as machine:
                ranks: dict[int, SimulatedRank] = {}
                for who, amount in moves:
                    rank = ranks.get(who)
                    if rank is None:
                        rank = ranks[who] = self.rank(machine, 101 + who, apart * MIB)
                    elif not rank.held:
                        rank.reserve(SHARE)  # which is never refused
                    elif rank.held[0][1] == 0:
                        rank.map(0)
                    else:
                        done = rank.touched[rank.held[0][1]]
                        rank.touch(0, min(amount * MIB, SHARE - done))
                    reserved = sum(len(each.held) for each in ranks.values()) * SHARE
                    assert left(rank) == 72 * GIB - reserved
                late = self.rank(machine, 109)
                reserved = sum(len(each.held) for each in ranks.values()) * SHARE
                with pytest.raises(HostMemoryError, match="cgroup leaves"):
                    late.reserve(72 * GIB - reserved + 1)
                late.reserve(72 * GIB - reserved)

        moves = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 8192)), max_size=48)
        fuzzing(40)(given(st.sampled_from([0, 1]), moves)(play))()

    @clause("BUDGET-6")
    def test_what_may_be_a_neighbours_is_not_taken_for_touched(self) -> None:
        """A mapping of 10 GiB, 8 of them reserved, 5 resident: 3 at least of the reserved."""
        with Machine(64 * GIB) as machine:
            rank = self.rank(machine, 101)
            rank.reserve(8 * GIB)
            base = 0x7F00_0000_0000
            machine.write("proc/101/smaps", area(base, 10 * GIB, 5 * GIB))
            rank.held[0][0].mapped(base + GIB, 8 * GIB)
            machine.take(5 * GIB)
            assert left(rank) == 64 * GIB - 5 * GIB - 5 * GIB
            with rank.budget.reserve("heap", 54 * GIB):
                pass

    @clause("BUDGET-6")
    def test_of_shared_memory_what_the_file_has_is_counted_once(self) -> None:
        """Though it is mapped in pieces, and most of it by nobody."""
        with Machine(64 * GIB) as machine:
            rank, base = self.rank(machine, 101), 0x7F00_0000_0000
            segment = machine.write("shm/kvspec.kv.1.2.3", "x" * MIB)
            nbytes = segment.stat().st_blocks * 512
            rank.reserve(4 * GIB, "shm")
            lies = {"path": "/dev/shm/kvspec.kv.1.2.3", "inode": segment.stat().st_ino}
            pieces = (area(base + n * 2 * GIB, 2 * GIB, 4096, **lies) for n in range(2))
            machine.write("proc/101/smaps", "".join(pieces))
            rank.held[0][0].mapped(base, 4 * GIB)
            machine.take(nbytes)
            assert left(rank) == 60 * GIB
            segment.unlink()  # now only what is mapped of it can be seen
            assert left(rank) == 60 * GIB - nbytes + 8192

    @clause("BUDGET-6")
    def test_what_is_locked_is_counted_once(self) -> None:
        with Machine(64 * GIB) as machine:
            rank, base = self.rank(machine, 101), 0x7F00_0000_0000
            machine.write("proc/101/limits", f"Max locked memory {6 * GIB} {6 * GIB} bytes\n")
            machine.write("proc/101/status", "VmLck: 0 kB\nCapEff: 0000000000000000\n")
            rank.reserve(4 * GIB, "pinned")
            assert left(rank, "pinned") == 2 * GIB
            machine.write("proc/101/smaps", area(base, 4 * GIB, 4 * GIB, locked=True))
            machine.write("proc/101/status", f"VmLck: {4 * MIB} kB\nCapEff: 0000000000000000\n")
            rank.held[0][0].mapped(base, 4 * GIB)
            machine.take(4 * GIB)
            assert left(rank, "pinned") == 2 * GIB

    @clause("BUDGET-6")
    @pytest.mark.parametrize("start", [102 * 7, 1], ids=["seen", "another of that number"])
    def test_a_rank_that_cannot_be_seen_counts_in_full(self, start: int) -> None:
        """The safe side: what it has touched may count twice."""
        with Machine(64 * GIB) as machine:
            one, other = (self.rank(machine, 101 + number) for number in range(2))
            other.reserve(10 * GIB)
            other.map(0)
            other.touch(0, 10 * GIB)
            machine.write("proc/102/stat", f"102 (x) S {' '.join(['0'] * 18)} {start}")
            assert left(one) == (54 if start == 102 * 7 else 44) * GIB

    @clause("BUDGET-7")
    def test_a_ledger_whose_owner_is_gone_is_removed(self) -> None:
        with Machine(64 * GIB) as machine:
            one, other = (self.rank(machine, 101 + number) for number in range(2))
            other.reserve(60 * GIB)
            [name] = machine.ledgers()
            machine.write("shm/kvspec-budget.4.5", "")
            (machine.shm / "kvspec-budget.6.7").write_bytes((machine.shm / name).read_bytes())
            machine.write("shm/kvspec.segment.6.7.1", "not of a budget")
            assert left(one) == 4 * GIB
            assert machine.ledgers() == [name, "kvspec.segment.6.7.1"]

    @clause("BUDGET-7")
    def test_what_a_killed_process_had_is_free_again(self) -> None:
        with Machine(64 * GIB) as machine:
            files = machine.files()
            view = machine.process(102)

            def child(say: Say) -> None:
                budget = self.make(**files | {"proc": view})
                held = budget.reserve("mmap", 60 * GIB)
                say(held.nbytes)
                signal.pause()

            process = forked(child)
            assert process[1].readline().strip() == str(60 * GIB)
            budget = self.make(**files)
            with pytest.raises(HostMemoryError, match=f"ram leaves {4 * GIB} "):
                budget.reserve("heap", 5 * GIB)
            os.kill(process[0], signal.SIGKILL)
            assert wait_for(process) == (-signal.SIGKILL, [])
            with budget.reserve("heap", 64 * GIB):
                assert machine.ledgers() == ["kvspec-budget.101.707"]
            assert machine.ledgers() == []

    @clause("BUDGET-8")
    def test_nobody_asks_while_somebody_is_answered(self) -> None:
        """A process is held up where it reads the limits: the lock is not to be had until then."""
        with Machine(64 * GIB) as machine:
            files = machine.files()
            pipe = machine.root / "proc-101" / "meminfo"
            pipe.unlink()
            os.mkfifo(pipe)

            def child(say: Say) -> None:
                held = self.make(**files).reserve("mmap", 60 * GIB)
                say(held.nbytes)
                signal.pause()

            process = forked(child)
            writing = os.fdopen(opened_by_both(pipe), "w", encoding="ascii")
            folder = os.open(machine.shm, os.O_RDONLY)
            try:
                with pytest.raises(BlockingIOError):
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                writing.write(f"MemTotal: {64 * MIB} kB\nMemAvailable: {64 * MIB} kB\n")
                writing.close()
                fcntl.flock(folder, fcntl.LOCK_EX)
                assert len(machine.ledgers()) == 1
                fcntl.flock(folder, fcntl.LOCK_UN)
                assert process[1].readline().strip() == str(60 * GIB)
            finally:
                writing.close()
                os.close(folder)
                os.kill(process[0], signal.SIGKILL)
                wait_for(process)

    @clause("BUDGET-8")
    def test_of_many_that_ask_at_once_those_get_it_that_fit(self) -> None:
        with Machine(64 * GIB) as machine:
            files = machine.files()
            views = [machine.process(102 + number) for number in range(6)]
            waiting, begin = os.pipe()

            def child(say: Say, number: int) -> None:
                os.close(begin)
                budget = self.make(**files | {"proc": views[number]})
                os.read(waiting, 1)
                try:
                    held = budget.reserve("mmap", 20 * GIB)
                except HostMemoryError:
                    say("refused")
                else:
                    say("granted")
                    signal.pause()
                    del held

            processes = [forked(lambda say, n=number: child(say, n)) for number in range(6)]
            os.close(waiting)
            os.close(begin)
            answers = sorted(said.readline().strip() for _, said in processes)
            for process in processes:
                os.kill(process[0], signal.SIGKILL)
                wait_for(process)
            assert answers == 3 * ["granted"] + 3 * ["refused"]

    @clause("BUDGET-12")
    def test_a_forked_process_has_nothing_and_leaves_its_parents(self) -> None:
        with Machine(64 * GIB) as machine:
            budget = self.make(**machine.files())
            held = budget.reserve("mmap", 40 * GIB)
            view = machine.root / "proc-101" / "self"

            def child(say: Say) -> None:
                view.unlink()
                machine.process(102)
                view.symlink_to(machine.proc / "102")
                say(budget.view().reserved)
                held.release()
                say(budget.report().left["heap"] // GIB)
                with budget.reserve("heap", 24 * GIB):
                    say(len(machine.ledgers()))

            forked_process = self.watched(lambda: wait_for(forked(child)))
            assert forked_process() == (0, ["()", "24", "2"])
            assert budget.view().reserved == (("mmap", 40 * GIB, 0),)
            assert machine.ledgers() == ["kvspec-budget.101.707"]
            budget.check()
            held.release()

    @clause("BUDGET-12")
    def test_a_child_that_lives_on_keeps_nothing_of_a_parent_that_died(self) -> None:
        with Machine(64 * GIB) as machine:
            files, view = machine.files(), machine.process(102)
            waiting, end = os.pipe()

            def live_on(_: Say) -> None:
                os.close(end)
                os.read(waiting, 1)

            def child(say: Say) -> None:
                budget = self.make(**files | {"proc": view})
                held = budget.reserve("mmap", 60 * GIB)
                forked(live_on)
                say(held.nbytes)
                signal.pause()

            process = forked(child)
            process[1].readline()
            budget = self.make(**files)
            assert budget.report().left["heap"] == 4 * GIB
            os.kill(process[0], signal.SIGKILL)
            os.waitid(os.P_PID, process[0], os.WEXITED | os.WNOWAIT)
            try:
                assert budget.report().left["heap"] == 64 * GIB
                assert machine.ledgers() == []
            finally:
                os.close(waiting)
                os.close(end)  # which ends the grandchild
                wait_for(process)

    @clause("BUDGET-14")
    def test_it_reads_one_file_for_each_rank(self) -> None:
        with Machine(64 * GIB) as machine:
            ranks = [self.rank(machine, 101 + number) for number in range(5)]
            counts = []
            for rank in ranks:
                before = rank.budget.files_read
                rank.reserve(4096)
                counts.append(rank.budget.files_read - before)
                for _ in range(20):
                    rank.reserve(4096)
            first = ranks[0].budget.files_read
            ranks[0].reserve(4096)
            plain = ranks[0].budget.files_read - first - 4  # without its four peers
            for rank in ranks:
                for number in range(len(rank.held)):
                    rank.map(number)
            first = ranks[0].budget.files_read
            with pytest.raises(HostMemoryError):
                ranks[0].reserve(64 * GIB)
            # the limits three times; of peers ledger, stat and smaps; of itself smaps
            assert ranks[0].budget.files_read - first == 3 * plain + 4 * 3 + 1
            assert [count - counts[0] for count in counts] == [0, 1, 2, 3, 4]
