"""What every room's suite has: the implementation under test, and settings for its fuzzers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings

from kvspec.conformance.watch import watch

__all__ = ["MUTANT", "Conformance", "fuzzing", "is_short", "one_thread", "short_fuzzing"]

MUTANT = "mutant"
"""Name of a namespace with a broken class: what it reaches says nothing about an implementation."""

_SHORT_EXAMPLES = 6
"""What a machine is given for a mutant: most die of a focused test."""

_FUZZING = settings(
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
_short = False


def fuzzing(max_examples: int = 60) -> settings:
    """How long the suites' state machines run: deterministic, and shrunk when they fail."""
    if _short:
        phases = [Phase.explicit, Phase.generate]
        return settings(_FUZZING, phases=phases, max_examples=min(max_examples, _SHORT_EXAMPLES))
    return settings(_FUZZING, max_examples=max_examples)


def is_short() -> bool:
    """Whether a mutant is being tried: what is broken shows in few of many modes."""
    return _short


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes in one thread: of little work it takes longer to share it, and two
    runs are alike.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def short_fuzzing() -> Iterator[None]:
    """Inside, machines run for less and a failure is reported as it is found: for mutants."""
    global _short
    _short = True
    try:
        yield
    finally:
        _short = False


class Conformance:
    """Base of the suites. `impl` is the namespace under test."""

    impl: Any
    law: object = None
    """Has the clauses that the names stand for which shared tests are marked with."""

    @property
    def impl_name(self) -> str:
        """`oracle`, `native`, or the name of somebody else's namespace."""
        name: str = self.impl.__name__
        return {"kvspec": "native", "kvspec.oracle": "oracle"}.get(name, name)

    def subject(self, name: str, interface: type, *rooms: str, **arguments: Any) -> Any:
        """An object of the implementation's class `name`, watched unless it is a mutant."""
        if self.impl_name == MUTANT:
            return getattr(self.impl, name)(**arguments)
        return watch(self.impl_name, getattr(self.impl, name), interface, *rooms, **arguments)
