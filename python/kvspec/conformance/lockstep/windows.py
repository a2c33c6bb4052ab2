"""The client over an allocator with a window pool: what it does besides, and what it looks after.

    row:      [0 ............ protected) [protected ... frontier) [frontier ........... allocated)
    owner:    the tree, held by its lock   the request             the request
    pairs:    under its window lock        given back by evict_swa  its own

After every call that can move a page the books are compared with those before it
(`check_nothing_taken`), after every operation each page has one owner (`check_owners`).
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvspec.conformance.lockstep.driver import Driver, OpenReceipt, Running
from kvspec.conformance.lockstep.ownership import (
    Books,
    BrokenLaw,
    check_locks,
    check_nothing_taken,
    check_owners,
    prefixes,
)
from kvspec.conformance.lockstep.pair import Answer, Twin

__all__ = ["WindowDriver"]

_RETRACTED = 4
_READING = ("match_prefix", "resolve", "backup_state", "translate_loc_from_full_to_swa")
_GIVING = ("free", "free_swa", "move_swa")
_ENTERING = ("insert", "cache_unfinished_req", "cache_finished_req")


class WindowDriver(Driver):
    """A driver whose pages have pairs."""

    books: Books
    """After the last call that could change them."""
    earlier: Books
    """Before it."""

    def __init__(self, *args: Any) -> None:
        self.retracted: list[Running] = []
        self.starved = False
        """Whether the last allocation was refused for good."""
        self.row_before: Sequence[int] = ()
        """The row of the request that the last call was for, before it."""
        self._dead: dict[OpenReceipt, list[bool]] = {}
        """Which pages of its path were tombstones when a receipt was given."""
        super().__init__(*args)

    def compare(self) -> None:
        """Compare states, and look for the one owner of every page."""
        super().compare()
        config, books, rows = self.config, self.books, self.rows()
        reserved = {"reserved": self.reserved}
        own = {f"row {one.row}": self.own(one, rows) for one in self.running}
        counts = config.page_count, config.window_pages
        check_owners(books, counts, own | reserved)
        check_locks(books, config.page_size, config.pages_of_window)
        if not self.shares:
            return
        resident = {page.page for page in books.pages.values()}
        for one in self.running:
            row = rows[one.row]
            if not resident.issuperset(self.pages(row[: one.protected])):
                raise BrokenLaw("CACHE-1", f"row {one.row} is not the tree's: {row}")
            if not books.pairs.keys() >= set(
                self.pages(row[max(len(row) + 1 - config.window, 0) :])
            ):
                raise BrokenLaw("CHECK-11", f"row {one.row} has lost some of its window: {row}")

    # -- what it looks after

    def pages(self, slots: Iterable[int]) -> list[int]:
        """The pages of slots, once each."""
        return list(dict.fromkeys(slot // self.config.page_size for slot in slots))

    def rows(self) -> Mapping[int, Sequence[int]]:
        """The live rows."""
        rows: Mapping[int, Sequence[int]] = self.pair.rows.oracle.view().rows
        return rows

    def own(self, running: Running, rows: Mapping[int, Sequence[int]]) -> list[int]:
        """The pages of a request's row that nobody else has."""
        return self.pages(rows[running.row][running.protected :])

    def paired(self) -> list[int]:
        """The pages in no row that have a pair."""
        return [page for page in self.reserved if page in self.books.pairs]

    def allocator(self, name: str, *arguments: Any) -> Answer:
        """Call both allocators, and see that nobody loses what the call does not name."""
        answer = super().allocator(name, *arguments)
        if name.startswith("alloc") and answer.value is None:
            view = self.books.allocator
            assert view.swa is not None
            left = (len(pool.free) + len(pool.release) for pool in (view, view.swa))
            self.coverage.refused(self._needed(name, *arguments), *left)
        elif name not in _READING:
            named = [int(slot) for slots in arguments for slot in slots] if name in _GIVING else []
            self.coverage.counts["pairs freed"] += name == "free_swa" and bool(named)
            self._moved(name, set(self.pages(named)))
        return answer

    def _needed(self, name: str, *arguments: Any) -> int:
        """The pages that an allocation asks for."""
        if name == "alloc":
            return int(arguments[0]) // self.config.page_size
        ends = [int(end) for end in arguments[name == "alloc_extend"]]
        starts = [end - 1 for end in ends]
        if name == "alloc_extend":
            starts = [int(start) for start in arguments[0]]
        return sum(map(self._page_count, ends)) - sum(map(self._page_count, starts))

    def _page_count(self, token_count: int) -> int:
        return -(-token_count // self.config.page_size)

    def cache(self, name: str, *arguments: Any, **keywords: Any) -> Answer:
        """Call both caches, and see that no other request loses anything."""
        if name in _READING:
            return super().cache(name, *arguments, **keywords)
        actor = next((one for one in self.running if arguments[:1] == (one.sides,)), None)
        if actor is not None:
            self.row_before = self.rows()[actor.row]
        answer = super().cache(name, *arguments, **keywords)
        self._moved(name, set(), actor)
        if name in _ENTERING:
            serving = [one for one in self.receipts if one.running not in (None, actor)]
            self.coverage.entered(self.earlier, self.books, [one.path for one in serving])
        return answer

    def _moved(self, name: str, named: set[int], actor: Running | None = None) -> None:
        """A call has been made that names these pages or is for this request."""
        self.earlier, self.books, rows = self.books, Books.of(self.pair), self.rows()
        others = [one for one in self.running if one is not actor]
        kept = {page for one in others for page in self.own(one, rows)} | set(self.reserved)
        if name != "clear":
            check_nothing_taken(name, self.earlier, self.books, kept - named)

    def match(self, tokens: list[int], extra_key: Any, touch: int = 1) -> Answer:
        """Match a key, and see whether more of it is resident."""
        answer = super().match(tokens, extra_key, touch)
        stop = len(answer.value[0]) + self.config.page_size
        longer = stop <= len(tokens) and (extra_key, tuple(tokens[:stop])) in self.books.pages
        self.coverage.counts["fallbacks"] += longer
        return answer

    def opened(self, given: Twin, path: Any, running: Running | None) -> OpenReceipt:
        """Note a receipt, where its window lock begins and which pages have no pair."""
        receipt = super().opened(given, path, running)
        self.coverage.window_locked(self.earlier, path, self.config.pages_of_window)
        self._dead[receipt] = self._dead_along(path)
        return receipt

    def spend(self, receipt: OpenReceipt) -> None:
        """Note a receipt's end, and whether pages died or were revived under it."""
        super().spend(receipt)
        changed = self._dead.pop(receipt) != self._dead_along(receipt.path)
        self.coverage.counts["late unlocks"] += changed

    def _dead_along(self, path: Any) -> list[bool]:
        return [not self.books.live(one) for one in prefixes(path, self.config.page_size)]

    def lockable(self, path: Any) -> bool:
        """Whether a match of the path would give all of it (SWARADIX-11)."""
        dead = self._dead_along(path)
        return not any(dead[-self.config.pages_of_window :]) or not any(dead)

    # -- making room

    def take(self, token_count: int, make_room: int, name: str, *arguments: Any) -> Any:
        """Allocate as every driver does, and note whether that helped."""
        value = super().take(token_count, make_room, name, *arguments)
        self.starved = value is None
        return value

    def evict(self, token_count: int, window_count: int = 0) -> None:
        """Evict from both pools, and count what went."""
        counts = [token_count, window_count] if window_count else [token_count]
        answer = self.cache("evict", *counts[: 2 if self.shares else 1])
        if not self.shares:
            return
        page_size = self.config.page_size
        full = len(self.earlier.pages) - len(self.books.pages)
        pairs = len(self.earlier.pairs) - len(self.books.pairs)
        if answer.value != (full * page_size, pairs * page_size):
            raise BrokenLaw("SWARADIX-16", f"evict says {answer.value}, gone are {full}, {pairs}")
        self.coverage.left(self.earlier, self.books)
        self.coverage.counts["group frees"] += self.group and pairs + full > 0

    def make_room(self, token_count: int) -> None:
        """Evict what is missing in either pool, and no less than a page."""
        allocator, page_size = self.pair.allocator.oracle, self.config.page_size
        sizes = allocator.full_available_size(), allocator.swa_available_size()
        full, window = (max(token_count - size, 0) for size in sizes)
        if not full and not window:
            full, window = (page_size if size == min(sizes) else 0 for size in sizes)
        self.evict(full, window)

    # -- operations of requests

    def do_leave(self, first: int, back: int, window: int, chunk: int) -> None:
        """A request moves on, and gives back what lies behind its window or its chunk."""
        page_size = self.config.page_size
        most = max((one.allocated - one.protected for one in self.running), default=0)
        needed = self.config.pages_of_window if self.shares else 0
        least = min(most, (needed + 1) * page_size)
        for one in self.batch(first, 1, lambda one: one.allocated - one.protected >= least):
            prelen = max(one.allocated - back, 0)
            width = window or self.config.window
            named = {"attention_chunk_size": chunk} if chunk else {"sliding_window_size": width}
            if self.shares and not window and not chunk:
                named = {}
            left = self.rows()[one.row][one.protected : self._frontier(prelen, width, chunk)]
            expected = set(self.pages(left)) & self.books.pairs.keys()
            given = self.cache("evict_swa", one.sides, prelen, **named).value
            gone = self.earlier.pairs.keys() - self.books.pairs.keys()
            if gone != expected or given != len(gone) * page_size:
                raise BrokenLaw("CACHE-19", f"evict_swa({prelen}, {named}) = {given} took {gone}")
            self.coverage.counts["behind a chunk" if chunk else "behind a window"] += bool(gone)

    def _frontier(self, prelen: int, width: int, chunk: int) -> int:
        """Where the pages begin that a request still needs (CACHE-19)."""
        page_size = self.config.page_size
        begin = chunk * (prelen // chunk) if chunk else prelen - width + 1
        if self.shares:
            whole = prelen // page_size * page_size
            begin = min(begin, whole - self.config.pages_of_window * page_size)
        return max(begin, 0) // page_size * page_size

    def do_abort(self, first: int, reverse: int, grouped: int) -> None:
        """A request is retracted, and will come back if there is a row for it."""
        for one in self.batch(first, 1, lambda _: True):
            self.retracted = [*self.retracted, one][-_RETRACTED:]
            self.coverage.counts["retractions"] += one.allocated > one.protected
        super().do_abort(first, reverse, grouped)

    def do_resume(self, number: int, keep_last: int) -> None:
        """A retracted request comes back, with the tokens that it has sampled."""
        if self.retracted:
            one = self.retracted[number % len(self.retracted)]
            prompt = min(one.committed, len(one.document))
            if self.admit(one.document, prompt, one.extra_key, keep_last):
                self.retracted.remove(one)
                self.coverage.counts["resumptions"] += 1

    def count_cached(self, running: Running, end: int, protected: int, before: int) -> None:
        """Count the pages of [protected, end) in whose places the tree had others."""
        page_size, pages = self.config.page_size, self.earlier.pages
        path = running.extra_key, tuple(running.document[:end])
        for place in prefixes(path, page_size, protected):
            own = self.row_before[len(place[1]) - 1] // page_size
            if place in pages and pages[place].page != own:
                self.coverage.counts["duplicates"] += 1
                self.coverage.counts["group frees"] += self.group
                return

    # -- operations on the tree and the allocator

    def compute(self, token_count: int, left: int) -> Any:
        """Slots for whole pages, taken two by two; a set bit ends the pair of a page."""
        page_size, slots = self.config.page_size, list[int]()
        while len(slots) < token_count:
            part = min(2 * page_size, token_count - len(slots))
            taken = self.take(part, 1, "alloc", part)
            if taken is None:
                self.free(slots)
                return None
            first = len(slots) // page_size
            gone = [s for n, s in enumerate(taken[::page_size], first) if left >> n & 1]
            if gone:
                self.allocator("free_swa", self.slots(gone))
            slots += taken
        return slots

    def do_evict(self, token_count: int, window_count: int = 0) -> None:
        """Evict, without a need for room."""
        self.evict(token_count, window_count)

    def shuffle(self, seed: int) -> None:
        """Put the free lists of two empty pools into random orders."""
        pair, rng, held = self.pair, random.Random(seed), list[int]()
        while count := pair.allocator.oracle.available_size():
            pages = self.pages(pair.call(pair.allocator, "alloc", count).value)
            for page in rng.sample(pages, len(pages)):
                pair.call(pair.allocator, "free_swa", [page * self.config.page_size])
            held += pages
        for page in rng.sample(held, len(held)):
            pair.call(pair.allocator, "free", [page * self.config.page_size])
        self.books = self.earlier = Books.of(pair)

    def do_give(self, count: int, seed: int, alone: int = 0) -> None:
        """Give some reserved pages back in one call, and the pairs alone of others."""
        random.Random(seed).shuffle(self.reserved)
        pages, self.reserved = self.reserved[:count], self.reserved[count:]
        lists = [self._slots_of(pages, seed), self._slots_of(self.paired()[:alone], seed)]
        self.allocator("free", *map(self.slots, lists[: 2 if alone else 1]))
        self.coverage.counts["group frees"] += self.group and bool(lists[0])

    def do_drop(self, count: int, seed: int) -> None:
        """Give back the pairs of some reserved pages, naming a page more than once if it can be."""
        pages = random.Random(seed).sample(paired := self.paired(), min(count, len(paired)))
        slots = self._slots_of(pages, seed)
        if self.config.page_size > 1 and seed % 3 == 0:
            slots += [slot ^ 1 for slot in slots]
        self.allocator("free_swa", self.slots(slots))

    def do_move(self, count: int, seed: int) -> None:
        """Give reserved pages without a pair those of others."""
        random.Random(seed).shuffle(self.reserved)
        paired = self.paired()
        bare = [page for page in self.reserved if page not in paired]
        count = min(count, len(paired), len(bare))
        lists = self._slots_of(bare[:count], seed), self._slots_of(paired[:count], seed + 1)
        self.allocator("move_swa", *map(self.slots, lists))
        self.coverage.counts["pairs moved"] += count > 0

    def do_translate(self, first: int, count: int) -> None:
        """Ask for the window slots of slots that follow each other, from -1 on."""
        end = (self.config.page_count + 1) * self.config.page_size
        slots = [(first + index) % (end + 1) - 1 for index in range(count)]
        self.allocator("translate_loc_from_full_to_swa", self.slots(slots))

    def _slots_of(self, pages: Iterable[int], seed: int) -> list[int]:
        """One slot of each page."""
        size = self.config.page_size
        return [page * size + seed % size for page in pages]
