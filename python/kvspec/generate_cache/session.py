"""The cache that transformers sees, and the pools under it. Spec: GEN."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from kvspec import has_native
from kvspec.errors import ContractError
from kvspec.generate_cache.attachment import CACHE, attach, detach
from kvspec.generate_cache.call import Call, Pools
from kvspec.generate_cache.forward import Forward, read_forward
from kvspec.interfaces.prefix_key import ExtraKey
from kvspec.memory_checker import check_memory
from kvspec.replay.system import implementation

__all__ = ["CacheSession", "Implementation", "KvspecCache"]

Implementation: TypeAlias = Literal["native", "oracle"]

COUNTERS = ("calls", "prompt_tokens", "cached_tokens", "computed_tokens", "evicted_tokens")


class _Layer(CacheLayerMixin):
    """One layer of a session. It keeps all KV: what a window leaves out, the mask leaves out."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, session: "CacheSession", index: int) -> None:
        CacheLayerMixin.__init__(self)
        self._session, self._index = weakref.ref(session), index
        self.is_initialized = True

    @property
    def _call(self) -> Call | None:
        session = self._session()
        return None if session is None else session.current

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The pools are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write KV [batch, heads, new, dim]; all of the layer's (GEN-16)."""
        if self._call is None:
            _refuse("GEN-1", f"KV of layer {self._index} comes outside a call")
        return self._call.update(self._index, key_states, value_states)

    def get_seq_length(self) -> int:
        """Columns that it has been given in this call."""
        return 0 if self._call is None else self._call.length(self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and the first of them, for a forward of `query_length`."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: as many as there are slots."""
        return -1


class CacheSession(Cache):
    """A namespace of a `KvspecCache`, which `generate` takes as `past_key_values`, again and again,
    and says with it what it says without (GEN-2).

    Sessions with another `extra_key` share no prefix. A session has one call at a time, which
    begins when the model's `generate` is entered with it and ends when that returns or raises; for
    forwards without `generate` there is `call()`.
    """

    def __init__(self, owner: "KvspecCache", extra_key: ExtraKey) -> None:
        self._owner: KvspecCache | None = owner
        self.extra_key = extra_key
        self.current: Call | None = None
        super().__init__(
            layers=[_Layer(self, layer) for layer in range(owner.pools.kvcache.layer_num)]
        )

    @property
    def owner(self) -> "KvspecCache":
        """Whose pools it uses."""
        assert self._owner is not None
        return self._owner

    # A call

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of its own, for forwards of the model without `generate` (GEN-1, GEN-7).

        `model(input_ids, past_key_values=session)`: the first forward brings the whole prompt and
        computes what the tree has not; all tokens get logits unless `logits_to_keep` says less.
        """
        if self.owner.closed:
            _refuse("GEN-1", "the cache is closed")
        if self.current is not None:
            _refuse("GEN-1", "a call with this session is not at its end: take another session")
        call = self.owner.call_class(self.owner.pools, self.extra_key)
        self.owner.open_calls.append(call)
        self.current = call
        try:
            self.owner.pools.counts["calls"] += 1
            yield
        finally:
            self.current = None
            self.owner.open_calls.remove(call)
            call.end()

    def generate(self, model: Module, plain: Any, args: Any, kwargs: dict[str, Any]) -> object:
        """The model's own `generate`, in a call (GEN-1, GEN-7)."""
        self._require(model)
        with self.call():
            return plain(*args, **kwargs)

    def before_forward(self, model: Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take slots for what a forward brings, and leave out what the tree has (GEN-3, GEN-4)."""
        self._require(model)
        if self.current is None:
            _refuse("GEN-1", "a forward outside a call: use model.generate, or session.call()")
        return self._prepare(self.current, read_forward(model, kwargs, self.current), kwargs)

    def _prepare(self, call: Call, forward: Forward, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the forward without the columns that are reused."""
        first, reused = not call.started, 0
        if first:
            reused = call.start(forward.tokens, forward.pads, forward.computed)
        skipped = [max(reused - pads, 0) for pads in forward.pads] if first else [0] * call.batch
        coming = [tokens[n:] for tokens, n in zip(forward.tokens, skipped, strict=True)]
        try:
            call.extend(coming, forward.width - reused)
        except BaseException:
            if first:
                call.end()
            raise
        return kwargs | {name: kwargs[name][..., reused:] for name in forward.by_column if reused}

    def after_forward(self) -> None:
        """The forward has run to its end (GEN-4)."""
        if self.current is not None:
            self.current.commit()

    def _require(self, model: Module) -> None:
        if self.owner.closed:
            _refuse("GEN-1", "the cache is closed")
        if model is not self.owner.model:
            _refuse("GEN-9", f"the cache was made for another model than this {_name(model)}")

    # What transformers asks of a cache

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: their number is given as a negative one (GEN-10, GEN-12)."""
        if tokens_to_remove > 0:
            _refuse("GEN-12", f"crop({tokens_to_remove}), which is not a negative number")
        if self.current is not None:
            self.current.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on where row beam_idx[i] was (GEN-11, GEN-12)."""
        if self.current is not None:
            self.current.reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refused: what decodes so is not supported (GEN-12)."""
        _refuse("GEN-12", "the rows of a call cannot become more")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Refused: what decodes so is not supported (GEN-12)."""
        _refuse("GEN-12", "the rows of a call cannot become fewer")

    def reset(self) -> None:
        """Forget every prefix, of all sessions; not while a call is open (GEN-1, GEN-14)."""
        self.owner.forget()

    # Of all sessions

    def counters(self) -> dict[str, int]:
        """Exact counts so far, of all sessions (GEN-15).

        `calls`; `prompt_tokens` of first forwards, of which `cached_tokens` were in the tree;
        `computed_tokens`, decoded ones included; `evicted_tokens`.
        """
        return {name: self.owner.pools.counts[name] for name in COUNTERS}

    def check(self) -> None:
        """ContractError or MemoryLeakError if the books are broken (GEN-7). O(pools)."""
        pools = self.owner.pools
        pools.rows.check()
        pools.allocator.check()
        pools.tree.check()
        reqs = [sequence for call in self.owner.open_calls for sequence in call.sequences]
        check_memory(pools.allocator, pools.rows, pools.tree, reqs)


class KvspecCache(CacheSession):
    """Pools, tree and hooks for one model on the CPU, and the session of namespace `extra_key`.

    KV of all layers, windowed ones too, is kept for `max_total_tokens` tokens, rounded down to
    whole pages, at most `max_batch_size` rows at a time. The model is in evaluation mode, and what
    its KV depends on beyond tokens - weights, adapters - stays as it is, or has an `extra_key` of
    its own, until `reset()`. Close it, or leave it as a context.
    """

    call_class: ClassVar[type[Call]] = Call
    """What holds pages during a call."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_total_tokens: int = 8192,
        page_size: int = 16,
        *,
        max_batch_size: int = 32,
        extra_key: ExtraKey = None,
        eviction_policy: str = "lru",
        implementation: Implementation | None = None,
    ) -> None:
        """ContractError if the model has other caches than of full or sliding attention (GEN-9).

        One token is computed, for the shape of its KV.
        """
        self.model = model
        self.closed = False
        self.open_calls: list[Call] = []
        self.pools = _pools(
            _probe(model),
            max_total_tokens,
            page_size,
            max_batch_size,
            eviction_policy,
            implementation,
        )
        super().__init__(self, extra_key)
        self._owner = None  # it is its own, and no cycle keeps it
        attach(model)
        self._detach = weakref.finalize(self, detach, model)

    @property
    def owner(self) -> "KvspecCache":
        """Itself."""
        return self

    @property
    def kvcache(self) -> Any:
        """The `MHATokenToKVPool` with the KV of all layers."""
        return self.pools.kvcache

    @property
    def token_to_kv_pool_allocator(self) -> Any:
        """Who has which page of it."""
        return self.pools.allocator

    @property
    def req_to_token_pool(self) -> Any:
        """A row for each sequence of an open call."""
        return self.pools.rows

    @property
    def tree_cache(self) -> Any:
        """The `RadixCache` of prefixes."""
        return self.pools.tree

    def session(self, extra_key: ExtraKey = None) -> CacheSession:
        """Another session over the same pools, of this namespace (GEN-5)."""
        return CacheSession(self, extra_key)

    def forget(self) -> None:
        """Make every page and row free (GEN-1, GEN-14)."""
        if self.open_calls:
            _refuse("GEN-1", f"reset while {len(self.open_calls)} calls are open")
        self.pools.tree.reset()
        self.pools.rows.clear()
        self.pools.allocator.clear()

    def close(self) -> None:
        """Leave the model as it was; again is allowed (GEN-1, GEN-13)."""
        if self.open_calls:
            _refuse("GEN-1", f"close while {len(self.open_calls)} calls are open")
        if not self.closed:
            self.closed = True
            self.pools.tree.reset()
            self._detach()

    def __enter__(self) -> "KvspecCache":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _refuse(clause: str, what: str) -> NoReturn:
    raise ContractError(f"{clause}: {what}")


def _name(model: object) -> str:
    return type(model).__name__


def _probe(model: PreTrainedModel) -> list[Tensor]:
    """Keys and values [1, heads, 1, dim] of all layers, of one token (GEN-9)."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        _refuse("GEN-9", f"{_name(model)} is not a transformers model that generates")
    if model.training:
        _refuse("GEN-9", "the model is in training mode: call model.eval()")
    if model.device.type != "cpu":
        _refuse("GEN-9", f"the model is on {model.device}: the pools are on the CPU")
    if model.config.is_encoder_decoder:
        _refuse("GEN-9", f"{_name(model)} has an encoder, whose output is no prefix")
    probe = DynamicCache(config=model.config.get_text_config(decoder=True))
    other = {type(each).__name__ for each in probe.layers if type(each) not in _ATTENTION}
    if other:
        _refuse("GEN-9", f"{_name(model)} has layers with {', '.join(sorted(other))}")
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True, **{CACHE: probe})
    layers = [each for each in probe.layers if isinstance(each, DynamicLayer)]
    states = [state for each in layers for state in (each.keys, each.values)]
    given = {None if s is None else (tuple(s.shape), s.dtype) for s in states}
    if len(given) != 1 or None in given:
        _refuse("GEN-9", f"KV of {_name(model)} is not of one shape in all layers: {given}")
    return [state for state in states if state is not None]


_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers whose KV depends on the tokens before, position for position, and is all there is."""


def _pools(
    states: list[Tensor],
    max_total_tokens: int,
    page_size: int,
    max_batch_size: int,
    eviction_policy: str,
    name: Implementation | None,
) -> Pools:
    """Pools for KV of this shape, in every layer."""
    if page_size < 1 or max_total_tokens < page_size or max_batch_size < 1:
        _refuse(
            "GEN-9",
            f"max_total_tokens is {max_total_tokens}, page_size {page_size} and max_batch_size"
            f" {max_batch_size}: there is no page, or no row",
        )
    impl: Any = implementation(name or ("native" if has_native() else "oracle"))
    size = max_total_tokens - max_total_tokens % page_size
    place = {"page_size": page_size, "dtype": states[0].dtype, "device": "cpu"}
    kvcache = impl.MHATokenToKVPool(
        size=size,
        head_num=states[0].shape[1],
        head_dim=states[0].shape[3],
        layer_num=len(states) // 2,
        enable_memory_saver=False,
        **place,
    )
    allocator = impl.PagedTokenToKVPoolAllocator(
        size=size, kvcache=kvcache, need_sort=False, **place
    )
    rows = impl.ReqToTokenPool(
        size=max_batch_size, max_context_len=size, device="cpu", enable_memory_saver=False
    )
    tree = impl.RadixCache(rows, allocator, page_size=page_size, eviction_policy=eviction_policy)
    return Pools(kvcache, allocator, rows, tree, Counter())
