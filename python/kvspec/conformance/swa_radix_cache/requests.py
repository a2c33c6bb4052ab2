"""A small engine with windows, for fuzzing: who has which page, after every operation."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvspec.conformance.prefix_cache.system import Request, System
from kvspec.conformance.swa_radix_cache.windows import WindowConformance, window_pages

__all__ = ["Requests"]


_TEXTS = [[1] * 20, [1] * 20, [1] * 12 + [2] * 8]


class Share(NamedTuple):
    """What a live request has, and nobody else may give back (SWARADIX-18)."""

    row: list[int]
    pages: set[int]
    """The full pages that its row names."""
    pairs: dict[int, int]
    """Those of its own pages and of the pages under its window lock."""


class Requests(RuleBasedStateMachine):
    """Requests in any order, over two pools that are too small for them."""

    suite: WindowConformance
    system: System
    tokens = st.tuples(st.sampled_from(_TEXTS), st.integers(5, 20)).map(lambda t: t[0][: t[1]])
    which = st.integers(0, 3)

    @classmethod
    def of(cls, suite: WindowConformance) -> "type[Requests]":
        """The machine for an implementation."""
        return type(cls.__name__, (cls,), {"suite": suite})

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        window=st.sampled_from([1, 2, 3, 4, 5, 9]),
        slot_count=st.sampled_from([20, 36, 60]),
        swa_slot_count=st.sampled_from([16, 24, 60]),
    )
    def start(self, page_size: int, window: int, slot_count: int, swa_slot_count: int) -> None:
        self.window, self.length = window, window_pages(page_size, window)
        self.system = self.suite.windows(
            page_size,
            window,
            page_count=slot_count // page_size,
            swa_page_count=swa_slot_count // page_size,
            handed_out=False,
            spy=True,
        )
        self.chunks: dict[Request, int] = {}
        """The attention chunk of a request, if it attends in chunks."""
        self.waiting: list[Request] = []

    # Operations

    @rule(tokens=tokens, extra_key=st.sampled_from([None, None, "a"]), chunk=st.integers(0, 9))
    def admit(self, tokens: list[int], extra_key: Any, chunk: int) -> None:
        if self.system.pool.available_size():
            with self.turn(None):
                req = self.system.admit(tokens, extra_key)
            if chunk % 3 == 0:
                self.chunks[req] = min(max(chunk, 1), self.window)
            self.needed(req)

    @rule(which=which, part=st.integers(3, 20))
    def prefill(self, which: int, part: int) -> None:
        """A chunk, which may end inside a page, and before what has been computed ahead."""
        for req in self.chosen(which):
            stop = min(max(part, req.cache_protected_len), len(req.tokens))
            with self.turn(req):
                if self.system.compute(req, stop):
                    self.system.chunk(req, stop)

    @rule(which=which, token=st.sampled_from([1, 2]), ahead=st.sampled_from([0, 0, 1, 3]))
    def decode(self, which: int, token: int, ahead: int) -> None:
        """A token more, sometimes with slots taken ahead for a draft."""
        for req in self.chosen(which):
            with self.turn(req):
                if len(req.tokens) < 20 and self.system.compute(req, len(req.tokens) + ahead):
                    req.output_ids.append(token)

    @rule(which=which)
    def slide(self, which: int) -> None:
        """Give back what has left the window: of its own, below where that begins."""
        for req in self.chosen(which):
            own = self.pages(req)[req.cache_protected_len // self.system.page_size :]
            computed = self.system.pool.row_length(req.req_pool_idx) // self.system.page_size
            frontier = min(self.frontier(req), max(computed - self.length, 0))
            below = self.pages(req)[:frontier]
            chunk = self.chunks.get(req)
            paired = dict(self.system.allocator.view().pairs)
            with self.turn(req):
                count = self.system.evict_swa(req, **_in_chunks(chunk))
            gone = paired.keys() - dict(self.system.allocator.view().pairs).keys()
            assert gone == set(own) & set(below) & paired.keys()
            assert count == len(gone) * self.system.page_size

    @rule(which=which)
    def finish(self, which: int) -> None:
        for req in self.chosen(which):
            committed = len(req.origin_input_ids) + max(len(req.output_ids) - 1, 0)
            with self.turn(req):
                if self.system.compute(req, committed):
                    self.system.finish(req)

    @rule(which=which, again=st.booleans())
    def give_up(self, which: int, again: bool) -> None:
        """Retracted, to begin again, or aborted."""
        for req in self.chosen(which):
            with self.turn(req):
                self.system.retract(req)
            self.waiting += [req] if again else []

    @precondition(lambda self: self.waiting and self.system.pool.available_size())
    @rule()
    def resume(self) -> None:
        req = self.waiting.pop()
        with self.turn(None):
            self.system.begin(req)
        self.needed(req)

    @rule(
        which=which, stop=st.integers(4, 20), lost=st.one_of(st.just(0), st.integers(0, 2**20 - 1))
    )
    def insert(self, which: int, stop: int, lost: int) -> None:
        """Somebody inserts what a request computes, over it or ahead of it."""
        for req in self.chosen(which):
            self._insert(req, stop, lost)

    def _insert(self, req: Request, stop: int, lost: int) -> None:
        system, size = self.system, self.system.page_size
        key = req.tokens[: min(stop, len(req.tokens)) // size * size]
        with self.turn(None):
            slots = system.allocator.alloc(len(key))
            if slots is None or not key:
                return
            pages = system.pages([int(slot) for slot in slots])
            gone = [page for index, page in enumerate(pages) if lost >> index & 1]
            system.allocator.free_swa(system.slots(*gone))
            system.insert(key, *pages, extra_key=req.extra_key)
            held = {page.page for page in system.cache.view().pages.values()}
            system.allocator.free(system.slots(*(page for page in pages if page not in held)))

    @rule(which=which, stop=st.integers(0, 20), extra=st.integers(0, 1))
    def match(self, which: int, stop: int, extra: int) -> None:
        for req in self.chosen(which):
            with self.turn(None):
                key = req.tokens[:stop] + [1] * extra
                self.system.cache.match_prefix(key, extra_key=req.extra_key)

    @rule(full=st.sampled_from([0, 0, 1, 9]), swa=st.sampled_from([0, 1, 4, 9, 99]))
    def evict(self, full: int, swa: int) -> None:
        allocator = self.system.allocator
        before = allocator.full_available_size(), allocator.swa_available_size()
        with self.turn(None):
            result = self.system.cache.evict(full, swa)
        after = allocator.full_available_size(), allocator.swa_available_size()
        assert (after[0] - before[0], after[1] - before[1]) == result

    def teardown(self) -> None:
        """When nobody is left, what is not free is in the tree, and can leave it."""
        if not hasattr(self, "system"):
            return
        system = self.system
        for req in list(system.requests):
            with self.turn(req):
                system.retract(req)
        assert system.cache.protected_size() == system.cache.swa_protected_size() == 0
        system.cache.evict(99, 99)
        allocator, size = system.allocator, system.page_size
        assert len(system.cache.view().pages) == 0
        assert allocator.full_available_size() == allocator.size_full // size * size
        assert allocator.swa_available_size() == allocator.size_swa // size * size

    # Who has what

    def chosen(self, which: int) -> list[Request]:
        return self.system.requests[which : which + 1]

    def pages(self, req: Request) -> list[int]:
        return self.system.pages(self.system.row(req))

    def frontier(self, req: Request) -> int:
        """The page with which the window of a request begins that has computed all its row."""
        length = self.system.pool.row_length(req.req_pool_idx)
        chunk = self.chunks.get(req)
        begin = length // chunk * chunk if chunk else max(length - self.window + 1, 0)
        return int(begin // self.system.page_size)

    def share(self, req: Request) -> Share:
        pages, pairs = self.pages(req), dict(self.system.allocator.view().pairs)
        protected = req.cache_protected_len // self.system.page_size
        mine = pages[max(protected - self.length, 0) :]
        having = {page: pairs[page] for page in mine if page in pairs}
        return Share(self.system.row(req), set(pages), having)

    def needed(self, req: Request) -> None:
        """Every page of a request's window has a pair."""
        pairs = dict(self.system.allocator.view().pairs)
        assert set(self.pages(req)[self.frontier(req) :]) <= pairs.keys()

    @contextmanager
    def turn(self, actor: Request | None) -> Iterator[None]:
        """One operation of a request or of nobody: all others have afterwards what they had."""
        others = {req: self.share(req) for req in self.system.requests if req is not actor}
        spy = self.system.allocator
        for given_back in (spy.frees, spy.swa_frees, spy.pair_frees):
            given_back.clear()
        yield
        freed = set(self.system.pages(list(chain(*spy.frees))))
        pairs_freed = list(chain(*spy.swa_frees, *spy.pair_frees))
        unpaired = freed | set(self.system.pages(pairs_freed))
        held, pairs = spy.view().held, dict(spy.view().pairs)
        for req, before in others.items():
            assert self.system.row(req) == before.row
            assert not freed & before.pages, "a live request's page was given back"
            assert not unpaired & before.pairs.keys(), "a live request's pair was given back"
            assert before.pages <= held
            assert before.pairs.items() <= pairs.items()
        for req in self.system.requests:
            assert set(self.pages(req)) <= held
            self.needed(req)
        self.system.settle()


def _in_chunks(chunk: int | None) -> dict[str, int]:
    """The kind of window, unless it is the cache's own."""
    return {"attention_chunk_size": chunk} if chunk else {}
