"""What a request owns, and what a failure leaves. Spec: CACHE-1 to CACHE-7."""

from typing import Any

import pytest
from hypothesis.stateful import run_state_machine_as_test

from kvspec.conformance import clause
from kvspec.conformance.prefix_cache.engine import Engine
from kvspec.conformance.prefix_cache.system import (
    ABC,
    KINDS,
    CacheConformance,
    Request,
    System,
    numbers,
    refused,
    sharing,
)
from kvspec.conformance.suite import fuzzing
from kvspec.errors import ContractError

__all__ = ["RequestConformance"]


class RequestConformance(CacheConformance):
    """Requests of the radix cache and, where it says something, of the others."""

    # What a request owns

    @clause("CACHE-1")
    @pytest.mark.parametrize("page_size", [1, 4, 16])
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_every_page_has_one_owner_all_along(self, page_size: int, kind: str) -> None:
        system = self.serving(page_size, kind=kind, page_count=128 // page_size)
        first, second = system.admit(range(20)), system.admit(range(24))
        for req, stop in ((first, 9), (second, 18), (first, 20), (second, 24)):
            system.chunk(req, stop)
            system.settle()
        for token in range(6):
            system.step(first, 90 + token)
            system.settle()
        system.finish(first)
        system.settle()
        third = system.admit([*range(20), 90, 91, 92, 7])
        system.chunk(third, 24)
        system.settle()
        for req in (second, third):
            system.finish(req)
            system.settle()

    @clause("CACHE-1")
    def test_random_engines_keep_one_owner_for_every_page(self) -> None:
        run_state_machine_as_test(Engine.of(self), settings=fuzzing(20))

    @clause("CACHE-2")
    @sharing
    @pytest.mark.parametrize("page_size", [1, 4, 16])
    def test_unfinished_request_continues_on_the_pages_of_the_tree(
        self, page_size: int, kind: str
    ) -> None:
        system = self.serving(page_size, page_count=128 // page_size, kind=kind)
        first, second = system.admit(range(20)), system.admit(range(20))
        assert system.compute(first, 20)
        assert system.compute(second, 20)
        own = system.row(second)

        system.chunk(first, 20)
        system.chunk(second, 20)

        whole = 20 // page_size * page_size
        held = system.held_along(range(20))
        assert len(held) == whole
        assert system.row(second) == held + own[whole:]
        assert numbers(second.prefix_indices) == system.row(second)
        assert second.cache_protected_len == whole
        assert system.cache.resolve(second.last_node) == (None, tuple(range(whole)))
        assert system.cache.resolve(second.lock_receipt.node) == (None, tuple(range(whole)))
        assert system.cache.view().receipts == ((None, tuple(range(whole))),) * 2

    @clause("CACHE-2")
    @sharing
    def test_each_chunk_moves_the_lock_and_keeps_one(self, kind: str) -> None:
        system = self.serving(kind=kind)
        req = system.admit(ABC)
        for stop, protected in ((3, 0), (6, 4), (7, 4), (12, 12)):
            system.chunk(req, stop)
            assert req.cache_protected_len == protected
            assert system.cache.view().receipts == ((None, tuple(ABC[:protected])),)
            assert system.cache.protected_size() == protected
        assert system.evict(12) == 0

    @clause("CACHE-2")
    @sharing
    def test_prefix_indices_are_a_copy(self, kind: str) -> None:
        system = self.serving(kind=kind)
        req = system.admit(ABC)
        system.chunk(req, 10)
        before = system.row(req)

        system.pool.write((req.req_pool_idx, slice(0, 2)), [60, 61])
        assert numbers(req.prefix_indices) == before
        req.prefix_indices[0] = 63
        assert system.row(req) == [60, 61, *before[2:]]

    @clause("CACHE-2")
    @sharing
    def test_page_that_another_request_cached_after_a_chunk_ended_inside_it(
        self, kind: str
    ) -> None:
        system = self.serving(kind=kind)
        first, second = system.admit(ABC), system.admit(ABC)
        system.chunk(first, 6)
        system.chunk(second, 12)
        own = system.row(first)[4:]

        system.chunk(first, 12)

        assert system.row(first) == system.held_along(ABC) == system.row(second)
        assert not set(own) & set(system.row(first))
        system.settle()

    @clause("CACHE-3")
    @sharing
    def test_exactly_the_duplicates_come_back(self, kind: str) -> None:
        system = self.serving(spy=True, kind=kind)
        first, second = system.admit(ABC), system.admit([*range(8), 20, 21, 22, 23, 24])
        assert system.compute(second, 13)
        own = system.row(second)
        system.chunk(first, 12)
        assert system.allocator.frees == []

        system.chunk(second, 13)

        assert system.allocator.frees == [sorted(own[:8])]
        assert system.row(second)[8:] == own[8:]
        system.chunk(second, 13)
        assert system.allocator.frees == [sorted(own[:8])]

    @clause("CACHE-3")
    @sharing
    def test_row_of_a_shared_prefix_is_not_given_back(self, kind: str) -> None:
        system = self.serving(spy=True, kind=kind)
        first = system.admit(ABC)
        system.chunk(first, 12)
        second = system.admit([*ABC, 30, 31, 32, 33, 34])
        assert second.cache_protected_len == 12

        system.chunk(second, 17)

        assert system.allocator.frees == []
        system.settle()

    @clause("CACHE-4")
    @sharing
    @pytest.mark.parametrize("page_size", [1, 4, 16])
    @pytest.mark.parametrize("outputs", [0, 1, 2, 7])
    def test_finished_request_leaves_its_whole_pages_and_nothing_else(
        self, page_size: int, outputs: int, kind: str
    ) -> None:
        system = self.serving(page_size, page_count=128 // page_size, kind=kind)
        req = system.admit(range(17))
        system.chunk(req, 17)
        for token in range(outputs):
            system.step(req, 50 + token)

        system.finish(req)

        committed = [*range(17), *range(50, 50 + max(outputs - 1, 0))]
        whole = len(committed) // page_size * page_size
        assert len(system.held_along([*committed, 99])) == whole
        view = system.cache.view()
        assert (len(view.pages) * page_size, view.receipts) == (whole, ())
        assert system.allocator.available_size() == 128 - whole
        assert system.pool.available_size() == 4
        assert req.req_pool_idx is None
        assert req.state()[1:] == ([], None, 0, None)
        system.settle()

    @clause("CACHE-4")
    @sharing
    @pytest.mark.parametrize("beyond", [1, 3, 4, 9])
    def test_what_was_allocated_beyond_the_committed_tokens_comes_back(
        self, beyond: int, kind: str
    ) -> None:
        system = self.serving(kind=kind)
        req = system.admit(range(9))
        assert system.compute(req, 9 + beyond)

        system.finish(req)

        assert system.cache.total_size() == 8
        assert system.allocator.available_size() == 56
        system.settle()

    @clause("CACHE-4")
    @sharing
    def test_duplicates_of_a_finished_request_come_back(self, kind: str) -> None:
        system = self.serving(spy=True, kind=kind)
        first, second = system.admit(range(9)), system.admit(range(9))
        for req in (first, second):
            assert system.compute(req, 9)
        held, own = system.row(first), system.row(second)
        system.finish(first)

        system.finish(second)

        assert system.allocator.frees == [
            system.slots(held[8] // 4),
            sorted(system.slots(*system.pages(own))),
        ]
        assert system.held_along(range(8)) == held[:8]
        system.settle()

    @clause("CACHE-4")
    @sharing
    def test_namespace_of_a_request_is_that_of_its_pages(self, kind: str) -> None:
        system = self.serving(kind=kind)
        for extra_key in ("a", "b", None):
            req = system.admit(range(9), extra_key)
            assert req.cache_protected_len == 0
            system.chunk(req, 9)
            system.finish(req)
        assert sorted(map(str, {key for key, _ in system.cache.view().pages})) == ["None", "a", "b"]
        assert system.cache.total_size() == 24

    @clause("CACHE-5")
    @sharing
    @pytest.mark.parametrize("fault", range(11))
    @pytest.mark.parametrize("call", ["cache_unfinished_req", "cache_finished_req"])
    def test_request_that_is_not_what_it_says_is_refused(
        self, call: str, fault: int, kind: str
    ) -> None:
        system = self.serving(kind=kind)
        other = system.admit(range(40, 48))
        system.chunk(other, 8)
        req = system.admit(ABC)
        system.chunk(req, 8)
        assert system.compute(req, 12)
        req.fill_ids = ABC
        consumed = system.cache.inc_lock_ref(req.last_node)
        system.cache.dec_lock_ref(consumed)
        _spoil(system, req, other, fault, consumed)

        refused(system, "CACHE-5", getattr(system.cache, call), req)

    @clause("CACHE-5")
    @sharing
    def test_finishing_twice_is_refused(self, kind: str) -> None:
        system = self.serving(kind=kind)
        req = system.admit(ABC)
        system.chunk(req, 12)
        system.cache.cache_finished_req(req)
        system.requests.clear()

        refused(system, "CACHE-5", system.cache.cache_finished_req, req)
        req.req_pool_idx = 0
        refused(system, "CACHE-5", system.cache.cache_finished_req, req)

    @clause("CACHE-5")
    @sharing
    @pytest.mark.parametrize("call", ["cache_unfinished_req", "cache_finished_req"])
    def test_request_that_locked_nothing_needs_no_receipt(self, call: str, kind: str) -> None:
        system = self.serving(kind=kind)
        req = system.admit(ABC)
        assert system.compute(req, 12)
        req.fill_ids, req.last_node = ABC, None

        getattr(system.cache, call)(req)

        assert system.held_along(ABC) != []
        assert system.cache.protected_size() == (12 if call == "cache_unfinished_req" else 0)

    @clause("CACHE-6")
    @sharing
    @pytest.mark.parametrize("page_size", [1, 4])
    @pytest.mark.parametrize("call", ["cache_unfinished_req", "cache_finished_req", "evict"])
    def test_operation_whose_free_fails_has_not_happened(
        self, call: str, page_size: int, kind: str
    ) -> None:
        system, req = self._about_to_free(page_size, kind=kind)
        argument = 8 if call == "evict" else req
        before = system.state()

        def fail() -> None:
            raise ContractError("PAGE-10: the allocator refuses")

        system.allocator.on_free = fail
        with pytest.raises(ContractError, match=r"^PAGE-10"):
            getattr(system.cache, call)(argument)
        assert system.state() == before
        system.settle()

        getattr(system.cache, call)(argument)
        assert system.state() != before

    @clause("CACHE-6")
    @sharing
    @pytest.mark.parametrize("page_size", [1, 4])
    @pytest.mark.parametrize("call", ["cache_unfinished_req", "cache_finished_req", "evict"])
    def test_operation_gives_back_in_one_free(self, call: str, page_size: int, kind: str) -> None:
        system, req = self._about_to_free(page_size, kind=kind)
        available = system.allocator.available_size()

        getattr(system.cache, call)(8 if call == "evict" else req)

        assert len(system.allocator.frees) == 1
        (freed,) = system.allocator.frees
        assert len(set(freed)) == len(freed)
        pages = {slot // page_size for slot in freed}
        assert system.allocator.available_size() == available + len(pages) * page_size

    def _about_to_free(self, page_size: int, kind: str) -> tuple[System, Request]:
        """A tree of 8 evictable tokens, and a request with duplicates and a tail."""
        system = self.serving(page_size, page_count=64 // page_size, spy=True, kind=kind)
        req, first = system.admit(range(10)), system.admit(range(10))
        for each in (first, req):
            assert system.compute(each, 10)
        req.fill_ids = req.tokens
        first.fill_ids = first.tokens[:8]
        system.cache.cache_unfinished_req(first)
        system.finish(first)
        system.allocator.frees.clear()
        return system, req

    @clause("CACHE-7")
    @sharing
    @pytest.mark.parametrize(
        "inner", ["match_prefix", "insert", "evict", "inc_lock_ref", "reset", "cache_finished_req"]
    )
    @pytest.mark.parametrize("outer", ["cache_unfinished_req", "cache_finished_req", "evict"])
    def test_call_from_inside_the_allocator_is_refused(
        self, outer: str, inner: str, kind: str
    ) -> None:
        system, req = self._about_to_free(page_size=4, kind=kind)
        arguments: dict[str, tuple[Any, ...]] = {
            "match_prefix": (ABC,),
            "insert": ([70, 71, 72, 73], [60, 61, 62, 63]),
            "evict": (4,),
            "inc_lock_ref": (system.cache.match_prefix([1]).last_device_node,),
            "reset": (),
            "cache_finished_req": (req,),
        }
        before = system.state()
        system.allocator.on_free = lambda: getattr(system.cache, inner)(*arguments[inner])

        with pytest.raises(ContractError, match=r"^CACHE-7"):
            getattr(system.cache, outer)(8 if outer == "evict" else req)

        assert system.state() == before

    @clause("CACHE-7")
    @sharing
    def test_call_from_inside_an_observer_is_refused(self, kind: str) -> None:
        system = self.stocked(kind=kind)
        seen: list[Any] = []
        errors: list[ContractError] = []

        def meddle(operation: Any) -> None:
            seen.append((operation.room, operation.name, numbers(operation.slots)))
            seen.append(system.held_along(ABC[:4]))
            try:
                system.evict(4)
            except ContractError as error:
                errors.append(error)

        system.cache.attach(meddle)
        system.insert(ABC[:4], 1)

        assert seen == [(KINDS[kind].room, "insert", system.slots(1)), system.slots(1)]
        assert [error.clause for error in errors] == ["CACHE-7"]
        assert system.cache.total_size() == 4


def _spoil(system: System, req: Request, other: Request, fault: int, consumed: Any) -> None:
    """Make a request a liar, in one of eleven ways."""
    lies: list[dict[str, Any]] = [
        {"req_pool_idx": None},
        {"req_pool_idx": 3},
        {"fill_ids": [*ABC, 1, 2], "origin_input_ids": [*ABC, 1, 2]},
        {"cache_protected_len": 6},
        {"cache_protected_len": 12},
        {"cache_protected_len": 4},
        {"cache_protected_len": -4},
        {"lock_receipt": None},
        {"lock_receipt": consumed},
        {"lock_receipt": other.lock_receipt},
        {},
    ]
    for name, value in lies[fault].items():
        setattr(req, name, value)
    if not lies[fault]:
        shifted = [slot + 1 for slot in system.row(req)[8:]]
        system.pool.write((req.req_pool_idx, slice(8, 12)), shifted)
