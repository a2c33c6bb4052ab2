"""The worker: a decoder of transformers, its pools, and a step over them."""

from importlib import import_module
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch

from kvspec.errors import ContractError
from kvspec.interfaces.model_runner import ForwardBatch, GenerationBatchResult
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator
from kvspec.model_runner.attention import PagedAttention
from kvspec.model_runner.decoder import Decoder
from kvspec.model_runner.pools import kv_pool, make_allocator, require_batch
from kvspec.model_runner.sizing import PoolSizes, memory_figures, pool_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Implementation", "ModelRunner"]

Implementation: TypeAlias = Literal["native", "oracle"]

_NAMESPACES = {"native": "kvspec", "oracle": "kvspec.oracle"}


class ModelRunner:
    """Runs any decoder of transformers whose attention can be replaced, over KV in slots.

    A ModelWorker. All new tokens of a step go through the model in one call, and attend to KV that
    is read by slot. The model that is given is not touched: the runner has a copy, which shares its
    parameters, and with them changes that are made in place (RUN-13).
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        page_size: int,
        max_running_requests: int,
        context_length: int,
        max_total_tokens: int | None = None,
        mem_fraction_static: float = 0.5,
        implementation: Implementation = "native",
        kv_cache_dtype: torch.dtype | None = None,
        swa_full_tokens_ratio: float = 0.8,
        need_sort: bool = False,
        keep_logits: bool = False,
        enable_memory_saver: bool = False,
        checked: bool = True,
    ) -> None:
        """Look at the model, try it, and make the pools.

        Where `max_total_tokens` is None, or more than there is room for, the memory that is left
        decides (RUN-10, RUN-11). `kv_cache_dtype` is the model's if None. `checked` is that of the
        pools.

        ContractError for a model that cannot be run (RUN-8) or an argument that is none (RUN-9);
        HostMemoryError if there is not room for a page (RUN-12).
        """
        self._require(implementation, max_running_requests, context_length)
        self._decoder = self._look(model)
        self.layers = layers = self._decoder.layers
        self._require_positions(context_length)
        self.page_size, self.context_length = page_size, context_length
        self.max_running_requests, self.implementation = max_running_requests, implementation
        self.kv_cache_dtype = kv_cache_dtype or self._decoder.dtype
        self.keep_logits = keep_logits
        windows = [layer.window for layer in layers if layer.window is not None]
        self.sliding_window_size: int | None = max(windows, default=None)
        self.pool_sizes: PoolSizes = pool_sizes(
            memory_figures(),
            cell_bytes=2 * layers[0].kv_heads * layers[0].head_dim * self.kv_cache_dtype.itemsize,
            full_layers=len(layers) - len(windows),
            window_layers=len(windows),
            window=self.sliding_window_size,
            page_size=page_size,
            mem_fraction_static=mem_fraction_static,
            max_total_tokens=max_total_tokens,
            swa_full_tokens_ratio=swa_full_tokens_ratio,
        )
        self.max_total_num_tokens = self.pool_sizes.full
        self._make_pools(need_sort, enable_memory_saver, checked)
        self._counts = {"steps": 0, "tokens_computed": 0, "attention_calls": 0, "kv_rows_read": 0}

    @staticmethod
    def _look(model: "PreTrainedModel") -> Decoder:
        return Decoder(model)

    def _make_pools(self, need_sort: bool, enable_memory_saver: bool, checked: bool) -> None:
        """RUN-1."""
        space = import_module(_NAMESPACES[self.implementation])
        self.req_to_token_pool: ReqToTokenPool = space.ReqToTokenPool(
            self.max_running_requests, self.context_length, "cpu", enable_memory_saver
        )
        size, size_swa = self.pool_sizes
        self.kv_pool = kv_pool(
            *(space, self.layers, size, size_swa, self.kv_cache_dtype, self.page_size),
            saver=enable_memory_saver,
            checked=checked,
        )
        self.allocator: BaseTokenToKVPoolAllocator
        self.allocator, self._pairs = make_allocator(space, self.kv_pool, size, size_swa, need_sort)

    @staticmethod
    def _require(implementation: str, max_running_requests: int, context_length: int) -> None:
        """RUN-9."""
        if implementation not in get_args(Implementation):
            known = ", ".join(get_args(Implementation))
            raise ContractError(f"RUN-9: implementation {implementation!r} is none of {known}")
        numbers = {"max_running_requests": max_running_requests, "context_length": context_length}
        for name, value in numbers.items():
            if value < 1:
                raise ContractError(f"RUN-9: {name} {value} is not at least 1")

    def _require_positions(self, context_length: int) -> None:
        """RUN-9."""
        most = getattr(self._decoder.config, "max_position_embeddings", None)
        if most is not None and context_length > most:
            raise ContractError(
                f"RUN-9: context_length {context_length}: the model has {most} positions"
            )

    def get_memory_pool(self) -> tuple[ReqToTokenPool, BaseTokenToKVPoolAllocator]:
        """The rows and the allocator; its `get_kvcache()` has the tensors (RUN-1)."""
        return self.req_to_token_pool, self.allocator

    def forward_batch_generation(self, batch: ForwardBatch) -> GenerationBatchResult:
        """Write the KV of the new tokens and sample the most likely (RUN-2, RUN-3).

        Reads, for each layer, the context of every request, of one with a window what it sees
        (RUN-4, RUN-5, RUN-14). ContractError for a batch that is none (RUN-6), or a position within
        a window whose slot has no pair (RUN-7); then nothing is written.
        """
        require_batch(batch, self.kv_pool, self.context_length)
        step = self._step(batch)
        logits = self._decoder.logits(batch, step)
        self._counts["steps"] += 1
        self._counts["tokens_computed"] += len(batch.input_ids)
        self._counts["attention_calls"] += step.attention_calls
        self._counts["kv_rows_read"] += step.rows_read
        ids = logits.argmax(dim=-1)
        return GenerationBatchResult(ids, logits if self.keep_logits else None)

    def _step(self, batch: ForwardBatch) -> PagedAttention:
        return PagedAttention(batch, self.kv_pool, self.layers, self._pairs, self._decoder.dtype)

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `steps`, which are calls of the model, `tokens_computed`,
        `attention_calls` and `kv_rows_read` of all layers (RUN-14).
        """
        return dict(self._counts)
