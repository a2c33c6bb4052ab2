"""Everything at once, to the end, and what it costs (SCHED-26, SCHED-27, SCHED-29, SCHED-30)."""

from typing import Any

from kvspec.conformance import clause
from kvspec.conformance.scheduler.serving import (
    MODES,
    SchedulerSuite,
    Serving,
    each_of,
    in_modes,
    tokens,
)


class Whole(SchedulerSuite):
    @clause("SCHED-26")
    @in_modes("plain")
    def test_nothing_is_found_after_a_flush(self, mode: str) -> None:
        with self.serving(**MODES[mode]) as serving:
            serving.add("a", tokens(1, 9), 5)
            serving.step()
            before = serving.view, serving.cache.view(), serving.worker.allocator.view()
            assert serving.scheduler.flush_cache() is False
            after = serving.view, serving.cache.view(), serving.worker.allocator.view()
            assert after == before
            serving.finish()
            assert serving.scheduler.flush_cache() is True
            assert serving.cached(tokens(1, 9)) == 0
            assert serving.free_pages == 16 or serving.scheduler.is_hybrid
            assert serving.scheduler._get_token_info().available_size == 64
            assert serving.serve("b", tokens(1, 9), 5).cached_tokens == 0
            serving.assert_right()

    @clause("SCHED-26", "SCHED-27")
    @in_modes("plain")
    def test_a_pause_gives_back_every_page(self, mode: str) -> None:
        """Retract everybody, flush, change the weights, and go on."""
        with self.serving(chunked_prefill_size=6, **MODES[mode]) as serving:
            serving.add("a", tokens(1, 9), 9)
            serving.step(4)
            serving.add("b", tokens(2, 20), 5)
            serving.add("c", tokens(3, 5), 5)
            serving.step()
            assert serving.view.chunked == "b"
            serving.hear(serving.scheduler.retract_all())
            view = serving.view
            assert (view.live, view.in_flight, view.chunked) == ({}, (), None)
            assert set(view.waiting) == {"a", "b", "c"}
            info = serving.scheduler._get_token_info()
            assert info.num_used == 0
            assert info.available_size + info.evictable_size == 64
            serving.assert_empty()
            said = serving.said["a"]
            assert said == list(serving.reqs["a"].output_ids) == serving.right("a")[: len(said)]
            assert serving.scheduler.flush_cache() is True
            assert serving.scheduler._get_token_info().available_size == 64
            assert set(serving.view.waiting) == {"a", "b", "c"}
            serving.finish()
            serving.assert_right()
            assert serving.scheduler.retract_all() == []

    @clause("SCHED-29")
    @in_modes()
    def test_everybody_is_served_however_small_the_pool(self, mode: str) -> None:
        options: dict[str, Any] = {"chunked_prefill_size": 5, "schedule_policy": "lpm"}
        with self.serving(
            pages=8, schedule_conservativeness=0.001, **options | MODES[mode]
        ) as serving:
            asked = 0
            for at in range(8):
                prompt, new = tokens(at % 3, 3 + 5 * at % 17), 3 + 7 * at % 14
                asked += len(prompt) + new
                serving.add(f"{at}", prompt, new)
            assert serving.finish(most=4 * asked) > 0
            assert {req.state for req in serving.reqs.values()} == {"finished"}
            serving.assert_right()

    @clause("SCHED-30")
    @each_of("page_size", [1, 4])
    def test_what_a_step_does_is_counted_and_does_not_grow_with_the_pool(
        self, page_size: int
    ) -> None:
        def work(pages: int) -> list[dict[str, int]]:
            with self.serving(
                pages=pages * 4 // page_size,
                page_size=page_size,
                check_level="off",
                schedule_policy="lpm",
            ) as serving:
                asked = _count_calls(serving)
                for at in range(4):
                    serving.add(f"{at}", tokens(at, 9), 12)
                serving.step()
                for at in range(4, 7):
                    serving.add(f"{at}", tokens(at % 4, 9), 12)
                steps = []
                for _ in range(8):
                    before = _all_counters(serving) | asked
                    serving.step()
                    after = _all_counters(serving) | asked
                    steps.append({name: after[name] - before[name] for name in after})
                serving.finish()
                serving.assert_right()
                return steps

        small, large = work(64), work(1024)
        assert small == large
        for step in small:
            assert step["match_prefix"] == 0  # no row is free: nobody is looked at
            assert step["decode_tokens"] == 4
            assert step["positions_written"] == 4
            assert step["tokens_compared"] == 0


def _all_counters(serving: Serving) -> dict[str, int]:
    """Of the scheduler, of the rows, and of the cache."""
    rows: dict[str, int] = serving.worker.rows.counters()
    cache: dict[str, int] = serving.cache.counters()
    own: dict[str, int] = serving.scheduler.counters()
    return {**own, **rows, **cache}


def _count_calls(serving: Serving) -> dict[str, int]:
    """How often the cache was asked for a prefix."""
    asked = {"match_prefix": 0}
    match = serving.cache.match_prefix

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked["match_prefix"] += 1
        return match(*args, **kwargs)

    serving.cache.match_prefix = counted
    return asked
