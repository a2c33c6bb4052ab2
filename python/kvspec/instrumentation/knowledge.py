"""What a ledger and the call sites know of a page. Spec: CHECK-13, INSTR."""

from collections.abc import Iterable

from kvspec.instrumentation.sites import Sites
from kvspec.instrumentation.views import RowView
from kvspec.interfaces.memory_checker import HistoryStep
from kvspec.interfaces.ownership_ledger import Owner, OwnershipLedger
from kvspec.memory_checker import owner_name

__all__ = ["BEFORE", "Knowledge"]

BEFORE = -1
"""The action in which a ledger began: what was there, was there before."""
_SINK_PAGES = {"host": 1}
"""Pages of a ledger before the first of a pool that has no sink."""


class Knowledge:
    """An `Attribution`: whose a page was, and what became of it."""

    def __init__(
        self,
        ledger: OwnershipLedger,
        sites: Sites,
        *,
        forgotten: int = BEFORE,
        row_views: Iterable[RowView] = (),
    ) -> None:
        self._ledger, self._sites = ledger, sites
        self._forgotten = forgotten
        self._row_views = tuple(row_views)

    def history(self, pool: str, page: int) -> tuple[HistoryStep, ...]:
        """Its steps, the newest first (LEDGER-13)."""
        page += _SINK_PAGES.get(pool, 0)
        steps = self._ledger.history(pool, page)
        return tuple(self._step(step.action, owner_name(step.owner)) for step in steps)

    def last_owner(self, pool: str, page: int) -> str | None:
        """The last one that is not free or pending."""
        page += _SINK_PAGES.get(pool, 0)
        steps = self._ledger.history(pool, page)
        rightful = [step.owner for step in steps if _is_rightful(step.owner)]
        if not rightful:
            return None
        before = rightful[1] if len(rightful) > 1 else None
        row = before.who if before is not None and before.kind == "request" else None
        return owner_name(rightful[0]) + self._aside(pool, page, row)

    def lost_by(self, pool: str, page: int) -> HistoryStep | None:
        """The action that was the last to move it, or in which the tree forgot it."""
        history = self.history(pool, page)
        if not history:
            return None
        newest = history[0]
        if newest.owner == "tree" and self._forgotten > newest.action:
            return self._step(self._forgotten, "nobody")
        return newest

    def _step(self, action: int, owner: str) -> HistoryStep:
        site = self._sites.find(action)
        if site is None:
            return HistoryStep(action, "instrument" if action == BEFORE else "", "", owner)
        return HistoryStep(action, site.name, site.at, owner)

    def _aside(self, pool: str, page: int, row: int | None) -> str:
        """That a value of the tree is no copy of a row: it changes with the row."""
        if pool != "full":
            return ""
        for view in self._row_views:
            if page in view.pages or (
                row == view.row and self._ledger.owner(pool, page).kind == "tree"
            ):
                return (
                    f" (the tree's slots are a view of row {view.row} of req_to_token, not a copy)"
                )
        return ""


def _is_rightful(owner: Owner) -> bool:
    """Neither a list of the allocator nor a request that is no more."""
    return owner.kind not in ("free", "pending") and owner != ("request", -1)
