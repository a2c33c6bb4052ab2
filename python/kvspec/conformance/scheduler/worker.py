"""A model without weights, whose words depend on every slot that it reads. Spec: SCHED.

The "KV" of a token is what it is and where it stands. The next word is a checksum of what the slots
of a request hold, so that a slot that was lost, reused or never written shows in the words. Layers
with a window have a store of their own, at the pair of each slot.
"""

import zlib
from array import array
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from kvspec.interfaces.model_runner import ForwardBatch, GenerationBatchResult
from kvspec.interfaces.request_pool import ReqToTokenPool
from kvspec.interfaces.slot_allocator import BaseTokenToKVPoolAllocator

__all__ = ["WordWorker", "words"]

_EMPTY = -1


def _kv(token: int, position: int) -> int:
    return (position << 32) + token


def _word(full: Sequence[int], window: Sequence[int], vocabulary: int) -> int:
    check = zlib.crc32(array("q", window).tobytes(), zlib.crc32(array("q", full).tobytes()))
    return check % vocabulary


def words(
    prompt: Sequence[int],
    count: int,
    *,
    vocabulary: int,
    window: int | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """What comes out after a prompt, without any memory."""
    kv = [_kv(token, position) for position, token in enumerate(prompt)]
    said: list[int] = []
    while len(said) < count and not (said and said[-1] in stop_token_ids):
        said.append(_word(kv, kv[-window:] if window else (), vocabulary))
        kv.append(_kv(said[-1], len(kv)))
    return said


class WordWorker:
    """A worker over pools of an implementation: `interfaces.model_runner.ModelWorker`.

    With `window`, half of the "layers" attend to so many tokens, and have a pool of `swa_pages`.
    `before` is called with each batch before it is computed.
    """

    def __init__(
        self,
        impl: ModuleType,
        *,
        pages: int,
        page_size: int = 1,
        rows: int = 8,
        context: int = 512,
        window: int | None = None,
        swa_pages: int = 0,
        vocabulary: int = 50,
        before: Callable[[ForwardBatch], None] | None = None,
    ) -> None:
        self.page_size, self.vocabulary, self.sliding_window_size = page_size, vocabulary, window
        self.max_total_num_tokens = pages * page_size
        self.before = before
        self.batches = 0
        memory = {"dtype": torch.float32, "device": "cpu", "kvcache": None, "need_sort": False}
        self.rows = impl.ReqToTokenPool(rows, context, "cpu", False)
        size = self.max_total_num_tokens
        if window is not None:
            self.allocator = impl.SWATokenToKVPoolAllocator(
                size=size, size_swa=swa_pages * page_size, page_size=page_size, **memory
            )
        elif page_size == 1:
            self.allocator = impl.TokenToKVPoolAllocator(size=size, **memory)
        else:
            self.allocator = impl.PagedTokenToKVPoolAllocator(
                size=size, page_size=page_size, **memory
            )
        self.full = array("q", [_EMPTY]) * (size + page_size)
        self.swa = array("q", [_EMPTY]) * ((swa_pages + 1) * page_size)

    def get_memory_pool(self) -> tuple[ReqToTokenPool, BaseTokenToKVPoolAllocator]:
        return self.rows, self.allocator

    def forward_batch_generation(self, batch: ForwardBatch) -> GenerationBatchResult:
        if self.before is not None:
            self.before(batch)
        self.batches += 1
        tensors = (*batch[:3], *batch.token_slots, batch.sample_indices)
        assert all(each.dtype == torch.int64 for each in tensors), (
            "of a chunk that samples nothing too"
        )
        self._write(batch)
        said: list[int] = []
        wanted = set(batch.sample_indices.tolist())
        at = 0
        for slots, length, new in zip(
            batch.token_slots, batch.seq_lens, batch.extend_lens, strict=True
        ):
            assert len(slots) == length
            for stop in range(length - new + 1, length + 1):
                if at in wanted:
                    said.append(self._read(slots[:stop]))
                at += 1
        assert at == len(batch.input_ids)
        return GenerationBatchResult(torch.tensor(said, dtype=torch.int64))

    def _write(self, batch: ForwardBatch) -> None:
        tokens, places = batch.input_ids.tolist(), batch.positions.tolist()
        pairs = self._pairs(batch.out_cache_loc)
        for token, place, slot, pair in zip(
            tokens, places, batch.out_cache_loc.tolist(), pairs, strict=True
        ):
            assert token >= 0, "a token that is not known yet is the scheduler's to resolve"
            self.full[slot] = _kv(token, place)
            if self.sliding_window_size is not None:
                assert pair > 0, f"slot {slot} has no pair"
                self.swa[pair] = _kv(token, place)

    def _read(self, slots: torch.Tensor) -> int:
        full = [self.full[slot] for slot in slots.tolist()]
        window: list[int] = []
        if self.sliding_window_size is not None:
            pairs = self._pairs(slots[-self.sliding_window_size :])
            window = [self.swa[pair] for pair in pairs]
        return _word(full, window, self.vocabulary)

    def _pairs(self, slots: torch.Tensor) -> list[int]:
        if self.sliding_window_size is None:
            return [0] * len(slots)
        pairs: list[int] = self.allocator.translate_loc_from_full_to_swa(slots).tolist()
        return pairs
