"""What is left at the end of an action, and what is in flight for longer. Spec: LEDGER."""

from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.ownership_ledger.bench import (
    ABANDONED,
    FILLED_OWNERS,
    FREE,
    PENDING,
    RESERVED,
    TREE,
    Effect,
    LedgerBench,
    act,
    request,
    slots_of,
)
from kvspec.interfaces.ownership_ledger import Fault, Owner, Step

__all__ = ["ActionConformance"]


class ActionConformance(LedgerBench):
    """Dangling rows, leaks, pools and rows that are cleared, and copies."""

    @clause("LEDGER-6")
    def test_a_live_row_names_what_was_given_back(self) -> None:
        ledger = self.filled()
        act(ledger, 1, ("copy_begin", "full", slots_of(5)))
        faults = act(ledger, 2, ("give", "full", slots_of(3, 1, 5)))
        assert faults == [
            Fault("use after free", "full", 5, -1, 2, Owner("copy", 0), FREE),
            Fault("dangling row", "full", 3, 0, 2, TREE, FREE),
            Fault("dangling row", "full", 1, 0, 2, request(0), FREE),
            Fault("dangling row", "full", 3, 1, 2, TREE, FREE),
        ]
        assert act(ledger, 3, ("take", "full", slots_of(3, 1))) == []

    @clause("LEDGER-6")
    @pytest.mark.parametrize(
        "healed",
        [
            [("write", 0, 4, slots_of(5))],
            [("give_rows", [0])],
            [("take", "full", slots_of(1)), ("write", 0, 4, slots_of(1))],
        ],
        ids=["written over", "given back", "taken again"],
    )
    def test_a_row_is_put_right_in_the_same_action(self, healed: list[Effect]) -> None:
        ledger = self.filled()
        act(ledger, 1, ("give", "full", slots_of(2)), ("write", 0, 8, [12, 13]))
        assert act(ledger, 2, ("give", "full", slots_of(1)), *healed) == []

    @clause("LEDGER-6")
    def test_taken_again_for_another(self) -> None:
        ledger = self.filled()
        again: list[Effect] = [("take", "full", slots_of(1)), ("write", 1, 8, slots_of(1))]
        faults = act(ledger, 1, ("give", "full", slots_of(1)), *again)
        assert faults == [Fault("dangling row", "full", 1, 0, 1, request(0), request(1))]

    @clause("LEDGER-6", "LEDGER-7")
    def test_by_hand_a_request_goes_in_two_calls(self) -> None:
        """Retracted or aborted: pages and row are given back in either order."""
        ledger = self.filled()
        assert act(ledger, 1, ("give", "full", slots_of(1, 2)), by_hand=True) == []
        assert act(ledger, 2, ("give_rows", [0]), by_hand=True) == []
        assert act(ledger, 3, ("give_rows", [1]), by_hand=True) == []
        assert ledger.owner("full", 4) == ABANDONED
        assert act(ledger, 4, ("give", "full", slots_of(4)), by_hand=True) == []
        assert act(ledger, 5, ("take", "full", slots_of(1, 2, 4))) == []

    @clause("LEDGER-7")
    def test_a_row_is_given_back_before_its_pages(self) -> None:
        ledger = self.filled()
        faults = act(ledger, 1, ("give_rows", [1, 0]))
        assert faults == [
            Fault("leak", "full", page, row, 1, request(row), ABANDONED)
            for page, row in [(1, 0), (2, 0), (4, 1)]
        ]
        assert ledger.counts("full")["request"] == 3
        assert act(ledger, 2, ("give", "full", slots_of(1, 2, 4))) == []

    @clause("LEDGER-7")
    def test_duplicates_that_the_row_no_longer_names_leak(self) -> None:
        """A cache writes the tree's pages into the row, and forgets to free the request's."""
        ledger = self.filled()
        assert act(ledger, 1, ("adopt_slots", slots_of(5)), ("write", 0, 4, slots_of(5))) == []
        faults = act(ledger, 2, ("give", "full", slots_of(2)), ("give_rows", [0]))
        assert faults == [Fault("leak", "full", 1, 0, 2, request(0), ABANDONED)]

    @clause("LEDGER-7")
    def test_what_is_no_longer_the_requests_does_not_leak(self) -> None:
        ledger = self.filled()
        rest: list[Effect] = [("give", "full", slots_of(1)), ("adopt_slots", slots_of(2))]
        assert act(ledger, 1, ("give_rows", [0]), *rest) == []
        assert act(ledger, 2, ("take_rows", [0]), ("give_rows", [0])) == []

    @clause("LEDGER-8")
    def test_closing_a_group_frees_what_is_pending(self) -> None:
        ledger = self.filled()
        act(ledger, 1, ("open_group", "full"), ("open_group", "full"), ("open_group", "swa"))
        act(ledger, 2, ("give", "full", slots_of(5)), ("give", "swa", slots_of(1)))
        assert act(ledger, 3, ("close_group", "full"), ("close_group", "full")) == []
        assert (ledger.owner("full", 5), ledger.owner("swa", 1)) == (FREE, PENDING)
        assert ledger.view().groups == {"swa"}
        assert act(ledger, 4, ("take", "full", slots_of(5)), ("give", "full", slots_of(5))) == []
        assert ledger.owner("full", 5) == FREE

    @clause("LEDGER-8")
    def test_clear_frees_everything_of_a_pool(self) -> None:
        ledger = self.filled()
        act(ledger, 1, ("copy_begin", "full", slots_of(3)), ("open_group", "full"))
        act(ledger, 2, ("give", "full", slots_of(5)))
        assert act(ledger, 3, ("clear", "full")) == []
        assert list(ledger.view().owners["full"]) == [FREE] * 8
        assert ledger.view().groups == frozenset()
        assert ledger.owner("swa", 1) == RESERVED
        ledger.check()

    @clause("LEDGER-8")
    def test_clear_frees_every_row(self) -> None:
        ledger = self.filled()
        assert act(ledger, 1, ("clear_rows",)) == []
        assert ledger.view().rows == {}
        assert ledger.view().owners["rows"] == (FREE,) * 4
        owners = [ledger.owner("full", page) for page in (1, 2, 3, 4)]
        assert owners == [ABANDONED, ABANDONED, TREE, ABANDONED]
        assert act(ledger, 2, ("take_rows", [0, 1]), ("give", "full", slots_of(3))) == []
        assert ledger.view().rows == {0: (), 1: ()}

    @clause("LEDGER-6", "LEDGER-13")
    def test_a_chunk_ends_in_mid_page_while_another_request_caches_that_page(self) -> None:
        """Half of the row's stretch is put right, and the other half is read by its decode."""
        ledger = self.make()
        act(ledger, 1, ("take_rows", [0]), ("take", "full", slots_of(1, 2)))
        act(ledger, 2, ("write", 0, 0, [4, 5, 6, 7, 8, 9]), ("adopt", 0, 4))
        act(ledger, 3, ("take", "full", slots_of(3)), ("adopt_slots", slots_of(3)))
        act(ledger, 4, ("write", 0, 6, [10, 11]))
        faults = act(ledger, 5, ("give", "full", [10, 11]), ("write", 0, 6, [14, 15]))
        assert ledger.row_pages(0) == [1, 3]
        assert faults == [Fault("dangling row", "full", 2, 0, 5, request(0), FREE)]
        assert ledger.history("full", 2)[0] == Step(5, FREE)

    # -- copies ------------------------------------------------------------------------------------

    @clause("LEDGER-9")
    def test_a_copy_has_its_pages_while_it_is_in_flight(self) -> None:
        ledger = self.filled()
        ledger.begin(1)
        copy = ledger.copy_begin("full", slots_of(3, 1, 5))
        ledger.copy_begin("swa", [])
        assert ledger.end() == []
        assert ledger.view().copies == (copy, copy + 1)
        owners = [ledger.owner("full", page) for page in (3, 1, 5, 2)]
        assert owners == [Owner("copy", copy)] * 3 + [request(0)]
        assert act(ledger, 2, ("copy_end", copy)) == []
        assert list(ledger.view().owners["full"]) == FILLED_OWNERS
        assert ledger.view().copies == (copy + 1,)

    @clause("LEDGER-9")
    @pytest.mark.parametrize("first", [0, 1])
    def test_two_copies_of_a_page(self, first: int) -> None:
        ledger = self.filled()
        copies: list[Effect] = [
            ("copy_begin", "full", slots_of(3)),
            ("copy_begin", "full", slots_of(3, 5)),
        ]
        assert act(ledger, 1, *copies) == []
        assert ledger.owner("full", 3) == Owner("copy", 1)
        assert act(ledger, 2, ("copy_end", first)) == []
        assert ledger.owner("full", 3) == Owner("copy", 1 - first)
        assert act(ledger, 3, ("copy_end", 1 - first)) == []
        assert list(ledger.view().owners["full"]) == FILLED_OWNERS

    @clause("LEDGER-9")
    @pytest.mark.parametrize(
        ("effect", "kind", "other"),
        [
            (("give", "full", slots_of(5)), "use after free", FREE),
            (("take", "full", slots_of(5)), "alias", RESERVED),
            (("adopt_slots", slots_of(5)), "use after free", TREE),
        ],
        ids=["given", "taken", "adopted"],
    )
    def test_nobody_takes_what_is_in_flight(self, effect: Effect, kind: Any, other: Owner) -> None:
        ledger = self.filled()
        act(ledger, 1, ("copy_begin", "full", slots_of(5, 3)))
        faults = act(ledger, 2, effect)
        assert faults == [Fault(kind, "full", 5, -1, 2, Owner("copy", 0), other)]
        assert act(ledger, 3, ("copy_end", 0)) == []
        assert [ledger.owner("full", page) for page in (5, 3)] == [other, TREE]

    @clause("LEDGER-9")
    def test_a_request_may_name_what_is_in_flight(self) -> None:
        """Pages are matched while they are backed up, and handed out while they are loaded."""
        ledger = self.filled()
        act(ledger, 1, ("copy_begin", "full", slots_of(3, 5)), ("take_rows", [2]))
        assert act(ledger, 2, ("write", 2, 0, slots_of(3, 5)), ("adopt", 2, 4)) == []
        assert act(ledger, 3, ("copy_end", 0)) == []
        assert [ledger.owner("full", page) for page in (3, 5)] == [TREE, request(2)]
