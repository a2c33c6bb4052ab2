"""Slot allocator: the suite over oracle and core, lockstep, and what Python adds."""

import array
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvspec
from kvspec import oracle
from kvspec.conformance import clause
from kvspec.conformance.slot_allocator import SlotAllocatorConformance
from kvspec.errors import ContractError

SIZE = 8
IMPLS = pytest.mark.parametrize("impl", [oracle, kvspec], ids=lambda impl: impl.__name__)
SLOTS = st.lists(st.integers(-1, SIZE + 1), max_size=4)
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), st.integers(-1, 5)),
        st.tuples(st.just("free"), SLOTS),
        st.tuples(st.just("free"), st.lists(st.integers(1, SIZE), max_size=3, unique=True)),
        st.tuples(st.sampled_from(["free_group_begin", "free_group_end", "backup", "restore"])),
        st.tuples(st.just("clear")),
    ),
    min_size=20,
    max_size=60,
)


class TestOracle(SlotAllocatorConformance):
    impl = oracle


class TestNative(SlotAllocatorConformance):
    impl = kvspec


def make(impl: Any, size: int = SIZE, need_sort: bool = False, **given: Any) -> Any:
    arguments = {"dtype": torch.float16, "device": "cpu", "kvcache": None, **given}
    return impl.TokenToKVPoolAllocator(size=size, need_sort=need_sort, **arguments)


def answer(call: Any, *given: Any) -> Any:
    """What a call gave, as values: slots, None, or the text of its refusal."""
    try:
        result = call(*given)
    except ContractError as error:
        return str(error)
    return result.tolist() if isinstance(result, torch.Tensor) else result


class Player:
    """An allocator with the one ticket that its client keeps."""

    def __init__(self, subject: Any) -> None:
        self.subject, self.ticket = subject, subject.backup_state()

    def play(self, name: str, *given: Any) -> Any:
        if name == "backup":
            self.ticket = self.subject.backup_state()
            return None
        if name == "restore":
            return answer(self.subject.restore_state, self.ticket)
        return answer(getattr(self.subject, name), *given)


@clause("SLOT-6", "SLOT-10")
@given(need_sort=st.booleans(), calls=CALLS)
def test_oracle_and_core_in_lockstep(need_sort: bool, calls: list[Any]) -> None:
    one, other = (Player(make(impl, need_sort=need_sort)) for impl in (oracle, kvspec))
    for call in calls:
        assert one.play(*call) == other.play(*call)
        assert one.subject.view() == other.subject.view()
        assert one.subject.digest() == other.subject.digest()
        assert one.subject.counters() == other.subject.counters()
        other.subject.check()


@clause("SLOT-11")
@IMPLS
@pytest.mark.parametrize(
    "given",
    [
        [2, 3],
        (2, 3),
        range(2, 4),
        np.array([2, 3], dtype=np.int32),
        np.array([2, 9, 3, 9], dtype=np.uint64)[::2],
        array.array("q", [2, 3]),
        memoryview(array.array("i", [2, 3])),
        torch.tensor([2, 3], dtype=torch.int16),
        torch.tensor([[2, 9], [3, 9]])[:, 0],
        [np.int64(2), torch.tensor(3)],
    ],
    ids=lambda given: type(given).__name__,
)
def test_slots_may_be_given_in_many_ways(impl: Any, given: Any) -> None:
    subject = make(impl)
    subject.alloc(4)
    subject.free(given)
    assert subject.view().free == (5, 6, 7, 8, 2, 3)


@clause("SLOT-11")
@pytest.mark.parametrize(
    "given",
    [[1.5], "ab", 7, None, [[1]], torch.ones(2), torch.ones(2, 2, dtype=torch.int64), np.ones(2)],
    ids=str,
)
def test_what_is_refused_is_refused_in_the_same_words(given: Any) -> None:
    one, other = (answer(make(impl).free, given) for impl in (oracle, kvspec))
    assert one.startswith("SLOT-11: ")
    assert one == other


@clause("SLOT-13")
@pytest.mark.parametrize(("slot", "place"), [(0, "free_list"), (1, "free_list"), (99, "release")])
def test_check_of_the_oracle_finds_planted_faults(slot: int, place: str) -> None:
    subject = make(oracle)
    subject.check()
    getattr(subject, place).append(slot)
    with pytest.raises(ContractError, match=r"^SLOT-1: "):
        subject.check()


class Listener:
    """Holds the allocator that it listens to."""

    def __init__(self, subject: Any) -> None:
        self.subject = subject

    def __call__(self, operation: Any) -> None:
        """Nothing to do."""


@clause("OBS-1")
def test_an_allocator_and_its_observer_are_collected() -> None:
    subject = make(kvspec, kvcache=[])
    listener = Listener(subject)
    subject.attach(listener)
    subject.get_kvcache().append(subject)
    gone = weakref.ref(listener)
    del listener, subject
    gc.collect()
    assert gone() is None


def test_a_ticket_outlives_its_allocator() -> None:
    ticket = make(kvspec).backup_state()
    assert answer(make(kvspec).restore_state, ticket).startswith("SLOT-10: this is no ticket")
