"""Following the cache: CACHE, RADIX, CHUNK, SWARADIX.

What the oracle's cache does to the pages and to the row is compared with what the log says was
done, page by page: in how many calls and in what order is left to the implementation.
"""

from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

from kvspec.flight_recorder.events import (
    CacheFinishedReq,
    CacheUnfinishedReq,
    DecLockRef,
    Event,
    Evict,
    EvictSwa,
    IncLockRef,
    Insert,
    MatchPrefix,
    Reset,
    Runs,
)
from kvspec.interfaces.prefix_cache import LockReceipt
from kvspec.oracle.trie import Page
from kvspec.validate.books import Books, Broken, effects_of
from kvspec.validate.choices import (
    Cache,
    FollowedRadix,
    FollowedWindowedChunk,
    FollowedWindowedRadix,
    FollowedWindows,
    Locks,
)
from kvspec.validate.pools import repeated
from kvspec.validate.runs import ids_of, named, numbers_of

__all__ = ["CACHE_RULES"]


def match_prefix(books: Books, event: MatchPrefix) -> None:
    """The longest resident prefix, and its slots (RADIX-1, SWARADIX-1, CACHE-18, CHUNK-3)."""
    tokens = books.names.tokens(event.key)
    result = books.cache.match_prefix(tokens, touch=event.touch)
    found, expected = numbers_of(event.slots), result.device_indices.tolist()
    if found != expected:
        raise Broken(books.laws.match, told(found), told(expected))


def told(slots: list[int]) -> str:
    """Slots for a person."""
    return f"{len(slots)} tokens, {named(slots, 'slot')}" if slots else "no token"


def inc_lock_ref(books: Books, event: IncLockRef) -> None:
    """A path that is resident (CACHE-11, CACHE-13, SWARADIX-11)."""
    if books.tree is None:
        return
    if not event.known:
        books.locks_known = False
        return
    handle = books.handle(event.path)
    if handle is None:
        windowed = isinstance(books.tree, FollowedWindowedRadix)
        clause = "SWARADIX-11" if windowed and is_resident(books, event.path) else "CACHE-13"
        found = f"a lock on page {event.path.hex()}, to which no match leads"
        raise Broken(clause, found, "ContractError")
    books.locks.add(books.tree.inc_lock_ref(handle), event.path, event.n)


def is_resident(books: Books, id_: bytes) -> bool:
    """Whether the page of an id is in the tree, in whatever state."""
    path = books.names.path(id_)
    return books.tree is not None and bool(path) and books.tree.knows(path or [])


def dec_lock_ref(books: Books, event: DecLockRef) -> None:
    """A lock that was taken (CACHE-12, CACHE-13). On the empty path it locks nothing, and is not
    missed.
    """
    if books.tree is None:
        return
    if not event.known and event.lock < 0:
        books.locks_known = False
        return
    receipt = books.locks.find(event.path, event.lock)
    if receipt is not None:
        books.tree.dec_lock_ref(receipt)
        books.locks.drop(receipt)
    elif event.path and books.locks_known:
        found = f"a lock on page {event.path.hex()} was given up, and nobody has one"
        raise Broken("CACHE-13", found, "ContractError: the node has no open receipt")


def insert(books: Books, event: Insert) -> None:
    """CACHE-8, CACHE-9, CACHE-10, RADIX-4; the pages that it takes in are held (CHECK-15)."""
    slots = numbers_of(event.slots)
    result = books.cache.insert(books.names.tokens(event.key), slots)
    refuse_effects(books, event, "CACHE-9")
    adopted = [
        slots[at] // books.page_size for start, stop in result.adopted for at in range(start, stop)
    ]
    for page in adopted:
        if not books.allocator.is_held(page):
            raise Broken(
                "CHECK-15", f"page {page} was taken in, and is free", "a page that is held"
            )
        books.owners.pop(page, None)
    if event.prefix_len is not None and event.prefix_len != result.prefix_len:
        found, expected = event.prefix_len, result.prefix_len
        raise Broken("CACHE-8", f"{found} tokens were resident", f"{expected} tokens")


def refuse_effects(books: Books, event: Event, clause: str) -> None:
    """An operation that gives nothing back."""
    freed = effects_of(event).freed
    if freed:
        raise Broken(clause, f"{named(books.pages(freed))} was given back", "nothing")


def evict(books: Books, event: Evict) -> None:
    """Unlocked pages that nothing extends, as many as asked for while there are some (RADIX-8 to
    RADIX-12, SWARADIX-12 to SWARADIX-17); which of them is a choice, and whole runs are.
    """
    did, tree = effects_of(event), books.tree
    refuse_repeated(books, did.freed)
    if tree is None:
        refuse_effects(books, event, books.laws.victims)
        return
    victims = [victim(books, tree, page) for page in books.pages(did.freed)]
    refuse_locked(books, tree, victims)
    for page in tree.extensions(victims):
        gone = page.before.number if isinstance(page.before, Page) else 0
        found = f"page {gone} was evicted, and page {page.number}, which follows it, stays"
        raise Broken(books.laws.leaf, found, "the last page of a path goes first")
    if isinstance(tree, FollowedWindowedRadix):
        evict_both(books, event, tree, victims)
    elif isinstance(tree, FollowedRadix):
        size = books.page_size
        refuse_few(books, len(victims) * size, event.num_tokens, tree.evictable_size())
        tree.chosen = [page.number for page in victims]
        tree.evict(event.num_tokens)
    books.released()


def victim(books: Books, tree: Cache, page: int) -> Page:
    """The page of the tree that was given back."""
    resident = tree.page_of(page)
    if resident is None:
        found = f"page {page}, which is {books.who(page)}, was given back"
        raise Broken(books.laws.victims, found, "pages of the tree alone")
    return resident


def refuse_locked(books: Books, tree: Cache, victims: list[Page]) -> None:
    """A locked page stays (RADIX-11); where locks went unseen they are given up instead."""
    if not books.locks_known:
        for receipt in tree.receipts_covering(victims):
            tree.dec_lock_ref(receipt)
            books.locks.drop(receipt)
    for page in victims:
        locks = tree.locks_of(page)
        if locks:
            found = f"page {page.number} was evicted, which {locks} locks cover"
            raise Broken(books.laws.locked, found, "a locked page stays")


def refuse_few(books: Books, gone: int, asked: int, evictable: int) -> None:
    """At least as many tokens as were asked for, while there are some (RADIX-8, RADIX-9)."""
    if gone < min(asked, evictable) and books.locks_known:
        found = f"{gone} of {asked} tokens were evicted"
        raise Broken(books.laws.leaf, found, f"{evictable} could be")


def evict_both(
    books: Books, event: Evict, tree: FollowedWindowedRadix, victims: list[Page]
) -> None:
    """Leaves from both pools, and pairs of others (SWARADIX-12 to SWARADIX-16)."""
    left = set(books.pages(effects_of(event).swa_freed)) - {page.number for page in victims}
    made = [victim(books, tree, page) for page in left]
    for page in made:
        if tree.window_locks_of(page) or tree.is_tombstone(page):
            state = "a tombstone" if tree.is_tombstone(page) else "under a window lock"
            found = f"the pair of page {page.number} was taken, which is {state}"
            raise Broken("SWARADIX-15", found, "a live page without a window lock")
    size = books.page_size
    pairs = (len(made) + sum(not tree.is_tombstone(page) for page in victims)) * size
    refuse_few(books, len(victims) * size, event.num_tokens, tree.full_evictable_size())
    if pairs < min(event.swa_num_tokens, tree.swa_evictable_size()) and books.locks_known:
        found = f"{pairs} of {event.swa_num_tokens} window tokens were evicted"
        raise Broken("SWARADIX-13", found, f"{tree.swa_evictable_size()} could be")
    tree.chosen, tree.made = [page.number for page in victims], [page.number for page in made]
    tree.evict(event.num_tokens, event.swa_num_tokens)
    extended = {page.before for page in tree.residents().values()}
    for page in tree.residents().values():
        if tree.is_tombstone(page) and page not in extended:
            found = f"page {page.number} is a leaf and has no pair"
            raise Broken("SWARADIX-7", found, "a tombstone that has become a leaf goes too")


def cache_unfinished_req(books: Books, event: CacheUnfinishedReq) -> None:
    """CACHE-2, CACHE-3, CACHE-5, CHUNK-1; that the row names no page that is free (CACHE-1)."""
    receipt = lock_of(books, event)
    request = books.request(event.row, books.names.tokens(event.key), receipt)
    books.cache.cache_unfinished_req(request)
    compare_freed(books, event, books.laws.duplicates, books.before(event.row))
    slots = books.pool.live_rows()[event.row][: event.key.count]
    if numbers_of(event.after) != slots:
        found, expected = rows_told(books, event.after, slots)
        raise Broken(books.laws.copy, found + books.before(event.row), expected)
    books.cached[event.row] = event.key.count
    if books.tree is None or request.lock_receipt is None:
        return
    if receipt is not None:
        books.locks.drop(receipt)
    reach = request.cache_protected_len // books.page_size
    path = ids_of(event.key.ids)[reach - 1] if reach else b""
    books.locks.add(request.lock_receipt, path, event.n, event.row)
    size = books.page_size
    books.disown(event.row, [slot // size for slot in slots[: reach * size : size]])


def rows_told(books: Books, found: Runs, expected: list[int]) -> tuple[str, str]:
    """The first position at which two rows differ, and who has the page that is named there."""
    slots = numbers_of(found)
    pairs = enumerate(zip(slots, expected, strict=False))
    at = next((at for at, (here, there) in pairs if here != there), min(len(slots), len(expected)))
    if at >= min(len(slots), len(expected)):
        return f"{len(slots)} slots in the row", f"{len(expected)} slots"
    page = slots[at] // books.page_size
    what = f"row[{at}] is slot {slots[at]}, of page {page}, which is {books.who(page)}"
    page = expected[at] // books.page_size
    return what, f"slot {expected[at]}, of page {page}, which is {books.who(page)}"


def lock_of(books: Books, event: CacheUnfinishedReq | CacheFinishedReq) -> LockReceipt | None:
    """The lock of a request: the one its row was left with, or one that was taken on its path.

    One of which the tree owns nothing has a lock on the empty path or none, which is the same; a
    request of somebody else's engine may not say what the tree owns. The path of another is told by
    its node or, where that was not seen, by its tokens.
    """
    if books.tree is None:
        return None
    locks, own, size = books.locks, books.locks.of_row(event.row), books.page_size
    ids, pages = ids_of(event.key.ids), event.protected // size
    path = event.path or (ids[pages - 1] if 0 < pages <= len(ids) else b"")
    if own is not None and locks.path(own) == path:
        return own
    if not pages and not books.foreign:
        path = b""
    found = locks.unowned(path)
    if found is not None or not pages:
        return found
    if not books.locks_known:
        handle = books.handle(path)
        if handle is None:
            return None
        locks.add(books.tree.inc_lock_ref(handle), path, event.n)
        return locks.unowned(path)
    claimed = f"a request whose lock is on page {path.hex()}, where none is open"
    raise Broken("CACHE-5", claimed, "ContractError: the lock_receipt is not open")


def cache_finished_req(books: Books, event: CacheFinishedReq) -> None:
    """CACHE-4, CACHE-5, CACHE-18, CHUNK-2."""
    did = effects_of(event)
    receipt = lock_of(books, event)
    slots = list(books.pool.live_rows().get(event.row, ()))
    books.cache.cache_finished_req(books.request(event.row, books.names.tokens(event.key), receipt))
    compare_freed(books, event, books.laws.finish, books.before(event.row))
    if did.rows_freed != [event.row]:
        given = named(did.rows_freed, "row") if did.rows_freed else "no row"
        raise Broken(books.laws.finish, f"{given} was given back", f"row {event.row}, once")
    if receipt is not None:
        books.locks.drop(receipt)
    books.dismiss(event.row, slots)
    if books.tree is not None:
        for slot in slots[:: books.page_size]:
            books.owners.pop(slot // books.page_size, None)


def refuse_repeated(books: Books, freed: Runs) -> None:
    """One action gives a page back once (PAGE-10, SLOT-5, SWA-9)."""
    slot = repeated(freed)
    if slot is not None:
        clause = books.allocator.clauses.given_back
        raise Broken(clause, f"page {slot // books.page_size} was given back twice", "once")


def compare_freed(books: Books, event: Event, clause: str, before: str = "") -> None:
    """The pages that were given back are those that the oracle gave back, each once."""
    freed = effects_of(event).freed
    refuse_repeated(books, freed)
    found, expected = set(books.pages(freed)), set(books.allocator.given_back)
    surplus, deficit = sorted(found - expected), sorted(expected - found)
    if surplus:
        what = ", ".join(f"page {page}, which is {books.who(page)}" for page in surplus[:4])
        raise Broken(clause, f"{what}, was given back{before}", f"{named(expected)} alone")
    if deficit:
        what = f"{named(deficit)} was not given back{before}"
        raise Broken(clause, what, named(expected))
    books.released()


def evict_swa(books: Books, event: EvictSwa) -> None:
    """CACHE-19, CACHE-20. What the row begins with that the tree has is protected (CACHE-1)."""
    cache, allocator = books.cache, books.allocator
    kinds = FollowedWindowedRadix | FollowedWindowedChunk
    if not isinstance(cache, kinds) or not isinstance(allocator, FollowedWindows):
        raise Broken("CACHE-20", "evict_swa of a cache without windows", "it has none")
    before = set(allocator.pairs)
    request = books.request(event.row, [], None)
    firsts = books.pool.live_rows().get(event.row, [])[:: books.page_size]
    shared = takewhile(lambda first: books.is_resident(first // books.page_size), firsts)
    request.cache_protected_len = sum(1 for _ in shared) * books.page_size
    cache.evict_swa(
        request,
        event.prelen,
        event.attention_chunk_size,
        sliding_window_size=event.sliding_window_size,
    )
    expected = before.difference(allocator.pairs)
    found = set(books.pages(effects_of(event).swa_freed))
    if found != expected:
        what = f"the pairs of {named(found)} were given back"
        raise Broken("CACHE-19", what, f"those of {named(expected)}")


def reset(books: Books, event: Reset) -> None:
    """CACHE-15, CACHE-16. SGLang's gives nothing back, for its caller clears the allocator: in a
    cache that is not kvspec's that is followed.
    """
    did, cache = effects_of(event), books.cache
    if books.foreign and not did.freed:
        cache.token_to_kv_pool_allocator = None
    try:
        cache.reset()
    finally:
        cache.token_to_kv_pool_allocator = books.allocator
    compare_freed(books, event, "CACHE-15")
    books.locks = Locks()


CACHE_RULES: Mapping[type[Event], Callable[[Books, Any], None]] = {
    CacheFinishedReq: cache_finished_req,
    CacheUnfinishedReq: cache_unfinished_req,
    DecLockRef: dec_lock_ref,
    Evict: evict,
    EvictSwa: evict_swa,
    IncLockRef: inc_lock_ref,
    Insert: insert,
    MatchPrefix: match_prefix,
    Reset: reset,
}
"""How each event of a cache is followed."""
