"""Host memory: oracle and core against the suite and each other, and what machines differ in."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.host_memory import HostMemoryConformance
from kvspec.conformance.host_memory.kernel import is_mapped
from kvspec.errors import CLAUSE_ERRORS
from needs import root

IMPLS = [kvspec.oracle, kvspec]
PAGE = 4096
DTYPES = (torch.uint8, torch.bool, torch.int16, torch.bfloat16, torch.float32, torch.int64)
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


class TestOracle(HostMemoryConformance):
    impl = kvspec.oracle


class TestNative(HostMemoryConformance):
    impl = kvspec


class Pair:
    """The same calls on both; the same results, texts, bytes and counts."""

    def __init__(self, random_: random.Random) -> None:
        self.random = random_
        self.arenas: list[Any] = []
        self.tensors: list[list[torch.Tensor]] = [[], []]

    def both(self, *calls: Any) -> list[Any]:
        """What each gives, or the text of its refusal, which must be the same."""
        results, texts = [], []
        for call in calls:
            try:
                results.append(call())
                texts.append("")
            except CLAUSE_ERRORS as error:
                texts.append(f"{type(error).__name__} {error}")
        assert texts[0] == texts[1]
        return results

    def open(self) -> None:
        kind = self.random.choice(["torch", "heap", "mmap", "mmap", "shm", "pinned", "tape"])
        nbytes = self.random.choice([-1, 0, 100, PAGE, 3 * PAGE + 5, 5 * PAGE])
        given = {
            "alignment": self.random.choice([None, None, 1, 3, 16, 64, PAGE, 1 << 21, 1 << 22]),
            "populate": self.random.random() < 0.3,
            "huge_pages": self.random.choice(["no"] * 5 + ["transparent", "implicit"]),
            "numa_node": self.random.choice([None] * 5 + [0, 77]),
        }
        self.tensors = [[], []]
        self.arenas = self.both(*(lambda i=i: i.HostArena(kind, nbytes, **given) for i in IMPLS))
        for arena in self.arenas:
            if arena.kind in ("torch", "heap"):
                arena.tensor().zero_()

    def tensor(self) -> None:
        dtype = self.random.choice(DTYPES)
        offset = self.random.choice([0, 1, 8, 16, PAGE, 3 * PAGE, -8])
        shape = self.random.choice([None, (), (3,), (2, 5), (PAGE,), (0, 4), (-1, 2), (2**62, 8)])
        made = self.both(*(lambda a=a: a.tensor(dtype, shape, offset) for a in self.arenas))
        if made:
            assert made[0].shape == made[1].shape
            for kept, one in zip(self.tensors, made, strict=True):
                if one.numel():
                    kept.append(one)

    def write(self) -> None:
        if self.tensors[0]:
            which, value = self.random.randrange(len(self.tensors[0])), self.random.randrange(256)
            for kept in self.tensors:
                kept[which].view(-1).view(torch.uint8).fill_(value)

    def drop(self) -> None:
        if self.tensors[0]:
            which = self.random.randrange(len(self.tensors[0]))
            for kept in self.tensors:
                del kept[which]

    def pages(self) -> None:
        name = self.random.choice(["discard", "populate"])
        offset = self.random.choice([0, 1, PAGE, 2 * PAGE, -PAGE])
        nbytes = self.random.choice([None, 0, 5, PAGE, 2 * PAGE, -PAGE])
        self.both(*(lambda a=a: getattr(a, name)(offset, nbytes) for a in self.arenas))

    def close(self) -> None:
        self.both(*(a.close for a in self.arenas))

    def compare(self) -> None:
        one, other = self.arenas
        assert one.view() == other.view()
        counts = [arena.counters() for arena in self.arenas]
        if one.kind in ("torch", "heap"):  # a few bytes lie on one page or on two
            for count in counts:
                del count["pages_populated"]
        assert counts[0] == counts[1]
        names = ("nbytes", "mapped_bytes", "pinned_bytes", "page_bytes")
        assert [getattr(one, n) for n in names] == [getattr(other, n) for n in names]
        if not one.view().closed:
            assert one.resident_bytes() == other.resident_bytes()
            assert torch.equal(one.tensor(), other.tensor())
        for arena in self.arenas:
            arena.check()


@pytest.mark.parametrize("seed", range(8))
def test_lockstep(seed: int) -> None:
    """Random histories; of the counters the threads are those that oracle says it may use."""
    pair = Pair(random.Random(seed))
    steps = [pair.tensor] * 4 + [pair.write] * 4 + [pair.drop] * 2 + [pair.pages] * 3 + [pair.close]
    done = 0
    for _ in range(150):
        if not pair.arenas:
            pair.open()
        else:
            pair.random.choice(steps)()
            pair.compare()
            done += 1
            if pair.random.random() < 0.08:
                pair.arenas = []
    assert done > 50, f"seed {seed}"


@contextmanager
def two_huge_pages() -> Iterator[None]:
    """Inside, the machine has at least two that nobody uses."""
    before = HUGE_PAGES.read_text(encoding="ascii")
    HUGE_PAGES.write_text(str(int(before) + 2), encoding="ascii")
    try:
        yield
    finally:
        HUGE_PAGES.write_text(before, encoding="ascii")


@clause("HOST-8")
@root
@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="the kernel has no huge pages")
@pytest.mark.parametrize("impl", IMPLS, ids=["oracle", "native"])
def test_huge_pages_that_are_set_aside(impl: Any) -> None:
    """Whole ones, and discarded as such; set aside by root, as CI is."""
    with two_huge_pages():
        arena = impl.HostArena("mmap", (2 << 20) + 1, huge_pages="explicit", populate=True)
        assert (arena.page_bytes, arena.mapped_bytes) == (2 << 20, 4 << 20)
        assert arena.address % (2 << 20) == 0
        assert arena.resident_bytes() == 4 << 20
        arena.tensor().fill_(1)
        with pytest.raises(CLAUSE_ERRORS, match=r"HOST-20: .* not whole pages of 2097152"):
            arena.discard(0, 4096)
        arena.discard(0, 2 << 20)
        assert arena.resident_bytes() == 2 << 20
        assert int(arena.tensor().sum()) == 1
        arena.close()


@clause("HOST-15")
@pytest.mark.parametrize("impl", IMPLS, ids=["oracle", "native"])
def test_no_order_of_destruction_leaves_a_tensor_without_memory(impl: Any) -> None:
    """Of an arena, two tensors and a view of one, in every order."""
    for order in range(24):
        arena = impl.HostArena("mmap", 1 << 20)
        address = arena.address
        things: list[Any] = [arena, arena.tensor(), arena.tensor(torch.int32, (5,), 8)]
        things.append(things[1][100:200])
        del arena
        left = list(range(4))
        for base in (4, 3, 2, 1):
            order, which = divmod(order, base)
            things[left.pop(which)] = None
            alive = [t for t in things if isinstance(t, torch.Tensor)]
            for tensor in alive:
                tensor.fill_(1)
            assert is_mapped(address) or not alive
    gc.collect()


@clause("HOST-11", "HOST-12")
@pytest.mark.parametrize("impl", IMPLS, ids=["oracle", "native"])
def test_pages_that_go_move_nowhere_else(impl: Any) -> None:
    """Also after they were discarded, and of every node that the machine has."""
    for node in impl.HostArena.capabilities().memory_nodes or ():
        for kind in ("mmap", "shm"):
            arena = impl.HostArena(kind, 64 * PAGE, numa_node=node, populate=True)
            arena.discard()
            assert arena.numa_nodes() == {}
            arena.populate()
            assert arena.numa_nodes() == {node: 64 * PAGE}
