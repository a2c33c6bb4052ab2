"""The tensors that KV is kept in, in torch's memory, and the core that copies rows. Spec: KV."""

from kvspec.native.kv_storage.host import HostKVCache, MHATokenToKVPoolHost, MLATokenToKVPoolHost
from kvspec.native.kv_storage.pools import KVCache, MHATokenToKVPool, MLATokenToKVPool
from kvspec.native.kv_storage.windows import SWAKVPool

__all__ = [
    "HostKVCache",
    "KVCache",
    "MHATokenToKVPool",
    "MHATokenToKVPoolHost",
    "MLATokenToKVPool",
    "MLATokenToKVPoolHost",
    "SWAKVPool",
]
