"""What engines have got wrong, as the shortest sequence of operations that shows it.

A sequence names with `@report` what it stands for in spec/coverage.toml and the clause that decides
it, and ends by asking who owns what. tests/test_bug_reports.py runs them over both implementations,
and over the oracle with each of those faults planted in it.
"""

import inspect
from typing import Any

from sequences.allocators import Allocators
from sequences.checks import Checks
from sequences.requests import Requests
from sequences.sharing import Keys, Sharing
from sequences.trees import Locks, Trees
from sequences.windows import Windows

__all__ = ["SEQUENCES", "Sequences"]


class Sequences(Allocators, Requests, Sharing, Keys, Locks, Trees, Windows, Checks):
    """All of them."""


SEQUENCES: list[Any] = [
    test
    for name, test in inspect.getmembers(Sequences, inspect.isfunction)
    if name.startswith("test_")
]
"""Each of them, with what it stands for: `evidence` and `clause`."""
