"""The scheduler: the suite over both implementations."""

import kvspec
import kvspec.oracle
from kvspec.conformance.scheduler import SchedulerConformance


class TestOracle(SchedulerConformance):
    impl = kvspec.oracle


class TestNative(SchedulerConformance):
    impl = kvspec
