"""The client: what an engine does with rows, pages and the tree, as operations on plain integers.

The driver knows what a client knows: its requests, the handles and receipts that it was given, the
pages that it holds. An operation whose objects do not exist does nothing, so that every subsequence
of a history is a history.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kvspec.conformance.lockstep.config import (
    NAMESPACES,
    Config,
    Operation,
    as_key,
    as_slots,
    document_tokens,
)
from kvspec.conformance.lockstep.coverage import Coverage
from kvspec.conformance.lockstep.pair import Answer, Pair, Request, Twin

__all__ = ["Driver", "OpenReceipt", "Running"]

_HANDLES, _CONSUMED = 12, 4


class Running:
    """A request in flight, as its owner sees it."""

    def __init__(self, document: list[int], prompt: int, row: int, extra_key: Any) -> None:
        self.document, self.prompt, self.row, self.extra_key = document, prompt, row, extra_key
        self.allocated = 0
        """Positions of its row that have a slot."""
        self.sides = Twin(*(Request(document[:prompt], row, extra_key) for _ in range(2)))

    @property
    def protected(self) -> int:
        """Its `cache_protected_len`."""
        length: int = self.sides.oracle.cache_protected_len
        return length

    @property
    def committed(self) -> int:
        """What `cache_finished_req` will take."""
        return self.prompt + max(len(self.sides.oracle.output_ids) - 1, 0)

    def put(self, **attributes: Any) -> None:
        """Set attributes of both requests; twins are split."""
        for name, value in attributes.items():
            for side, request in enumerate(self.sides):
                setattr(request, name, value[side] if type(value) is Twin else value)

    @contextmanager
    def posing(self, **wrong: Any) -> Iterator[None]:
        """Both requests with other attributes, for the time of an illegal call."""
        kept = {name: Twin(*(getattr(one, name) for one in self.sides)) for name in wrong}
        self.put(**wrong)
        try:
            yield
        finally:
            self.put(**kept)


class OpenReceipt:
    """A receipt that has not been consumed, the path it locks, and the request it serves."""

    def __init__(self, given: Twin, path: Any, running: Running | None) -> None:
        self.given, self.path, self.running = given, path, running


class Driver:
    """Carries out operations on both systems and compares them after each."""

    def __init__(self, config: Config, oracle: Any, core: Any) -> None:
        self.config, self.pair = config, Pair(config, oracle, core)
        self.coverage = Coverage(config.page_size, config.memory)
        self.running: list[Running] = []
        self.handles: list[Twin] = []
        """The newest handles that were given, live or stale."""
        self.paths: list[Any] = []
        """The path that each of them was given for."""
        self.receipts: list[OpenReceipt] = []
        """Open receipts, oldest first."""
        self.consumed: list[Twin] = []
        self.reserved: list[int] = []
        """Pages held in no row."""
        self.group = False
        self.shares = config.memory != "swachunk"
        """Whether the cache is a tree."""
        self.by_count = config.page_size == 1 and not config.windowed
        """Whether the allocator has no alloc_extend, and alloc says as much."""
        self._handle_count = self._compared = 0
        self.shuffle(config.shuffle)
        self.pair.compare_states()

    def apply(self, operation: Operation) -> None:
        """Carry out one legal operation; raises Divergence."""
        name, *numbers = operation
        method: Callable[..., None] = getattr(self, f"do_{name}")
        method(*numbers)

    def compare(self) -> None:
        """Compare digests and sizes, and what one handle after the other resolves to. O(pool)."""
        self.pair.compare_states()
        self._compared += 1
        if self.handles:
            self.cache("resolve", self.handles[self._compared % len(self.handles)])

    def compare_views(self) -> None:
        """Compare the full views, and what every handle resolves to. O(pool)."""
        self.pair.compare_views()
        for handle in self.handles:
            self.cache("resolve", handle)

    # -- what operations are made of

    def tokens(self, document: int, length: int) -> list[int]:
        """The first tokens of a document, at most those of the largest request."""
        whole = self.whole_document(document)
        return whole[: length % (len(whole) + 1)]

    def whole_document(self, document: int) -> list[int]:
        """All tokens that a request of this document can have."""
        config = self.config
        return document_tokens(config.page_size, config.symbols, document, config.request_pages)

    def allocator(self, name: str, *arguments: Any) -> Answer:
        """Call both allocators. A refusal is counted."""
        answer = self.pair.call(self.pair.allocator, name, *arguments)
        if name.startswith("alloc") and answer.value is None:
            self.coverage.counts["refusals"] += 1
        return answer

    def cache(self, name: str, *arguments: Any, **keywords: Any) -> Answer:
        """Call both caches."""
        return self.pair.call(self.pair.cache, name, *arguments, **keywords)

    def slots(self, slots: Sequence[int]) -> Any:
        """Slots in the form of the run."""
        return as_slots(self.config.form, slots)

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back, if there are any."""
        if slots:
            self.allocator("free", self.slots(slots))
            self.coverage.counts["group frees"] += self.group

    def evict(self, token_count: int) -> None:
        """Evict, and count what went."""
        before = self.pair.cache.oracle.view().pages
        evicted = self.cache("evict", token_count).value
        if evicted:
            self.coverage.evicted(before, self.pair.cache.oracle.view().pages)
            self.coverage.counts["group frees"] += self.group

    def take(self, token_count: int, make_room: int, name: str, *arguments: Any) -> Any:
        """Allocate; when refused, evict what is missing and try once more. Slots or None."""
        value = self.allocator(name, *arguments).value
        if value is None and make_room:
            self.make_room(token_count)
            value = self.allocator(name, *arguments).value
        return value

    def make_room(self, token_count: int) -> None:
        """Evict what is missing, and no less than a page."""
        self.evict(max(token_count - self.pair.states.oracle[2], self.config.page_size))

    def match(self, tokens: list[int], extra_key: Any, touch: int = 1) -> Answer:
        """Match a key, and keep the handle."""
        key, named = as_key(self.config.form, tokens, extra_key)
        answer = self.cache("match_prefix", key, touch=bool(touch), **named)
        if touch:
            self.keep(Twin(*(one.last_device_node for one in answer.given)), answer.value[1])
            stop = len(answer.value[0])
            self.coverage.ended(self.pair.cache.oracle, extra_key, tuple(tokens[:stop]), False)
        return answer

    def keep(self, handle: Twin, path: Any) -> None:
        """Remember a handle; the newest ones take the places of the oldest."""
        if handle.oracle is None:
            return
        place = self._handle_count % _HANDLES
        self.handles[place : place + 1], self.paths[place : place + 1] = [handle], [path]
        self._handle_count += 1

    def stale(self) -> list[int]:
        """Numbers of stale handles: those whose path is resident again, or else all."""
        cache = self.pair.cache.oracle
        numbers = [n for n, one in enumerate(self.handles) if cache.resolve(one.oracle) is None]
        pages = cache.view().pages if numbers else {}
        return [number for number in numbers if self.paths[number] in pages] or numbers

    def lock(self, handle: Twin, running: Running | None) -> OpenReceipt:
        """Lock a live handle, for a request or for nobody."""
        answer = self.cache("inc_lock_ref", handle)
        return self.opened(answer.given, answer.value[1], running)

    def opened(self, given: Twin, path: Any, running: Running | None) -> OpenReceipt:
        """Note a receipt that was given."""
        receipt = OpenReceipt(given, path, running)
        self.receipts.append(receipt)
        return receipt

    def unlock(self, receipt: OpenReceipt, subject: Twin | None = None) -> None:
        """Consume a receipt, named by itself or by `subject`, the handle it locks."""
        self.cache("dec_lock_ref", subject or receipt.given)
        self.spend(receipt)

    def spend(self, receipt: OpenReceipt) -> None:
        """Note that a receipt has been consumed."""
        self.receipts.remove(receipt)
        self.consumed = [*self.consumed, receipt.given][-_CONSUMED:]

    def receipt_of(self, running: Running) -> OpenReceipt | None:
        """The open receipt that serves a request."""
        return next((receipt for receipt in self.receipts if receipt.running is running), None)

    def row(self, running: Running) -> list[int]:
        """The slots of a request's row."""
        slots: list[int] = self.pair.call(self.pair.rows, "row", running.row).value
        return slots

    # -- operations of requests

    def do_admit(self, document: int, length: int, namespace: int, keep_last: int) -> None:
        """A request arrives."""
        extra_key, prompt = NAMESPACES[namespace % len(NAMESPACES)], self.tokens(document, length)
        self.admit(self.whole_document(document), len(prompt), extra_key, keep_last)

    def admit(self, document: list[int], prompt: int, extra_key: Any, keep_last: int) -> bool:
        """Match, lock, take a row, write the prefix; False if there is no row."""
        row = self.pair.call(self.pair.rows, "alloc", 1).value
        if not prompt or row is None:
            if row is not None:
                self.pair.call(self.pair.rows, "free", row)
            return False
        running = Running(document, prompt, row[0], extra_key)
        matched = self.match(document[: prompt - 1 if keep_last else prompt], extra_key)
        prefix: list[int] = matched.value[0]
        handle = Twin(*(result.last_device_node for result in matched.given))
        if handle.oracle is not None and (prefix or keep_last):
            running.put(last_node=handle, lock_receipt=self.lock(handle, running).given)
        running.put(
            prefix_indices=Twin(*(result.device_indices for result in matched.given)),
            cache_protected_len=len(prefix),
        )
        self._write(running, prefix)
        self.running.append(running)
        return True

    def _write(self, running: Running, slots: list[int]) -> None:
        positions = slice(running.allocated, running.allocated + len(slots))
        self.pair.call(self.pair.rows, "write", (running.row, positions), self.slots(slots))
        running.allocated += len(slots)

    def batch(self, first: int, count: int, wanted: Callable[[Running], bool]) -> list[Running]:
        """`count` of the requests that are wanted, from number `first` on."""
        found = [running for running in self.running if wanted(running)]
        start = first % len(found) if found else 0
        return (found[start:] + found[:start])[:count]

    def do_extend(self, first: int, count: int, length: int, make_room: int, cached: int) -> None:
        """Prefill a chunk of one or more requests, and cache it or not."""
        batch = self.batch(first, 1 + count % 2, lambda one: one.allocated < one.prompt)
        ends = [min(one.prompt, one.allocated + 1 + length) for one in batch]
        new = sum(ends) - sum(one.allocated for one in batch)
        if not batch:
            return
        if self.by_count:
            slots = self.take(new, make_room, "alloc", new)
        else:
            starts = [one.allocated for one in batch]
            last = [self.row(one)[-1] if one.allocated else -1 for one in batch]
            lists = map(self.slots, (starts, ends, last))
            slots = self.take(new, make_room, "alloc_extend", *lists, new)
        for one, end in zip(batch, ends, strict=True):
            if slots is None:
                return
            taken, slots = slots[: end - one.allocated], slots[end - one.allocated :]
            self._write(one, taken)
            if cached:
                self._cache_unfinished(one, end)

    def do_decode(self, first: int, count: int, make_room: int, committed: int) -> None:
        """One more slot for requests that are through their prompt, one more token or none."""
        room = self.config.request_pages * self.config.page_size
        batch = self.batch(first, 1 + count % 3, lambda one: one.prompt <= one.allocated < room)
        if not batch:
            return
        if self.by_count:
            slots = self.take(len(batch), make_room, "alloc", len(batch))
        else:
            lengths = [one.allocated + 1 for one in batch]
            lists = map(self.slots, (lengths, [self.row(one)[-1] for one in batch]))
            slots = self.take(self.config.page_size, make_room, "alloc_decode", *lists)
        for one, slot in zip(batch, slots or (), strict=False):
            self._write(one, [slot])
            if committed:
                one.put(output_ids=[*one.document[one.prompt : one.allocated], 0])

    def do_cache(self, first: int, length: int) -> None:
        """Cache some of what a request has computed so far."""
        for one in self.batch(first, 1, lambda one: one.allocated > 0):
            ready = min(one.allocated, one.committed)
            end = one.protected + length % (ready - one.protected + 1)
            self._cache_unfinished(one, end)

    def _cache_unfinished(self, running: Running, end: int) -> None:
        running.put(fill_ids=running.document[:end])
        before, protected = self.pair.cache.oracle.total_size(), running.protected
        old = self.receipt_of(running)
        self.cache("cache_unfinished_req", running.sides)
        given = Twin(*(request.lock_receipt for request in running.sides))
        if old is not None and given.oracle is not old.given.oracle:
            self.spend(old)
            old = None
        path = self._compare_request(running)
        if old is None and given.oracle is not None:
            self.opened(given, path, running)
        self.keep(Twin(*(request.last_node for request in running.sides)), path)
        self.count_cached(running, end, protected, before)
        self.coverage.counts["mid-page chunks"] += bool(end % self.config.page_size)
        self.row(running)

    def count_cached(self, running: Running, end: int, protected: int, before: int) -> None:
        """From the growth of the tree: which pages of [protected, end) it took."""
        whole = end - end % self.config.page_size
        first = whole - (self.pair.cache.oracle.total_size() - before)
        self.coverage.adopted(running.extra_key, tuple(running.document[:whole]), first)
        if first > protected:
            self.coverage.counts["duplicates"] += 1
            self.coverage.counts["group frees"] += self.group

    def _compare_request(self, running: Running) -> Any:
        def seen(side: int) -> Any:
            request, cache = running.sides[side], self.pair.cache[side]
            node, receipt = request.last_node, request.lock_receipt
            return (
                None if node is None else cache.resolve(node),
                None if receipt is None else (receipt.delta, cache.resolve(receipt.node)),
                request.cache_protected_len,
                request.prefix_indices.tolist(),
            )

        return self.pair.compare("request", seen)[0]

    def do_finish(self, first: int, grouped: int) -> None:
        """A request ends; one that ends within its prompt is cut to what was computed."""
        for one in self.batch(first, 1, lambda one: one.allocated > 0):
            if one.allocated < one.committed:
                one.put(origin_input_ids=one.document[: one.allocated], output_ids=[])
                one.prompt = one.allocated
            self._group(grouped)
            before, protected = self.pair.cache.oracle.total_size(), one.protected
            committed, receipt = one.committed, self.receipt_of(one)
            self.cache("cache_finished_req", one.sides)
            self.running.remove(one)
            if receipt is not None:
                self.spend(receipt)
            self.count_cached(one, committed, protected, before)
            self.pair.compare("free rows", lambda side: self.pair.rows[side].free_slots)
            self._group(grouped)

    def _group(self, grouped: int) -> None:
        if grouped % 2:
            self.do_group()

    def do_abort(self, first: int, reverse: int, grouped: int) -> None:
        """A request is retracted: its own slots, its lock and its row are given back by hand."""
        for one in self.batch(first, 1, lambda _: True):
            self._group(grouped)
            receipt, slots = self.receipt_of(one), self.row(one)[one.protected :]
            if receipt is not None and reverse % 2:
                self.unlock(receipt)
            self.free(slots[::-1] if reverse % 3 == 1 else slots)
            if receipt is not None and not reverse % 2:
                self.unlock(receipt)
            self.pair.call(self.pair.rows, "free", one.row)
            self.running.remove(one)
            self._group(grouped)

    # -- operations on the tree

    def do_match(self, document: int, length: int, namespace: int, touch: int) -> None:
        """Match a key, or only look with touch=False."""
        tokens = self.tokens(document, length)
        self.match(tokens, NAMESPACES[namespace % len(NAMESPACES)], touch)

    def do_insert(
        self, document: int, length: int, namespace: int, fresh: int, priority: int, left: int = 0
    ) -> None:
        """Insert pages of one's own, with the tree's own prefix or with duplicates of it.

        A set bit of `left` says that a page of one's own has left the window.
        """
        extra_key, tokens = NAMESPACES[namespace % len(NAMESPACES)], self.tokens(document, length)
        receipt, prefix = None, []
        if not fresh:
            matched = self.match(tokens, extra_key)
            handle = Twin(*(result.last_device_node for result in matched.given))
            if matched.value[0]:
                receipt, prefix = self.lock(handle, None), matched.value[0]
        page_size = self.config.page_size
        new = -(-(len(tokens) - len(prefix)) // page_size) * page_size
        slots = self.compute(new, left)
        if slots is not None:
            value = [*prefix, *slots][: len(tokens)]
            key, named = as_key(self.config.form, tokens, extra_key)
            answer = self.cache("insert", key, self.slots(value), priority=priority, **named)
            self._count_inserted(answer, tokens, value, extra_key)
        if receipt is not None:
            self.unlock(receipt)

    def compute(self, token_count: int, left: int) -> Any:
        """Slots of one's own for whole pages, or None."""
        return self.take(token_count, 1, "alloc", token_count)

    def _count_inserted(
        self, answer: Answer, tokens: list[int], value: list[int], extra_key: Any
    ) -> None:
        """Count what an insert did, and give back what the tree did not take."""
        resident, path, _, adopted, duplicate, tail, _ = answer.value
        self.keep(Twin(*(result.last_device_node for result in answer.given)), path)
        key = tuple(tokens[: tail[0][0] if tail else len(tokens)])
        self.coverage.ended(self.pair.cache.oracle, extra_key, key[:resident], bool(adopted))
        self.coverage.adopted(extra_key, key, resident)
        self.coverage.counts["duplicates"] += bool(duplicate)
        self.free([slot for start, stop in [*duplicate, *tail] for slot in value[start:stop]])

    def do_lock(self, number: int) -> None:
        """Lock a handle that is live."""
        if self.handles:
            handle = self.handles[number % len(self.handles)]
            path = self.cache("resolve", handle).value
            if path is not None and self.lockable(path):
                self.lock(handle, None)

    def lockable(self, path: Any) -> bool:
        """Whether a live handle of this path can be locked."""
        return True

    def do_unlock(self, number: int) -> None:
        """Consume a receipt that serves no request."""
        raw = [receipt for receipt in self.receipts if receipt.running is None]
        if raw:
            self.unlock(raw[number % len(raw)])

    def do_unlock_node(self, number: int) -> None:
        """Unlock by handle: the oldest receipt goes. If a request had it, it gets another one."""
        if not self.handles:
            return
        handle = self.handles[number % len(self.handles)]
        path = self.cache("resolve", handle).value
        of_node = [receipt for receipt in self.receipts if path and receipt.path == path]
        raw = next((receipt for receipt in of_node if receipt.running is None), None)
        if raw is not None:
            oldest = of_node[0]
            self.unlock(oldest, handle)
            if oldest.running is not None:
                raw.running = oldest.running
                raw.running.put(lock_receipt=raw.given)

    def do_evict(self, token_count: int) -> None:
        """Evict, without a need for room."""
        self.evict(token_count)

    def do_flush(self, cleared: int, seed: int) -> None:
        """Everything ends, the tree is reset, and perhaps the pools are cleared."""
        while self.running:
            self.do_abort(0, 0, 0)
        while self.receipts:
            self.unlock(self.receipts[0])
        before = self.pair.cache.oracle.view().pages
        self.cache("reset")
        self.coverage.evicted(before, {})
        if cleared % 2:
            self.pair.call(self.pair.rows, "clear")
            self.allocator("clear")
            self.reserved, self.group = [], False
            self.shuffle(seed)

    # -- operations on the allocator

    def shuffle(self, seed: int) -> None:
        """Put the free list of an empty pool into a random order."""
        page_size, page_count = self.config.page_size, len(self.free_pages())
        slots = self.allocator("alloc", page_count * page_size).value
        pages = [slot // page_size for slot in slots[::page_size]]
        random.Random(seed).shuffle(pages)
        for page in pages:
            self.allocator("free", [page * page_size])

    def free_pages(self) -> tuple[int, ...]:
        """Pages in the free and the release list, as the oracle has them."""
        view = self.pair.allocator.oracle.view()
        return (*view.free, *view.release)

    def do_take(self, page_count: int) -> None:
        """Hold pages in no row."""
        page_size = self.config.page_size
        slots = self.allocator("alloc", page_count * page_size).value
        self.reserved += [slot // page_size for slot in (slots or [])[::page_size]]

    def do_give(self, count: int, seed: int) -> None:
        """Give some of them back in one call, in any order."""
        random.Random(seed).shuffle(self.reserved)
        pages, self.reserved = self.reserved[:count], self.reserved[count:]
        page_size = self.config.page_size
        self.free([page * page_size + seed % page_size for page in pages])

    def do_group(self) -> None:
        """Open a free group, or end the open one."""
        self.allocator("free_group_end" if self.group else "free_group_begin")
        self.group = not self.group

    def do_restore(self, parts: int, page_count: int, length: int) -> None:
        """Take pages in a few calls, and undo them."""
        ticket = self.allocator("backup_state").given
        free = self.free_pages()
        for part in range(parts):
            if part % 2 and not self.by_count and length:
                lists = map(self.slots, ([0], [length], [-1]))
                self.allocator("alloc_extend", *lists, length)
            else:
                self.allocator("alloc", page_count * self.config.page_size)
        self.coverage.counts["restores"] += free != self.free_pages()
        self.allocator("restore_state", ticket)
