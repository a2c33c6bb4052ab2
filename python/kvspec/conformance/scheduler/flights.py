"""Steps in flight, errors, and ends of every kind (SCHED-19, SCHED-20, SCHED-22 to SCHED-25)."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.scheduler.serving import (
    MODES,
    SchedulerSuite,
    Serving,
    each_of,
    in_modes,
    tokens,
)
from kvspec.errors import ContractError, HostMemoryError
from kvspec.scheduler.flight import Flight

_OVERLAP: dict[str, Any] = {"disable_overlap_schedule": False}


def two_in_flight(suite: SchedulerSuite, **options: Any) -> Serving:
    """`a` and `b` decode; the worker holds their first decode step, and `a` will end with it."""
    serving = suite.serving(**_OVERLAP | options)
    serving.add("a", tokens(1, 7), 9)
    serving.add("b", tokens(2, 7), 9)
    serving.reqs["a"].stop_token_ids = frozenset([serving.right("a")[1]])
    assert len(serving.right("a")) == 2
    serving.step()
    serving.worker.held = True
    serving.step()  # returns at once: the step is launched and nobody waits for it
    serving.worker.wait_until_begun(2)
    return serving


@contextmanager
def _interrupted_wait() -> Iterator[None]:
    """Inside, Ctrl-C comes 20 ms after it is first waited for a step. In the background a shell has
    SIGINT ignored.
    """
    assert threading.current_thread() is threading.main_thread()
    main, wait = threading.get_ident(), Flight.outcome
    timer = threading.Timer(0.02, signal.pthread_kill, [main, signal.SIGINT])

    def waited_for(flight: Flight) -> Sequence[int] | BaseException:
        if timer.ident is None:
            timer.start()
        return wait(flight)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with mock.patch.object(Flight, "outcome", waited_for):
            yield
        timer.join()
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


class Flights(SchedulerSuite):
    @clause("SCHED-22")
    def test_the_next_step_is_launched_before_this_one_is_settled(self) -> None:
        with two_in_flight(self) as serving:
            assert serving.view.in_flight == ("a", "b")
            assert [len(said) for said in serving.said.values()] == [1, 1]
            faults = serving.watch_what_flies()
            serving.worker.let(1)
            outputs = serving.step()
            serving.worker.wait_until_begun(3)
            assert [out.rid for out in outputs] == ["a", "b"]
            assert outputs[0].finished_reason is not None
            view = serving.view  # the step after the last word of a is being computed
            assert serving.worker.computing is serving.worker.begun[2]
            assert view.in_flight == ("a", "b")
            assert view.leaving == ("a",)
            assert set(view.live) == {"a", "b"}
            assert serving.worker.rows.available_size() == 2
            row = serving.worker.rows.row(view.live["a"].row)
            assert row.tolist() == serving.worker.begun[2].token_slots[0].tolist()
            serving.worker.release()
            serving.step()
            assert serving.view.leaving == ()
            serving.finish()
            serving.assert_right()
            serving.assert_empty()
            assert not faults
            assert serving.scheduler.counters()["overlapped_steps"] > 5

    @clause("SCHED-22")
    def test_nobody_gets_what_a_step_in_flight_names(self) -> None:
        """Pages are wanted, and only those of a request that has ended in flight are left."""
        with two_in_flight(self, pages=8, schedule_conservativeness=0.001) as serving:
            faults = serving.watch_what_flies()
            serving.add("c", tokens(3, 17), 2)
            serving.worker.let(1)
            thread = threading.Timer(0.02, serving.worker.release)
            thread.start()
            serving.step()
            serving.step()
            thread.join()
            serving.finish()
            serving.assert_right()
            assert not faults

    @clause("SCHED-22", "SCHED-16")
    def test_who_is_in_flight_is_not_put_back(self) -> None:
        with self.serving(pages=6, schedule_conservativeness=0.001, **_OVERLAP) as serving:
            faults = serving.watch_what_flies()
            serving.add("a", tokens(1, 4), 17)
            serving.step()
            serving.add("b", tokens(2, 4), 12)
            for before in serving.rounds():
                if serving.view.retractions > before.retractions:
                    assert len(serving.said["b"]) == len(serving.reqs["b"].output_ids)
            assert serving.view.retractions > 0
            serving.assert_right()
            assert not faults

    @clause("SCHED-23")
    @in_modes("overlap")
    def test_the_words_are_the_same_in_every_mode(self, mode: str) -> None:
        options = {"chunked_prefill_size": 5, "schedule_policy": "lpm"} | MODES[mode]
        with self.serving(pages=14, schedule_conservativeness=0.1, **options) as serving:
            for at, (first, length, new) in enumerate(
                [(1, 9, 12), (1, 13, 4), (2, 5, 9), (1, 9, 5), (3, 33, 9), (2, 1, 1), (1, 9, 12)]
            ):
                stop = [7] if at % 2 else ()
                serving.add(f"{at}", tokens(first, length), new, stop_token_ids=stop)
                serving.step(at % 3)
            serving.finish()
            serving.assert_right()
            serving.assert_empty()

    @clause("SCHED-19")
    @in_modes("overlap")
    @each_of("state", ["waiting", "put back", "chunked", "running"], "chunked", "running")
    def test_a_request_can_be_ended_in_any_state(self, state: str, mode: str) -> None:
        with self.serving(chunked_prefill_size=6, **MODES[mode]) as serving:
            serving.add("other", tokens(2, 3), 12)
            serving.step(2)
            serving.add("a", tokens(1, 14), 9)
            if state == "put back":
                serving.step(4)
                serving.hear(serving.scheduler.retract_all())
            elif state != "waiting":
                serving.step(5 if state == "running" else 1)
            if state == "chunked":
                assert serving.view.chunked == "a"
            said = list(serving.said["a"])
            serving.scheduler.abort_request("a")
            if serving.reqs["a"].state == "leaving":  # it is in flight; once more changes nothing
                before = serving.view
                serving.scheduler.abort_request("a")
                assert serving.view == before
            outputs = [out for out in serving.step() if out.rid == "a"]
            assert [out.token_ids for out in outputs] == [()]
            reason = outputs[0].finished_reason
            assert reason is not None
            assert reason.kind == "abort"
            assert (serving.reqs["a"].state, serving.said["a"]) == ("finished", said)
            assert "a" not in serving.view.live
            serving.finish()
            serving.assert_empty()
            serving.assert_right("other")
            again = serving.add("a", tokens(1, 14), 9)
            serving.finish()
            assert again.output_ids == serving.right("a")

    @clause("SCHED-19", "SCHED-22")
    def test_in_flight_it_keeps_what_is_read(self) -> None:
        with two_in_flight(self) as serving:
            faults = serving.watch_what_flies()
            for rid in ("b", "a", "b"):
                serving.scheduler.abort_request(rid)
            assert serving.view.leaving == ("b", "a")
            assert len(serving.view.live) == 2
            assert serving.view.finished == 2
            assert serving.scheduler.flush_cache() is False
            serving.worker.release()
            outputs = serving.step()
            assert [out.token_ids for out in outputs] == [(), ()]
            assert not faults
            serving.assert_empty()

    @clause("SCHED-20")
    def test_an_id_that_is_not_in_use_cannot_be_ended(self) -> None:
        with self.serving() as serving:
            serving.serve("a", tokens(1, 5))
            before = serving.view
            for rid in ("a", "b"):
                with pytest.raises(ContractError, match=f"SCHED-20: no request '{rid}'"):
                    serving.scheduler.abort_request(rid)
            assert serving.view == before

    @clause("SCHED-25")
    @in_modes("overlap")
    @each_of("at", [0, 1, 2, 3, 5], 1, 3)
    def test_an_error_of_the_worker_ends_the_requests_of_its_step(self, at: int, mode: str) -> None:
        with self.serving(chunked_prefill_size=8, **MODES[mode]) as serving:
            text = "HOST-3: no memory is left"
            serving.worker.errors[at] = error = HostMemoryError(text)
            serving.add("a", tokens(1, 7), 9)
            serving.add("b", tokens(2, 11), 9)
            with pytest.raises(HostMemoryError) as caught:
                serving.finish()
            assert caught.value is error
            assert serving.view.in_flight == ()
            failed = [req for req in serving.reqs.values() if req.finished_reason is not None]
            assert failed
            assert serving.view.failed == len(failed)
            for req in failed:
                assert req.finished_reason == ("error", f"HostMemoryError: {text}")
                assert (req.state, req.req_pool_idx) == ("finished", None)
            serving.scheduler.check_memory()
            serving.add("c", [*tokens(2, 11), 4], 5)
            serving.finish()
            serving.assert_right(*(rid for rid, req in serving.reqs.items() if req not in failed))
            for req in failed:
                assert serving.said[req.rid] == serving.right(req.rid)[: len(req.output_ids)]
            serving.assert_empty()

    @clause("SCHED-25")
    def test_who_was_admitted_meanwhile_waits_on(self) -> None:
        """The step in flight fails when there are rows and locks for a batch already."""
        with self.serving(chunked_prefill_size=8, **_OVERLAP) as serving:
            serving.serve("cached", tokens(3, 9))
            serving.worker.errors[3] = RuntimeError("lost")
            serving.add("a", tokens(1, 5), 19)
            serving.step(2)
            serving.add("b", tokens(2, 4), 4)
            serving.add("c", [*tokens(3, 9), 4, 4, 4], 4)
            with pytest.raises(RuntimeError, match="lost"):
                serving.step()
            assert serving.reqs["a"].state == "finished"
            assert (serving.view.waiting, serving.view.live) == (("b", "c"), {})
            assert serving.reqs["c"].retraction_count == 0
            assert serving.cache.view().receipts == ()
            serving.assert_empty()
            serving.finish()
            serving.assert_right("b", "c")
            serving.assert_empty()

    @clause("SCHED-25")
    @each_of("mode", ["plain", "overlap"], "plain")
    @each_of("wrong", [[], [1, 2, 3], [-1, 4], [2**31, 4], None], [])
    def test_what_it_must_not_sample_is_an_error(self, wrong: list[int] | None, mode: str) -> None:
        with self.serving(**MODES[mode]) as serving:
            serving.worker.wrong[1] = None if wrong is None else torch.tensor(wrong)
            serving.add("a", tokens(1, 7), 9)
            serving.add("b", tokens(2, 7), 9)
            with pytest.raises((ValueError, AttributeError)):
                serving.finish()
            assert serving.view.failed == 2
            serving.assert_empty()
            serving.add("c", tokens(1, 7), 9)
            serving.finish()
            serving.assert_right("c")

    @clause("SCHED-25")
    @each_of("held_at", [1, 2], 2)
    def test_an_interruption_of_who_waits_changes_nothing(self, held_at: int) -> None:
        """Ctrl-C while a prefill, or the older of two decode steps, is being computed."""
        with self.serving(**_OVERLAP) as serving:
            faults = serving.watch_what_flies()
            serving.add("a", tokens(1, 7), 9)
            if held_at == 2:
                serving.step()
            serving.worker.held = True
            if held_at == 2:
                serving.step()
            with _interrupted_wait(), pytest.raises(KeyboardInterrupt):
                serving.scheduler.step()
            assert "a" in serving.view.live
            assert serving.view.in_flight == ("a",)
            serving.scheduler.check_memory()
            assert serving.scheduler.flush_cache() is False
            serving.add("b", tokens(2, 7), 9)
            serving.worker.release()
            serving.finish()
            serving.assert_right()
            serving.assert_empty()
            assert not faults

    @clause("SCHED-23")
    def test_after_close_it_goes_on_without_the_thread(self) -> None:
        with self.serving(**_OVERLAP) as serving:
            serving.add("a", tokens(1, 7), 9)
            serving.step(2)
            serving.scheduler.close()
            serving.scheduler.close()
            serving.finish()
            serving.assert_right()
