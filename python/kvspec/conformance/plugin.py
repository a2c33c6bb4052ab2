"""pytest plugin: collects the four levels of clause coverage and prints them as one table.

cited     by reading the files          kvspec.conformance.citations
decided   a passing test with @clause   here, per implementation
reached   the proxy's counters          kvspec.conformance.watch
killed    mutants                       tests that call `record_kill`

Under pytest-xdist each worker hands over what it saw when it is done.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kvspec.clauses import Clause, clauses
from kvspec.conformance import clause_ids

__all__ = ["record_kill"]

_IMPLS = ("oracle", "native")
_decided: dict[str, set[str]] = defaultdict(set)
_failed: dict[str, list[str]] = defaultdict(list)
_killed: dict[str, list[str]] = defaultdict(list)


def record_kill(clause: str, mutant: str) -> None:
    """Note that a mutant that breaks `clause` was caught."""
    _killed[clause].append(mutant)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvspec", "clause coverage")
    group.addoption("--clause-report", metavar="FILE", help="write the coverage of clauses as JSON")
    group.addoption("--clause-gate", action="store_true", help="fail if a clause lacks a level")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clause(*ids): the clauses of spec/ that this test decides")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        unknown = [id_ for id_ in _ids(item) if id_ not in clauses()]
        if unknown:
            raise pytest.UsageError(f"{item.nodeid} decides {unknown}: not in spec/")


def _ids(item: pytest.Item) -> list[str]:
    return clause_ids(item.iter_markers("clause"), getattr(item, "cls", None))


def _impls_of(item: pytest.Item) -> tuple[str, ...]:
    impl = getattr(getattr(item, "cls", None), "impl", None)
    if impl is None:
        return _IMPLS
    name: str = impl.__name__
    return ({"kvspec": "native", "kvspec.oracle": "oracle"}.get(name, name),)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    for id_ in _ids(item):
        if report.when == "call" and report.passed:
            _decided[id_].update(_impls_of(item))
        elif report.failed:
            _failed[id_].append(item.nodeid)
    return report


def _levels(root: Path, clause: Clause) -> dict[str, Any]:
    from kvspec.conformance.citations import missing_citations
    from kvspec.conformance.watch import reached

    stateless = clause.room in ("prefix_key", "memory_checker", "replay")
    counts = {impl: reached[impl, clause.id] for impl in _IMPLS}
    return {
        "kind": clause.kind,
        "room": clause.room,
        "cited": not missing_citations(root, clause),
        "missing_citations": missing_citations(root, clause),
        "decided": _decided[clause.id].issuperset(_IMPLS) and not _failed[clause.id],
        "decided_by": sorted(_decided[clause.id]),
        "reached": any(counts.values()) if stateless else all(counts.values()),
        "reached_count": counts,
        "killed": bool(_killed[clause.id]),
        "killed_mutants": _killed[clause.id],
    }


def _needed(clause: Clause) -> tuple[str, ...]:
    if clause.safety:
        return ("cited", "decided", "reached", "killed")
    return () if clause.kind == "withdrawn" else ("cited", "decided")


def _summary(levels: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"{'room':16} {'clauses':>7} {'cited':>7} {'decided':>8} {'reached':>8} {'killed':>7}"]
    rooms: dict[str, list[Clause]] = defaultdict(list)
    for clause in clauses().values():
        rooms[clause.room].append(clause)
        rooms["all"].append(clause)
    rooms["all"] = rooms.pop("all")
    for room, members in rooms.items():
        cells = []
        for level in ("cited", "decided", "reached", "killed"):
            needed = [clause.id for clause in members if level in _needed(clause)]
            cells.append(f"{sum(levels[id_][level] for id_ in needed)}/{len(needed)}")
        lines.append(
            f"{room:16} {len(members):>7} {cells[0]:>7} {cells[1]:>8} {cells[2]:>8} {cells[3]:>7}"
        )
    return lines


def _gaps(levels: dict[str, dict[str, Any]]) -> list[str]:
    gaps = []
    for clause in clauses().values():
        missing = [level for level in _needed(clause) if not levels[clause.id][level]]
        if missing:
            gaps.append(f"{clause.id} ({clause.kind}) is not {', not '.join(missing)}")
    return gaps


def _seen() -> dict[str, Any]:
    """What this process saw, in types that can be sent to another one."""
    from kvspec.conformance.watch import reached

    return {
        "decided": {id_: sorted(impls) for id_, impls in _decided.items()},
        "failed": dict(_failed),
        "killed": dict(_killed),
        "reached": [(impl, id_, count) for (impl, id_), count in reached.items()],
    }


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist is done: add what it saw."""
    from kvspec.conformance.watch import reached

    seen = getattr(node, "workeroutput", {}).get("clauses")
    if seen is None:
        return
    for id_, impls in seen["decided"].items():
        _decided[id_].update(impls)
    for id_, tests in seen["failed"].items():
        _failed[id_] += tests
    for id_, mutants in seen["killed"].items():
        _killed[id_] += mutants
    for impl, id_, count in seen["reached"]:
        reached[impl, id_] += count


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["clauses"] = _seen()
        return
    gate, path = config.getoption("--clause-gate"), config.getoption("--clause-report")
    if not gate and not path:
        return
    levels = {id_: _levels(config.rootpath, clause) for id_, clause in clauses().items()}
    gaps = _gaps(levels)
    config.stash[_TABLE] = [*_summary(levels), *gaps]
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        report = {"clauses": levels, "gaps": gaps}
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if gate and gaps and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_TABLE: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash.get(_TABLE, None)
    if lines:
        terminalreporter.section("coverage of clauses")
        for line in lines:
            terminalreporter.write_line(line)
