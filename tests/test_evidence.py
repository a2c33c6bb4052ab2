"""The evidence is complete: every known fault has a clause that decides it, or a reason why not.

The list of faults lies outside the repository, in two files of a folder (KVSPEC_REFERENCE). What
can be checked without it, the counts among it, is checked always.
"""

import os
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvspec.clauses import clauses, rooms, spec_folder
from sequences import SEQUENCES
from test_mutants import REGISTRIES

ROOT = Path(__file__).parents[1]
REFERENCE = Path(os.environ.get("KVSPEC_REFERENCE", ROOT.parent / "shared" / "reference"))

_FILE: dict[str, Any] = tomllib.loads((spec_folder() / "coverage.toml").read_text(encoding="utf-8"))
META: dict[str, int] = _FILE.pop("meta")
SUBJECTS: dict[str, str] = _FILE.pop("subjects")
ENTRIES: dict[str, dict[str, Any]] = _FILE
DECIDED = {id_: entry["clauses"] for id_, entry in ENTRIES.items() if "clauses" in entry}
REASONS: dict[str, str] = {
    id_: entry.get("out") or entry["rest"]
    for id_, entry in ENTRIES.items()
    if entry.keys() & {"out", "rest"}
}
UNDECIDED = {id_ for id_, entry in ENTRIES.items() if "out" in entry}


def kind(id_: str) -> str:
    """Which of the four lists an id belongs to: the key of `meta`."""
    return {"INV": "inv", "SE": "se", "SEED": "seeds"}.get(id_.partition("-")[0], "reports")


def evidence() -> dict[str, set[str]]:
    """For each id, the clauses of the mutants and sequences that stand for it."""
    found: dict[str, set[str]] = {}
    for registry in REGISTRIES.values():
        for mutant in registry.mutants:
            for id_ in mutant.reports:
                found.setdefault(id_, set()).update((mutant.clause, *mutant.also))
    for sequence in SEQUENCES:
        for id_ in sequence.evidence:
            found.setdefault(id_, set()).add(sequence.clause)
    return found


def reference(name: str) -> str:
    """The text of a file of the reference."""
    if not REFERENCE.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{REFERENCE} is missing: set KVSPEC_REFERENCE")
        pytest.skip(f"{REFERENCE} is missing: set KVSPEC_REFERENCE to check the list of faults")
    return (REFERENCE / name).read_text(encoding="utf-8")


def test_the_counts_are_true() -> None:
    assert Counter(map(kind, ENTRIES)) == META


def test_invariants_and_sharp_edges_are_complete() -> None:
    text = reference("sglang-behaviour.md")
    listed = set(re.findall(r"\bINV-\d{3}\b|\bSE-\d{2}\b", text))
    assert {id_ for id_ in ENTRIES if kind(id_) in ("inv", "se")} == listed


def test_reports_are_complete() -> None:
    headings = re.findall(r"^#### (\S+) — ", reference("bugs.md"), re.M)
    assert len(headings) == len(set(headings))
    assert {id_ for id_ in ENTRIES if kind(id_) == "reports"} == set(headings)


def test_seed_sequences_are_complete() -> None:
    numbers = re.findall(r"^\| (\d+) \| ", reference("bugs.md"), re.M)
    assert {id_ for id_ in ENTRIES if kind(id_) == "seeds"} == {f"SEED-{n}" for n in numbers}


@pytest.mark.parametrize("id_", ENTRIES)
def test_an_entry_names_clauses_or_is_out(id_: str) -> None:
    entry = ENTRIES[id_]
    assert entry.keys() in ({"clauses"}, {"clauses", "rest"}, {"out"})
    assert entry.get("clauses") != []
    unknown = [clause for clause in entry.get("clauses", ()) if clause not in clauses()]
    assert not unknown, f"{id_} names {unknown}, which spec/ does not define"
    withdrawn = [name for name in entry.get("clauses", ()) if clauses()[name].kind == "withdrawn"]
    assert not withdrawn


@pytest.mark.parametrize("id_", REASONS)
def test_what_is_out_concerns_no_room_that_is_built(id_: str) -> None:
    """So an invariant of a built room cannot be out, and a new room takes its entries over."""
    subject, colon, reason = REASONS[id_].partition(": ")
    assert colon
    assert len(reason) > 5
    word, _, room = subject.partition(" ")
    if word == "room":
        assert re.fullmatch(r"[a-z_]+", room)
        assert room not in rooms()["room"], f"{id_} is out, but the room {room} is built"
    else:
        assert subject in SUBJECTS


def test_every_subject_is_used() -> None:
    assert set(SUBJECTS) <= {reason.partition(": ")[0] for reason in REASONS.values()}


def test_marked_invariants_are_out_for_a_missing_room_alone() -> None:
    """What the older release or both keep is out only where the room or the state is not built."""
    marked = re.findall(r"(INV-\d{3}) \[(?:2|2\+23)\]", reference("sglang-behaviour.md"))
    assert len(marked) > 20
    for id_ in UNDECIDED.intersection(marked):
        subject = REASONS[id_].partition(":")[0]
        assert subject.startswith("room ") or subject == "recurrent state", f"{id_}: {subject}"


def test_mutants_and_sequences_name_known_ids() -> None:
    unknown = sorted(id_ for id_ in evidence() if id_ not in ENTRIES)
    assert not unknown


def test_mutants_and_sequences_stand_for_what_is_decided() -> None:
    out = sorted(id_ for id_ in evidence() if id_ in UNDECIDED)
    assert not out, f"{out} have a mutant or a sequence, but no clause in coverage.toml"


@pytest.mark.parametrize("id_", [id_ for id_ in DECIDED if kind(id_) != "inv"])
def test_what_is_decided_has_a_mutant_or_a_sequence(id_: str) -> None:
    """On one of the clauses that decide it."""
    found = evidence().get(id_, set())
    assert found, f"no mutant and no sequence stands for {id_}"
    assert found & set(DECIDED[id_]), f"{id_}: evidence on {found}, decided by {DECIDED[id_]}"
