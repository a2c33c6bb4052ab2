"""What some tests need. Under CI nothing is missing: see conftest.py."""

import os
from pathlib import Path

import pytest

import kvspec

TRACES = Path(
    os.environ.get("KVSPEC_TRACES", Path(__file__).resolve().parents[2] / "shared" / "traces")
)
"""They are large and not ours: KVSPEC_TRACES says where, or they lie beside the checkout."""

root = pytest.mark.skipif(
    os.geteuid() != 0 and "CI" not in os.environ, reason="only root may do what this test does"
)
native = pytest.mark.skipif(not kvspec.has_native(), reason="the extension is absent")


def trace(file: str) -> pytest.MarkDecorator:
    """A trace of this name; under CI it is an error if it is not there."""
    absent = not (TRACES / file).exists() and "CI" not in os.environ
    return pytest.mark.skipif(absent, reason=f"no {file} in {TRACES}")
