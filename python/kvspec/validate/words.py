"""An event in words: the call, as it was made, and what came of it."""

from msgspec.structs import fields

from kvspec.flight_recorder.events import (
    Effects,
    Event,
    Key,
    Runs,
    Start,
    State,
    Written,
)
from kvspec.validate.runs import ID_BYTES

__all__ = ["operation", "words"]

_RESULTS = ("slots", "rows")
_ASKED = frozenset({"free", "free_swa", "free_rows", "insert", "copy_begin"})
"""Operations to which slots or rows are given; the others give them."""


def operation(event: Event) -> str:
    """The name of what was asked for."""
    return str(event.__struct_config__.tag)


def words(event: Event) -> str:
    """One line: `4 alloc(need_size=8) -> slots [4, 12) at engine.py:7 step`."""
    name, results, arguments = operation(event), list[str](), list[str]()
    if isinstance(event, Start):
        return f"{event.n} start: {event.cache} over {event.allocator} and {event.pool}"
    for field in fields(type(event)):
        value = getattr(event, field.name)
        if field.name in ("n", "at", "error", "did"):
            continue
        if field.name == "after" or (field.name in _RESULTS and name not in _ASKED):
            results.append(_result(event, field.name, value))
        elif value != field.default:
            arguments.append(f"{field.name}={_value(value, field.name)}")
    outcome = f" raised {event.error}" if event.error else "".join(results)
    effects = _effects(event.did) if event.did is not None else ""
    at = f" at {event.at}" if event.at else ""
    return f"{event.n} {name}({', '.join(arguments)}){outcome}{effects}{at}"


def _result(event: Event, name: str, value: object) -> str:
    if event.error:
        return ""
    return f" -> {name} {_value(value, name)}" if value is not None else " -> None"


def _value(value: object, name: str = "") -> str:
    if isinstance(value, Key):
        return f"{value.count} tokens{_id(value.ids[-ID_BYTES:])}"
    if isinstance(value, bytes):
        return value[:4].hex() or "root"
    if isinstance(value, State):
        rows, pages = len(value.rows), len(value.tree)
        return f"{rows} rows, {pages} pages in the tree, free {_runs(value.free)}"
    if isinstance(value, list) and value and isinstance(value[0], Written):
        return ", ".join(f"row {w.row} from {w.start}: {_runs(w.slots)}" for w in value)
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return _runs(value)
    return repr(value)


def _id(id_: bytes) -> str:
    return f", page {id_[:4].hex()}" if id_ else ""


def _runs(runs: Runs) -> str:
    shown = [f"[{start}, {stop})" for start, stop in runs[:6]]
    return " ".join(shown) + (f" and {len(runs) - 6} runs more" if len(runs) > 6 else "")


def _effects(did: Effects) -> str:
    done = []
    if did.freed:
        done.append(f"freed {_runs(did.freed)}")
    if did.swa_freed:
        done.append(f"freed windows {_runs(did.swa_freed)}")
    if did.rows_freed:
        done.append(f"freed rows {did.rows_freed}")
    if did.written:
        done.append(f"wrote {_value(did.written)}")
    return f"; {', '.join(done)}" if done else ""
