"""The model runner: the suite, real weights, and what a step in float64 says of rounding."""

import kvspec
import kvspec.oracle
from kvspec.conformance.model_runner import ModelRunnerConformance
from needs import native


class TestOracle(ModelRunnerConformance):
    impl = kvspec.oracle


@native
class TestNative(ModelRunnerConformance):
    impl = kvspec
