"""The model runner: the suite, real weights, and what a step in float64 says of rounding."""

import kvspec
import kvspec.oracle
from kvspec.conformance.model_runner import ModelRunnerConformance, ModelRunnerToolsConformance
from needs import native


class TestOracle(ModelRunnerConformance, ModelRunnerToolsConformance):
    impl = kvspec.oracle


@native
class TestNative(ModelRunnerConformance, ModelRunnerToolsConformance):
    impl = kvspec
