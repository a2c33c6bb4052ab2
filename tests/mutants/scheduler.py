"""Schedulers with one thing broken each."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.scheduler import SchedulerConformance
from kvspec.errors import ContractError
from kvspec.interfaces.prefix_cache import MatchResult
from kvspec.interfaces.scheduler import FinishReason, StepOutput, TokenInfo
from kvspec.scheduler import Req, SchedulePolicy, Scheduler, ServerArgs
from kvspec.scheduler.flight import Flight
from kvspec.scheduler.policy import Queue, _Looked
from kvspec.scheduler.prefill import PrefillAdder
from kvspec.scheduler.slots import Extension, Memory

registry = Registry(SchedulerConformance, oracle)


def adding(broken: type[PrefillAdder]) -> Callable[..., Any]:
    """A scheduler whose steps are filled by another class."""

    def adder(self: Scheduler) -> PrefillAdder:
        made = Scheduler._adder(self)
        made.__class__ = broken
        return made

    return adder


class WithMemory(Scheduler):
    """A scheduler that takes its slots through another class."""

    memory_class: type[Memory]

    def init_memory_pool_and_cache(self, server_args: ServerArgs) -> None:
        super().init_memory_pool_and_cache(server_args)
        self.memory.__class__ = self.memory_class


class WithPolicy(Scheduler):
    """A scheduler whose queue is ordered by another class."""

    policy_class: type[SchedulePolicy]

    def init_memory_pool_and_cache(self, server_args: ServerArgs) -> None:
        super().init_memory_pool_and_cache(server_args)
        self.policy.__class__ = self.policy_class


# Pools and cache


class _Windowless(oracle.ChunkCache):
    def full_evictable_size(self) -> int:
        return 0

    swa_evictable_size = full_protected_size = swa_protected_size = full_evictable_size

    def evict_swa(self, *_: object, **__: object) -> int:
        return 0


@registry.mutant("SCHED-1", "SCHED-28")
class WindowsWithoutTheirCache(Scheduler):
    """The cache for chunks gives no window back."""

    def init_memory_pool_and_cache(self, server_args: ServerArgs) -> None:
        super().init_memory_pool_and_cache(server_args)
        if type(self.tree_cache) is oracle.SWAChunkCache:
            self.tree_cache.__class__ = _Windowless


@registry.mutant("SCHED-1")
class ForgetsThatChunksAreNotShared(Scheduler):
    def init_memory_pool_and_cache(self, server_args: ServerArgs) -> None:
        if server_args.chunked_prefill_size is None:
            server_args = replace(server_args, disable_radix_cache=False)
        super().init_memory_pool_and_cache(server_args)


@registry.mutant("SCHED-2")
class TakesAnyPool(Scheduler):
    @staticmethod
    def _refuse_misfits(server_args: ServerArgs, *_: Any) -> None:
        if server_args.experimental_cpp_radix_tree:
            raise ContractError("SCHED-2: the oracle has none")


@registry.mutant("SCHED-3", "SCHED-24")
class CountsWhatIsLockedAsUsedByNobody(Scheduler):
    def _get_token_info(self) -> TokenInfo:
        info = super()._get_token_info()
        used = info.num_used - self.tree_cache.protected_size()
        return info._replace(num_used=used, token_usage=used / self.max_total_num_tokens)


@registry.mutant("SCHED-4", "SCHED-5")
class LooksAtTheSumsAlone(Scheduler):
    """And so at nothing while anybody is live."""

    def check_memory(self) -> None:
        if not self.live:
            super().check_memory()


@registry.mutant("SCHED-4")
class ComparesPagesAlone(Scheduler):
    """A lock that nobody holds is in no page's way."""

    def check_memory(self) -> None:
        if self.live or not self.tree_cache.protected_size():
            super().check_memory()


@registry.mutant("SCHED-5", "SCHED-8", reports=("KVAI-44",))
class TakesAPromptsSlotsForLost(Scheduler):
    """Between two chunks nothing runs, and so it is called idle."""

    def check_memory(self) -> None:
        chunked, self.chunked_req = self.chunked_req, None
        try:
            super().check_memory()
        finally:
            self.chunked_req = chunked


@registry.mutant("SCHED-5")
class NeverLooks(Scheduler):
    def step(self) -> list[StepOutput]:
        was, self.__dict__["check_memory"] = self.check_memory, lambda: None
        try:
            return super().step()
        finally:
            self.__dict__["check_memory"] = was


# The queue


@registry.mutant("SCHED-6")
class TakesAnyRequest(Scheduler):
    def _refuse_request(self, req: Req) -> None:
        if req.origin_input_ids and req.state == "new":
            with suppress(ContractError):
                super()._refuse_request(req)
        else:
            super()._refuse_request(req)


@registry.mutant("SCHED-7")
class RejectsWhatJustFits(Scheduler):
    def add_request(self, req: Req) -> None:
        self.max_total_num_tokens -= 1
        try:
            super().add_request(req)
        finally:
            self.max_total_num_tokens += 1


@registry.mutant("SCHED-7")
class ARejectedRequestHasARow(Scheduler):
    def add_request(self, req: Req) -> None:
        super().add_request(req)
        if req.state == "finished":
            self.req_to_token_pool.alloc(1)


@registry.mutant("SCHED-8")
class KeepsALengthOfWhoWaits(Scheduler):
    def _retract(self, req: Req) -> None:
        committed = req.kv_committed_len
        super()._retract(req)
        req.kv_committed_len = committed


class _Ordered(SchedulePolicy):
    def calc_priority(self, waiting: Sequence[Req], chunked_req: Req | None = None) -> Queue:
        queue = super().calc_priority(waiting, chunked_req)
        return queue._replace(order=queue.order[::-1]) if self.policy == "lpm" else queue


@registry.mutant("SCHED-9")
class TheShortestPrefixFirst(WithPolicy):
    policy_class = _Ordered


class _Touching(SchedulePolicy):
    def _look(self, req: Req) -> _Looked:
        self.tree_cache.match_prefix(req.tokens[:-1], extra_key=req.extra_key)
        return super()._look(req)


@registry.mutant("SCHED-9", reports=("SE-24",))
class TouchesWhatItLooksAt(WithPolicy):
    policy_class = _Touching


class _Unaware(SchedulePolicy):
    def calc_priority(self, waiting: Sequence[Req], chunked_req: Req | None = None) -> Queue:
        return super().calc_priority(waiting, chunked_req)._replace(behind=frozenset())


@registry.mutant("SCHED-10")
class ComputesTheSameTwice(WithPolicy):
    policy_class = _Unaware


class _Hopeful(PrefillAdder):
    def _has_room_for(self, wanted: int, length: int) -> bool:
        return True


@registry.mutant("SCHED-11")
class LetsEverybodyIn(Scheduler):
    _adder = adding(_Hopeful)


class _InTokens(PrefillAdder):
    def _pages_left(self) -> int:
        left = super()._pages_left() * self.memory.page_size
        return -(-(left + self.memory.page_size - 1) // self.memory.page_size)


@registry.mutant("SCHED-11", reports=("SG-33794",))
class BudgetsInTokens(Scheduler):
    _adder = adding(_InTokens)


class _Careless(PrefillAdder):
    def _pages_left(self) -> int:
        begun = [self.memory.new_pages(req, req.kv_allocated_len + 1) for req in self.running]
        return super()._pages_left() + sum(begun)


@registry.mutant("SCHED-11")
class TakesThePageOfTheNextToken(Scheduler):
    """Who is admitted is retracted at once."""

    _adder = adding(_Careless)


class _Locking(PrefillAdder):
    def add_one_req(self, req: Req) -> bool:
        added = super().add_one_req(req)
        node = None if added else self._match(req).last_device_node
        if node is not None and self.extensions == [] and self.running:
            self.memory.tree_cache.inc_lock_ref(node)
        return added


@registry.mutant(
    *("SCHED-11", "SCHED-8", "SCHED-16", "SCHED-17", "SCHED-22"),
    reports=("SG-21404", "SG-16067"),
)
class LocksWhoIsNotAdmitted(Scheduler):
    _adder = adding(_Locking)


class _Whole(PrefillAdder):
    def _match(self, req: Req) -> MatchResult:
        return self.memory.tree_cache.match_prefix(req.tokens, extra_key=req.extra_key)


@registry.mutant("SCHED-12", "SCHED-8")
class MatchesTheLastTokenToo(Scheduler):
    """All is there, nothing is to be computed, and nothing ever comes out."""

    _adder = adding(_Whole)


class _Greedy(Memory):
    def make_room(self, pages: int, live: Any = ()) -> bool:
        need = pages * self.page_size
        if not self.is_hybrid and self.allocator.available_size() < need:
            evicted = self.tree_cache.evict(need)
            assert isinstance(evicted, int)
            self.evicted_tokens += evicted
        return super().make_room(pages, live)


@registry.mutant("SCHED-13", reports=("SE-23",))
class EvictsAllThatItWants(WithMemory):
    """And not what is short."""

    memory_class = _Greedy


class _Always(Memory):
    def make_room(self, pages: int, live: Any = ()) -> bool:
        if not self.is_hybrid and self.tree_cache.evictable_size() > 4 * self.page_size:
            evicted = self.tree_cache.evict(1)
            assert isinstance(evicted, int)
            self.evicted_tokens += evicted
        return super().make_room(pages, live)


@registry.mutant("SCHED-13")
class EvictsWhenNothingIsShort(WithMemory):
    memory_class = _Always


@registry.mutant(
    *("SCHED-14", "SCHED-5", "SCHED-8", "SCHED-17", "SCHED-23", "SCHED-26", "SCHED-27"),
    reports=("JAX-971",),
)
class LosesCountOfChunks(Scheduler):
    """The third chunk is taken for the last, and the request ends while its prompt goes on."""

    def _take_in(self, mode: Any, each: Extension, sampled: Sequence[int]) -> None:
        req = each.req
        super()._take_in(mode, each, sampled)
        if req is self.chunked_req and not sampled:
            chunks: dict[str, int] = self.__dict__.setdefault("chunks", {})
            chunks[req.rid] = chunks.get(req.rid, 0) + 1
            if chunks[req.rid] == 3:
                self._release(req)


class _Overfull(PrefillAdder):
    def _fitting(self, req: Req, length: int) -> int:
        budget = self.rem_chunk_tokens
        self.rem_chunk_tokens = None if budget is None else budget + (budget > 0)
        fits = super()._fitting(req, length)
        self.rem_chunk_tokens = budget
        return fits


@registry.mutant("SCHED-14", "SCHED-25")
class ComputesATokenTooMany(Scheduler):
    _adder = adding(_Overfull)


# Running


@registry.mutant("SCHED-15", "SCHED-11", "SCHED-16", "SCHED-22", "SCHED-24")
class ReservesAPage(Scheduler):
    def _next_token(self, req: Req) -> Extension:
        extension = super()._next_token(req)
        reserve = min(extension.reserve + self.page_size, req.most_slots)
        return extension._replace(reserve=max(reserve, extension.reserve))


@registry.mutant("SCHED-16")
class PutsTheOldestBack(Scheduler):
    def _retract_one(self) -> None:
        candidates = self.live
        if len(candidates) > 1:
            self._retract(max(candidates, key=lambda req: (len(req.output_ids), -req.arrival)))
        else:
            super()._retract_one()


@registry.mutant("SCHED-16", "SCHED-17", reports=("SE-26",))
class ThrowsAwayWhatWasComputed(Scheduler):
    """Of who is put back: its pages are freed, and go into no tree."""

    def _retract(self, req: Req) -> None:
        req.kv_committed_len = -1
        super()._retract(req)


@registry.mutant("SCHED-16", "SCHED-8", "SCHED-17", "SCHED-27")
class ForgetsWhatWasSaid(Scheduler):
    def _retract(self, req: Req) -> None:
        super()._retract(req)
        req._output.clear()


@registry.mutant(
    *("SCHED-16", "SCHED-17", "SCHED-26", "SCHED-27", "SCHED-8"),
    reports=("SG-22862",),
)
class LosesTheTailOfWhoIsPutBack(Scheduler):
    """Its row goes on from the end of the prefix, over slots that nobody else knows."""

    def _retract(self, req: Req) -> None:
        super()._retract(req)
        self.token_to_kv_pool_allocator.alloc(self.page_size)


@registry.mutant("SCHED-16", "SCHED-22", reports=("VLA-16315",))
class PutsBackBeforePagesCome(Scheduler):
    """A step in flight is about to give pages back, and it retracts until nobody is left."""

    def _launch_decode(self) -> Flight | None:
        assert all(req.tokens_in_flight >= 0 for req in self.running), "SCHED-22: late words"
        while extensions := [self._next_token(req) for req in self._to_decode()]:
            pages = sum(self.memory.new_pages(each.req, each.reserve) for each in extensions)
            if self.memory.make_room(pages, self.live):
                return self._launch("decode", extensions, pages)
            if not self._move_on():
                self._retract_one()
        return None


@registry.mutant("SCHED-17", reports=("VL-49620", "SEED-9"))
class TakesInWhatComesLate(Scheduler):
    """Who is put back while a step of it is in flight has the word of that step, too."""

    def retract_all(self) -> list[StepOutput]:
        for req in [req for req in self.live if req.tokens_in_flight]:
            self._retract(req)
        return super().retract_all()

    def _take_in(self, mode: Any, each: Extension, sampled: Sequence[int]) -> None:
        if each.req.state == "waiting":
            for token in sampled:
                each.req._output.append(token)
        else:
            super()._take_in(mode, each, sampled)


@registry.mutant("SCHED-18", reports=("SG-24745",))
class CachesATokenThatWasNotComputed(Scheduler):
    """The step in flight was counted as done when it was launched."""

    def _release(self, req: Req) -> None:
        if req.is_prefilled and req.kv_allocated_len >= req.length:
            req._output.append(3)
            try:
                self.tree_cache.cache_finished_req(req)
            finally:
                req._output.pop()
            req.wait()
        else:
            super()._release(req)


@registry.mutant("SCHED-18")
class CachesATokenTooFew(Scheduler):
    def _release(self, req: Req) -> None:
        if req.finished_reason is not None and len(req.output_ids) == 8:
            req._output.pop()
            self.tree_cache.cache_finished_req(req)
            req._output.append(0)
            req.wait()
        else:
            super()._release(req)


@registry.mutant("SCHED-18", "SCHED-22", "SCHED-25", reports=("SG-1797",))
class FreesTheLateSlotItself(Scheduler):
    """Right where a step is settled at once, and once too often where it was in flight."""

    def _release(self, req: Req) -> None:
        row = req.req_pool_idx
        if row is not None and not self.server_args.disable_overlap_schedule:
            slots = self.req_to_token_pool.row(row)
            if len(slots) > req.kv_committed_len and len(slots) % self.page_size == 1:
                self.token_to_kv_pool_allocator.free(slots[-1:])
        super()._release(req)


# Ends


@registry.mutant("SCHED-19", reports=("JAX-984",))
class AbortForgetsThePromptInTheMiddle(Scheduler):
    """It is not among those that run."""

    def abort_request(self, rid: str) -> None:
        req = self._in_use.get(rid)
        if req is not None and req is self.chunked_req:
            self.chunked_req = None
            req.state, req.finished_reason = "finished", FinishReason("abort")
            self._outputs.append(StepOutput(rid, (), req.finished_reason))
            del self._in_use[rid]
        else:
            super().abort_request(rid)


@registry.mutant("SCHED-19", "SCHED-22")
class AnAbortedRequestSpeaksOn(Scheduler):
    def _take_in(self, mode: Any, each: Extension, sampled: Sequence[int]) -> None:
        reason = each.req.finished_reason
        if reason is not None and reason.kind == "abort":
            self._outputs.append(StepOutput(each.req.rid, tuple(sampled), None))
        super()._take_in(mode, each, sampled)


@registry.mutant("SCHED-20")
class IgnoresWhatItDoesNotKnow(Scheduler):
    def abort_request(self, rid: str) -> None:
        with suppress(ContractError):
            super().abort_request(rid)


class _Nameless(PrefillAdder):
    def _match(self, req: Req) -> MatchResult:
        return self.memory.tree_cache.match_prefix(req.tokens[:-1])


@registry.mutant("SCHED-21", reports=("MILES-2783",))
class IgnoresTheNamespace(Scheduler):
    _adder = adding(_Nameless)


# In flight


@registry.mutant("SCHED-22", "SCHED-19", reports=("SG-18803",))
class ReleasesWhatAStepReads(Scheduler):
    """The row and the pages of a request that has ended go back at once."""

    def _let_go(self) -> None:
        for req in list(self.leaving):
            self.leaving.remove(req)
            self._release(req)
            req.state = "finished"
            del self._in_use[req.rid]


@registry.mutant(
    *(
        "SCHED-23",
        "SCHED-14",
        "SCHED-16",
        "SCHED-17",
        "SCHED-18",
        "SCHED-19",
        "SCHED-22",
        "SCHED-25",
    )
)
class SaysTheWordBefore(Scheduler):
    """A decode step is launched with the newest word that is known, not with the one in flight."""

    def _next_token(self, req: Req) -> Extension:
        extension = super()._next_token(req)
        if extension.token_ids[0] < 0:
            return extension._replace(token_ids=[req.output_ids[-1]])
        return extension


class _Unrecorded(Memory):
    def _take(self, extensions: Sequence[Extension]) -> None:
        super()._take(extensions)
        for each in extensions:
            if each.reserve > each.stop and len(each.token_ids) == 1:
                each.req.kv_allocated_len = each.stop
                self.allocator.alloc(self.page_size)


@registry.mutant("SCHED-24", reports=("JAX-1147",))
class LosesTheSlotsOfDrafts(WithMemory):
    """It takes them anew in every step, and its lengths do not know of them."""

    memory_class = _Unrecorded


@registry.mutant("SCHED-24")
class HoldsMoreThanItDrafts(Scheduler):
    def _next_token(self, req: Req) -> Extension:
        extension = super()._next_token(req)
        if self.server_args.speculative_num_draft_tokens:
            return extension._replace(reserve=min(extension.reserve + 4, req.most_slots))
        return extension


@registry.mutant("SCHED-25")
class AnErrorLeaks(Scheduler):
    """Whoever was in the step stays where they were."""

    def _fail(self, error: BaseException) -> None:
        self.flights = []


@registry.mutant("SCHED-25")
class AnErrorIsKeptFromTheCaller(Scheduler):
    def step(self) -> list[StepOutput]:
        try:
            return super().step()
        except (MemoryError, RuntimeError):
            return []


@registry.mutant("SCHED-25")
class AnInterruptionIsAnError(Scheduler):
    """What it waits for may be written yet when its pages have other owners."""

    def _settle_oldest(self) -> None:
        try:
            super()._settle_oldest()
        except KeyboardInterrupt as error:
            self._fail(error)
            raise


# All at once


@registry.mutant("SCHED-26")
class FlushesUnderWhoIsLive(Scheduler):
    def flush_cache(self) -> bool:
        live = self.live
        if live and not self.flights:
            self.retract_all()
        super().flush_cache()
        return not live


@registry.mutant("SCHED-26", "SCHED-27", "SCHED-2", reports=("LMD-4917",))
class FlushLeavesTheTree(Scheduler):
    """Weights change, and what the old ones computed is found."""

    def flush_cache(self) -> bool:
        return not self.live and not self.flights


@registry.mutant(
    *("SCHED-27", "SCHED-8", "SCHED-16", "SCHED-17", "SCHED-26"), reports=("SG-33783",)
)
class APauseKeepsItsLocks(Scheduler):
    """Nobody runs, and the prefixes of those who did cannot be evicted."""

    def retract_all(self) -> list[StepOutput]:
        self._settle_all_but(None)
        for req in self.live:
            if req.last_node is not None:
                self.tree_cache.inc_lock_ref(req.last_node)
        return super().retract_all()


@registry.mutant("SCHED-27", "SCHED-26")
class APauseForgetsThePromptInTheMiddle(Scheduler):
    def retract_all(self) -> list[StepOutput]:
        chunked, self.chunked_req = self.chunked_req, None
        try:
            return super().retract_all()
        finally:
            self.chunked_req = chunked


class _Impatient(Memory):
    def leave_behind(self, req: Req) -> None:
        if self.is_hybrid and req.kv_committed_len > 4:
            self.swa_left += self.swa_cache.evict_swa(
                req, req.kv_committed_len, sliding_window_size=1
            )


@registry.mutant("SCHED-28")
class GivesAWindowBackTooEarly(WithMemory):
    memory_class = _Impatient


class _Hoarding(Memory):
    def leave_behind(self, req: Req) -> None:
        """Keep them."""


@registry.mutant("SCHED-28")
class NeverGivesAWindowBack(WithMemory):
    memory_class = _Hoarding
