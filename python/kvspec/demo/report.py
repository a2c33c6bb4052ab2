"""What was seen, as JSON, as tables and as one HTML page. Spec: DEMO-5, DEMO-6."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

import kvspec
from kvspec.demo.owners import EVICTABLE, FREE, LOCKED, NOBODY, letter, packed_pages
from kvspec.demo.pressure import ModeCheck
from kvspec.demo.serving import Kind, KindRun, Turn
from kvspec.demo.show import Demo
from kvspec.demo.verdict import KindVerdict

__all__ = ["CALLED", "as_html", "as_json", "as_tables", "exit_code", "leaks", "summary"]

CALLED: Mapping[Kind, str] = {"none": "no cache", "chunk": "chunk cache", "radix": "radix cache"}
_FIRST_WORDS = 14
"""Tokens of a run of the tree that are shown as words."""
_DATA = "/*DATA*/"


def identical(demo: Demo) -> bool:
    """Whether all words of all kinds and modes are right (DEMO-1, DEMO-2, DEMO-9)."""
    return demo.verdict.identical_output and all(each.identical_output for each in demo.checks)


def leaked(demo: Demo) -> int:
    """Pages that nobody gave back, of all kinds and modes (DEMO-3)."""
    return sum(run.leaked_pages for run in demo.runs) + sum(
        check.leaked_pages for check in demo.checks
    )


def leaks(demo: Demo) -> list[str]:
    """What the memory checker said."""
    told = [text for run in demo.runs for text in run.leaks]
    return told + [text for check in demo.checks for text in check.leaks]


def exit_code(demo: Demo) -> int:
    """0 if all words are right and nothing leaked, else 1 (DEMO-6)."""
    return int(not identical(demo) or leaked(demo) > 0 or bool(leaks(demo)))


# ------------------------------------------------------------------------- JSON


def as_json(demo: Demo) -> dict[str, Any]:
    """The documented JSON."""
    kinds = zip(demo.runs, demo.verdict.kinds, strict=True)
    return {
        "kvspec": kvspec.__version__,
        "model": demo.model,
        "implementation": demo.implementation,
        "page_size": demo.page_size,
        "pages": demo.runs[0].page_count,
        "quick": demo.quick,
        "tolerance": demo.tolerance,
        "identical_output": identical(demo),
        "compared_tokens": demo.verdict.tokens + sum(each.tokens for each in demo.checks),
        "near_ties": demo.verdict.near_ties + sum(each.near_ties for each in demo.checks),
        "leaked_pages": leaked(demo),
        "kinds": {run.kind: _kind(run, verdict) for run, verdict in kinds},
        "checks": [_check(each) for each in demo.checks],
        "conversations": _conversations(demo),
        "seconds": round(demo.seconds, 3),
    }


def _kind(run: KindRun, verdict: KindVerdict) -> dict[str, Any]:
    waits = sorted(turn.ttft_ms for turn in run.turns)
    later = [turn.ttft_ms for turn in run.turns if turn.number]
    said = sum(len(turn.output_ids) for turn in run.turns)
    return {
        "identical_output": verdict.identical_output,
        "leaked_pages": run.leaked_pages,
        "leaks": list(run.leaks),
        "prompt_tokens": run.prompt_tokens,
        "prefill_tokens": run.prefill_tokens,
        "cached_tokens": run.cached_tokens,
        "hit_rate": round(run.cached_tokens / run.prompt_tokens, 4),
        "ttft_ms": {
            "p50": round(median(waits), 1),
            "mean": round(fmean(waits), 1),
            "max": round(waits[-1], 1),
            "p50_of_later_turns": round(median(later), 1) if later else None,
        },
        "output_tokens": said,
        "output_tokens_per_second": round(said / run.seconds, 2),
        "decode_tokens": run.decode_tokens,
        "steps": run.steps,
        "retractions": run.retractions,
        "evicted_tokens": run.evicted_tokens,
        "near_ties": verdict.near_ties,
        "differences": [each._asdict() for each in verdict.differences],
        "seconds": round(run.seconds, 3),
        "turns": [_turn(turn) for turn in run.turns],
        "timeline": _timeline(run),
    }


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "rid": turn.rid,
        "prompt_tokens": len(turn.prompt_ids),
        "cached_tokens": turn.cached_tokens,
        "output_tokens": len(turn.output_ids),
        "ttft_ms": round(turn.ttft_ms, 1),
        "ended": turn.ended,
    }


def _timeline(run: KindRun) -> dict[str, list[Any]]:
    """Pages by owner after every step; the sum is the pool (DEMO-7)."""
    counts = [sample.by_owner() for sample in run.samples]
    listed = {"free": FREE, "evictable": EVICTABLE, "locked": LOCKED, "nobody": NOBODY}
    columns = {name: [each.get(owner, 0) for each in counts] for name, owner in listed.items()}
    requests = [[each.get(letter(i), 0) for i in range(len(run.conversations))] for each in counts]
    seconds = [round(sample.seconds, 4) for sample in run.samples]
    return {"seconds": seconds, **columns, "requests": requests}


def _check(check: ModeCheck) -> dict[str, Any]:
    told = check._asdict()
    told["differences"] = [each._asdict() for each in check.differences]
    told["leaks"] = list(check.leaks)
    for name in ("seconds", "compare_seconds"):
        told[name] = round(told[name], 3)
    return told


def _conversations(demo: Demo) -> list[dict[str, Any]]:
    """What was said under the last kind; the others said the same, or `differences` say what."""
    run = demo.runs[-1]
    told: list[dict[str, Any]] = []
    for at, script in enumerate(demo.scripts):
        turns = sorted((turn for turn in run.turns if turn.conversation == at), key=_number)
        answers = [
            {"question": script.questions[turn.number], "answer": demo.chat.text(turn.output_ids)}
            for turn in turns
        ]
        told.append({"name": script.name, "tokens": len(run.conversations[at]), "turns": answers})
    return told


def _number(turn: Turn) -> int:
    return turn.number


# ------------------------------------------------------------------------- HTML


def as_html(demo: Demo) -> str:
    """One page that needs nothing else: the JSON, and what it is too coarse for (DEMO-5)."""
    data = {
        "report": as_json(demo),
        "called": dict(CALLED),
        "maps": {run.kind: [packed_pages(each.pages) for each in run.samples] for run in demo.runs},
        "trees": {run.kind: _tree(demo, run) for run in demo.runs if run.tree},
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return page.replace(_DATA, text.replace("<", "\\u003c"))


def _tree(demo: Demo, run: KindRun) -> dict[str, Any]:
    nodes = [
        {
            "parent": node.run.parent,
            "start": node.run.start,
            "tokens": node.run.tokens,
            "pages": node.run.pages,
            "locks": node.run.locks,
            "last": node.run.last,
            "words": " ".join(demo.chat.text(node.run.token_ids[:_FIRST_WORDS]).split()),
            "conversations": list(node.conversations),
        }
        for node in run.tree
    ]
    return {"step": run.tree_step, "nodes": nodes}


# ------------------------------------------------------------------------- tables


def as_tables(demo: Demo) -> list[Table | Text]:
    """What a terminal shows at the end."""
    report = as_json(demo)
    told: list[Table | Text] = [_kinds_table(report)]
    if demo.checks:
        told.append(_checks_table(report))
    told.append(summary(demo))
    return told


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="right" if at else "left", no_wrap=True)
    return table


def _kinds_table(report: Mapping[str, Any]) -> Table:
    headings = (
        *("cache", "words", "prompt\ntokens", "prefill\ntokens", "cached\ntokens", "hit\nrate"),
        *("first token\np50, ms", "mean,\nms", "steps", "tokens\n/ s", "evicted\ntokens"),
        *("leaked\npages",),
    )
    table = _table("The same conversations under three kinds of cache", headings)
    for kind, told in report["kinds"].items():
        table.add_row(
            CALLED[kind],
            _good(told["identical_output"], "the same", "NOT the same"),
            f"{told['prompt_tokens']:,}",
            f"{told['prefill_tokens']:,}",
            f"{told['cached_tokens']:,}",
            f"{told['hit_rate']:.1%}",
            f"{told['ttft_ms']['p50']:,.0f}",
            f"{told['ttft_ms']['mean']:,.0f}",
            f"{told['steps']:,}",
            f"{told['output_tokens_per_second']:.1f}",
            f"{told['evicted_tokens']:,}",
            _good(not told["leaked_pages"], "0", f"{told['leaked_pages']:,}"),
        )
    return table


def _checks_table(report: Mapping[str, Any]) -> Table:
    headings = (
        *("batch", "page", "words", "tokens", "near\nties", "largest logit\ndifference"),
        *("pool,\ntokens", "largest\nrequest", "retrac-\ntions", "evicted\ntokens"),
        *("leaked\npages", "s"),
    )
    table = _table("Against the model in float64, without a cache", headings)
    for told in report["checks"]:
        worst = told["max_logit_difference"]
        table.add_row(
            str(told["batch"]),
            str(told["page_size"]),
            _good(told["identical_output"], "right", "WRONG"),
            f"{told['tokens']:,}",
            str(told["near_ties"]),
            "no number" if worst is None else f"{worst:.2g}",
            f"{told['pool_tokens']:,}",
            f"{told['largest_request']:,}",
            f"{told['retractions']:,}",
            f"{told['evicted_tokens']:,}",
            _good(not told["leaked_pages"], "0", f"{told['leaked_pages']:,}"),
            f"{told['seconds'] + told['compare_seconds']:.0f}",
        )
    return table


def _good(good: bool, yes: str, no: str) -> Text:
    return Text(yes if good else no, style="green" if good else "bold red")


def summary(demo: Demo) -> Text:
    """What it comes to, in one line."""
    report = as_json(demo)
    none, radix = report["kinds"]["none"], report["kinds"]["radix"]
    saved = none["prefill_tokens"] - radix["prefill_tokens"]
    compared, ties = report["compared_tokens"], report["near_ties"]
    words = "identical output" if report["identical_output"] else "output is NOT identical"
    return Text(
        f"{words}: {compared:,} tokens compared with float64, {ties:,} near ties;"
        f" the radix cache saved {saved:,} of {none['prefill_tokens']:,} prefill tokens;"
        f" {leaked(demo):,} leaked pages; {demo.seconds:,.0f} s",
        style="bold red" if exit_code(demo) else "bold green",
    )
