"""Checks of the code itself: rooms and walls, layers, clause ids, length of functions."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from kvspec.clauses import clauses, rooms
from kvspec.conformance.citations import citations, undefined_citations, wall_path

ROOT = Path(__file__).parents[1]
ROOMS = list(rooms()["room"])
WALLS = {**rooms()["walls"], **rooms()["extra_walls"]}
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
]
SOURCES = [p for p in TRACKED if p.suffix in {".py", ".hpp", ".cpp", ".cu", ".tla"} and p.exists()]
PYTHON = [path for path in SOURCES if path.suffix == ".py"]
CPP = [path for path in SOURCES if path.suffix in {".hpp", ".cpp", ".cu"}]
MAX_LINES = 60

# Files on a wall that are not rooms: what several rooms share.
SHARED = {
    "interface": {"__init__"},
    "oracle": {"__init__", "boundary", "digest", "host_pages", "trie"},
    "header": {
        *("contract", "digest", "grow", "host_pages", "slots"),
        *("page_books", "page_ring", "page_set", "row_names"),
        *("child_table", "node_heap", "radix_node"),
    },
    "core": {
        *("host_pages", "page_books", "row_names", "ledger_effects", "ledger_view"),
        *("radix_evict", "radix_insert", "radix_view", "radix_window"),
    },
    "binding": {"module"},
    "native": {"__init__"},
    "conformance": {
        *("__init__", "citations", "mutants", "plugin", "suite", "watch"),
        *("allocator_fuzzing", "lockstep"),
    },
    "mutants": {"__init__", "model_runner_tools"},
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("wall", WALLS)
@pytest.mark.parametrize("room", ROOMS)
def test_room_stands_on_its_walls_and_no_other(room: str, wall: str) -> None:
    path = wall_path(ROOT, wall, room)
    place = ROOT / WALLS[wall].format(room)
    assert path.exists() if path else not place.exists(), f"{room} on {wall}: {relative(place)}"


@pytest.mark.parametrize("wall", SHARED)
def test_what_stands_on_a_wall_is_a_room(wall: str) -> None:
    folder, _, suffix = WALLS[wall].partition("{}")
    found = {path.stem for path in (ROOT / folder).glob(f"*{suffix}")}
    assert found <= set(ROOMS) | SHARED[wall]


def test_rooms_without_a_wall_say_why() -> None:
    for room in rooms()["room"].values():
        assert all(len(reason) > 5 for reason in room.get("without", {}).values())
        assert room["layer"] in rooms()["layers"]


def _room_imports(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        names = re.findall(r"^\s*(?:from|import) (kvspec[\w.]*)(?: import ([\w, ]+))?", text, re.M)
        words = {word for module, more in names for word in re.split(r"[., ]+", f"{module} {more}")}
    else:
        words = set(re.findall(r'#include "kvspec/(\w+)\.hpp"', text))
    return words & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_layers_only_look_down(room: str) -> None:
    order = rooms()["layers"]
    height = {name: order.index(entry["layer"]) for name, entry in rooms()["room"].items()}
    for wall in ("interface", "oracle", "header", "core", "binding", "native", "module"):
        path = wall_path(ROOT, wall, room)
        if path and path.exists():
            above = {other for other in _room_imports(path) if height[other] > height[room]}
            assert not above, f"{relative(path)} looks up to {above}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_cited_clauses_are_defined(path: Path) -> None:
    assert not undefined_citations(path)


def test_every_clause_is_cited_by_a_test() -> None:
    tests = [path for path in PYTHON if {"conformance", "tests"} & set(path.parts)]
    cited = set().union(*(citations(path.read_text(encoding="utf-8")) for path in tests))
    unused = [c.id for c in clauses().values() if c.kind != "withdrawn" and c.id not in cited]
    assert not unused


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_python_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_LINES, f"{relative(path)}:{node.lineno} {node.name}: {length}"


@pytest.mark.parametrize("path", CPP, ids=relative)
def test_cpp_functions_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    begin, indent = 0, ""
    for number, line in enumerate(lines, 1):
        head = re.match(r"^((?:  )?)\S.*\) ?(const )?(noexcept )?(->[^{]*)?(: .*)?\{$", line)
        if head and not re.match(r"\s*(if|for|while|switch|namespace)\b", line):
            begin, indent = number, head[1]
        elif begin and line.startswith(indent + "}"):
            assert number - begin < MAX_LINES, f"{relative(path)}:{begin}: {number - begin} lines"
            begin = 0


@pytest.mark.parametrize("path", CPP, ids=relative)
def test_include_order(path: Path) -> None:
    """Own header, then the standard library, then other parties', then ours; each sorted."""
    includes = re.findall(r'^#include ([<"].+[>"])', path.read_text(encoding="utf-8"), re.M)
    own = f'"kvspec/{path.stem}.hpp"'
    if includes and includes[0] == own:
        includes = includes[1:]
    rank = {"<": 0, '"': 2}
    keys = [(1 if "nanobind" in i else rank[i[0]], i) for i in includes]
    assert keys == sorted(keys)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_lines_fit(path: Path) -> None:
    longest = max(map(len, path.read_text(encoding="utf-8").splitlines()), default=0)
    assert longest <= 120 if path.suffix == ".tla" else longest <= 100
