"""Page allocator: the suite over oracle and core, and lockstep. Spec: PAGE."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvspec
from allocator_player import Player
from kvspec import oracle
from kvspec.conformance import clause
from kvspec.conformance.page_allocator import PageAllocatorConformance
from kvspec.errors import ContractError

PAGES = 6
SLOTS = st.lists(st.integers(-1, 4 * PAGES + 6), max_size=5)
REQUESTS = st.lists(
    st.tuples(st.integers(-1, 9), st.integers(0, 9), st.integers(-1, 4 * PAGES + 4)), max_size=3
)
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), st.integers(-1, 4)),
        st.tuples(st.just("alloc"), st.just(1)),
        st.tuples(st.just("free"), SLOTS),
        st.tuples(st.just("free"), st.lists(st.integers(4, 4 * PAGES + 3), max_size=2)),
        st.tuples(st.just("alloc_extend"), REQUESTS, st.integers(0, 9)),
        st.tuples(st.just("grow"), st.integers(1, 3)),
        st.tuples(st.just("alloc_decode"), REQUESTS),
        st.tuples(st.sampled_from(["free_group_begin", "free_group_end", "backup", "restore"])),
        st.tuples(st.just("clear")),
    ),
    min_size=20,
    max_size=60,
)


class TestOracle(PageAllocatorConformance):
    impl = oracle


class TestNative(PageAllocatorConformance):
    impl = kvspec


def make(impl: Any, page_size: int = 4, need_sort: bool = False) -> Any:
    return impl.PagedTokenToKVPoolAllocator(
        size=PAGES * page_size + 1,
        page_size=page_size,
        dtype=torch.float16,
        device="cpu",
        kvcache=None,
        need_sort=need_sort,
    )


class PagePlayer(Player):
    """One that does not always ask for whole pages."""

    def alloc(self, pages: int) -> Any:
        return self.subject.alloc(pages * 4)


@clause("PAGE-16", "PAGE-15", "PAGE-8")
@given(page_size=st.sampled_from([1, 3, 4]), need_sort=st.booleans(), calls=CALLS)
def test_oracle_and_core_in_lockstep(page_size: int, need_sort: bool, calls: list[Any]) -> None:
    one, other = (PagePlayer(make(impl, page_size, need_sort)) for impl in (oracle, kvspec))
    for call in calls:
        assert one.play(*call) == other.play(*call)
        assert one.subject.view() == other.subject.view()
        assert one.subject.digest() == other.subject.digest()
        assert one.subject.counters() == other.subject.counters()
        other.subject.check()


@clause("PAGE-19")
@pytest.mark.parametrize(
    ("page", "clause_id"), [(0, "PAGE-2"), (1, "PAGE-1"), (PAGES + 1, "PAGE-1"), (-1, "PAGE-1")]
)
@pytest.mark.parametrize("place", ["free_list", "release", "pending"])
def test_check_of_the_oracle_finds_planted_faults(page: int, clause_id: str, place: str) -> None:
    subject = make(oracle)
    subject.check()
    getattr(subject, place).append(page)
    with pytest.raises(ContractError, match=f"^{clause_id}: "):
        subject.check()


@clause("PAGE-10")
def test_the_remainder_is_out_of_range() -> None:
    for impl in (oracle, kvspec):
        subject = make(impl, page_size=4)
        subject.alloc(4)
        with pytest.raises(ContractError, match=r"page 7, which is out of range 1 \.\. 6"):
            subject.free([4, 28])
