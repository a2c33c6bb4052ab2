"""Follows a recorded log with the oracle, and finds the event that breaks a clause. Spec: VALID.

verdict    what comes of it
runs       slots and pages of a log
names      tokens for its keys
choices    the oracle, with its choices made for it
books      what is followed, and who has which page
pools      following the allocator and the request pool
caching    following the cache
states     taking over a state, and comparing one
follow     one event after the other
slicing    which events an event depends on
shrink     the shortest history that still breaks the clause
play       a history on live objects
words      an event in words
report     a violation for a person and for a program
pasting    a violation as a test
command    `kvspec validate`
"""

from kvspec.validate.command import Judgement, validate_log
from kvspec.validate.follow import validate
from kvspec.validate.pasting import as_pytest
from kvspec.validate.play import play
from kvspec.validate.report import events_of
from kvspec.validate.shrink import shrink
from kvspec.validate.verdict import LogViolation, Verdict, Violation

__all__ = [
    "Judgement",
    "LogViolation",
    "Verdict",
    "Violation",
    "as_pytest",
    "events_of",
    "play",
    "shrink",
    "validate",
    "validate_log",
]
