"""Tests of the tests: an implementation with one clause broken must fail on that clause."""

import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import pytest

from kvspec.conformance import clause_ids
from kvspec.conformance.suite import MUTANT, Conformance, short_fuzzing
from kvspec.errors import CLAUSE_ERRORS

__all__ = ["Mutant", "Outcome", "Registry", "assert_killed", "run_suite"]

Class = TypeVar("Class", bound=Callable[..., Any])


class Mutant(NamedTuple):
    """One broken class or function of the oracle."""

    name: str
    replaces: str
    broken: Callable[..., Any]
    clause: str
    also: tuple[str, ...]
    """Other clauses whose tests cannot help failing with it."""
    reports: tuple[str, ...]
    """Reports, invariants or sharp edges of the evidence list that it stands for."""


class Outcome(NamedTuple):
    test: str
    clauses: frozenset[str]
    error: BaseException | None


class Registry:
    """The mutants of one room, declared with a decorator."""

    def __init__(self, suite: type[Conformance], oracle: ModuleType) -> None:
        self.suite, self.oracle = suite, oracle
        self.mutants: list[Mutant] = []

    def mutant(
        self, clause: str, *also: str, replaces: str = "", reports: tuple[str, ...] = ()
    ) -> Callable[[Class], Class]:
        """Declare a class as a mutant that breaks `clause`."""

        def declare(broken: Class) -> Class:
            name = broken.__name__
            bases = [base.__name__ for base in getattr(broken, "__mro__", ())[1:]]
            replaced = replaces or next(base for base in bases if hasattr(self.oracle, base))
            self.mutants.append(Mutant(name, replaced, broken, clause, also, reports))
            return broken

        return declare

    def namespace(self, mutant: Mutant) -> SimpleNamespace:
        """The oracle with the mutant in its place."""
        names = {name: getattr(self.oracle, name) for name in self.oracle.__all__}
        return SimpleNamespace(**{**names, mutant.replaces: mutant.broken, "__name__": MUTANT})


def _marks(test: Callable[..., Any], name: str) -> list[pytest.Mark]:
    return [mark for mark in getattr(test, "pytestmark", []) if mark.name == name]


def _axis(mark: pytest.Mark) -> list[dict[str, Any]]:
    names, values = mark.args[0], mark.args[1]
    split = [name.strip() for name in names.split(",")] if isinstance(names, str) else names

    def row(value: Any) -> Any:
        if hasattr(value, "marks"):  # a pytest.param
            return value.values
        return value if len(split) > 1 else (value,)

    return [dict(zip(split, row(value), strict=True)) for value in values]


def _cases(test: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    for combination in itertools.product(*map(_axis, _marks(test, "parametrize"))):
        yield {name: value for part in combination for name, value in part.items()}


def _without_frames(error: BaseException) -> BaseException:
    """What went wrong, but not the objects of the test, which would live as long as the outcome."""
    part: BaseException | None = error
    while part is not None:
        part.__traceback__, part = None, part.__context__
    return error


@contextmanager
def _briefly() -> Iterator[None]:
    """Inside, pytest explains a failed comparison as it does for a person, not as under CI.

    There it compares whatever differs line by line, which nobody reads of a mutant: seconds for a
    view, minutes for a few pages.
    """
    kept = {name: os.environ.pop(name) for name in ("CI", "BUILD_NUMBER") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def run_suite(suite: type[Conformance], impl: Any) -> list[Outcome]:
    """Run every test and case of a suite, in this process, against a namespace."""
    outcomes = []
    for name, test in inspect.getmembers(suite, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        ids = frozenset(clause_ids(_marks(test, "clause"), suite))
        for case in _cases(test):
            subject = suite()
            subject.impl = impl
            error: BaseException | None = None
            try:
                test(subject, **case)
            except (Exception, pytest.fail.Exception) as raised:
                error = _without_frames(raised)
            outcomes.append(Outcome(f"{name}{list(case.values()) or ''}", ids, error))
    return outcomes


def assert_killed(registry: Registry, mutant: Mutant) -> None:
    """Fail unless the suite catches the mutant, for the right reason and nearly nothing else."""
    with short_fuzzing(), _briefly():
        outcomes = run_suite(registry.suite, registry.namespace(mutant))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    declared = {mutant.clause, *mutant.also}
    assert any(mutant.clause in outcome.clauses for outcome in failed), (
        f"{mutant.name} survives: no test of {mutant.clause} fails, only {[o.test for o in failed]}"
    )
    for outcome in failed:
        assert outcome.clauses & declared, (
            f"{mutant.name} breaks {sorted(declared)}, but {outcome.test}, which decides"
            f" {sorted(outcome.clauses)}, fails too: {outcome.error!r}"
        )
        assert isinstance(outcome.error, (*CLAUSE_ERRORS, AssertionError, pytest.fail.Exception)), (
            f"{mutant.name}: {outcome.test} fails by accident: {outcome.error!r}"
        )
    others = [outcome for outcome in outcomes if not outcome.clauses & declared]
    passed = [outcome for outcome in others if outcome.error is None]
    assert 2 * len(passed) >= len(others), f"{mutant.name} breaks too much to say anything"
