"""What every memory saver must do. Spec: SAVER."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from kvspec.conformance import clause
from kvspec.conformance.memory_saver.bench import (
    BLOCK,
    MIB,
    PAGE,
    process_bytes,
    raw,
    refused,
    resident_bytes,
    stuck,
    where,
)
from kvspec.conformance.memory_saver.capture import CaptureConformance
from kvspec.errors import HostMemoryError
from kvspec.memory_budget import MemoryBudget

__all__ = ["MemorySaverConformance"]


class MemorySaverConformance(CaptureConformance):
    """Tests of `TorchMemorySaverAdapter`, each with a saver that no other test shares."""

    # -- pause and resume ------------------------------------------------------------------------

    @clause("SAVER-8")
    def test_a_pause_gives_the_pages_back(self) -> None:
        saver = self.make()
        with saver.region("kv_cache"):
            tensors = [torch.ones(4 * MIB, dtype=torch.uint8) for _ in range(3)]
        places = [where(tensor) for tensor in tensors]
        assert [resident_bytes(*place) for place in places] == [4 * MIB] * 3
        before = process_bytes()
        saver.pause("kv_cache")
        assert [resident_bytes(*place) for place in places] == [0] * 3
        assert before - process_bytes() > 10 * MIB
        assert [where(tensor) for tensor in tensors] == places
        assert not tensors[2][5 * PAGE]
        assert sum(resident_bytes(*place) for place in places) <= PAGE
        assert not any(tensor.any() for tensor in tensors)

    @clause("SAVER-9", "SAVER-8")
    def test_contents_are_dropped_or_kept(self) -> None:
        saver, table, weights = self.two()
        for tag in ("kv_cache", "weights"):
            saver.pause(tag)
        assert not table.any()
        assert not weights.any()
        for tag in ("weights", "kv_cache"):
            saver.resume(tag)
        assert not table.any()
        assert torch.equal(weights, torch.arange(3_000))

    @clause("SAVER-9")
    def test_what_is_written_while_paused_is_lost(self) -> None:
        saver, table, weights = self.two()
        for tensor, tag in ((table, "kv_cache"), (weights, "weights")):
            saver.pause(tag)
            tensor[17] = 99
            saver.resume(tag)
        assert not table.any()
        assert torch.equal(weights, torch.arange(3_000))

    @clause("SAVER-9")
    def test_one_tag_may_keep_and_drop(self) -> None:
        saver = self.make()
        with saver.region("weights"):
            dropped = torch.ones(4)
            with saver.region("weights", enable_cpu_backup=True):
                kept = torch.ones(4)
        for turn in range(3):
            kept += turn
            expected = kept.tolist()
            saver.pause("weights")
            saver.resume("weights")
            assert kept.tolist() == expected
            assert dropped.tolist() == [0] * 4
            dropped.fill_(turn)

    @clause("SAVER-10")
    def test_a_backup_is_held_from_pause_to_resume(self) -> None:
        saver = self.make()
        with saver.region("weights", enable_cpu_backup=True):
            weights = torch.ones(8 * MIB, dtype=torch.uint8)
        before = process_bytes()
        for _ in range(2):
            saver.pause("weights")
            assert saver.view()["weights"].backup_bytes == 8 * MIB
            assert resident_bytes(*where(weights)) == 0
            assert abs(process_bytes() - before) < 3 * MIB
            saver.resume("weights")
            assert saver.view()["weights"].backup_bytes == 0
            assert abs(process_bytes() - before) < 3 * MIB
        assert weights.sum() == 8 * MIB

    @clause("SAVER-11")
    @pytest.mark.parametrize("paused", [False, True])
    def test_what_is_freed_is_gone_at_once(self, paused: bool) -> None:
        budget = MemoryBudget()
        with budget.active():
            saver = self.make()
            with saver.region("weights", enable_cpu_backup=True):
                first = torch.ones(4 * MIB, dtype=torch.uint8)
                second = torch.ones(100)
            if paused:
                saver.pause("weights")
            view = first[5:]
            del first
            assert saver.view()["weights"].allocations == 2, "a view has it"
            before = process_bytes()
            del view
            assert before - process_bytes() > 3 * MIB  # of it, or of its backup
            left = 400 if paused else 0
            assert saver.view()["weights"] == (paused, 1, 400, 0, left)
            assert [entry[1] for entry in budget.view().reserved] in ([400], [PAGE])
            if paused:
                saver.resume("weights")
            assert second.sum() == 100
            assert saver.view()["weights"] == (False, 1, 400, 0, 0)

    @clause("SAVER-11", "SAVER-13")
    def test_a_tag_outlives_its_allocations(self) -> None:
        saver, table, weights = self.two()
        saver.pause("kv_cache")
        del table
        assert saver.view()["kv_cache"] == (True, 0, 0, 0, 0)
        saver.resume("kv_cache")
        saver.pause("kv_cache")
        saver.resume("kv_cache")
        assert saver.view()["kv_cache"] == (False, 0, 0, 0, 0)
        assert weights.sum() == 4_498_500

    @clause("SAVER-12")
    def test_a_second_pause_is_refused(self) -> None:
        saver, table, weights = self.two()
        saver.pause("weights")
        before, counts = dict(saver.view()), saver.counters()
        with refused("SAVER-12"):
            saver.pause("weights")
        assert dict(saver.view()) == before
        assert saver.counters() == counts
        saver.resume("weights")
        assert torch.equal(weights, torch.arange(3_000))
        assert (table == 7).all()

    @clause("SAVER-12")
    def test_an_unknown_tag_is_not_paused(self) -> None:
        saver, table, weights = self.two()
        before = dict(saver.view())
        with refused("SAVER-12"):
            saver.pause("kvcache")
        self.same(saver, before, [table, weights], [raw(table), raw(weights)])

    @clause("SAVER-12")
    def test_a_tag_with_an_open_region_is_not_paused(self) -> None:
        saver, table, weights = self.two()
        with saver.region("kv_cache"):
            with saver.region("weights"), refused("SAVER-12"):
                saver.pause("kv_cache")
            saver.pause("weights")
            saver.resume("weights")
        assert (table == 7).all()
        assert torch.equal(weights, torch.arange(3_000))
        assert saver.view()["kv_cache"] == (False, 1, 20_000, 0, 0)

    @clause("SAVER-12")
    def test_a_region_of_another_thread_is_open_too(self) -> None:
        saver, table, _ = self.two()
        opened, done = threading.Event(), threading.Event()

        def work() -> None:
            with saver.region("kv_cache"):
                opened.set()
                done.wait(60)

        thread = threading.Thread(target=work)
        thread.start()
        assert opened.wait(60)
        try:
            with refused("SAVER-12"):
                saver.pause("kv_cache")
        finally:
            done.set()
            thread.join()
        saver.pause("kv_cache")
        assert not table.any()

    @clause("SAVER-13")
    @pytest.mark.parametrize("tag", ["kv_cache", "kvcache"])
    def test_only_what_is_paused_is_resumed(self, tag: str) -> None:
        saver, table, weights = self.two()
        before = dict(saver.view())
        with refused("SAVER-13"):
            saver.resume(tag)
        saver.pause("weights")
        saver.resume("weights")
        with refused("SAVER-13"):
            saver.resume("weights")
        self.same(saver, before, [table, weights], [raw(table), raw(weights)])
        assert (table == 7).all()

    @clause("SAVER-14")
    def test_nothing_is_allocated_in_a_paused_tag(self) -> None:
        saver, table, _ = self.two()
        early = saver.region("kv_cache")
        saver.pause("kv_cache")
        before = dict(saver.view())
        with refused("SAVER-14"):
            saver.region("kv_cache")
        with refused("SAVER-14"), early:
            pytest.fail("a region of a paused tag was entered")
        assert dict(saver.view()) == before
        saver.resume("kv_cache")
        with saver.region("kv_cache"):
            more = torch.ones(2)
        assert saver.view()["kv_cache"].allocations == 2
        assert more.sum() == 2
        assert not table.any()

    @clause("SAVER-14")
    @pytest.mark.parametrize("tag", ["", None, 3])
    def test_a_tag_is_a_string(self, tag: Any) -> None:
        saver = self.make()
        with refused("SAVER-14"):
            saver.region(tag)
        assert dict(saver.view()) == {}

    # -- all or nothing --------------------------------------------------------------------------

    def filled(self, saver: Any, keep: bool) -> tuple[list[Any], list[Tensor]]:
        """Four arenas of a tag and a tensor over each, none of them zeros."""
        with saver.region("weights", enable_cpu_backup=keep):
            arenas = [self.arena(nbytes=(1 + i) * PAGE) for i in range(4)]
        tensors = [arena.tensor() for arena in arenas]
        for number, tensor in enumerate(tensors):
            tensor.fill_(number + 1)
        return arenas, tensors

    @clause("SAVER-15")
    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("at", range(4))
    def test_a_pause_that_fails_changes_nothing(self, at: int, keep: bool) -> None:
        budget = MemoryBudget()
        with budget.active():
            saver = self.make()
            arenas, tensors = self.filled(saver, keep)
            before, was = dict(saver.view()), [raw(tensor) for tensor in tensors]
            reserved, counts = budget.view(), saver.counters()
            with stuck(arenas[at]), pytest.raises(HostMemoryError):
                saver.pause("weights")
            self.same(saver, before, tensors, was)
            assert budget.view() == reserved
            assert saver.counters() == counts
            saver.pause("weights")
            assert sum(arena.resident_bytes() for arena in arenas) == 0

    @clause("SAVER-15")
    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("at", range(4))
    def test_a_resume_that_fails_changes_nothing(self, at: int, keep: bool) -> None:
        budget = MemoryBudget()
        with budget.active():
            saver = self.make()
            arenas, tensors = self.filled(saver, keep)
            was = [raw(tensor) if keep else bytes(len(tensor)) for tensor in tensors]
            saver.pause("weights")
            before, counts, reserved = dict(saver.view()), saver.counters(), budget.view()
            with stuck(arenas[at]), pytest.raises(HostMemoryError):
                saver.resume("weights")
            assert budget.view() == reserved
            assert saver.counters() == counts
            self.same(saver, before, tensors, [bytes(len(tensor)) for tensor in tensors])
            saver.resume("weights")
            assert all(raw(tensor) == kept for tensor, kept in zip(tensors, was, strict=True))

    @clause("SAVER-15")
    def test_a_pause_without_room_for_the_backups_changes_nothing(self) -> None:
        with MemoryBudget(limit_bytes=3 * BLOCK).active():
            saver = self.make()
            with saver.region("weights", enable_cpu_backup=True):
                tensors = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(2)]
            before, was = dict(saver.view()), [raw(tensor) for tensor in tensors]
            with pytest.raises(HostMemoryError):
                saver.pause("weights")
            self.same(saver, before, tensors, was)
            tensors.pop()
            saver.pause("weights")
            assert saver.view()["weights"] == (True, 1, BLOCK, 0, BLOCK)

    @clause("SAVER-16", "SAVER-15")
    def test_a_resume_has_all_of_it_or_nothing(self) -> None:
        budget = MemoryBudget(limit_bytes=3 * BLOCK)
        with budget.active():
            saver = self.make()
            with saver.region("kv_cache"):
                tensors = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(3)]
            saver.pause("kv_cache")
            assert budget.view().reserved == (), "what is given back is promised to nobody"
            tensors[0][3] = 5
            before = dict(saver.view())
            with budget.reserve("mmap", BLOCK):
                with pytest.raises(HostMemoryError):
                    saver.resume("kv_cache")
                assert dict(saver.view()) == before
                assert tensors[0][3] == 5, "nothing was changed"
                assert len(budget.view().reserved) == 1
            saver.resume("kv_cache")
            assert sum(entry[1] for entry in budget.view().reserved) == 3 * BLOCK
            del tensors
            assert budget.view().reserved == ()

    # -- what is left ----------------------------------------------------------------------------

    @clause("SAVER-17")
    def test_a_region_that_is_left_captures_nothing_more(self) -> None:
        saver, made = self.make(), []

        def failing() -> None:
            with saver.region("kv_cache"):
                made.append(torch.ones(4))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            failing()
        outside = torch.ones(4)
        assert saver.view()["kv_cache"] == (False, 1, 16, 0, 0)
        saver.pause("kv_cache")
        assert made[0].sum() == 0
        assert outside.sum() == 4

    @clause("SAVER-18")
    def test_check_finds_what_was_written_while_paused(self) -> None:
        saver, table, weights = self.two()
        saver.check()
        saver.pause("weights")
        saver.pause("kv_cache")
        saver.check()
        assert table.sum() == 0
        saver.check()
        table[4_000] = 1
        with refused("SAVER-8"):
            saver.check()
        saver.resume("kv_cache")
        table[4_000] = 1
        saver.check()
        assert not weights.any()

    @clause("SAVER-19")
    def test_other_tags_are_left_alone(self) -> None:
        saver, table, weights = self.two()
        saver.pause("kv_cache")
        assert saver.view()["weights"] == (False, 1, 24_000, 0, 0)
        assert torch.equal(weights, torch.arange(3_000))
        weights += 1
        saver.resume("kv_cache")
        assert torch.equal(weights, torch.arange(1, 3_001))
        saver.pause("weights")
        table.fill_(3)
        saver.resume("weights")
        assert (table == 3).all()

    @clause("SAVER-20")
    def test_each_byte_is_given_back_and_copied_once(self) -> None:
        saver, table, weights = self.two()
        captured = table.nbytes + weights.nbytes
        for turn in (1, 2):
            for tag in ("kv_cache", "weights"):
                saver.pause(tag)
                saver.resume(tag)
            assert saver.counters() == {
                "captured": captured,
                "given_back": turn * captured,
                "kept": turn * weights.nbytes,
                "put_back": turn * weights.nbytes,
            }
        assert resident_bytes(*where(table)) == 0, "a resume touches what was kept alone"
