"""Broken instruments. Each must fail on the clause it breaks."""

from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest.mock import patch

import kvspec.oracle
from kvspec.conformance.instrumentation import InstrumentConformance
from kvspec.conformance.mutants import Registry
from kvspec.errors import ContractError
from kvspec.instrumentation import Instrument, views
from kvspec.instrumentation.calls import MARK
from kvspec.instrumentation.listener import Listener
from kvspec.instrumentation.sites import Sites

registry = Registry(InstrumentConformance, kvspec.oracle)
_room = import_module("kvspec.instrumentation")


def _instrument(*objects: Any, **options: Any) -> Any:
    return _room.instrument(*objects, **options)


def _made_of(kind: type[Instrument]) -> Callable[..., Any]:
    """`instrument`, which makes one of this kind."""

    def instrument(*objects: Any, **options: Any) -> Any:
        with patch.object(_room, "Instrument", kind):
            return _instrument(*objects, **options)

    instrument.__name__ = kind.__name__
    return instrument


def _while(owner: type, name: str, broken: Any) -> Callable[..., Any]:
    """`instrument`, of which one attribute is broken for each listener or ring that it makes."""
    module = import_module("kvspec.instrumentation.session")
    spoilt = type(owner.__name__, (owner,), {name: broken})

    def instrument(*objects: Any, **options: Any) -> Any:
        made = []

        class Kind(Instrument):
            def _attach(self, view: Any) -> None:
                with patch.object(module, owner.__name__, spoilt):
                    super()._attach(view)

        with patch.object(_room, "Instrument", Kind), patch.object(module, owner.__name__, spoilt):
            made.append(_instrument(*objects, **options))
        return made[0]

    instrument.__name__ = f"{owner.__name__}_{getattr(broken, '__name__', name)}"
    return instrument


@registry.mutant("INSTR-1", replaces="instrument")
def returns_a_copy(cache: Any, allocator: Any, pool: Any, **options: Any) -> Any:
    looking = _instrument(cache, allocator, pool, **options)
    standing = vars(allocator).get("backup_state")
    if standing is not None and not hasattr(allocator, "view"):
        vars(allocator)["backup_state"] = lambda: [standing()]
    return looking


@registry.mutant("INSTR-1", "INSTR-2", replaces="instrument")
def hides_a_refusal(cache: Any, allocator: Any, pool: Any, **options: Any) -> Any:
    looking = _instrument(cache, allocator, pool, **options)
    standing = vars(allocator).get("free")

    def free(*arguments: Any) -> None:
        try:
            standing(*arguments)
        except ContractError:
            return

    if standing is not None and hasattr(allocator, "view"):
        vars(allocator)["free"] = free
    return looking


def _forget_error(self: Any, op: str, args: Any, options: Any, error: BaseException) -> None:
    if self.ledger is not None:
        self.ledger.end()


registry.mutant("INSTR-2", replaces="instrument")(_while(Listener, "failed", _forget_error))


def _inner_is_outer(self: Any, op: str, args: Any, options: Any, frame: Any) -> None:
    Listener.begin(self, op, args, options, frame)
    self.effects.by_cache = False


registry.mutant("INSTR-2", replaces="instrument")(_while(Listener, "begin", _inner_is_outer))


def _nearest_frame(self: Any, action: int, name: str, frame: Any) -> Any:
    mark = action, name, frame.f_code, frame.f_lasti
    self._ring[action % self._count] = mark
    return mark


registry.mutant("INSTR-3", "INSTR-9", replaces="instrument")(_while(Sites, "note", _nearest_frame))


class LeavesItsMark(Instrument):
    def detach(self) -> None:
        super().detach()
        vars(self._objects.allocator)[MARK] = self


registry.mutant("INSTR-4", replaces="instrument")(_made_of(LeavesItsMark))


@registry.mutant("INSTR-5", replaces="instrument")
def hands_out_the_one_that_is_there(cache: Any, allocator: Any, pool: Any, **options: Any) -> Any:
    there = getattr(allocator, "__dict__", {}).get(MARK)
    return there or _instrument(cache, allocator, pool, **options)


@registry.mutant("INSTR-5", replaces="instrument")
def takes_any_pool(cache: Any, allocator: Any, pool: Any, **options: Any) -> Any:
    theirs = getattr(cache, "req_to_token_pool", pool)
    return _instrument(cache, allocator, theirs, **options)


class StandsThereAlways(Instrument):
    @property
    def level(self) -> Any:
        return self._level

    @level.setter
    def level(self, level: Any) -> None:
        if level not in ("off", "counts", "sets", "ledger"):
            raise ContractError("INSTR-6: level")
        self._level = level


registry.mutant("INSTR-6", "INSTR-10", replaces="instrument")(_made_of(StandsThereAlways))


@registry.mutant("INSTR-7", replaces="allocator_view")
def tells_each_page_once(allocator: Any) -> Any:
    view = views.allocator_view(allocator)
    return view._replace(free=tuple(dict.fromkeys(view.free)))


@registry.mutant("INSTR-7", replaces="pool_view")
def takes_a_row_to_be_full(pool: Any, lengths: Any = None) -> Any:
    return views.pool_view(pool)


@registry.mutant("INSTR-7", replaces="cache_view")
def trusts_the_first_slot(cache: Any, page_size: int) -> Any:
    view = views.cache_view(cache, page_size)
    pages = {path: page._replace(tombstone=False) for path, page in view.pages.items()}
    return view._replace(pages=pages)


class SaysNothing(Instrument):
    def _blinded(self, error: Exception) -> None:
        """As if it still saw."""


registry.mutant("INSTR-8", replaces="instrument")(_made_of(SaysNothing))


def _end_silently(self: Any, faults: Any, ledger: Any) -> None:
    """As if nothing had been found."""


registry.mutant("INSTR-9", reports=("SE-01", "SE-11"), replaces="instrument")(
    _while(Listener, "_report", _end_silently)
)


registry.mutant("INSTR-9", replaces="instrument")(_while(Listener, "by_hand", frozenset()))
