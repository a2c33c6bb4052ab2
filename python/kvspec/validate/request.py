"""A request that stands for one of a log. Spec: VALID."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvspec.interfaces.prefix_key import ExtraKey

__all__ = ["PlayedRequest"]


class PlayedRequest:
    """A request with the attributes that kvspec's caches ask for, and those that SGLang's do."""

    def __init__(self, row: int, node: Any, receipt: Any, prefix: Tensor) -> None:
        self.rid = f"row {row}"
        self.req_pool_idx: int | None = row
        self.origin_input_ids: Sequence[int] = []
        self.output_ids: Sequence[int] = []
        self.fill_ids: Sequence[int] = []
        self.extra_key: ExtraKey = None
        self.prefix_indices = prefix
        self.cache_protected_len = len(prefix)
        self.last_node: Any = node
        self.last_host_node: Any = node
        self.lock_receipt: Any = receipt
        self.swa_uuid_for_lock: int | None = None
        self.evicted_seqlen_local = 0
        self.host_hit_length = 0

    def holds(self, tokens: list[int]) -> None:
        """These have been computed; one more was sampled, which has no KV."""
        self.fill_ids = self.origin_input_ids = tokens
        self.output_ids = [0]
