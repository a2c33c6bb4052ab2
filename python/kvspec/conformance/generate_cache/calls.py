"""What comes out, what is computed, what is cached, and the end of a call. Spec: GEN."""

from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.generate_cache.driving import (
    FAMILIES,
    Driver,
    idle,
    language_model,
    left_padded,
    logits_of,
    pages_of,
    paths,
    plain,
    raising,
    resident,
    words,
)
from kvspec.errors import ContractError

__all__ = ["CallsConformance"]


class CallsConformance(Driver):
    """GEN-1 to GEN-8."""

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
