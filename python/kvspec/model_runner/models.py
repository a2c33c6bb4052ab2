"""Models to run: small ones with random weights, SmolLM2's, and those of a folder."""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from kvspec.errors import ContractError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TinyKind", "tiny_model"]

TinyKind: TypeAlias = Literal["llama", "qwen3", "gpt_neox", "mistral", "hybrid", "softcap", "sinks"]
"""`mistral` has a window on every layer, `hybrid` (Gemma 3) on every other, `softcap` (Gemma 2) and
`sinks` (GPT-OSS) too, with a cap on their scores or logits that have no value.
"""

_LAYERS = 4
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
_TYPES = ["sliding_attention", "full_attention"] * (_LAYERS // 2)


def tiny_model(
    kind: TinyKind = "llama", *, seed: int = 0, vocab_size: int = 257, window: int = 8, **more: Any
) -> "PreTrainedModel":
    """A decoder of 4 layers of 64 with random weights, float32, made offline in milliseconds.

    4 heads and 2 of KV (gpt_neox: 4). Its logits spread over several units, so that equal ones are
    rare. `more` goes to its config. Equal arguments give equal weights. ContractError for a kind
    that is none (RUN-9).
    """
    import transformers

    hybrid: dict[str, Any] = {**_GROUPED, "sliding_window": window, "layer_types": _TYPES}
    scaled: dict[str, Any] = {**hybrid, "query_pre_attn_scalar": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _rope()}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", _GROUPED),
        "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 32}),
        "gpt_neox": ("GPTNeoXConfig", {}),
        "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": window}),
        "hybrid": ("Gemma3TextConfig", scaled),
        "softcap": ("Gemma2Config", {**scaled, "attn_logit_softcapping": 3.0}),
        "sinks": ("GptOssConfig", {**hybrid, **experts}),
    }
    if kind not in kinds:
        raise ContractError(
            f"RUN-9: tiny model {kind!r} is none of {', '.join(get_args(TinyKind))}"
        )
    name, own = kinds[kind]
    config = getattr(transformers, name)(**{**_SHAPE, "vocab_size": vocab_size, **own, **more})
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32
    )
    _spread(model.eval(), seed)
    return model


def _rope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0}


def _spread(model: "PreTrainedModel", seed: int) -> None:
    """Weights such that every layer changes what it gets, and logits differ by units."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() >= 2:
                scale = 1.0 if "embed" in name else 1.6 * weights.shape[-1] ** -0.5
                weights.copy_(torch.randn(weights.shape, generator=draw) * scale)
            elif "norm" not in name:  # biases and sinks
                weights.copy_(torch.randn(weights.shape, generator=draw) * 0.5)
