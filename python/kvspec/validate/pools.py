"""Following the allocator and the request pool: SLOT, PAGE, SWA, REQ, and who has a page."""

from collections import Counter
from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import Tensor

from kvspec.flight_recorder.events import (
    Alloc,
    AllocDecode,
    AllocExtend,
    AllocRows,
    BackupState,
    Clear,
    ClearRows,
    CopyBegin,
    CopyEnd,
    Event,
    Free,
    FreeGroupBegin,
    FreeGroupEnd,
    FreeRows,
    FreeSwa,
    MoveSwa,
    RestoreState,
    Runs,
    Write,
    Written,
)
from kvspec.validate.books import Books, Broken
from kvspec.validate.choices import FollowedPages, FollowedWindows
from kvspec.validate.runs import named, numbers_of

__all__ = ["POOL_RULES", "repeated"]


def alloc(books: Books, event: Alloc) -> None:
    """Any free pages (PAGE-3 to PAGE-5, SLOT-2 to SLOT-4, SWA-3 to SWA-5).

    SGLang rounds a request down to whole pages where kvspec refuses it: that is a choice.
    """
    size = event.need_size
    if event.slots is not None and size > 0:
        size -= size % books.page_size
    grant(books, event.slots, frozenset(), lambda: books.allocator.alloc(size), books.laws.alloc)


def alloc_extend(books: Books, event: AllocExtend) -> None:
    """Any free pages, in their places (PAGE-6, PAGE-8, SWA-6, SWA-7)."""
    arguments = (event.prefix_lens, event.seq_lens, event.last_loc)
    requests = zip(*arguments, strict=False)
    size = books.page_size
    continued = {last // size for start, stop, last in requests if start % size and start < stop}
    allocator = paged(books, books.laws.extend)

    def call() -> Tensor | None:
        return allocator.alloc_extend(*arguments, event.extend_num_tokens)

    grant(books, event.slots, continued, call, books.laws.extend)


def alloc_decode(books: Books, event: AllocDecode) -> None:
    """Any free pages, in their places (PAGE-7, PAGE-8, SWA-6, SWA-7)."""
    size = books.page_size
    requests = zip(event.seq_lens, event.last_loc, strict=False)
    continued = {last // size for length, last in requests if (length - 1) % size}
    allocator = paged(books, books.laws.decode)

    def call() -> Tensor | None:
        return allocator.alloc_decode(event.seq_lens, event.last_loc)

    grant(books, event.slots, continued, call, books.laws.decode)


def paged(books: Books, clause: str) -> FollowedPages | FollowedWindows:
    """The allocator, if it has `alloc_extend`."""
    if isinstance(books.allocator, FollowedPages | FollowedWindows):
        return books.allocator
    raise Broken(clause, "a slot allocator extended requests", "it has no such method")


def grant(
    books: Books,
    slots: Runs | None,
    continued: Set[int],
    call: Callable[[], Tensor | None],
    clause: str,
) -> None:
    """Hand out what the log got, of which some pages were held before; refuse where it must."""
    allocator, refusal = books.allocator, books.laws.refusal
    if slots is None:
        available = allocator.available_size()
        result = call()
        if result is not None:
            told = f"None, with {available} slots available"
            raise Broken(refusal, told, f"{len(result)} slots")
        return
    pages = [page for page in books.pages(slots) if page not in continued]
    for page in pages:
        if not allocator.is_free(page):
            raise Broken(clause, f"page {page}, which is {books.who(page)}", "a free page")
        refuse_named(books, page)
    allocator.put_first(pages)
    result = call()
    found = numbers_of(slots)
    if result is None:
        told = f"{len(found)} slots, with {allocator.available_size()} available"
        raise Broken(refusal, told, "None")
    if result.tolist() != found:
        raise Broken(clause, named(found, "slot"), named(result.tolist(), "slot"))


def refuse_named(books: Books, page: int) -> None:
    """What was given back by hand is in no live row when it is handed out again (CACHE-1)."""
    row = books.abandoned.pop(page, -1)
    size = books.page_size
    if any(slot // size == page for slot in books.pool.live_rows().get(row, ())[::size]):
        found = f"page {page}, which row {row} names, given back or not"
        raise Broken("CACHE-1", found, "a page that no live row names")


def free(books: Books, event: Free) -> None:
    """Held pages, none of them the tree's (PAGE-9, PAGE-10, SLOT-5, SWA-8, SWA-9, CHECK-15)."""
    refuse_resident(books, event.slots)
    refuse_again(books, event.slots)
    rows = {page: books.owners[page] for page in books.pages(event.slots) if page in books.owners}
    allocator, slots = books.allocator, numbers_of(event.slots)
    if isinstance(allocator, FollowedWindows):
        allocator.free(slots, numbers_of(event.swa_slots))
    else:
        allocator.free(slots)
    books.released()
    books.abandoned.update(rows)


def refuse_resident(books: Books, slots: Runs) -> None:
    """The tree's pages are the cache's to give back: else it would name what is free."""
    for page in books.pages(slots):
        if books.is_resident(page):
            found = f"page {page}, which is {books.who(page)}, was given back"
            raise Broken("CHECK-15", found, "the cache gives back what the tree has")


def refuse_again(books: Books, slots: Runs) -> None:
    """What is given back is held (PAGE-10, SLOT-5, SWA-9)."""
    for page in books.pages(slots):
        if page in books.returned and not books.allocator.is_held(page):
            found = f"page {page}, which is {books.who(page)}, was given back again"
            expected = "ContractError: it was given back before, and not handed out since"
            raise Broken(books.allocator.clauses.given_back, found, expected)


def free_swa(books: Books, event: FreeSwa) -> None:
    """Pairs (SWA-10, SWA-11)."""
    windowed(books).free_swa(numbers_of(event.slots))


def move_swa(books: Books, event: MoveSwa) -> None:
    """Pairs change their full pages (SWA-12, SWA-13)."""
    windowed(books).move_swa(numbers_of(event.target), numbers_of(event.source))


def windowed(books: Books) -> FollowedWindows:
    """The allocator, if it has a window pool."""
    if isinstance(books.allocator, FollowedWindows):
        return books.allocator
    raise Broken("SWA-10", "a window slot was given back", "the allocator has no window pool")


def group_begin(books: Books, event: FreeGroupBegin) -> None:
    """PAGE-12, SLOT-8."""
    books.allocator.free_group_begin()


def group_end(books: Books, event: FreeGroupEnd) -> None:
    """PAGE-11, SLOT-7."""
    books.allocator.free_group_end()
    books.allocator.given_back.clear()


def backup(books: Books, event: BackupState) -> None:
    """PAGE-14, SLOT-9."""
    books.tickets[event.ticket] = books.allocator.backup_state()


def restore(books: Books, event: RestoreState) -> None:
    """PAGE-14, PAGE-15, SLOT-9, SLOT-10."""
    books.allocator.restore_state(books.tickets.get(event.ticket))
    books.released()


def clear(books: Books, event: Clear) -> None:
    """PAGE-13, SLOT-9."""
    books.allocator.clear()
    books.owners.clear()
    books.abandoned.clear()


def alloc_rows(books: Books, event: AllocRows) -> None:
    """Any free rows (REQ-2, REQ-3, REQ-4)."""
    pool, available = books.pool, books.pool.available_size()
    if event.rows is None:
        result = pool.alloc(event.need_size)
        if result is not None:
            raise Broken("REQ-3", f"None, with {available} rows free", f"{len(result)} rows")
        return
    for row in event.rows:
        if not pool.is_free(row):
            what = "live" if pool.is_live(row) else "none of the pool"
            raise Broken("REQ-2", f"row {row}, which is {what}", "a free row")
    pool.put_first(event.rows)
    result = pool.alloc(event.need_size)
    if result is None:
        raise Broken("REQ-3", f"{len(event.rows)} rows, with {available} free", "None")
    if result != event.rows:
        raise Broken("REQ-2", named(event.rows, "row"), f"{event.need_size} different rows")


def free_rows(books: Books, event: FreeRows) -> None:
    """REQ-4, REQ-5. What a row has left is reserved: its owner may give it back after the row."""
    live = books.pool.live_rows()
    slots = {row: live[row] for row in event.rows if row in live}
    books.pool.free(event.rows)
    for row, had in slots.items():
        books.dismiss(row, had)


def write(books: Books, event: Write) -> None:
    """REQ-6, REQ-7, and of each page that it is held, and no other request's (CACHE-1)."""
    for place in event.places:
        refuse_alias(books, place)
        before = books.pool.live_rows().get(place.row, [])
        slots = numbers_of(place.slots)
        stop = place.start + len(slots)
        pages = books.pages(place.slots)
        gone = {slot // books.page_size for slot in before[place.start : stop]}
        books.pool.write((place.row, slice(place.start, stop)), slots)
        books.disown(place.row, gone.difference(pages))
        books.own(place.row, pages)


def refuse_alias(books: Books, place: Written) -> None:
    """A row names pages that are held, and its request's own or the tree's (CACHE-1)."""
    for page in books.pages(place.slots):
        owner = books.owners.get(page, place.row)
        alias = owner != place.row and not books.is_resident(page)
        if page and (alias or not books.allocator.is_held(page)):
            found = f"row {place.row} names page {page}, which is {books.who(page)}"
            raise Broken("CACHE-1", found, "a page that is held, and no other request's")


def clear_rows(books: Books, event: ClearRows) -> None:
    """REQ-9."""
    for row, slots in list(books.pool.live_rows().items()):
        books.dismiss(row, slots)
    books.pool.clear()


def copy_begin(books: Books, event: CopyBegin) -> None:
    """LEDGER-9."""
    books.copies[event.n] = frozenset(books.pages(event.slots))


def copy_end(books: Books, event: CopyEnd) -> None:
    """LEDGER-9."""
    books.copies.pop(event.copy, None)


def repeated(slots: Runs) -> int | None:
    """A slot that is named more than once, if there is one."""
    counts = Counter(numbers_of(slots))
    return next((slot for slot, count in counts.items() if count > 1), None)


POOL_RULES: Mapping[type[Event], Callable[[Books, Any], None]] = {
    Alloc: alloc,
    AllocDecode: alloc_decode,
    AllocExtend: alloc_extend,
    AllocRows: alloc_rows,
    BackupState: backup,
    Clear: clear,
    ClearRows: clear_rows,
    CopyBegin: copy_begin,
    CopyEnd: copy_end,
    Free: free,
    FreeGroupBegin: group_begin,
    FreeGroupEnd: group_end,
    FreeRows: free_rows,
    FreeSwa: free_swa,
    MoveSwa: move_swa,
    RestoreState: restore,
    Write: write,
}
"""How each event of the two is followed."""
