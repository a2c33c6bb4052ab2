"""Sequences of two pools: pairs, tombstones, and what leaves the window."""

import itertools
from typing import Any

import pytest

from kvspec.conformance.suite import Conformance
from sequences.checks import check
from sequences.engine import Engine, numbers, refused
from sequences.report import report

__all__ = ["Windows"]


def windowed(impl: Any, window: int, *, swa_page_count: int = 16, **options: Any) -> Engine:
    """An engine whose tree has windows of so many tokens."""
    cache = {"cache": "SWARadixCache", "sliding_window_size": window}
    return Engine(impl, swa_page_count=swa_page_count, **cache, **options)


def pairs(engine: Engine) -> dict[int, int]:
    return dict(engine.allocator.view().pairs)


def tombstones(engine: Engine, tokens: list[int]) -> list[bool]:
    """Of each resident page along the tokens, whether it is one."""
    pages, size = engine.cache.view().pages, engine.page_size
    path = (pages.get((None, tuple(tokens[:n]))) for n in range(size, len(tokens) + 1, size))
    return [page.tombstone for page in itertools.takewhile(lambda page: page is not None, path)]


class Windows(Conformance):
    """A window page has one owner, and a match ends in a whole window."""

    @report("SG-25805", "SEED-25", clause="SWA-8")
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_a_page_without_a_pair_takes_nobody_elses_with_it(self, page_size: int) -> None:
        engine = windowed(self.impl, 4, page_size=page_size, page_count=4, swa_page_count=1)
        tail_only = engine.allocator.alloc(page_size)
        engine.allocator.free_swa(tail_only)
        other = engine.keep(engine.allocator.alloc(page_size))

        engine.allocator.free(tail_only)

        assert pairs(engine) == {other[0] // page_size: 1}
        assert engine.allocator.swa_available_size() == 0
        engine.settle()

    @report("SG-38269", clause="SWA-11")
    def test_pages_without_a_pair_do_not_give_back_the_sink(self) -> None:
        engine = windowed(self.impl, 4, page_size=4, page_count=4, swa_page_count=3)
        slots = engine.keep(engine.allocator.alloc(12))
        engine.allocator.free_swa(slots[:8])

        refused(engine, "SWA-11", engine.allocator.free_swa, slots[:8])
        refused(engine, "SWA-11", engine.allocator.free_swa, slots[4:])

        engine.keep([])
        engine.allocator.free(slots)
        engine.keep(engine.allocator.alloc(12))
        assert sorted(pairs(engine).values()) == [1, 2, 3]
        engine.settle()

    @report("SG-27586", clause="SWA-10")
    def test_a_tombstone_does_not_free_what_its_window_became(self) -> None:
        engine = windowed(self.impl, 1, swa_page_count=8)
        held = engine.keep(engine.allocator.alloc(4))
        engine.serve([1, 2, 3])
        freed = [pairs(engine)[page] for page in engine.held_along([1, 2, 3])[:2]]
        engine.cache.evict(0, 2)
        other = engine.admit([7, 8, 9])
        engine.compute(other, 3)
        engine.allocator.free(held)
        engine.keep([])
        assert set(freed) < {pairs(engine)[page] for page in engine.row(other)}
        before = {page: pairs(engine).get(page) for page in engine.row(other)}

        assert engine.serve([1, 2, 3]) == 0
        engine.cache.evict(3)

        assert {page: pairs(engine).get(page) for page in engine.row(other)} == before
        engine.settle()
        engine.sample(other, 0)
        engine.settle()

    @report("VL-42273", clause="SWA-20")
    @pytest.mark.parametrize("cache", ["SWARadixCache", "SWAChunkCache"])
    def test_what_left_the_window_is_in_no_table(self, cache: str) -> None:
        tree = {"sliding_window_size": 2} if cache == "SWARadixCache" else {}
        engine = Engine(self.impl, page_size=2, swa_page_count=4, cache=cache, **tree)
        req = engine.admit(list(range(9)))
        engine.compute(req, 8)
        window = {} if tree else {"sliding_window_size": 2}
        engine.cache.evict_swa(req, 8, **window)
        other = engine.admit([20, 21, 22, 23, 24])
        engine.compute(other, 4)

        theirs = set(numbers(engine.allocator.translate_loc_from_full_to_swa(engine.row(other))))
        mine = numbers(engine.allocator.translate_loc_from_full_to_swa(engine.row(req)))

        assert mine[:4] == [0, 0, 0, 0]
        assert 0 not in mine[6:]
        assert not theirs & set(mine)
        engine.settle()

    @report("SE-03", clause="SWARADIX-2")
    def test_a_match_that_falls_back_renews_nothing_else(self) -> None:
        engine = windowed(self.impl, 2)
        engine.serve([1, 2, 3, 4, 5])
        engine.serve([8, 9])
        engine.cache.match_prefix([1, 2])
        engine.cache.evict(0, 1)

        found = engine.cache.match_prefix([1, 2, 3, 4, 7])
        engine.cache.evict(0, 1)

        assert len(found.device_indices) == 2
        assert tombstones(engine, [1, 2, 3, 4, 5]) == [False, False, True, True, False]
        assert tombstones(engine, [8, 9]) == [False, False]
        engine.settle()

    @report("SEED-6", clause="SWARADIX-9")
    def test_a_revival_under_a_lock_is_protected_until_the_unlock(self) -> None:
        engine = windowed(self.impl, 2, page_count=24)
        first, second = engine.admit([1, 2, 3, 4]), engine.admit([1, 2, 3, 4])
        for req in (first, second):
            engine.compute(req, 4)
        engine.sample(first)
        engine.cache.evict(0, 2)
        receipt = engine.cache.inc_lock_ref(
            engine.cache.match_prefix([1, 2, 3, 4]).last_device_node
        )
        assert tombstones(engine, [1, 2, 3, 4]) == [True, True, False, False]

        engine.chunk(second, 4)
        engine.cache.evict(0, 2)
        assert tombstones(engine, [1, 2, 3, 4]) == [True, True, False, False]
        engine.settle()
        engine.cache.dec_lock_ref(receipt)
        engine.sample(second)

        assert engine.cache.swa_protected_size() == engine.cache.protected_size() == 0
        assert not any(page.swa_locks for page in engine.cache.view().pages.values())
        assert engine.cache.evict(64) == (4, 2)
        engine.settle()

    @report("SEED-3", "SG-40681", clause="CACHE-19")
    @pytest.mark.parametrize("window", [1, 4, 5, 7, 8])
    @pytest.mark.parametrize("length", [16, 17, 19])
    def test_what_is_cached_behind_the_window_is_found_again(
        self, window: int, length: int
    ) -> None:
        engine = windowed(self.impl, window, page_size=4)
        req = engine.admit(list(range(length + 1)))
        engine.compute(req, length)
        engine.cache.evict_swa(req, length)

        engine.chunk(req, length)

        assert engine.cached(req.tokens) == length - length % 4
        assert engine.row(req)[: length - length % 4] == engine.held_along(req.tokens)
        engine.settle()
        engine.sample(req, 0)
        engine.settle()

    @report("SG-27789", clause="CACHE-19")
    @pytest.mark.parametrize("drafts", [1, 2, 3])
    def test_the_page_at_the_edge_of_the_window_has_one_owner(self, drafts: int) -> None:
        engine = windowed(self.impl, 6, page_size=4, row_count=2, swa_page_count=8)
        engine.serve(list(range(8)))
        req = engine.admit(list(range(9)))
        for _ in range(12):
            engine.compute(req, len(req.tokens) + drafts)
            prelen = len(req.tokens)
            engine.cache.evict_swa(req, prelen)
            for level in ("counts", "sets"):
                check(engine, engine.requests, level)
            read = engine.row(req)[prelen - 6 + 1 : prelen]
            assert all(numbers(engine.allocator.translate_loc_from_full_to_swa(read)))
            req.output_ids.append(7)
        engine.sample(req)
        check(engine, [])
        engine.settle()

    @report("FKV-195", clause="SWARADIX-14")
    def test_a_window_that_was_hit_goes_last(self) -> None:
        engine = windowed(self.impl, 2)
        engine.serve([1, 2, 3])
        engine.serve([5, 6, 7])
        engine.cache.match_prefix([1, 2, 3])

        assert engine.cache.evict(0, 2) == (0, 2)

        assert tombstones(engine, [1, 2, 3]) == [False] * 3
        assert tombstones(engine, [5, 6, 7]) == [True, True, False]
        engine.settle()

    @report("FKV-195", clause="SWARADIX-7")
    @pytest.mark.parametrize("entry", [(1, 0), (0, 1)])
    def test_either_way_of_eviction_takes_the_tombstones_it_uncovers(self, entry: Any) -> None:
        engine = windowed(self.impl, 1)
        engine.serve([1, 2, 3])
        engine.cache.evict(0, 2)

        assert engine.cache.evict(*entry) == (3, 1)

        assert not engine.cache.view().pages
        engine.settle()

    @report("SG-35515", clause="SWARADIX-14")
    def test_the_window_at_the_end_of_a_branch_goes_last(self) -> None:
        engine = windowed(self.impl, 3)
        tokens = list(range(10))
        engine.serve(tokens)
        for _ in range(7):
            assert engine.cache.evict(0, 1) == (0, 1)
            assert engine.cached(tokens) == 10
        assert tombstones(engine, tokens) == [True] * 7 + [False] * 3
        engine.settle()

    @report("JAX-989", clause="SWARADIX-5")
    @pytest.mark.parametrize("evicted", range(5))
    @pytest.mark.parametrize("left", range(5))
    def test_a_path_is_revived_as_far_as_the_caller_can(self, evicted: int, left: int) -> None:
        engine = windowed(self.impl, 1, page_size=2, page_count=24)
        tokens = list(range(10))
        first, second = engine.admit(tokens), engine.admit(tokens)
        for req in (first, second):
            engine.compute(req, 10)
        engine.sample(first)
        engine.cache.evict(0, 2 * evicted)
        assert tombstones(engine, tokens) == [True] * evicted + [False] * (5 - evicted)

        engine.cache.evict_swa(second, 2 * left + 2, sliding_window_size=1)
        engine.sample(second)

        dead = min(evicted, left)
        assert tombstones(engine, tokens) == [True] * dead + [False] * (5 - dead)
        assert engine.allocator.full_available_size() == (24 - 5) * 2
        assert engine.allocator.swa_available_size() == (16 - 5 + dead) * 2
        engine.settle()
