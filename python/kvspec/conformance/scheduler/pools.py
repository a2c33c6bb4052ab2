"""Which cache it is, what it is told, and what it refuses (SCHED-1 to SCHED-5)."""

from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.scheduler.serving import SchedulerSuite, each_of, tokens
from kvspec.errors import ContractError, MemoryLeakError
from kvspec.memory_checker import get_swa_token_info
from kvspec.scheduler import Req, ServerArgs

_WHOLE: dict[str, Any] = {"chunked_prefill_size": None}
_ALONE: dict[str, Any] = {"disable_radix_cache": True}
_WINDOW: dict[str, Any] = {"window": 5, "swa_pages": 8}

CHOICES: list[tuple[str, dict[str, Any], bool]] = [
    ("RadixCache", {}, False),
    ("RadixCache", _WHOLE, False),
    ("RadixCache", _WHOLE | _ALONE, True),
    ("ChunkCache", _ALONE, True),
    ("SWARadixCache", _WINDOW, False),
    ("SWARadixCache", _WINDOW | _WHOLE | _ALONE, True),
    ("SWAChunkCache", _WINDOW | _ALONE, True),
]

REFUSED: list[dict[str, Any]] = [
    {"chunked_prefill_size": 0},
    {"max_prefill_tokens": 0},
    {"max_running_requests": 0},
    {"max_running_requests": 5},
    {"schedule_policy": "sjf"},
    {"implementation": "rust"},
    {"check_level": "all"},
    {"eviction_policy": "none"},
    {"schedule_conservativeness": 0.0},
    {"enable_hierarchical_cache": True},
    {"speculative_num_draft_tokens": -1},
    {"speculative_num_draft_tokens": 1, "disable_overlap_schedule": False},
    {"window": 9, "swa_pages": 4},
    {"window": 9, "swa_pages": 5, "speculative_num_draft_tokens": 4},
]


class Pools(SchedulerSuite):
    @pytest.mark.parametrize(("name", "options", "disable"), CHOICES)
    @clause("SCHED-1")
    def test_the_cache_is_the_one_that_the_source_chooses(
        self, name: str, options: dict[str, Any], disable: bool
    ) -> None:
        with self.serving(**options) as serving:
            scheduler, worker = serving.scheduler, serving.worker
            assert type(scheduler.tree_cache) is getattr(self.impl, name)
            assert scheduler.tree_cache.disable is disable
            pools = scheduler.req_to_token_pool, scheduler.token_to_kv_pool_allocator
            assert pools == worker.get_memory_pool()
            assert scheduler.max_total_num_tokens == 64
            assert scheduler.is_hybrid is ("window" in options)

    @clause("SCHED-1", "SCHED-2")
    def test_the_native_tree_has_the_sources_name_and_the_oracle_has_none(self) -> None:
        if self.impl_name == "native":
            with self.serving(experimental_cpp_radix_tree=True) as serving:
                assert type(serving.cache).__name__ == "RadixCacheCpp"
                serving.serve("a", tokens(1, 9))
                serving.serve("b", tokens(1, 9))
                assert serving.reqs["b"].cached_tokens == 8
                serving.assert_right()
        else:
            with pytest.raises(ContractError, match="SCHED-2"):
                self.serving(experimental_cpp_radix_tree=True)

    @pytest.mark.parametrize("options", REFUSED, ids=lambda each: next(iter(each)))
    @clause("SCHED-2")
    def test_options_that_cannot_be_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ContractError) as caught:
            self.serving(**options)
        assert caught.value.clause == "SCHED-2"

    @clause("SCHED-2")
    def test_pools_that_are_in_use_are_refused(self) -> None:
        with self.serving() as serving:
            serving.serve("a", tokens(1, 9))
            before = serving.view, serving.cache.view()
            with pytest.raises(ContractError, match="SCHED-2: 0 rows and 8 slots") as caught:
                serving.scheduler.init_memory_pool_and_cache(serving.args)
            assert caught.value.clause == "SCHED-2"
            assert (serving.view, serving.cache.view()) == before
            assert serving.scheduler.flush_cache()
            serving.scheduler.init_memory_pool_and_cache(serving.args)
            serving.serve("b", tokens(1, 9))
            serving.assert_right()

    @clause("SCHED-3")
    def test_how_full_the_pool_is(self) -> None:
        with self.serving() as serving:
            serving.serve("before", tokens(1, 9))
            serving.add("a", tokens(2, 9))
            serving.step()
            info = serving.scheduler._get_token_info()
            assert info == (12, 12 / 64, 44, 8)
            serving.finish()
            assert serving.scheduler._get_token_info().num_used == 0

    @clause("SCHED-3")
    def test_how_full_two_pools_are(self) -> None:
        with self.serving(window=5, swa_pages=8) as serving:
            serving.add("a", tokens(2, 9))
            serving.step()
            info = serving.scheduler._get_swa_token_info()
            assert info == get_swa_token_info(serving.worker.allocator, serving.cache)
            assert (info.full_num_used, info.swa_num_used) == (12, 12)
            assert (info.full_token_usage, info.swa_token_usage) == (12 / 64, 12 / 32)
            assert serving.scheduler._get_token_info() == (12, 12 / 64, 52, 0)

    @clause("SCHED-4")
    def test_a_page_a_row_or_a_lock_without_an_owner_is_told_when_nobody_is_live(self) -> None:
        with self.serving() as serving:
            scheduler, worker = serving.scheduler, serving.worker
            serving.serve("a", tokens(1, 9))
            node = serving.cache.match_prefix(tokens(1, 8)).last_device_node
            state = serving.view, serving.cache.view()
            lost = worker.allocator.alloc(4)
            text = (
                "^token_to_kv_pool_allocator memory leak detected! self.max_total_num_tokens=64, "
                "available_size=52, evictable_size=8, protected_size=0\n$"
            )
            with pytest.raises(MemoryLeakError, match=text):
                scheduler.check_memory()
            worker.allocator.free(lost)
            rows = worker.rows.alloc(1)
            with pytest.raises(MemoryLeakError, match="req_to_token_pool memory leak detected!"):
                scheduler.check_memory()
            worker.rows.free(rows)
            receipt = serving.cache.inc_lock_ref(node)
            with pytest.raises(MemoryLeakError, match="protected_size=8"):
                scheduler.check_memory()
            serving.cache.dec_lock_ref(receipt)
            serving.assert_empty()
            assert (serving.view, serving.cache.view()) == state

    @clause("SCHED-4")
    def test_two_pools_are_told_in_the_sources_words(self) -> None:
        with self.serving(window=5, swa_pages=8) as serving:
            serving.worker.allocator.alloc(4)
            text = (
                "self.full_tokens_per_layer=64, full_available_size=60, full_evictable_size=0, "
                r"self.tree_cache.full_protected_size\(\)=0\nself.swa_tokens_per_layer=32, "
            )
            with pytest.raises(MemoryLeakError, match=text):
                serving.scheduler.check_memory()

    @pytest.mark.parametrize("level", ["off", "counts", "sets"])
    @clause("SCHED-4")
    def test_while_somebody_is_live_the_level_says_what_is_told(self, level: str) -> None:
        with self.serving(check_level=level, check_every_step=False) as serving:
            serving.add("a", tokens(1, 9))
            serving.step()
            serving.scheduler.check_memory()
            lost = serving.worker.allocator.alloc(4)
            page = int(lost[0]) // 4
            if level == "off":
                serving.scheduler.check_memory()
            else:
                text = rf"page {page}\b" if level == "sets" else "memory leak"
                with pytest.raises(MemoryLeakError, match=text):
                    serving.scheduler.check_memory()

    @pytest.mark.parametrize("always", [False, True])
    @clause("SCHED-5")
    def test_a_step_ends_with_the_check(self, always: bool) -> None:
        with self.serving(check_every_step=always) as serving:
            serving.add("a", tokens(1, 9), 3)
            serving.step()
            serving.worker.allocator.alloc(4)
            if not always:
                serving.step()
            with pytest.raises(MemoryLeakError):
                serving.scheduler.step()

    @clause("SCHED-5")
    @each_of("options", [{}, _ALONE, _WINDOW], {})
    def test_the_check_knows_who_is_in_the_middle_of_a_prompt(
        self, options: dict[str, Any]
    ) -> None:
        with self.serving(chunked_prefill_size=3, check_every_step=True, **options) as serving:
            serving.add("a", tokens(1, 14))
            serving.step()
            assert serving.view.chunked == "a"
            serving.finish()
            serving.assert_right()

    @clause("SCHED-2")
    def test_the_classes_are_there_under_the_fields_names(self) -> None:
        assert (self.impl.Req, self.impl.ServerArgs) == (Req, ServerArgs)
