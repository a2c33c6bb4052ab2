"""What holds of every allocator: one test for all rooms. Spec: SLOT, PAGE, SWA.

A test is marked with the name of a law; a suite's `law` says which clause of its room that is.
"""

from kvspec.conformance.allocator_laws.books import (
    NOT_SLOTS,
    SORTED,
    AllocatorLaws,
    Law,
    pages_of,
    pools,
)
from kvspec.conformance.allocator_laws.requests import RequestLaws

__all__ = ["NOT_SLOTS", "SORTED", "AllocatorLaws", "Law", "RequestLaws", "pages_of", "pools"]
