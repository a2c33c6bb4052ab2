"""Models under test: what TLC finds in them, with a fault or without."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvspec.validate.tlc import TLA, Exit, java
from kvspec.validate.tlc import tlc as run_tlc
from model.graph import Graph, read_dot

__all__ = [
    "MODEL",
    "TLA",
    "Exit",
    "assert_reached",
    "dump",
    "fired",
    "mutated",
    "reach_configurations",
    "require_java",
    "tlc",
]

MODEL = SimpleNamespace(__name__="model")
"""What a test of a model is a test of: of no implementation, in the coverage of clauses."""


def require_java() -> None:
    """Skip the test that calls this, or fail it under CI, where java is absent."""
    try:
        java()
    except ImportError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI checks the models: {error}")
        pytest.skip(str(error))


def tlc(
    module: str, config: str, tmp_path: Path, *flags: str | Path, folder: Path = TLA
) -> subprocess.CompletedProcess[str]:
    """Check `module` under `config`, both of `folder`, without their suffixes."""
    require_java()
    return run_tlc(module, config, tmp_path, *flags, folder=folder)


def fired(run: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """How often each action fired, of a run with `-coverage 1`."""
    lines = re.findall(r"^<(\w+) line .*>: \d+:(\d+)$", run.stdout, re.MULTILINE)
    return {action: int(count) for action, count in lines}


def dump(module: str, config: str, tmp_path: Path) -> Graph:
    """All states of a model and its labelled edges, those that change nothing included."""
    dot = tmp_path / f"{config}.dot"
    run = tlc(module, config, tmp_path, "-dump", "dot,actionlabels", dot)
    assert run.returncode == Exit.HOLDS, run.stdout
    return read_dot(dot.read_text(encoding="utf-8"))


def mutated(module: str, old: str, new: str, tmp_path: Path) -> Path:
    """A copy of spec/tla in which `old`, which occurs once in the module, reads `new`."""
    folder = tmp_path / "mutated"
    shutil.copytree(TLA, folder)
    path = folder / f"{module}.tla"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{module}.tla has {text.count(old)} times: {old}"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return folder


def reach_configurations(module: str) -> list[str]:
    """Configurations that break an invariant Never..., one for each state that must be found."""
    text = (TLA / f"MC{module}.tla").read_text(encoding="utf-8")
    states = re.findall(r"^Never(\w+) ==", text, re.MULTILINE)
    assert states
    return [f"{module}Reach{state}" for state in states]


def assert_reached(config: str, run: subprocess.CompletedProcess[str]) -> None:
    """Fail unless TLC found the state that the configuration names."""
    never = f"Never{config.partition('Reach')[2]}"
    assert run.returncode == Exit.INVARIANT_VIOLATED, run.stdout
    assert f"Invariant {never} is violated" in run.stdout
