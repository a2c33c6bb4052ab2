"""Every page, row and lock of a system, compared with who claims it. Spec: CHECK.

    every page of 1 .. P has exactly one owner: free, pending, tree, a request, reserved

A held page of a window pool is owned by whoever owns the full page whose pair it is. A copy in
flight is an owner beside the one that a page has, and in its place if it has none.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, TypeAlias

from kvspec.interfaces.memory_checker import (
    Attribution,
    Claims,
    HostView,
    ReportKind,
    RunningReq,
    SystemView,
)
from kvspec.interfaces.prefix_cache import Path
from kvspec.interfaces.slot_allocator import AllocatorView
from kvspec.memory_checker.idle import leftovers
from kvspec.memory_checker.report import Pool, Report, pools

__all__ = ["find_faults"]


class _Claim(NamedTuple):
    """One place that names a page."""

    kind: str
    """free, pending, tree, request, reserved or copy; `stale` is the pair of a listed page, and
    `row` a row of no request.
    """
    owner: str
    """As a report calls it."""
    row: int | None = None
    position: int | None = None
    """The first of the row that names the page."""


_Claimed: TypeAlias = dict[int, list[_Claim]]
_Found: TypeAlias = Iterator[tuple[Report, Pool]]

_FREE, _PENDING = _Claim("free", "free"), _Claim("pending", "pending")
_TREE, _RESERVED = _Claim("tree", "tree"), _Claim("reserved", "reserved")
_COPY = _Claim("copy", "a copy in flight")
_LISTED = ("free", "pending")


def find_faults(
    view: SystemView,
    claims: Claims,
    attribution: Attribution | None = None,
    *,
    idle: bool = False,
) -> list[Report]:
    """Every fault of a system, page by page; empty if each has one owner (CHECK-1 to CHECK-19).

    With `attribution` the reports have owner, cause and history (CHECK-13). If it should be `idle`,
    what is live, reserved, locked or in flight is a fault too (CHECK-23). O(pool).
    """
    named = pools(windows=view.allocator.swa is not None)
    found = [*_faults(view, claims, named)]
    if idle:
        found += leftovers(view, claims, named)
    return [report.attributed(attribution, pool) for report, pool in found]


def _faults(view: SystemView, claims: Claims, named: Mapping[str, Pool]) -> _Found:
    full, rows = named["full"], named["rows"]
    claimed = _claimed(view, claims)
    yield from _page_faults(full, claimed, range(1, view.page_count + 1))
    if view.allocator.swa is not None:
        windows = _claimed_windows(view.allocator, view.allocator.swa, claimed)
        yield from _page_faults(named["swa"], windows, range(1, (view.swa_page_count or 0) + 1))
        yield from _tombstone_faults(full, view)
        yield from _window_faults(rows, view, claims)
    yield from _misplaced_faults(full, view)
    yield from _lock_faults(full, view, claims)
    yield from _protected_faults(rows, view, claims)
    yield from _row_faults(rows, view, claims)
    if view.host is not None:
        hosts = _claimed_hosts(view.host, claims)
        yield from _page_faults(named["host"], hosts, range(view.host.page_count))


# ------------------------------------------------------------------------- who claims what


def _claimed(view: SystemView, claims: Claims) -> _Claimed:
    """The claims on each page that has any: one for each place that names it."""
    claimed = _listed(view.allocator)
    for page in _tree_pages(view):
        claimed[page].append(_TREE)
    for req in _live(view, claims):
        owner = f"the request in row {req.row}"
        for page, position in _stretches(view, req.row):
            if position >= req.protected or not 1 <= page <= view.page_count:
                claimed[page].append(_Claim("request", owner, req.row, position))
    for row in view.rows.rows.keys() - {req.row for req in claims.running}:
        for page, position in _stretches(view, row):
            if not 1 <= page <= view.page_count:
                claimed[page].append(_Claim("row", f"row {row}", row, position))
    for page in claims.reserved:
        claimed[page].append(_RESERVED)
    for page in claims.copies:
        if all(claim.kind in _LISTED for claim in claimed.get(page, ())):
            claimed[page].append(_COPY)
    return claimed


def _listed(books: AllocatorView) -> _Claimed:
    """The pages that are in a list of the allocator, once for each time."""
    claimed: _Claimed = defaultdict(list)
    for claim, pages in ((_FREE, (*books.free, *books.release)), (_PENDING, books.pending)):
        for page in pages:
            claimed[page].append(claim)
    return claimed


def _tree_pages(view: SystemView) -> Iterator[int]:
    """The pages that the tree names, once for each place; of slots out of order, each of theirs."""
    misplaced = dict(view.misplaced)
    for path, resident in view.tree.pages.items():
        if not misplaced or path not in misplaced:  # a path is as long as what it names
            yield resident.page
    for slots in misplaced.values():
        yield from dict.fromkeys(slot // view.page_size for slot in slots)


def _live(view: SystemView, claims: Claims) -> Iterator[RunningReq]:
    return (req for req in claims.running if req.row in view.rows.rows)


def _stretches(view: SystemView, row: int) -> Iterator[tuple[int, int]]:
    """The pages that a row names, page-sized stretch by stretch, and the first position of each."""
    size, slots = view.page_size, view.rows.rows[row]
    for start in range(0, len(slots), size):
        pages = [slot // size for slot in slots[start : start + size]]
        for offset, page in enumerate(pages):
            if not offset or page != pages[offset - 1]:
                yield page, start + offset


def _claimed_windows(books: AllocatorView, windows: AllocatorView, claimed: _Claimed) -> _Claimed:
    """The same of the window pool: a pair is owned with its full page (CHECK-9).

    One that is in no list, and that only full pages in a list claim, has no owner.
    """
    found = _listed(windows)
    paired: _Claimed = defaultdict(list)
    for full, window in books.pairs:
        for claim in claimed.get(full, ()):
            kind = "stale" if claim.kind in _LISTED else claim.kind
            named = claim._replace(kind=kind, owner=f"{claim.owner} with page {full}")
            paired[window].append(named)
    for window, claims in paired.items():
        if window in found or any(claim.kind != "stale" for claim in claims):
            found[window] += claims
    return found


def _claimed_hosts(host: HostView, claims: Claims) -> _Claimed:
    """The same of the next tier (CHECK-19)."""
    claimed: _Claimed = defaultdict(list)
    for claim, pages in ((_FREE, host.free), (_TREE, host.tree)):
        for page in pages:
            claimed[page].append(claim)
    for page in claims.host_copies:
        if all(claim.kind in _LISTED for claim in claimed.get(page, ())):
            claimed[page].append(_COPY)
    return claimed


# ------------------------------------------------------------------------- pages


def _page_faults(pool: Pool, claimed: _Claimed, pages: range) -> _Found:
    """A report for each page without exactly one owner, a deficit or a surplus (CHECK-1, CHECK-2),
    and of a surplus one for each kind (CHECK-14, CHECK-15, CHECK-16, CHECK-18).
    """
    faulty = [page for page in pages if len(claimed.get(page, ())) != 1]
    for page in sorted([*faulty, *(page for page in claimed if page not in pages)]):
        claims = claimed.get(page, ())
        if not claims:
            yield _deficit(pool, page), pool
        elif page not in pages:
            yield _sentinel(pool, page, claims, pages), pool
        else:
            yield from ((_surplus(pool, page, claims, *kind), pool) for kind in _kinds(claims))


def _deficit(pool: Pool, page: int) -> Report:
    orphan = pool.key == "host"
    return Report(
        kind="host orphan" if orphan else "leak",
        clauses=("CHECK-19",) if orphan else (*pool.clauses, "CHECK-1"),
        pool=pool.name,
        page=page,
        what=f"{pool.page} {page} of {pool.name} is held and has no owner",
    )


def _sentinel(pool: Pool, page: int, claims: Sequence[_Claim], pages: range) -> Report:
    """What is no page of the pool must not be in circulation (CHECK-18)."""
    owners = tuple(claim.owner for claim in claims)
    why = "is the sink" if page == 0 else f"is outside the pool, {pages.start} .. {pages.stop - 1}"
    return Report(
        kind="sentinel",
        clauses=(*pool.clauses, "CHECK-18", "CHECK-2"),
        pool=pool.name,
        page=page,
        what=f"{pool.page} {page} of {pool.name} {why}, but is in circulation: {'; '.join(owners)}",
        owners=owners,
        row=claims[0].row,
        position=claims[0].position,
    )


def _kinds(claims: Sequence[_Claim]) -> Iterator[tuple[ReportKind, str, _Claim | None]]:
    """What kinds of surplus a page with these claims has, with clause and row; alias is that of
    two who both hold it.
    """
    count = Counter(claim.kind for claim in claims)
    listed = count["free"] + count["pending"]
    if listed > 1:
        yield "double free", "CHECK-14", None
    if listed and (count["tree"] or count["copy"]):
        yield "use after free", "CHECK-15", None
    rows = {claim.row: claim for claim in reversed(claims) if claim.kind == "request"}
    if listed:
        for claim in reversed(rows.values()):
            yield "dangling row", "CHECK-16", claim
    several = count["tree"] > 1 or count["request"] > 1 or count["reserved"] or count["stale"]
    if several:
        yield "alias", "", None
    elif count["tree"] and count["request"] and not listed:
        yield "alias", "", next(iter(rows.values()))


def _surplus(
    pool: Pool,
    page: int,
    claims: Sequence[_Claim],
    kind: ReportKind,
    clause: str,
    named: _Claim | None,
) -> Report:
    """A page with more than one owner (CHECK-2); `named` is the claim of the row in question."""
    owners = tuple(claim.owner for claim in claims)
    listed = all(claim.kind in _LISTED for claim in claims)
    has = f"is in the lists {len(owners)} times" if listed else f"has {len(owners)} owners"
    what = f"{pool.page} {page} of {pool.name} {has}: {'; '.join(owners)}"
    if named is not None:
        what += f" (row {named.row} names it from position {named.position} on)"
    return Report(
        kind=kind,
        clauses=(*pool.clauses, *filter(None, (clause,)), "CHECK-2"),
        pool=pool.name,
        page=page,
        what=what,
        owners=owners,
        row=named.row if named else None,
        position=named.position if named else None,
    )


# ------------------------------------------------------------------------- the tree


def _misplaced_faults(pool: Pool, view: SystemView) -> _Found:
    """A report for each page of the tree whose slots are not one page in order: what it names is
    somebody else's (CHECK-2).
    """
    for _, slots in view.misplaced:
        pages = list(dict.fromkeys(slot // view.page_size for slot in slots))
        yield (
            Report(
                kind="alias",
                clauses=("CHECK-2",),
                pool=pool.name,
                page=pages[0],
                what=f"the tree has slots {', '.join(map(str, slots))} for one page of tokens, but"
                f" they are of {_listing('page', pages)} of {pool.name}",
                owners=("tree",),
            ),
            pool,
        )


def _tombstone_faults(pool: Pool, view: SystemView) -> _Found:
    """A report for each page that the tree takes for what it is not (CHECK-10)."""
    pairs = dict(view.allocator.pairs)
    resident = sorted((page.page, page.tombstone) for page in view.tree.pages.values())
    for page, tombstone in resident:
        if tombstone == (page in pairs):
            why = (
                f"is a tombstone of the tree, but has page {pairs[page]} of the window pool"
                if tombstone
                else "is live in the tree, but has no pair"
            )
            yield (
                Report(
                    kind="tombstone",
                    clauses=("CHECK-10",),
                    pool=pool.name,
                    page=page,
                    what=f"page {page} of {pool.name} {why}",
                    owners=("tree",),
                ),
                pool,
            )


def _lock_faults(pool: Pool, view: SystemView, claims: Claims) -> _Found:
    """A report for each page whose locks are not the open ones: more or fewer (CHECK-17)."""
    if claims.open_locks is None:
        return
    holders: dict[Path, list[str]] = defaultdict(list)
    for (extra_key, tokens), names in claims.open_locks.items():
        for stop in range(view.page_size, len(tokens) + 1, view.page_size):
            holders[extra_key, tokens[:stop]] += names
    pages = view.tree.pages
    locked = [path for path, resident in pages.items() if resident.locks]
    for path in dict.fromkeys([*locked, *holders]):
        owners = holders.get(path, [])
        if path not in pages:
            what = f"a path of {len(path[1])} tokens is not in the tree, but locked"
            yield _imbalance(pool, None, what, owners), pool
        elif pages[path].locks != len(owners):
            locks = pages[path].locks
            number = f"{locks} lock{'' if locks == 1 else 's'}"
            than = f"{abs(locks - len(owners))} {'more' if locks > len(owners) else 'fewer'}"
            what = f"has {number}, {than} than are open: {'; '.join(owners) or 'none'}"
            yield _imbalance(pool, pages[path].page, what, owners), pool


def _imbalance(pool: Pool, page: int | None, what: str, owners: Sequence[str]) -> Report:
    return Report(
        kind="lock imbalance",
        clauses=("CHECK-17",),
        pool=pool.name,
        page=page,
        what=f"page {page} of {pool.name} {what}" if page is not None else what,
        owners=tuple(owners),
    )


# ------------------------------------------------------------------------- rows


def _row_fault(
    pool: Pool,
    kind: ReportKind,
    clause: str,
    row: int,
    what: str,
    *,
    position: int | None = None,
) -> tuple[Report, Pool]:
    return (
        Report(
            kind=kind,
            clauses=(clause,),
            pool=pool.name,
            page=row,
            what=f"row {row} of {pool.name} {what}",
            row=row,
            position=position,
        ),
        pool,
    )


def _window_faults(pool: Pool, view: SystemView, claims: Claims) -> _Found:
    """A report for each page without a pair that the next token of a row still reads (CHECK-11)."""
    if view.sliding_window_size is None:
        return
    pairs = dict(view.allocator.pairs)
    for req in _live(view, claims):
        slots = view.rows.rows[req.row]
        start = max(len(slots) - view.sliding_window_size + 1, 0)
        named = [(slot // view.page_size, place) for place, slot in enumerate(slots)][start:]
        for page, places in groupby(named, key=itemgetter(0)):
            if page not in pairs:
                position = next(places)[1]
                what = (
                    f"has page {page} at position {position}, in the window of the next token,"
                    " but it has no pair"
                )
                yield _row_fault(pool, "dangling row", "CHECK-11", req.row, what, position=position)


def _protected_faults(pool: Pool, view: SystemView, claims: Claims) -> _Found:
    """A report for each page of a protected row that is not the tree's (CHECK-3)."""
    known = _Shared(view)
    for req in _live(view, claims):
        slots = view.rows.rows[req.row][: req.protected]
        for start in range(0, req.protected, view.page_size):
            stop = min(start + view.page_size, req.protected)
            found = slots[start:stop]
            if req.path is not None:
                there = known.on_path(req.path, stop)
            else:
                there = known.from_slot(found[0]) if found else ()
            position = _first_difference(found, there, stop - start)
            if position is not None:
                what = _differs(found, there, position, start, known=req.path is not None)
                at = start + position
                yield _row_fault(pool, "dangling row", "CHECK-3", req.row, what, position=at)


class _Shared:
    """The slots that a tree has: by path, or by the first of a page."""

    def __init__(self, view: SystemView) -> None:
        self._view, self._misplaced = view, dict(view.misplaced)

    def on_path(self, path: Path, stop: int) -> Sequence[int]:
        """Those of the page that ends at `stop`; none if there is none."""
        extra_key, tokens = path
        named = extra_key, tokens[:stop]
        resident = self._view.tree.pages.get(named) if stop <= len(tokens) else None
        if resident is None:
            return ()
        return self._misplaced.get(named) or self._slots(resident.page)

    def from_slot(self, slot: int) -> Sequence[int]:
        """Those of the page that begins with a slot; none if the tree has no such page."""
        return self._starts.get(slot, ())

    @cached_property
    def _starts(self) -> dict[int, Sequence[int]]:
        starts: dict[int, Sequence[int]] = {}
        for page in _tree_pages(self._view):
            starts[page * self._view.page_size] = self._slots(page)
        return starts | {slots[0]: slots for slots in self._misplaced.values()}

    def _slots(self, page: int) -> Sequence[int]:
        size = self._view.page_size
        return range(page * size, (page + 1) * size)


def _first_difference(found: Sequence[int], there: Sequence[int], width: int) -> int | None:
    """The first offset in [0, width) where a slot is missing on either side, or another."""
    for offset in range(width):
        pair = found[offset : offset + 1], there[offset : offset + 1]
        if not pair[0] or not pair[1] or pair[0][0] != pair[1][0]:
            return offset
    return None


def _differs(
    found: Sequence[int], there: Sequence[int], offset: int, start: int, *, known: bool
) -> str:
    here = found[offset] if offset < len(found) else None
    where = f"has slot {here} at position {start + offset}"
    if not known:
        return f"{where} of what the tree shares with it, but the tree has no such page"
    expected = there[offset] if offset < len(there) else None
    return f"{where}, but the tree has {expected} on the path of its lock"


def _row_faults(pool: Pool, view: SystemView, claims: Claims) -> _Found:
    """A report for each row without exactly one request (CHECK-4)."""
    named = Counter(req.row for req in claims.running)
    for row in sorted(view.rows.rows.keys() | named.keys()):
        if row not in view.rows.rows:
            what = "is named by a request, but is not live"
            yield _row_fault(pool, "dangling row", "CHECK-4", row, what)
        elif named[row] != 1:
            what = f"is live and belongs to {named[row]} requests"
            yield _row_fault(pool, "alias" if named[row] else "leak", "CHECK-4", row, what)


def _listing(noun: str, numbers: Sequence[int]) -> str:
    """`page 3`, `pages 3 and 5`, `pages 3, 5 and 6`."""
    *most, last = map(str, numbers)
    return f"{noun}s {', '.join(most)} and {last}" if most else f"{noun} {last}"
