"""KV storage: oracle and core against the suite, against each other, and beside an engine."""

import kvspec
import kvspec.oracle
from kvspec.conformance.kv_storage import KVStorageConformance


class TestOracle(KVStorageConformance):
    impl = kvspec.oracle


class TestNative(KVStorageConformance):
    impl = kvspec
