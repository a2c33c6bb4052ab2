"""An ownership ledger, as the model Ownership sees it."""

import pickle
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import chain, combinations
from operator import methodcaller
from typing import Any, TypeAlias, cast

from kvspec.interfaces.ownership_ledger import LedgerView, Owner
from model.graph import State

__all__ = ["LedgerClient", "model_view"]

PAGE_SIZE = 2
PAGE_COUNT = 2
ROW_COUNT = 2
ROW_LENGTH = 1
POOL = "full"

Pages: TypeAlias = tuple[int, ...]
Move: TypeAlias = "Callable[[LedgerClient], str | None]"
PAGES = range(1, PAGE_COUNT + 1)
SOME: tuple[Pages, ...] = tuple(
    chain.from_iterable(combinations(PAGES, count) for count in PAGES),
)
NONE: Pages = ()


def model_view(state: State) -> Hashable:
    """All of the model's state."""
    rows = cast(dict[int, Pages], state["rows"])
    names = frozenset((row, rows[row]) for row in cast(frozenset[int], state["live"]))
    (copied,) = cast(tuple[Hashable, ...], state["copies"])
    return state["has"], names, copied, state["group"]


def _slots(pages: Sequence[int]) -> list[int]:
    return [slot for page in pages for slot in range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)]


class LedgerClient:
    """A ledger of one pool, and who tells it what a system does that is right.

    Where the ledger does not say what is right - a copy of free pages, a pool that is cleared under
    somebody - and where the model has its bounds, nothing is tried.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.ledger = make(
            page_size=PAGE_SIZE, page_counts={POOL: PAGE_COUNT}, row_count=ROW_COUNT, step_count=1
        )

    def act(self, action: str, *effects: Callable[[Any], object]) -> str | None:
        """An action of these effects; None if the ledger calls any of it a fault."""
        self.ledger.begin(0)
        for effect in effects:
            effect(self.ledger)
        return None if self.ledger.end(by_hand=action in BY_HAND) else action

    def state(self) -> Hashable:
        """The view, where copies in flight lie over those who have their pages."""
        view: LedgerView = self.ledger.view()
        copied = frozenset(
            page for page, owner in enumerate(view.owners[POOL], 1) if owner.kind == "copy"
        )
        owners = self._beneath(view).owners[POOL]
        has = tuple(_as_in_the_model(owner) for owner in owners)
        return has, frozenset(view.rows.items()), copied, POOL in view.groups

    def _beneath(self, view: LedgerView) -> LedgerView:
        """The view once every copy is done (LEDGER-9)."""
        if not view.copies:
            return view
        other: LedgerClient = pickle.loads(pickle.dumps(self))
        assert other.act("CopyEnd", *map(partial(methodcaller, "copy_end"), view.copies))
        after: LedgerView = other.ledger.view()
        return after

    def moves(self) -> Iterator[Move]:
        """Every effect that the model knows, right or wrong."""
        view: LedgerView = self.ledger.view()
        has = [_as_in_the_model(owner) for owner in view.owners[POOL]]
        kinds = [kind for kind, *_ in has]
        for pages in SOME:
            of = {kinds[page - 1] for page in pages}
            for effect, action in EFFECTS.items():
                yield _told(action, _effect(effect, pages))
            if "tree" not in of:
                yield _told("LetGo", _effect("give", pages))
            if not view.copies and not of & {"free", "pending"}:
                yield _told("CopyBegin", methodcaller("copy_begin", POOL, _slots(pages)))
        for copy in view.copies:
            yield _told("CopyEnd", methodcaller("copy_end", copy))
        if view.groups:
            yield _told("CloseGroup", methodcaller("close_group", POOL))
        else:
            yield _told("OpenGroup", methodcaller("open_group", POOL))
        if not {"request", "tree", "copy"} & {*kinds}:
            yield _told("Clear", methodcaller("clear", POOL))
        yield _told("ClearRows", methodcaller("clear_rows"))
        for row in range(ROW_COUNT):
            yield from self._of_row(row, {page for page in PAGES if has[page - 1] == _of(row)})
            yield from self._writes(row, view.rows.get(row, NONE))

    def _of_row(self, row: int, own: set[int]) -> Iterator[Move]:
        give = methodcaller("give_rows", [row])
        yield _told("TakeRow", methodcaller("take_rows", [row]))
        yield _told("LeaveRow", give)
        for pages in (NONE, *SOME):
            if own.issuperset(pages):
                yield _told("GiveRow", _effect("give", pages), give)

    def _writes(self, row: int, names: Pages) -> Iterator[Move]:
        for stop in range(1, len(names) + 1):
            yield _told("AdoptRow", methodcaller("adopt", row, stop * PAGE_SIZE))
        for at in range(min(len(names) + 1, ROW_LENGTH)):
            for page in {*PAGES} - {*names[:at], *names[at + 1 :]}:
                effect = methodcaller("write", row, at * PAGE_SIZE, _slots([page]))
                yield _told("Write", effect)


EFFECTS = {"take": "Take", "give": "Give", "adopt_slots": "AdoptSlots"}
BY_HAND = {"LetGo", "LeaveRow"}


def _of(row: int) -> Hashable:
    return "request", row


def _as_in_the_model(owner: Owner) -> tuple[Hashable, ...]:
    kind, who = owner
    return ("abandoned",) if owner == ("request", -1) else (kind, who) if who >= 0 else (kind,)


def _told(action: str, *effects: Callable[[Any], object]) -> Move:
    return methodcaller("act", action, *effects)


def _effect(name: str, pages: Pages) -> Callable[[Any], object]:
    """An effect on these pages, which are all there are to name."""
    pool = () if name == "adopt_slots" else (POOL,)
    return methodcaller(name, *pool, _slots(pages))
