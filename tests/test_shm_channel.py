"""The channel: oracle and core against the suite, against each other, and processes that die."""

import kvspec
import kvspec.oracle
from kvspec.conformance.shm_channel import ShmChannelConformance


class TestOracle(ShmChannelConformance):
    impl = kvspec.oracle


class TestNative(ShmChannelConformance):
    impl = kvspec
