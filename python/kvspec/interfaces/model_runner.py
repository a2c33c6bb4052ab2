"""A model that reads and writes KV by slot. Spec: RUN."""

from typing import NamedTuple, Protocol

from torch import Tensor

from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator

__all__ = ["ForwardBatch", "GenerationBatchResult", "ModelWorker"]


class ForwardBatch(NamedTuple):
    """The work of one step (RUN-6). Tensors are int64, on the CPU; nobody changes them any more.

    The new tokens of all requests stand one after the other: request `i` brings `extend_lens[i]`,
    which are the last of its `seq_lens[i]` tokens. A prompt's chunk, one decoded token and the
    draft of a speculation are the same to a model.
    """

    input_ids: Tensor
    """[new tokens]"""
    positions: Tensor
    """[new tokens]: of each in its request."""
    out_cache_loc: Tensor
    """[new tokens]: the slot that its KV is written to."""
    seq_lens: tuple[int, ...]
    """Of each request: the tokens it has after this step."""
    extend_lens: tuple[int, ...]
    """Of each request: how many of those are new."""
    token_slots: tuple[Tensor, ...]
    """Of each request [seq_lens[i]]: the slots of all its positions, the new ones too, a copy."""
    sample_indices: Tensor
    """[samples]: after which of the new tokens, counted over the batch, a token is sampled."""


class GenerationBatchResult(NamedTuple):
    """What a step sampled."""

    next_token_ids: Tensor
    """int64 [samples], on the CPU: the most likely token after each of `sample_indices`."""
    next_token_logits: Tensor | None = None
    """float [samples, vocabulary], on the CPU, where the worker was asked to keep them."""


class ModelWorker(Protocol):
    """Has the model, and made the pools that its KV is in.

    A model that it cannot run, and arguments that are none, are refused when it is made (RUN-8,
    RUN-9). What it was given stays as it is (RUN-13). `pool_sizes` is the arithmetic of the pools
    (RUN-10 to RUN-12); `reference_logits` and `compare_with_reference` say whether what it samples
    is right (RUN-15 to RUN-17); `load_smollm2` gives it real weights (RUN-18, RUN-19).
    """

    max_total_num_tokens: int
    """Slots of the pool, a multiple of the page size; of the full pool, if there are two."""
    sliding_window_size: int | None
    """Of layers with a window, how many tokens one attends to, itself included, the most of any;
    None if no layer has one.
    """

    def get_memory_pool(self) -> tuple[ReqToTokenPool, BaseTokenToKVPoolAllocator]:
        """The rows and the allocator; its `get_kvcache()` has the tensors (RUN-1)."""

    def forward_batch_generation(self, batch: ForwardBatch) -> GenerationBatchResult:
        """Write the KV of the new tokens and sample (RUN-2 to RUN-7, RUN-20).

        O(new tokens · model + context) (RUN-14).
        """
