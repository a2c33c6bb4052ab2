"""Sequences of an allocator alone."""

import itertools

import pytest
import torch

from kvspec.conformance.suite import Conformance
from sequences.engine import Engine, numbers, refused
from sequences.report import report

__all__ = ["Allocators"]


class Allocators(Conformance):
    """Nothing is freed twice, handed out twice or lost."""

    @report("SG-38941", "SEED-13", "SE-11", "VL-3347", clause="PAGE-10")
    def test_two_frees_with_a_seam_in_mid_page(self) -> None:
        engine = Engine(self.impl, page_size=4, page_count=4)
        slots = engine.allocator.alloc(16)

        engine.allocator.free(slots[:10])
        refused(engine, "PAGE-10", engine.allocator.free, slots[10:])

        engine.allocator.free(slots[12:])
        assert len(set(numbers(engine.allocator.alloc(16)))) == 16

    @report("VL-42571", "VL-3347", "SEED-14", clause="PAGE-9")
    def test_a_page_named_twice_in_one_free_comes_back_once(self) -> None:
        engine = Engine(self.impl, page_size=4, page_count=4)
        slots = numbers(engine.allocator.alloc(8))

        engine.allocator.free([slots[0], slots[3], slots[0]])

        engine.keep(slots[4:])
        assert engine.allocator.available_size() == 12
        engine.settle()

    @report("VL-42571", "UCM-1053", "SEED-14", "SE-12", clause="SLOT-5")
    def test_a_slot_named_twice_in_one_free_is_refused(self) -> None:
        engine = Engine(self.impl)
        slot = numbers(engine.allocator.alloc(1))

        refused(engine, "SLOT-5", engine.allocator.free, slot * 2)

        engine.allocator.free(slot)
        engine.settle()

    @report("SG-40305", "SE-12", clause="SLOT-5")
    def test_a_double_free_is_caught_at_page_size_one(self) -> None:
        engine = Engine(self.impl)
        slots = numbers(engine.allocator.alloc(2))
        engine.allocator.free(slots)

        for slot in (slots[0], 0, 17, -1):
            refused(engine, "SLOT-5", engine.allocator.free, [slot])

        engine.settle()

    @report("SG-38269", "UCM-1053", clause="PAGE-10")
    @pytest.mark.parametrize("named", [[0], [3], [0, 0, 4], [4, 0]])
    def test_the_sink_is_never_given_back(self, named: list[int]) -> None:
        engine = Engine(self.impl, page_size=4)
        engine.keep(engine.allocator.alloc(4))

        refused(engine, "PAGE-10", engine.allocator.free, named)

        engine.settle()

    @report("KVC-398", "SG-38269", clause="PAGE-2")
    def test_the_sink_page_is_never_handed_out(self) -> None:
        engine = Engine(self.impl, page_size=2, page_count=5)
        for _ in range(2):
            assert min(numbers(engine.allocator.alloc(10))) == 2
            engine.allocator.clear()

    @report("KVC-398", clause="SLOT-1")
    def test_the_sink_slot_is_never_handed_out(self) -> None:
        engine = Engine(self.impl, page_count=5)
        for _ in range(2):
            assert sorted(numbers(engine.allocator.alloc(5))) == [1, 2, 3, 4, 5]
            engine.allocator.clear()

    @report("VL-48489", clause="SLOT-7")
    def test_deferred_frees_keep_the_order_of_immediate_ones(self) -> None:
        orders = []
        for deferred in (False, True):
            engine = Engine(self.impl, page_count=6)
            slots = numbers(engine.allocator.alloc(6))
            if deferred:
                engine.allocator.free_group_begin()
            for part in ([5, 3], [1], [4, 0, 2]):
                engine.allocator.free([slots[i] for i in part])
            if deferred:
                engine.allocator.free_group_end()
            orders.append(numbers(engine.allocator.alloc(6)))
        assert orders[0] == orders[1] == [6, 4, 2, 5, 1, 3]

    @report("SE-20", "VL-48489", clause="PAGE-11")
    def test_what_a_group_holds_is_not_the_callers_tensor(self) -> None:
        engine = Engine(self.impl, page_size=2, page_count=4)
        slots = engine.allocator.alloc(8)
        engine.allocator.free_group_begin()
        engine.allocator.free(slots[4:])
        engine.allocator.free(slots[:4])
        slots.fill_(2)
        assert engine.allocator.available_size() == 0

        engine.allocator.free_group_end()

        assert numbers(engine.allocator.alloc(8)) == [2, 3, 4, 5, 6, 7, 8, 9]

    @report("SE-20", clause="PAGE-12")
    def test_a_nested_group_loses_no_pending_page(self) -> None:
        engine = Engine(self.impl, page_size=2)
        slots = engine.allocator.alloc(4)
        engine.allocator.free_group_begin()
        engine.allocator.free(slots)

        refused(engine, "PAGE-12", engine.allocator.free_group_begin)

        engine.allocator.free_group_end()
        engine.settle()

    @report("SE-20", clause="PAGE-15")
    def test_a_free_before_a_restore_is_not_lost(self) -> None:
        engine = Engine(self.impl, page_size=2)
        slots = engine.allocator.alloc(4)
        ticket = engine.allocator.backup_state()
        drafts = engine.allocator.alloc(2)
        engine.allocator.free(slots)

        refused(engine, "PAGE-15", engine.allocator.restore_state, ticket)

        engine.allocator.free(drafts)
        engine.settle()

    @report("SE-12", clause="SLOT-4")
    def test_a_negative_amount_is_refused(self) -> None:
        engine = Engine(self.impl)
        refused(engine, "SLOT-4", engine.allocator.alloc, -2)
        engine.settle()

    @report("SE-13", clause="PAGE-5")
    def test_half_a_page_is_refused(self) -> None:
        engine = Engine(self.impl, page_size=4)
        refused(engine, "PAGE-5", engine.allocator.alloc, 6)
        engine.settle()

    @report("SE-14", clause="PAGE-4")
    def test_slots_beyond_the_last_whole_page_do_not_exist(self) -> None:
        pool = {"dtype": torch.float16, "device": "cpu", "kvcache": None, "need_sort": False}
        allocator = self.impl.PagedTokenToKVPoolAllocator(size=11, page_size=4, **pool)
        assert allocator.available_size() == 8
        assert allocator.alloc(12) is None
        assert numbers(allocator.alloc(8)) == [4, 5, 6, 7, 8, 9, 10, 11]

    @report("SG-33794", clause="PAGE-4")
    def test_room_is_counted_in_pages_not_tokens(self) -> None:
        engine = Engine(self.impl, page_size=4, page_count=5)
        assert engine.allocator.available_size() >= 3 * 5

        before = engine.state()
        assert engine.allocator.alloc_extend([0] * 3, [5] * 3, [-1] * 3, 15) is None
        assert engine.state() == before

        engine.keep(engine.allocator.alloc_extend([0] * 2, [5] * 2, [-1] * 2, 10))
        engine.settle()

    @report("SEED-11", "SG-7112", clause="PAGE-9")
    @pytest.mark.parametrize(("length", "accepted"), list(itertools.product(range(5, 9), range(5))))
    def test_pages_without_an_accepted_draft_come_back(self, length: int, accepted: int) -> None:
        engine = Engine(self.impl, page_size=4)
        kept = numbers(engine.allocator.alloc_extend([0], [length], [-1], length))
        drafts = numbers(engine.allocator.alloc_extend([length], [length + 4], kept[-1:], 4))

        engine.keep(kept + drafts[:accepted])
        pages = {slot // 4 for slot in kept + drafts[:accepted]}
        engine.allocator.free([slot for slot in drafts if slot // 4 not in pages])

        assert len(pages) == -(-(length + accepted) // 4)
        engine.settle()
