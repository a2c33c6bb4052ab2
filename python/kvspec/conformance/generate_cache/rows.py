"""What is refused, what decoding does with its rows, and closing. Spec: GEN."""

from typing import Any

import pytest
import torch

import kvspec
from kvspec.conformance import clause
from kvspec.conformance.generate_cache.driving import (
    DEFAULTS,
    PAGE,
    Driver,
    as_ids,
    attachments,
    idle,
    language_model,
    left_padded,
    logits_of,
    other_model,
    pages_of,
    paths,
    plain,
    staged,
    words,
)
from kvspec.errors import ContractError

__all__ = ["RowsConformance"]


class RowsConformance(Driver):
    """GEN-9 to GEN-17."""

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
        assert torch.equal(model.generate(words(5), **DEFAULTS), plain("thin", words(5), {}))

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
