"""Conformance of prefix reuse in transformers. Spec: GEN."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

import kvspec
from kvspec.conformance import clause
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import watch_function
from kvspec.errors import CLAUSE_ERRORS, ContractError, MemoryLeakError
from kvspec.generate_cache.attachment import CACHE

__all__ = ["FAMILIES", "GenerateCacheConformance", "language_model", "plain"]

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
def _template(family: str) -> Any:
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
    model = _template(family)
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
            _PLAIN[name] = _template(family).generate(ids, **_DEFAULTS | options)
    return _PLAIN[name]


_DEFAULTS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one core: so little work is not worth waiting for another one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    given = _DEFAULTS | {_name(cache): cache} | options
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


class GenerateCacheConformance(Conformance):
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

    # Calls

    @clause("GEN-1")
    def test_a_forward_outside_a_call_is_refused(self) -> None:
        cache = self.make()
        with pytest.raises(ContractError, match="GEN-1: a forward outside a call"):
            self.forward(cache, words(5))
        assert idle(cache)
        assert not paths(cache)

    @clause("GEN-1")
    def test_a_session_has_one_call_at_a_time(self) -> None:
        cache = self.make()

        def again(*_: Any) -> Any:
            self.generate(cache, words(5))
            return torch.zeros(1, dtype=torch.bool)

        with pytest.raises(ContractError, match="GEN-1: a call with this session is not at its"):
            self.generate(cache, words(5), stopping_criteria=[again])
        assert idle(cache)

    @clause("GEN-1", "GEN-5")
    def test_another_session_may_have_a_call_beside_it(self) -> None:
        cache = self.make()
        other, ids = cache.session("other"), words(9)
        found = []

        def beside(*_: Any) -> Any:
            found.append(self.generate(other, ids, max_new_tokens=3).sequences)
            return torch.zeros(1, dtype=torch.bool)

        out = self.generate(cache, ids, stopping_criteria=[beside]).sequences
        assert torch.equal(out, plain("thin", ids, {}))
        assert all(torch.equal(each, out[:, :12]) for each in found)
        assert idle(cache)

    @clause("GEN-1")
    @pytest.mark.parametrize("method", ["reset", "close"])
    def test_what_is_open_is_not_taken_away(self, method: str) -> None:
        cache = self.make()
        refused = pytest.raises(ContractError, match=f"GEN-1: {method} while 1 calls are open")
        with cache.session("other").call(), refused:
            self.ask(cache, method)
        assert torch.equal(self.generate(cache, words(5)).sequences, plain("thin", words(5), {}))

    @clause("GEN-1")
    def test_after_close_nothing_is_taken(self) -> None:
        cache = self.make()
        self.ask(cache, "close")
        self.ask(cache, "close")
        for use in (self.generate, self.forward):
            with pytest.raises(ContractError, match="GEN-1: "):
                use(cache, words(5))
        with pytest.raises(ContractError, match="GEN-1: the cache is closed"):
            cache.call().__enter__()

    # What comes out

    @clause("GEN-2", "GEN-3", "GEN-4")
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_says_the_same_and_reuses(self, family: str) -> None:
        """A conversation: the second prompt is the first, what was said, and three words more."""
        cache = self.make(language_model(family))
        first = self.generate(cache, words(13)).sequences
        assert torch.equal(first, plain(family, words(13), {}))
        prompt = torch.cat([first, words(3, seed=9)], dim=1)
        second = self.generate(cache, prompt)
        assert torch.equal(second.sequences, plain(family, prompt, {}))
        assert second.spent["cached_tokens"] == 16  # of 18 with KV
        assert second.spent["computed_tokens"] == 22 - 16 + 5
        assert idle(cache)

    @clause("GEN-2")
    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True, "num_return_sequences": 3, "top_k": 20},
            {"num_beams": 3, "max_new_tokens": 12},
            {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "max_new_tokens": 12},
            {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12},
            {"prefill_chunk_size": 6},
        ],
        ids=["sampled", "beams", "sampled beams", "assisted", "in chunks"],
    )
    def test_every_way_to_decode_says_the_same(self, options: dict[str, Any]) -> None:
        cache, ids = self.make(), words(13).repeat(1, 2)
        for _ in range(2):
            generated = self.generate(cache, ids, **options)
            assert torch.equal(generated.sequences, plain("thin", ids, options))
        assert generated.spent["cached_tokens"]
        assert idle(cache)

    @clause("GEN-2", "GEN-6", "GEN-15")
    def test_rows_that_are_padded_say_the_same(self) -> None:
        """And as much as each of them alone: what they reuse ends where it has to for one."""
        cache, rows = self.make(), [words(14), words(9, seed=5), words(12, seed=7)]
        self.generate(cache, rows[0])
        ids, mask = left_padded(rows)
        for cached in (2, 10 + 5 + 8):
            out = self.generate(cache, ids, attention_mask=mask)
            assert torch.equal(out.sequences, plain("thin", ids, {"attention_mask": mask}))
            assert out.spent["prompt_tokens"] == 14 + 9 + 12
            assert out.spent["cached_tokens"] == cached
        for row in rows:
            assert torch.equal(self.generate(cache, row).sequences, plain("thin", row, {}))
        assert idle(cache)

    # What is computed

    @clause("GEN-3")
    def test_one_token_at_least_is_computed(self) -> None:
        """Of a prompt of whole pages that the tree has, the last page is."""
        cache = self.make()
        self.generate(cache, words(16), max_new_tokens=1)
        out = self.generate(cache, words(16), max_new_tokens=1)
        assert (out.spent["cached_tokens"], out.spent["computed_tokens"]) == (12, 4)
        out = self.generate(cache, words(16, 1), max_new_tokens=1)
        assert (out.spent["cached_tokens"], out.spent["computed_tokens"]) == (16, 1)

    @clause("GEN-3")
    def test_of_a_batch_the_least_of_the_matches_is_left_out(self) -> None:
        cache = self.make()
        self.generate(cache, words(20), max_new_tokens=1)
        ids = torch.cat([words(20), torch.cat([words(9), words(11, seed=5)], dim=1)])
        out = self.generate(cache, ids)
        assert torch.equal(out.sequences, plain("thin", ids, {}))
        assert out.spent["cached_tokens"] == 2 * 8

    @clause("GEN-3")
    def test_the_model_is_given_the_rest_alone(self) -> None:
        cache, seen = self.make(), []
        self.generate(cache, words(13))

        def look(model: Any, args: Any, kwargs: Any) -> None:
            seen.append((kwargs["input_ids"].tolist(), kwargs["position_ids"].tolist()))

        cache.owner.model.register_forward_pre_hook(look, with_kwargs=True)
        self.generate(cache, words(13, 2), max_new_tokens=1)
        assert seen == [(words(13, 2)[:, 12:].tolist(), [[12, 13, 14]])]

    @clause("GEN-3")
    @pytest.mark.parametrize(
        ("arguments", "columns"),
        [
            ({}, 13),
            ({"logits_to_keep": 1}, 1),
            ({"logits_to_keep": 6}, 6),
            ({"logits_to_keep": 1, "output_hidden_states": True}, 1),
        ],
    )
    def test_what_is_asked_for_is_computed(self, arguments: Any, columns: int) -> None:
        cache, before = self.make(), 0
        self.generate(cache, words(13), max_new_tokens=1)
        expected = logits_of(words(13))[:, -columns:]
        with cache.call():
            before = cache.counters()["computed_tokens"]
            assert torch.allclose(self.forward(cache, words(13), **arguments), expected)
        computed = cache.counters()["computed_tokens"] - before
        assert computed == {0: 13, 1: 1, 6: 9, 2: 13}[sum(map(int, arguments.values()))]

    # What enters the tree

    @clause("GEN-4")
    def test_what_was_computed_is_cached_and_no_more(self) -> None:
        """18 tokens have KV: of the 19th, the last one sampled, none."""
        cache = self.make()
        out = self.generate(cache, words(13), max_new_tokens=8)
        assert out.sequences.shape[1] == 21
        assert paths(cache) == pages_of(out.sequences[0, :20])
        out = self.generate(cache, words(13, seed=9), max_new_tokens=4)
        assert pages_of(out.sequences[0, :16]) <= paths(cache)
        assert len(paths(cache)) == 5 + 4

    @clause("GEN-4")
    def test_padding_is_not_cached(self) -> None:
        cache, rows = self.make(), [words(14), words(7, seed=5)]
        ids, mask = left_padded(rows)
        out = self.generate(cache, ids, attention_mask=mask).sequences
        assert paths(cache) == pages_of(out[0, :19], out[1, 7:19])

    @clause("GEN-4", "GEN-7")
    def test_a_forward_that_raises_has_computed_nothing(self) -> None:
        cache = self.make()
        model = cache.owner.model
        layer = model.layers[1]
        hook = layer.register_forward_pre_hook(raising(after=3))
        out = self.generate(cache, words(13))
        hook.remove()
        assert isinstance(out.raised, RuntimeError)
        said = plain("thin", words(13), {})
        assert paths(cache) == pages_of(said[0, :15])  # the prompt and two tokens
        assert idle(cache)
        assert torch.equal(self.generate(cache, words(13)).sequences, said)

    @clause("GEN-4", "GEN-10")
    def test_what_was_cropped_is_not_cached(self) -> None:
        cache = self.make()
        with cache.call():
            self.forward(cache, words(14))
            self.ask(cache, "crop", -5)
        assert paths(cache) == pages_of(words(9)[0])

    @clause("GEN-5")
    def test_namespaces_share_nothing(self) -> None:
        cache = self.make()
        mine, yours = cache.session("mine"), cache.session("yours")
        for session in (cache, mine, yours):
            out = self.generate(session, words(13))
            assert out.spent["cached_tokens"] == 0
            assert self.generate(session, words(13)).spent["cached_tokens"] == 12
            assert paths(cache, session.extra_key) == pages_of(out.sequences[0, :18])

    @clause("GEN-5")
    def test_a_cache_has_a_namespace_of_its_own(self) -> None:
        cache = self.make(extra_key="adapter")
        self.generate(cache, words(13), max_new_tokens=1)
        assert not paths(cache)
        assert paths(cache, "adapter")
        assert (
            self.generate(cache.session(), words(13), max_new_tokens=1).spent["cached_tokens"] == 0
        )
        assert (
            self.generate(cache.session("adapter"), words(13), max_new_tokens=1).spent[
                "cached_tokens"
            ]
            == 12
        )

    @clause("GEN-6")
    def test_what_the_tree_has_is_not_written(self) -> None:
        """What a padded row reuses ends inside a page, and it goes on otherwise there."""
        cache, whole = self.make(), words(12)
        self.generate(cache, whole, max_new_tokens=1)
        self.generate(cache, words(16, seed=5), max_new_tokens=1)
        before = resident(cache)
        ids, mask = left_padded([words(13, seed=5), words(11)])
        out = self.generate(cache, ids, attention_mask=mask)
        assert out.spent["cached_tokens"] == (8 + 2) + 8
        assert torch.equal(out.sequences, plain("thin", ids, {"attention_mask": mask}))
        after = resident(cache)
        assert all(torch.equal(after[path], kept) for path, kept in before.items())

    # The end

    @clause("GEN-7")
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("where", ["criterion", "first forward", "layer", "before a forward"])
    def test_whatever_is_raised_everything_is_given_back(
        self, where: str, error: type[BaseException]
    ) -> None:
        cache = self.make()
        model = cache.owner.model
        self.generate(cache, words(13))
        options: dict[str, Any] = {}
        if where == "criterion":
            options["stopping_criteria"] = [raising(after=2, error=error)]
        elif where == "before a forward":
            model.register_forward_pre_hook(raising(after=2, error=error))
        else:
            module = model.layers[1] if where == "layer" else model
            after = 0 if where == "first forward" else 2
            module.register_forward_hook(raising(after=after, error=error))
        out = self.generate(cache, words(13, 9), **options)
        assert isinstance(out.raised, error)
        assert idle(cache)

    @clause("GEN-7")
    def test_a_call_holds_what_it_uses_until_its_end(self) -> None:
        cache = self.make()
        self.generate(cache, words(13))
        held = []

        def look(*_: Any) -> Any:
            held.append(
                (cache.tree_cache.protected_size(), len(cache.req_to_token_pool.view().rows))
            )
            cache.check()
            return torch.zeros(1, dtype=torch.bool)

        self.generate(cache, words(13, 9), stopping_criteria=[look])
        assert held == 6 * [(12, 1)]
        assert idle(cache)

    @clause("GEN-7")
    def test_rows_of_a_batch_with_one_prompt_leave_one_copy(self) -> None:
        cache = self.make()
        out = self.generate(cache, words(13).repeat(3, 1)).sequences
        assert paths(cache) == pages_of(out[0, :18])
        assert cache.token_to_kv_pool_allocator.available_size() == 256 - 16
        assert idle(cache)

    @clause("GEN-8")
    def test_what_is_lacking_is_evicted(self) -> None:
        """7 pages: the second prompt needs 5 of them, and the first one's page is the oldest."""
        cache = self.make(max_total_tokens=28)
        self.generate(cache, words(15), max_new_tokens=2)
        out = self.generate(cache, words(15, seed=5))
        assert torch.equal(out.sequences, plain("thin", words(15, seed=5), {}))
        assert out.spent["evicted_tokens"] == 8
        assert idle(cache)

    @clause("GEN-8")
    def test_too_few_pages_are_refused_with_nothing_evicted(self) -> None:
        cache = self.make(max_total_tokens=30)
        self.generate(cache, words(13))
        kept = paths(cache)
        with pytest.raises(
            ContractError, match="GEN-8: 29 tokens more need 8 pages of 4: 3 are fr"
        ):
            self.generate(cache, words(29, seed=5))
        assert paths(cache) == kept
        with cache.call():
            with pytest.raises(ContractError, match="4 could be evicted and the others of 7 are"):
                self.forward(cache, words(29, seed=5))
            assert idle(cache, between_calls=False)
        assert idle(cache)

    @clause("GEN-8")
    def test_pages_that_are_too_few_while_decoding_are_refused(self) -> None:
        cache = self.make(max_total_tokens=20)
        with pytest.raises(
            ContractError, match="GEN-8: 1 tokens more need 1 pages of 4: 0 are free"
        ):
            self.generate(cache, words(13), max_new_tokens=12)
        assert idle(cache)
        assert paths(cache) == pages_of(plain("thin", words(13), {"max_new_tokens": 8})[0, :20])

    @clause("GEN-8")
    def test_too_few_rows_are_refused(self) -> None:
        cache = self.make(max_batch_size=2)
        with pytest.raises(ContractError, match="GEN-8: a row for each of the batch: all 2 are in"):
            self.generate(cache, words(13).repeat(3, 1))
        assert idle(cache)
        out = self.generate(cache, words(13).repeat(2, 1)).sequences
        assert torch.equal(out, plain("thin", words(13).repeat(2, 1), {}))

    # What is refused

    @clause("GEN-9")
    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"max_total_tokens": 3}, "max_total_tokens is 3"),
            ({"page_size": 0}, "page_size 0"),
            ({"max_batch_size": 0}, "max_batch_size 0"),
        ],
    )
    def test_no_page_or_no_row_is_refused(self, options: dict[str, int], text: str) -> None:
        model = language_model()
        with pytest.raises(ContractError, match=f"GEN-9: .*{text}"):
            self.make(model, **options)
        assert "generate" not in model.__dict__

    @clause("GEN-9")
    def test_a_model_whose_kv_is_not_of_tokens_alone_is_refused(self) -> None:
        with pytest.raises(ContractError, match="GEN-9: the model is in training mode"):
            self.make(language_model().train())
        with pytest.raises(ContractError, match="GEN-9: Linear is not a transformers model"):
            self.make(torch.nn.Linear(1, 1))
        with pytest.raises(ContractError, match=r"GEN-9: .* layers with LinearAttentionLayer"):
            self.make(other_model("mamba2"))
        with pytest.raises(ContractError, match=r"GEN-9: .* has an encoder"):
            self.make(other_model("t5"))

    @clause("GEN-9")
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"labels": words(9)}, "a forward with labels"),
            ({"token_type_ids": words(9)}, "a forward with token_type_ids"),
            ({"input_ids": None, "inputs_embeds": torch.zeros(1, 9, 16)}, "inputs_embeds"),
            ({"use_cache": False}, "use_cache=False"),
            ({"attention_mask": torch.ones(1, 11)}, "a prompt is given as a whole"),
            ({"attention_mask": torch.eye(9)[:1]}, "padding is not on the left alone"),
            ({"attention_mask": torch.zeros(1, 9)}, "padding is not on the left alone"),
            ({"attention_mask": torch.arange(9)[None]}, "padding without position_ids"),
            ({"position_ids": torch.arange(1, 10)[None]}, "position_ids are not those"),
        ],
    )
    def test_a_forward_whose_kv_is_not_of_tokens_alone_is_refused(
        self, arguments: dict[str, Any], text: str
    ) -> None:
        cache = self.make()
        with cache.call():
            with pytest.raises(ContractError, match=f"GEN-9: .*{text}"):
                self.forward(cache, **{"ids": words(9), **as_ids(arguments)})
            assert idle(cache, between_calls=False)
        assert not paths(cache)

    @clause("GEN-9")
    def test_gradients_and_other_models_are_refused(self) -> None:
        cache = self.make()
        refused = pytest.raises(ContractError, match="GEN-9: a forward with gradients")
        with cache.call(), torch.enable_grad(), refused:
            cache.model(words(9), past_key_values=cache)
        other = self.make()
        with pytest.raises(ContractError, match="GEN-9: the cache was made for another model"):
            other.model.generate(words(9), past_key_values=cache)
        assert idle(cache)
        assert not paths(cache)

    # What decoding does with its rows

    @clause("GEN-10")
    def test_what_is_cropped_is_computed_again(self) -> None:
        cache, ids = self.make(), torch.cat([words(9), words(7, seed=9)], dim=1)
        with cache.call():
            self.forward(cache, words(14))
            self.ask(cache, "crop", -5)
            assert cache.get_seq_length() == 9
            assert torch.allclose(self.forward(cache, ids[:, 9:]), logits_of(ids)[:, 9:])
            self.ask(cache, "crop", 0)
            assert cache.get_seq_length() == 16
        assert paths(cache) == pages_of(ids[0])
        assert idle(cache)

    @clause("GEN-11")
    @pytest.mark.parametrize("beams", [[1, 0, 2], [2, 2, 0], [1, 2, 0], [0, 1, 2]])
    def test_rows_go_on_where_others_were(self, beams: list[int]) -> None:
        cache = self.make()
        self.generate(cache, words(9), max_new_tokens=1)
        prompt = words(9).repeat(3, 1)
        own = torch.cat([words(6, seed=seed) for seed in (11, 12, 13)])
        last = torch.cat([words(2, seed=seed) for seed in (14, 15, 16)])
        with cache.call():
            self.forward(cache, prompt, logits_to_keep=1)
            self.forward(cache, own)
            self.ask(cache, "reorder_cache", torch.tensor(beams))
            logits = self.forward(cache, last)
        ids = torch.cat([prompt, own[beams], last], dim=1)
        assert torch.allclose(logits, logits_of(ids)[:, -2:])
        assert paths(cache) == pages_of(*ids)
        assert idle(cache)

    @clause("GEN-12")
    def test_what_rows_cannot_do_is_refused(self) -> None:
        cache = self.make()
        self.generate(cache, words(9), max_new_tokens=1)
        ids = torch.cat([words(14), torch.cat([words(8), words(6, seed=9)], dim=1)])
        for method, argument in (
            ("crop", 3),
            ("crop", -7),
            ("reorder_cache", torch.tensor([0])),
            ("reorder_cache", torch.tensor([0, 2])),
            ("batch_repeat_interleave", 2),
            ("batch_select_indices", torch.tensor([0])),
        ):
            with cache.call():
                self.forward(cache, ids, logits_to_keep=1)
                with pytest.raises(ContractError, match="GEN-12: "):
                    self.ask(cache, method, argument)
                assert cache.get_seq_length() == 14
        assert paths(cache) == pages_of(*ids)

    @clause("GEN-12")
    def test_a_row_stays_with_its_prompt(self) -> None:
        """Where the tree has both prompts, no page of either is written."""
        cache = self.make()
        ids = torch.cat([words(9), words(9, seed=9)])
        for row in ids:
            self.generate(cache, row[None], max_new_tokens=1)
        with cache.call():
            self.forward(cache, ids, logits_to_keep=1)
            with pytest.raises(ContractError, match="GEN-12: a row cannot go on where another"):
                self.ask(cache, "reorder_cache", torch.tensor([1, 0]))
        assert idle(cache)

    # Closing

    @clause("GEN-13")
    @pytest.mark.parametrize("how", ["close", "with", "collected", "two"])
    def test_the_model_is_left_as_it_was(self, how: str) -> None:
        model = language_model()
        before = attachments(model)
        cache = self.make(model)
        assert attachments(model) != before
        self.generate(cache, words(5))
        if how == "with":
            with cache:
                pass
        elif how == "close":
            self.ask(cache, "close")
        elif how == "two":
            other = self.make(model)
            self.ask(cache, "close")
            assert torch.equal(
                self.generate(other, words(5)).sequences, plain("thin", words(5), {})
            )
            self.ask(other, "close")
        else:
            del cache
        assert attachments(model) == before
        assert torch.equal(model.generate(words(5), **_DEFAULTS), plain("thin", words(5), {}))

    @clause("GEN-13")
    def test_a_generate_of_the_instance_is_used_and_left(self) -> None:
        model, calls = language_model(), []

        def generate(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return type(model).generate(model, *args, **kwargs)

        model.generate = generate
        cache = self.make(model)
        assert torch.equal(self.generate(cache, words(5)).sequences, plain("thin", words(5), {}))
        self.ask(cache, "close")
        assert model.generate is generate
        assert calls == [1]

    @clause("GEN-14")
    def test_reset_forgets_all(self) -> None:
        cache = self.make()
        for session in (cache, cache.session("other")):
            self.generate(session, words(13), max_new_tokens=1)
        self.ask(cache.session("third"), "reset")
        assert not cache.tree_cache.view().pages
        assert cache.token_to_kv_pool_allocator.available_size() == 256
        for session in (cache, cache.session("other")):
            assert self.generate(session, words(13), max_new_tokens=1).spent["cached_tokens"] == 0
        assert idle(cache)

    @clause("GEN-15")
    def test_counters_are_exact(self) -> None:
        cache = self.make(max_total_tokens=28)
        self.generate(cache, words(13))
        self.generate(cache, words(13), max_new_tokens=2)
        self.generate(cache.session("other"), words(15, seed=5), max_new_tokens=1)
        assert self.ask(cache, "counters") == {
            "calls": 3,
            "prompt_tokens": 13 + 13 + 15,
            "cached_tokens": 12,
            "computed_tokens": (13 + 5) + (1 + 1) + 15,
            "evicted_tokens": 4,
        }

    @clause("GEN-16")
    def test_nothing_stale_is_read(self) -> None:
        """Over poison: pages are shared, evicted, cropped and handed out again."""
        cache = self.make(max_total_tokens=72)
        objects = cache.tree_cache, cache.token_to_kv_pool_allocator, cache.req_to_token_pool
        poison = kvspec.Poison(cache.kvcache, PAGE)
        poison.freed(range(PAGE, 72 + PAGE))
        rows = [words(14), torch.cat([words(6), words(7, seed=5)], dim=1), words(9, seed=7)]
        ids, mask = left_padded(rows)
        with kvspec.instrument(*objects, poison=poison):
            for prompt, options in (
                (rows[0], {}),
                (ids, {"attention_mask": mask}),
                (rows[1], {"num_beams": 2}),
                (words(13, seed=8).repeat(1, 2), {"prompt_lookup_num_tokens": 3}),
                (rows[0], {}),
                (ids, {"attention_mask": mask}),
            ):
                out = self.generate(cache, prompt, **options)
                assert torch.equal(out.sequences, plain("thin", prompt, options))
            assert cache.counters()["evicted_tokens"]
        assert idle(cache)

    @clause("GEN-17")
    def test_each_token_is_written_once_in_each_layer(self) -> None:
        cache = self.make()
        self.generate(cache, words(13))
        written = cache.kvcache.counters()["rows_copied"]
        options = {"max_new_tokens": 3}
        computed = self.generate(cache, words(13, 4), **options).spent["computed_tokens"]
        assert cache.kvcache.counters()["rows_copied"] - written == 2 * 2 * computed

    @clause("GEN-17")
    def test_a_run_of_slots_is_read_where_it_is(self) -> None:
        cache = self.make()
        buffers = [cache.kvcache.get_key_buffer(layer) for layer in range(2)]
        with cache.call():
            self.forward(cache, words(13))
            keys, _ = cache.layers[1].update(*staged(cache, words(1)))
        first = min(range(len(buffers[1])), key=lambda slot: abs(slot - PAGE))
        assert keys.data_ptr() == buffers[1][first].data_ptr()
        assert keys.shape == (1, 1, 14, 8)


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
        logits: Tensor = _template("thin")(ids, use_cache=False).logits
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
