"""The KV-cache memory system of LLM servers: specification, oracle, fast core, conformance suite.

`kvspec.X` is the native class, `kvspec.oracle.X` the oracle; their signatures are the same. Where
the extension is absent the oracle, the interfaces and the conformance suite still work, and asking
for a native class says so.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvspec.errors import ContractError, MemoryLeakError
from kvspec.memory_checker import SWATokenInfo, check_memory, get_swa_token_info
from kvspec.prefix_key import RadixKey, namespace_frame, page_hashes

if TYPE_CHECKING:
    from kvspec.flight_recorder import FlightRecorder, read_log
    from kvspec.generate_cache import KvspecCache
    from kvspec.instrumentation import Instrument, instrument
    from kvspec.memory_budget import MemoryBudget
    from kvspec.model_runner import ModelRunner
    from kvspec.native import (
        ChunkCache,
        DecodeReqToTokenPool,
        HostArena,
        HostKVCache,
        KVCache,
        MHATokenToKVPool,
        MHATokenToKVPoolHost,
        MLATokenToKVPool,
        MLATokenToKVPoolHost,
        OwnershipLedger,
        PagedTokenToKVPoolAllocator,
        RadixCache,
        RadixCacheCpp,
        ReqToTokenPool,
        SharedSegment,
        ShmChannel,
        SWAChunkCache,
        SWAKVPool,
        SWARadixCache,
        SWATokenToKVPoolAllocator,
        TokenToKVPoolAllocator,
        TorchMemorySaverAdapter,
    )
    from kvspec.poison import Poison
    from kvspec.scheduler import Req, Scheduler, ServerArgs

__all__ = [
    "ChunkCache",
    "ContractError",
    "DecodeReqToTokenPool",
    "FlightRecorder",
    "HostArena",
    "HostKVCache",
    "Instrument",
    "KVCache",
    "KvspecCache",
    "MHATokenToKVPool",
    "MHATokenToKVPoolHost",
    "MLATokenToKVPool",
    "MLATokenToKVPoolHost",
    "MemoryBudget",
    "MemoryLeakError",
    "ModelRunner",
    "OwnershipLedger",
    "PagedTokenToKVPoolAllocator",
    "Poison",
    "RadixCache",
    "RadixCacheCpp",
    "RadixKey",
    "Req",
    "ReqToTokenPool",
    "SWAChunkCache",
    "SWAKVPool",
    "SWARadixCache",
    "SWATokenInfo",
    "SWATokenToKVPoolAllocator",
    "Scheduler",
    "ServerArgs",
    "SharedSegment",
    "ShmChannel",
    "TokenToKVPoolAllocator",
    "TorchMemorySaverAdapter",
    "check_memory",
    "get_swa_token_info",
    "has_native",
    "instrument",
    "namespace_frame",
    "page_hashes",
    "read_log",
]

__version__ = "0.1.0"


_TOOLS = {
    "FlightRecorder": "flight_recorder",
    "Instrument": "instrumentation",
    "KvspecCache": "generate_cache",
    "MemoryBudget": "memory_budget",
    "ModelRunner": "model_runner",
    "Poison": "poison",
    "Req": "scheduler",
    "Scheduler": "scheduler",
    "ServerArgs": "scheduler",
    "instrument": "instrumentation",
    "read_log": "flight_recorder",
}
"""What is in a module that is loaded when it is asked for."""


def has_native() -> bool:
    """Whether the extension was built."""
    return find_spec("kvspec._core") is not None


def __getattr__(name: str) -> object:
    if name in ("conformance", "interfaces", "native", "oracle"):
        return import_module(f"kvspec.{name}")
    if name in _TOOLS:
        return getattr(import_module(f"kvspec.{_TOOLS[name]}"), name)
    if name not in __all__:
        raise AttributeError(f"module 'kvspec' has no attribute {name!r}")
    if not has_native():
        raise ImportError(f"kvspec.{name} needs the extension, which is absent: use kvspec.oracle")
    from kvspec import native

    return getattr(native, name)
