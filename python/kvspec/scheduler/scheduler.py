"""The loop: order the queue, admit, make room, launch a step, settle one. Spec: SCHED."""

from collections.abc import Sequence

from kvspec.errors import ContractError
from kvspec.interfaces.memory_checker import SWATokenInfo
from kvspec.interfaces.model_runner import ModelWorker
from kvspec.interfaces.scheduler import (
    FinishReason,
    LiveReq,
    SchedulerView,
    StepOutput,
    TokenInfo,
)
from kvspec.memory_checker import check_memory, get_swa_token_info
from kvspec.prefix_key import namespace_frame
from kvspec.scheduler.drafts import accepted, guess
from kvspec.scheduler.flight import Flight, Launcher, Mode
from kvspec.scheduler.policy import SchedulePolicy
from kvspec.scheduler.pools import has_windows, make_cache, refuse_misfits, shares, usable_size
from kvspec.scheduler.prefill import NewTokenRatio, PrefillAdder
from kvspec.scheduler.req import TOKEN_LIMIT, Req
from kvspec.scheduler.server_args import ServerArgs
from kvspec.scheduler.slots import Extension, Memory
from kvspec.scheduler.sums import check_sums, token_info

__all__ = ["Scheduler"]

_COUNTERS = (
    *("steps", "prefill_tokens", "cached_tokens", "decode_tokens", "draft_tokens"),
    *("accepted_draft_tokens", "chunks", "retractions", "overlapped_steps"),
)


class Scheduler:
    """One replica's loop over a worker's pools and a prefix cache (SCHED-1 to SCHED-30).

    `step()` until `is_idle`; `close()` ends the thread that steps are computed in with overlap.
    """

    def __init__(self, server_args: ServerArgs, tp_worker: ModelWorker) -> None:
        self.server_args, self.tp_worker = server_args, tp_worker
        self.waiting_queue: list[Req] = []
        self.running: list[Req] = []
        self.chunked_req: Req | None = None
        self.leaving: list[Req] = []
        self.flights: list[Flight] = []
        self.new_token_ratio = NewTokenRatio(server_args.schedule_conservativeness)
        self._in_use: dict[str, Req] = {}
        self._outputs: list[StepOutput] = []
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self._arrivals = self._finished = self._failed = 0
        self.init_memory_pool_and_cache(server_args)
        self._launcher = Launcher(tp_worker, overlap=not server_args.disable_overlap_schedule)

    # Pools and cache.

    _refuse_misfits = staticmethod(refuse_misfits)
    _make_cache = staticmethod(make_cache)

    def init_memory_pool_and_cache(self, server_args: ServerArgs) -> None:
        """Take the worker's pools and make the cache over them, as the source document chooses it
        (SCHED-1, SCHED-2).
        """
        rows, allocator = self.tp_worker.get_memory_pool()
        window = self.tp_worker.sliding_window_size if has_windows(allocator) else None
        self._refuse_misfits(server_args, rows, allocator, window)
        self.req_to_token_pool, self.token_to_kv_pool_allocator = rows, allocator
        self.page_size, self.is_hybrid = allocator.page_size, has_windows(allocator)
        self.max_total_num_tokens = usable_size(allocator)
        self.tree_cache = self._make_cache(server_args, rows, allocator, window)
        self.memory = Memory(
            rows,
            allocator,
            self.tree_cache,
            sliding_window_size=window,
            shares=shares(server_args),
        )
        policy = "fcfs" if server_args.disable_radix_cache else server_args.schedule_policy
        self.policy = SchedulePolicy(policy, self.tree_cache)

    # Requests.

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, is live or in flight."""
        return not self._in_use and not self.flights

    @property
    def in_flight(self) -> Flight | None:
        """The step that was launched last, if it is not settled."""
        return self.flights[-1] if self.flights else None

    @property
    def live(self) -> list[Req]:
        """Those that own something: the chunked, the running and the leaving."""
        chunked = [] if self.chunked_req is None else [self.chunked_req]
        return [*chunked, *self.running, *self.leaving]

    def add_request(self, req: Req) -> None:
        """Queue a request; one that could not be served with all else gone ends here (SCHED-6,
        SCHED-7). O(tokens).
        """
        self._refuse_request(req)
        self._arrivals += 1
        req.arrival = self._arrivals
        self._in_use[req.rid] = req
        most = min(self.max_total_num_tokens, self.req_to_token_pool.max_context_len)
        if req.most_slots > most:
            text = f"SCHED-7: it may need {req.most_slots} slots, and there are {most}"
            self._end(req, FinishReason("reject", text))
            return
        req.state = "waiting"
        self.waiting_queue.append(req)

    def _refuse_request(self, req: Req) -> None:
        if req.state != "new":
            raise ContractError(f"SCHED-6: request {req.rid!r} is {req.state}, not new")
        if req.rid in self._in_use:
            raise ContractError(f"SCHED-6: id {req.rid!r} is in use")
        if not req.origin_input_ids:
            raise ContractError(f"SCHED-6: the prompt of {req.rid!r} is empty")
        if req.max_new_tokens < 1:
            raise ContractError(f"SCHED-6: max_new_tokens {req.max_new_tokens} is below 1")
        low, high = min(req.origin_input_ids), max(req.origin_input_ids)
        if low < 0 or high >= TOKEN_LIMIT:
            wrong = low if low < 0 else high
            raise ContractError(f"SCHED-6: token {wrong} of {req.rid!r} is not in [0, 2^31)")
        try:
            namespace_frame(req.extra_key)
        except (ContractError, TypeError) as error:
            raise ContractError(f"SCHED-6: extra_key of {req.rid!r}: {error}") from None

    def abort_request(self, rid: str) -> None:
        """End a request in any state (SCHED-19, SCHED-20). O(its row)."""
        req = self._in_use.get(rid)
        if req is None:
            raise ContractError(f"SCHED-20: no request {rid!r} waits or is live")
        if req.state != "leaving":
            self._end(req, FinishReason("abort", "aborted by the caller"))

    # The loop.

    def step(self) -> list[StepOutput]:
        """One round: what came out, and who ended, since the step before.

        An error of the worker comes out too, after its requests have been ended; what else came
        out is in the next round's (SCHED-25).
        """
        self._settle_all_but(self._may_fly_on(self.in_flight))
        worked = bool(self.flights)
        launched = self._launch_prefill() or self._launch_decode()
        worked |= launched is not None
        self._counts["overlapped_steps"] += len(self.flights) > 1
        self._settle_all_but(self._may_fly_on(launched))
        if self.is_idle or self.server_args.check_every_step or not (worked or self.live):
            self.check_memory()
        if self.is_idle:
            self.new_token_ratio.reset()
        outputs, self._outputs = self._outputs, []
        return outputs

    def _may_fly_on(self, flight: Flight | None) -> Flight | None:
        """The step, if the next one can be launched before it is settled: a decode step, with
        overlap. Any other is in flight at the end of a round only if somebody was interrupted.
        """
        if flight is None or flight.mode == "prefill" or self.server_args.disable_overlap_schedule:
            return None
        return flight

    def _launch_prefill(self) -> Flight | None:
        """Go on with the chunked request and admit from the queue, if there is room for it."""
        if self.chunked_req is not None:
            self.memory.leave_behind(self.chunked_req)
        adder = self._adder()
        if self.chunked_req is not None and not adder.add_chunked_req(self.chunked_req):
            return None
        admitted = self._admit(adder)
        if not adder.extensions:
            return None
        try:
            self._settle_all_but(None)
        except BaseException:
            for req in admitted:  # it has a row and a lock, and waits still
                self._release(req)
            raise
        self._enter(adder.extensions, admitted)
        return self._launch("prefill", adder.extensions, adder.taken_pages)

    def _adder(self) -> PrefillAdder:
        ratio = self.new_token_ratio.value
        return PrefillAdder(self.memory, self.server_args, self.running, ratio)

    def _admit(self, adder: PrefillAdder) -> list[Req]:
        """Find requests of the queue that fit; the last may be begun only (SCHED-14)."""
        begun = adder.extensions and adder.extensions[0].stop < adder.extensions[0].req.length
        free = self.server_args.max_running_requests - len(self.live)
        if begun or free <= 0 or not self.waiting_queue:
            return []
        self.waiting_queue, behind = self.policy.calc_priority(self.waiting_queue, self.chunked_req)
        admitted: list[Req] = []
        for req in self.waiting_queue:
            if len(admitted) == free:
                break
            if req.rid in behind:
                continue
            if not adder.add_one_req(req):
                break
            admitted.append(req)
            if adder.extensions[-1].stop < req.length:
                break
        return admitted

    def _enter(self, extensions: Sequence[Extension], admitted: Sequence[Req]) -> None:
        """Those admitted are live, and who has a last or a first chunk is where it belongs."""
        for req in admitted:
            self.waiting_queue.remove(req)
            self._counts["cached_tokens"] += req.cache_protected_len
            if not req.was_admitted:
                req.was_admitted, req.cached_tokens = True, req.cache_protected_len
        if self.chunked_req is not None and extensions[0].stop == self.chunked_req.length:
            self.running.append(self.chunked_req)
            self.chunked_req.state, self.chunked_req = "running", None
        for req in admitted:
            req.state = "running"
            self.running.append(req)
        last = extensions[-1]
        if last.stop < last.req.length and last.req is not self.chunked_req:
            self.running.remove(last.req)
            self.chunked_req, last.req.state = last.req, "chunked"

    def _launch_decode(self) -> Flight | None:
        """A token, and drafts, for everyone who runs; whoever does not fit is retracted."""
        while extensions := [self._next_token(req) for req in self._to_decode()]:
            pages = sum(self.memory.new_pages(each.req, each.reserve) for each in extensions)
            if self.memory.make_room(pages, self.live):
                self.new_token_ratio.decoded()
                return self._launch("decode", extensions, pages)
            if self.flights:
                self._settle_all_but(None)
            elif not self._move_on():
                self._retract_one()
        return None

    def _move_on(self) -> bool:
        """Of a window pool, locks hold the windows that requests had when they were prefilled:
        have them hold the newest ones (SCHED-28). Whether any has moved.
        """
        moved = False
        for req in self.running if self.is_hybrid else ():
            before = req.cache_protected_len
            self._cache_unfinished(req)
            moved |= req.cache_protected_len > before
        return moved

    def _cache_unfinished(self, req: Req) -> None:
        req.fill_ids = req.tokens[: req.kv_committed_len]
        self.tree_cache.cache_unfinished_req(req)

    def _to_decode(self) -> list[Req]:
        """Those whose next token can be computed and is wanted."""
        return [
            req
            for req in self.running
            if req.remaining > 0 and (req.tokens_in_flight or req.is_prefilled)
        ]

    def _next_token(self, req: Req) -> Extension:
        """Its newest token, which may be one that the step in flight samples, and a draft."""
        start, drafts = req.kv_committed_len + req.tokens_in_flight, 0
        if req.tokens_in_flight:
            token_ids = [-1 - self.flights[-1].sample_of(req)]
        else:
            drafts = min(self.server_args.speculative_num_draft_tokens, req.remaining - 1)
            token_ids = [req.output_ids[-1]]
        if drafts:
            token_ids += guess(req.tokens, drafts)
        reserve = min(start + 1 + drafts, req.most_slots)
        return Extension(req, start, token_ids, range(len(token_ids)), reserve)

    def _launch(self, mode: Mode, extensions: Sequence[Extension], pages: int) -> Flight:
        fits = self.memory.make_room(pages, self.live)
        assert fits, "SCHED-11: there was room for what was added"
        batch = self.memory.forward_batch(extensions)
        tokens = len(batch.input_ids)
        self._counts["steps"] += 1
        self._counts["prefill_tokens" if mode == "prefill" else "decode_tokens"] += tokens
        if mode == "decode":
            self._counts["draft_tokens"] += tokens - len(extensions)
            for each in extensions:
                each.req.tokens_in_flight += 1
        else:
            self._counts["chunks"] += sum(not each.sampled for each in extensions)
        flight = self._launcher.launch(mode, extensions, batch, self.in_flight)
        self.flights.append(flight)
        return flight

    # Settling.

    def _settle_all_but(self, kept: Flight | None) -> None:
        """Settle what is in flight, the oldest first; who is interrupted meanwhile can go on."""
        while self.flights and self.flights[0] is not kept:
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        """Take in what a step sampled; its error ends its requests, and those of the step after it
        (SCHED-25).
        """
        outcome = self.flights[0].outcome()
        if isinstance(outcome, BaseException):
            for after in self.flights[1:]:
                after.outcome()
            self._fail(outcome)
            raise outcome
        flight, at = self.flights.pop(0), 0
        for each in flight.extensions:
            self._take_in(flight.mode, each, outcome[at : at + len(each.sampled)])
            at += len(each.sampled)
        self._let_go()

    def _take_in(self, mode: Mode, each: Extension, sampled: Sequence[int]) -> None:
        req = each.req
        if mode == "decode":
            req.tokens_in_flight -= 1
        if req.state not in ("chunked", "running"):  # it has ended while this was in flight
            return
        if mode == "prefill":
            req.kv_committed_len = each.stop
            new = list(sampled)
        else:
            new = accepted(each.token_ids[1:], sampled)
        came_out = 0
        reason = None
        for token in new:
            req.put_out(token)
            came_out += 1
            reason = _reason_to_end(req, token)
            if reason is not None:
                break
        if mode == "decode":
            self._counts["accepted_draft_tokens"] += came_out - 1
        if reason is not None:
            self._end(req, reason, came_out)
            return
        if came_out:
            self._outputs.append(StepOutput(req.rid, tuple(req.output_ids[-came_out:]), None))
        if mode == "prefill":
            self._cache_unfinished(req)

    def _fail(self, error: BaseException) -> None:
        """Nothing in flight is being computed any more: end whoever is in it."""
        failed, self.flights = self.flights, []
        reason = FinishReason("error", f"{type(error).__name__}: {error}")
        for each in (each for flight in failed for each in flight.extensions):
            each.req.tokens_in_flight = 0
            if each.req.state in ("chunked", "running"):
                self._failed += 1
                self._end(each.req, reason)
        self._let_go()

    # Ends.

    def _end(self, req: Req, reason: FinishReason, came_out: int = 0) -> None:
        """Say that a request has ended; what it owns goes when no step in flight names it."""
        self._leave_lists(req)
        req.finished_reason = reason
        self._finished += 1
        new = tuple(req.output_ids[len(req.output_ids) - came_out :])
        self._outputs.append(StepOutput(req.rid, new, reason))
        req.state = "leaving"
        self.leaving.append(req)
        self._let_go()

    def _leave_lists(self, req: Req) -> None:
        if req is self.chunked_req:
            self.chunked_req = None
        for line in (self.waiting_queue, self.running):
            if req in line:
                line.remove(req)

    def _let_go(self) -> None:
        """Release those that have ended and that no step in flight names (SCHED-22)."""
        for req in list(self.leaving):
            if not any(flight.names(req) for flight in self.flights):
                self.leaving.remove(req)
                self._release(req)
                req.state = "finished"
                del self._in_use[req.rid]

    def _release(self, req: Req) -> None:
        """Cache what it has computed, and give back its row, its lock and all else (SCHED-16,
        SCHED-18, SCHED-19).
        """
        if req.req_pool_idx is None:
            return
        if req.is_prefilled:
            self.tree_cache.cache_finished_req(req)
        else:
            row = self.req_to_token_pool.row(req.req_pool_idx)
            self.token_to_kv_pool_allocator.free(row[req.cache_protected_len :])
            if req.lock_receipt is not None:
                self.tree_cache.dec_lock_ref(req.lock_receipt)
            self.req_to_token_pool.free(req.req_pool_idx)
        req.wait()

    def _retract_one(self) -> None:
        """The one with the fewest tokens out, of these the longest prompt, goes back to the queue;
        the last one ends, if not even that has room.
        """
        candidates = self.live
        if len(candidates) > 1:
            self._retract(min(candidates, key=_order_of_retraction))
            self.new_token_ratio.retracted(self.running)
            return
        room, page = self.memory.room(), self.page_size
        text = f"SCHED-16: it is alone, and there is room for {room.full * page} tokens"
        self._end(candidates[0], FinishReason("abort", text))

    def _retract(self, req: Req) -> None:
        self._leave_lists(req)
        self._release(req)
        req.state = "waiting"
        req.retraction_count += 1
        self._counts["retractions"] += 1
        self.waiting_queue.append(req)

    # All at once.

    def retract_all(self) -> list[StepOutput]:
        """Settle what is in flight, and make every live request wait (SCHED-27)."""
        self._settle_all_but(None)
        for req in self.live:
            self._retract(req)
        outputs, self._outputs = self._outputs, []
        return outputs

    def flush_cache(self) -> bool:
        """Empty everything, unless somebody is live (SCHED-26). O(pool)."""
        if self.live or self.flights:
            return False
        self.tree_cache.reset()
        self.req_to_token_pool.clear()
        self.token_to_kv_pool_allocator.clear()
        return True

    def close(self) -> None:
        """End the thread that steps are computed in; requests stay as they are."""
        self._launcher.close()

    # What there is.

    def check_memory(self) -> None:
        """Raise MemoryLeakError unless every page and row, and with nothing live every lock, has
        one owner (SCHED-4).
        """
        live = self.live
        if not live and self.server_args.check_level != "off":
            check_sums(self.token_to_kv_pool_allocator, self.req_to_token_pool, self.tree_cache)
        check_memory(
            self.token_to_kv_pool_allocator,
            self.req_to_token_pool,
            self.tree_cache,
            reqs=live,
            level=self.server_args.check_level,
        )

    def _get_token_info(self) -> TokenInfo:
        """The source's four numbers, of the full pool if there are two (SCHED-3). O(1)."""
        return token_info(self.token_to_kv_pool_allocator, self.tree_cache)

    def _get_swa_token_info(self) -> SWATokenInfo:
        """The source's eight numbers (SCHED-3). O(1)."""
        return get_swa_token_info(self.memory.swa_allocator, self.memory.swa_cache)

    def view(self) -> SchedulerView:
        """The abstract state. O(waiting + live)."""
        flying = [each.req.rid for flight in self.flights for each in flight.extensions]
        return SchedulerView(
            waiting=tuple(req.rid for req in self.waiting_queue),
            chunked=self.chunked_req.rid if self.chunked_req else None,
            running=tuple(req.rid for req in self.running),
            leaving=tuple(req.rid for req in self.leaving),
            in_flight=tuple(dict.fromkeys(flying)),
            live={req.rid: _live(req) for req in self.live},
            finished=self._finished,
            failed=self._failed,
            retractions=self._counts["retractions"],
            evicted_tokens=self.memory.evicted_tokens,
            swa_left=self.memory.swa_left,
        )

    def counters(self) -> dict[str, int]:
        """Exact costs so far (SCHED-30)."""
        return {**self._counts, "evicted_tokens": self.memory.evicted_tokens}


def _reason_to_end(req: Req, token: int) -> FinishReason | None:
    if token in req.stop_token_ids:
        return FinishReason("stop", f"token {token}")
    if len(req.output_ids) >= req.max_new_tokens:
        return FinishReason("length", f"{req.max_new_tokens} tokens")
    return None


def _order_of_retraction(req: Req) -> tuple[int, int, int]:
    return len(req.output_ids), -len(req.origin_input_ids), -req.arrival


def _live(req: Req) -> LiveReq:
    assert req.req_pool_idx is not None, "SCHED-8: a live request has a row"
    return LiveReq(
        row=req.req_pool_idx,
        protected=req.cache_protected_len,
        committed=req.kv_committed_len,
        allocated=req.kv_allocated_len,
        output=len(req.output_ids),
    )
