"""What a live request has, and what it leaves. Spec: SCHED-8, SCHED-15 to 18, 24 and 28."""

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


def assert_owned(serving: Serving) -> None:
    """One row and one lock for each who is live, and nothing for the others."""
    view, rows = serving.view, serving.worker.rows.view().rows
    assert sorted(live.row for live in view.live.values()) == sorted(rows)
    shares = not serving.cache.disable
    assert len(serving.cache.view().receipts) == (len(view.live) if shares else 0)
    for rid, req in serving.reqs.items():
        if rid in view.live:
            live = view.live[rid]
            assert live.row == req.req_pool_idx
            assert len(rows[live.row]) == live.allocated
            assert 0 <= live.protected <= live.committed <= live.allocated
            assert live.allocated <= len(req.origin_input_ids) + req.max_new_tokens - 1
            assert (req.lock_receipt is not None) is shares
        else:
            lengths = req.cache_protected_len, req.kv_committed_len, req.kv_allocated_len
            assert lengths == (0, 0, 0)
            assert (req.req_pool_idx, req.lock_receipt) == (None, None)
            assert req.prefix_indices.numel() == 0


def short_of_pages(suite: SchedulerSuite, **options: Any) -> Serving:
    """`a` decodes; `b` and `c` were admitted in the hope that it stops early, which it does not."""
    serving = suite.serving(pages=11, schedule_conservativeness=0.001, **options)
    serving.add("a", tokens(1, 4), 29)
    serving.step()
    serving.add("b", tokens(2, 4), 14)
    serving.add("c", tokens(3, 6), 10)
    serving.step()
    assert set(serving.view.live) == {"a", "b", "c"}
    return serving


def until_retraction(serving: Serving, count: int = 1) -> None:
    for _ in serving.rounds():
        if serving.view.retractions >= count:
            return
    raise AssertionError("SCHED-16: nobody was retracted")


class Running(SchedulerSuite):
    @clause("SCHED-8")
    @in_modes("plain")
    def test_who_owns_what(self, mode: str) -> None:
        with self.serving(
            pages=10,
            chunked_prefill_size=6,
            schedule_conservativeness=0.01,
            check_every_step=True,
            **MODES[mode],
        ) as serving:
            for at, (first, length, new) in enumerate(
                [(1, 9, 12), (1, 13, 4), (2, 5, 9), (1, 9, 5), (3, 21, 9), (2, 1, 1)]
            ):
                serving.add(f"{at}", tokens(first, length), new)
            for step, _ in enumerate(serving.rounds()):
                assert_owned(serving)
                if step == 6:
                    serving.hear(serving.scheduler.retract_all())
                    assert_owned(serving)
            serving.assert_right()
            serving.assert_empty()

    @clause("SCHED-15")
    @each_of("page_size", [1, 4], 4)
    def test_a_page_is_taken_where_one_begins(self, page_size: int) -> None:
        with self.serving(pages=64 // page_size, page_size=page_size) as serving:
            serving.add("a", tokens(1, 4), 12)
            serving.add("b", tokens(2, 6), 12)
            serving.step()
            for step in range(10):
                held = {rid: live.allocated for rid, live in serving.view.live.items()}
                assert held == {"a": 4 + step, "b": 6 + step}
                pages = sum(-(-length // page_size) for length in held.values())
                assert serving.free_pages == 64 // page_size - pages
                serving.step()
                batch = serving.worker.begun[-1]
                assert batch.extend_lens == (1, 1)
                assert batch.positions.tolist() == [4 + step, 6 + step]

    @clause("SCHED-16")
    def test_who_said_least_and_asked_most_gives_way(self) -> None:
        with short_of_pages(self) as serving:
            until_retraction(serving)
            view = serving.view
            assert view.waiting == ("c",)
            assert set(view.live) == {"a", "b"}
            req = serving.reqs["c"]
            assert (req.retraction_count, req.state) == (1, "waiting")
            said = list(req.output_ids)
            assert said == serving.said["c"] == serving.right("c")[: len(said)]
            assert len(said) > 1

    @clause("SCHED-16")
    @in_modes("plain")
    def test_what_it_has_computed_is_cached_and_the_rest_given_back(self, mode: str) -> None:
        with short_of_pages(self, **MODES[mode]) as serving:
            serving.step(2)
            before = serving.view
            serving.hear(serving.scheduler.retract_all())
            assert serving.view.retractions == before.retractions + len(before.live)
            for rid, live in before.live.items():
                req = serving.reqs[rid]
                said = [*req.origin_input_ids, *req.output_ids]
                committed = len(said) - 1
                assert committed >= live.committed
                assert serving.cached(said) == (not serving.cache.disable) * (committed // 4 * 4)
            serving.assert_empty()
            serving.finish()
            serving.assert_right()

    @clause("SCHED-16", "SCHED-17")
    def test_the_last_one_is_never_put_back(self) -> None:
        with self.serving(pages=8, rows=8, schedule_conservativeness=0.001) as serving:
            for first in range(1, 6):
                serving.add(f"{first}", tokens(first, 3), 20)
                serving.step()
            serving.finish()
            assert serving.view.retractions > 1
            serving.assert_right()
            assert all(req.output_ids for req in serving.reqs.values())

    @clause("SCHED-16")
    def test_nobody_gives_way_while_somebody_may_end(self) -> None:
        """Of those in flight one ends, and its pages are enough."""
        with self.serving(
            pages=4, disable_overlap_schedule=False, schedule_conservativeness=0.001
        ) as serving:
            serving.add("a", tokens(1, 4), 9)
            serving.step()
            stop = serving.right("a")
            serving.add("b", tokens(2, 4), 4)
            serving.reqs["b"].stop_token_ids = frozenset([serving.right("b")[2]])
            serving.finish()
            assert serving.view.retractions == 0
            assert serving.said["a"] == stop
            serving.assert_right()

    @clause("SCHED-17")
    @in_modes("overlap")
    def test_who_was_put_back_goes_on_with_the_same_words(self, mode: str) -> None:
        with self.serving(pages=24, chunked_prefill_size=6, **MODES[mode]) as serving:
            serving.add("a", tokens(1, 9), 9)
            serving.add("b", tokens(2, 6), 12)
            serving.add("c", tokens(3, 20), 5)
            for _ in range(4):
                serving.step(3)
                serving.hear(serving.scheduler.retract_all())
            serving.finish()
            serving.assert_right()
            reqs = serving.reqs.values()
            assert sum(req.retraction_count for req in reqs) == serving.view.retractions > 4

    @clause("SCHED-17")
    def test_it_computes_what_is_not_cached_and_no_more(self) -> None:
        with self.serving() as serving:
            serving.add("a", tokens(1, 9), 9)
            serving.step(4)
            assert len(serving.said["a"]) == 4
            serving.hear(serving.scheduler.retract_all())
            assert serving.cached([*tokens(1, 9), *serving.said["a"]]) == 12
            serving.step()
            assert serving.worker.begun[-1].positions.tolist() == [12]
            assert serving.reqs["a"].cached_tokens == 0  # when it was first admitted
            serving.finish()
            serving.assert_right()

    @clause("SCHED-18")
    @in_modes("plain")
    @each_of("new", [1, 4, 7, 8], 1, 8)
    def test_the_last_token_is_not_cached(self, mode: str, new: int) -> None:
        with self.serving(**MODES[mode]) as serving:
            serving.serve("a", tokens(1, 5), new)
            said = [*tokens(1, 5), *serving.said["a"], 3, 3, 3, 3]
            kept = 0 if serving.cache.disable else (4 + new) // 4 * 4
            assert serving.cached(said) == serving.cache.total_size() == kept
            serving.assert_right()
            serving.assert_empty()

    @clause("SCHED-18")
    @in_modes("overlap")
    def test_nor_is_what_was_computed_beyond_a_word_that_ends_it(self, mode: str) -> None:
        with self.serving(vocabulary=3, **MODES[mode]) as serving:
            for first in range(1, 6):
                req = serving.add(f"{first}", tokens(first, 7), 12, stop_token_ids=[1])
                serving.finish()
                length = 0 if serving.cache.disable else 7 + len(req.output_ids) - 1
                assert serving.cached([*tokens(first, 7), *req.output_ids]) == length // 4 * 4
                serving.assert_empty()
                serving.scheduler.flush_cache()
            serving.assert_right()
            assert any(len(req.output_ids) < 12 for req in serving.reqs.values())

    @clause("SCHED-24")
    @each_of("page_size", [1, 4, 16], 4)
    @each_of("drafts", [1, 3, 5], 5)
    def test_drafts_hold_so_many_slots_more_and_lose_none(
        self, drafts: int, page_size: int
    ) -> None:
        with self.serving(
            pages=96 // page_size,
            page_size=page_size,
            vocabulary=2,
            speculative_num_draft_tokens=drafts,
        ) as serving:
            serving.add("a", tokens(1, 5), 20)
            serving.add("b", tokens(2, 9), 20)
            serving.step()
            used = 0
            for _ in serving.rounds():
                pages = 0
                for rid, live in serving.view.live.items():
                    req = serving.reqs[rid]
                    more = live.allocated - live.committed
                    assert 0 <= more <= drafts
                    used += more > 0
                    most = len(req.origin_input_ids) + req.max_new_tokens - 1
                    assert live.allocated <= most
                    pages += -(-live.allocated // page_size)
                assert serving.scheduler._get_token_info().num_used == pages * page_size
            serving.assert_right()
            serving.assert_empty()
            assert used > 0
            counters = serving.scheduler.counters()
            assert counters["accepted_draft_tokens"] > 0
            assert counters["decode_tokens"] > counters["accepted_draft_tokens"]
            assert len(serving.worker.begun) < 20  # without drafts it would be one and 19

    @clause("SCHED-28")
    @each_of("mode", [mode for mode in MODES if "windows" in mode], "windows alone")
    def test_windows_left_behind_make_room(self, mode: str) -> None:
        """40 tokens each, in a window pool for 16 of both."""
        with self.serving(pages=24, rows=2, **MODES[mode] | {"swa_pages": 6}) as serving:
            serving.add("a", tokens(1, 6), 34)
            serving.add("b", tokens(2, 6), 34)
            serving.finish()
            serving.assert_right()
            assert serving.view.retractions == 0
            assert serving.view.swa_left + serving.view.evicted_tokens > 0
            serving.assert_empty()

    @clause("SCHED-28")
    @each_of("mode", ["plain", "overlap", "alone", "drafts"], "alone")
    @each_of("window", [1, 4, 5, 9], 5)
    def test_no_window_that_is_still_read_is_given_back(self, window: int, mode: str) -> None:
        """In the smallest pool that may be."""
        swa_pages = -(-window // 4) + 2
        with self.serving(window=window, swa_pages=swa_pages, **MODES[mode]) as serving:
            faults = serving.watch_what_flies()
            serving.add("a", tokens(1, 13), 30)
            serving.finish()
            serving.assert_right()
            assert not faults
            assert serving.view.swa_left + serving.view.evicted_tokens > 0
