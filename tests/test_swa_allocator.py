"""The allocator of two pools: the suite over oracle and core, and lockstep. Spec: SWA."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvspec
from allocator_player import Player
from kvspec import oracle
from kvspec.conformance import clause
from kvspec.conformance.swa_allocator import SWAAllocatorConformance
from kvspec.errors import ContractError

PAGES, WINDOW = 6, 5
IMPLS = pytest.mark.parametrize("impl", [oracle, kvspec], ids=lambda impl: impl.__name__)
SLOTS = st.lists(st.integers(-1, 4 * PAGES + 6), max_size=3)
SOME = st.lists(st.integers(0, 2 * PAGES), max_size=3)
REQUESTS = st.lists(
    st.tuples(st.integers(-1, 9), st.integers(0, 9), st.integers(-1, 4 * PAGES + 4)), max_size=2
)
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), st.integers(-1, 3)),
        st.tuples(st.sampled_from(["free", "move_swa"]), SLOTS, SLOTS),
        st.tuples(st.just("free_swa"), SLOTS),
        st.tuples(st.just("translate_loc_from_full_to_swa"), SLOTS),
        st.tuples(st.just("free_some"), SOME, SOME),
        st.tuples(st.just("move_some"), SOME, SOME),
        st.tuples(st.just("alloc_extend"), REQUESTS, st.integers(0, 9)),
        st.tuples(st.just("alloc_decode"), REQUESTS),
        st.tuples(st.just("grow"), st.integers(1, 3)),
        st.tuples(st.sampled_from(["free_group_begin", "free_group_end", "backup", "restore"])),
        st.tuples(st.just("clear")),
    ),
    min_size=20,
    max_size=60,
)


class TestOracle(SWAAllocatorConformance):
    impl = oracle


class TestNative(SWAAllocatorConformance):
    impl = kvspec


def make(impl: Any, page_size: int = 4, need_sort: bool = False) -> Any:
    return impl.SWATokenToKVPoolAllocator(
        size=PAGES * page_size + 1,
        size_swa=WINDOW * page_size,
        dtype=torch.float16,
        device="cpu",
        kvcache=None,
        need_sort=need_sort,
        page_size=page_size,
    )


class PairPlayer(Player):
    """One that gives back and moves pairs too."""

    def slots(self, pages: Any, which: list[int]) -> list[int]:
        """Slots of some of the pages, each once."""
        some = sorted(pages)
        chosen = dict.fromkeys(some[i % len(some)] for i in which) if some else {}
        return [page * self.subject.page_size for page in chosen]

    def free_some(self, which: list[int], alone: list[int]) -> Any:
        """Legal, except where one page is in both."""
        view = self.subject.view()
        pairs = [page for page, _ in view.pairs]
        return self.subject.free(self.slots(view.held, which), self.slots(pairs, alone))

    def move_some(self, which: list[int], alone: list[int]) -> Any:
        """Legal where there are as many of both."""
        view = self.subject.view()
        pairs = [page for page, _ in view.pairs]
        targets, sources = self.slots(view.held - {*pairs}, which), self.slots(pairs, alone)
        count = min(len(targets), len(sources))
        return self.subject.move_swa(targets[:count], sources[:count])


@clause("SWA-22", "SWA-18", "SWA-7")
@given(page_size=st.sampled_from([1, 3, 4]), need_sort=st.booleans(), calls=CALLS)
def test_oracle_and_core_in_lockstep(page_size: int, need_sort: bool, calls: list[Any]) -> None:
    one, other = (PairPlayer(make(impl, page_size, need_sort)) for impl in (oracle, kvspec))
    for call in calls:
        assert one.play(*call) == other.play(*call)
        assert one.subject.view() == other.subject.view()
        assert one.subject.digest() == other.subject.digest()
        assert one.subject.counters() == other.subject.counters()
        other.subject.check()
    assert one.seen == other.seen
    mappings = [player.subject.full_to_swa_index_mapping for player in (one, other)]
    assert torch.equal(*mappings)


@clause("SWA-24")
@pytest.mark.parametrize("page", [0, 1, PAGES + 1, -1])
@pytest.mark.parametrize("place", ["free_list", "release", "pending"])
@pytest.mark.parametrize("window", [False, True], ids=["full", "window"])
def test_check_of_the_oracle_finds_planted_pages(page: int, place: str, window: bool) -> None:
    subject = make(oracle)
    subject.check()
    getattr(subject.window if window else subject, place).append(page)
    with pytest.raises(ContractError, match=r"^SWA-1: "):
        subject.check()


@clause("SWA-24")
@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param({1: 1, 2: 2}, id="one is missing"),
        pytest.param({1: 1, 2: 2, 3: 2}, id="one has two owners"),
        pytest.param({1: 1, 2: 2, 3: 3, 4: 4}, id="one of a free page"),
        pytest.param({1: 1, 2: 2, 3: 4}, id="one is free"),
        pytest.param({1: 1, 2: 2, 3: 0}, id="one is the sink"),
        pytest.param({1: 1, 2: 2, 5: 3}, id="the full page is free"),
    ],
)
def test_check_of_the_oracle_finds_planted_pairs(pairs: dict[int, int]) -> None:
    subject = make(oracle)
    subject.alloc(12)
    subject.check()
    subject.pairs = pairs
    with pytest.raises(ContractError, match=r"^SWA-2: "):
        subject.check()


@clause("SWA-2")
@IMPLS
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_stale_pair_is_not_given_back_again(impl: Any, page_size: int) -> None:
    """A page whose pair was given back and reused does not take it from its new owner."""
    subject = make(impl, page_size)
    subject.alloc(WINDOW * page_size)
    subject.free_swa([page_size])
    subject.alloc(page_size)
    before = dict(subject.view().pairs)
    assert before[PAGES] == 1
    subject.free([page_size])
    assert dict(subject.view().pairs) == before
    assert subject.swa_available_size() == 0


@clause("SWA-9", "SWA-11", "SWA-13")
@IMPLS
@pytest.mark.parametrize(
    ("call", "given", "text"),
    [
        ("free", ([4], [12]), "SWA-9: free names page 3, which has no window page"),
        ("free", ([4], [8, 5]), "SWA-9: free names page 1 twice"),
        ("free", ([28], [4]), "SWA-9: free names page 7, which is out of range 1 .. 6"),
        ("free_swa", ([4, 16],), "SWA-11: free_swa names page 4, which is free"),
        ("free_swa", ([0],), "SWA-11: free_swa names page 0, which is the sink"),
        ("move_swa", ([12], []), "SWA-13: move_swa names 1 targets and 0 sources"),
        ("move_swa", ([8], [4]), "SWA-13: move_swa names page 2, which has a window page"),
        ("move_swa", ([12, 13], [4, 8]), "SWA-13: move_swa names page 3 twice"),
    ],
    ids=str,
)
def test_what_is_refused_is_said(impl: Any, call: str, given: tuple[Any, ...], text: str) -> None:
    subject = make(impl)
    subject.alloc(12)
    subject.free_swa([12])
    with pytest.raises(ContractError) as refusal:
        getattr(subject, call)(*given)
    assert str(refusal.value) == text
