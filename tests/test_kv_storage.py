"""KV storage: oracle and core against the suite, against each other, and beside an engine."""

import importlib
import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.kv_storage import KVStorageConformance
from kvspec.conformance.kv_storage.subjects import DTYPES, rows, same
from kvspec.errors import ContractError
from kvspec.instrumentation import instrument
from kvspec.poison import Poison
from peers import sglang

IMPLS = [kvspec.oracle, kvspec]


class TestOracle(KVStorageConformance):
    impl = kvspec.oracle


class TestNative(KVStorageConformance):
    impl = kvspec


class Player:
    """One random history, played to both: results, refusals, views and counters are compared."""

    size, layers = 8, 2

    def __init__(self, kind: str, dtype: torch.dtype, page_size: int, seed: int) -> None:
        self.kind, self.dtype, self.page_size = kind, dtype, page_size
        self.random, self.seed, self.serial = random.Random(seed), seed, 0
        self.rows = self.size + page_size
        self.pools = [self.pool(impl) for impl in IMPLS]
        self.hosts = [] if kind == "windows" else [*map(self.host, IMPLS, self.pools)]

    def pool(self, impl: Any) -> Any:
        shape: dict[str, Any] = {"size": self.size, "dtype": self.dtype, "device": "cpu"}
        shape |= {"page_size": self.page_size, "enable_memory_saver": False}
        if self.kind == "mla":
            return impl.MLATokenToKVPool(
                kv_lora_rank=4, qk_rope_head_dim=2, layer_num=self.layers, **shape
            )
        shape |= {"head_num": 2, "head_dim": 3}
        if self.kind == "mha":
            return impl.MHATokenToKVPool(layer_num=self.layers, **shape)
        ids = {"swa_attention_layer_ids": [1], "full_attention_layer_ids": [0]}
        pool = impl.SWAKVPool(size_swa=4, **ids, **shape)
        pairs = torch.zeros(self.rows, dtype=torch.int64)
        pairs[[self.page_size + 1, self.page_size + 6]] = torch.tensor(
            [self.page_size + 2, self.page_size]
        )
        pool.register_mapping(pairs)
        return pool

    def host(self, impl: Any, pool: Any) -> Any:
        made = impl.MLATokenToKVPoolHost if self.kind == "mla" else impl.MHATokenToKVPoolHost
        layout = ("layer_first", "page_first")[self.seed % 2]
        return made(pool, 4.0, 0, 4, layout, pin_memory=False)

    def slots(self, most: int = 5) -> list[int]:
        low = -1 if self.random.random() < 0.05 else 0
        high = self.rows + (self.random.random() < 0.05)
        if self.random.random() < 0.8:
            return self.random.sample(
                range(self.page_size, self.rows), self.random.randint(0, most)
            )
        return [self.random.randrange(low, high) for _ in range(self.random.randint(0, most))]

    def given(self, count: int, *row: int) -> torch.Tensor:
        self.serial += 1
        if self.random.random() < 0.5:
            return rows(count, *row, dtype=self.dtype, seed=self.serial)
        wide = (torch.float32, torch.bfloat16, torch.float16)
        return rows(count, *row, dtype=self.random.choice(wide), start=self.serial) / 7

    def both(self, call: Callable[[Any], object], subjects: list[Any]) -> list[object]:
        found: list[object] = []
        for subject in subjects:
            try:
                found.append(call(subject))
            except ContractError as error:
                found.append(str(error))
        assert plain(found[0]) == plain(found[1])
        return found

    def step(self) -> None:
        """One call of each."""
        layer = self.random.randrange(-1, self.layers + 1) if self.random.random() < 0.1 else 0
        layer = layer or self.random.randrange(self.layers)
        loc, row = self.slots(), (1, 6) if self.kind == "mla" else (2, 3)
        count = len(loc) + (self.random.random() < 0.05)
        k, v = self.given(count, *row), self.given(len(loc), *row)
        scale = self.random.choice([None, 2.0, 3.0])
        other = self.slots() if self.random.random() < 0.2 else self.slots(len(loc))[: len(loc)]
        copies = self.both(lambda pool: pool.get_cpu_copy(other), self.pools)
        calls: list[Callable[[Any], object]] = [
            lambda pool: pool.set_kv_buffer(layer, loc, k, v, scale, scale),
            lambda pool: pool.move_kv_cache(loc, other),
            lambda pool: (
                pool.load_cpu_copy(copies[self.pools.index(pool)], loc)
                if not isinstance(copies[0], str)
                else None
            ),
        ]
        if self.kind == "mla":
            parts = self.given(count, 1, 4), self.given(count, 1, 2)
            calls.append(lambda pool: pool.set_mla_kv_buffer(layer, loc, *parts))
        self.both(self.random.choice(calls), self.pools)
        if self.hosts:
            self.step_host(layer, loc)

    def step_host(self, layer: int, loc: list[int]) -> None:
        host = self.hosts[0]
        held = list(host.view().rows)
        picked = self.random.sample(range(host.size), len(loc))
        if len(held) >= len(loc) and self.random.random() < 0.8:
            picked = self.random.sample(held, len(loc))
        page = self.random.randrange(host.page_num) * 4
        amount = self.random.choice([4, 4, 8, 12, 3])

        def pool(host: Any) -> Any:
            return self.pools[self.hosts.index(host)]

        def backup(host: Any) -> object:
            return host.backup_from_device_all_layer(pool(host), picked, loc, "kernel")

        def load(host: Any) -> object:
            return host.load_to_device_per_layer(pool(host), picked, loc, layer, "kernel")

        def pass_on(host: Any) -> object:
            return host.set_from_flat_data_page(page, host.get_flat_data_page(held[0] // 4 * 4))

        calls: list[Callable[[Any], object]] = [
            lambda host: host.alloc(amount),
            lambda host: host.free([*range(page, page + 4)]),
            backup,
            backup,
            load,
        ]
        taken = self.both(self.random.choice([*calls, *([pass_on] if held else [])]), self.hosts)
        if isinstance(taken[0], torch.Tensor):  # nothing is known of what fresh rows hold
            for host in self.hosts:
                for slot in taken[0].tolist()[::4]:
                    host.set_from_flat_data_page(slot, host.get_dummy_flat_data_page())
        assert self.hosts[0].view() == self.hosts[1].view()
        assert self.hosts[0].counters() == self.hosts[1].counters()


def plain(found: object) -> object:
    """Tensors in lists as their bytes."""
    if isinstance(found, torch.Tensor):
        return list(found.shape), str(found.dtype), found.view(torch.uint8).tolist()
    return [plain(each) for each in found] if isinstance(found, list) else found


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["mha", "mla", "windows"])
def test_lockstep(kind: str, dtype: torch.dtype, page_size: int) -> None:
    """The same result, text, view and counters after every call."""
    for seed in (page_size, page_size + 1):
        player = Player(kind, dtype, page_size, seed)
        for _ in range(60):
            player.step()
            assert player.pools[0].view() == player.pools[1].view()
            assert player.pools[0].counters() == player.pools[1].counters()


@clause("KV-9", "KV-10", "KV-16", "KV-17")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_bits_are_those_of_an_engine(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float | None
) -> None:
    """SGLang 0.5.2 is given copies, as it divides in place."""
    sglang()
    graphs = ModuleType("sglang.srt.model_executor.cuda_graph_runner")
    monkeypatch.setattr(graphs, "get_is_capture_mode", lambda: False, raising=False)
    package = ModuleType("sglang.srt.model_executor")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, graphs.__name__, graphs)
    peer = importlib.import_module("sglang.srt.mem_cache.memory_pool")

    class Layer:
        layer_id = 1

    theirs = peer.MHATokenToKVPool(32, 4, dtype, 2, 8, 2, "cpu", False)
    ours = kvspec.MHATokenToKVPool(32, 4, dtype, 2, 8, 2, "cpu", False)
    loc = torch.randperm(32)[:20] + 4
    keys, values = torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    ours.set_kv_buffer(Layer(), loc, keys, values, scale, scale)
    theirs.set_kv_buffer(Layer(), loc, keys.clone(), values.clone(), scale, scale)
    for mine, other in zip(ours.get_kv_buffer(1), theirs.get_kv_buffer(1), strict=True):
        assert same(mine[4:], other[4:])


@clause("KV-1", "KV-3")
@pytest.mark.parametrize("impl", IMPLS, ids=["oracle", "native"])
def test_a_stale_read_of_a_pool_shows(impl: Any) -> None:
    """`rest` of a fresh page is poison, and what was written is not."""
    pool = impl.MHATokenToKVPool(16, 4, torch.bfloat16, 2, 4, 2, "cpu", False)
    allocator = impl.PagedTokenToKVPoolAllocator(
        16, 4, dtype=torch.bfloat16, device="cpu", kvcache=pool, need_sort=False
    )
    assert allocator.get_kvcache() is pool
    table = impl.ReqToTokenPool(2, 16, "cpu", False)
    cache = impl.RadixCache(table, allocator, page_size=4)
    poison = Poison(pool, 4)
    with instrument(cache, allocator, table, poison=poison):
        slots = allocator.alloc(8)
        given = rows(6, 2, 4, dtype=torch.bfloat16)
        pool.set_kv_buffer(1, slots[:6], given, given)
        assert poison.stale(pool.get_key_buffer(1)[slots[:6]]) == []
        read = pool.get_value_buffer(1)[slots]
        assert [stale.row for stale in poison.stale(read)] == [6, 7]
        allocator.free(slots[4:])
        assert [why for _, why in poison.stale(pool.get_key_buffer(1)[slots[4:]])] == 4 * ["freed"]
        pool.move_kv_cache(slots[4:5], slots[:1])
        assert len(poison.check([int(slots[4]) // 4])) == 1
