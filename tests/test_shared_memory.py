"""Shared memory: oracle and core against the suite, against each other, and against kill -9."""

import ctypes
import fcntl
import itertools
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.shared_memory import FOLDER, SharedMemoryConformance, names_of
from kvspec.errors import HostMemoryError
from kvspec.interfaces.shared_memory import SharedSegment
from kvspec.oracle.shared_memory import SharedSegment as OracleSegment
from needs import native, root

ROOT = Path(__file__).parents[1]
LABEL = f"test-{os.getpid()}"
MIB = 2**20
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
LIBC = ctypes.CDLL(None, use_errno=True)
SEED = 20_261


class TestOracle(SharedMemoryConformance):
    impl = kvspec.oracle


class TestNative(SharedMemoryConformance):
    impl = kvspec


def implementation(name: str) -> type[SharedSegment]:
    return kvspec.oracle.SharedSegment if name == "oracle" else kvspec.SharedSegment


both = pytest.mark.parametrize("name", ["oracle", pytest.param("native", marks=native)])


def forked(action: Callable[[], object]) -> int:
    """Run it in a forked child without cleaning up; the status that `waitpid` gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch has threads; none has a lock
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            action()
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


# -- oracle and core are each other's other process ----------------------------------------------


@native
@clause("SHM-6", "SHM-8", "SHM-9")
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("creator", ["oracle", "native"])
def test_oracle_and_core_share_a_segment(creator: str, order: tuple[int, ...]) -> None:
    first = implementation(creator).create(LABEL, 5000)
    segments: list[SharedSegment] = [
        first,
        kvspec.oracle.SharedSegment.attach(first.name),
        kvspec.SharedSegment.attach(first.name),
    ]
    for value, writer in enumerate(segments, 1):
        writer.tensor()[4999] = value
        assert [int(reader.tensor()[4999]) for reader in segments] == [value] * 3
    for reaper in (kvspec.oracle.SharedSegment, kvspec.SharedSegment):
        assert first.name not in [name for name, _ in reaper.reap()]
    for index in order:
        assert names_of(LABEL) == [first.name]
        segments[index].close()
    assert names_of(LABEL) == []


# -- kill -9 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that kills the core between every two of its system calls."""
    program = tmp_path_factory.mktemp("killed") / "killed_shared_memory"
    sources = ["tests/cpp/killed_shared_memory.cpp", "cpp/shared_memory.cpp"]
    command = ["g++", "-std=c++20", "-O1", "-Iinclude", *sources, "-o", str(program)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return program


@clause("SHM-21")
def test_the_core_is_killed_at_each_step(victims: Path) -> None:
    command = [str(victims), f"{LABEL}-killed", str(SEED)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    print(f"seed {SEED}: {run.stdout}{run.stderr}")
    assert run.returncode == 0
    found = re.fullmatch(r"(\d+) kills, /dev/shm is (private|shared)\n", run.stdout)
    assert found
    assert int(found[1]) >= 200
    if os.geteuid() == 0:
        assert found[2] == "private"


def _dies_before_call(left: int) -> None:
    """From now on the n-th call of the oracle to the system is not made: the process is killed."""

    def counted(function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return call

    for module, names in (
        (os, ("open", "close", "fstat", "lstat", "unlink", "fstatvfs", "posix_fallocate")),
        (fcntl, ("flock",)),
    ):
        for name in names:
            setattr(module, name, counted(getattr(module, name)))


class AmongOwn(OracleSegment):
    """Sees the segments of this test alone, so that the number of its steps is known."""

    @staticmethod
    def _candidates() -> list[str]:
        return names_of(LABEL)


def _leave_dead() -> None:
    fd = os.open(FOLDER / f"kvspec.{LABEL}.1.1.1", os.O_CREAT | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, 5000)
    os.close(fd)


@clause("SHM-21")
@pytest.mark.parametrize("phase", ["create", "attach", "close", "leave", "reap"])
def test_the_oracle_is_killed_at_each_step(phase: str) -> None:
    def live() -> None:
        segment = AmongOwn.attach(held.name) if phase == "leave" else AmongOwn.create(LABEL, 9000)
        if phase in ("create", "reap"):
            _leave_dead()
        _dies_before_call(step)
        action: dict[str, Callable[[], object]] = {
            "create": lambda: AmongOwn.create(LABEL, 9000),
            "attach": lambda: AmongOwn.attach(held.name),
            "close": segment.close,
            "leave": segment.close,
            "reap": AmongOwn.reap,
        }
        action[phase]()
        os._exit(0)

    held = AmongOwn.create(LABEL, 9000)
    kills = 0
    for step in range(1, 100):
        status = forked(live)
        AmongOwn.create(LABEL, 1).close()
        assert names_of(LABEL) == [held.name], f"{phase}, step {step}"
        held.check()
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    assert 2 <= kills < 99
    held.close()
    assert names_of(LABEL) == []


# -- a full /dev/shm -----------------------------------------------------------------------------


def _with_small_shm(action: Callable[[], object]) -> None:
    """Run it in a child for which /dev/shm is a tmpfs of 8 MiB. Only root may mount one."""

    def child() -> None:
        assert LIBC.unshare(CLONE_NEWNS) == 0
        assert LIBC.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
        assert LIBC.mount(b"none", b"/dev/shm", b"tmpfs", 0, b"size=8m") == 0
        action()

    assert forked(child) == 0


def _free() -> int:
    found = os.statvfs(FOLDER)
    return found.f_bavail * found.f_frsize


@root
@both
@clause("SHM-3", "SHM-5")
def test_a_full_tmpfs_is_an_error_and_no_signal(name: str) -> None:
    made = implementation(name)

    def ask() -> None:
        assert _free() == 8 * MIB
        with pytest.raises(HostMemoryError, match=rf"SHM-5: {64 * MIB} .* {8 * MIB} are free"):
            made.create(LABEL, 64 * MIB)
        assert (os.listdir(FOLDER), _free()) == ([], 8 * MIB)
        with made.create(LABEL, 8 * MIB) as all_of_it:
            ctypes.memset(all_of_it.address, 7, 8 * MIB)  # threads of torch do not survive a fork
            assert _free() == 0
            with pytest.raises(HostMemoryError, match=r"SHM-5: 1 bytes .* 0 are free"):
                made.create(LABEL, 1)
        assert (os.listdir(FOLDER), _free()) == ([], 8 * MIB)

    _with_small_shm(ask)


@root
@both
@clause("SHM-15", "SHM-21")
def test_a_start_succeeds_where_the_dead_fill_the_tmpfs(name: str) -> None:
    made = implementation(name)

    def fill() -> None:
        segments = [made.create(LABEL, 2 * MIB) for _ in range(4)]
        os.kill(segments[0].view().owned * os.getpid(), signal.SIGKILL)

    def start() -> None:
        for _ in range(3):
            assert forked(fill) == signal.SIGKILL
            assert (len(os.listdir(FOLDER)), _free()) == (4, 0)
            with made.create(LABEL, 7 * MIB) as segment:
                assert os.listdir(FOLDER) == [segment.name]
        assert (os.listdir(FOLDER), _free()) == ([], 8 * MIB)

    _with_small_shm(start)


# -- other processes -----------------------------------------------------------------------------

READER = """
import sys
from kvspec{oracle} import SharedSegment
segment = SharedSegment.attach(sys.argv[1])
assert segment.tensor()[3] == 7
segment.tensor()[4] = 8
from multiprocessing import resource_tracker
assert resource_tracker._resource_tracker._fd is None
"""


@both
@clause("SHM-8", "SHM-18")
def test_a_process_attaches_and_exits(name: str) -> None:
    """It neither closes nor is warned, and no tracker of its own takes the name with it."""
    segment = implementation(name).create(LABEL, 100)
    segment.tensor()[3] = 7
    code = READER.format(oracle=".oracle" if name == "oracle" else "")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, segment.name],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stderr) == (0, "")
    segment.check()
    assert segment.tensor()[4] == 8
    segment.close()
    assert names_of(LABEL) == []


@both
@clause("SHM-17")
def test_one_pickle_is_read_by_three_processes(name: str) -> None:
    """Each of them is one more owner while it lives, and none of them takes the name with it."""
    segment = implementation(name).create(LABEL, 100)
    segment.tensor()[:] = 2
    data = pickle.dumps(segment)

    def read() -> None:
        assert int(pickle.loads(data).tensor().sum()) == 200

    assert [forked(read) for _ in range(3)] == [0] * 3
    segment.check()
    segment.close()
    assert names_of(LABEL) == []


@both
@clause("SHM-9")
def test_a_process_that_ends_takes_its_names_with_it(name: str) -> None:
    oracle = ".oracle" if name == "oracle" else ""
    code = f"""
import builtins
from kvspec{oracle} import SharedSegment
builtins.kept = SharedSegment.create({LABEL!r}, 100)
cycle = [SharedSegment.create({LABEL!r}, 100), SharedSegment.create({LABEL!r}, 100).tensor()]
cycle.append(cycle)
kept = SharedSegment.create({LABEL!r}, 100)
tensor = SharedSegment.create({LABEL!r}, 100).tensor()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert names_of(LABEL) == []
