"""What every pool of KV tensors must do. Spec: KV."""

from kvspec.conformance.kv_storage.copies import CopyConformance
from kvspec.conformance.kv_storage.histories import HistoryConformance
from kvspec.conformance.kv_storage.host import HostConformance
from kvspec.conformance.kv_storage.memory import MemoryConformance
from kvspec.conformance.kv_storage.windows import WindowStorageConformance
from kvspec.conformance.kv_storage.writing import WritingConformance

__all__ = ["FocusedKVStorageConformance", "KVStorageConformance"]


class FocusedKVStorageConformance(
    MemoryConformance,
    WritingConformance,
    CopyConformance,
    WindowStorageConformance,
    HostConformance,
):
    """Tests of the pools of a device, of windows and of the host, each of what it says."""


class KVStorageConformance(FocusedKVStorageConformance, HistoryConformance):
    """The same, and random histories."""
