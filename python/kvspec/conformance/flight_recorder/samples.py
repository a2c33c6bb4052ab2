"""One event of each kind, and whether a JSON value is what a schema says. Spec: REC."""

import itertools
from collections.abc import Callable
from typing import Any, get_args

import msgspec.inspect

from kvspec.flight_recorder.events import SCHEMA, AnyEvent, Start

__all__ = ["KINDS", "START", "drawing", "misfit", "samples"]

KINDS = get_args(AnyEvent)
START = Start(
    schema=SCHEMA,
    kvspec="0",
    allocator="a.Allocator",
    pool="a.Pool",
    cache="a.Cache",
    page_size=4,
    size=32,
    rows=2,
    max_context_len=16,
)
"""What a log begins with."""

_INTEGERS = (-1, 0, 1, 2**31, 2**63 - 1)
_TEXTS = ("", "\x00", "a.py:7 f", 'é "\\\n\u2028\U0001f600')
_BYTES = (b"", b"\x00", b"\xff\n}," * 8)


def _value(kind: Any, draw: Callable[[int], int]) -> Any:
    """A value of a type of `msgspec.inspect`."""
    match kind:
        case msgspec.inspect.IntType():
            return _INTEGERS[draw(len(_INTEGERS))]
        case msgspec.inspect.BoolType():
            return bool(draw(2))
        case msgspec.inspect.StrType():
            return _TEXTS[draw(len(_TEXTS))]
        case msgspec.inspect.BytesType():
            return _BYTES[draw(len(_BYTES))]
        case msgspec.inspect.NoneType():
            return None
        case msgspec.inspect.ListType():
            return [_value(kind.item_type, draw) for _ in range(draw(3))]
        case msgspec.inspect.TupleType():
            return tuple(_value(item, draw) for item in kind.item_types)
        case msgspec.inspect.DictType():
            count = range(draw(3))
            return {index: _value(kind.value_type, draw) for index in count}
        case msgspec.inspect.UnionType():
            ordered = sorted(kind.types, key=lambda t: not isinstance(t, msgspec.inspect.NoneType))
            return _value(ordered[draw(len(ordered))], draw)
        case msgspec.inspect.StructType():
            return kind.cls(**{field.name: _value(field.type, draw) for field in kind.fields})
    raise AssertionError(f"no sample of {kind}")


def samples(draw: Callable[[int], int] = lambda below: below - 1) -> list[Any]:
    """One event of each kind; as it is, with all that an event can hold."""
    made = [_value(msgspec.inspect.type_info(kind), draw) for kind in KINDS]
    return [msgspec.structs.replace(made[0], schema=SCHEMA), *made[1:]]


def drawing(seed: int) -> Callable[[int], int]:
    """Numbers below what is asked for, the same everywhere."""
    state = seed

    def draw(below: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % below

    return draw


def misfit(value: Any, rule: dict[str, Any], parts: dict[str, Any], at: str = "$") -> str:
    """Why a JSON value is not what the schema has there; "" if it is.

    Knows the words of JSON Schema that the committed schema uses, and no others.
    """
    if "$ref" in rule:
        return misfit(value, parts[rule["$ref"].removeprefix("#/$defs/")], parts, at)
    if "anyOf" in rule:
        found = [misfit(value, choice, parts, at) for choice in rule["anyOf"]]
        return "" if "" in found else f"{at}: none of {found}"
    if "enum" in rule:
        return "" if value in rule["enum"] else f"{at}: {value!r} is not in {rule['enum']}"
    types = {"integer": int, "string": str, "boolean": bool, "null": type(None), "array": list}
    if type(value) is not types.get(rule["type"], dict):
        return f"{at}: {value!r} is no {rule['type']}"
    if isinstance(value, list):
        heads = rule.get("prefixItems", [])
        if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value)):
            return f"{at}: {len(value)} items"
        rules = itertools.chain(heads, itertools.repeat(rule.get("items")))
        inner = [(item, of, f"{at}[]") for item, of in zip(value, rules, strict=False)]
    elif isinstance(value, dict):
        missing = set(rule.get("required", ())) - set(value)
        if missing:
            return f"{at}: {sorted(missing)} missing"
        own, other = rule.get("properties", {}), rule.get("additionalProperties", True)
        inner = [(item, own.get(name, other), f"{at}.{name}") for name, item in value.items()]
    else:
        inner = []
    for item, of, where in inner:
        if isinstance(of, bool):
            if not of:
                return f"{where}: unknown"
        elif why := misfit(item, of, parts, where):
            return why
    return ""
