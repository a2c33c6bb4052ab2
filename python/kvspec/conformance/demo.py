"""Conformance of the demo. Spec: DEMO.

The words of short conversations come from a worker without weights, which depend on every slot that
it reads. A model of transformers is made for the modes under pressure alone.
"""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

import kvspec.demo
import kvspec.oracle
from kvspec.conformance import clause
from kvspec.conformance.scheduler.worker import WordWorker, words
from kvspec.conformance.suite import MUTANT, Conformance, one_thread
from kvspec.conformance.watch import watch_function
from kvspec.demo import (
    KINDS,
    Ask,
    CountingWorker,
    Demo,
    Kind,
    KindRun,
    Mode,
    ModeCheck,
    Script,
    Turn,
    Verdict,
    WordChat,
    pressure,
    serving,
)
from kvspec.interfaces.prefix_cache import CacheView, PageView, Path
from kvspec.interfaces.request_pool import ReqToTokenPoolView
from kvspec.interfaces.slot_allocator import AllocatorView
from kvspec.model_runner import (
    Comparison,
    Mismatch,
    ModelRunner,
    compare_with_reference,
    reference_model,
    tiny_model,
)
from kvspec.scheduler import Scheduler

__all__ = ["DemoConformance", "conversations", "mode_check", "seen"]

PAGE = 4
SYSTEMS = "you answer in few words", "you ask back and never answer at all"
DOCUMENTS = "a tower stands on a reef and has a lamp", "a bridge of oak stands on seven piers"
SCRIPTS = (
    Script("Ada", SYSTEMS[0], DOCUMENTS[0], ("what lamp ?", "what tower ?")),
    Script("Ben", SYSTEMS[0], DOCUMENTS[0], ("what reef ?",)),
    Script("Cleo", SYSTEMS[0], DOCUMENTS[1], ("what oak ?", "and what piers ?", "why ?")),
    Script("Dan", SYSTEMS[1], DOCUMENTS[1], ("what bridge ?", "why ?")),
)
CHAT = WordChat(SCRIPTS)


class Looking:
    """A listener that writes down when it was told what, by somebody's clock."""

    def __init__(self, look: Callable[[Any], None] = lambda sample: None) -> None:
        self.look, self.now = look, 0.0
        self.first: dict[str, float] = {}
        self.end: dict[str, float] = {}

    def begins(self, kind: Kind, names: Sequence[str]) -> None:
        self.first, self.end, self.now = {}, {}, 0.0

    def said(self, turn: str, conversation: int, text: str) -> None:
        self.first.setdefault(turn, self.now)

    def ended(self, turn: Turn, text: str) -> None:
        self.end[turn.rid] = self.now

    def looked(self, sample: Any) -> None:
        self.look(sample)

    def note(self, text: str) -> None: ...


def by_words(
    prompt: Sequence[int], output: Sequence[int], logits: Any = None, *, tolerance: float
) -> Comparison:
    """The reference of the worker without weights; a wrong word is 1.0 behind."""
    tokens, found = [*prompt, *output], []
    for at, token in enumerate(output):
        right = words(tokens[: len(prompt) + at], 1, vocabulary=len(CHAT.words))[0]
        if token != right:
            found.append(Mismatch(at, token, right, 1.0))
    return Comparison(len(output), 0, tuple(found), None, 1.0)


def conversations(answers: Sequence[Sequence[int]], kind: Kind = "none") -> KindRun:
    """A run of conversations with a prompt of one token and one turn each."""
    turns = tuple(
        Turn(f"{at}/1", at, 0, (7,), tuple(answer), 0, 1.0, "length")
        for at, answer in enumerate(answers)
    )
    tokens = tuple((*turn.prompt_ids, *turn.output_ids) for turn in turns)
    zero = (
        "prompt_tokens prefill_tokens cached_tokens decode_tokens steps retractions"
        " evicted_tokens leaked_pages tree_step"
    )
    return KindRun(
        kind=kind,
        page_size=PAGE,
        page_count=8,
        turns=turns,
        conversations=tokens,
        leaks=(),
        seconds=1.0,
        samples=(),
        tree=(),
        **dict.fromkeys(zero.split(), 0),
    )


def mode_check(**given: Any) -> ModeCheck:
    """A mode in which all is well, but for what is given."""
    well: dict[str, Any] = {
        **dict.fromkeys(ModeCheck._fields, 0),
        "batch": 1,
        "page_size": 1,
        "identical_output": True,
        "max_logit_difference": 0.0,
        "differences": (),
        "leaks": (),
        "tokens": 1000,
        "seconds": 1.0,
        "compare_seconds": 1.0,
    }
    return ModeCheck(**(well | given))


@cache
def _tiny() -> tuple[Any, Any]:
    """A model of transformers, and what it is compared with."""
    model = tiny_model("llama", vocab_size=len(CHAT.words), max_position_embeddings=256)
    return model, partial(compare_with_reference, reference_model(model))


@cache
def _sound_runs() -> tuple[KindRun, ...]:
    """What the unbroken functions make of the conversations, over the oracle."""
    suite = DemoConformance()
    suite.impl = kvspec.oracle
    return tuple(suite.serve(kind) for kind in KINDS)


class DemoConformance(Conformance):
    """`impl` may also hold functions of the room, which then stand in for those of kvspec."""

    @property
    def implementation(self) -> Any:
        return "oracle" if self.impl_name == MUTANT else self.impl_name

    def function(self, name: str) -> Callable[..., Any]:
        """A function of the room, watched."""
        given = getattr(self.impl, name, None)
        function = given if inspect.isfunction(given) else getattr(kvspec.demo, name)
        return watch_function(self.impl_name, function, "demo")

    def leaves_alone(self, *names: str) -> bool:
        """Whether this is a mutant that has nothing to do with these functions: what others do with
        them is known already.
        """
        if self.impl_name != MUTANT:
            return False
        return not any(inspect.isfunction(getattr(self.impl, name, None)) for name in names)

    def worker(self, space: Any = None, pages: int = 64, **more: Any) -> WordWorker:
        """`space` is the namespace that pools come from."""
        return WordWorker(
            space or self.impl,
            pages=pages,
            page_size=PAGE,
            rows=3,
            vocabulary=len(CHAT.words),
            **more,
        )

    def serve(self, kind: Kind, worker: Any = None, **more: Any) -> KindRun:
        run: KindRun = self.function("serve")(
            CountingWorker(worker or self.worker()),
            kind,
            SCRIPTS,
            CHAT,
            implementation=self.implementation,
            **{"max_new_tokens": 5, "max_running": 3, "chunk": 10, **more},
        )
        return run

    def runs(self) -> list[KindRun]:
        if self.leaves_alone("serve"):
            return list(_sound_runs())
        return [self.serve(kind) for kind in KINDS]

    # ------------------------------------------------------------------------- words

    @clause("DEMO-1")
    def test_all_kinds_say_what_the_reference_says(self) -> None:
        verdict: Verdict = self.function("judge")(self.runs(), by_words)
        assert (verdict.identical_output, verdict.near_ties) == (True, 0)
        assert [kind.identical_output for kind in verdict.kinds] == [True] * 3
        assert verdict.tokens == 3 * verdict.kinds[0].tokens > 0

    @clause("DEMO-1")
    @pytest.mark.parametrize("wrong", [(0,), (1,), (2,), (0, 1, 2)])
    def test_one_wrong_word_is_told(self, wrong: tuple[int, ...]) -> None:
        """Also where all kinds are wrong together."""
        runs = [conversations([_right(7, 12), _right(7, 6)], kind) for kind in KINDS]
        for at in wrong:
            said = list(runs[at].turns[1].output_ids)
            right, said[-1] = said[-1], (said[-1] + 1) % len(CHAT.words)
            runs[at] = conversations([_right(7, 12), said], KINDS[at])
        verdict: Verdict = self.function("judge")(runs, by_words)
        assert not verdict.identical_output
        for at in wrong:
            assert not verdict.kinds[at].identical_output
            told = verdict.kinds[at].differences[0]
            assert (told.rid, told.position, told.token) == ("1/1", 5, said[-1])
            assert told.expected == right

    @clause("DEMO-1")
    @pytest.mark.parametrize("said", [0, 2])
    def test_a_word_that_is_missing_is_told(self, said: int) -> None:
        whole = _right(7, 6)
        runs = [conversations([whole], "none"), conversations([whole[:said]], "radix")]
        verdict: Verdict = self.function("judge")(runs, by_words)
        assert not verdict.identical_output
        (told,) = verdict.kinds[1].differences
        assert told == ("0/1", said, None, whole[said], None)

    @clause("DEMO-2")
    @pytest.mark.parametrize(
        ("count", "wrong", "behind", "ties", "identical"),
        [
            (1000, (17,), 0.5, 1, True),
            (999, (17,), 0.5, 1, False),
            (1000, (17, 500), 0.5, 2, False),
            (2000, (17, 500), 0.5, 2, True),
            (1000, (17,), 1.0, 0, False),
            (1000, (), 0.0, 0, True),
        ],
    )
    def test_near_ties_are_counted_and_few(
        self, count: int, wrong: tuple[int, ...], behind: float, ties: int, identical: bool
    ) -> None:
        """The second kind has them, and says other things after the first."""

        def compare(prompt: Any, output: Any, logits: Any = None, *, tolerance: float) -> Any:
            found = [Mismatch(at, 1, 2, behind) for at in wrong if output[at] == 1]
            return Comparison(len(output), 0, tuple(found), None, 1.0)

        first = [2] * count
        other = [2 if at < min(wrong, default=count) else 3 for at in range(count)]
        other = [1 if at in wrong else token for at, token in enumerate(other)]
        runs = [conversations([first], "none"), conversations([other], "radix")]
        verdict: Verdict = self.function("judge")(runs, compare, tolerance=1.0)
        assert verdict.kinds[1].near_ties == verdict.near_ties == ties
        assert verdict.kinds[1].identical_output is verdict.identical_output is identical
        assert verdict.kinds[0].identical_output

    @clause("DEMO-1")
    def test_two_kinds_part_at_a_near_tie_alone(self) -> None:
        """Even if the reference has nothing against either."""

        def compare(prompt: Any, output: Any, logits: Any = None, *, tolerance: float) -> Any:
            return Comparison(len(output), 0, (), None, 1.0)

        runs = [conversations([[2, 2, 3]], "none"), conversations([[2, 4, 3]], "radix")]
        verdict: Verdict = self.function("judge")(runs, compare)
        assert not verdict.identical_output
        assert verdict.kinds[1].differences[0][:4] == ("0/1", 1, 4, 2)

    @clause("DEMO-8")
    @pytest.mark.parametrize("answer", [[9, 10, 11], [9, 10, 0], [0], []])
    def test_a_prompt_is_the_one_before_and_what_follows(self, answer: list[int]) -> None:
        before = CHAT.opening(SYSTEMS[0], SCRIPTS[0].opening)
        prompt: list[int] = self.function("next_prompt")(CHAT, before, answer, "what tower ?")
        spoken = answer[:-1] if answer[-1:] == [0] else answer
        assert prompt == [*before, *spoken, *CHAT.follow_up("what tower ?")]
        assert prompt[: len(before) + len(answer)] == [*before, *answer]

    @clause("DEMO-8")
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_prompt_served_begins_with_the_conversation(self, kind: Kind) -> None:
        if self.leaves_alone("serve"):
            return
        run = self.serve(kind)
        assert sorted(turn.rid for turn in run.turns) == [
            f"{script.name}/{at + 1}" for script in SCRIPTS for at in range(len(script.questions))
        ]
        for at in range(len(SCRIPTS)):
            turns = [turn for turn in run.turns if turn.conversation == at]
            for before, after in pairwise(turns):
                said = (*before.prompt_ids, *before.output_ids)
                assert after.prompt_ids[: len(said)] == said

    # ------------------------------------------------------------------------- figures

    @clause("DEMO-4")
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_not_cached_is_computed(self, kind: Kind) -> None:
        if self.leaves_alone("serve"):
            return
        computed: list[int] = []
        run = self.serve(kind, self.worker(before=lambda b: computed.append(len(b.input_ids))))
        assert run.prompt_tokens == sum(len(turn.prompt_ids) for turn in run.turns)
        assert run.cached_tokens == sum(turn.cached_tokens for turn in run.turns)
        assert (run.retractions, run.prefill_tokens) == (0, run.prompt_tokens - run.cached_tokens)
        assert run.prefill_tokens + run.decode_tokens == sum(computed)
        assert (run.cached_tokens > 0) is (kind == "radix")

    @clause("DEMO-3")
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_nobody_gave_back_is_counted(self, kind: Kind) -> None:
        """A page of each of the first three frees is kept back."""
        if self.leaves_alone("serve"):
            return
        base: Any = self.impl.PagedTokenToKVPoolAllocator
        kept: list[int] = []

        def free(allocator: Any, free_index: Any) -> None:
            slots = torch.as_tensor(free_index)
            if len(kept) < 3 and len(slots) >= PAGE:
                kept.append(int(slots[0]) // PAGE)
                slots = slots[slots // PAGE != kept[-1]]
            if len(slots):
                base.free(allocator, slots)

        space = SimpleNamespace(
            ReqToTokenPool=self.impl.ReqToTokenPool,
            PagedTokenToKVPoolAllocator=type("Keeping", (base,), {"free": free}),
        )
        leaking = self.serve(kind, self.worker(space))
        assert leaking.leaked_pages == len(kept) == 3
        assert all(any(f"page {page} " in leak for leak in leaking.leaks) for page in kept)
        sound = self.serve(kind)
        assert (sound.leaked_pages, sound.leaks) == (0, ())

    @clause("DEMO-10")
    @pytest.mark.parametrize("kind", KINDS)
    def test_time_to_the_first_token_is_that_of_the_turn(self, kind: Kind) -> None:
        """The clock goes on by one with each step, and by a thousand with each look."""
        if self.leaves_alone("serve"):
            return
        clock = [0.0]

        def look(_: Any) -> None:
            clock[0] += 1000

        heard = Looking(look)

        class Ticking(Scheduler):
            def step(self) -> list[Any]:
                clock[0] += 1
                heard.now += 1
                return super().step()

        with patch.object(serving, "Scheduler", Ticking):
            run = self.serve(kind, listener=heard, clock=lambda: clock[0])
        for turn in run.turns:
            before = f"{SCRIPTS[turn.conversation].name}/{turn.number}"
            waited = heard.first[turn.rid] - heard.end.get(before, 0.0)
            assert turn.ttft_ms == 1000 * waited > 0
        assert run.seconds == heard.now

    @clause("DEMO-7")
    def test_every_page_has_its_owner(self) -> None:
        books = AllocatorView((3,), (7,), (8,), frozenset({1, 2, 4, 5, 6, 9}), False)
        rows = ReqToTokenPoolView((), {1: (*range(4, 12), 16, 17), 2: (4, 5, 6, 7, 20)})
        page = PageView(page=1, locks=2, last=0, born=0, hits=0, priority=0, cut=False)
        resident: dict[Path, PageView] = {
            (None, (1, 2, 3, 4)): page,
            (None, (1, 2, 3, 4, 5, 6, 7, 8)): page._replace(page=2, locks=1),
            (None, (1, 2, 3, 4, 9, 9, 9, 9)): page._replace(page=6, locks=0),
        }
        told = self.function("owners")(
            books,
            rows,
            CacheView("page", resident, ()),
            {1: (0, 8), 2: (3, 4)},
            page_count=9,
            page_size=PAGE,
        )
        assert told == "++.AD-..!"

    @clause("DEMO-7")
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_timeline_has_every_page_after_every_step(self, kind: Kind) -> None:
        if self.leaves_alone("serve"):
            return
        worker = self.worker(pages=24)
        seen: list[tuple[int, int, int]] = []

        def look(_: Any) -> None:
            free = len(worker.allocator.view().free) + len(worker.allocator.view().release)
            rows = worker.rows.view().rows
            pages = {slot // PAGE for slots in rows.values() for slot in slots}
            seen.append((free, len(pages), len(rows)))

        run = self.serve(kind, worker, listener=Looking(look))
        assert len(run.samples) == len(seen) > 0
        for at, (sample, (free, named, live)) in enumerate(zip(run.samples, seen, strict=True), 1):
            counts = sample.by_owner()
            assert sample.step == at
            assert len(sample.pages) == run.page_count == 24
            assert counts.get(".", 0) == free
            assert counts.get("!", 0) == 0
            mine = sum(count for owner, count in counts.items() if owner.isalpha())
            assert mine + counts.get("+", 0) == named
            assert sum(owner.isalpha() for owner in counts) <= live
        assert any("A" in sample.pages for sample in run.samples)
        assert any("-" in sample.pages for sample in run.samples) is (kind == "radix")
        assert bool(run.tree) is (kind == "radix")

    # ------------------------------------------------------------------------- the modes

    def requests(self) -> list[Ask]:
        return pressure.asks(CHAT, 40, scripts=SCRIPTS, answer=6)

    def check(self, mode: Mode) -> ModeCheck:
        with one_thread():
            model, reference = _tiny()
        with patch.object(pressure, "RETRACT_EVERY", 9), one_thread():
            check: ModeCheck = self.function("check_mode")(
                model, mode, self.requests(), reference, implementation=self.implementation
            )
        return check

    @clause("DEMO-9")
    @pytest.mark.parametrize(("batch", "page_size"), [(8, 1), (2, 4)])
    def test_hardly_any_room_changes_no_word(self, batch: int, page_size: int) -> None:
        if self.leaves_alone("check_mode"):
            return
        requests = self.requests()
        largest = max(len(each.prompt_ids) + each.max_new_tokens - 1 for each in requests)
        told = self.check(Mode(batch, page_size))
        assert (told.identical_output, told.largest_request) == (True, largest)
        assert 11 * largest <= 10 * told.pool_tokens < 11 * largest + 10 * page_size
        assert told.tokens == sum(each.max_new_tokens for each in requests) >= 40
        assert min(told.retractions, told.evicted_tokens) > 0
        assert told.max_logit_difference is not None
        assert 0 < told.max_logit_difference < 1e-3
        assert (told.leaked_pages, told.leaks, told.overwritten) == (0, (), 0)

    @clause("DEMO-9")
    def test_a_logit_that_is_off_is_told(self) -> None:
        if self.leaves_alone("check_mode"):
            return

        class Off(ModelRunner):
            def forward_batch_generation(self, batch: Any) -> Any:
                result = super().forward_batch_generation(batch)
                assert result.next_token_logits is not None
                result.next_token_logits[:, 3] -= 0.01  # seldom the best
                return result

        with patch.object(pressure, "ModelRunner", Off):
            told = self.check(Mode(2, 1))
        assert not told.identical_output
        assert told.max_logit_difference == pytest.approx(0.01, abs=1e-3)

    @clause("DEMO-9")
    def test_what_is_free_is_poison(self) -> None:
        """Also before anybody has had it."""
        if self.leaves_alone("check_mode"):
            return
        stale: list[int] = []

        class Zeroed(ModelRunner):
            def __init__(self, *given: Any, **more: Any) -> None:
                super().__init__(*given, **more)
                for layer in range(self.kv_pool.layer_num):
                    self.kv_pool.get_key_buffer(layer).zero_()

        class Peeking(Scheduler):
            def step(self) -> list[Any]:
                books = self.token_to_kv_pool_allocator.view()
                free = torch.tensor([*books.free, *books.release], dtype=torch.int64)
                worker: Any = self.tp_worker
                keys = worker.worker.kv_pool.get_key_buffer(0)[free]
                stale.append(int((~keys.isnan()).sum()))
                return super().step()

        with (
            patch.object(pressure, "ModelRunner", Zeroed),
            patch.object(pressure, "Scheduler", Peeking),
        ):
            self.check(Mode(2, 1))
        assert len(stale) > 20
        assert not any(stale)

    @clause("DEMO-9")
    def test_an_answer_that_is_cut_short_is_told(self) -> None:
        if self.leaves_alone("check_mode"):
            return

        class Rejecting(Scheduler):
            def add_request(self, req: Any) -> None:
                super().add_request(req)
                if req.rid == "long":
                    self.abort_request(req.rid)

        with patch.object(pressure, "Scheduler", Rejecting):
            told = self.check(Mode(2, 4))
        assert not told.identical_output
        assert [each.rid for each in told.differences] == ["long"]

    # ------------------------------------------------------------------------- telling

    @clause("DEMO-5")
    def test_the_page_is_one_file_with_all_of_it(self) -> None:
        demo = seen(self.runs())
        page: str = self.function("as_html")(demo)
        assert not re.findall(r"https?:|src=|href=|url\(|@import|import\(|fetch\(", page)
        assert page.count("</script>") == 2
        data = json.loads(re.findall(r'<script type="application/json".*?>(.*?)</script>', page)[0])
        assert data["report"] == json.loads(json.dumps(kvspec.demo.as_json(demo)))
        for run in demo.runs:
            maps = [_unpacked(each) for each in data["maps"][run.kind]]
            assert maps == [sample.pages for sample in run.samples]
        nodes = data["trees"]["radix"]["nodes"]
        assert sum(node["pages"] for node in nodes) == sum(n.run.pages for n in demo.runs[2].tree)
        assert {at for node in nodes for at in node["conversations"]} == set(range(len(SCRIPTS)))

    @clause("DEMO-6")
    @pytest.mark.parametrize(
        ("fault", "code"),
        [
            ({}, 0),
            ({"leaked_pages": 1}, 1),
            ({"leaks": ("CHECK-1: page 3",)}, 1),
            ({"identical_output": False}, 1),
        ],
    )
    @pytest.mark.parametrize("where", ["kinds", "checks"])
    def test_the_exit_code_says_whether_all_is_well(
        self, where: str, fault: dict[str, Any], code: int
    ) -> None:
        demo = seen([conversations([[1, 2]], kind) for kind in KINDS])
        if where == "checks":
            demo = demo._replace(checks=(mode_check(), mode_check(**fault)))
        elif "identical_output" in fault:
            demo = demo._replace(verdict=demo.verdict._replace(**fault))
        else:
            demo = demo._replace(runs=(*demo.runs[:2], demo.runs[2]._replace(**fault)))
        assert self.function("exit_code")(demo) == code


def seen(runs: Sequence[KindRun]) -> Demo:
    """A demo of these runs, in whose words nothing is wrong."""
    kind = kvspec.demo.KindVerdict(True, 10, 0, ())
    return Demo(
        model="a model </script><b>",
        implementation="oracle",
        page_size=PAGE,
        quick=True,
        tolerance=1e-3,
        scripts=SCRIPTS[: len(runs[0].conversations)],
        runs=tuple(runs),
        verdict=Verdict(True, 30, 0, (kind,) * len(runs)),
        checks=(mode_check(),),
        chat=CHAT,
        seconds=1.0,
    )


def _right(token: int, count: int) -> list[int]:
    """What the worker without weights says after a token."""
    return words([token], count, vocabulary=len(CHAT.words))


def _unpacked(text: str) -> str:
    return "".join(owner * int(count) for count, owner in re.findall(r"(\d+)(\D)", text))
