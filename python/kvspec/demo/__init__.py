"""Several conversations, three kinds of cache, the same words: `kvspec demo`. Spec: DEMO.

texts      what is talked about
workload   conversations as tokens
serving    one kind of cache, step by step
owners     who has which page
verdict    whether all words are right
pressure   correctness in hardly any room
show       all of it
report     JSON, tables, one HTML page
"""

from kvspec.demo.owners import Sample, owners, tree_runs
from kvspec.demo.pressure import MODES, Ask, Mode, ModeCheck, asks, check_mode, pool_pages
from kvspec.demo.report import as_html, as_json, as_tables, exit_code, leaks
from kvspec.demo.serving import (
    KINDS,
    CountingWorker,
    Kind,
    KindRun,
    Listener,
    Turn,
    leaked_pages,
    serve,
)
from kvspec.demo.show import Demo, Subject, demo, load, tiny_subject
from kvspec.demo.texts import SCRIPTS, Script
from kvspec.demo.verdict import TOLERANCE, Compare, Difference, KindVerdict, Verdict, judge
from kvspec.demo.workload import Chat, TemplateChat, WordChat, next_prompt

__all__ = [
    "KINDS",
    "MODES",
    "SCRIPTS",
    "TOLERANCE",
    "Ask",
    "Chat",
    "Compare",
    "CountingWorker",
    "Demo",
    "Difference",
    "Kind",
    "KindRun",
    "KindVerdict",
    "Listener",
    "Mode",
    "ModeCheck",
    "Sample",
    "Script",
    "Subject",
    "TemplateChat",
    "Turn",
    "Verdict",
    "WordChat",
    "as_html",
    "as_json",
    "as_tables",
    "asks",
    "check_mode",
    "demo",
    "exit_code",
    "judge",
    "leaked_pages",
    "leaks",
    "load",
    "next_prompt",
    "owners",
    "pool_pages",
    "serve",
    "tiny_subject",
    "tree_runs",
]
