"""A request, from the queue to its end. Spec: SCHED-6 to SCHED-8."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvspec.interfaces.prefix_cache import LockReceipt, NodeHandle
from kvspec.interfaces.prefix_key import ExtraKey
from kvspec.interfaces.scheduler import FinishReason, State

__all__ = ["TOKEN_LIMIT", "Req"]

TOKEN_LIMIT = 2**31

_NO_SLOTS = torch.empty(0, dtype=torch.int64)


class Req:
    """A request as a caller makes it and a cache reads and writes it: `prefix_cache.Req`.

    `origin_input_ids` are the prompt; at most `max_new_tokens` come out, or until one of
    `stop_token_ids`, which comes out too. Requests with different `extra_key` share nothing.
    """

    def __init__(
        self,
        rid: str,
        origin_input_ids: Sequence[int],
        max_new_tokens: int,
        *,
        stop_token_ids: Iterable[int] = (),
        extra_key: ExtraKey = None,
    ) -> None:
        self.rid = rid
        self.origin_input_ids: Sequence[int] = [int(token) for token in origin_input_ids]
        self.max_new_tokens = max_new_tokens
        self.stop_token_ids = frozenset(stop_token_ids)
        self.extra_key = extra_key
        self._output: list[int] = []
        self.output_ids: Sequence[int] = self._output
        self.fill_ids: Sequence[int] = ()
        self.req_pool_idx: int | None = None
        self.prefix_indices: Tensor = _NO_SLOTS
        self.last_node: NodeHandle | None = None
        self.lock_receipt: LockReceipt | None = None
        self.cache_protected_len = 0
        self.kv_committed_len = 0
        self.kv_allocated_len = 0
        self.state: State = "new"
        self.finished_reason: FinishReason | None = None
        self.arrival = 0
        self.cached_tokens = 0
        self.was_admitted = False
        self.retraction_count = 0
        self.tokens_in_flight = 0
        """Launched and not settled: 1 while a decode step has it."""

    @property
    def length(self) -> int:
        """Tokens known so far."""
        return len(self.origin_input_ids) + len(self.output_ids)

    @property
    def tokens(self) -> list[int]:
        """Prompt and output. O(length)."""
        return [*self.origin_input_ids, *self.output_ids]

    @property
    def remaining(self) -> int:
        """How many tokens may still come out, besides those in flight."""
        return self.max_new_tokens - len(self.output_ids) - self.tokens_in_flight

    @property
    def most_slots(self) -> int:
        """The longest that its row can become: the last token has no KV."""
        return len(self.origin_input_ids) + self.max_new_tokens - 1

    @property
    def is_prefilled(self) -> bool:
        """Whether all its tokens but the last have KV, which then is to be decoded."""
        return bool(self.output_ids) and self.kv_committed_len == self.length - 1

    def put_out(self, token: int) -> None:
        """A token has come out; all before it have KV."""
        self._output.append(token)
        self.kv_committed_len = self.length - 1

    def wait(self) -> None:
        """Forget what it owned, and keep what came out of it."""
        self.fill_ids, self.prefix_indices = (), _NO_SLOTS
        self.last_node = self.lock_receipt = self.req_pool_idx = None
        self.cache_protected_len = self.kv_committed_len = self.kv_allocated_len = 0
        self.tokens_in_flight = 0

    def __repr__(self) -> str:
        return (
            f"Req({self.rid!r}, {len(self.origin_input_ids)} + {len(self.output_ids)} tokens, "
            f"{self.state})"
        )
