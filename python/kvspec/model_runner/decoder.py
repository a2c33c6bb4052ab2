"""A copy of a model that attends by slot, what its layers are, and whether that works (RUN-8)."""

import copy
import inspect
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvspec import oracle
from kvspec.errors import ContractError
from kvspec.interfaces.model_runner import ForwardBatch
from kvspec.model_runner.attention import NAME, Attends, PagedAttention, Survey, attending, register
from kvspec.model_runner.pools import LayerFacts, kv_pool, packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Decoder"]

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_LENGTH = 8
"""Tokens of each of the two requests that a model is tried with."""


class Decoder:
    """A model of transformers under `kvspec_paged`, over the parameters of the one given."""

    def __init__(self, model: "PreTrainedModel") -> None:
        """Look at it and try it: it is run four times on up to 16 tokens. ContractError (RUN-8)."""
        _require_decoder(model)
        self.name = type(model).__name__
        self.config = model.config.get_text_config()
        self.model = self._own(model)
        self._takes = frozenset(inspect.signature(self.model.forward).parameters)
        self.dtype: torch.dtype = self.model.dtype
        own_attention = model.config._attn_implementation
        self.model.set_attn_implementation(NAME)
        self.layers = self._surveyed()
        self._try(own_attention)

    @staticmethod
    def _own(model: "PreTrainedModel") -> "PreTrainedModel":
        """The modules and the config once more, over the same parameters and buffers (RUN-13)."""
        register()
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        return copy.deepcopy(model, shared).eval()

    def logits(self, batch: ForwardBatch, attends: Attends) -> Tensor:
        """[samples, vocabulary] of one call of the model, over all new tokens."""
        given = {"logits_to_keep": batch.sample_indices} if "logits_to_keep" in self._takes else {}
        with torch.no_grad(), attending(attends):
            logits: Tensor = self.model(
                input_ids=batch.input_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                **given,
            ).logits[0]
        return logits if given else logits[batch.sample_indices]

    def _surveyed(self) -> tuple[LayerFacts, ...]:
        """What each layer asks of its attention, by layer."""
        survey = Survey()
        self.logits(packed([([0, 1], torch.tensor([1, 2]))]), survey)
        layers = sorted(survey.layers, key=lambda layer: layer.layer_id)
        found = [layer.layer_id for layer in layers]
        if not found or found != list(range(self.config.num_hidden_layers)):
            raise ContractError(
                f"RUN-8: {self.name} has {self.config.num_hidden_layers} layers, and attention that"
                f" can be replaced was asked for by layers {found}"
            )
        shapes = sorted({layer[1:5] for layer in layers})
        if len(shapes) > 1 or layers[0].head_dim != layers[0].value_dim:
            raise ContractError(
                f"RUN-8: {self.name} has layers of (heads, KV heads, key dim, value dim)"
                f" {', '.join(map(str, shapes))}, where one shape and equal dims are kept"
            )
        return tuple(layers)

    def _try(self, own_attention: str) -> None:
        """Two requests in two steps, over slots out of order, against its own attention."""
        count = self.config.vocab_size
        one, other = ([(step * at + 1) % count for at in range(_LENGTH)] for step in (7, 5))
        forwards = torch.arange(1, _LENGTH + 1)
        backwards = 2 * _LENGTH + 1 - forwards
        steps = [
            packed([(one[:5], backwards[:5])]),
            packed([(one[5:], backwards), (other, forwards)]),
        ]
        windows = any(layer.window is not None for layer in self.layers)
        size, pairs = 2 * _LENGTH, torch.arange(2 * _LENGTH + 1)
        kv = kv_pool(oracle, self.layers, size, size if windows else None, self.dtype, 1)
        if isinstance(kv, oracle.SWAKVPool):
            kv.register_mapping(pairs)
        paged = [
            PagedAttention(step, kv, self.layers, pairs.__getitem__, self.dtype) for step in steps
        ]
        found = torch.cat([self.logits(*pair) for pair in zip(steps, paged, strict=True)])
        expected = self._themselves(own_attention, torch.tensor([one, other]))
        worst = float((found - expected).abs().max())
        most = float(expected.abs().max()) * (1e-3 if self.dtype.itemsize >= 4 else 0.1)
        if not worst <= most:
            raise ContractError(
                f"RUN-8: {self.name} gives other logits when its attention is replaced, by"
                f" {worst:.3g}, where rounding is {most:.3g} at most"
            )

    def _themselves(self, own_attention: str, requests: Tensor) -> Tensor:
        """The logits of whole requests, by the model's own attention, without a cache."""
        self.model.set_attn_implementation(own_attention)
        try:
            with torch.no_grad():
                logits: Tensor = self.model(input_ids=requests, use_cache=False).logits
        finally:
            self.model.set_attn_implementation(NAME)
        return logits.flatten(0, 1)


def _require_decoder(model: "PreTrainedModel") -> None:
    """RUN-8, of what a model says about itself."""
    name = type(model).__name__
    if getattr(model, "config", None) is None or not hasattr(model, "set_attn_implementation"):
        raise ContractError(f"RUN-8: a {name} is no model of transformers")
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ContractError(f"RUN-8: {name} has an encoder")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        raise ContractError(f"RUN-8: {name} has layers of {', '.join(others)}")
    if getattr(config, "kv_lora_rank", None):
        raise ContractError(f"RUN-8: {name} keeps a latent, not K and V of every head")
    devices = sorted({parameter.device.type for parameter in model.parameters()} - {"cpu"})
    if devices:
        raise ContractError(f"RUN-8: {name} is on {', '.join(devices)}, not on the CPU")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ContractError(f"RUN-8: {name} takes no position_ids")
