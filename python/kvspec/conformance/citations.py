"""Where the ids of clauses are cited: the level `cited`, by reading the files of a checkout."""

import re
from functools import cache
from pathlib import Path

from kvspec.clauses import Clause, clauses, rooms

__all__ = ["citations", "missing_citations", "undefined_citations", "wall_path"]

_CITATION = re.compile(r"\b([A-Z]{2,})[-_](\d+)(?:(?:-|\s+to\s+)(?:\1[-_])?(\d+))?(?!\d)")

_SUFFIXES = {".py", ".hpp", ".cpp"}

# kind -> the walls on which a clause of that kind has to stand
_WALLS = {
    "invariant": ("oracle", "core", "conformance"),
    "pre": ("interface", "oracle", "core", "conformance"),
    "post": ("interface", "core", "conformance"),
    "order": ("interface", "core", "conformance"),
    "cost": ("interface",),
    "choice": ("interface",),
}


def wall_path(root: Path, wall: str, room: str) -> Path | None:
    """The file of a room on a wall of the checkout `root`, or None if it does without."""
    entry = rooms()["room"][room]
    if wall in entry.get("without", {}):
        return None
    if wall in rooms()["extra_walls"] and wall not in entry.get("also", ()):
        return None
    pattern: str = {**rooms()["walls"], **rooms()["extra_walls"]}[wall]
    path = root / pattern.format(room)
    package = path.with_suffix("") / "__init__.py"
    return package if package.exists() else path


def citations(text: str) -> set[str]:
    """The clause ids in a text; `RADIX-8 to RADIX-13` cites all six, and so does RADIX_8_Name."""
    found = set[str]()
    for prefix, first, last in _CITATION.findall(text):
        found.update(f"{prefix}-{n}" for n in range(int(first), int(last or first) + 1))
    return found


def _wall_files(root: Path, wall: str) -> set[Path]:
    """The files of a wall, with what rooms share there; of a module, it or its package alone."""
    places = {path for room in rooms()["room"] if (path := wall_path(root, wall, room))}
    if wall != "module":
        return {file for path in places for file in path.parent.rglob("*") if file.is_file()}
    packages = {path.parent for path in places if path.name == "__init__.py"}
    return places | {file for package in packages for file in package.glob("*.py")}


@cache
def _cited_on_wall(root: Path, wall: str) -> frozenset[str]:
    walls = ("header", "core", "native", "module") if wall == "core" else (wall,)
    files = {file for each in walls for file in _wall_files(root, each)}
    texts = (file.read_text(encoding="utf-8") for file in files if file.suffix in _SUFFIXES)
    return frozenset().union(*map(citations, texts))


def missing_citations(root: Path, clause: Clause) -> list[str]:
    """The walls on which the clause ought to be cited and is not."""
    missing = []
    for wall in _WALLS.get(clause.kind, ()):
        names = ("core", "native", "module") if wall == "core" else (wall,)
        stands = any(wall_path(root, name, clause.room) for name in names)
        if stands and clause.id not in _cited_on_wall(root, wall):
            missing.append(wall)
    return missing


def undefined_citations(path: Path) -> list[str]:
    """Ids with a room's prefix that the file cites and spec/ does not define."""
    prefixes = {room["prefix"] for room in rooms()["room"].values()}
    cited = citations(path.read_text(encoding="utf-8"))
    return sorted(i for i in cited if i.split("-")[0] in prefixes and i not in clauses())
