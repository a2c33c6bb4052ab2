"""Looking over the shoulder of three objects, kvspec's own or somebody else's. Spec: INSTR.

calls       functions before the methods of instances         INSTR-1, INSTR-2, INSTR-4, INSTR-8
sites       who called                                        INSTR-3
effects     what calls do, told to a ledger
locks       who holds a lock                                  CHECK-17
scribe      what calls are, told to a recorder                INSTR-2
listener    actions, and what of them could not be right      INSTR-9
views       what an object holds                              INSTR-7
reading     where a ledger begins, and what it claims         INSTR-6
session     the instrument                                    INSTR-6, INSTR-10
"""

import os
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor

from kvspec.errors import ContractError
from kvspec.flight_recorder import FlightRecorder
from kvspec.instrumentation.calls import Objects, refuse_unfit
from kvspec.instrumentation.fills import PoisonLike
from kvspec.instrumentation.fitness import refuse_unreadable
from kvspec.instrumentation.session import Instrument, require_level
from kvspec.interfaces.instrumentation import Level
from kvspec.poison import KVBuffers, Poison

__all__ = ["Instrument", "instrument"]


def instrument(
    cache: Any,
    allocator: Any,
    pool: Any,
    *,
    level: Level = "ledger",
    record: FlightRecorder | str | os.PathLike[str] | None = None,
    tokens: bool = False,
    host: Any = None,
    poison: PoisonLike | KVBuffers | Iterable[Tensor] | None = None,
    every: int = 0,
) -> Instrument:
    """Look over the shoulder of a cache, an allocator and a request pool (INSTR-1 to INSTR-10).

    `level` is what `check` does, and at `ledger` every call is followed. `record` is a recorder, or
    the path of a log, msgpack if it ends in `.msgpack`; with `tokens` the log has them. `host` is a
    next tier: `size`, `page_size`, `free_slots`. `poison` fills what nobody may read, the tensors
    or a `Poison` of them. With `every`, what `check` would raise after so many actions goes to
    `reports`. The numbers of actions are those of events; with a next tier, whose calls are no
    events, they run ahead. O(pool + resident pages × depth), and then INSTR-10.
    """
    require_level(level)
    if every < 0:
        raise ContractError(f"INSTR-5: every is {every}, not a number of actions")
    objects = Objects(cache, allocator, pool, host)
    refuse_unreadable(objects)
    refuse_unfit(objects)
    filled = _poison(poison, int(allocator.page_size))
    own = record is not None and not isinstance(record, FlightRecorder)
    if isinstance(record, str | os.PathLike):
        packed = os.fspath(record).endswith(".msgpack")
        record = FlightRecorder(record, format="msgpack" if packed else "ndjson", tokens=tokens)
    return Instrument(objects, level, record, filled, every, own_recorder=own)


def _poison(
    given: PoisonLike | KVBuffers | Iterable[Tensor] | None, page_size: int
) -> PoisonLike | None:
    if given is None or isinstance(given, Poison):
        return given
    return cast(PoisonLike, given) if hasattr(given, "fresh") else Poison(given, page_size)
