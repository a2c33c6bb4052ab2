"""What is in a cache: inserts, locks, handles, reset. Spec: CACHE-8 to CACHE-16."""

from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import (
    ABC,
    CacheConformance,
    covered,
    numbers,
    refused,
    sharing,
)

__all__ = ["EntryConformance"]


class EntryConformance(CacheConformance):
    """Entries of the radix cache."""

    # Insert

    @clause("CACHE-8")
    @sharing
    @pytest.mark.parametrize("page_size", [1, 4, 16])
    def test_insert_sorts_every_slot_into_one_range(self, page_size: int, kind: str) -> None:
        system, size = self.stocked(page_size, kind=kind), page_size
        tokens = list(range(5 * size))
        system.insert(tokens[: 3 * size], 1, 2, 3)

        tail = [99] if size > 1 else []
        result = system.insert(tokens[: 4 * size] + tail, 1, 7, 3, 4, 5)

        assert result.prefix_len == 3 * size
        assert result.shared == [(0, size), (2 * size, 3 * size)]
        assert result.duplicate == [(size, 2 * size)]
        assert result.adopted == [(3 * size, 4 * size)]
        assert result.tail == ([(4 * size, 4 * size + 1)] if tail else [])
        assert covered(result) == list(range(4 * size + len(tail)))

    @clause("CACHE-8")
    @sharing
    @pytest.mark.parametrize("length", [0, 3])
    def test_key_below_a_page_is_all_tail(self, length: int, kind: str) -> None:
        system = self.stocked(kind=kind)
        result = system.insert(ABC[:length], 1)
        assert (result.prefix_len, result.shared, result.adopted, result.duplicate) == (
            0,
            [],
            [],
            [],
        )
        assert result.tail == ([(0, length)] if length else [])
        assert system.cache.resolve(result.last_device_node) == (None, ())

    @clause("CACHE-9")
    @sharing
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_insert_replaces_nothing_and_frees_nothing(self, page_size: int, kind: str) -> None:
        system = self.stocked(page_size, spy=True, kind=kind)
        tokens = list(range(3 * page_size))
        system.insert(tokens[: 2 * page_size], 1, 2)

        result = system.insert(tokens, 5, 2, 6)

        assert result.duplicate == [(0, page_size)]
        assert system.held_along(tokens) == system.slots(1, 2, 6)
        assert system.allocator.frees == []
        assert system.allocator.available_size() == 0

    @clause("CACHE-9")
    @sharing
    def test_the_tree_keeps_its_own_copy_of_slots(self, kind: str) -> None:
        system = self.serving(kind=kind)
        req = system.admit(ABC)
        assert system.compute(req, 12)
        row = system.pool.req_to_token[req.req_pool_idx, :12]
        before = numbers(row)

        system.cache.insert(ABC, row)
        row += 4

        assert system.held_along(ABC) == before

    @clause("CACHE-10")
    @sharing
    @pytest.mark.parametrize(
        ("tokens", "slots"),
        [
            (ABC[:4], [20, 21, 22]),
            (ABC[:4], [20, 21, 22, 23, 24]),
            (ABC[:4], [20, 21, 23, 22]),
            (ABC[:4], [21, 22, 23, 24]),
            (ABC[:4], [20, 20, 20, 20]),
            (ABC[:4], [0, 1, 2, 3]),
            (ABC[:8], [20, 21, 22, 23, 20, 21, 22, 23]),
            (ABC[:4], [8, 9, 10, 11]),
            ([80, 81, 82, 83], [4, 5, 6, 7]),
            ([*ABC[:4], 80, 81, 82, 83], [4, 5, 6, 7, 8, 9, 10, 11]),
            (ABC[:4], [20.0, 21.0, 22.0, 23.0]),
        ],
    )
    def test_slots_that_cannot_be_the_keys_are_refused(
        self, tokens: Any, slots: Any, kind: str
    ) -> None:
        system = self.stocked(kind=kind)
        system.insert(ABC[:8], 1, 2)
        refused(system, "CACHE-10", system.cache.insert, tokens, slots)

    # Locks

    @clause("CACHE-11")
    @sharing
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_lock_covers_the_whole_path_once_more(self, page_size: int, kind: str) -> None:
        system, size = self.stocked(page_size, kind=kind), page_size
        tokens = list(range(3 * size))
        below = system.insert(tokens, 1, 2, 3).last_device_node
        above = system.cache.match_prefix(tokens[:size]).last_device_node

        first = system.cache.inc_lock_ref(above)
        second = system.cache.inc_lock_ref(below)
        third = system.cache.inc_lock_ref(below)

        assert [first.delta, second.delta, third.delta] == [-size, -2 * size, 0]
        assert (first.node, second.node, first.swa_uuid) == (above, below, None)
        assert [page.locks for page in system.cache.view().pages.values()] == [3, 2, 2]
        assert system.cache.evictable_size() == 0
        assert system.cache.protected_size() == 3 * size

    @clause("CACHE-12")
    @sharing
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
    def test_receipts_are_exact_in_any_order_across_splits(
        self, order: tuple[int, ...], kind: str
    ) -> None:
        system = self.stocked(page_size=1, kind=kind)
        node = system.insert([1, 2, 3, 4], 1, 2, 3, 4).last_device_node
        receipts = [system.cache.inc_lock_ref(node)]
        fork = system.insert([1, 2, 8], 1, 2, 5).last_device_node
        receipts.append(system.cache.inc_lock_ref(fork))
        middle = system.cache.match_prefix([1]).last_device_node
        receipts.append(system.cache.inc_lock_ref(middle))
        paths = [(1, 2, 3, 4), (1, 2, 8), (1,)]

        still = list(range(3))
        for index in order:
            before = system.cache.evictable_size()
            freed = system.cache.dec_lock_ref(receipts[index])
            still.remove(index)
            assert system.cache.evictable_size() == before + freed
            for (_, tokens), page in system.cache.view().pages.items():
                assert page.locks == sum(paths[i][: len(tokens)] == tokens for i in still)
        assert system.cache.protected_size() == 0

    @clause("CACHE-12")
    @sharing
    def test_lock_outlives_what_is_evicted_below_it(self, kind: str) -> None:
        system = self.stocked(page_size=1, kind=kind)
        node = system.insert([1, 2], 1, 2).last_device_node
        receipt = system.cache.inc_lock_ref(node)
        system.insert([1, 2, 3, 4], 1, 2, 3, 4)
        assert system.evict(4) == 2
        system.insert([1, 2, 5], 1, 2, 5)

        assert system.cache.dec_lock_ref(receipt) == 2
        assert system.evict(4) == 3

    @clause("CACHE-12")
    @sharing
    def test_unlock_by_node_takes_its_oldest_receipt(self, kind: str) -> None:
        system = self.stocked(page_size=1, kind=kind)
        node = system.insert([1, 2], 1, 2).last_device_node
        other = system.cache.match_prefix([1]).last_device_node
        receipts = [system.cache.inc_lock_ref(each) for each in (other, node, node)]

        assert system.cache.dec_lock_ref(node) == 0

        assert system.cache.view().receipts == ((None, (1,)), (None, (1, 2)))
        refused(system, "CACHE-13", system.cache.dec_lock_ref, receipts[1])
        assert system.cache.dec_lock_ref(receipts[2]) == 1
        assert system.cache.dec_lock_ref(receipts[0]) == 1

    @clause("CACHE-13")
    @sharing
    def test_what_is_not_open_cannot_be_unlocked(self, kind: str) -> None:
        system, elsewhere = (self.stocked(page_size=1, kind=kind) for _ in range(2))
        node = system.insert([1], 1).last_device_node
        foreign = elsewhere.insert([1], 1).last_device_node
        receipt = system.cache.inc_lock_ref(node)
        system.cache.dec_lock_ref(receipt)
        keep = system.cache.inc_lock_ref(system.cache.match_prefix([9]).last_device_node)

        for never in (receipt, node, foreign, elsewhere.cache.inc_lock_ref(foreign), None, -1, "x"):
            refused(system, "CACHE-13", system.cache.dec_lock_ref, never)
        assert system.cache.dec_lock_ref(keep) == 0

    @clause("CACHE-13")
    @sharing
    def test_stale_and_foreign_handles_cannot_be_locked(self, kind: str) -> None:
        system, elsewhere = (self.stocked(page_size=1, kind=kind) for _ in range(2))
        node = system.insert([1], 1).last_device_node
        system.cache.evict(1)
        system.insert([1], 2)

        foreign = elsewhere.insert([1], 1).last_device_node
        for never in (node, foreign, None, 0):
            refused(system, "CACHE-13", system.cache.inc_lock_ref, never)

    # Handles and reset

    @clause("CACHE-14")
    @sharing
    def test_handle_names_its_path_until_its_last_page_goes(self, kind: str) -> None:
        system = self.stocked(page_size=1, page_count=24, kind=kind)
        node = system.insert([1, 2, 3], 1, 2, 3, extra_key="a").last_device_node
        top = system.cache.match_prefix([1], extra_key="a").last_device_node
        system.insert([1, 2, 7], 1, 2, 4, extra_key="a")
        assert system.cache.resolve(node) == ("a", (1, 2, 3))
        assert system.cache.resolve(top) == ("a", (1,))

        system.cache.match_prefix([1, 2, 7], extra_key="a")
        assert system.evict(1) == 1
        system.insert([1, 2, 3], 1, 2, 5, extra_key="a")

        assert system.cache.resolve(node) is None
        assert system.cache.resolve(top) == ("a", (1,))

    @clause("CACHE-14")
    @sharing
    def test_handle_of_a_trimmed_page_stays_stale(self, kind: str) -> None:
        system = self.stocked(page_size=4, kind=kind)
        node = system.insert(ABC, 1, 2, 3).last_device_node
        middle = system.cache.match_prefix(ABC[:8]).last_device_node
        assert system.evict(1) == 4
        assert system.cache.resolve(node) is None

        system.insert(ABC, 1, 2, 4)

        assert system.cache.resolve(node) is None
        assert system.cache.resolve(middle) == (None, tuple(ABC[:8]))
        assert system.cache.match_prefix(ABC).last_device_node != node

    @clause("CACHE-14")
    @sharing
    def test_handle_of_nothing_is_live_until_reset(self, kind: str) -> None:
        system = self.stocked(page_size=1, kind=kind)
        root = system.cache.match_prefix([1], extra_key="a").last_device_node
        system.insert([1], 1)
        assert system.cache.resolve(root) == ("a", ())
        system.evict(1)
        assert system.cache.resolve(root) == ("a", ())
        system.cache.reset()
        system.insert([1], 2)
        assert system.cache.resolve(root) is None

    @clause("CACHE-15")
    @sharing
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_reset_gives_everything_back_and_ages_every_handle(
        self, page_size: int, kind: str
    ) -> None:
        system = self.stocked(page_size, spy=True, kind=kind)
        tokens = list(range(3 * page_size))
        nodes = [system.insert(tokens, 3, 1, 2).last_device_node]
        nodes.append(system.insert(tokens[:page_size], 7, extra_key="b").last_device_node)
        nodes.append(system.cache.match_prefix(tokens[:page_size]).last_device_node)
        nodes.append(system.cache.match_prefix([]).last_device_node)

        system.cache.reset()

        assert [sorted(freed) for freed in system.allocator.frees] == [system.slots(1, 2, 3, 7)]
        assert [system.cache.resolve(node) for node in nodes] == [None] * 4
        assert not system.cache.view().pages
        assert (system.cache.total_size(), system.held_along(tokens)) == (0, [])
        system.insert(tokens, 1, 2, 3)
        assert [system.cache.resolve(node) for node in nodes] == [None] * 4

    @clause("CACHE-16")
    @sharing
    def test_reset_is_refused_while_a_receipt_is_open(self, kind: str) -> None:
        system = self.stocked(page_size=1, kind=kind)
        system.insert([1, 2], 1, 2)
        for key in ([1], [9]):
            receipt = system.cache.inc_lock_ref(system.cache.match_prefix(key).last_device_node)
            refused(system, "CACHE-16", system.cache.reset)
            system.cache.dec_lock_ref(receipt)
        system.cache.reset()
        assert system.cache.total_size() == 0
