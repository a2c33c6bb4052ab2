"""Conformance of the model runner. Spec: RUN."""

import inspect
import threading
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import kvspec.model_runner.runner
from kvspec.conformance import clause
from kvspec.conformance.model_runner.driving import (
    VOCABULARY,
    Driven,
    pools_of,
    tiny,
    tokens_of,
)
from kvspec.conformance.model_runner.tools import ModelRunnerToolsConformance
from kvspec.conformance.suite import MUTANT, Conformance, one_thread
from kvspec.conformance.watch import watch_function, watch_made
from kvspec.errors import ContractError
from kvspec.interfaces.model_runner import ForwardBatch
from kvspec.model_runner import TinyKind, packed
from kvspec.model_runner.decoder import Decoder

__all__ = ["ModelRunnerConformance", "ModelRunnerToolsConformance"]

KINDS = ["llama", "qwen3", "gpt_neox", "mistral", "hybrid", "softcap", "sinks"]
WINDOWED = ["mistral", "hybrid", "softcap", "sinks"]
UNEQUAL = (37, 5, 21, 50, 9, 33, 17, 12)


class ModelRunnerConformance(Conformance):
    """`impl` may hold a class `ModelRunner`, which then stands in for that of kvspec. The pools are
    those of `impl`. A mutant looks at each model once, and goes through fewer kinds of them.
    """

    def passed_over(self, case: bool) -> bool:
        """Whether it is a case that a mutant need not go through."""
        return self.impl_name == MUTANT and case

    def runner(self, kind: TinyKind = "llama", *, model: Any = None, **given: Any) -> Any:
        """A runner of a tiny model, with logits kept; its methods are watched."""
        given_class = getattr(self.impl, "ModelRunner", None)
        cls: Callable[..., Any] = kvspec.model_runner.ModelRunner
        if inspect.isclass(given_class):
            cls = given_class
        arguments = {
            "page_size": 1,
            "max_running_requests": 8,
            "context_length": 128,
            "max_total_tokens": 400,
            "keep_logits": True,
            "implementation": "native" if self.impl_name == "native" else "oracle",
            **given,
        }
        with one_thread():
            if self.impl_name == MUTANT and model is None:
                with mock.patch.object(kvspec.model_runner.runner, "Decoder", _looked_at):
                    made = cls(tiny(kind), **arguments)
            elif self.impl_name == MUTANT:
                made = cls(model, **arguments)
            else:
                given = {"model": tiny(kind) if model is None else model, **arguments}
                made = watch_made(self.impl_name, "__init__", cls, None, "model_runner", **given)
        return self._watched(made)

    def _watched(self, made: Any) -> Any:
        def forward_batch_generation(
            batch: ForwardBatch, sliding_window_size: int | None = made.sliding_window_size
        ) -> Any:
            with one_thread():
                return made.forward_batch_generation(batch)

        step: Callable[..., Any] = forward_batch_generation
        if self.impl_name != MUTANT:
            step = watch_function(self.impl_name, step, "model_runner")
        names = (
            "get_memory_pool",
            "counters",
            "page_size",
            "sliding_window_size",
            "kv_cache_dtype",
        )
        kept = {name: getattr(made, name) for name in (*names, "max_total_num_tokens")}
        return SimpleNamespace(**kept, forward_batch_generation=step, made=made)

    def driven(self, kind: TinyKind, lengths: Any, **given: Any) -> Driven:
        return Driven(self.runner(kind, **given), kind, lengths)

    # -- the pools -------------------------------------------------------------------------------

    @clause("RUN-1")
    @pytest.mark.parametrize(
        ("kind", "page_size", "allocator", "pool"),
        [
            ("llama", 1, "TokenToKVPoolAllocator", "MHATokenToKVPool"),
            ("gpt_neox", 16, "PagedTokenToKVPoolAllocator", "MHATokenToKVPool"),
            ("mistral", 1, "SWATokenToKVPoolAllocator", "SWAKVPool"),
            ("hybrid", 16, "SWATokenToKVPoolAllocator", "SWAKVPool"),
        ],
    )
    def test_pools_are_made_for_the_model(
        self, kind: TinyKind, page_size: int, allocator: str, pool: str
    ) -> None:
        runner = self.runner(kind, page_size=page_size, max_running_requests=3)
        rows, slots = runner.get_memory_pool()
        kv = slots.get_kvcache()
        assert type(slots).__name__ == allocator
        assert type(kv).__name__ == pool
        assert (rows.available_size(), rows.max_context_len) == (3, 128)
        assert slots.size == kv.size == runner.max_total_num_tokens == 400
        assert slots.page_size == kv.page_size == page_size
        assert kv.dtype == torch.float32
        heads = 4 if kind == "gpt_neox" else 2
        assert kv.layer_num == 4
        for layer in range(4):
            for rows_of in kv.get_kv_buffer(layer):
                assert rows_of.shape[1:] == (heads, 16)
        if pool == "SWAKVPool":
            assert runner.sliding_window_size == 8
            windows = [kv.layers_mapping[layer][1] for layer in range(4)]
            assert windows == ([True] * 4 if kind == "mistral" else [True, False] * 2)
        else:
            assert runner.sliding_window_size is None

    @clause("RUN-1")
    def test_kv_is_kept_in_another_type_if_it_is_asked_for(self) -> None:
        runner = self.runner(kv_cache_dtype=torch.bfloat16)
        _, slots = runner.get_memory_pool()
        assert slots.dtype == slots.get_kvcache().dtype == torch.bfloat16

    # -- a step ----------------------------------------------------------------------------------

    @clause("RUN-2", "RUN-3", "RUN-4")
    @pytest.mark.parametrize("page_size", [1, 16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_logits_are_those_of_the_model_without_a_cache(
        self, kind: TinyKind, page_size: int
    ) -> None:
        """Chunks that end in mid-page, drafts, decoding, who comes late; all else is poison."""
        if self.passed_over((kind, page_size) not in (("llama", 16), ("hybrid", 1), ("sinks", 1))):
            return
        driven = self.driven(kind, UNEQUAL, page_size=page_size)
        driven.step((20, 1, 0, 7, 5, 0, 0, 0))
        driven.step((13, 1, 5, 30, 1, 3, 0, 4))
        driven.step((1, 1, 9, 10, 1, 27, 14, 1))
        driven.step((1,) * 8)
        driven.step((1, 1, 1, 1, 1, 1, 1, 1))
        driven.step((1, 0, 5, 1, 0, 1, 1, 5))

    @clause("RUN-3")
    @pytest.mark.parametrize("page_size", [1, 16])
    def test_a_request_alone_is_served_token_by_token_too(self, page_size: int) -> None:
        if self.passed_over(page_size == 1):
            return
        driven = self.driven("llama", (30,), page_size=page_size)
        driven.step((19,))
        for _ in range(11):
            driven.step((1,))

    @clause("RUN-3")
    def test_nothing_is_sampled_of_a_chunk_in_the_middle(self) -> None:
        driven = self.driven("llama", (30,))
        assert driven.step((20,), sample=False) == []
        assert len(driven.step((10,))) == 10

    @clause("RUN-3")
    def test_what_is_sampled_is_the_most_likely_and_logits_are_kept_for_who_asks(self) -> None:
        logits = []
        for keep in (True, False):
            runner = self.runner(keep_logits=keep)
            slots = torch.arange(1, 13)
            result = runner.forward_batch_generation(
                packed([(tokens_of(0, 12), slots)], sampled=[11, 3])
            )
            assert result.next_token_ids.dtype == torch.int64
            logits.append(result)
        assert torch.equal(logits[0].next_token_ids, logits[0].next_token_logits.argmax(dim=-1))
        assert torch.equal(logits[0].next_token_ids, logits[1].next_token_ids)
        assert logits[1].next_token_logits is None

    @clause("RUN-2")
    @pytest.mark.parametrize("kind", ["llama", "hybrid"])
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_the_rows_of_the_new_tokens_are_written_and_no_other(
        self, page_size: int, kind: TinyKind
    ) -> None:
        if self.passed_over(page_size == 1):
            return
        driven = self.driven(kind, (14, 9), page_size=page_size)
        driven.step((6, 3), compare=False)
        before = driven.bytes_of()
        written = torch.cat([driven.slots[0][6:9], driven.slots[1][3:4]])
        driven.step((3, 1), compare=False)
        pairs = written
        if kind == "hybrid":
            pairs = driven.allocator.translate_loc_from_full_to_swa(written).long()
        full = 2 * pools_of(driven.kvcache)[0].layer_num
        for number, (old, new) in enumerate(zip(before, driven.bytes_of(), strict=True)):
            changed = torch.nonzero((old != new).any(dim=1)).flatten().tolist()
            assert changed == sorted((written if number < full else pairs).tolist())

    @clause("RUN-2")
    def test_kv_is_that_of_the_position_wherever_its_slot_lies(self) -> None:
        found = []
        for slots in (torch.arange(1, 11), torch.arange(60, 50, -1)):
            runner = self.runner()
            runner.forward_batch_generation(packed([(tokens_of(0, 10), slots)]))
            kv = runner.get_memory_pool()[1].get_kvcache()
            found.append([rows[slots].clone() for rows in kv.get_kv_buffer(3)])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
            assert len(torch.unique(one[:, 0, 0])) == 10

    @clause("RUN-4")
    @pytest.mark.parametrize("kind", ["llama", "hybrid"])
    def test_what_is_given_back_is_not_read(self, kind: TinyKind) -> None:
        """The request beside it is longer, and is gone before the next step."""
        driven = self.driven(kind, (12, 40), page_size=4)
        driven.step((6, 39))
        pairs = driven.slots[1]
        if kind == "hybrid":
            pairs = driven.allocator.translate_loc_from_full_to_swa(pairs).long()
        driven.poison[0].freed(driven.slots[1])
        driven.poison[-1].freed(pairs)
        driven.step((1, 0))
        driven.step((5, 0))

    @clause("RUN-5")
    @pytest.mark.parametrize("kind", WINDOWED)
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_pairs_before_the_window_may_be_given_back(
        self, page_size: int, kind: TinyKind
    ) -> None:
        """As far as the pages go that no later token attends to, the last one included."""
        if self.passed_over((kind, page_size) != ("hybrid", 4)):
            return
        driven = self.driven(kind, (44, 23), page_size=page_size)
        evicted = [0, 0]
        for new in ((10, 3), (9, 1), (1, 1), (1, 1), (3, 12), (1, 1), (12, 1), (7, 3)):
            driven.step(new)
            for request in (0, 1):
                start = max(0, driven.done[request] - 7) // page_size * page_size
                gone = driven.slots[request][evicted[request] : start]
                if len(gone):
                    pairs = driven.allocator.translate_loc_from_full_to_swa(gone).long()
                    driven.allocator.free_swa(gone)
                    driven.poison[-1].freed(pairs)
                    evicted[request] = start
        assert min(evicted) > 0

    @clause("RUN-7")
    def test_a_window_with_a_hole_is_refused(self) -> None:
        driven = self.driven("hybrid", (20,))
        driven.step((12,), compare=False)
        driven.allocator.free_swa(driven.slots[0][5:6])  # seen by position 12, of 5 to 12
        before = driven.bytes_of()
        batch = packed([(tokens_of(0, 20)[12:13], driven.slots[0][:13])])
        with pytest.raises(ContractError, match=r"RUN-7: slot \d+, within the window of request 0"):
            driven.runner.forward_batch_generation(batch)
        assert all(map(torch.equal, before, driven.bytes_of()))

    # -- what is refused -------------------------------------------------------------------------

    @clause("RUN-6")
    @pytest.mark.parametrize(
        "fault",
        ["none", "tokens", "lengths", "positions", "slots", "sink", "beyond", "sample", "long"],
    )
    def test_a_batch_that_is_none_is_refused(self, fault: str) -> None:
        runner = self.runner(context_length=16)
        driven = Driven(runner, "llama", (16,))
        driven.step((4,), compare=False)
        before = driven.bytes_of()
        with pytest.raises(ContractError, match="RUN-6: "):
            runner.forward_batch_generation(_spoilt(driven, fault))
        assert all(map(torch.equal, before, driven.bytes_of()))
        driven.step((3,), compare=False)

    @clause("RUN-8")
    @pytest.mark.parametrize(
        ("name", "config", "reason"),
        [
            ("T5", {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2}, "has an encoder"),
            ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}, "no position_ids"),
            ("Llama", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
            ("Llama", {"kv_lora_rank": 8}, "a latent"),
        ],
    )
    def test_a_model_that_cannot_be_run_is_refused(
        self, name: str, config: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(ContractError, match=f"RUN-8: .*{reason}"):
            self.runner(model=_other_model(name, config))

    @clause("RUN-8")
    @pytest.mark.parametrize("fault", ["bias", "later", "missing", "twice"])
    def test_attention_that_is_not_what_it_seems_is_refused(self, fault: str) -> None:
        reasons = {
            "bias": "gives other logits when its attention is replaced",
            "later": "attends to what comes later",
            "missing": r"asked for by layers \[0, 1, 3\]",
            "twice": r"asked for by layers \[0, 1, 1, 3\]",
        }
        with pytest.raises(ContractError, match=f"RUN-8: .*{reasons[fault]}"):
            self.runner(model=_odd_model(fault))

    @clause("RUN-9")
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("page_size", 0),
            ("max_running_requests", 0),
            ("context_length", 0),
            ("context_length", 1025),
            ("mem_fraction_static", 0.0),
            ("mem_fraction_static", 1.5),
            ("swa_full_tokens_ratio", 0.0),
            ("swa_full_tokens_ratio", 1.1),
            ("max_total_tokens", 0),
            ("implementation", "core"),
        ],
    )
    def test_an_argument_that_is_none_is_refused(self, name: str, value: Any) -> None:
        with pytest.raises(ContractError, match=f"RUN-9: {name} "):
            self.runner("hybrid", **{name: value})

    # -- the model that was given ----------------------------------------------------------------

    @clause("RUN-13")
    def test_the_model_is_as_it_was(self) -> None:
        model, ids = tiny("softcap"), torch.tensor([tokens_of(0, 12)])
        config = model.config.to_dict()
        model.train()
        try:
            runner = self.runner("softcap")
            assert model.training
            model.eval()
            with torch.no_grad():
                before = model(input_ids=ids).logits
            model.train()
            slots = runner.get_memory_pool()[1].alloc(5)
            runner.forward_batch_generation(packed([(tokens_of(0, 5), slots)]))
            assert all(module.training for module in model.modules())
        finally:
            model.eval()
        assert model.config.to_dict() == config
        assert model.config._attn_implementation == "eager"
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, before)

    @clause("RUN-13")
    def test_others_use_it_in_the_middle_of_a_step(self) -> None:
        """In this thread and in another."""
        model, ids = tiny("llama"), torch.tensor([tokens_of(0, 12)])
        found: list[Tensor] = []

        def use() -> None:
            with torch.no_grad():
                found.append(model(input_ids=ids).logits)

        use()
        runner = self.runner()
        kv = runner.get_memory_pool()[1].get_kvcache()
        write = kv.set_kv_buffer

        def interrupted(layer: int, *given: Any) -> None:
            write(layer, *given)
            if layer == 1:
                use()
                thread = threading.Thread(target=use)
                thread.start()
                thread.join()

        kv.set_kv_buffer = interrupted
        runner.forward_batch_generation(packed([(tokens_of(0, 5), torch.arange(1, 6))]))
        assert len(found) == 3
        assert all(torch.allclose(each, found[0], atol=1e-4) for each in found)

    @clause("RUN-13")
    def test_weights_that_are_changed_in_place_are_the_runners_too(self) -> None:
        model = kvspec.model_runner.tiny_model("llama", seed=3)
        runner = self.runner(model=model)
        batch = packed([(tokens_of(0, 5), torch.arange(1, 6))])
        before = runner.forward_batch_generation(batch).next_token_logits
        with torch.no_grad():
            model.lm_head.weight.mul_(2.0)
        after = runner.forward_batch_generation(batch).next_token_logits
        assert torch.allclose(after, 2 * before, atol=1e-4)

    @clause("RUN-20")
    def test_of_equal_words_any_may_be_sampled(self) -> None:
        model = kvspec.model_runner.tiny_model("llama", seed=3)
        with torch.no_grad():
            model.lm_head.weight[40:] = 0.0
            model.lm_head.weight[:40] = model.lm_head.weight[:1]
        batch = packed([(tokens_of(0, 5), torch.arange(1, 6))])
        result = self.runner(model=model).forward_batch_generation(batch)
        logits = result.next_token_logits
        chosen = logits.gather(1, result.next_token_ids[:, None])[:, 0]
        assert torch.equal(chosen, logits.max(dim=-1).values)

    # -- costs -----------------------------------------------------------------------------------

    @clause("RUN-14")
    @pytest.mark.parametrize(
        ("kind", "rows", "calls"),
        [("llama", 4 * (4 * 40 + 12), 8), ("hybrid", 2 * (4 * 40 + 12) + 2 * 5 * 8, 6)],
    )
    def test_a_step_is_one_call_of_the_model(self, kind: TinyKind, rows: int, calls: int) -> None:
        """Contexts of 33 to 40 stand together, those of 12 do not; of a window none is longer."""
        driven = self.driven(kind, (40, 33, 36, 38, 12))
        driven.step((39, 32, 35, 37, 11), compare=False)
        before = driven.runner.counters()
        writes = []
        write = driven.kvcache.set_kv_buffer

        def counted(layer: int, loc: Any, *given: Any) -> None:
            writes.append((layer, len(loc)))
            write(layer, loc, *given)

        driven.kvcache.set_kv_buffer = counted
        driven.step((1, 1, 1, 1, 1), compare=False)
        assert writes == [(layer, 5) for layer in range(4)]
        cost = {name: count - before[name] for name, count in driven.runner.counters().items()}
        assert cost == {
            "steps": 1,
            "tokens_computed": 5,
            "attention_calls": calls,
            "kv_rows_read": rows,
        }


@cache
def _looked_at(model: Any) -> Decoder:
    return Decoder(model)


def _spoilt(driven: Driven, fault: str) -> ForwardBatch:
    """A batch of three more tokens after four, with one thing wrong."""
    slots = driven.slots[0]
    batch = packed([(tokens_of(0, 16)[4:7], slots[:7])])
    elsewhere = slots[:7].clone()
    elsewhere[1] = 0 if fault == "sink" else 401
    changes: dict[str, dict[str, Any]] = {
        "none": {
            **{name: torch.arange(0) for name in ("input_ids", "positions", "out_cache_loc")},
            "extend_lens": (0,),
            "sample_indices": torch.arange(0),
        },
        "tokens": {"input_ids": batch.input_ids[:2]},
        "lengths": {"seq_lens": (8,)},
        "positions": {"positions": batch.positions + 1},
        "slots": {"out_cache_loc": slots[7:10]},
        "sink": {"token_slots": (elsewhere,)},
        "beyond": {"token_slots": (elsewhere,)},
        "sample": {"sample_indices": torch.tensor([0, 3])},
        "long": {},
    }
    if fault == "long":
        more = torch.tensor([each for each in range(1, 320) if each not in slots.tolist()])
        return packed([(tokens_of(1, 13), torch.cat([slots[:4], more[:13]]))])
    return batch._replace(**changes[fault])


def _other_model(name: str, config: dict[str, Any]) -> Any:
    import transformers

    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    own = config if name in ("T5", "Bloom") else {**small, **config}
    made = getattr(transformers, f"{name}Config")(**{**own, "vocab_size": VOCABULARY})
    classes = {"T5": "T5ForConditionalGeneration"}
    return getattr(transformers, classes.get(name, f"{name}ForCausalLM"))(made)


def _odd_model(fault: str) -> Any:
    """A Llama whose attention is not what an engine takes it for."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = kvspec.model_runner.tiny_model("llama", seed=4)
    layers = model.model.layers
    if fault == "bias":

        def biased(
            module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
        ) -> Any:
            places = torch.arange(key.shape[2], dtype=query.dtype)
            bias = (places[None] - places[:, None]).masked_fill(
                places[None] > places[:, None], -1e9
            )
            found = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=bias, enable_gqa=True
            )
            return found.transpose(1, 2), None

        ALL_ATTENTION_FUNCTIONS.register("kvspec_test_biased", biased)
        model.set_attn_implementation("kvspec_test_biased")
    elif fault == "later":
        layers[2].self_attn.is_causal = False
    elif fault == "missing":
        layers[2].self_attn.forward = _passes_through
    else:
        layers[2].self_attn.layer_idx = 1
    return model


def _passes_through(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    return hidden_states, None
