"""Broken demos: figures that look better than they are."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import kvspec.demo
import kvspec.oracle
from kvspec.conformance.demo import DemoConformance
from kvspec.conformance.mutants import Registry
from kvspec.demo import Demo, KindRun, ModeCheck, Verdict, pressure, serving, verdict
from kvspec.poison import Poison

registry = Registry(DemoConformance, kvspec.oracle)


@registry.mutant("DEMO-1", "DEMO-2", replaces="judge")
def compares_a_kind_with_itself(runs: Sequence[KindRun], compare: Any, **more: Any) -> Verdict:
    return kvspec.demo.judge([runs[0]] * len(runs), compare, **more)


@registry.mutant("DEMO-1", "DEMO-2", replaces="judge")
def compares_kinds_with_one_another_alone(
    runs: Sequence[KindRun], compare: Any, **more: Any
) -> Verdict:
    def agrees(prompt: Any, output: Any, logits: Any = None, *, tolerance: float) -> Any:
        return compare(prompt, output, logits, tolerance=tolerance)._replace(mismatches=())

    return kvspec.demo.judge(runs, agrees, **more)


@registry.mutant("DEMO-1", replaces="judge")
def lets_two_kinds_part_anywhere(runs: Sequence[KindRun], compare: Any, **more: Any) -> Verdict:
    with patch.object(verdict, "_unlike", return_value=[]):
        return kvspec.demo.judge(runs, compare, **more)


@registry.mutant("DEMO-2", replaces="judge")
def takes_near_ties_for_identical(runs: Sequence[KindRun], compare: Any, **more: Any) -> Verdict:
    told = kvspec.demo.judge(runs, compare, **more)
    kinds = tuple(kind._replace(near_ties=0) for kind in told.kinds)
    return told._replace(near_ties=0, kinds=kinds)


@registry.mutant("DEMO-2", replaces="judge")
def allows_any_number_of_near_ties(runs: Sequence[KindRun], compare: Any, **more: Any) -> Verdict:
    with patch.object(verdict, "within", return_value=True):
        return kvspec.demo.judge(runs, compare, **more)


@registry.mutant("DEMO-3", replaces="serve")
def counts_what_is_held_after_all_is_cleared(*given: Any, **more: Any) -> KindRun:
    sound = serving.leaked_pages

    def cleared(scheduler: Any) -> Any:
        scheduler.flush_cache()
        return sound(scheduler)

    with patch.object(serving, "leaked_pages", cleared):
        return kvspec.demo.serve(*given, **more)


@registry.mutant("DEMO-4", replaces="serve")
def counts_cached_tokens_as_prefill(*given: Any, **more: Any) -> KindRun:
    run = kvspec.demo.serve(*given, **more)
    return run._replace(prefill_tokens=run.prompt_tokens)


@registry.mutant("DEMO-4", replaces="serve")
def counts_what_the_model_decodes_as_prompts(*given: Any, **more: Any) -> KindRun:
    run = kvspec.demo.serve(*given, **more)
    return run._replace(prefill_tokens=run.prefill_tokens + run.decode_tokens)


@registry.mutant("DEMO-5", replaces="as_html")
def loads_from_the_net(demo: Demo) -> str:
    page = kvspec.demo.as_html(demo)
    return page.replace("<main", '<script src="https://charts.example/lib.js"></script><main')


@registry.mutant("DEMO-5", replaces="as_html")
def shows_the_figures_of_another_run(demo: Demo) -> str:
    better = demo.runs[2]._replace(prefill_tokens=1)
    return kvspec.demo.as_html(demo._replace(runs=(*demo.runs[:2], better)))


@registry.mutant("DEMO-6", replaces="exit_code")
def looks_at_the_words_alone(demo: Demo) -> int:
    checks = [check.identical_output for check in demo.checks]
    return int(not (demo.verdict.identical_output and all(checks)))


@registry.mutant("DEMO-6", replaces="exit_code")
def forgets_the_modes(demo: Demo) -> int:
    return kvspec.demo.exit_code(demo._replace(checks=()))


@registry.mutant("DEMO-7", replaces="serve")
def loses_an_owner(*given: Any, **more: Any) -> KindRun:
    run = kvspec.demo.serve(*given, **more)
    samples = [each._replace(pages=each.pages.replace("A", "")) for each in run.samples]
    return run._replace(samples=tuple(samples))


@registry.mutant("DEMO-7", replaces="owners")
def gives_the_tree_what_a_request_has(
    books: Any, rows: Any, tree: Any, live: Any, **more: Any
) -> str:
    shared = {row: (at, len(rows.rows[row])) for row, (at, _) in live.items()}
    return kvspec.demo.owners(books, rows, tree, shared, **more).replace("!", "+")


@registry.mutant("DEMO-8", replaces="next_prompt")
def forgets_what_was_answered(chat: Any, prompt: Any, answer: Any, user: str) -> list[int]:
    return kvspec.demo.next_prompt(chat, prompt, (), user)


@registry.mutant("DEMO-8", replaces="next_prompt")
def says_the_stop_token_twice(chat: Any, prompt: Any, answer: Any, user: str) -> list[int]:
    return [*prompt, *answer, *chat.follow_up(user)]


@registry.mutant("DEMO-9", replaces="check_mode")
def has_room_for_two_requests(*given: Any, **more: Any) -> ModeCheck:
    sound = pressure.pool_pages
    with patch.object(pressure, "pool_pages", lambda *asked: 2 * sound(*asked)):
        return kvspec.demo.check_mode(*given, **more)


@registry.mutant("DEMO-9", replaces="check_mode")
def compares_no_logit(model: Any, mode: Any, requests: Any, compare: Any, **more: Any) -> ModeCheck:
    def words_alone(prompt: Any, output: Any, logits: Any, *, tolerance: float) -> Any:
        return compare(prompt, output, tolerance=tolerance)

    return kvspec.demo.check_mode(model, mode, requests, words_alone, **more)


@registry.mutant("DEMO-9", replaces="check_mode")
def leaves_what_was_given_back(*given: Any, **more: Any) -> ModeCheck:
    """Without poison in it."""
    with patch.object(Poison, "freed", lambda *_: None):
        return kvspec.demo.check_mode(*given, **more)


@registry.mutant("DEMO-10", replaces="serve")
def waits_from_the_beginning(*given: Any, **more: Any) -> KindRun:
    """Of everything, not of the turn."""
    run = kvspec.demo.serve(*given, **more)
    turns = [turn._replace(ttft_ms=turn.ttft_ms * (turn.number + 1)) for turn in run.turns]
    return run._replace(turns=tuple(turns))


@registry.mutant("DEMO-10", replaces="serve")
def counts_the_time_it_looks(*given: Any, **more: Any) -> KindRun:
    with patch.object(serving._Clock, "__exit__", lambda *_: None):
        return kvspec.demo.serve(*given, **more)
