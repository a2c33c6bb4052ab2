"""The proxy that measures which clauses are reached.

It stands around a subject under test, takes `view()` before and after each call, and evaluates the
`when:` line of every clause of the subject's rooms. Nothing of it runs in the implementation.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, wraps
from types import CodeType
from typing import Any

from kvspec.clauses import clauses
from kvspec.errors import CLAUSE_ERRORS, MemoryLeakError

__all__ = ["reached", "watch", "watch_function", "watch_made"]

reached: Counter[tuple[str, str]] = Counter()
"""(name of the implementation, clause id) -> how often the antecedent was true."""

_UNSEEN = frozenset({"view", "attach"})


@cache
def _antecedents(room: str) -> list[tuple[str, CodeType, bool]]:
    return [
        (clause.id, compile(clause.when, clause.id, "eval"), "__init__" in clause.when)
        for clause in clauses().values()
        if clause.room == room and clause.when
    ]


def _count(impl: str, rooms: tuple[str, ...], seen: Mapping[str, object]) -> None:
    for room in rooms:
        for id_, code, of_construction in _antecedents(room):
            if seen["call"] == "__init__" and not of_construction:
                continue
            if eval(code, {"__builtins__": __builtins__, **seen}):
                reached[impl, id_] += 1


def _bound(interface: type | None, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    if interface is None or not hasattr(interface, name):
        return dict(kwargs)
    bound = inspect.signature(getattr(interface, name)).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


class Watched:
    """Behaves as the subject and counts what is reached."""

    def __init__(
        self, subject: Any, impl: str, interface: type | None, rooms: tuple[str, ...]
    ) -> None:
        self._subject, self._impl, self._interface, self._rooms = subject, impl, interface, rooms

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._subject, name)
        private = name.startswith("_") and name not in vars(self._interface or object)
        if private or name in _UNSEEN or not callable(value):
            return value

        @wraps(value, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self._subject.view()
            result, error = None, None
            try:
                result = value(*args, **kwargs)
            except (*CLAUSE_ERRORS, MemoryLeakError) as raised:
                error = raised
            seen = _bound(self._interface, name, args, kwargs)
            seen.update(call=name, result=result, error=error)
            seen.update(before=before, after=self._subject.view())
            _count(self._impl, self._rooms, seen)
            try:
                if error is not None:
                    raise error
            finally:  # else it would keep this frame, which keeps it, and all that called it
                del error, seen
            return result

        return call

    def __enter__(self) -> "Watched":
        self._subject.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._subject.__exit__(*raised)


def watch(
    impl: str, make: Callable[..., Any], interface: type | None, *rooms: str, **arguments: Any
) -> Any:
    """Construct a subject and stand around it. `rooms` are those whose clauses it can reach."""
    return watch_made(impl, "__init__", make, interface, *rooms, **arguments)


def watch_made(
    impl: str,
    call: str,
    make: Callable[..., Any],
    interface: type | None,
    *rooms: str,
    **arguments: Any,
) -> Any:
    """The same where a class method or a function, which `call` names, gives the subject.

    What has no view, the list of a static method for example, is counted and given as it is.
    """
    seen: dict[str, object] = {**arguments, "call": call, "before": None, "after": None}
    try:
        subject = make(**arguments)
    except CLAUSE_ERRORS as error:
        _count(impl, rooms, seen | {"result": None, "error": error})
        raise
    seen |= {"result": subject, "error": None}
    if not hasattr(subject, "view"):
        _count(impl, rooms, seen)
        return subject
    _count(impl, rooms, seen | {"after": subject.view()})
    return Watched(subject, impl, interface, rooms)


def watch_function(impl: str, function: Callable[..., Any], *rooms: str) -> Callable[..., Any]:
    """The function, with what is reached counted; there is no view before and after."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result, error = None, None
        try:
            result = function(*args, **kwargs)
        except ValueError as raised:
            error = raised
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        seen = dict(bound.arguments) | {"call": function.__name__, "result": result, "error": error}
        _count(impl, rooms, seen)
        try:
            if error is not None:
                raise error
        finally:
            del error, seen
        return result

    return call
