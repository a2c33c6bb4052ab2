"""Every mutant is killed, on the clause it breaks and nearly nothing else."""

import importlib
from pathlib import Path

import pytest

from kvspec.conformance.mutants import Mutant, Registry, assert_killed
from kvspec.conformance.plugin import record_kill
from kvspec.conformance.suite import short_fuzzing

REGISTRIES: dict[str, Registry] = {
    path.stem: importlib.import_module(f"mutants.{path.stem}").registry
    for path in sorted((Path(__file__).parent / "mutants").glob("*.py"))
    if path.stem != "__init__"
}
MUTANTS = [(r, m) for r in REGISTRIES.values() for m in r.mutants]


@pytest.mark.parametrize(("registry", "mutant"), MUTANTS, ids=[m.name for _, m in MUTANTS])
def test_mutant_is_killed(registry: Registry, mutant: Mutant) -> None:
    assert_killed(registry, mutant)
    record_kill(mutant.clause, mutant.name)


@pytest.mark.parametrize("room", REGISTRIES)
def test_the_oracle_itself_passes(room: str) -> None:
    """A suite that the unbroken oracle fails would kill every mutant."""
    from kvspec.conformance.mutants import run_suite

    registry = REGISTRIES[room]
    with short_fuzzing():  # at length it runs in the room's own tests
        failed = [o for o in run_suite(registry.suite, registry.oracle) if o.error is not None]
    assert not failed
