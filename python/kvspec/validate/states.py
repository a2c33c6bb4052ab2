"""Taking over the state that a log begins with, and comparing one that it looked at."""

from collections import Counter
from itertools import zip_longest

from kvspec.flight_recorder.events import LiveRow, Observe, State, TreePage
from kvspec.validate.books import Books, Broken
from kvspec.validate.choices import FollowedWindows
from kvspec.validate.runs import named, numbers_of

__all__ = ["observe", "take_over"]


def take_over(books: Books, state: State) -> None:
    """Bring the oracle to a state: lists, rows, tree and locks."""
    allocator, pool = books.allocator, books.pool
    if isinstance(allocator, FollowedWindows):
        allocator.pairs = dict(state.pairs)
        allocator.window.free_list = numbers_of(state.swa_free)
        allocator.window.pending = numbers_of(state.swa_pending)
        allocator.window.group = state.group
    allocator.hold(numbers_of(state.free), numbers_of(state.pending), state.group)
    pool.hold(numbers_of(state.free_rows), [row.row for row in state.rows])
    _grow(books, state.tree)
    for live in state.rows:
        slots = numbers_of(live.slots)
        pool.write((live.row, slice(0, len(slots))), slots)
        books.own(live.row, {slot // books.page_size for slot in slots})


def _grow(books: Books, pages: list[TreePage]) -> None:
    """Insert a tree page by page, parents first, and lock it as it was locked."""
    tree = books.tree
    if tree is None:
        return
    slots: dict[bytes, list[int]] = {b"": []}
    below = Counter[bytes]()
    for page in pages:
        slots[page.id] = slots[page.parent] + numbers_of(page.slots)
        below[page.parent] += page.locks
        books.names.token(page.id, page.parent)
    # A path is inserted from its end, so that an ancestor that lost its pair is known as such.
    parents = {page.parent for page in pages}
    for page in pages:
        if page.id not in parents:
            tree.insert(books.names.path(page.id) or [], slots[page.id])
    for page in pages:
        for _ in range(page.locks - below[page.id]):
            handle = books.handle(page.id)
            if handle is not None:
                books.locks.add(tree.inc_lock_ref(handle), page.id, -1)


def observe(books: Books, event: Observe) -> None:
    """What the three hold is what the oracle's hold: CHECK-1, CHECK-2, CHECK-14, CHECK-17, REQ-6.

    The order of the lists is a choice, and so are nodes.
    """
    state = event.state
    _compare_tree(books, state)
    _compare_lists(books, state)
    _compare_rows(books, state)
    _require_owners(books)


def _compare_lists(books: Books, state: State) -> None:
    allocator = books.allocator
    free, pending = numbers_of(state.free), numbers_of(state.pending)
    for page, count in Counter(free + pending).items():
        if count > 1:
            raise Broken("CHECK-14", f"page {page} is in the lists {count} times", "once")
    both = {*allocator.free_list, *allocator.release}
    for found, expected, what in (
        (set(free), both, "free"),
        (set(pending), set(allocator.pending), "pending"),
    ):
        for page in sorted(found - expected):
            told = f"page {page} is {what}, and is {books.who(page)}"
            raise Broken("CHECK-2", told, f"it is not {what}")
        for page in sorted(expected - found):
            since = "given back" if page in books.returned else "never handed out"
            raise Broken("CHECK-1", f"page {page} is not {what}", f"it is {what}: it was {since}")
    if state.group != allocator.group:
        raise Broken(books.laws.group_end, f"a group is open: {state.group}", str(allocator.group))
    if isinstance(allocator, FollowedWindows):
        paired = {full for full, _ in state.pairs}
        wrong = sorted(paired.symmetric_difference(allocator.pairs))
        if wrong:
            has = "has" if wrong[0] in paired else "has no"
            raise Broken("CHECK-9", f"page {wrong[0]} {has} pair", "the other")


def _require_owners(books: Books) -> None:
    """No page is held for a row that was given back without it."""
    for page, row in sorted(books.forsaken.items()):
        if books.allocator.is_held(page) and not books.is_resident(page):
            found = f"page {page} is held, and row {row}, whose it was, was given back without it"
            raise Broken("CHECK-1", found, "somebody has it, or it is free")


def _compare_tree(books: Books, state: State) -> None:
    tree = books.tree
    residents = tree.residents() if tree is not None else {}
    seen = set[int]()
    for page in state.tree:
        for number in books.pages(page.slots):
            seen.add(number)
            resident = residents.get(number)
            if resident is None:
                found = f"the tree has page {number}, which is {books.who(number)}"
                raise Broken("CHECK-2", found, "it is not the tree's")
            locks = tree.locks_of(resident) if tree is not None else 0
            if locks != page.locks and books.locks_known:
                found = f"{page.locks} locks cover page {number}"
                raise Broken("CHECK-17", found, f"{locks} were taken and not given back")
    lost = residents.keys() - seen
    if lost:
        raise Broken("CHECK-1", f"{named(lost)} is not in the tree", "the tree has it")


def _compare_rows(books: Books, state: State) -> None:
    live = books.pool.live_rows()
    for row in state.rows:
        _compare_row(row, live.get(row.row))
    for number in sorted(live.keys() & set(numbers_of(state.free_rows))):
        raise Broken("REQ-1", f"row {number} is free", "it is live")


def _compare_row(row: LiveRow, expected: list[int] | None) -> None:
    if expected is None:
        raise Broken("REQ-1", f"row {row.row} is live", "it is free")
    found = numbers_of(row.slots)
    for at, (here, there) in enumerate(zip_longest(found, expected)):
        if here != there:
            raise Broken("REQ-6", f"slot {here} in row {row.row} at {at}", f"slot {there}")
