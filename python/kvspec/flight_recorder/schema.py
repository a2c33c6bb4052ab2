"""The events as JSON Schema: `python -m kvspec.flight_recorder.schema`. Spec: REC.

Written to `spec/flight_recorder.schema.json`, it says to other languages what `events` says here.
"""

import ast
import inspect
import json
from typing import Any

import msgspec

from kvspec.flight_recorder import events

__all__ = ["schema"]

_WHAT = (
    "One event of a log: a record of a msgpack log, or a line of an NDJSON log without its first"
    " member, `crc`. Bytes are base64 in JSON, and bytes in msgpack."
)


def schema() -> dict[str, Any]:
    """The schema, with what the classes and their fields are told to be (REC-2)."""
    (event,), parts = msgspec.json.schema_components(
        (events.AnyEvent,), ref_template="#/$defs/{name}"
    )
    said = _said_of_fields()
    for name, part in parts.items():
        for field, rule in part["properties"].items():
            text = next((said[c, field] for c in _bases(name) if (c, field) in said), None)
            if text is not None:
                rule["description"] = text
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"kvspec flight recorder, events of schema {events.SCHEMA}",
        "description": _WHAT,
        **event,
        "$defs": dict(sorted(parts.items())),
    }


def _bases(name: str) -> list[str]:
    return [base.__name__ for base in getattr(events, name).__mro__]


def _said_of_fields() -> dict[tuple[str, str], str]:
    """(class, field) -> the string that follows the field."""
    said = {}
    for node in ast.parse(inspect.getsource(events)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            match field, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    said[node.name, name] = inspect.cleandoc(text)
    return said


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
