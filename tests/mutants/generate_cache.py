"""Broken caches for transformers. Each must fail on the clause it breaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.generate_cache import GenerateCacheConformance, words
from kvspec.conformance.mutants import Registry
from kvspec.errors import ContractError
from kvspec.generate_cache import KvspecCache
from kvspec.generate_cache.attachment import CACHE
from kvspec.generate_cache.call import Call


class BriefConformance(GenerateCacheConformance):
    """What kills mutants: of tests with many cases, and of slow ones, one or none."""

    @clause("GEN-2", "GEN-3", "GEN-4")
    def test_every_family_says_the_same_and_reuses(self) -> None:
        GenerateCacheConformance.test_every_family_says_the_same_and_reuses(self, "thin")

    @clause("GEN-7")
    @pytest.mark.parametrize("where", ["criterion", "layer"])
    def test_whatever_is_raised_everything_is_given_back(self, where: str) -> None:
        test = GenerateCacheConformance.test_whatever_is_raised_everything_is_given_back
        test(self, where, KeyboardInterrupt)

    @clause("GEN-11")
    @pytest.mark.parametrize("beams", [[1, 0, 2], [2, 2, 0]])
    def test_rows_go_on_where_others_were(self, beams: list[int]) -> None:
        GenerateCacheConformance.test_rows_go_on_where_others_were(self, beams)

    @clause("GEN-13")
    @pytest.mark.parametrize("how", ["close", "two"])
    def test_the_model_is_left_as_it_was(self, how: str) -> None:
        GenerateCacheConformance.test_the_model_is_left_as_it_was(self, how)

    @clause("GEN-9")
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"labels": words(9)}, "a forward with labels"),
            ({"position_ids": torch.arange(1, 10)[None]}, "position_ids are not those"),
        ],
    )
    def test_a_forward_whose_kv_is_not_of_tokens_alone_is_refused(
        self, arguments: dict[str, Any], text: str
    ) -> None:
        test = GenerateCacheConformance.test_a_forward_whose_kv_is_not_of_tokens_alone_is_refused
        test(self, arguments, text)


SLOW = (
    "test_another_session_may_have_a_call_beside_it",
    "test_a_generate_of_the_instance_is_used_and_left",
    "test_after_close_nothing_is_taken",
    "test_namespaces_share_nothing",
    "test_every_way_to_decode_says_the_same",
    "test_a_model_whose_kv_is_not_of_tokens_alone_is_refused",
    "test_gradients_and_other_models_are_refused",
    "test_no_page_or_no_row_is_refused",
    "test_of_a_batch_the_least_of_the_matches_is_left_out",
    "test_pages_that_are_too_few_while_decoding_are_refused",
    "test_too_few_rows_are_refused",
    "test_what_was_cropped_is_not_cached",
)
"""Of which others decide the same."""

for name in SLOW:
    setattr(BriefConformance, name, None)

registry = Registry(BriefConformance, kvspec.oracle)


def calls(*ids: str) -> Any:
    """Declare a broken `Call`: the mutant is a cache that has it."""

    def declare(broken: type[Call]) -> type[Call]:
        cache = type(broken.__name__, (KvspecCache,), {"call_class": broken})
        registry.mutant(*ids, replaces="KvspecCache")(cache)
        return broken

    return declare


def caches(*ids: str) -> Any:
    return registry.mutant(*ids, replaces="KvspecCache")


@caches("GEN-1")
class LetsASecondCallIn(KvspecCache):
    @contextmanager
    def call(self) -> Iterator[None]:
        before, self.current = self.current, None
        try:
            with super().call():
                yield
        finally:
            self.current = before


@caches("GEN-1")
class ResetsWhatIsOpen(KvspecCache):
    def forget(self) -> None:
        if not self.open_calls:
            super().forget()


@calls("GEN-2", "GEN-10", "GEN-11", "GEN-16", "GEN-3", "GEN-4", "GEN-6", "GEN-8")
class TakesEverySlotForARun(Call):
    """Reads what stands behind the first slot, whoever has it."""

    def extend(self, coming: Any, new: int) -> None:
        super().extend(coming, new)
        if len(self.sequences) == 1 and self.coming:
            self._read = min(int(self._slots[0, 0]), self.pools.kvcache.size - self.columns - new)


@calls("GEN-3", "GEN-2", "GEN-6", "GEN-15")
class MatchesTheLastTokenToo(Call):
    def _lookup(self, prompt: Any, computed: int) -> Tensor:
        return super()._lookup(prompt, 0)

    def start(self, prompts: Any, pads: Any, computed: int) -> int:
        return super().start(prompts, pads, 0)


@calls("GEN-3", "GEN-2", "GEN-5", "GEN-6", "GEN-7", "GEN-12", "GEN-15")
class ComputesAllAgain(Call):
    def _lookup(self, prompt: Any, computed: int) -> Tensor:
        return super()._lookup(prompt, len(prompt))


@calls("GEN-3")
class LeavesOutWhatIsAskedFor(Call):
    def start(self, prompts: Any, pads: Any, computed: int) -> int:
        return super().start(prompts, pads, 1)


@calls("GEN-4", "GEN-2", "GEN-3", "GEN-7", "GEN-8", "GEN-10", "GEN-11", "GEN-15")
class KeysByThePromptAlone(Call):
    """So that what was said is computed again when the conversation goes on."""

    def commit(self) -> None:
        first = self._cached is not None
        super().commit()
        if first:
            self.prompts = [len(sequence.tokens) for sequence in self.sequences]

    def end(self) -> None:
        for sequence, count in zip(self.sequences, getattr(self, "prompts", ()), strict=False):
            del sequence.tokens[count:]
        super().end()


@calls("GEN-4")
class CachesWhatDidNotComeToItsEnd(Call):
    def end(self) -> None:
        for sequence in self.sequences:
            sequence.tokens.extend(sequence.coming)
        super().end()


@calls("GEN-4", "GEN-2", "GEN-6", "GEN-15")
class CachesPadding(Call):
    def end(self) -> None:
        for sequence in self.sequences:
            if sequence.pads and sequence.cache_protected_len == 0:
                sequence.tokens = [0] * sequence.pads + sequence.tokens[: -sequence.pads]
        super().end()


@calls("GEN-5", "GEN-14")
class SharesAcrossNamespaces(Call):
    def __init__(self, pools: Any, extra_key: Any) -> None:
        super().__init__(pools, None)


@calls("GEN-6")
class SharesPartOfAPage(Call):
    """Names the tree's slots where it should copy."""

    def _share(self, prompts: Any, reused: int) -> None:
        for sequence, prompt in zip(self.sequences, prompts, strict=True):
            at, stop = sequence.cache_protected_len, reused - sequence.pads
            if stop > at:
                whole = prompt[: at + self.pools.tree.page_size]
                match = self.pools.tree.match_prefix(whole, extra_key=self.extra_key)
                slots = match.device_indices[at:stop]
                self.pools.rows.write((sequence.req_pool_idx, slice(at, stop)), slots)
                sequence.slots += slots.tolist()
                sequence.tokens = prompt[:stop]


@calls("GEN-7", "GEN-2", "GEN-4", "GEN-6", "GEN-11", "GEN-12", "GEN-15", "GEN-16")
class ForgetsToUnlock(Call):
    def _admit(self, prompt: Any, pads: int, reused: int) -> None:
        super()._admit(prompt, pads, reused)
        if self.sequences[-1].cache_protected_len:
            self.pools.tree.inc_lock_ref(self.sequences[-1].last_node)


@calls("GEN-7", "GEN-4")
class HoldsOnAfterAnError(Call):
    """As where the end of a call is what follows its last step."""

    def end(self) -> None:
        if not self.coming:
            super().end()


@calls("GEN-7", "GEN-4", "GEN-16", "GEN-17")
class FreesTwice(Call):
    def end(self) -> None:
        own = [slot for s in self.sequences for slot in s.slots[len(s.tokens) :]]
        super().end()
        if own:
            self.pools.allocator.free(own)


@calls("GEN-8", "GEN-15", "GEN-16")
class NeverEvicts(Call):
    def _take(self, wanted: Any) -> None:
        page = self.pools.allocator.page_size
        pages = sum(-(-stop // page) - -(-len(s.slots) // page) for s, stop in wanted)
        if pages * page > self.pools.allocator.available_size():
            raise ContractError("GEN-8: no page is free")
        super()._take(wanted)


@calls("GEN-8")
class EvictsAndThenRefuses(Call):
    def _take(self, wanted: Any) -> None:
        try:
            super()._take(wanted)
        except ContractError:
            self.pools.tree.evict(self.pools.tree.evictable_size())
            raise


@caches("GEN-9")
class TakesAnyArgument(KvspecCache):
    def before_forward(self, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in kwargs.items() if name not in ("labels", CACHE)}
        return kwargs | super().before_forward(model, given)


@calls("GEN-10")
class CropsTheColumnsAlone(Call):
    def crop(self, count: int) -> None:
        tokens = [list(sequence.tokens) for sequence in self.sequences]
        super().crop(count)
        for sequence, kept in zip(self.sequences, tokens, strict=True):
            sequence.tokens = kept


@calls("GEN-11", "GEN-2", "GEN-16")
class ReordersTheTokensAlone(Call):
    def reorder(self, beams: Any) -> None:
        pools = self.pools
        stays = SimpleNamespace(move_kv_cache=lambda targets, sources: None)
        self.pools = pools._replace(kvcache=stays)
        try:
            super().reorder(beams)
        finally:
            self.pools = pools


@calls("GEN-11", "GEN-2", "GEN-16")
class MovesRowAfterRow(Call):
    """So that a row is overwritten before it is read."""

    def reorder(self, beams: Any) -> None:
        if len(beams) != len(self.sequences) or max(beams) >= len(beams):
            super().reorder(beams)
        for index, beam in enumerate(beams):
            one_by_one = list(range(len(self.sequences)))
            one_by_one[index] = beam
            super().reorder(one_by_one)


@calls("GEN-12")
class GoesOnWhereAnotherPromptWas(Call):
    def reorder(self, beams: Any) -> None:
        try:
            super().reorder(beams)
        except ContractError as error:
            if "another prompt" not in str(error):
                raise


@caches("GEN-12")
class CropsByAnyNumber(KvspecCache):
    def crop(self, tokens_to_remove: int) -> None:
        super().crop(-abs(tokens_to_remove))


@caches("GEN-13", "GEN-1")
class KeepsHooks(KvspecCache):
    def close(self) -> None:
        self.closed = True


@caches("GEN-14")
class ForgetsNothing(KvspecCache):
    def forget(self) -> None:
        if self.open_calls:
            super().forget()


@calls("GEN-15", "GEN-2", "GEN-6")
class CountsPadding(Call):
    def commit(self) -> None:
        if self._cached is not None:
            self.pools.counts["prompt_tokens"] += sum(self.pads)
        super().commit()


@calls("GEN-15")
class CountsWhatIsDecodedAsPrompt(Call):
    def commit(self) -> None:
        self._cached = self._cached or 0
        super().commit()


@calls("GEN-16", "GEN-2", "GEN-6", "GEN-15")
class ReadsWhatMayBeEvicted(Call):
    """Copies a part of a page before it is locked, and after others were taken."""

    def _share(self, prompts: Any, reused: int) -> None:
        partial = [
            (sequence, prompt, reused - sequence.pads)
            for sequence, prompt in zip(self.sequences, prompts, strict=True)
            if reused - sequence.pads > sequence.cache_protected_len
        ]
        if not partial:
            return
        sources = []
        for sequence, prompt, stop in partial:
            at = sequence.cache_protected_len
            whole = prompt[: at + self.pools.tree.page_size]
            match = self.pools.tree.match_prefix(whole, extra_key=self.extra_key, touch=False)
            sources += match.device_indices[at:stop].tolist()
        self.pools.tree.evict(self.pools.tree.evictable_size())
        self._take([(sequence, stop) for sequence, _, stop in partial])
        targets = [slot for s, *_ in partial for slot in s.slots[s.cache_protected_len :]]
        self.pools.kvcache.move_kv_cache(targets, sources)
        for sequence, prompt, stop in partial:
            sequence.tokens = prompt[:stop]


@calls("GEN-17")
class WritesTwice(Call):
    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        super().update(layer, keys, values)
        return super().update(layer, keys, values)
