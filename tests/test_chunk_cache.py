"""The clauses CHUNK, decided for the oracle and the core."""

import kvspec
from kvspec import oracle
from kvspec.conformance.chunk_cache import ChunkCacheConformance


class TestOracle(ChunkCacheConformance):
    impl = oracle


class TestNative(ChunkCacheConformance):
    impl = kvspec
