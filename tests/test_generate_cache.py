"""Prefix reuse in transformers: the suite."""

import kvspec
import kvspec.oracle
from kvspec.conformance.generate_cache import GenerateCacheConformance


class TestOracle(GenerateCacheConformance):
    impl = kvspec.oracle


class TestNative(GenerateCacheConformance):
    impl = kvspec
