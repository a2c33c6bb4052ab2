"""What a radix cache holds: match, insert, structure. Spec: RADIX-1 to RADIX-7."""

from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.system import ABC, numbers, refused
from kvspec.conformance.radix_cache.paths import TreeConformance
from kvspec.prefix_key import RadixKey

__all__ = ["ContentConformance"]

NAMESPACES: list[Any] = [
    *(None, "", "a", "ab", b"a", 1, "1", 0, (), (None,), ("a",), (("a",),)),
    *(("ab", "c"), ("a", "bc"), ("S", None), (None, "S"), "a\0", b""),
]


class ContentConformance(TreeConformance):
    """Match, insert, and what holds of the tree between calls."""

    # Match

    @clause("RADIX-1")
    @pytest.mark.parametrize("page_size", [1, 4, 16])
    def test_match_is_the_longest_prefix_of_whole_pages(self, page_size: int) -> None:
        system = self.tree(page_size=page_size)
        tokens = list(range(4 * page_size))
        system.insert(tokens, 4, 2, 7, 1)
        fork = [*tokens[: 2 * page_size], *range(500, 500 + page_size)]
        system.insert(fork, 4, 2, 9)
        for length in range(len(tokens) + 1):
            whole = length // page_size
            found = system.cache.match_prefix([*tokens[:length], 77])
            assert numbers(found.device_indices) == system.slots(4, 2, 7, 1)[: whole * page_size]
            resolved = (None, tuple(tokens[: whole * page_size]))
            assert system.cache.resolve(found.last_device_node) == resolved
        assert numbers(system.cache.match_prefix(fork).device_indices) == system.slots(4, 2, 9)

    @clause("RADIX-1")
    @pytest.mark.parametrize("length", [0, 1, 15])
    def test_key_below_a_page_matches_nothing(self, length: int) -> None:
        system = self.tree(page_size=16)
        system.insert(range(16), 1)
        found = system.cache.match_prefix(list(range(length)))
        assert numbers(found.device_indices) == []
        assert system.cache.resolve(found.last_device_node) == (None, ())

    @clause("RADIX-1")
    @pytest.mark.parametrize(
        "form",
        [
            list,
            tuple,
            lambda t: torch.tensor(t, dtype=torch.int64),
            lambda t: torch.tensor(t, dtype=torch.int32),
            lambda t: memoryview(array("q", t)),
            RadixKey,
        ],
    )
    def test_key_in_any_form(self, form: Callable[[list[int]], Any]) -> None:
        system = self.tree(page_size=2)
        tokens = [-(2**31), 2**31 - 1, 0, 5]
        system.cache.insert(form(tokens), system.slots(3, 2))
        found = system.cache.match_prefix(form(tokens)).device_indices
        assert found.dtype == torch.int64
        assert numbers(found) == system.slots(3, 2)

    @clause("RADIX-1")
    def test_tokens_are_compared_and_not_their_hashes(self) -> None:
        system = self.tree(page_size=2, page_count=600)
        for a in range(24):
            system.insert([a, 2**24 - a], a + 1)
        assert system.held_along([5, 2**24 - 6]) == []
        for a in range(24):
            assert system.held_along([a, 2**24 - a]) == system.slots(a + 1)
            assert system.held_along([2**24 - a, a]) == []

    @clause("RADIX-2")
    def test_no_two_namespaces_share_a_page(self) -> None:
        system = self.tree()
        for page, extra_key in enumerate(NAMESPACES, 1):
            assert system.held_along([1], extra_key) == []
            system.insert([1], page, extra_key=extra_key)
        for page, extra_key in enumerate(NAMESPACES, 1):
            assert system.held_along([1], extra_key) == [page]
            found = system.cache.match_prefix(RadixKey([1], extra_key))
            assert numbers(found.device_indices) == [page]
            assert system.cache.resolve(found.last_device_node) == (extra_key, (1,))

    @clause("RADIX-2")
    def test_key_with_two_namespaces_is_refused(self) -> None:
        system = self.tree()
        key = RadixKey([1], "a")
        refused(system, "KEY-1", system.cache.match_prefix, key, extra_key="b")
        assert len(system.cache.match_prefix(key, extra_key="a").device_indices) == 0

    @clause("RADIX-3")
    @pytest.mark.parametrize("granularity", ["page", "node"])
    def test_match_makes_recent_and_counts_a_hit(self, granularity: str) -> None:
        system = self.tree(eviction_granularity=granularity)
        system.insert([1, 2, 3], 1, 2, 3, priority=5)
        system.insert([4], 4)
        system.cache.match_prefix([1])

        before = system.cache.view().pages
        system.cache.match_prefix([1, 2, 9])
        after = system.cache.view().pages

        assert list(after) == list(before)
        changed = [page._replace(cut=False) for page in after.values()]
        kept = [page._replace(cut=False) for page in before.values()]
        assert changed == [
            kept[0]._replace(hits=2, last=2),
            kept[1]._replace(hits=1, last=2),
            kept[2]._replace(last=0),
            kept[3]._replace(last=1),
        ]
        assert [page.cut for page in after.values()] == [granularity == "node"] * 4

    @clause("RADIX-3")
    def test_match_without_touch_changes_nothing(self) -> None:
        system = self.tree(eviction_granularity="node")
        system.insert([1, 2, 3], 1, 2, 3)
        system.insert([4], 4)
        before, digest = system.state(), system.cache.digest()

        found = system.cache.match_prefix([1, 2], touch=False)

        assert numbers(found.device_indices) == [1, 2]
        assert found.last_device_node is None
        assert (system.state(), system.cache.digest()) == (before, digest)

    @clause("RADIX-3")
    def test_split_keeps_what_both_halves_had(self) -> None:
        """The pages below a match are as old, as often hit and as important as before it."""
        system = self.tree()
        system.insert([1, 2, 3, 4], 1, 2, 3, 4, priority=7)
        system.cache.match_prefix([1, 2, 3, 4])
        system.insert([8], 8)

        system.cache.match_prefix([1, 2])

        pages = list(system.cache.view().pages.values())[:4]
        assert [page.hits for page in pages] == [2, 2, 1, 1]
        assert [page.born for page in pages] == [0] * 4
        assert [page.priority for page in pages] == [7] * 4
        assert [page.last for page in pages] == [2, 2, 0, 0]

    # Insert

    @clause("RADIX-4")
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_insert_makes_every_whole_page_resident_and_no_other(self, page_size: int) -> None:
        system = self.tree(page_size=page_size)
        tokens = list(range(3 * page_size))
        system.insert(tokens[:page_size], 1, priority=3)
        first = system.cache.view().pages
        system.insert([*tokens, 9][: 3 * page_size + page_size // 2], 1, 2, 3, 4, priority=1)

        pages = system.cache.view().pages
        assert [tokens for _, tokens in pages] == [
            tuple(tokens[: stop * page_size]) for stop in (1, 2, 3)
        ]
        old, *new = pages.values()
        assert old == next(iter(first.values()))._replace(last=0)
        assert [(p.hits, p.priority, p.born, p.last, p.locks) for p in new] == [(0, 1, 1, 0, 0)] * 2

    @clause("RADIX-4")
    def test_insert_raises_a_priority_and_never_lowers_it(self) -> None:
        system = self.tree()
        for priority in (2, 1, 4, 0, -3):
            system.insert([1, 2], 1, 2, priority=priority)
        assert [page.priority for page in system.cache.view().pages.values()] == [4, 4]

    @clause("RADIX-4")
    def test_insert_is_no_hit(self) -> None:
        system = self.tree()
        for _ in range(3):
            system.insert([1, 2], 1, 2)
        assert [page.hits for page in system.cache.view().pages.values()] == [0, 0]

    @clause("RADIX-4")
    def test_chunks_of_a_request_are_no_hits(self) -> None:
        system = self.tree(page_size=4, handed_out=False)
        req = system.admit(ABC)
        for stop in (4, 8, 12):
            system.chunk(req, stop)
        assert [page.hits for page in system.cache.view().pages.values()] == [0, 0, 0]

    # Structure

    @clause("RADIX-5")
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_resident_paths_are_closed_under_prefixes(self, page_size: int) -> None:
        system = self.tree(page_size=page_size)
        tokens = list(range(4 * page_size))
        system.insert(tokens, 1, 2, 3, 4)
        system.insert([*tokens[:page_size], *range(90, 90 + page_size)], 1, 5)
        for _ in range(5):
            pages = system.cache.view().pages
            for key, path in pages:
                stops = range(page_size, len(path), page_size)
                assert all((key, path[:stop]) in pages for stop in stops)
            assert len({page.page for page in pages.values()}) == len(pages)
            system.cache.evict(page_size)
        assert system.cache.total_size() == 0

    @clause("RADIX-6")
    def test_locks_are_the_open_receipts_that_cover_a_page(self) -> None:
        system = self.tree()
        deep = system.insert([1, 2, 3], 1, 2, 3).last_device_node
        first = system.cache.inc_lock_ref(deep)
        side = system.insert([1, 9], 1, 4).last_device_node
        second = system.cache.inc_lock_ref(side)

        def locks() -> list[int]:
            return [page.locks for page in system.cache.view().pages.values()]

        assert locks() == [2, 1, 1, 1]
        assert system.cache.view().receipts == ((None, (1, 2, 3)), (None, (1, 9)))
        system.insert([1, 2, 3, 4], 1, 2, 3, 5)
        assert sorted(locks()) == [0, 1, 1, 1, 2]
        system.cache.dec_lock_ref(first)
        assert sorted(locks()) == [0, 0, 0, 1, 1]
        system.cache.dec_lock_ref(second)
        assert locks() == [0] * 5

    @clause("RADIX-7")
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_sizes_count_pages(self, page_size: int) -> None:
        system = self.tree(page_size=page_size)
        tokens = list(range(3 * page_size))
        sizes = (system.cache.evictable_size, system.cache.protected_size, system.cache.total_size)

        def check(evictable: int, protected: int) -> None:
            expected = [evictable, protected, evictable + protected]
            assert [size() // page_size for size in sizes] == expected

        check(0, 0)
        node = system.insert([*tokens, 1, 2], 1, 2, 3, 4, 5).last_device_node
        check(3 + (2 if page_size == 1 else 0), 0)
        system.cache.evict(2 if page_size == 1 else 0)
        node = system.cache.match_prefix(tokens[: 2 * page_size]).last_device_node
        receipt = system.cache.inc_lock_ref(node)
        check(1, 2)
        system.insert(tokens, 1, 2, 3)
        check(1, 2)
        system.cache.evict(99)
        check(0, 2)
        system.cache.dec_lock_ref(receipt)
        check(2, 0)
