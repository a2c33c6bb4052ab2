"""The sequences of tests/sequences: both implementations pass them, each planted fault fails."""

from typing import Any

import pytest

import kvspec
from kvspec import oracle
from kvspec.conformance.mutants import Mutant, run_suite
from kvspec.conformance.suite import Conformance
from kvspec.errors import ContractError, MemoryLeakError
from needs import native
from sequences import SEQUENCES, Sequences
from sequences.window_faults import registry

SEEN = (AssertionError, ContractError, MemoryLeakError, pytest.fail.Exception)


class TestOracle(Sequences):
    impl = oracle


@native
class TestNative(Sequences):
    impl = kvspec


def stands_for(test: Any, fault: Mutant) -> bool:
    """Whether a sequence has to see a fault."""
    return test.clause == fault.clause and not set(test.evidence).isdisjoint(fault.reports)


@pytest.mark.parametrize("fault", registry.mutants, ids=lambda fault: fault.name)
def test_a_planted_fault_is_seen(fault: Mutant) -> None:
    tests = [test for test in SEQUENCES if stands_for(test, fault)]
    suite = type("Standing", (Conformance,), {test.__name__: test for test in tests})
    outcomes = run_suite(suite, registry.namespace(fault))
    for test in tests:
        cases = [o for o in outcomes if o.test.partition("[")[0] == test.__name__]
        errors = [case.error for case in cases if case.error is not None]
        assert errors, f"{test.__name__} does not see {fault.name}"
        for error in errors:
            assert isinstance(error, SEEN), f"{fault.name} fails by accident: {error!r}"


@pytest.mark.parametrize("fault", registry.mutants, ids=lambda fault: fault.name)
def test_what_a_fault_stands_for_has_a_sequence(fault: Mutant) -> None:
    shown = {id_ for test in SEQUENCES if stands_for(test, fault) for id_ in test.evidence}
    assert set(fault.reports) <= shown


@pytest.mark.parametrize("test", SEQUENCES, ids=lambda test: test.__name__)
def test_what_a_sequence_stands_for_has_a_fault(test: Any) -> None:
    planted = {
        id_ for fault in registry.mutants if stands_for(test, fault) for id_ in fault.reports
    }
    assert set(test.evidence) <= planted
