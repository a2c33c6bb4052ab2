"""What effects make of pages and rows. Spec: LEDGER."""

from typing import Any

import numpy as np
import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.ownership_ledger.bench import (
    FILLED_OWNERS,
    FREE,
    PENDING,
    RESERVED,
    TREE,
    Effect,
    LedgerBench,
    act,
    kinds,
    request,
    slots_of,
)
from kvspec.interfaces.ownership_ledger import Fault, Owner

__all__ = ["EffectConformance"]


class EffectConformance(LedgerBench):
    """Allocators, rows and the tree, right and wrong: one effect at a time."""

    @clause("LEDGER-1")
    def test_at_first_everything_is_free(self) -> None:
        ledger = self.make()
        view = ledger.view()
        assert view.owners == {"full": (FREE,) * 8, "swa": (FREE,) * 3, "rows": (FREE,) * 4}
        assert view[1:] == ({}, (), frozenset(), None)
        assert ledger.counts("full") == {
            "free": 8,
            "pending": 0,
            "reserved": 0,
            "request": 0,
            "tree": 0,
            "copy": 0,
        }

    @clause("LEDGER-1")
    def test_every_page_and_row_has_one_owner(self) -> None:
        ledger = self.filled()
        act(ledger, 1, ("copy_begin", "full", slots_of(3, 5)))
        act(ledger, 2, ("open_group", "full"), ("give", "full", slots_of(4)), by_hand=True)
        view = ledger.view()
        for pool, first in (("full", 1), ("swa", 1), ("rows", 0)):
            owners = view.owners[pool]
            assert [ledger.owner(pool, first + at) for at in range(len(owners))] == list(owners)
            counts = ledger.counts(pool)
            assert sum(counts.values()) == len(owners)
            assert all(
                counts[kind] == sum(owner.kind == kind for owner in owners) for kind in counts
            )
        assert view.owners["full"][2:5] == (Owner("copy", 0), PENDING, Owner("copy", 0))
        assert view.owners["rows"] == (RESERVED, RESERVED, FREE, FREE)
        ledger.check()

    # -- allocators --------------------------------------------------------------------------------

    @clause("LEDGER-2")
    @pytest.mark.parametrize(
        "slots",
        [
            slots_of(2, 7),
            [9, 30],
            (8, 8, 9, 28),
            np.array([8, 28], dtype=np.int32),
            torch.tensor([10, 29]),
        ],
        ids=lambda slots: f"{type(slots).__name__} of {len(slots)}",
    )
    def test_what_is_handed_out_is_reserved(self, slots: Any) -> None:
        ledger = self.make()
        assert act(ledger, 1, ("take", "full", slots)) == []
        reserved = [RESERVED if page in (2, 7) else FREE for page in range(1, 9)]
        assert list(ledger.view().owners["full"]) == reserved
        assert ledger.counts("swa")["free"] == 3

    @clause("LEDGER-2")
    @pytest.mark.parametrize("page", [1, 3, 5, 6], ids=["a request", "tree", "reserved", "pending"])
    def test_what_somebody_has_is_an_alias_when_it_is_handed_out(self, page: int) -> None:
        ledger = self.filled()
        act(ledger, 1, ("open_group", "full"), ("take", "full", [24]), ("give", "full", [24]))
        owner = ledger.owner("full", page)
        assert owner != FREE
        faults = act(ledger, 2, ("take", "full", slots_of(7, page)))
        assert faults == [Fault("alias", "full", page, -1, 2, owner, RESERVED)]
        assert ledger.owner("full", page) == RESERVED

    @clause("LEDGER-2", "LEDGER-6")
    def test_what_was_given_back_by_hand_is_dangling_when_it_is_handed_out(self) -> None:
        ledger = self.filled()
        act(ledger, 1, ("write", 1, 8, [8]), by_hand=True)  # an alias: both rows name page 2
        assert act(ledger, 2, ("give", "full", slots_of(2)), by_hand=True) == []
        faults = act(ledger, 3, ("take", "full", slots_of(2)))
        assert faults == [
            Fault("dangling row", "full", 2, row, 3, FREE, RESERVED) for row in (0, 1)
        ]
        assert act(ledger, 4, ("give", "full", slots_of(5))) == []

    @clause("LEDGER-2", "LEDGER-6")
    @pytest.mark.parametrize(
        "healed", [("give_rows", [0]), ("write", 0, 8, [20, 21]), ("clear_rows",)], ids=str
    )
    def test_a_row_that_names_it_no_more_is_not_dangling(self, healed: Effect) -> None:
        ledger = self.filled()
        assert act(ledger, 1, ("give", "full", slots_of(2)), by_hand=True) == []
        assert act(ledger, 2, healed, by_hand=True) == []
        assert act(ledger, 3, ("take", "full", slots_of(2))) == []

    @clause("LEDGER-3")
    def test_what_is_given_back_is_free(self) -> None:
        ledger = self.filled()
        gone: list[Effect] = [("give_rows", [0, 1]), ("give", "full", slots_of(1, 2, 3, 5))]
        assert act(ledger, 1, *gone, ("give", "full", [19]), ("give", "swa", [4])) == []
        assert list(ledger.view().owners["full"]) == [FREE] * 8
        assert list(ledger.view().owners["swa"]) == [FREE] * 3

    @clause("LEDGER-3")
    def test_in_a_group_it_is_pending(self) -> None:
        ledger = self.filled()
        act(ledger, 1, ("open_group", "full"))
        assert ledger.view().groups == {"full"}
        assert act(ledger, 2, ("give", "full", [20, 21]), ("give", "swa", [4])) == []
        assert ledger.owner("full", 5) == PENDING
        assert ledger.owner("swa", 1) == FREE

    @clause("LEDGER-3")
    @pytest.mark.parametrize("group", [False, True])
    def test_given_back_twice(self, group: bool) -> None:
        ledger = self.filled()
        gone = PENDING if group else FREE
        if group:
            act(ledger, 1, ("open_group", "full"))
        assert act(ledger, 2, ("give", "full", [20])) == []
        faults = act(ledger, 3, ("give", "full", [23, 22]))
        assert faults == [Fault("double free", "full", 5, -1, 3, gone, gone)]
        faults = act(ledger, 4, ("give", "full", [21]), ("give", "full", [31]))
        assert kinds(faults) == [("double free", 5, -1), ("double free", 7, -1)]

    @clause("LEDGER-3", "LEDGER-8")
    def test_a_page_is_given_back_twice_in_a_group(self) -> None:
        """Two frees name different slots of one page: it would be handed out twice."""
        ledger = self.filled()
        gone: list[Effect] = [("open_group", "full"), ("give", "full", [20, 21])]
        faults = act(ledger, 1, *gone, ("give", "full", [22]), ("close_group", "full"))
        assert faults == [Fault("double free", "full", 5, -1, 1, PENDING, PENDING)]
        assert ledger.owner("full", 5) == FREE
        assert act(ledger, 2, ("take", "full", [20])) == []

    # -- rows --------------------------------------------------------------------------------------

    @clause("LEDGER-4")
    def test_what_is_written_is_the_requests(self) -> None:
        ledger = self.filled()
        assert list(ledger.view().owners["full"]) == FILLED_OWNERS
        assert ledger.row_pages(0) == [3, 1, 2]
        assert ledger.view().rows == {0: (3, 1, 2), 1: (3, 4)}
        assert act(ledger, 1, ("write", 0, 10, [10, 11, 20])) == []
        assert ledger.row_pages(0) == [3, 1, 2, 5]
        assert ledger.owner("full", 5) == request(0)
        assert ledger.row_pages(2) == []

    @clause("LEDGER-4")
    def test_a_page_of_the_tree_stays_the_trees(self) -> None:
        ledger = self.filled()
        assert act(ledger, 1, ("take_rows", [2]), ("write", 2, 0, slots_of(3))) == []
        assert ledger.owner("full", 3) == TREE
        assert ledger.row_pages(2) == [3]

    @clause("LEDGER-4")
    def test_a_stretch_names_the_page_of_its_last_position(self) -> None:
        ledger = self.filled()
        assert act(ledger, 1, ("write", 0, 6, [22]), ("write", 0, 18, [23])) == []
        assert ledger.row_pages(0) == [3, 1, 2, 0, 5]
        assert act(ledger, 2, ("write", 0, 7, [22])) == []
        assert ledger.row_pages(0) == [3, 5, 2, 0, 5]
        assert ledger.owner("full", 1) == request(0)

    @clause("LEDGER-4")
    @pytest.mark.parametrize("page", [4, 5, 1], ids=["another's", "reserved", "its own"])
    def test_a_page_of_another_request_is_an_alias(self, page: int) -> None:
        ledger = self.filled()
        faults = act(ledger, 1, ("write", 0, 12, slots_of(page)))
        alias = Fault("alias", "full", 4, 0, 1, request(1), request(0))
        assert faults == ([alias] if page == 4 else [])
        assert ledger.owner("full", page) == request(0)
        assert ledger.row_pages(0) == [3, 1, 2, page]

    @clause("LEDGER-4")
    @pytest.mark.parametrize("group", [False, True])
    def test_a_page_that_nobody_has_is_dangling(self, group: bool) -> None:
        ledger = self.filled()
        act(ledger, 1, *[("open_group", "full")] * group, ("give", "full", slots_of(5)))
        faults = act(ledger, 2, ("write", 1, 8, [20, 21]), ("write", 1, 10, [22]))
        owner = PENDING if group else FREE
        assert faults == [Fault("dangling row", "full", 5, 1, 2, owner, request(1))]

    @clause("LEDGER-11")
    def test_rows_are_taken_and_given_back_once(self) -> None:
        ledger = self.filled()
        faults = act(ledger, 1, ("take_rows", [2, 1]))
        assert faults == [Fault("alias", "rows", 1, 1, 1, RESERVED, RESERVED)]
        assert ledger.view().rows == {0: (3, 1, 2), 1: (), 2: ()}
        faults = act(ledger, 2, ("give_rows", [2, 3, 2]))
        assert faults == [Fault("double free", "rows", row, row, 2, FREE, FREE) for row in (3, 2)]

    @clause("LEDGER-11")
    def test_a_free_row_is_written(self) -> None:
        ledger = self.filled()
        faults = act(ledger, 1, ("write", 2, 0, slots_of(3)), ("write", 2, 4, [20]))
        assert faults == [Fault("dangling row", "rows", 2, 2, 1, FREE, RESERVED)]
        assert act(ledger, 2, ("write", 3, 0, [])) == []
        assert ledger.row_pages(2) == [3, 5]

    @clause("LEDGER-10", "LEDGER-11")
    @pytest.mark.parametrize(
        "effect",
        [
            ("take_rows", [4]),
            ("give_rows", [-1]),
            ("write", 4, 0, slots_of(5)),
            ("adopt", 2**40, 4),
        ],
        ids=str,
    )
    def test_a_row_outside_the_pool(self, effect: Effect) -> None:
        ledger = self.filled()
        before = ledger.view()
        row = effect[1] if isinstance(effect[1], int) else effect[1][0]
        sentinel = Fault("sentinel", "rows", row, row, 1, FREE, FREE)
        assert act(ledger, 1, effect) == [sentinel]
        assert ledger.view() == before

    # -- the tree ----------------------------------------------------------------------------------

    @clause("LEDGER-5")
    @pytest.mark.parametrize(("stop", "adopted"), [(7, []), (8, [1]), (11, [1]), (12, [1, 2])])
    def test_the_whole_pages_of_a_row_are_adopted(self, stop: int, adopted: list[int]) -> None:
        ledger = self.filled()
        assert act(ledger, 1, ("adopt", 0, stop)) == []
        trees = [page for page in range(1, 9) if ledger.owner("full", page) == TREE]
        assert trees == sorted([*adopted, 3])
        assert ledger.row_pages(0) == [3, 1, 2]

    @clause("LEDGER-5")
    def test_slots_are_adopted(self) -> None:
        ledger = self.filled()
        assert act(ledger, 1, ("adopt_slots", slots_of(5, 1))) == []
        assert [ledger.owner("full", page) for page in (1, 5)] == [TREE, TREE]

    @clause("LEDGER-5")
    @pytest.mark.parametrize("page", [6, 7], ids=["free", "pending"])
    @pytest.mark.parametrize("by_row", [False, True])
    def test_what_is_given_back_is_not_adopted_again(self, page: int, by_row: bool) -> None:
        ledger = self.filled()
        act(ledger, 1, ("take", "full", slots_of(6, 7)), ("write", 0, 12, slots_of(6, 7)))
        act(ledger, 2, ("give", "full", slots_of(6)), by_hand=True)
        act(ledger, 3, ("open_group", "full"), ("give", "full", slots_of(7)), by_hand=True)
        owner, other = ledger.owner("full", page), 13 - page
        act(ledger, 4, ("write", 0, 4 * (other - 3), slots_of(3)))
        faults = act(ledger, 5, ("adopt", 0, 20) if by_row else ("adopt_slots", slots_of(page)))
        row = 0 if by_row else -1
        assert faults == [Fault("use after free", "full", page, row, 5, owner, TREE)]
        assert ledger.owner("full", page) == TREE

    @clause("LEDGER-5")
    def test_what_another_has_is_an_alias_when_it_is_adopted(self) -> None:
        ledger = self.filled()
        act(ledger, 1, ("write", 0, 12, slots_of(4)))
        assert ledger.owner("full", 4) == request(0)
        faults = act(ledger, 2, ("adopt", 1, 8), ("adopt_slots", slots_of(3)))
        assert faults == [
            Fault("alias", "full", 4, 1, 2, request(0), TREE),
            Fault("alias", "full", 3, -1, 2, TREE, TREE),
        ]

    @clause("LEDGER-5", "LEDGER-7")
    def test_a_request_finishes_in_any_order(self) -> None:
        """Duplicates and tail are freed, the row is given back, and then the tree has the rest."""
        ledger = self.filled()
        act(ledger, 1, ("take", "full", slots_of(6)), ("write", 0, 12, [24]))
        gone: list[Effect] = [("give", "full", slots_of(6, 1)), ("give_rows", [0])]
        assert act(ledger, 2, *gone, ("adopt", 0, 12)) == []
        owners = [ledger.owner("full", page) for page in (1, 2, 3, 6)]
        assert owners == [FREE, TREE, TREE, FREE]
