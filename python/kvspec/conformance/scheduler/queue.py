"""Who comes in, in which order, and with what (SCHED-6, SCHED-7, SCHED-9 to SCHED-14, SCHED-21)."""

from typing import Any

import pytest

from kvspec.conformance import clause
from kvspec.conformance.scheduler.serving import SchedulerSuite, Serving, each_of, tokens
from kvspec.errors import ContractError
from kvspec.scheduler import Req

_NO_NAME: Any = 1.5

REFUSED: list[tuple[str, Any]] = [
    ("the prompt of 'r' is empty", lambda: Req("r", [], 4)),
    ("token -1 of 'r'", lambda: Req("r", [1, -1], 4)),
    ("token 2147483648 of 'r'", lambda: Req("r", [1, 2**31], 4)),
    ("max_new_tokens 0", lambda: Req("r", [1], 0)),
    ("id 'known' is in use", lambda: Req("known", [1], 4)),
    ("extra_key of 'r'", lambda: Req("r", [1], 4, extra_key=_NO_NAME)),
]


def order_after_a_step(serving: Serving) -> list[str]:
    """With one row: who was admitted, and who waits behind."""
    serving.step()
    [live] = serving.view.live
    return [live, *serving.view.waiting]


class Queue(SchedulerSuite):
    @pytest.mark.parametrize(("text", "made"), REFUSED, ids=[text for text, _ in REFUSED])
    @clause("SCHED-6")
    def test_a_request_that_cannot_be_is_refused(self, text: str, made: Any) -> None:
        with self.serving() as serving:
            serving.add("known", tokens(1, 5))
            before = serving.view
            with pytest.raises(ContractError, match="SCHED-6: .*" + text.replace("(", ".")):
                serving.scheduler.add_request(made())
            assert serving.view == before
            serving.finish()
            serving.assert_right()

    @clause("SCHED-6")
    def test_a_request_is_added_once(self) -> None:
        with self.serving() as serving:
            req = serving.add("a", tokens(1, 5))
            for _ in ("waiting", "finished"):
                with pytest.raises(ContractError, match="SCHED-6: request 'a' is"):
                    serving.scheduler.add_request(req)
                serving.finish()
            serving.add("a", tokens(1, 5))
            serving.finish()
            serving.assert_right()

    @pytest.mark.parametrize(("context", "most"), [(512, 64), (30, 30)])
    @clause("SCHED-7")
    def test_what_can_never_fit_is_rejected_and_what_just_fits_is_not(
        self, context: int, most: int
    ) -> None:
        with self.serving(context=context) as serving:
            too_long = serving.add("a", tokens(1, most - 9), 11)
            assert too_long.state == "finished"
            assert too_long.finished_reason is not None
            kind, text = too_long.finished_reason
            assert kind == "reject"
            assert f"{most + 1} slots" in text
            assert f"{most}" in text
            assert serving.view.finished == 1
            assert serving.worker.rows.available_size() == 4
            assert serving.free_pages == 16
            assert [out.rid for out in serving.step()] == ["a"]
            just = serving.serve("b", tokens(1, most - 9), 10)
            assert just.finished_reason is not None
            assert just.finished_reason.kind == "length"
            assert serving.said["b"] == serving.right("b")

    @clause("SCHED-9")
    def test_first_come_first_served(self) -> None:
        with self.serving(rows=1) as serving:
            serving.serve("cached", tokens(1, 13))
            for rid, first in [("a", 2), ("b", 1), ("c", 3)]:
                serving.add(rid, tokens(first, 14))
            assert order_after_a_step(serving) == ["a", "b", "c"]

    @clause("SCHED-9")
    def test_the_longest_prefix_first(self) -> None:
        with self.serving(rows=1, schedule_policy="lpm") as serving:
            serving.serve("cached", tokens(1, 13))
            for rid, own in [("none", 0), ("four", 4), ("twelve", 12), ("eight", 8), ("more", 12)]:
                serving.add(rid, [*tokens(1, own), *tokens(2 + own, 14 - own)])
            assert order_after_a_step(serving) == ["twelve", "more", "eight", "four", "none"]
            serving.finish()
            serving.assert_right()

    @clause("SCHED-9")
    def test_beyond_128_and_without_sharing_everybody_is_served_in_turn(self) -> None:
        with self.serving(rows=1, schedule_policy="lpm", max_prefill_tokens=1) as serving:
            serving.serve("cached", tokens(1, 5))
            for number in range(129):
                serving.add(f"{number}", tokens(1 if number == 70 else 10 + number, 6), 1)
            assert serving.step()[0].rid == "0"
            assert serving.step()[0].rid == "70"  # 128 wait now

    @pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
    @clause("SCHED-9", "SCHED-10")
    def test_where_nothing_is_shared_nobody_waits_for_another(self, policy: str) -> None:
        with self.serving(pages=64, schedule_policy=policy, disable_radix_cache=True) as serving:
            for rid, space in [("a", None), ("b", "x"), ("c", "x")]:
                serving.add(rid, tokens(1, 40), extra_key=space)
            serving.step()
            assert serving.view.running == ("a", "b", "c")
            serving.finish()
            serving.assert_right()

    @clause("SCHED-9")
    def test_along_the_tree_the_heavier_child_first(self) -> None:
        with self.serving(rows=1, schedule_policy="dfs-weight") as serving:
            serving.serve("cached", tokens(1, 9))
            serving.serve("too", tokens(2, 5))
            branches = {"other": (2, 4), "a": (1, 4), "deep": (1, 8), "b": (1, 4), "none": (5, 0)}
            for at, (rid, (first, shared)) in enumerate(branches.items()):
                serving.add(rid, [*tokens(first, shared), *tokens(10 + at, 4)])
            assert order_after_a_step(serving) == ["deep", "a", "b", "other", "none"]
            serving.finish()
            serving.assert_right()

    @pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
    @clause("SCHED-9")
    def test_looking_at_the_queue_touches_nothing(self, policy: str) -> None:
        with self.serving(rows=1, schedule_policy=policy) as serving:
            for first in (1, 2, 3):
                serving.serve(f"{first}", tokens(first, 13))
            serving.add("long", [*tokens(3, 12), 5])
            serving.add("short", [*tokens(1, 4), *tokens(7, 3)])
            serving.add("other", [*tokens(1, 4), *tokens(8, 3)])
            serving.add("more", [*tokens(3, 12), 6])
            serving.add("most", [*tokens(3, 12), 7])
            assert order_after_a_step(serving)[0] == "long"
            pages = serving.cache.view().pages
            last = [pages[None, tuple(tokens(first, 4))].last for first in (1, 2, 3)]
            assert last == sorted(last)

    @clause("SCHED-10")
    def test_who_would_compute_the_same_waits_for_it(self) -> None:
        with self.serving(pages=64, rows=4, schedule_policy="lpm") as serving:
            serving.add("a", [*tokens(1, 33), 5])
            serving.add("b", [*tokens(1, 33), 6])
            serving.add("c", [*tokens(1, 31), *tokens(9, 3)])
            serving.step()
            assert set(serving.view.live) == {"a", "c"}
            serving.step()
            assert serving.reqs["b"].cached_tokens == 32
            serving.finish()
            serving.assert_right()

    @clause("SCHED-10")
    def test_and_for_one_in_the_middle_of_its_prompt(self) -> None:
        with self.serving(pages=64, schedule_policy="lpm", chunked_prefill_size=64) as serving:
            serving.add("a", [*tokens(1, 104), 5])
            serving.step()
            assert serving.view.chunked == "a"
            serving.add("b", [*tokens(1, 104), 6])
            serving.add("c", tokens(2, 9))
            serving.step()  # 41 tokens of a, and 23 are left
            assert set(serving.view.live) == {"a", "c"}
            serving.step()
            assert serving.reqs["b"].cached_tokens == 104
            serving.finish()
            serving.assert_right()

    @clause("SCHED-11")
    def test_who_does_not_fit_is_left_as_it_was(self) -> None:
        with self.serving(pages=8) as serving:
            serving.serve("cached", tokens(1, 9))
            serving.add("a", tokens(2, 12), 5)
            serving.step()
            serving.add("b", [*tokens(1, 8), *tokens(3, 8)], 4)
            serving.step()
            req = serving.reqs["b"]
            assert (req.state, req.req_pool_idx, req.lock_receipt) == ("waiting", None, None)
            assert len(serving.cache.view().receipts) == 1
            assert serving.worker.rows.available_size() == 3
            assert serving.scheduler._get_token_info().evictable_size == 8
            serving.finish()
            serving.assert_right()
            serving.assert_empty()

    @clause("SCHED-11")
    def test_what_the_others_may_still_need_is_kept_for_them(self) -> None:
        with self.serving(pages=8) as serving:
            serving.add("a", tokens(1, 4), 25)
            serving.step()
            serving.add("b", tokens(2, 4), 10)
            serving.step()
            assert serving.view.waiting == ("b",)
            serving.finish()
            assert serving.view.retractions == 0
            serving.assert_right()

    @clause("SCHED-11")
    def test_the_page_that_a_next_token_begins_is_kept_for_it(self) -> None:
        with self.serving(pages=2, disable_overlap_schedule=True) as serving:
            serving.add("a", tokens(1, 3), 3)
            serving.step()
            serving.step()
            assert serving.view.live["a"].allocated == 4
            serving.add("b", tokens(2, 3), 2)
            serving.step()
            assert serving.view.waiting == ("b",)
            serving.finish()
            assert serving.view.retractions == 0
            serving.assert_right()

    @clause("SCHED-11")
    def test_the_batch_itself_is_counted_in_whole_pages(self) -> None:
        with self.serving(pages=4) as serving:
            for first in (1, 2, 3):
                serving.add(f"{first}", tokens(first, 5), 1)
            serving.step()
            assert serving.view.waiting == ("3",)
            serving.finish()
            serving.assert_right()
        with self.serving(pages=5) as serving:
            serving.add("a", tokens(1, 4), 6)
            serving.step()
            serving.add("b", tokens(2, 11), 3)  # 13 tokens in 4 pages, and 13 are left in 3
            serving.step()
            assert serving.view.waiting == ("b",)
            serving.finish()
            serving.assert_right()

    @clause("SCHED-11")
    def test_of_a_window_pool_too(self) -> None:
        with self.serving(
            pages=16, window=4, swa_pages=4, schedule_conservativeness=0.01
        ) as serving:
            for first in (1, 2, 3):
                serving.add(f"{first}", tokens(first, 5), 1)
            serving.step()
            assert serving.view.waiting == ("2", "3")
            serving.finish()
            serving.assert_right()

    @clause("SCHED-12")
    def test_one_token_at_least_is_computed(self) -> None:
        with self.serving() as serving:
            serving.serve("a", tokens(1, 17))
            for rid, length, cached in [("b", 17, 16), ("c", 16, 12), ("d", 8, 4), ("e", 1, 0)]:
                computed = len(serving.worker.begun)
                req = serving.serve(rid, tokens(1, length))
                assert req.cached_tokens == cached
                [batch] = serving.worker.begun[computed:]
                assert batch.extend_lens == (length - cached,)
                assert batch.input_ids.tolist() == tokens(1, length)[cached:]
                assert batch.positions.tolist() == list(range(cached, length))
            serving.assert_right()
            assert serving.scheduler.counters()["cached_tokens"] == 32

    @clause("SCHED-13")
    def test_evicted_is_what_is_short(self) -> None:
        with self.serving(pages=8) as serving:
            for first in (1, 2, 3):
                serving.serve(f"{first}", tokens(first, 9))
            assert serving.free_pages == 2
            serving.serve("fits", tokens(4, 6))
            assert serving.view.evicted_tokens == 0
            assert serving.free_pages == 1
            serving.add("short", tokens(5, 9))
            serving.step()
            assert serving.view.evicted_tokens == 8
            assert serving.free_pages == 0
            assert serving.cached(tokens(2, 9)) == serving.cached(tokens(3, 9)) == 8
            serving.finish()
            serving.assert_right()

    @clause("SCHED-13")
    def test_of_each_pool(self) -> None:
        with self.serving(pages=16, window=4, swa_pages=6) as serving:
            for first in (1, 2):
                serving.serve(f"{first}", tokens(first, 9))
            allocator = serving.worker.allocator
            assert (allocator.full_available_size(), allocator.swa_available_size()) == (48, 8)
            serving.add("short", tokens(5, 9))
            serving.step()
            assert serving.view.evicted_tokens == 4
            assert (allocator.full_available_size(), allocator.swa_available_size()) == (36, 0)
            serving.finish()
            serving.assert_right()

    @clause("SCHED-14")
    @each_of("size", [3, 4, 7], 3)
    def test_a_prompt_goes_on_in_the_next_step_from_where_it_is(self, size: int) -> None:
        with self.serving(chunked_prefill_size=size) as serving:
            serving.add("a", tokens(1, 22), 3)
            serving.add("b", tokens(2, 9), 3)
            committed = 0
            for _ in range(22 // size):
                serving.step()
                committed += size
                assert serving.view.chunked == "a"
                assert serving.view.live["a"].committed == committed
                assert serving.cached(tokens(1, 22)) == committed // 4 * 4
                assert serving.worker.begun[-1].extend_lens == (size,)
                assert serving.reqs["a"].output_ids == []
            serving.step()
            assert len(serving.said["a"]) == 1
            rest = 22 - committed
            assert serving.worker.begun[-1].extend_lens == (rest, min(size - rest, 9))
            serving.finish()
            serving.assert_right()
            assert serving.scheduler.counters()["prefill_tokens"] == 31

    @clause("SCHED-14")
    def test_many_chunks_with_steps_in_flight(self) -> None:
        with self.serving(chunked_prefill_size=4, disable_overlap_schedule=False) as serving:
            serving.add("a", tokens(1, 5), 9)
            serving.step(2)
            serving.add("b", tokens(2, 25), 3)
            serving.finish()
            serving.assert_right()
            assert serving.scheduler.counters()["chunks"] == 7

    @clause("SCHED-21")
    def test_namespaces_share_nothing(self) -> None:
        with self.serving(pages=32, rows=8) as serving:
            spaces = [None, "a", ("a", None), ("a", 1), b"a"]
            for at, space in enumerate(spaces):
                serving.add(f"{at}", tokens(1, 9), extra_key=space)
            serving.step()
            rows = serving.worker.rows.view().rows.values()
            assert len(rows) == 5
            assert len({slot for row in rows for slot in row}) == 45
            serving.finish()
            for at, space in enumerate(spaces):
                req = serving.serve(f"{at}+", [*tokens(1, 9), 3], extra_key=space)
                assert req.cached_tokens == 8
            other = serving.serve("other", tokens(1, 9), extra_key="version 2")
            assert other.cached_tokens == 0
            serving.assert_right()
