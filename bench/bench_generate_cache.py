"""transformers' `generate` with a KvspecCache, against the cache that it takes itself (GEN).

A model of the shape of SmolLM2-135M - 30 layers, 9 heads, 3 of KV, 49,152 words - with random
weights, float32, on one core, and a prompt of 1,000 tokens whose first 936 were computed before.
Where nothing is measured the model has 2 layers and the prompt 100 tokens.
"""

import statistics
import time
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import kvspec
from kvspec.conformance.suite import one_thread
from kvspec.generate_cache.attachment import CACHE

ROUNDS = 7
PAGE = 16
STEPS = 8
NEW = 64


def model(layers: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def prompts(count: int, length: int, shared: int) -> list[Tensor]:
    """[1, length] each, the first `shared` words of all the same."""
    draw = torch.Generator().manual_seed(1)
    words = [torch.randint(1, 49_152, (1, length), generator=draw) for _ in range(count)]
    return [torch.cat([words[0][:, :shared], own[:, shared:]], dim=1) for own in words]


def generate(served: Any, prompt: Tensor, new_tokens: int, cache: Any) -> tuple[float, Tensor]:
    """Seconds, and what was said."""
    start = time.perf_counter()
    out = served.generate(prompt, do_sample=False, max_new_tokens=new_tokens, **{CACHE: cache})
    return time.perf_counter() - start, out


@pytest.mark.clause("GEN-2", "GEN-3", "GEN-15")
def bench_the_first_token_of_a_second_call(benchmark: Any) -> None:
    """64 of 1,000 tokens are computed, and what does not fill a page: 9 % of the whole."""
    served, length = (model(30), 1_000) if benchmark.enabled else (model(2), 100)
    rounds = ROUNDS if benchmark.enabled else 1
    first, *others = prompts(rounds + 2, length, length - 64)
    cache = kvspec.KvspecCache(served, max_total_tokens=16_384, page_size=PAGE)
    ratios, ours, theirs = [], [], []
    with one_thread(), cache:
        generate(served, first, 1, cache)
        expected = generate(served, others[0], 4, transformers.DynamicCache())[1]
        assert torch.equal(generate(served, others[0], 4, cache)[1], expected)
        for prompt in others[1:]:
            before = cache.counters()
            seconds, said = generate(served, prompt, 1, cache)
            whole, expected = generate(served, prompt, 1, transformers.DynamicCache())
            assert torch.equal(said, expected)
            after, reused = cache.counters(), (length - 64) // PAGE * PAGE
            assert after["cached_tokens"] - before["cached_tokens"] == reused
            assert after["computed_tokens"] - before["computed_tokens"] == length - reused
            ours.append(seconds)
            theirs.append(whole)
            ratios.append(seconds / whole)
        cache.check()
        benchmark.extra_info["ms, ours"] = round(statistics.median(ours) * 1e3)
        benchmark.extra_info["ms, DynamicCache"] = round(statistics.median(theirs) * 1e3)
        benchmark.extra_info["ours / DynamicCache"] = round(statistics.median(ratios), 3)
        benchmark.pedantic(lambda: generate(served, others[-1], 1, cache), rounds=1)
    assert not benchmark.enabled or statistics.median(ratios) < 0.25


def decode(served: Any, cache: Any, start: int) -> float:
    """Seconds of a token, mean of a few."""
    began = time.perf_counter()
    with torch.no_grad():
        for place in range(start, start + STEPS):
            at = torch.tensor([[place]])
            served(input_ids=at, position_ids=at, logits_to_keep=1, **{CACHE: cache})
    return (time.perf_counter() - began) / STEPS


@pytest.mark.clause("GEN-17")
@pytest.mark.parametrize("slots", ["a run", "scattered"])
def bench_a_decoded_token(benchmark: Any, slots: str) -> None:
    """After 1,000 tokens: theirs are copied at every step, ours where they do not lie in a row.

    The pool is one buffer of a layer, and attention reads it where it is, or gathers.
    """
    served, length = (model(30), 1_000) if benchmark.enabled else (model(2), 100)
    rounds = ROUNDS if benchmark.enabled else 1
    prompt, other = prompts(2, length, length // 2 - 3)
    cache, theirs = kvspec.KvspecCache(served, 8_192, PAGE), transformers.DynamicCache()
    with one_thread(), cache:
        if slots == "scattered":
            generate(served, other[:, : length // 2], 1, cache)
            generate(served, other.flip(1), 1, cache)
        expected = generate(served, prompt, 3, transformers.DynamicCache())[1]
        assert torch.equal(generate(served, prompt, 3, cache)[1], expected)
        if slots == "a run":
            cache.reset()
        with cache.call(), torch.no_grad():
            for each in (cache, theirs):
                served(input_ids=prompt, logits_to_keep=1, **{CACHE: each})
            assert cache.current is not None
            assert isinstance(cache.current._read, int) == (slots == "a run")
            ratios, times = [], []
            for number in range(rounds):
                start = length + number * STEPS
                seconds, whole = (decode(served, each, start) for each in (cache, theirs))
                times.append(seconds)
                ratios.append(seconds / whole)
            benchmark.extra_info["ms a token"] = round(statistics.median(times) * 1e3, 1)
            benchmark.extra_info["ours / DynamicCache"] = round(statistics.median(ratios), 2)
            benchmark.pedantic(lambda: decode(served, cache, length + rounds * STEPS), rounds=1)
    assert not benchmark.enabled or statistics.median(ratios) < 1.5
