"""Any effects at all, beside what their clauses say of every one of them. Spec: LEDGER."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvspec.conformance.ownership_ledger.bench import (
    FREE,
    PAGE_SIZE,
    PENDING,
    RESERVED,
    TREE,
    LedgerBench,
    request,
)
from kvspec.interfaces.ownership_ledger import Owner, Step

__all__ = ["Histories"]


class Histories(RuleBasedStateMachine):
    """Any effects at all: every page has one owner, and its history says how it came there."""

    suite: LedgerBench
    page_counts = (("full", 4), ("swa", 2))
    pools = st.sampled_from(["full", "full", "swa"])
    slots = st.lists(st.integers(0, 5 * PAGE_SIZE), max_size=6)
    rows = st.integers(0, 3)

    def __init__(self) -> None:
        super().__init__()
        make = self.suite.impl.OwnershipLedger  # unwatched, for it is looked at all the time
        counts = dict(self.page_counts)
        self.ledger = make(page_size=PAGE_SIZE, page_counts=counts, row_count=3, step_count=10_000)
        self.action = 0
        self.begun = False
        self.seen = self.all_histories()

    def all_histories(self) -> dict[tuple[str, int], list[Step]]:
        pages = [(pool, page) for pool, count in self.page_counts for page in range(1, count + 1)]
        return {
            place: self.ledger.history(*place)
            for place in [*pages, *(("rows", r) for r in (0, 1, 2))]
        }

    def effect(self, name: str, *given: Any, moved: Callable[[str, int], bool]) -> None:
        """Only what it names may move; what moves has a new step, and nothing else has."""
        if not self.begun:
            self.action += 1
            self.ledger.begin(self.action)
            self.begun = True
        getattr(self.ledger, name)(*given)
        self.histories_follow(moved)

    def histories_follow(self, moved: Callable[[str, int], bool]) -> None:
        after = self.all_histories()
        for (pool, page), steps in after.items():
            before, owner = self.seen[pool, page], self.ledger.owner(pool, page)
            new = len(steps) - len(before)
            assert steps[new:] == before
            assert all(step.action == self.action for step in steps[:new])
            assert moved(pool, page) or new == 0
            assert owner == (steps[0].owner if steps else FREE)
        self.seen = after

    @rule(name=st.sampled_from(["take", "give", "copy_begin"]), pool=pools, slots=slots)
    def effect_on_slots(self, name: str, pool: str, slots: list[int]) -> None:
        named = {slot // PAGE_SIZE for slot in slots}
        self.effect(name, pool, slots, moved=lambda there, page: there == pool and page in named)
        after = {"take": RESERVED, "give": self.gone(pool)}.get(name)
        for page in named & set(range(1, dict(self.page_counts)[pool] + 1)):
            owner = self.ledger.owner(pool, page)
            assert owner == after or (after is None and owner.kind == "copy")

    def gone(self, pool: str) -> Owner:
        return PENDING if pool in self.ledger.view().groups else FREE

    @rule(row=rows, start=st.integers(0, 9), slots=slots)
    def write(self, row: int, start: int, slots: list[int]) -> None:
        named = {slot // PAGE_SIZE for slot in slots}
        before = self.ledger.view()
        self.effect(
            "write",
            row,
            start,
            slots,
            moved=lambda pool, page: (
                page in named if pool == "full" else (pool, page) == ("rows", row)
            ),
        )
        view = self.ledger.view()
        if row > 2 or not slots:
            assert view[:2] == before[:2]
            return
        for page in named & {1, 2, 3, 4}:
            owner, was = view.owners["full"][page - 1], before.owners["full"][page - 1]
            assert owner in (request(row), was)
            assert owner == request(row) or was.kind in ("tree", "copy")

    @rule(row=rows, stop=st.integers(0, 16))
    def adopt(self, row: int, stop: int) -> None:
        self.effect("adopt", row, stop, moved=lambda pool, _: pool == "full")

    @rule(slots=slots)
    def adopt_slots(self, slots: list[int]) -> None:
        named = {slot // PAGE_SIZE for slot in slots}
        self.effect("adopt_slots", slots, moved=lambda pool, page: pool == "full" and page in named)
        assert all(self.ledger.owner("full", page) == TREE for page in named & {1, 2, 3, 4})

    @rule(name=st.sampled_from(["take_rows", "give_rows"]), rows=st.lists(rows, max_size=2))
    def effect_on_rows(self, name: str, rows: list[int]) -> None:
        self.effect(name, rows, moved=lambda pool, row: pool == "rows" and row in rows)

    @rule(name=st.sampled_from(["open_group", "close_group", "clear"]), pool=pools)
    def effect_on_pools(self, name: str, pool: str) -> None:
        self.effect(name, pool, moved=lambda there, _: there == pool)
        owners, groups = self.ledger.view().owners[pool], self.ledger.view().groups
        assert (pool in groups) == (name == "open_group")
        assert name != "clear" or set(owners) == {FREE}
        assert name == "open_group" or PENDING not in owners

    @rule()
    def clear_rows(self) -> None:
        self.effect("clear_rows", moved=lambda pool, _: pool in ("full", "rows"))
        assert self.ledger.view().rows == {}

    @precondition(lambda self: self.ledger.view().copies)
    @rule(data=st.data())
    def copy_end(self, data: st.DataObject) -> None:
        copy = data.draw(st.sampled_from(self.ledger.view().copies))
        self.effect("copy_end", copy, moved=lambda pool, _: pool != "rows")
        assert copy not in self.ledger.view().copies

    @precondition(lambda self: self.begun)
    @rule(by_hand=st.booleans())
    def end(self, by_hand: bool) -> None:
        faults = self.ledger.end(by_hand=by_hand)
        self.begun = False
        assert all(fault.action == self.action for fault in faults)
        self.histories_follow(lambda pool, _: pool == "full")

    @invariant()
    def there_is_one_owner_each(self) -> None:
        view = self.ledger.view()
        assert [*map(len, view.owners.values())] == [4, 2, 3]
        for pool, owners in view.owners.items():
            counts = self.ledger.counts(pool)
            assert sum(counts.values()) == len(owners)
            for kind in counts:
                assert counts[kind] == sum(owner.kind == kind for owner in owners)
        live = {row for row, owner in enumerate(view.owners["rows"]) if owner == RESERVED}
        assert set(view.rows) == live
        in_flight = {
            owner.who for pool in view.owners.values() for owner in pool if owner.kind == "copy"
        }
        assert in_flight <= set(view.copies)
        self.ledger.check()
