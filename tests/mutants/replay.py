"""Broken replays, and caches that only a count over a whole trace tells from the right one."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import kvspec.oracle
import kvspec.replay
from kvspec.conformance.mutants import Registry
from kvspec.conformance.replay import ReplayConformance
from kvspec.errors import ContractError
from kvspec.replay import Run, Trace, TraceError

registry = Registry(ReplayConformance, kvspec.oracle)


class Splitting(kvspec.oracle.RadixCache):
    """Knows where a compressed tree would split a run: where a walk ends inside it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ends: set[Any] = set()

    def renew(self, page: Any) -> None:
        """What happens to a page of the upper half."""

    def split_after(self, path: Sequence[Any]) -> None:
        extended = path and any(before is path[-1] for before, _ in self._tree)
        if extended and path[-1] not in self.ends:
            for page in itertools.takewhile(lambda p: p not in self.ends, reversed(path)):
                self.renew(page)
        self.ends.update(path[-1:])

    def _hit(self, path: Sequence[Any]) -> None:
        self.split_after(path)
        super()._hit(path)

    def _adopt(self, claim: Any, priority: int) -> Any:
        self.split_after(claim.resident)
        node = super()._adopt(claim, priority)
        self.ends.add(node)
        return node


@registry.mutant("REPLAY-5", "REPLAY-7", replaces="RadixCache")
class SplitLosesHits(Splitting):
    def renew(self, page: Any) -> None:
        page.hits = 0


@registry.mutant("REPLAY-5", "REPLAY-7", replaces="RadixCache")
class SplitRenewsTheCreationTime(Splitting):
    def renew(self, page: Any) -> None:
        page.born = self._tick


@registry.mutant("REPLAY-1", replaces="read_trace")
def reports_what_could_be_read(path: Any, block: int | None = None) -> Trace:
    try:
        return kvspec.replay.read_trace(path, block)
    except TraceError:
        return Trace(name=str(path), block=4, requests=[])


@registry.mutant("REPLAY-2", replaces="block_tokens")
def forgets_the_upper_half_of_an_id(ids: Any, block: int) -> Any:
    return kvspec.replay.block_tokens(np.asarray(ids, dtype=np.uint64) % 2**32, block)


@registry.mutant("REPLAY-3", "REPLAY-4", "REPLAY-5", "REPLAY-9", "REPLAY-12", replaces="replay")
def drops_a_short_last_block(trace: Trace, **options: Any) -> Run:
    cut = [
        request._replace(hash_ids=request.hash_ids[: request.input_length // trace.block])
        for request in trace.requests
    ]
    return kvspec.replay.replay(trace._replace(requests=cut), **options)


@registry.mutant("REPLAY-4", "REPLAY-3", "REPLAY-5", "REPLAY-9", replaces="replay")
def counts_padding_as_tokens(trace: Trace, **options: Any) -> Run:
    run = kvspec.replay.replay(trace, **options)
    return run._replace(hit_tokens=run.hit_blocks * trace.block)


@registry.mutant("REPLAY-6", replaces="replay")
def matches_the_last_token(trace: Trace, **options: Any) -> Run:
    return kvspec.replay.replay(trace, **{**options, "leave_last_token": False})


@registry.mutant("REPLAY-7", replaces="replay")
def never_compares(trace: Trace, **options: Any) -> Run:
    return kvspec.replay.replay(trace, **{**options, "verify": None})


_calls = itertools.count()


@registry.mutant("REPLAY-8", replaces="generate")
def depends_on_what_was_generated_before(seed: int, requests: int, block: int) -> Trace:
    return kvspec.replay.generate(seed + next(_calls) + 1, requests, block)


@registry.mutant("REPLAY-9", "REPLAY-7", "REPLAY-12")
class EvictsWindowsFromTheEnd(kvspec.oracle.SWARadixCache):
    def _window_order(self, page: Any) -> tuple[int, int]:
        last, depth = super()._window_order(page)
        return last, -depth


@registry.mutant("REPLAY-9", "REPLAY-7", "REPLAY-12")
class FindsWhatIsWithoutAWindow(kvspec.oracle.SWARadixCache):
    def _usable(self, path: list[Any]) -> list[Any]:
        return path if path and path[-1] not in self._tombstones else super()._usable(path)


@registry.mutant("REPLAY-9", "REPLAY-12", "REPLAY-7")
class LeavesNothingBehind(kvspec.oracle.SWARadixCache):
    """So the lock has to move for every chunk."""

    def evict_swa(self, *_: Any, **__: Any) -> int:
        return 0


@registry.mutant("REPLAY-10", "REPLAY-16", replaces="replay")
def serves_as_well_as_it_can(trace: Trace, **options: Any) -> Run:
    try:
        return kvspec.replay.replay(trace, **options)
    except ContractError:
        return kvspec.replay.replay(trace, impl=options["impl"], capacity=options["capacity"])


@registry.mutant("REPLAY-11", "REPLAY-9", "REPLAY-10", replaces="replay")
def makes_the_window_pool_a_little_smaller_than_the_full_one(trace: Trace, **options: Any) -> Run:
    if options.get("sliding_window") and options.get("swa_ratio") in (None, 1.0):
        options["swa_ratio"] = (options["capacity"] - 1) / options["capacity"]
    return kvspec.replay.replay(trace, **options)


@registry.mutant("REPLAY-12", "REPLAY-9", replaces="replay")
def takes_tombstones_for_live(trace: Trace, **options: Any) -> Run:
    run = kvspec.replay.replay(trace, **options)
    if run.window is None:
        return run
    samples = [s._replace(used=s.used._replace(swa=s.used.full)) for s in run.window.samples]
    return run._replace(window=run.window._replace(samples=tuple(samples)))


@registry.mutant("REPLAY-13", "REPLAY-15", replaces="replay")
def makes_room_for_its_own_books(trace: Trace, **options: Any) -> Run:
    if options.get("check", "counts") != "counts" or options.get("record") is not None:
        options["capacity"] -= 1
    return kvspec.replay.replay(trace, **options)


@registry.mutant("REPLAY-14", "REPLAY-16", replaces="replay")
def looks_at_the_end_alone(trace: Trace, **options: Any) -> Run:
    return kvspec.replay.replay(trace, **{**options, "check": "off"})


@registry.mutant("REPLAY-15", replaces="replay")
def records_the_last_requests_alone(trace: Trace, **options: Any) -> Run:
    """As a ring would."""
    if options.get("record") is not None and len(trace.requests) > 2:
        last = trace._replace(requests=trace.requests[-2:])
        kvspec.replay.replay(last, **options)
        options.update(record=None, tokens=False)
    return kvspec.replay.replay(trace, **options)


@registry.mutant("REPLAY-16", replaces="replay")
def overwrites_the_log(trace: Trace, **options: Any) -> Run:
    if isinstance(options.get("record"), Path):
        options["record"].unlink(missing_ok=True)
    return kvspec.replay.replay(trace, **options)
