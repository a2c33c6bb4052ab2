"""What some tests need. Under CI nothing is missing: see conftest.py."""

import pytest

import kvspec

native = pytest.mark.skipif(not kvspec.has_native(), reason="the extension is absent")
