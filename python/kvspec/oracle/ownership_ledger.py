"""Who has every page and row, since when, and what could not have been right. Spec: LEDGER.

The books are a list of holders for each pool, `rows` being one of them, and the live rows, each a
dict from position to page. A copy in flight lies over the holder of its pages; whatever gives,
takes or adopts a page tears it out of its copies.
"""

import operator
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, get_args

from kvspec.errors import ContractError
from kvspec.interfaces.ownership_ledger import (
    Fault,
    FaultKind,
    LedgerView,
    Owner,
    OwnerKind,
    Step,
)
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle.boundary import numbers

__all__ = ["OwnershipLedger"]

LIMIT = 2**31
ROWS = "rows"
FREE, PENDING, RESERVED, TREE = Owner("free"), Owner("pending"), Owner("reserved"), Owner("tree")
ABANDONED = Owner("request")


class Given(NamedTuple):
    """Of a page that was given back in the action: who had it, and which rows named it since."""

    owner: Owner
    rows: set[int]


class OwnershipLedger:
    """Every page and row has one owner (LEDGER-1). Effects are entered even if they are faults."""

    def __init__(
        self,
        page_size: int,
        page_counts: Mapping[str, int],
        row_count: int,
        step_count: int = 65_536,
    ) -> None:
        sizes = {"page_size": page_size, "row_count": row_count, "step_count": step_count}
        for name, size in [*sizes.items(), *page_counts.items()]:
            if not 1 <= operator.index(size) < LIMIT:
                raise ContractError(f"LEDGER-14: {name} {size} is not in [1, 2^31)")
        if ROWS in page_counts or not page_counts:
            raise ContractError("LEDGER-14: page_counts must name a pool, and none of them rows")
        self._page_size = page_size
        self._pools = list(page_counts)
        self._pool = self._pools[0]
        self._holders = {pool: [FREE] * (count + 1) for pool, count in page_counts.items()}
        self._holders[ROWS] = [FREE] * row_count
        self._counts = {pool: Counter(free=count) for pool, count in page_counts.items()}
        self._counts[ROWS] = Counter(free=row_count)
        self._rows: dict[int, dict[int, int]] = {}
        self._namers: dict[int, Counter[int]] = {}
        self._held: dict[int, set[int]] = {row: set() for row in range(-1, row_count)}
        self._flights: dict[tuple[str, int], tuple[int, ...]] = {}
        self._copies: dict[int, tuple[str, list[int]]] = {}
        self._copy_count = 0
        self._pending: dict[str, list[int]] = {}
        self._steps: deque[tuple[str, int, Step]] = deque(maxlen=step_count)
        self._told = set[int]()
        self._slots_seen = self._moved = self._rows_looked_at = 0
        self._action: int | None = None
        self._forget_action()

    # -- actions ---------------------------------------------------------------------------------

    def _forget_action(self) -> None:
        self._faults: list[Fault] = []
        self._given: dict[int, Given] = {}
        self._orphans: dict[int, tuple[int, int]] = {}
        self._left: dict[int, dict[int, int]] = {}

    def begin(self, action: int) -> None:
        """An action begins (LEDGER-14). O(1)."""
        if self._action is not None:
            raise ContractError(f"LEDGER-14: action {action} begins inside action {self._action}")
        self._action = operator.index(action)

    def end(self, by_hand: bool = False) -> list[Fault]:
        """It has ended: its faults (LEDGER-6, LEDGER-7, LEDGER-12).

        They come in the order in which they were found: last the dangling rows and then the leaks,
        each by row and position.
        """
        self._require_action("end")
        dangling = sorted(self._dangling())
        leaks = sorted((*place, page) for page, place in self._orphans.items())
        for row, _, page, owner in [] if by_hand else dangling:
            other = self.owner(self._pool, page)
            self._fault("dangling row", self._pool, page, owner, other, row)
            self._told.add(page)
        for row, _, page in leaks:
            self._hold(page, ABANDONED)
            if not by_hand:
                self._fault("leak", self._pool, page, Owner("request", row), ABANDONED, row)
        faults = self._faults
        self._forget_action()
        self._action = None
        return faults

    def _dangling(self) -> Iterator[tuple[int, int, int, Owner]]:
        """Row, first position, page and who had it: what was given back and is still named."""
        for page, given in self._given.items():
            for row in self._naming(page):
                if row not in given.rows:
                    yield row, _first(self._rows[row], page), page, given.owner

    def _naming(self, page: int) -> list[int]:
        """The live rows that name a page."""
        rows = sorted(self._namers.get(page, ()))
        self._rows_looked_at += len(rows)
        return rows

    def _require_action(self, name: str) -> None:
        if self._action is None:
            raise ContractError(f"LEDGER-14: {name} outside an action")

    def _require(self, name: str, pool: str) -> None:
        self._require_action(name)
        self._require_pool(pool)

    def _require_pool(self, pool: str, *others: str) -> None:
        if pool not in self._pools and pool not in others:
            raise ContractError(f"LEDGER-14: there is no pool {pool}")

    def _fault(
        self, kind: FaultKind, pool: str, page: int, owner: Owner, other: Owner, row: int = -1
    ) -> None:
        assert self._action is not None
        self._faults.append(Fault(kind, pool, page, row, self._action, owner, other))

    # -- who has a page --------------------------------------------------------------------------

    def owner(self, pool: str, page: int) -> Owner:
        """Who has a page, or a row of the pool `rows` (LEDGER-1). O(1)."""
        self._require_pool(pool, ROWS)
        flights = self._flights.get((pool, page), ())
        if flights:
            return Owner("copy", flights[-1])
        return self._holders[pool][page] if self._exists(pool, page) else FREE

    def _exists(self, pool: str, page: int) -> bool:
        return (0 if pool == ROWS else 1) <= page < len(self._holders[pool])

    def _sound(self, pool: str, page: int, row: int = -1) -> bool:
        """Whether a page exists; it is a fault to name one that does not (LEDGER-10)."""
        if not self._exists(pool, page):
            self._fault("sentinel", pool, page, FREE, FREE, row)
        return self._exists(pool, page)

    def _pages(self, name: str, pool: str, slots: Slots) -> Iterator[int]:
        """The pages of slots, once each, in the order of the slots, without sentinels."""
        self._require(name, pool)
        given = numbers(slots, "LEDGER-14")
        self._slots_seen += len(given)
        pages = dict.fromkeys(slot // self._page_size for slot in given)
        return (page for page in pages if self._sound(pool, page))

    def _move(self, pool: str, page: int, holder: Owner, flights: tuple[int, ...] = ()) -> None:
        """Enter who has a page: a holder, and copies over it. One step of its history."""
        assert self._action is not None
        before = self._holders[pool][page]
        self._counts[pool][self.owner(pool, page).kind] -= 1
        self._holders[pool][page] = holder
        self._flights.pop((pool, page), None)
        if flights:
            self._flights[pool, page] = flights
        owner = self.owner(pool, page)
        self._counts[pool][owner.kind] += 1
        self._steps.append((pool, page, Step(self._action, owner)))
        self._moved += 1
        if before.kind == "request" and before != holder:
            self._held[before.who].remove(page)
            self._orphans.pop(page, None)
        if holder.kind == "request":
            self._held[holder.who].add(page)

    def _hold(self, page: int, holder: Owner) -> None:
        """Enter the holder of a page, below the copies of it that are in flight."""
        self._move(self._pool, page, holder, self._flights.get((self._pool, page), ()))

    # -- allocators ------------------------------------------------------------------------------

    def take(self, pool: str, slots: Slots) -> None:
        """An allocator handed these out (LEDGER-2). O(slots and rows that name them)."""
        for page in self._pages("take", pool, slots):
            owner = self.owner(pool, page)
            if owner != FREE:
                self._fault("alias", pool, page, owner, RESERVED)
            elif pool == self._pool and page not in self._told and page not in self._given:
                for row in self._naming(page):
                    self._fault("dangling row", pool, page, owner, RESERVED, row)
            self._move(pool, page, RESERVED)

    def give(self, pool: str, slots: Slots) -> None:
        """These were given back (LEDGER-3). O(slots)."""
        for page in self._pages("give", pool, slots):
            owner, other = self.owner(pool, page), PENDING if pool in self._pending else FREE
            if owner in (FREE, PENDING):
                self._fault("double free", pool, page, owner, other)
            elif owner.kind == "copy":
                self._fault("use after free", pool, page, owner, other)
            if owner not in (FREE, PENDING) and pool == self._pool:
                self._given[page] = Given(owner, set())
                self._told.discard(page)
            if other == PENDING:
                self._pending[pool].append(page)
            self._move(pool, page, other)

    def open_group(self, pool: str) -> None:
        """What is given back from here on is pending (LEDGER-3). O(1)."""
        self._require("open_group", pool)
        self._pending.setdefault(pool, [])

    def close_group(self, pool: str) -> None:
        """What is pending is free (LEDGER-8). O(pending pages)."""
        self._require("close_group", pool)
        for page in self._pending.pop(pool, []):
            if self._holders[pool][page] == PENDING:
                self._move(pool, page, FREE, self._flights.get((pool, page), ()))

    def clear(self, pool: str) -> None:
        """Everything is free, and no group is open (LEDGER-8). O(pages)."""
        self._require("clear", pool)
        self._pending.pop(pool, None)
        for page in range(1, len(self._holders[pool])):
            if self.owner(pool, page) != FREE:
                self._move(pool, page, FREE)

    # -- rows ------------------------------------------------------------------------------------

    def take_rows(self, rows: Sequence[int]) -> None:
        """These rows are live, and name nothing (LEDGER-11). O(rows named)."""
        for row in self._named("take_rows", rows):
            if row in self._rows:
                self._fault("alias", ROWS, row, RESERVED, RESERVED, row)
                self._unname(row)
            self._move(ROWS, row, RESERVED)
            self._rows[row] = {}

    def give_rows(self, rows: Sequence[int]) -> None:
        """These rows are free (LEDGER-7, LEDGER-11). O(pages they name)."""
        for row in self._named("give_rows", rows):
            if row not in self._rows:
                self._fault("double free", ROWS, row, FREE, FREE, row)
            else:
                self._left[row] = self._unname(row)
                for page in self._held[row]:
                    self._orphans[page] = row, _first(self._left[row], page)
            self._move(ROWS, row, FREE)

    def clear_rows(self) -> None:
        """Every row is free (LEDGER-8), and their requests' pages abandoned. O(rows and pages)."""
        self._require_action("clear_rows")
        for row in range(len(self._holders[ROWS])):
            for page in sorted(self._held[row]):
                self._hold(page, ABANDONED)
        for row in sorted(self._rows):
            self._unname(row)
            self._move(ROWS, row, FREE)

    def _named(self, name: str, rows: Sequence[int]) -> Iterator[int]:
        self._require_action(name)
        given = numbers(rows, "LEDGER-14")
        return (row for row in given if self._sound(ROWS, row, row))

    def _unname(self, row: int) -> dict[int, int]:
        """The row is live no more. What it named."""
        names = self._rows.pop(row)
        for page in names.values():
            self._let_go(row, page)
        return names

    def _let_go(self, row: int, page: int) -> None:
        self._namers[page][row] -= 1
        if not self._namers[page][row]:
            del self._namers[page][row]

    def write(self, row: int, start: int, slots: Slots) -> None:
        """The positions [start, start + len(slots)) of a row name these (LEDGER-4). O(slots)."""
        self._require_action("write")
        given, row, start = numbers(slots, "LEDGER-14"), operator.index(row), operator.index(start)
        stop = start + len(given)
        if not 0 <= start <= stop <= LIMIT:
            raise ContractError(f"LEDGER-14: positions [{start}, {stop}) are not in [0, 2^31)")
        self._slots_seen += len(given)
        if not given or not self._sound(ROWS, row, row):
            return
        if row not in self._rows:
            self._fault("dangling row", ROWS, row, FREE, RESERVED, row)
            self._move(ROWS, row, RESERVED)
            self._rows[row] = {}
        pages = [slot // self._page_size for slot in given]
        sound = {page for page in dict.fromkeys(pages) if self._sound_of(row, page)}
        for position, page in enumerate(pages, start):
            if page in sound:
                if position in self._rows[row]:
                    self._let_go(row, self._rows[row][position])
                self._rows[row][position] = page
                self._namers.setdefault(page, Counter())[row] += 1

    def _sound_of(self, row: int, page: int) -> bool:
        """Make a page, if it exists, the request's of a row that names it, unless the tree's."""
        if not self._sound(self._pool, page, row):
            return False
        holder, request = self._holders[self._pool][page], Owner("request", row)
        if holder not in (TREE, request):
            if holder in (FREE, PENDING):
                self._fault("dangling row", self._pool, page, holder, request, row)
            elif holder != RESERVED:
                self._fault("alias", self._pool, page, holder, request, row)
            self._hold(page, request)
        if page in self._given:
            self._given[page].rows.add(row)
        return True

    def row_pages(self, row: int) -> list[int]:
        """The page of each page-sized stretch of a live row, from position 0. O(positions).

        Of a stretch with several, that of its last position; 0 where no position names any.
        """
        names = sorted(self._rows.get(row, {}).items())
        last = {position // self._page_size: page for position, page in names}
        return [last.get(stretch, 0) for stretch in range(max(last, default=-1) + 1)]

    # -- the tree --------------------------------------------------------------------------------

    def adopt(self, row: int, stop: int) -> None:
        """The tree has the request's whole pages in [0, stop) of the row (LEDGER-5). O(positions).

        A row that was given back in the action still names its pages here. What the action gave
        back before is not adopted.
        """
        self._require_action("adopt")
        row, stop = operator.index(row), operator.index(stop)
        if not 0 <= stop <= LIMIT:
            raise ContractError(f"LEDGER-14: stop {stop} is not in [0, 2^31]")
        if not self._sound(ROWS, row, row):
            return
        whole = stop - stop % self._page_size
        names = sorted(self._rows.get(row, self._left.get(row, {})).items())
        for page in dict.fromkeys(page for position, page in names if position < whole):
            given_back = page in self._given and row not in self._given[page].rows
            if not given_back and self._holders[self._pool][page] != TREE:
                self._adopt(page, [Owner("request", row)], row)

    def adopt_slots(self, slots: Slots) -> None:
        """The tree has the pages of these slots (LEDGER-5). O(slots)."""
        for page in self._pages("adopt_slots", self._pool, slots):
            holder = self._holders[self._pool][page]
            self._adopt(page, [] if holder == TREE else [holder])

    def _adopt(self, page: int, rightful: Iterable[Owner], row: int = -1) -> None:
        owner = self.owner(self._pool, page)
        if owner.kind in ("free", "pending", "copy"):
            self._fault("use after free", self._pool, page, owner, TREE, row)
        elif owner not in rightful:
            self._fault("alias", self._pool, page, owner, TREE, row)
        self._move(self._pool, page, TREE)

    # -- copies ----------------------------------------------------------------------------------

    def copy_begin(self, pool: str, slots: Slots) -> int:
        """A copy from or to these is in flight; its number (LEDGER-9). O(slots)."""
        pages = self._pages("copy_begin", pool, slots)
        copy, self._copy_count = self._copy_count, self._copy_count + 1
        self._copies[copy] = pool, list(pages)
        for page in self._copies[copy][1]:
            flights = self._flights.get((pool, page), ())
            self._move(pool, page, self._holders[pool][page], (*flights, copy))
        return copy

    def copy_end(self, copy: int) -> None:
        """It is done (LEDGER-9). O(pages of the copy)."""
        self._require_action("copy_end")
        if copy not in self._copies:
            raise ContractError(f"LEDGER-14: copy {copy} is not in flight")
        pool, pages = self._copies.pop(copy)
        for page in pages:
            flights = self._flights.get((pool, page), ())
            if copy in flights:
                others = tuple(other for other in flights if other != copy)
                self._move(pool, page, self._holders[pool][page], others)

    # -- what is known ---------------------------------------------------------------------------

    def counts(self, pool: str) -> dict[str, int]:
        """How many pages each kind of owner has; the kinds of `OwnerKind`, all of them. O(1)."""
        self._require_pool(pool, ROWS)
        return {kind: self._counts[pool][kind] for kind in get_args(OwnerKind)}

    def history(self, pool: str, page: int) -> list[Step]:
        """What became of a page, the newest first (LEDGER-13). O(step_count)."""
        self._require_pool(pool, ROWS)
        steps = reversed(self._steps)
        return [step for there, which, step in steps if (there, which) == (pool, page)]

    def counters(self) -> dict[str, int]:
        """Exact costs so far (LEDGER-15).

        `slots_seen` were given to effects, `pages_moved` is how many steps were entered, with those
        of rows, and `rows_looked_at` are rows that name a page given back or taken, for each.
        """
        return {
            "slots_seen": self._slots_seen,
            "pages_moved": self._moved,
            "rows_looked_at": self._rows_looked_at,
        }

    # -- checking --------------------------------------------------------------------------------

    def view(self) -> LedgerView:
        """The abstract state. O(pages)."""
        owners = {
            pool: tuple(self.owner(pool, page) for page in self._range(pool))
            for pool in self._holders
        }
        rows = {row: tuple(self.row_pages(row)) for row in sorted(self._rows)}
        groups = frozenset(self._pending)
        return LedgerView(owners, rows, tuple(self._copies), groups, self._action)

    def _range(self, pool: str) -> range:
        return range(0 if pool == ROWS else 1, len(self._holders[pool]))

    def check(self) -> None:
        """Raise ContractError if the books are broken (LEDGER-1). O(pages)."""
        for pool, owners in self.view().owners.items():
            if Counter(owner.kind for owner in owners) != +self._counts[pool]:
                raise ContractError(f"LEDGER-1: the counts of pool {pool} are not its owners'")
        holders = self._holders[self._pool]
        for row, pages in self._held.items():
            if pages != {page for page, holder in enumerate(holders) if holder == ("request", row)}:
                raise ContractError(f"LEDGER-1: row {row} does not have what its request holds")
        for row, holder in enumerate(self._holders[ROWS]):
            if (holder == RESERVED) != (row in self._rows):
                raise ContractError(f"LEDGER-1: row {row} is free and live")
        named = Counter((page, row) for row, at in self._rows.items() for page in at.values())
        namers = {(page, row): n for page, rows in self._namers.items() for row, n in rows.items()}
        if named != namers:
            raise ContractError("LEDGER-1: the names of pages are not what the rows name")


def _first(names: Mapping[int, int], page: int) -> int:
    """The first position that names a page, or one behind all of them."""
    return min((position for position, named in names.items() if named == page), default=LIMIT)
