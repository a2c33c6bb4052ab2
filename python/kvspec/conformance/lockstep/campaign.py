"""Many seeds, several processes, one table; a file remembers which seeds are finished."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from kvspec.conformance.lockstep.config import configuration
from kvspec.conformance.lockstep.coverage import COUNTED
from kvspec.conformance.lockstep.history import Failure, History, explore

__all__ = ["Campaign", "Sides", "campaign", "shortfalls", "table"]

ILLEGAL_SHARE = 0.1
"""At least one operation in ten is illegal."""


class Sides(NamedTuple):
    """The modules that hold the two implementations."""

    oracle: str = "kvspec.oracle"
    core: str = "kvspec"


ORACLE_AND_CORE = Sides()


class Campaign(NamedTuple):
    """What a run over many seeds found."""

    seeds: tuple[int, ...]
    operation_count: int
    counts: Counter[str]
    seconds: float
    """Wall time of this run; seeds finished in earlier ones cost none."""
    earlier_count: int
    """Operations of seeds finished in earlier runs."""
    messages: dict[str, tuple[str, str]]
    """Clauses whose errors have one id and two texts."""
    failure: Failure | None
    memory: str


def explore_by_name(seed: int, operation_count: int, sides: Sides, memory: str) -> History:
    """`explore` for another process: the implementations are named, not passed."""
    torch.set_num_threads(1)
    oracle, core = map(import_module, sides)
    return explore(seed, operation_count, oracle, core, configuration(seed, memory))


def campaign(
    seeds: Sequence[int],
    operation_count: int,
    sides: Sides = ORACLE_AND_CORE,
    workers: int = 1,
    resume: Path | None = None,
    progress: Callable[[History], object] = lambda history: None,
    memory: str = "full",
) -> Campaign:
    """Run `operation_count` operations, spread over the seeds, up to the first divergence."""
    each = -(-operation_count // max(len(seeds), 1))
    kind = {"operations": each, "sides": list(sides), "memory": memory}
    finished = _finished(resume, kind) if resume else {}
    counts, messages = Counter[str](), dict[str, tuple[str, str]]()
    done, failure, begin = 0, None, time.perf_counter()
    for seed in finished.keys() & set(seeds):
        counts.update(finished[seed])
        done += each
    earlier = done
    left = [seed for seed in seeds if seed not in finished]
    for history in _histories(left, (each, sides, memory), workers):
        counts.update(history.counts)
        messages.update(history.messages)
        done += history.operation_count
        progress(history)
        if history.failure:
            failure = history.failure
            break
        if resume:
            _remember(resume, kind, history)
    seconds = time.perf_counter() - begin
    return Campaign(tuple(seeds), done, counts, seconds, earlier, messages, failure, memory)


def _histories(seeds: list[int], how: tuple[int, Sides, str], workers: int) -> Iterator[History]:
    if workers == 1:
        yield from (explore_by_name(seed, *how) for seed in seeds)
        return
    # Not fork: torch has threads by now.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(explore_by_name, seed, *how): seed for seed in seeds}
        try:
            for future in as_completed(list(futures)):
                yield future.result()
                del futures[future]
        except BrokenProcessPool:
            open_ = sorted(futures.values())[: 2 * workers]
            raise RuntimeError(f"a process died, probably in one of the seeds {open_}") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(path: Path, kind: dict[str, Any]) -> dict[int, dict[str, int]]:
    """Counts by seed, from the file of an earlier run of the same kind."""
    finished = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        entry = json.loads(line)
        found = {name: entry[name] for name in kind}
        if found != kind:
            raise ValueError(f"{path} is of another run: {found}")
        finished[entry["seed"]] = entry["counts"]
    return finished


def _remember(path: Path, kind: dict[str, Any], history: History) -> None:
    entry = {"seed": history.seed, **kind, "counts": history.counts}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def shortfalls(found: Campaign, minimum: int) -> list[str]:
    """What the run did not see often enough to mean anything."""
    short = [
        f"{name}: {found.counts[name]:,}, fewer than {minimum:,}"
        for name in COUNTED[found.memory]
        if found.counts[name] < minimum
    ]
    if found.counts["illegal"] < ILLEGAL_SHARE * found.operation_count:
        short.append(f"illegal calls: {found.counts['illegal']:,} of {found.operation_count:,}")
    return short


def table(found: Campaign) -> Table:
    """The run in a table: how much, how fast, and what happened how often."""
    seeds = f"seeds {found.seeds[0]} to {found.seeds[-1]}" if found.seeds else "no seeds"
    rate = (found.operation_count - found.earlier_count) / max(found.seconds, 1e-9)
    what = f"lockstep of {found.memory}: {found.operation_count:,} operations, {seeds}"
    title = f"{what}, {found.seconds:.0f} s, {rate:,.0f} operations a second"
    shown = Table(title=title, title_justify="left")
    shown.add_column("seen")
    shown.add_column("count", justify="right")
    shown.add_column("what it is")
    illegal = {"illegal": "calls that both refused alike"}
    for name, meaning in {**COUNTED[found.memory], **illegal}.items():
        shown.add_row(name, f"{found.counts[name]:,}", meaning)
    configs = [configuration(seed, found.memory) for seed in found.seeds]
    kinds = Counter(
        f"page size {one.page_size}, "
        + (f"window of {one.pages_of_window} pages" if one.windowed else one.granularity)
        for one in configs
    )
    for kind, count in sorted(kinds.items()):
        shown.add_row("seeds", str(count), kind)
    return shown
