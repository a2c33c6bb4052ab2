"""Shared memory: oracle and core against the suite and each other, and processes that are killed."""

import kvspec
import kvspec.oracle
from kvspec.conformance.shared_memory import SharedMemoryConformance


class TestOracle(SharedMemoryConformance):
    impl = kvspec.oracle


class TestNative(SharedMemoryConformance):
    impl = kvspec
