"""The memory saver: oracle and native against the suite, and against each other."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.memory_saver import MemorySaverConformance
from kvspec.errors import CLAUSE_ERRORS
from kvspec.memory_budget import MemoryBudget


class TestOracle(MemorySaverConformance):
    impl = kvspec.oracle


class TestNative(MemorySaverConformance):
    impl = kvspec


TAGS = st.sampled_from(["kv_cache", "weights"])
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), TAGS, st.booleans(), st.integers(1, 9_000)),
        st.tuples(st.just("arena"), TAGS, st.booleans(), st.integers(1, 9_000)),
        st.tuples(st.just("nest"), TAGS, TAGS, st.integers(1, 9_000)),
        st.tuples(st.just("fill"), st.integers(0, 9), st.integers(1, 255)),
        st.tuples(st.just("free"), st.integers(0, 9)),
        st.tuples(st.just("pause"), TAGS),
        st.tuples(st.just("pause"), TAGS),
        st.tuples(st.just("resume"), TAGS),
        st.tuples(st.just("resume"), TAGS),
        st.tuples(st.just("check")),
    ),
    min_size=20,
    max_size=50,
)
PAGES = 14
"""What the budget has: a history allocates more than that now and then."""


class Player:
    """An implementation, its budget, and the tensors that a history has made."""

    def __init__(self, impl: Any) -> None:
        self.impl = impl
        self.saver = type("Fresh", (impl.TorchMemorySaverAdapter,), {}).create(True)
        self.budget = MemoryBudget(limit_bytes=PAGES * 4096)
        self.tensors: list[torch.Tensor] = []

    def play(self, name: str, *given: Any) -> str:
        """What came of it: done, or whose clause refused it."""
        try:
            with self.budget.active():
                getattr(self, name)(*given)
        except CLAUSE_ERRORS as error:
            return str(error).splitlines()[0] if error.clause != "BUDGET-3" else error.clause
        return "done"

    def allocate(self, tag: str, keep: bool, size: int) -> None:
        with self.saver.region(tag, enable_cpu_backup=keep):
            self.tensors.append(torch.full((size,), size % 255 + 1, dtype=torch.uint8))

    def arena(self, tag: str, keep: bool, size: int) -> None:
        with self.saver.region(tag, keep):
            made = self.impl.HostArena("mmap", size)
        self.tensors.append(made.tensor())

    def nest(self, outer: str, inner: str, size: int) -> None:
        with self.saver.region(outer), self.saver.region(inner, True):
            self.saver.pause(outer)
            self.tensors.append(torch.zeros(size, dtype=torch.uint8))

    def fill(self, number: int, value: int) -> None:
        if number < len(self.tensors):
            self.tensors[number].fill_(value)

    def free(self, number: int) -> None:
        del self.tensors[number : number + 1]

    def pause(self, tag: str) -> None:
        self.saver.pause(tag)

    def resume(self, tag: str) -> None:
        self.saver.resume(tag)

    def check(self) -> None:
        self.saver.check()

    def state(self) -> Any:
        contents = [bytes(tensor.numpy().data) for tensor in self.tensors]
        reserved = self.budget.view().reserved
        return dict(self.saver.view()), self.saver.counters(), contents, reserved


@clause("SAVER-20")
@given(calls=CALLS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_lockstep(calls: list[tuple[Any, ...]]) -> None:
    """The same outcome, view, counters, contents and reservations after every call."""
    players = [Player(impl) for impl in (kvspec.oracle, kvspec)]
    for call in calls:
        assert players[0].play(*call) == players[1].play(*call)
        assert players[0].state() == players[1].state()


class Package:
    """What the package `torch_memory_saver` has, as far as a saver asks for it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.hook_mode = "preload"
        self.fails = False

    @contextmanager
    def region(self, tag: str, enable_cpu_backup: bool) -> Iterator[None]:
        self.calls.append(("enter", tag, enable_cpu_backup))
        try:
            yield
        finally:
            self.calls.append(("leave", tag))

    def pause(self, tag: str) -> None:
        self.calls.append(("pause", tag))
        if self.fails:
            raise RuntimeError("the device")

    def resume(self, tag: str) -> None:
        self.calls.append(("resume", tag))
        if self.fails:
            raise RuntimeError("the device")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    """Installed, with CUDA."""
    name, package = "torch_memory_saver", Package()
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(torch_memory_saver=package, configure_subprocess=nullcontext)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return package


def native_saver() -> Any:
    return type("Fresh", (kvspec.TorchMemorySaverAdapter,), {}).create(True)


def ask_the_device() -> None:
    """A factory on the device, which there is or is not: the mode sees it before that shows."""
    with suppress(RuntimeError):
        torch.ops.aten.ones.default([4], device="cuda")


@clause("SAVER-21")
def test_the_package_is_told_what_the_saver_is_told(package: Package) -> None:
    saver = native_saver()
    assert package.hook_mode == "torch"
    with saver.region("kv_cache"), saver.region("weights", enable_cpu_backup=True):
        here = torch.ones(4)
        assert package.calls == []
        ask_the_device()
    saver.pause("kv_cache")
    saver.resume("kv_cache")
    saver.pause("weights")
    with pytest.raises(ValueError, match="SAVER-12"):
        saver.pause("weights")
    saver.resume("weights")
    assert here.sum() == 4
    assert package.calls == [
        ("enter", "weights", True),
        ("leave", "weights"),
        ("pause", "weights"),
        ("resume", "weights"),
    ]
    with saver.configure_subprocess():
        pass


@clause("SAVER-21", "SAVER-15")
def test_a_package_that_fails_leaves_the_host_as_it_was(package: Package) -> None:
    saver = native_saver()
    with saver.region("weights", enable_cpu_backup=True):
        here = torch.ones(4)
        ask_the_device()
    before = dict(saver.view())
    package.fails = True
    with pytest.raises(RuntimeError, match="the device"):
        saver.pause("weights")
    assert dict(saver.view()) == before
    assert here.sum() == 4
    package.fails = False
    saver.pause("weights")
    paused = dict(saver.view())
    package.fails = True
    with pytest.raises(RuntimeError, match="the device"):
        saver.resume("weights")
    assert dict(saver.view()) == paused
    assert here.sum() == 0
    package.fails = False
    saver.resume("weights")
    assert here.sum() == 4


def test_threads_allocate_and_free_while_others_pause() -> None:
    """Two tags, each paused by one thread alone, and four threads that allocate in both."""
    saver, errors = native_saver(), []
    with saver.region("kv_cache"), saver.region("weights"):
        pass

    def allocate(tag: str) -> None:
        for turn in range(60):
            try:
                with saver.region(tag, enable_cpu_backup=bool(turn % 2)):
                    made = [torch.ones(3_000, dtype=torch.uint8) for _ in range(3)]
            except ValueError as error:
                errors.append(str(error))
                continue
            del made

    def pause(tag: str) -> None:
        for _ in range(60):
            try:
                saver.pause(tag)
            except ValueError as error:
                errors.append(str(error))
            else:
                saver.resume(tag)

    tags = ("kv_cache", "weights")
    threads = [
        threading.Thread(target=target, args=(tag,))
        for tag in tags
        for target in (allocate, allocate, pause)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {error.partition(":")[0] for error in errors} <= {"SAVER-12", "SAVER-14"}
    assert dict(saver.view()) == dict.fromkeys(tags, (False, 0, 0, 0, 0))
