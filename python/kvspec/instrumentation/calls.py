"""Functions before the methods of instances, and the actions they are. Spec: INSTR.

    caller -> call() -> method -> ... another object's call() -> its method
              action                  inner: an effect of the action

An object's own calls of itself are neither: how it does a thing is its own affair.
"""

import sys
from collections.abc import Callable, Iterator
from functools import wraps
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeAlias

from kvspec.errors import ContractError, write_unraisable

__all__ = [
    "ALLOCATOR",
    "CACHE",
    "CACHE_OPS",
    "HOST",
    "MARK",
    "POOL",
    "Arguments",
    "Calls",
    "Hooks",
    "Objects",
    "Options",
    "Reaction",
    "refuse_unfit",
]

ALLOCATOR, POOL, CACHE, HOST = 1, 2, 4, 8

Arguments: TypeAlias = tuple[Any, ...]
Options: TypeAlias = dict[str, Any]

_METHODS = {
    ALLOCATOR: (
        "alloc",
        "alloc_extend",
        "alloc_decode",
        "free",
        "free_swa",
        "move_swa",
        "free_group_begin",
        "free_group_end",
        "backup_state",
        "restore_state",
        "clear",
    ),
    POOL: ("alloc", "free", "write", "clear"),
    CACHE: (
        "match_prefix",
        "insert",
        "cache_unfinished_req",
        "cache_finished_req",
        "evict",
        "evict_swa",
        "inc_lock_ref",
        "dec_lock_ref",
        "reset",
    ),
    HOST: ("alloc", "free"),
}
MARK = "_kvspec_instrument"
"""Attribute of an instance that is instrumented: its instrument."""
CACHE_OPS = frozenset(_METHODS[CACHE])
_READING = frozenset({"match_prefix"})
"""Operations that move no page: nothing stands before them unless somebody wants to know."""
_ROWS = {"alloc": "alloc_rows", "free": "free_rows", "clear": "clear_rows"}
_NEXT_TIER = {"alloc": "alloc_host", "free": "free_host"}


class Objects(NamedTuple):
    """What is looked at."""

    cache: Any
    allocator: Any
    pool: Any
    host: Any = None

    def places(self) -> Iterator[tuple[int, Any]]:
        """Each object and its place."""
        yield from ((ALLOCATOR, self.allocator), (POOL, self.pool), (CACHE, self.cache))
        if self.host is not None:
            yield HOST, self.host


class Hooks(NamedTuple):
    """What is made of the calls of one method. An error of theirs never reaches the caller."""

    before: Callable[[Arguments, Options], Any] | None = None
    """What has to be known before it is called: seen."""
    after: Callable[[Arguments, Options, Any, Any], None] | None = None
    """It has returned: (args, options, seen, result)."""
    own: Callable[[Arguments, Options, Any], None] | None = None
    """The same of an object's call of itself: (args, options, result)."""


class Reaction(Protocol):
    """What is made of calls (INSTR-2)."""

    @property
    def hooks(self) -> Callable[[str], Hooks]:
        """Of a method, by the name of its operation."""

    everything: bool
    """Whether calls are wanted of which no hooks make anything."""

    def begin(self, op: str, args: Arguments, options: Options, frame: FrameType) -> None:
        """An action begins; the frame is its caller's."""

    def end(self, op: str, args: Arguments, options: Options, result: Any) -> None:
        """It has returned."""

    def failed(self, op: str, args: Arguments, options: Options, error: BaseException) -> None:
        """It has raised."""


class Calls:
    """The functions before the methods of some objects, while they stand there."""

    def __init__(
        self,
        objects: Objects,
        reaction: Reaction,
        mark: object,
        blinded: Callable[[Exception], None],
    ) -> None:
        self._reaction, self._blinded = reaction, blinded
        self._busy = 0
        """Whose methods are being called from outside of them."""
        self.blind = False
        self._standing: list[tuple[dict[str, Any], str]] = []
        self._hidden: list[tuple[dict[str, Any], str, Any]] = []
        """Attributes of an instance that such a function stands in place of."""
        for place, given in objects.places():
            names: dict[str, Any] = vars(given)
            for method in _METHODS[place]:
                if callable(getattr(given, method, None)):
                    self._stand(place, given, names, method)
            names[MARK] = mark
            self._standing.append((names, MARK))

    @property
    def inside(self) -> bool:
        """Whether a call is being made."""
        return self._busy != 0

    def _stand(self, place: int, given: Any, names: dict[str, Any], method: str) -> None:
        op = {POOL: _ROWS, HOST: _NEXT_TIER}.get(place, {}).get(method, method)
        if op in _READING and not (self._reaction.everything or any(self._reaction.hooks(op))):
            return
        if method in names:
            self._hidden.append((names, method, names[method]))
        names[method] = self._function(place, op, getattr(given, method))
        self._standing.append((names, method))

    def remove(self) -> None:
        """Leave the objects with the attributes they had (INSTR-4)."""
        for names, method in self._standing:
            names.pop(method, None)
        for names, method, given in self._hidden:
            names[method] = given
        self._standing, self._hidden = [], []

    def _function(self, place: int, op: str, method: Callable[..., Any]) -> Callable[..., Any]:
        fail, get_frame = self._fail, sys._getframe
        begin, end = self._reaction.begin, self._reaction.end
        before, after, own = self._reaction.hooks(op)

        @wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            busy = self._busy
            if busy & place:
                result = method(*args, **options)
                if own is not None and not self.blind:
                    try:
                        own(args, options, result)
                    except Exception as error:
                        fail(error)
                return result
            self._busy = busy | place
            seen = None
            try:
                try:
                    if not busy:
                        begin(op, args, options, get_frame(1))
                    if before is not None:
                        seen = before(args, options)
                except Exception as error:
                    fail(error)
                try:
                    result = method(*args, **options)
                except BaseException as error:
                    if not busy:
                        self._failed(op, args, options, error)
                    raise
                if self.blind:
                    return result
                try:
                    if after is not None:
                        after(args, options, seen, result)
                    if not busy:
                        end(op, args, options, result)
                except Exception as error:
                    fail(error)
                return result
            finally:
                self._busy = busy

        return call

    def _failed(self, op: str, args: Arguments, options: Options, error: BaseException) -> None:
        if self.blind:
            return
        try:
            self._reaction.failed(op, args, options, error)
        except Exception as own_error:
            self._fail(own_error)

    def _fail(self, error: Exception) -> None:
        """An error of kvspec's own: nothing more is looked at (INSTR-8)."""
        self.blind = True
        self.remove()
        self._blinded(error)
        write_unraisable(error)


def refuse_unfit(objects: Objects) -> None:
    """Refuse objects before which nothing can stand, or something stands already (INSTR-5)."""
    for _, given in objects.places():
        kind = type(given).__name__
        if not hasattr(given, "__dict__"):
            raise ContractError(f"INSTR-5: {kind} takes no attributes of an instance")
        if MARK in vars(given):
            raise ContractError(f"INSTR-5: this {kind} is instrumented already")
