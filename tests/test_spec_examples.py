"""Every example in spec/ is executed against every implementation."""

import doctest
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

import kvspec
from kvspec import oracle
from kvspec.clauses import rooms, spec_folder
from kvspec.conformance.prefix_cache import System
from kvspec.conformance.scheduler.worker import WordWorker
from kvspec.model_runner import MemoryFigures, pool_sizes

IMPLS: list[ModuleType] = [oracle, kvspec]


def numbers(tensor: torch.Tensor) -> list[int]:
    assert tensor.dim() == 1
    return [int(number) for number in tensor]


def names(impl: ModuleType) -> dict[str, Any]:
    """What the examples may use."""
    memory: dict[str, Any] = {"dtype": torch.float16, "device": "cpu", "kvcache": None}
    table: dict[str, Any] = {"device": "cpu", "enable_memory_saver": False}

    def saver() -> type[Any]:
        """A class of its own, which no other example has."""
        return type("Saver", (impl.TorchMemorySaverAdapter,), {})

    def with_defaults(make: Any, defaults: dict[str, Any], **given: Any) -> Any:
        return make(**{**defaults, **given})

    def channel(**given: Any) -> Any:
        shape = {"label": "example", "block_bytes": 8, "block_count": 2, "reader_count": 1}
        return impl.ShmChannel.create(**(shape | given))

    def scheduler(**given: Any) -> Any:
        args = impl.ServerArgs(
            disable_overlap_schedule=True,
            implementation="oracle" if impl is oracle else "native",
        )
        return impl.Scheduler(args, WordWorker(impl, rows=8, **given))

    def readers(writer: Any, *places: int) -> list[Any]:
        attach = impl.ShmChannel.attach
        return [attach(writer.name, r) for r in places or range(writer.reader_count)]

    memory |= {"need_sort": False}
    return {
        "numbers": numbers,
        "paged": partial(with_defaults, impl.PagedTokenToKVPoolAllocator, memory),
        "swa": partial(with_defaults, impl.SWATokenToKVPoolAllocator, memory | {"page_size": 1}),
        "token": partial(with_defaults, impl.TokenToKVPoolAllocator, memory),
        "rows": partial(with_defaults, impl.ReqToTokenPool, table),
        "decode_rows": partial(with_defaults, impl.DecodeReqToTokenPool, table),
        "budget": impl.MemoryBudget,
        "arena": impl.HostArena,
        "torch": torch,
        **storage(impl),
        "generate_cache": partial(transformers_cache, impl),
        "language_model": language_model,
        "process_saver": partial(impl.TorchMemorySaverAdapter.create, True),
        "create": saver().create,
        "fresh": lambda: saver().create(True),
        "ledger": partial(impl.OwnershipLedger, page_size=4, row_count=2),
        "channel": channel,
        "readers": readers,
        "scheduler": scheduler,
        "req": impl.Req,
        "radix": partial(System.make, impl),
        "swaradix": partial(System.make, impl, kind="swaradix"),
        "swachunk": partial(System.make, impl, kind="swachunk", handed_out=False),
        "segment": impl.SharedSegment.create,
        "attach": impl.SharedSegment.attach,
        "page_hashes": kvspec.page_hashes,
        "pool_sizes": pool_sizes,
        "MemoryFigures": MemoryFigures,
        "namespace_frame": oracle.namespace_frame,
    }


def language_model(family: str) -> Any:
    """A tiny model of transformers, which few examples need."""
    from kvspec.conformance.generate_cache import language_model

    return language_model(family)


def transformers_cache(impl: ModuleType, model: Any, **given: Any) -> Any:
    used = "oracle" if impl is oracle else "native"
    return kvspec.KvspecCache(model, implementation=used, **given)


def storage(impl: ModuleType) -> dict[str, Any]:
    """Pools of KV of 4 slots and 2 layers, the second of which may have a window."""
    shape: dict[str, Any] = {"size": 4, "dtype": torch.float32, "device": "cpu", "page_size": 1}
    shape |= {"enable_memory_saver": False}
    heads, layers = {"head_num": 2, "head_dim": 3}, {"layer_num": 2}
    latent = {"kv_lora_rank": 4, "qk_rope_head_dim": 2}
    windows = {"swa_attention_layer_ids": [1], "full_attention_layer_ids": [0], "size_swa": 2}

    def mha(**given: Any) -> Any:
        return impl.MHATokenToKVPool(**shape | heads | layers | given)

    def host(
        size: int = 4,
        page_size: int = 1,
        host_to_device_ratio: float = 2,
        layout: str = "layer_first",
    ) -> Any:
        sizes = host_to_device_ratio, 0, page_size, layout
        return impl.MHATokenToKVPoolHost(mha(size=size), *sizes, pin_memory=False)

    return {
        "filled": lambda value, *shape: torch.full(shape, float(value)),
        "float8": torch.float8_e4m3fn,
        "host": host,
        "integers": lambda given: torch.tensor(given, dtype=torch.int64),
        "mha": mha,
        "mla": lambda **given: impl.MLATokenToKVPool(**shape | latent | layers | given),
        "windows": lambda **given: impl.SWAKVPool(**shape | heads | windows | given),
    }


@pytest.mark.parametrize("impl", IMPLS, ids=lambda impl: impl.__name__)
@pytest.mark.parametrize("room", rooms()["room"])
def test_examples(room: str, impl: ModuleType) -> None:
    text = (spec_folder() / f"{room}.md").read_text(encoding="utf-8")
    test = doctest.DocTestParser().get_doctest(text, names(impl), room, f"spec/{room}.md", 0)
    out: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL * 0)
    runner.run(test, out=out.append)
    assert runner.failures == 0, "".join(out)


def test_there_are_examples() -> None:
    texts = [(spec_folder() / f"{room}.md").read_text(encoding="utf-8") for room in rooms()["room"]]
    assert sum(text.count("    >>> ") for text in texts) > 40
