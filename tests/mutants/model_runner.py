"""Broken runners. Each must fail on the clause it breaks."""

from typing import Any

import torch
from torch import Tensor

import kvspec.oracle
from kvspec.conformance.model_runner import ModelRunnerConformance
from kvspec.conformance.mutants import Registry
from kvspec.model_runner import GenerationBatchResult, ModelRunner
from kvspec.model_runner.attention import NAME, PagedAttention
from kvspec.model_runner.decoder import Decoder
from kvspec.model_runner.runner import require_batch

registry = Registry(ModelRunnerConformance, kvspec.oracle)


def attends_by(attention: type[PagedAttention]) -> type[ModelRunner]:
    """A runner whose steps are of this class."""

    class Runner(ModelRunner):
        def _step(self, batch: Any) -> PagedAttention:
            dtype = self._decoder.dtype
            return attention(batch, self.kv_pool, self.layers, self._pairs, dtype)

    return Runner


def mutant(*clauses: str, reports: tuple[str, ...] = ()) -> Any:
    """Declare a broken attention as a runner that has it."""

    def declare(attention: type[PagedAttention]) -> type[PagedAttention]:
        runner = attends_by(attention)
        runner.__name__ = attention.__name__
        registry.mutant(*clauses, replaces="ModelRunner", reports=reports)(runner)
        return attention

    return declare


@registry.mutant("RUN-1", replaces="ModelRunner")
class KeepsTheModelsType(ModelRunner):
    def __init__(self, model: Any, **given: Any) -> None:
        super().__init__(model, **{**given, "kv_cache_dtype": None})


@registry.mutant("RUN-1", replaces="ModelRunner")
class HasRowsForOneRequest(ModelRunner):
    def __init__(self, model: Any, **given: Any) -> None:
        one = min(1, given["max_running_requests"])
        super().__init__(model, **{**given, "max_running_requests": one})


@mutant("RUN-2", "RUN-3", "RUN-4", "RUN-5", "RUN-13")
class WritesInTheOrderOfTheSlots(PagedAttention):
    """As if a request's slots were ascending."""

    def _write(self, call: Any) -> None:
        keys, values = call.key[0].transpose(0, 1), call.value[0].transpose(0, 1)
        slots = self._batch.out_cache_loc.sort().values
        self._kv.set_kv_buffer(call.layer_id, slots, keys, values)


@mutant("RUN-2")
class WritesTheSinkToo(PagedAttention):
    """What is there is nobody's, but so might the next row have been written."""

    def _write(self, call: Any) -> None:
        super()._write(call)
        keys, _ = self._kv.get_kv_buffer(call.layer_id)
        keys[0] = float(sum(self._batch.seq_lens))


@mutant("RUN-3", "RUN-2", "RUN-4", "RUN-5", "RUN-13")
class DoesNotSeeItself(PagedAttention):
    """The context ends one too early, but for a first token."""

    @staticmethod
    def _seen(places: Tensor, positions: Tensor, window: int | None) -> Tensor:
        return PagedAttention._seen(places - (places > 0).long(), positions, window)


@mutant("RUN-3", "RUN-2", "RUN-4", "RUN-5")
class SeesTheNextToken(PagedAttention):
    """The context ends one too late."""

    @staticmethod
    def _seen(places: Tensor, positions: Tensor, window: int | None) -> Tensor:
        return PagedAttention._seen(places + 1, positions, window)

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._groups = {
            window: [group._replace(causal=False) for group in groups]
            for window, groups in self._groups.items()
        }


@mutant("RUN-3", "RUN-2", "RUN-4", "RUN-5")
class WindowOneTooShort(PagedAttention):
    @staticmethod
    def _seen(places: Tensor, positions: Tensor, window: int | None) -> Tensor:
        return PagedAttention._seen(places, positions, window and window - 1)


@mutant("RUN-5", "RUN-2", "RUN-3", "RUN-4", "RUN-14")
class WindowOneTooLong(PagedAttention):
    def _grouped(self, window: int | None) -> Any:
        return super()._grouped(window and window + 1)


@mutant("RUN-3", "RUN-2", "RUN-4", "RUN-5", "RUN-7", "RUN-14")
class HasNoWindow(PagedAttention):
    """Of what the window pool has, everything is read."""

    def _grouped(self, window: int | None) -> Any:
        return super()._grouped(window and 1000)


@mutant("RUN-3", "RUN-2", "RUN-4", "RUN-5", "RUN-13")
class GroupsHeadsTheOtherWay(PagedAttention):
    """Heads that share KV are taken for every other one."""

    def attend(self, call: Any) -> Tensor:
        heads, kv = call.query.shape[1], call.key.shape[1]
        order = torch.arange(heads).view(-1, kv).t().flatten()
        found = super().attend(call._replace(query=call.query[:, order]))
        return found[:, :, order.argsort()]


@mutant("RUN-3", "RUN-2", "RUN-4", "RUN-5", "RUN-13")
class ScalesByItself(PagedAttention):
    """By the head's dim where the model says something else."""

    def attend(self, call: Any) -> Tensor:
        return super().attend(call._replace(scaling=0.2))


@mutant("RUN-3", "RUN-2", "RUN-4", "RUN-5")
class ForgetsTheSinks(PagedAttention):
    def attend(self, call: Any) -> Tensor:
        return super().attend(call._replace(sinks=None))


@mutant("RUN-4", "RUN-2", "RUN-3", "RUN-5", "RUN-13")
class ReadsBeforeItWrites(PagedAttention):
    reads = False

    def attend(self, call: Any) -> Tensor:
        self.reads = True
        found = super().attend(call)
        self.reads = False
        self._write(call)
        return found

    def _write(self, call: Any) -> None:
        if not self.reads:
            super()._write(call)


@mutant("RUN-4", "RUN-2", "RUN-3", "RUN-5", reports=("VL-53856",))
class PadsWithTheSink(PagedAttention):
    """Beyond the sequence of the shorter ones, masked: but what is there times 0 need not be 0."""

    def _group(self, new: int, requests: list[int], window: int | None) -> Any:
        group = super()._group(new, requests, window)
        slots = group.slots.view(len(requests), -1).clone()
        for row, request in enumerate(requests):
            first = self._first(request, window)
            slots[row, self._batch.seq_lens[request] - first :] = 0
        return group._replace(slots=slots.flatten())


@mutant("RUN-5", "RUN-2", "RUN-3", "RUN-4", "RUN-7")
class ReadsWindowLayersByFullSlots(PagedAttention):
    """As far as the window pool has such rows."""

    def _paired(self, slots: Tensor, requests: list[int], longest: int) -> Tensor:
        rows = len(self._kv.get_key_buffer(0))
        return slots % rows


@mutant("RUN-5", "RUN-7")
class AsksForThePairBeforeTheWindow(PagedAttention):
    """One that nobody reads, and that may have been given back."""

    def _group(self, new: int, requests: list[int], window: int | None) -> Any:
        if window is not None and self._pairs is not None:
            for request in requests:
                before = self._first(request, window) - 1
                slots = self._batch.token_slots[request][max(before, 0) :][:1]
                self._paired(slots, [request], 1)
        return super()._group(new, requests, window)


@mutant("RUN-7")
class ReadsTheSinkForAHole(PagedAttention):
    def _paired(self, slots: Tensor, requests: list[int], longest: int) -> Tensor:
        assert self._pairs is not None
        return self._pairs(slots).long()


@registry.mutant("RUN-3", "RUN-2", "RUN-4", "RUN-5", replaces="ModelRunner")
class IgnoresPositions(ModelRunner):
    """Every chunk begins at 0 for the model."""

    def forward_batch_generation(self, batch: Any) -> Any:
        require_batch(batch, self.kv_pool, self.context_length)
        places = torch.cat([torch.arange(new) for new in batch.extend_lens])
        step = self._step(batch)
        logits = self._decoder.logits(batch._replace(positions=places), step)
        self._counts["steps"] += 1
        self._counts["tokens_computed"] += len(batch.input_ids)
        self._counts["attention_calls"] += step.attention_calls
        self._counts["kv_rows_read"] += step.rows_read
        kept = logits if self.keep_logits else None
        return GenerationBatchResult(logits.argmax(dim=-1), kept)


@registry.mutant("RUN-6", replaces="ModelRunner")
class TakesSamplesOfNoToken(ModelRunner):
    """As the last one's."""

    def forward_batch_generation(self, batch: Any) -> Any:
        samples = batch.sample_indices.clamp(max=max(len(batch.input_ids) - 1, 0))
        return super().forward_batch_generation(batch._replace(sample_indices=samples))


@registry.mutant("RUN-6", replaces="ModelRunner")
class TakesLongerRequests(ModelRunner):
    def forward_batch_generation(self, batch: Any) -> Any:
        kept, self.context_length = self.context_length, 1024
        try:
            return super().forward_batch_generation(batch)
        finally:
            self.context_length = kept


class _Trusting(Decoder):
    def _try(self, own_attention: str) -> None:
        """What a model says of itself is enough."""


@registry.mutant("RUN-8", replaces="ModelRunner")
class TriesNothing(ModelRunner):
    @staticmethod
    def _look(model: Any) -> Decoder:
        return _Trusting(model)


@registry.mutant("RUN-9", replaces="ModelRunner")
class TakesMorePositionsThanThereAre(ModelRunner):
    def _require_positions(self, context_length: int) -> None:
        """Whatever is asked for."""


@registry.mutant("RUN-13", replaces="ModelRunner")
class TellsTheModelItself(ModelRunner):
    """Its attention is another one during a step, for everyone who has it."""

    def __init__(self, model: Any, **given: Any) -> None:
        super().__init__(model, **given)
        self.given = model

    def forward_batch_generation(self, batch: Any) -> Any:
        before = self.given.config._attn_implementation
        self.given.set_attn_implementation(NAME)
        try:
            return super().forward_batch_generation(batch)
        finally:
            self.given.set_attn_implementation(before)


@registry.mutant("RUN-13", replaces="ModelRunner")
class EndsTheModelsTraining(ModelRunner):
    def __init__(self, model: Any, **given: Any) -> None:
        super().__init__(model.eval(), **given)
