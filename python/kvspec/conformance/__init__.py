"""Tests that any implementation of the specification can be run against.

An implementation is a namespace that holds the classes under the names of the specification, as
`kvspec` and `kvspec.oracle` do. Subclass a room's suite and say which one:

    from kvspec.conformance.page_allocator import PageAllocatorConformance

    class TestMine(PageAllocatorConformance):
        impl = my_engine.memory
"""

from collections.abc import Iterable

import pytest

__all__ = ["clause", "clause_ids"]


def clause(*ids: str) -> pytest.MarkDecorator:
    """Mark a test with the clauses of spec/ that it decides.

    Where several rooms share a test, a name stands for an id: each suite's `law` says for which.
    """
    return pytest.mark.clause(*ids)


def clause_ids(marks: Iterable[pytest.Mark], suite: type | None) -> list[str]:
    """The clauses that a test with these marks decides in a suite."""
    law = getattr(suite, "law", None)
    return [getattr(law, name, name) for mark in marks for name in mark.args]
