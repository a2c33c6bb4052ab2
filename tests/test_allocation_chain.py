"""The allocation chain: the suite, the command, and strace where it is."""

import kvspec
import kvspec.oracle
from kvspec.conformance.allocation_chain import AllocationChainConformance


class TestOracle(AllocationChainConformance):
    impl = kvspec.oracle


class TestNative(AllocationChainConformance):
    impl = kvspec
