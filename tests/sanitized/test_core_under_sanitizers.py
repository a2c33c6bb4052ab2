"""The core's conformance suites and a lockstep run, in a build with ASan and UBSan.

`make sanitize` runs this folder with the sanitized extension first on the path. In an ordinary run
it is not collected: the same tests run there from where they belong. What is random is lockstep's
here: a suite's machines run as long as they do for a mutant. Arenas and segments are not here:
their suites look at mappings, limits and descriptors, of which a sanitizer has its own; tests/cpp
has them.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvspec
from kvspec import _core
from kvspec.conformance.chunk_cache import ChunkCacheConformance
from kvspec.conformance.kv_storage import KVStorageConformance
from kvspec.conformance.lockstep.campaign import campaign
from kvspec.conformance.ownership_ledger import OwnershipLedgerConformance
from kvspec.conformance.page_allocator import PageAllocatorConformance
from kvspec.conformance.prefix_cache import PrefixCacheConformance
from kvspec.conformance.radix_cache import RadixCacheConformance
from kvspec.conformance.request_pool import RequestPoolConformance
from kvspec.conformance.shm_channel import ShmChannelConformance
from kvspec.conformance.slot_allocator import SlotAllocatorConformance
from kvspec.conformance.suite import short_fuzzing
from kvspec.conformance.swa_allocator import SWAAllocatorConformance
from kvspec.conformance.swa_radix_cache import SWARadixCacheConformance
from test_ownership_ledger import play


@pytest.fixture(autouse=True)
def few_examples() -> Iterator[None]:
    with short_fuzzing():
        yield


def test_the_extension_is_the_sanitized_one() -> None:
    assert "sanitize" in Path(_core.__file__).parts


class TestPageAllocator(PageAllocatorConformance):
    impl = kvspec


class TestSlotAllocator(SlotAllocatorConformance):
    impl = kvspec


class TestSWAAllocator(SWAAllocatorConformance):
    impl = kvspec


class TestRequestPool(RequestPoolConformance):
    impl = kvspec


class TestShmChannel(ShmChannelConformance):
    impl = kvspec


class TestKVStorage(KVStorageConformance):
    impl = kvspec


class TestOwnershipLedger(OwnershipLedgerConformance):
    impl = kvspec


class TestPrefixCache(PrefixCacheConformance):
    impl = kvspec


class TestRadixCache(RadixCacheConformance):
    impl = kvspec


class TestSWARadixCache(SWARadixCacheConformance):
    impl = kvspec


class TestChunkCache(ChunkCacheConformance):
    impl = kvspec


@pytest.mark.parametrize(("memory", "operations"), [("full", 40_000), ("swa", 20_000)])
def test_lockstep(memory: str, operations: int) -> None:
    found = campaign(range(1000, 1008), operations, memory=memory)
    assert found.failure is None


@pytest.mark.parametrize("page_size", [1, 3])
def test_lockstep_of_the_ledger(page_size: int) -> None:
    for seed in range(1000, 1004):
        play(seed, page_size, 300)
