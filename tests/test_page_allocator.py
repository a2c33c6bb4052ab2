"""Page allocator: the suite over oracle and core, and lockstep. Spec: PAGE."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvspec
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


class Player:
    """An allocator, the one ticket that its client keeps, and one request that grows."""

    def __init__(self, subject: Any) -> None:
        self.subject, self.ticket = subject, subject.backup_state()
        self.row = [-1]

    def play(self, name: str, *given: Any) -> Any:
        """What a call gave, as values: slots, None, or the text of its refusal."""
        try:
            result = (getattr(self, name, None) or getattr(self.subject, name))(*given)
        except ContractError as error:
            return str(error)
        return result.tolist() if isinstance(result, torch.Tensor) else result

    def alloc(self, pages: int) -> Any:
        return self.subject.alloc(pages * 4)

    def alloc_extend(self, requests: list[tuple[int, int, int]], tokens: int) -> Any:
        prefixes, new, last = ([request[i] for request in requests] for i in range(3))
        lengths = [prefix + more for prefix, more in zip(prefixes, new, strict=True)]
        total = sum(new) if tokens else tokens
        return self.subject.alloc_extend(prefixes, lengths, last, total)

    def alloc_decode(self, requests: list[tuple[int, int, int]]) -> Any:
        return self.subject.alloc_decode([r[1] for r in requests], [r[2] for r in requests])

    def grow(self, tokens: int) -> Any:
        """Legal as long as the request's pages are held."""
        prefix = len(self.row) - 1
        slots = self.subject.alloc_extend([prefix], [prefix + tokens], [self.row[-1]], tokens)
        self.row += [] if slots is None else slots.tolist()
        return slots

    def backup(self) -> None:
        self.ticket = self.subject.backup_state()

    def restore(self) -> None:
        self.subject.restore_state(self.ticket)

    def clear(self) -> None:
        self.row = [-1]
        self.subject.clear()


@clause("PAGE-16", "PAGE-15", "PAGE-8")
@given(page_size=st.sampled_from([1, 3, 4]), need_sort=st.booleans(), calls=CALLS)
def test_oracle_and_core_in_lockstep(page_size: int, need_sort: bool, calls: list[Any]) -> None:
    one, other = (Player(make(impl, page_size, need_sort)) for impl in (oracle, kvspec))
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
