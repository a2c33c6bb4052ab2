"""A history as a test that a person can paste. Spec: VALID-4."""

import textwrap
from collections.abc import Iterable, Sequence

import kvspec.oracle
from kvspec.flight_recorder.events import Event, Start
from kvspec.validate.books import Books, is_chunk, is_queue
from kvspec.validate.report import lines_of, sentence
from kvspec.validate.verdict import Violation

__all__ = ["as_pytest"]

_WIDTH = 96
_FILE = '''"""{doc}
"""

{imports}

HISTORY = r"""
{history}"""


def make():
    """The cache, allocator and pool that were recorded. Put your own here to test those."""
{body}
    return cache, allocator, pool


def test_history():
    """{clause}: raises LogViolation where it is broken."""
    play(events_of(HISTORY), *make())
'''


def as_pytest(events: Sequence[Event], violation: Violation) -> str:
    """A test file that plays a history on what was recorded: it fails with the clause there, and
    passes where the clause is kept (VALID-4). `events` are what `shrink` gives.
    """
    start = events[0]
    assert isinstance(start, Start)
    said = f"{violation.clause}: {sentence(violation.clause)}"
    found = f"Found {violation.found}; expected {violation.expected}."
    doc = [*textwrap.wrap(said, _WIDTH), "", *textwrap.wrap(found, _WIDTH)]
    return _FILE.format(
        doc="\n".join(doc).replace("\\", "/").replace('"', "'"),
        imports=_imports(start),
        history=lines_of(events),
        body=textwrap.indent(_construction(start), "    "),
        clause=violation.clause,
    )


def _places(start: Start) -> list[tuple[str, str]]:
    """(module, name) of the three classes; the oracle's for one that no import finds."""
    made = Books(start)
    given = (start.pool, made.pool), (start.allocator, made.allocator), (start.cache, made.cache)
    return [_place(name, oracle) for name, oracle in given]


def _place(name: str, oracle: object) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    if module and module != "__main__" and "<" not in name:
        return module, last
    known = [
        each.__name__ for each in type(oracle).__mro__ if hasattr(kvspec.oracle, each.__name__)
    ]
    return "kvspec.oracle", known[0]


def _imports(start: Start) -> str:
    places = sorted({*_places(start), ("kvspec.validate", "events_of, play")})
    blocks = [["import torch"], []]
    for module, name in places:
        line = f"from {module} import {name}"
        blocks[module.partition(".")[0] == "kvspec"].append(line)
    return "\n\n".join("\n".join(block) for block in blocks)


def _construction(start: Start) -> str:
    """The three constructors, with the source document's arguments."""
    pool, allocator, cache = (name for _, name in _places(start))
    rows = {"size": start.rows, "max_context_len": start.max_context_len}
    memory = _arguments(device="cpu", kvcache=None, need_sort=start.need_sort)
    memory.insert(0, "dtype=torch.bfloat16")
    sizes: dict[str, object] = {"size": start.size}
    if start.size_swa is not None:
        sizes |= {"size_swa": start.size_swa, "page_size": start.page_size}
    elif not is_queue(start):
        sizes["page_size"] = start.page_size
    options: dict[str, object] = {"page_size": start.page_size}
    if not is_chunk(start):
        options["disable"] = start.disable
        if start.sliding_window_size is not None:
            options["sliding_window_size"] = start.sliding_window_size
    both = ["req_to_token_pool=pool", "token_to_kv_pool_allocator=allocator"]
    rest = _arguments(device="cpu", enable_memory_saver=False)
    return "\n".join(
        [
            _made("pool", pool, [*_arguments(**rows), *rest]),
            _made("allocator", allocator, [*_arguments(**sizes), *memory]),
            _made("cache", cache, [*both, *_arguments(**options)]),
        ]
    )


def _arguments(**options: object) -> list[str]:
    shown = ((name, repr(value).replace("'", '"')) for name, value in options.items())
    return [f"{name}={value}" for name, value in shown]


def _made(variable: str, name: str, arguments: Iterable[str]) -> str:
    inside = "".join(f"    {argument},\n" for argument in arguments)
    return f"{variable} = {name}(\n{inside})"
