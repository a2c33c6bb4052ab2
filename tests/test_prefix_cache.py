"""Prefix caches: oracle and core against the suite, and what engines have got wrong."""

import kvspec
from kvspec import oracle
from kvspec.conformance.prefix_cache import PrefixCacheConformance


class TestOracle(PrefixCacheConformance):
    impl = oracle


class TestNative(PrefixCacheConformance):
    impl = kvspec
