"""The tensors that KV is kept in, row by row. Spec: KV."""

from kvspec.oracle.kv_storage.host import HostKVCache, MHATokenToKVPoolHost, MLATokenToKVPoolHost
from kvspec.oracle.kv_storage.pools import KVCache, MHATokenToKVPool, MLATokenToKVPool
from kvspec.oracle.kv_storage.windows import SWAKVPool

__all__ = [
    "HostKVCache",
    "KVCache",
    "MHATokenToKVPool",
    "MHATokenToKVPoolHost",
    "MLATokenToKVPool",
    "MLATokenToKVPoolHost",
    "SWAKVPool",
]
