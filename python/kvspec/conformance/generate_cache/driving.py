"""The models of the suite, and how it drives a cache for transformers. Spec: GEN."""

import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

import kvspec
from kvspec.conformance.suite import MUTANT, Conformance, one_thread
from kvspec.conformance.watch import watch_function
from kvspec.errors import CLAUSE_ERRORS, MemoryLeakError
from kvspec.generate_cache.attachment import CACHE

__all__ = [
    "DEFAULTS",
    "FAMILIES",
    "PAGE",
    "Driver",
    "Generated",
    "as_ids",
    "attachments",
    "idle",
    "language_model",
    "left_padded",
    "logits_of",
    "other_model",
    "pages_of",
    "paths",
    "plain",
    "raising",
    "resident",
    "staged",
    "template",
    "words",
]

FAMILIES = ("llama", "qwen3", "gpt_neox", "gemma3_text")
"""The last has a layer with a window of 8 tokens, and one without."""

PAGE = 4


class _Attention(torch.nn.Module):
    """One head for the queries of both."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.mix = torch.nn.Linear(16, 16 + 8 + 8, bias=False)
        self.out = torch.nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor, seen: Tensor, cache: Any) -> Tensor:
        queries, keys, values = self.mix(x).split((16, 8, 8), dim=-1)
        if cache is not None:
            keys, values = cache.update(keys[:, None], values[:, None], self.layer)
        else:
            keys, values = keys[:, None], values[:, None]
        queries = queries.unflatten(-1, (2, 8)).transpose(1, 2)
        weights = (queries @ keys.transpose(2, 3)).masked_fill(~seen, -1e9).softmax(dim=-1)
        found: Tensor = self.out((weights @ values).transpose(1, 2).flatten(2))
        changed: Tensor = x / 8 + 3 * found / found.norm(dim=-1, keepdim=True)
        return changed


class ThinModel(transformers.PreTrainedModel, transformers.GenerationMixin):
    """The least that `generate` takes for a model: two layers, 61 words, little time."""

    config_class = transformers.LlamaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.words = torch.nn.Embedding(61, 16)
        self.places = torch.nn.Embedding(256, 16)
        self.layers = torch.nn.ModuleList([_Attention(0), _Attention(1)])
        self.head = torch.nn.Linear(16, 61, bias=False)
        for weights in self.parameters():
            torch.nn.init.normal_(weights, std=0.7)
        transformers.PreTrainedModel.post_init(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        cache = past_key_values if cache is None else cache
        past, new = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
        places = torch.arange(past, past + new)
        seen = (torch.arange(past + new) <= places[:, None])[None, None]
        if attention_mask is not None:
            seen = seen & (attention_mask != 0)[:, None, None]
        x = self.words(input_ids) + self.places(places if position_ids is None else position_ids)
        for layer in self.layers:
            x = layer(x, seen, cache)
        logits = self.head(x[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})


@cache
def template(family: str) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,  # else it says the same word again
    }
    if family != "gpt_neox":
        shape |= {"num_key_value_heads": 1, "head_dim": 8}
    if family == "gemma3_text":
        shape |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.AutoConfig.for_model("llama" if family == "thin" else family, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if family == "thin":
            thin: Any = ThinModel(config)
            return thin.double().eval()
        return transformers.AutoModelForCausalLM.from_config(config).double().eval()


def language_model(family: str = "thin") -> Any:
    """A tiny model of random weights, in float64: 2 layers, 61 words, always the same."""
    model = template(family)
    shared = [*model.parameters(), *model.buffers(), model.config, model.generation_config]
    return copy.deepcopy(model, {id(each): each for each in shared})


_PLAIN: dict[str, Tensor] = {}


def plain(family: str, ids: Tensor, options: dict[str, Any]) -> Tensor:
    """What transformers generates with the cache that it takes itself."""
    settings = sorted((k, v.tolist() if isinstance(v, Tensor) else v) for k, v in options.items())
    name = repr((family, ids.tolist(), settings))
    if name not in _PLAIN:
        torch.manual_seed(3)
        with one_thread():
            _PLAIN[name] = template(family).generate(ids, **DEFAULTS | options)
    return _PLAIN[name]


DEFAULTS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


def _name(cache: Any) -> str:
    """What the model that has it on takes; of a closed one it is transformers' own word."""
    return CACHE if cache.owner.closed else "past_key_values"


class Generated(NamedTuple):
    sequences: Tensor
    """None of them where something was raised."""
    spent: dict[str, int]
    """What was added to each counter."""
    raised: BaseException | None
    """What left `generate`, if it is no refusal."""


def _generate(cache: Any, ids: Tensor, options: dict[str, Any]) -> Generated:
    before, raised = cache.counters(), None
    sequences = torch.zeros(1, 0, dtype=torch.int64)
    torch.manual_seed(3)
    given = DEFAULTS | {_name(cache): cache} | options
    try:
        with one_thread():
            sequences = cache.owner.model.generate(ids, **given)
    except CLAUSE_ERRORS:
        raise
    except (KeyboardInterrupt, RuntimeError) as error:
        raised = error.with_traceback(None)
    after = cache.counters()
    return Generated(sequences, {name: after[name] - before[name] for name in after}, raised)


_generate.__name__ = "generate"  # the call that the clauses speak of


def _forward(cache: Any, ids: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Logits [batch, computed columns, words]."""
    with torch.no_grad(), one_thread():
        given = {_name(cache): cache} | arguments
        logits: Tensor = cache.owner.model(ids, **given).logits
    return logits


_forward.__name__ = "forward"


def words(*counts: int, seed: int = 1) -> Tensor:
    """[1, sum of counts]: words of one draw after the other, which only its seed decides."""
    return torch.cat([_draw(count, seed + number) for number, count in enumerate(counts)], dim=1)


def _draw(count: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, 61, (1, count), generator=draw)


def paths(cache: Any, extra_key: str | None = None) -> set[tuple[int, ...]]:
    """The tokens of every page that the tree has in a namespace, from the first on."""
    return {path for name, path in cache.owner.tree_cache.view().pages if name == extra_key}


def pages_of(*rows: Any) -> set[tuple[int, ...]]:
    """The paths of the whole pages of these rows of tokens."""
    tokens = [row.tolist() if isinstance(row, Tensor) else list(row) for row in rows]
    return {tuple(row[:stop]) for row in tokens for stop in range(PAGE, len(row) + 1, PAGE)}


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[batch, longest] of rows [1, tokens], and their attention mask."""
    width = max(row.shape[1] for row in rows)
    pad = torch.nn.functional.pad
    ids = torch.cat([pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.cat([pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    return ids, mask


class Driver(Conformance):
    """`impl` says which pools are used, or holds a class `KvspecCache` that stands in for it."""

    def make(self, model: Any = None, **options: Any) -> Any:
        given = getattr(self.impl, "KvspecCache", None)
        cls: Callable[..., Any] = given if inspect.isclass(given) else kvspec.KvspecCache
        used = "oracle" if self.impl_name == "oracle" else None

        def construct(model: Any, options: dict[str, Any]) -> Any:
            return cls(model, **{"max_total_tokens": 256, "page_size": PAGE} | options)

        construct.__name__ = "__init__"
        model = language_model() if model is None else model
        with one_thread():
            return self._watched(construct)(model, {"implementation": used} | options)

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.impl_name == MUTANT:
            return function
        return watch_function(self.impl_name, function, "generate_cache")

    def generate(self, cache: Any, ids: Tensor, **options: Any) -> Generated:
        result: Generated = self._watched(_generate)(cache, ids, options)
        return result

    def forward(self, cache: Any, ids: Tensor, **arguments: Any) -> Tensor:
        result: Tensor = self._watched(_forward)(cache, ids, arguments)
        return result

    def ask(self, cache: Any, method: str, *args: Any) -> Any:
        return self._watched(getattr(cache, method))(*args)


# What the tests say and look at


def idle(cache: Any, between_calls: bool = True) -> bool:
    """Every row free, nothing locked, every page free or in the tree."""
    if between_calls:
        try:
            cache.check()
        except MemoryLeakError as error:
            raise AssertionError(str(error)) from None
    rows, tree = cache.owner.req_to_token_pool.view(), cache.owner.tree_cache
    held = cache.owner.token_to_kv_pool_allocator.view().held
    resident = {each.page for each in tree.view().pages.values()}
    return not rows.rows and not tree.view().receipts and set(held) == resident


def resident(cache: Any) -> dict[Any, Tensor]:
    """Path -> what the page's keys and values are in every layer."""
    kvcache, found = cache.owner.kvcache, {}
    for path, page in cache.owner.tree_cache.view().pages.items():
        slots = slice(page.page * PAGE, (page.page + 1) * PAGE)
        both = [kvcache.get_kv_buffer(layer) for layer in range(kvcache.layer_num)]
        found[path] = torch.stack([state[slots] for pair in both for state in pair]).clone()
    return found


def logits_of(ids: Tensor) -> Tensor:
    """What the model says of these tokens without any cache."""
    with torch.no_grad(), one_thread():
        logits: Tensor = template("thin")(ids, use_cache=False).logits
    return logits


def raising(after: int, error: type[BaseException] = RuntimeError) -> Callable[..., Any]:
    """A hook, or a criterion, that raises when it is called once more than `after` times."""
    calls = []

    def hook(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise error("by the test")
        return torch.zeros(1, dtype=torch.bool) if len(args) == 2 and args[1] is None else None

    return hook


def attachments(model: Any) -> dict[str, Any]:
    """All that could stand on a model: its attributes, and the ids of its hooks."""
    return {
        name: sorted(value) if "hooks" in name else value for name, value in model.__dict__.items()
    }


def as_ids(arguments: dict[str, Any]) -> dict[str, Any]:
    """With the name that `forward` has for the input ids."""
    names = {"input_ids": "ids"}
    return {names.get(name, name): value for name, value in arguments.items()}


def staged(cache: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """KV [1, 1, new, 8] for a forward that brings these tokens."""
    cache.current.extend([ids[0].tolist()], ids.shape[1])
    states = torch.ones(1, 1, ids.shape[1], 8, dtype=torch.float64)
    return states, states


def other_model(family: str) -> Any:
    """A model that has other memory than KV of its tokens."""
    shape: dict[str, Any] = {"vocab_size": 8, "num_hidden_layers": 1}
    if family == "mamba2":
        shape |= {"hidden_size": 8, "num_heads": 2, "head_dim": 8, "state_size": 4, "n_groups": 1}
        config = transformers.AutoConfig.for_model(family, **shape)
        return transformers.AutoModelForCausalLM.from_config(config).eval()
    shape |= {"num_layers": 1, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2}
    config = transformers.AutoConfig.for_model(family, **shape)
    return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
