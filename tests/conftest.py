"""What a run under CI must have: nothing is skipped there for want of a tool."""

import os

import pytest

import kvspec

pytest.register_assert_rewrite("sequences")  # before a test imports them


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI") and not kvspec.has_native():
        raise pytest.UsageError("CI runs with the extension, and it is absent")


def pytest_report_header() -> str:
    return f"kvspec {kvspec.__version__}, {'native core' if kvspec.has_native() else 'oracle only'}"
