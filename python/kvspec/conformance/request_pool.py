"""What every pool of request rows must do. Spec: REQ."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvspec.conformance import clause
from kvspec.conformance.suite import Conformance, fuzzing
from kvspec.errors import ContractError
from kvspec.interfaces.request_pool import ReqToTokenPool

__all__ = ["RequestPoolConformance"]

Kind = Callable[[list[int]], Any]
KINDS: dict[str, Kind] = {
    "list": list,
    "tuple": tuple,
    "array": lambda numbers: np.array(numbers, dtype=np.int32),
    "buffer": lambda numbers: memoryview(array("q", numbers)),
    "tensor": lambda numbers: torch.tensor(numbers, dtype=torch.int64),
    "tensor of int32": lambda numbers: torch.tensor(numbers, dtype=torch.int32),
    "strided tensor": lambda numbers: (
        torch.tensor(numbers, dtype=torch.int64).repeat(2, 1).t()[:, 0]
    ),
}
ROW_KINDS: dict[str, Callable[[int], Any]] = {
    "int": int,
    "numpy int": np.int64,
    "numpy int32": np.int32,
    "tensor of no dimension": torch.tensor,
}
BAD_WRITES: dict[str, tuple[Any, Any]] = {
    "a free row": ((3, slice(0, 1)), [9]),
    "a row below 0": ((-1, slice(0, 1)), [9]),
    "a row beyond the pool": ((4, slice(0, 1)), [9]),
    "one free row of two": (([0, 3], [2, 0]), [9, 9]),
    "a free row and no position": ((3, slice(0, 0)), []),
    "a slice beyond the width": ((0, slice(2, 9)), [9] * 7),
    "a slice beyond the width by far": ((0, slice(2, 2**62)), [9] * 6),
    "a slice that torch would clamp": ((0, slice(0, 12)), [9] * 8),
    "a position at the width": ((2, [8]), [9]),
    "a position below 0": ((0, [-1]), [9]),
    "a slice below 0": ((0, slice(-2, 0)), [9, 9]),
    "a hole": ((0, [3]), [9]),
    "a hole before a slice": ((0, slice(3, 5)), [9, 9]),
    "a hole in the middle": ((0, [2, 4]), [9, 9]),
    "a slice that steps over a hole": ((0, slice(1, None, 2)), [9, 9, 9, 9]),
    "a hole in another row": (([0, 1], [2, 2]), [9, 9]),
    "too few values": ((0, slice(0, 3)), [9, 9]),
    "too many values": ((0, [0]), [9, 9]),
    "too few rows": (([0, 1], [0, 1, 2]), [9, 9, 9]),
    "rows with a slice": (([0, 1], slice(0, 2)), [9, 9]),
    "the sink": ((0, slice(2, 4)), [9, 0]),
    "a slot below 0": ((0, [0]), [-1]),
    "a slot of 32 bits": ((0, slice(2, 4)), [9, 2**31]),
    "a slot that wraps to 1": ((0, [0]), [2**32 + 1]),
    "values of two dimensions": ((0, slice(0, 1)), torch.tensor([[9]])),
    "values that are no integers": ((0, slice(0, 1)), torch.tensor([9.0])),
    "positions that are no integers": ((0, [0.0]), [9]),
    "no positions": ((0,), [9]),
    "a slice without a stop": ((0, slice(0, None)), [9]),
}


def _table(pool: Any, row: int) -> list[int]:
    slots: list[int] = pool.req_to_token[row, : pool.row_length(row)].tolist()
    return slots


def _refused(clause_id: str, call: Callable[[], object]) -> None:
    with pytest.raises(ContractError) as caught:
        call()
    assert str(caught.value).startswith(f"{clause_id}: ")


class RequestPoolConformance(Conformance):
    """Tests of `ReqToTokenPool` and `DecodeReqToTokenPool`."""

    def make(self, name: str = "ReqToTokenPool", **given: Any) -> Any:
        """A pool of 4 rows of 8 positions on the CPU, unless told otherwise."""
        defaults = {"size": 4, "max_context_len": 8, "device": "cpu", "enable_memory_saver": False}
        rooms = ("request_pool", "observer")
        return self.subject(name, ReqToTokenPool, *rooms, **(defaults | given))

    def used(self) -> Any:
        """Rows 0, 1, 2 live with 2, 1 and 8 slots; row 3 free."""
        pool = self.make()
        pool.alloc(3)
        pool.write((0, slice(0, 2)), [11, 12])
        pool.write((1, slice(0, 1)), [21])
        pool.write((2, slice(0, 8)), list(range(31, 39)))
        return pool

    def refuses(self, pool: Any, clause_id: str, call: Callable[[], object]) -> None:
        """It refuses, names the clause, and changes neither books nor table."""
        before, table = pool.view(), pool.req_to_token.clone()
        _refused(clause_id, call)
        assert pool.view() == before
        assert torch.equal(pool.req_to_token, table)

    @clause("REQ-1")
    def test_a_row_is_free_or_live(self) -> None:
        pool = self.make()
        rows = pool.alloc(3)
        pool.free(rows[1])
        free, live = pool.view()
        assert sorted([*free, *live]) == [0, 1, 2, 3]
        assert pool.available_size() == len(free) == 2
        assert pool.free_slots == list(free)
        pool.check()

    @clause("REQ-1")
    def test_a_hundred_requests_leave_every_row(self) -> None:
        pool = self.make()
        for turn in range(100):
            rows = pool.alloc(turn % 5)
            assert rows is not None
            pool.free(rows[::-1])
        assert sorted(pool.free_slots) == [0, 1, 2, 3]

    @clause("REQ-1", "REQ-7")
    @pytest.mark.parametrize("row", [-1, 0, 4])
    def test_only_live_rows_can_be_read(self, row: int) -> None:
        pool = self.make()
        for read in (pool.row, pool.row_length):
            with pytest.raises(ContractError):
                read(row)

    @clause("REQ-2")
    def test_rows_come_in_the_order_in_which_they_were_freed(self) -> None:
        pool = self.make()
        assert pool.alloc(3) == [0, 1, 2]
        pool.free([2])
        pool.free([0])
        assert pool.alloc(3) == [3, 2, 0]

    @clause("REQ-2")
    def test_every_row_can_be_taken(self) -> None:
        pool = self.make()
        assert pool.alloc(4) == [0, 1, 2, 3]
        assert pool.available_size() == 0
        assert pool.alloc(0) == []

    @clause("REQ-2", "REQ-5")
    def test_a_row_taken_again_is_empty(self) -> None:
        pool = self.make(size=1)
        pool.alloc(1)
        pool.write((0, slice(0, 3)), [5, 6, 7])
        pool.free(0)
        pool.alloc(1)
        assert pool.row_length(0) == 0
        assert pool.row(0).tolist() == []

    @clause("REQ-3")
    @pytest.mark.parametrize("count", [3, 4, 2**40])
    def test_too_many_rows_are_none(self, count: int) -> None:
        pool = self.make()
        pool.alloc(2)
        before = pool.view()
        assert pool.alloc(count) is None
        assert pool.view() == before

    @clause("REQ-4")
    def test_a_negative_alloc_is_refused(self) -> None:
        pool = self.used()
        self.refuses(pool, "REQ-4", lambda: pool.alloc(-1))

    @clause("REQ-4")
    @pytest.mark.parametrize("rows", [3, -1, 4, 2**40, [3], [0, 3], [0, 1, 0], [1, 1], [0, 9]])
    def test_a_row_that_is_not_live_is_not_freed(self, rows: int | list[int]) -> None:
        pool = self.used()
        self.refuses(pool, "REQ-4", lambda: pool.free(rows))
        pool.free([0, 1, 2])

    @clause("REQ-4")
    @pytest.mark.parametrize("rows", [[0.0], torch.tensor([0.0]), torch.tensor([[0]]), None])
    def test_rows_are_integers(self, rows: Any) -> None:
        pool = self.used()
        self.refuses(pool, "REQ-4", lambda: pool.free(rows))

    @clause("REQ-4")
    def test_a_row_is_freed_once(self) -> None:
        pool = self.used()
        pool.free(1)
        self.refuses(pool, "REQ-4", lambda: pool.free(1))

    @clause("REQ-5")
    @pytest.mark.parametrize("kind", ROW_KINDS)
    def test_one_row_is_freed(self, kind: str) -> None:
        pool = self.used()
        pool.free(ROW_KINDS[kind](1))
        assert pool.free_slots == [3, 1]
        assert sorted(pool.view().rows) == [0, 2]

    @clause("REQ-5")
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_are_freed_in_the_order_given(self, kind: str) -> None:
        pool = self.used()
        pool.free(KINDS[kind]([2, 0]))
        assert pool.free_slots == [3, 2, 0]
        pool.free(KINDS[kind]([]))
        assert pool.free_slots == [3, 2, 0]

    @clause("REQ-6")
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_slice_is_written(self, kind: str) -> None:
        pool = self.used()
        pool.write((0, slice(1, 4)), KINDS[kind]([5, 6, 7]))
        assert pool.row(0).tolist() == [11, 5, 6, 7]
        assert pool.row(0).dtype == torch.int64
        assert pool.row(1).tolist() == [21]
        assert pool.row(2).tolist() == list(range(31, 39))

    @clause("REQ-6")
    @pytest.mark.parametrize("kind", KINDS)
    def test_positions_are_written(self, kind: str) -> None:
        pool = self.used()
        pool.write((2, KINDS[kind]([7, 0, 3])), KINDS[kind]([4, 5, 6]))
        assert pool.row(2).tolist() == [5, 32, 33, 6, 35, 36, 37, 4]
        assert pool.row(0).tolist() == [11, 12]

    @clause("REQ-6")
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_and_positions_are_written_in_pairs(self, kind: str) -> None:
        pool = self.used()
        pool.write((KINDS[kind]([0, 1, 2, 0]), KINDS[kind]([2, 0, 4, 3])), [4, 5, 6, 7])
        assert pool.row(0).tolist() == [11, 12, 4, 7]
        assert pool.row(1).tolist() == [5]
        assert pool.row(2).tolist() == [31, 32, 33, 34, 6, 36, 37, 38]

    @clause("REQ-6")
    @pytest.mark.parametrize("kind", ROW_KINDS)
    def test_a_row_is_any_integer(self, kind: str) -> None:
        pool = self.used()
        pool.write((ROW_KINDS[kind](1), [0, 1]), [5, 6])
        assert pool.row(ROW_KINDS[kind](1)).tolist() == [5, 6]
        assert pool.row_length(ROW_KINDS[kind](1)) == 2

    @clause("REQ-6")
    @pytest.mark.parametrize(
        ("positions", "slots", "after"),
        [
            (slice(0, 1), [5], [5, 12]),
            (slice(None, 2), [5, 6], [5, 6]),
            (slice(2, None), [3, 4, 5, 6, 7, 8], [11, 12, 3, 4, 5, 6, 7, 8]),
            (slice(0, 3, 2), [5, 6], [5, 12, 6]),
            (slice(1, -1, -1), [5, 6], [6, 5]),
            (slice(4, 2), [], [11, 12]),
            ([2, 2, 2], [5, 6, 7], [11, 12, 7]),
            ([2, 3, 1], [5, 6, 7], [11, 7, 5, 6]),
            ([], [], [11, 12]),
        ],
    )
    def test_what_a_slice_and_positions_name(
        self, positions: Any, slots: list[int], after: list[int]
    ) -> None:
        pool = self.used()
        pool.write((0, positions), slots)
        assert pool.row(0).tolist() == after

    @clause("REQ-6")
    def test_a_row_is_full_at_its_width(self) -> None:
        pool = self.used()
        pool.write((0, slice(2, 8)), [2**31 - 1] * 6)
        pool.write(([1] * 7, list(range(1, 8))), list(range(1, 8)))
        assert pool.row_length(0) == pool.row_length(1) == 8
        assert pool.row(2).tolist() == list(range(31, 39))

    @clause("REQ-6")
    def test_overwriting_keeps_what_follows(self) -> None:
        pool = self.used()
        pool.write((2, slice(3, 5)), [7, 8])
        assert pool.row(2).tolist() == [31, 32, 33, 7, 8, 36, 37, 38]

    @clause("REQ-7")
    @pytest.mark.parametrize("why", BAD_WRITES)
    def test_a_write_is_refused_whole(self, why: str) -> None:
        pool = self.used()
        indices, values = BAD_WRITES[why]
        self.refuses(pool, "REQ-7", lambda: pool.write(indices, values))

    @clause("REQ-8")
    def test_the_table_is_the_books(self) -> None:
        pool = self.used()
        assert pool.req_to_token.dtype == torch.int32
        assert pool.req_to_token.shape == (4, 8)
        pool.write(([0, 1], [2, 0]), [5, 6])
        pool.write((2, slice(7, 8)), [9])
        for row in (0, 1, 2):
            assert _table(pool, row) == pool.row(row).tolist()
        assert pool.commit() == 0

    @clause("REQ-8")
    def test_a_row_taken_again_shows_only_its_own_slots(self) -> None:
        pool = self.used()
        pool.free([2, 0])
        assert pool.available_size() == 3
        pool.alloc(3)
        pool.write((2, slice(0, 2)), [31, 7])
        pool.write((0, slice(0, 1)), [12])
        assert _table(pool, 2) == [31, 7]
        assert _table(pool, 0) == [12]

    @clause("REQ-9")
    def test_clear_frees_every_row(self) -> None:
        pool = self.used()
        pool.free([2])
        pool.clear()
        assert pool.view() == ((0, 1, 2, 3), {})
        assert pool.alloc(4) == [0, 1, 2, 3]
        assert pool.row_length(2) == 0

    @clause("REQ-10")
    def test_check_passes_where_nothing_is_broken(self) -> None:
        pool = self.used()
        pool.free(1)
        pool.req_to_token[1, 0] = 99
        pool.req_to_token[3] = 99
        pool.req_to_token[0, 2:] = 99
        pool.check()

    @clause("REQ-10")
    @pytest.mark.parametrize(("row", "position"), [(0, 0), (0, 1), (1, 0), (2, 7)])
    def test_check_finds_what_others_wrote(self, row: int, position: int) -> None:
        pool = self.used()
        kept = int(pool.req_to_token[row, position])
        pool.req_to_token[row, position] = 99
        _refused("REQ-8", pool.check)
        pool.req_to_token[row, position] = kept
        pool.check()

    @clause("REQ-11")
    @pytest.mark.parametrize(("size", "more"), [(2, 3), (0, 2), (2, 0)])
    def test_a_decode_pool_has_rows_beyond_its_size(self, size: int, more: int) -> None:
        pool = self.make("DecodeReqToTokenPool", size=size, pre_alloc_size=more)
        assert pool.size == size
        assert pool.available_size() == size + more
        assert pool.alloc(size + more) == list(range(size + more))
        assert pool.req_to_token.shape == (size + more, 8)
        assert pool.alloc(1) is None

    @clause("REQ-12")
    @pytest.mark.parametrize(
        "given",
        [
            {"size": -1},
            {"max_context_len": 0},
            {"max_context_len": -8},
        ],
    )
    def test_constructor_refuses(self, given: dict[str, Any]) -> None:
        _refused("REQ-12", lambda: self.make(**given))

    @clause("REQ-12")
    @pytest.mark.parametrize(
        "given", [{"size": -1}, {"pre_alloc_size": -1}, {"max_context_len": 0}]
    )
    def test_constructor_of_a_decode_pool_refuses(self, given: dict[str, Any]) -> None:
        arguments = {"pre_alloc_size": 1} | given
        _refused("REQ-12", lambda: self.make("DecodeReqToTokenPool", **arguments))

    @clause("REQ-12")
    def test_a_pool_without_rows(self) -> None:
        pool = self.make(size=0)
        assert pool.alloc(1) is None
        pool.clear()
        pool.check()

    @clause("REQ-14")
    @pytest.mark.parametrize("more", [None, 3])
    def test_the_table_is_in_the_savers_region(self, more: int | None) -> None:
        saver = self.impl.TorchMemorySaverAdapter.create(True)
        given = {} if more is None else {"pre_alloc_size": more}
        name = "ReqToTokenPool" if more is None else "DecodeReqToTokenPool"
        with saver.region("kv_cache"):
            pass
        before = saver.view()["kv_cache"]
        plain = self.make(name, **given)
        assert saver.view()["kv_cache"] == before
        pool = self.make(name, enable_memory_saver=True, **given)
        after = saver.view()["kv_cache"]
        assert after.allocations == before.allocations + 1
        assert after.nbytes == before.nbytes + 4 * 8 * (4 + (more or 0))
        assert pool.view() == plain.view()
        del pool
        assert saver.view()["kv_cache"] == before

    @clause("REQ-15", "REQ-14")
    def test_what_a_pause_drops_is_given_up_with_clear(self) -> None:
        saver = self.impl.TorchMemorySaverAdapter.create(True)
        pool = self.make(enable_memory_saver=True)
        row = pool.alloc(2)[1]
        pool.write((row, slice(0, 3)), [4, 5, 6])
        before, address = pool.view(), pool.req_to_token.data_ptr()
        saver.pause("kv_cache")
        saver.resume("kv_cache")
        assert pool.view() == before
        assert pool.req_to_token.data_ptr() == address
        assert not pool.req_to_token.any()
        _refused("REQ-8", pool.check)
        pool.clear()
        pool.check()
        row = pool.alloc(2)[1]
        pool.write((row, slice(0, 3)), [7, 8, 9])
        pool.check()
        assert _table(pool, row) == [7, 8, 9]

    @clause("REQ-13")
    @pytest.mark.parametrize("size", [4, 4_000])
    def test_cost_is_what_is_named(self, size: int) -> None:
        pool = self.make(size=size, max_context_len=100)
        start = pool.counters()
        pool.alloc(3)
        pool.write((0, slice(0, 90)), list(range(1, 91)))
        pool.write(([0, 1], [7, 0]), [1, 2])
        pool.free([1])
        cost = {name: count - start[name] for name, count in pool.counters().items()}
        assert cost == {"rows_moved": 4, "positions_written": 92, "positions_sent": 0}

    @clause("REQ-13")
    def test_commit_sends_what_was_written_since(self) -> None:
        pool = self.make(device="meta")
        pool.alloc(3)
        pool.write((0, slice(0, 5)), [1, 2, 3, 4, 5])
        pool.write(([0, 1, 0], [1, 0, 5]), [6, 7, 8])
        assert pool.commit() == 7
        assert pool.commit() == 0
        pool.write((0, [3]), [4])
        pool.write((2, slice(0, 3)), [1, 2, 3])
        pool.free(2)
        assert pool.commit() == 1
        pool.write((1, slice(0, 2)), [1, 2])
        pool.clear()
        assert pool.commit() == 0
        assert pool.counters()["positions_sent"] == 8
        pool.check()

    @clause("OBS-1")
    def test_operations_are_reported(self) -> None:
        pool = self.make()
        seen: list[tuple[str, str, list[int], int]] = []
        pool.attach(lambda o: seen.append((o.room, o.name, o.slots.tolist(), o.number)))
        pool.alloc(2)
        pool.alloc(9)
        pool.alloc(0)
        pool.write(([1, 0, 1], [0, 0, 1]), [5, 6, 7])
        pool.write((1, slice(0, 2)), [5, 7])
        pool.write((1, slice(0, 0)), [])
        _refused("REQ-7", lambda: pool.write((1, [4]), [5]))
        pool.free([1])
        pool.free([])
        pool.clear()
        pool.clear()
        pool.attach(None)
        pool.alloc(1)
        assert seen == [
            ("request_pool", "alloc", [0, 1], 0),
            ("request_pool", "write", [1, 0], 1),
            ("request_pool", "free", [1], 2),
            ("request_pool", "clear", [0, 1, 2, 3], 3),
        ]

    @clause("OBS-3")
    def test_an_observer_may_read_only(self) -> None:
        pool = self.make()
        refused: list[str] = []

        def intrude(_: object) -> None:
            assert pool.row_length(0) == 0
            calls: Sequence[Callable[[], object]] = (
                lambda: pool.alloc(1),
                lambda: pool.free(0),
                lambda: pool.write((0, slice(0, 1)), [5]),
                pool.commit,
                pool.clear,
                lambda: pool.attach(None),
            )
            for call in calls:
                with pytest.raises(ContractError) as caught:
                    call()
                refused.append(str(caught.value).split(":")[0])

        pool.attach(intrude)
        assert pool.alloc(1) == [0]
        assert refused == ["OBS-3"] * 6

    @clause(
        "REQ-1", "REQ-2", "REQ-3", "REQ-4", "REQ-5", "REQ-6", "REQ-7", "REQ-8", "REQ-9", "REQ-10"
    )
    def test_histories(self) -> None:
        class HistoriesOfThis(Histories):
            suite = self

        run_state_machine_as_test(HistoriesOfThis, settings=fuzzing())


class Histories(RuleBasedStateMachine):
    """A pool beside a list of free rows and a dict of live ones."""

    suite: RequestPoolConformance
    size, width = 4, 6
    rows = st.integers(-1, 4)
    slots = st.integers(1, 2**31 - 1)

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.suite.make(size=self.size, max_context_len=self.width)
        self.free = list(range(self.size))
        self.live: dict[int, list[int]] = {}

    @rule(count=st.integers(-1, 4))
    def alloc(self, count: int) -> None:
        if count < 0:
            _refused("REQ-4", lambda: self.pool.alloc(count))
        elif count > len(self.free):
            assert self.pool.alloc(count) is None
        else:
            taken, self.free = self.free[:count], self.free[count:]
            assert self.pool.alloc(count) == taken
            self.live |= {row: [] for row in taken}

    @rule(rows=st.lists(rows, max_size=4), one=st.booleans())
    def give_back(self, rows: list[int], one: bool) -> None:
        given: Any = rows[0] if one and len(rows) == 1 else rows
        if len(set(rows)) < len(rows) or not set(rows) <= set(self.live):
            _refused("REQ-4", lambda: self.pool.free(given))
            return
        self.pool.free(given)
        self.free += rows
        for row in rows:
            del self.live[row]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), slots=st.lists(slots, max_size=4))
    def write_slice(self, data: st.DataObject, slots: list[int]) -> None:
        row = data.draw(st.sampled_from(sorted(self.live)))
        books = self.live[row]
        start = data.draw(st.integers(0, len(books) + 1))
        given = (row, slice(start, start + len(slots)))
        if slots and (start > len(books) or start + len(slots) > self.width):
            _refused("REQ-7", lambda: self.pool.write(given, slots))
        else:
            self.pool.write(given, slots)
            books[start : start + len(slots)] = slots

    @rule(places=st.lists(st.tuples(rows, st.integers(-1, 6), st.integers(0, 9)), max_size=6))
    def write_pairs(self, places: list[tuple[int, int, int]]) -> None:
        after = {row: list(books) for row, books in self.live.items()}
        allowed = all(row in after for row, _, _ in places)
        for row, position, slot in places if allowed else ():
            end = len(after[row])
            allowed &= 0 <= position < self.width and position <= end and slot > 0
            after[row][position : position + 1] = [slot]
        rows, positions, slots = ([place[i] for place in places] for i in range(3))
        if allowed:
            self.pool.write((rows, positions), slots)
            self.live = after
        else:
            _refused("REQ-7", lambda: self.pool.write((rows, positions), slots))

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.free, self.live = list(range(self.size)), {}

    @invariant()
    def books_and_table_agree(self) -> None:
        assert self.pool.view() == (tuple(self.free), {r: tuple(s) for r, s in self.live.items()})
        assert self.pool.available_size() == len(self.free)
        for row, slots in self.live.items():
            assert self.pool.row(row).tolist() == slots
            assert _table(self.pool, row) == slots
        self.pool.check()
