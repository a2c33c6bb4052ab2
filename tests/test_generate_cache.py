"""Prefix reuse in transformers: the suite, rounding, and that nothing else needs transformers."""

import copy
import subprocess
import sys

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance.generate_cache import (
    FAMILIES,
    GenerateCacheConformance,
    language_model,
    words,
)
from kvspec.conformance.suite import one_thread
from needs import native


class TestOracle(GenerateCacheConformance):
    impl = kvspec.oracle


@native
class TestNative(GenerateCacheConformance):
    impl = kvspec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_close_to_float64_as_without_it(family: str, dtype: torch.dtype) -> None:
    """A prompt of which most was computed before, in another call, and five tokens more."""
    rounded = copy.deepcopy(language_model(family)).to(dtype)
    exact = copy.deepcopy(rounded).double()
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with one_thread(), kvspec.KvspecCache(rounded, 256, 4) as cache, torch.no_grad():
        rounded.generate(words(13), **options, past_key_values=cache)
        ours = rounded.generate(words(13, 3), **options, past_key_values=cache)
        theirs = rounded.generate(words(13, 3), **options)
        assert cache.counters()["cached_tokens"] == 12
        errors = [
            (torch.cat(said.logits).double() - exact(said.sequences).logits[0, 15:-1]).abs().max()
            for said in (ours, theirs)
        ]
    assert 0 < errors[0] <= 4 * errors[1] + 100 * torch.finfo(dtype).eps


def test_without_transformers_the_rest_is_there() -> None:
    """It is imported when the cache is asked for, and an ImportError says what is missing."""
    program = """
import sys, importlib.util
sys.modules["transformers"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "transformers" else find(name, *a)
import kvspec
kvspec.RadixKey, kvspec.check_memory
try:
    kvspec.KvspecCache
except ImportError as error:
    assert "kvspec[models]" in str(error), error
else:
    raise AssertionError("it is there")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
