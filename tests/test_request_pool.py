"""The request pool: oracle and core against the suite, against each other, and what went wrong."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.request_pool import RequestPoolConformance
from kvspec.errors import ContractError


class TestOracle(RequestPoolConformance):
    impl = kvspec.oracle


class TestNative(RequestPoolConformance):
    impl = kvspec


CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), st.integers(-1, 5)),
        st.tuples(st.just("free"), st.lists(st.integers(-1, 5), max_size=3)),
        st.tuples(
            st.just("write"),
            st.tuples(
                st.integers(0, 5), st.integers(0, 4), st.lists(st.integers(0, 9), max_size=4)
            ),
        ),
        st.tuples(
            st.just("pairs"),
            st.lists(
                st.tuples(st.integers(0, 4), st.integers(-1, 5), st.integers(0, 9)), max_size=5
            ),
        ),
        st.tuples(st.just("clear"), st.none()),
        st.tuples(st.just("commit"), st.none()),
    ),
    min_size=20,
    max_size=60,
)


def _apply(pool: Any, name: str, given: Any) -> object:
    """What a call gave: its result, or the text of its refusal."""
    try:
        if name in ("clear", "commit"):
            return getattr(pool, name)()
        if name == "write":
            row, start, slots = given
            return pool.write((row, slice(start, start + len(slots))), slots)
        if name == "pairs":
            rows, positions, slots = ([place[i] for place in given] for i in range(3))
            return pool.write((rows, positions), torch.tensor(slots, dtype=torch.int64))
        return getattr(pool, name)(given)
    except ContractError as error:
        return str(error)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@given(calls=CALLS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_lockstep(device: str, calls: list[tuple[str, Any]]) -> None:
    """The same result, text, view, counters and reports after every call."""
    pools = [impl.ReqToTokenPool(5, 6, device, False) for impl in (kvspec.oracle, kvspec)]
    seen: list[list[Any]] = [[], []]
    for pool, reports in zip(pools, seen, strict=True):
        pool.attach(lambda o, kept=reports: kept.append((o.name, o.slots.tolist(), o.number)))
    for name, given_ in calls:
        results = [_apply(pool, name, given_) for pool in pools]
        assert results[0] == results[1]
        assert pools[0].view() == pools[1].view()
        assert pools[0].counters() == pools[1].counters()
        pools[1].check()
    assert seen[0] == seen[1]


@clause("REQ-8", "REQ-13")
@given(calls=CALLS)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_commit_brings_a_lagging_table_up_to_date(calls: list[tuple[str, Any]]) -> None:
    """A pool that believes its table to be on a device, with one in host memory put under it."""
    pool = kvspec.ReqToTokenPool(5, 6, "meta", False)
    pool._table = torch.zeros((5, 6), dtype=torch.int32)
    for name, given_ in calls:
        _apply(pool, name, given_)
        pool.check()
    pool.commit()
    for row, slots in pool.view().rows.items():
        assert pool.req_to_token[row, : len(slots)].tolist() == list(slots)


@clause("REQ-10")
def test_check_looks_at_what_was_committed() -> None:
    pool = kvspec.ReqToTokenPool(2, 6, "meta", False)
    pool._table = torch.zeros((2, 6), dtype=torch.int32)
    pool.alloc(2)
    pool.write((1, slice(0, 3)), [4, 5, 6])
    pool.check()
    pool.commit()
    pool.write((1, [1]), [9])
    pool.req_to_token[1, 1] = 77
    pool.check()
    pool.req_to_token[1, 2] = 77
    with pytest.raises(ContractError, match=r"REQ-8: req_to_token\[1, 2\] is 77, the books have 6"):
        pool.check()


@clause("REQ-13")
def test_writing_again_and_again_before_a_commit_is_sent_once() -> None:
    pool = kvspec.ReqToTokenPool(2, 6, "meta", False)
    pool.alloc(1)
    for turn in range(1_000):
        pool.write(([0, 0], [0, min(turn, 5)]), [turn + 1, turn + 2])
    assert pool.commit() == 6


@clause("REQ-8")
def test_a_commit_that_fails_sends_everything_later() -> None:
    pool = kvspec.ReqToTokenPool(2, 6, "meta", False)
    pool.alloc(1)
    pool.write((0, slice(0, 3)), [1, 2, 3])
    table, pool._table = pool._table, torch.zeros(1, dtype=torch.int32)
    with pytest.raises(IndexError):
        pool.commit()
    pool._table = table
    assert pool.commit() == 3


@pytest.mark.parametrize("impl", [kvspec.oracle, kvspec], ids=["oracle", "native"])
def test_a_float_is_a_type_error_for_alloc(impl: Any) -> None:
    pool = impl.ReqToTokenPool(2, 6, "cpu", False)
    with pytest.raises(TypeError):
        pool.alloc(1.0)
