"""Host memory: oracle and core against the suite and each other, and what machines differ in."""

import kvspec
import kvspec.oracle
from kvspec.conformance.host_memory import HostMemoryConformance


class TestOracle(HostMemoryConformance):
    impl = kvspec.oracle


class TestNative(HostMemoryConformance):
    impl = kvspec
