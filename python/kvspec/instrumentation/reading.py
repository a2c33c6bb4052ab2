"""What objects hold when a ledger begins, and who claims it when it is checked. Spec: INSTR-6."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

from kvspec.instrumentation.effects import Effects
from kvspec.instrumentation.knowledge import BEFORE
from kvspec.instrumentation.views import node_path, rooted
from kvspec.interfaces.memory_checker import Claims, RunningReq, SystemView
from kvspec.interfaces.ownership_ledger import LedgerView, OwnershipLedger
from kvspec.interfaces.prefix_cache import Path

__all__ = ["claims_of", "given_claims", "open_paths", "own_length", "page_counts", "seed"]


def page_counts(view: SystemView) -> dict[str, int]:
    """The pools of a ledger, and how many pages they have; it wants one at least."""
    counts = {"full": view.page_count}
    if view.swa_page_count is not None:
        counts["swa"] = view.swa_page_count
    if view.host is not None:
        counts["host"] = view.host.page_count
    return {pool: max(count, 1) for pool, count in counts.items()}


def seed(ledger: OwnershipLedger, view: SystemView) -> None:
    """Enter what is there. What is wrong with it, a check finds in the objects. O(pool)."""
    size, books = view.page_size, view.allocator
    ledger.begin(BEFORE)
    ledger.take("full", _slots(size, range(1, view.page_count + 1), (*books.free, *books.release)))
    if books.swa is not None:
        listed = (*books.swa.free, *books.swa.release)
        ledger.take("swa", _slots(size, range(1, (view.swa_page_count or 0) + 1), listed))
    if view.host is not None:
        held = set(range(view.host.page_count)) - set(view.host.free)
        ledger.take("host", [(page + 1) * size for page in sorted(held)])
    ledger.adopt_slots([page.page * size for page in view.tree.pages.values()])
    ledger.take_rows(list(view.rows.rows))
    for row, slots in view.rows.rows.items():
        if slots:
            ledger.write(row, 0, slots)
    for pool, lists in (("full", books), ("swa", books.swa)):
        if lists is not None and lists.group:
            ledger.open_group(pool)
        if lists is not None and lists.pending:
            ledger.give(pool, [page * size for page in lists.pending])
    ledger.end()


def _slots(page_size: int, pages: Iterable[int], listed: Collection[int]) -> list[int]:
    free = set(listed)
    return [page * page_size for page in pages if page not in free]


def own_length(view: SystemView, slots: tuple[int, ...]) -> int:
    """How much of a row is its request's, if nobody wrote down its length: what it has of the tree,
    and from there to the first slot that is not held, that the tree has or that it named before.
    """
    size = view.page_size
    tree = {page.page for page in view.tree.pages.values()}
    seen: set[int] = set()
    begun = False
    for position, slot in enumerate(slots):
        page, again = slot // size, position % size != 0 and slot == slots[position - 1] + 1
        if page in tree and begun:
            return position
        begun = begun or page not in tree
        if page not in view.allocator.held or (page in seen and not again):
            return position
        seen.add(page)
    return len(slots)


def open_paths(cache: Any, view: SystemView) -> Iterable[Path]:
    """The paths of the locks that are open, once for each. O(pages × depth)."""
    if not rooted(cache):
        return view.tree.receipts
    paths: Counter[Path] = Counter()
    waiting = list(cache.root_node.children.values())
    while waiting:
        node = waiting.pop()
        children = list(node.children.values())
        waiting += children
        deeper = sum(map(_locks, children))
        paths[node_path(node)] += max(_locks(node) - deeper, 0)
    return paths.elements()


def _locks(node: Any) -> int:
    return int(getattr(node, "full_lock_ref", getattr(node, "lock_ref", 0)))


# ----------------------------------------------------------------------------------------- claims


def given_claims(
    cache: Any, view: SystemView, reqs: Iterable[Any], reserved: Iterable[int]
) -> Claims:
    """The requests and slots that somebody names; nobody kept count of locks."""
    tree = {page.page for page in view.tree.pages.values()}
    running = tuple(_request(view, req, tree, _path_by(cache)) for req in _live(reqs))
    return Claims(running, frozenset(slot // view.page_size for slot in reserved))


def _live(reqs: Iterable[Any]) -> Iterable[Any]:
    return (req for req in reqs if req.req_pool_idx is not None)


def _path_by(cache: Any) -> Callable[[object], Path | None]:
    def path(node: object) -> Path | None:
        return cache.resolve(node) if hasattr(cache, "resolve") else None

    return path


def _request(
    view: SystemView,
    req: Any,
    tree: Collection[int],
    path_of: Callable[[object], Path | None],
) -> RunningReq:
    row, protected = int(req.req_pool_idx), getattr(req, "cache_protected_len", None)
    if protected is None:
        protected = _leading(view, row, tree)
    receipt = getattr(req, "lock_receipt", None)
    return RunningReq(row, protected, None if receipt is None else path_of(receipt.node))


def _leading(view: SystemView, row: int, pages: Collection[int]) -> int:
    """How many slots at the start of a row are in whole pages of these."""
    size, count = view.page_size, 0
    slots = view.rows.rows.get(row, ())
    for start in range(0, len(slots) - len(slots) % size, size):
        if slots[start] // size not in pages:
            break
        count = start + size
    return count


def claims_of(
    effects: Effects,
    books: LedgerView,
    view: SystemView,
    reqs: Iterable[Any],
    reserved: Iterable[int],
) -> Claims:
    """Who holds what, by a ledger: live rows, what is reserved, copies, locks (CHECK-13)."""
    owners = books.owners["full"]
    kinds = {page: owner.kind for page, owner in enumerate(owners, 1)}
    tree = {page for page, kind in kinds.items() if kind == "tree"}
    running = {row: RunningReq(row, _leading(view, row, tree), None) for row in books.rows}
    for row, req in effects.requests.items():
        if row in running and req.req_pool_idx == row:
            running[row] = _request(view, req, tree, effects.path_of)
    for req in _live(reqs):
        running[int(req.req_pool_idx)] = _request(view, req, tree, effects.path_of)
    kept = {page for page, kind in kinds.items() if kind == "reserved"}
    named = {slot // view.page_size for slot in reserved}
    host = books.owners.get("host", ())
    return Claims(
        running=tuple(running.values()),
        reserved=frozenset(kept | named),
        copies=frozenset(page for page, kind in kinds.items() if kind == "copy"),
        host_copies=frozenset(page for page, owner in enumerate(host) if owner.kind == "copy"),
        open_locks=effects.locks.holders(effects.path_of) if effects.shares else None,
    )
