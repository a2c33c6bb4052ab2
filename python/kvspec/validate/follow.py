"""Following a log, one event after the other. Spec: VALID."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kvspec.errors import ContractError
from kvspec.flight_recorder.events import Event, Observe, Start
from kvspec.validate.books import Books, Broken, effects_of
from kvspec.validate.caching import CACHE_RULES
from kvspec.validate.pools import POOL_RULES
from kvspec.validate.states import observe, take_over
from kvspec.validate.verdict import Verdict, Violation
from kvspec.validate.words import words

__all__ = ["Follower", "validate"]

_RULES: Mapping[type[Event], Callable[[Books, Any], None]] = {
    **POOL_RULES,
    **CACHE_RULES,
    Observe: observe,
}


class Follower:
    """The oracle, beside a log, which may start anew in its middle (INSTR-6)."""

    books: Books

    def __init__(self, start: Event) -> None:
        self._begin(start)

    def _begin(self, start: Event) -> None:
        if not isinstance(start, Start):
            raise ContractError(f"VALID-8: the log begins with {words(start)}, not with start")
        if start.first > start.n + 1:
            raise ContractError(
                f"VALID-8: a ring dropped the events {start.n + 1} .. {start.first - 1},"
                " and what they led to is not known"
            )
        self.books = Books(start)
        if start.state is not None:
            take_over(self.books, start.state)

    def follow(self, event: Event) -> Violation | None:
        """Do what an event says; the clause that it breaks, if it breaks one.

        What raised has changed nothing. Where the oracle would not have raised, nothing was done
        either, and nothing is wrong with memory: it is followed by doing nothing.
        """
        try:
            if isinstance(event, Start):
                self._begin(event)
            elif event.error:
                _refuse_half(self.books, event)
            else:
                _RULES[type(event)](self.books, event)
        except Broken as broken:
            return _violation(event, broken.clause, broken.found, broken.expected)
        except ContractError as error:
            if error.clause == "VALID-8":
                raise
            return _violation(event, error.clause, "it was accepted", f"ContractError: {error}")
        return None


def _refuse_half(books: Books, event: Event) -> None:
    """What raised has given nothing back (CACHE-6)."""
    did = effects_of(event)
    if did.freed or did.swa_freed or did.rows_freed:
        given = [f"page {page}, {books.who(page)}" for page in books.pages(did.freed)[:4]]
        rows = [f"row {row}" for row in did.rows_freed]
        found = f"it raised, and has given back {'; '.join([*given, *rows]) or 'pairs'}"
        raise Broken("CACHE-6", found, "all of it, or nothing")


def _violation(event: Event, clause: str, found: str, expected: str) -> Violation:
    text = f"{clause}: event {words(event)}: found {found}; expected {expected}"
    return Violation(event.n, clause, event, found, expected, text)


def validate(events: Iterable[Event], progress: Callable[[], object] = lambda: None) -> Verdict:
    """Follow a log from its `start` to its end or to the first event that breaks a clause (VALID-1,
    VALID-2). A log that does not begin with `start`, or whose beginning a ring has dropped, is
    refused (VALID-8). O(slots named, and the free list where an allocation changes its order).
    """
    follower: Follower | None = None
    count = 0
    for event in events:
        count += 1
        if follower is None:
            follower = Follower(event)
        else:
            violation = follower.follow(event)
            if violation is not None:
                return Verdict(count, violation)
        progress()
    if follower is None:
        raise ContractError("VALID-8: the log is empty: it does not begin with start")
    return Verdict(count, None)
