"""SGLang 0.5.2's memory layer, loaded on a CPU without its engine.

`make peers` brings it (2 MB, pure Python). Its package is entered past its own `__init__`, and what
the memory layer imports but never calls on a CPU is stood in for by empty modules. Nothing of it is
changed.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

__all__ = ["Sglang", "sglang"]


class Sglang(NamedTuple):
    RadixCache: Any
    TokenToKVPoolAllocator: Any
    PagedTokenToKVPoolAllocator: Any
    ReqToTokenPool: Any
    SWATokenToKVPoolAllocator: Any
    SWAKVPool: Any
    SWARadixCache: Any


class _Kernel:
    """A Triton kernel where there is no Triton: it can be named and not launched."""

    def __init__(self, function: object) -> None:
        self.function = function


def _module(name: str, path: Path | None = None, **names: object) -> None:
    module = ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    module.__dict__.update(names)
    sys.modules[name] = module


def sglang() -> Sglang:
    """The classes of SGLang 0.5.2, or a skip with the reason if it is not installed."""
    if "sglang.srt.mem_cache" not in sys.modules:
        spec = importlib.util.find_spec("sglang")
        if spec is None or not spec.submodule_search_locations:
            assert not os.environ.get("CI"), "CI runs with the peers: make peers"
            pytest.skip("the peer is absent: make peers")
        root = Path(next(iter(spec.submodule_search_locations)))
        for name in ("", "/srt", "/srt/disaggregation", "/srt/mem_cache"):
            _module("sglang" + name.replace("/", "."), Path(f"{root}{name}"))
        never = dict.fromkeys(("is_cuda", "is_npu", "is_xpu"), lambda: False)
        _module("triton.language", constexpr=object)
        _module("triton", jit=_Kernel, language=sys.modules["triton.language"])
        _module("sglang.srt.utils", get_bool_env_var=lambda *_: False, next_power_of_2=int, **never)
        _module("sglang.srt.layers")
        _module("sglang.srt.layers.radix_attention", RadixAttention=object)
        events = dict.fromkeys(("AllBlocksCleared", "BlockRemoved", "BlockStored"), object)
        _module("sglang.srt.disaggregation.kv_events", **events)
    radix = importlib.import_module("sglang.srt.mem_cache.radix_cache")
    allocator = importlib.import_module("sglang.srt.mem_cache.allocator")
    pool = importlib.import_module("sglang.srt.mem_cache.memory_pool")
    windows = importlib.import_module("sglang.srt.mem_cache.swa_radix_cache")
    return Sglang(
        radix.RadixCache,
        allocator.TokenToKVPoolAllocator,
        allocator.PagedTokenToKVPoolAllocator,
        pool.ReqToTokenPool,
        allocator.SWATokenToKVPoolAllocator,
        pool.SWAKVPool,
        windows.SWARadixCache,
    )
