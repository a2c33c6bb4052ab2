"""The demo: its suite, its page in a browser, its command."""

import kvspec
import kvspec.oracle
from kvspec.conformance.demo import DemoConformance
from needs import native


class TestOracle(DemoConformance):
    impl = kvspec.oracle


@native
class TestNative(DemoConformance):
    impl = kvspec
