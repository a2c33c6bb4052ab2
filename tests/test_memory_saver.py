"""The memory saver: oracle and native against the suite, and against each other."""

import kvspec
import kvspec.oracle
from kvspec.conformance.memory_saver import MemorySaverConformance


class TestOracle(MemorySaverConformance):
    impl = kvspec.oracle


class TestNative(MemorySaverConformance):
    impl = kvspec
