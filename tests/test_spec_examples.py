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

    memory |= {"need_sort": False}
    return {
        "numbers": numbers,
        "paged": partial(with_defaults, impl.PagedTokenToKVPoolAllocator, memory),
        "swa": partial(with_defaults, impl.SWATokenToKVPoolAllocator, memory | {"page_size": 1}),
        "token": partial(with_defaults, impl.TokenToKVPoolAllocator, memory),
        "rows": partial(with_defaults, impl.ReqToTokenPool, table),
        "decode_rows": partial(with_defaults, impl.DecodeReqToTokenPool, table),
        "arena": impl.HostArena,
        "torch": torch,
        "process_saver": partial(impl.TorchMemorySaverAdapter.create, True),
        "create": saver().create,
        "fresh": lambda: saver().create(True),
        "ledger": partial(impl.OwnershipLedger, page_size=4, row_count=2),
        "radix": partial(System.make, impl),
        "swaradix": partial(System.make, impl, kind="swaradix"),
        "swachunk": partial(System.make, impl, kind="swachunk", handed_out=False),
        "segment": impl.SharedSegment.create,
        "attach": impl.SharedSegment.attach,
        "page_hashes": kvspec.page_hashes,
        "namespace_frame": oracle.namespace_frame,
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
