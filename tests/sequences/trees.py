"""Sequences of a radix cache: matches, locks, handles, eviction."""

import random
from typing import Any

import pytest
import torch

from kvspec.conformance.suite import Conformance
from sequences.engine import Engine, numbers, refused
from sequences.report import report

__all__ = ["Locks", "Trees"]


class Locks(Conformance):
    """Locks undo exactly what they did, and hold what they cover."""

    @report("SEED-7", "SG-36848", "SG-27147", clause="CACHE-12")
    def test_unlocking_after_a_split_leaves_no_lock(self) -> None:
        engine = Engine(self.impl, page_size=2)
        engine.serve([1, 2, 3, 4, 5, 6, 7, 8])
        node = engine.cache.match_prefix([1, 2, 3, 4, 5, 6, 7, 8]).last_device_node
        receipt = engine.cache.inc_lock_ref(node)

        engine.serve([1, 2, 3, 4, 9, 9])
        engine.cache.match_prefix([1, 2])
        assert engine.cache.protected_size() == 8

        assert engine.cache.dec_lock_ref(receipt) == 8
        assert not any(page.locks for page in engine.cache.view().pages.values())
        assert engine.cache.evict(64) == 10
        engine.settle()

    @report("SEED-38", "LMC-1130", clause="CACHE-12")
    @pytest.mark.parametrize("first", [0, 1])
    def test_the_last_unlock_frees_in_either_order(self, first: int) -> None:
        engine = Engine(self.impl)
        engine.serve([1, 2, 3])
        long = engine.cache.match_prefix([1, 2, 3]).last_device_node
        short = engine.cache.match_prefix([1, 2]).last_device_node
        receipts = [engine.cache.inc_lock_ref(node) for node in (long, short)]

        engine.cache.dec_lock_ref(receipts[first])
        assert engine.cache.protected_size() == (2, 3)[first]
        engine.cache.dec_lock_ref(receipts[1 - first])

        assert engine.cache.evict(3) == 3
        engine.settle()

    @report("SEED-15", "TRT-12667", clause="RADIX-7")
    def test_a_page_that_was_locked_for_a_while_is_evictable_once(self) -> None:
        engine = Engine(self.impl, page_count=4)
        engine.serve([1, 2, 3, 4])
        node = engine.cache.match_prefix([1, 2, 3, 4]).last_device_node
        for _ in range(2):
            engine.cache.dec_lock_ref(engine.cache.inc_lock_ref(node))

        assert engine.cache.evictable_size() == 4
        assert engine.cache.evict(64) == 4

        engine.keep(engine.allocator.alloc(4))
        engine.settle()

    @report("SEED-40", "LMC-3130", "TRT-12542", clause="RADIX-11")
    def test_what_a_reader_holds_outlives_its_request(self) -> None:
        engine = Engine(self.impl, page_size=2, page_count=4)
        engine.serve([1, 2, 3, 4, 5])
        found = engine.cache.match_prefix([1, 2, 3, 4])
        reader = engine.cache.inc_lock_ref(found.last_device_node)

        engine.cache.evict(64)
        rest = engine.keep(engine.allocator.alloc(engine.allocator.available_size()))
        assert not set(numbers(found.device_indices)) & set(rest)
        engine.settle()

        engine.cache.dec_lock_ref(reader)
        assert engine.cache.evict(64) == 4
        engine.settle()

    @report("SEED-41", "VL-55227", clause="RADIX-6")
    def test_locks_count_those_who_share_and_no_one_else(self) -> None:
        engine = Engine(self.impl, page_count=64, row_count=16)
        engine.serve([1, 2])
        sharers = [engine.admit([1, 2, 10 + i]) for i in range(8)]
        others = [engine.admit([50 + i, 2, 3]) for i in range(7)]
        for req in (*sharers, *others):
            engine.chunk(req, 3)

        engine.allocator.free_group_begin()
        for req in sharers[:7]:
            engine.sample(req)
        pages = engine.cache.view().pages
        assert pages[None, (1,)].locks == pages[None, (1, 2)].locks == 1
        engine.settle()

        engine.allocator.free_group_end()
        engine.settle()

    @report("SE-15", "SE-29", clause="CACHE-13")
    def test_a_receipt_is_worth_one_unlock_and_a_refusal_breaks_nothing(self) -> None:
        engine = Engine(self.impl)
        engine.serve([1, 2])
        node = engine.cache.match_prefix([1, 2]).last_device_node
        receipt = engine.cache.inc_lock_ref(node)
        engine.cache.dec_lock_ref(receipt)

        refused(engine, "CACHE-13", engine.cache.dec_lock_ref, receipt)
        refused(engine, "CACHE-13", engine.cache.dec_lock_ref, node)

        assert engine.serve([1, 2, 3]) == 2
        engine.settle()

    @report("VL-18957", "VL-39702", clause="CACHE-13")
    def test_a_match_that_was_not_locked_may_not_be_relied_on(self) -> None:
        engine = Engine(self.impl, page_size=2, page_count=4)
        engine.serve([1, 2, 3, 4])
        found = engine.cache.match_prefix([1, 2, 3, 4])

        engine.serve([5, 6, 7, 8, 9, 10])
        refused(engine, "CACHE-13", engine.cache.inc_lock_ref, found.last_device_node)

        engine.settle()


class Trees(Conformance):
    """What is found, what goes first, what is left."""

    @report("SEED-8", "SEED-39", "SG-16067", "SG-21404", "LMC-1034", "LMC-3884", clause="RADIX-3")
    def test_matches_that_lead_nowhere_take_nothing(self) -> None:
        engine = Engine(self.impl, page_size=2, page_count=8)
        engine.serve([1, 2, 3, 4, 5, 6])
        free, owned = engine.allocator.view(), _owned(engine)

        for stop in (6, 3, 5, 4, 6):
            engine.cache.match_prefix([1, 2, 3, 4, 5, 6][:stop])

        assert (engine.allocator.view(), _owned(engine)) == (free, owned)
        assert engine.cache.evict(64) == 6
        assert engine.allocator.available_size() == 16
        engine.settle()

    @report("SE-24", clause="RADIX-3")
    def test_a_look_without_a_touch_changes_nothing(self) -> None:
        engine = Engine(self.impl)
        for tokens in ([1, 2, 3], [4, 5]):
            engine.serve(tokens)
        before, digest = engine.state(), engine.cache.digest()
        for tokens in ([1, 2], [1, 2, 3], [4, 9], [7]):
            engine.cache.match_prefix(tokens, touch=False)
        assert (engine.state(), engine.cache.digest()) == (before, digest)

    @report("MINI-124", "FKV-195", clause="RADIX-3")
    def test_the_part_that_was_hit_goes_last(self) -> None:
        engine = Engine(self.impl)
        engine.serve(list(range(10)))
        engine.serve([20, 21, 22])
        engine.cache.match_prefix(list(range(5)))

        assert engine.cache.evict(8) == 8

        assert engine.cached(list(range(10))) == 5
        assert engine.cached([20, 21, 22]) == 0
        engine.settle()

    @report("SG-18843", clause="RADIX-13")
    @pytest.mark.parametrize("policy", ["lfu", "slru"])
    def test_what_is_used_often_outlives_what_is_new(self, policy: str) -> None:
        engine = Engine(self.impl, eviction_policy=policy)
        engine.serve([1, 2])
        for _ in range(3):
            engine.cache.match_prefix([1, 2])
        engine.serve([3, 4])

        assert engine.cache.evict(2) == 2

        assert (engine.cached([1, 2]), engine.cached([3, 4])) == (2, 0)
        engine.settle()

    @report("SE-23", clause="RADIX-8")
    def test_eviction_stops_at_the_page_it_needs(self) -> None:
        engine = Engine(self.impl, page_size=2)
        engine.serve(list(range(20)))
        assert engine.cache.evict(1) == 2
        assert engine.cached(list(range(20))) == 18
        engine.settle()

    @report("SEED-16", "KVC-362", clause="RADIX-1")
    def test_a_reused_page_is_found_under_its_new_key_alone(self) -> None:
        engine = Engine(self.impl, page_size=2, page_count=2)
        for tokens in ([1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 7, 8]):
            engine.serve(tokens)
            assert engine.cached(tokens) == 4
            assert engine.cached([5, 6, 3, 4]) <= (2 if tokens[0] == 5 else 0)
            engine.settle()

    @report("OV-3722", clause="RADIX-1")
    def test_tokens_are_compared_and_not_their_hashes(self) -> None:
        engine = Engine(self.impl, page_size=2)
        assert hash((-1, -1)) == hash((-2, -2))
        engine.serve([-1, -1, -1, -1])
        assert engine.serve([-2, -2, -2, -2]) == 0
        engine.settle()

    @report("DYN-1785", clause="CACHE-9")
    def test_a_duplicate_stays_with_its_caller(self) -> None:
        engine = Engine(self.impl, page_size=2)
        engine.serve([1, 2, 3, 4])
        kept = numbers(engine.cache.match_prefix([1, 2, 3, 4]).device_indices)
        ours = engine.keep(engine.allocator.alloc(4))
        books = engine.allocator.view()

        result = engine.cache.insert([1, 2, 3, 4], ours)

        assert (result.duplicate, result.adopted) == ([(0, 4)], [])
        assert engine.allocator.view() == books
        assert numbers(engine.cache.match_prefix([1, 2, 3, 4]).device_indices) == kept
        engine.settle()

    @report("VL-3347", clause="CACHE-10")
    def test_a_page_may_not_occur_twice_in_what_is_inserted(self) -> None:
        engine = Engine(self.impl)
        first, second = engine.keep(engine.allocator.alloc(2))
        refused(engine, "CACHE-10", engine.cache.insert, [1, 2, 3], [first, second, first])
        engine.settle()

    @report("SE-04", clause="CACHE-9")
    def test_the_tree_keeps_no_view_of_the_callers_slots(self) -> None:
        engine = Engine(self.impl)
        slots = engine.allocator.alloc(3).to(torch.int32)
        kept = numbers(slots)
        engine.cache.insert([1, 2, 3], slots)

        slots.fill_(9)
        engine.cache.match_prefix([1, 2, 3]).device_indices.fill_(9)

        assert numbers(engine.cache.match_prefix([1, 2, 3]).device_indices) == kept
        engine.settle()

    @report("DYN-11169", "TRT-16019", clause="CACHE-14")
    def test_a_handle_names_its_path_through_splits_and_nothing_afterwards(self) -> None:
        engine = Engine(self.impl, page_size=2)
        engine.serve([1, 2, 3, 4, 5, 6])
        node = engine.cache.match_prefix([1, 2, 3, 4, 5, 6]).last_device_node
        engine.serve([1, 2, 9, 9])
        assert engine.cache.resolve(node) == (None, (1, 2, 3, 4, 5, 6))

        engine.cache.evict(64)
        engine.serve([1, 2, 3, 4, 5, 6])

        assert engine.cache.resolve(node) is None
        engine.settle()

    @report("TRT-13571", clause="RADIX-5")
    def test_children_that_come_and_go_leave_a_tree(self) -> None:
        engine = Engine(self.impl, page_size=2, page_count=7)
        for turn in range(12):
            stem = [1, 2, 3, 4][: 2 + turn % 3]
            engine.serve([*stem, 10 + turn, 0, turn % 2, 1])
            engine.cache.evict(2 * (turn % 4))
            engine.settle()
            _assert_prefix_closed(engine)

    @report("SG-10637", "SG-38045", clause="RADIX-7")
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_sizes_are_those_of_a_recount(self, page_size: int) -> None:
        chance = random.Random(7)
        engine = Engine(self.impl, page_size=page_size, page_count=48)
        locks: list[Any] = []
        for _ in range(60):
            tokens = [chance.randrange(2) for _ in range(chance.randrange(1, 15))]
            engine.serve(tokens)
            found = engine.cache.match_prefix(tokens[: chance.randrange(len(tokens) + 1)])
            if len(found.device_indices) and len(locks) < 2:
                locks.append(engine.cache.inc_lock_ref(found.last_device_node))
            elif locks:
                engine.cache.dec_lock_ref(locks.pop(0))
            engine.cache.evict(chance.randrange(4))
            pages = engine.cache.view().pages.values()
            free = sum(page.locks == 0 for page in pages) * page_size
            assert engine.cache.evictable_size() == free
            assert engine.cache.protected_size() == len(pages) * page_size - free
            engine.settle()

    @report("SG-10637", "SE-16", clause="RADIX-7")
    def test_an_empty_tree_and_a_key_below_a_page_have_size_zero(self) -> None:
        engine = Engine(self.impl, page_size=16)
        engine.serve(list(range(15)))
        assert engine.cached(list(range(15))) == engine.cached([]) == 0
        sizes = [engine.cache.evictable_size, engine.cache.protected_size, engine.cache.total_size]
        assert [size() for size in sizes] == [0, 0, 0]
        engine.settle()

    @report("SEED-44", "TSP-248", "SG-22759", clause="RADIX-17")
    def test_replicas_evict_the_same(self) -> None:
        twins = [Engine(self.impl, page_count=12) for _ in range(2)]
        elsewhere: list[list[object]] = []
        for turn in range(30):
            for twin in twins:
                elsewhere.append([object() for _ in range(turn * len(elsewhere) % 13)])
                twin.serve([turn % 5, turn % 3, turn % 2, turn % 7])
            first, second = (twin.cache for twin in twins)
            assert first.digest() == second.digest()
            assert first.view() == second.view()


def _owned(engine: Engine) -> dict[object, tuple[int, int]]:
    """Pages and locks of the resident paths: all but recency."""
    pages = engine.cache.view().pages
    return {path: (page.page, page.locks) for path, page in pages.items()}


def _assert_prefix_closed(engine: Engine) -> None:
    paths = set(engine.cache.view().pages)
    for extra_key, tokens in paths:
        parent = tokens[: -engine.page_size]
        assert not parent or (extra_key, parent) in paths
