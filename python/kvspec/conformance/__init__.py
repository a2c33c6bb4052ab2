"""Tests that any implementation of the specification can be run against.

An implementation is a namespace that holds the classes under the names of the specification, as
`kvspec` and `kvspec.oracle` do. Subclass a room's suite and say which one:

    from kvspec.conformance.page_allocator import PageAllocatorConformance

    class TestMine(PageAllocatorConformance):
        impl = my_engine.memory
"""

import pytest

__all__ = ["clause"]


def clause(*ids: str) -> pytest.MarkDecorator:
    """Mark a test with the clauses of spec/ that it decides."""
    return pytest.mark.clause(*ids)
