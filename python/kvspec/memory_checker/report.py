"""One fault, for a person and for a program. Spec: CHECK.

CHECK-1: page 7 of token_to_kv_pool_allocator is held and has no owner; last owner: ...
  1841  cache_finished_req  engine/scheduler.py:212 process_batch  -> reserved
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from kvspec.interfaces.memory_checker import Attribution, HistoryStep, ReportKind
from kvspec.interfaces.ownership_ledger import Fault, Owner

__all__ = ["Pool", "Report", "owner_name", "pools", "report_of"]

_POOL = "token_to_kv_pool_allocator"


class Pool(NamedTuple):
    """What a pool is called: by a ledger, and in a report, where it has a clause of its own."""

    key: str
    name: str
    page: str = "page"
    clauses: tuple[str, ...] = ()


def pools(*, windows: bool) -> dict[str, Pool]:
    """The pools of a system by the names that a ledger has for them; with `windows` there are two
    on the device, and the second is held to CHECK-9.
    """
    known = (
        Pool("full", f"the full pool of {_POOL}" if windows else _POOL),
        Pool("swa", f"the window pool of {_POOL}", clauses=("CHECK-9",)),
        Pool("rows", "req_to_token_pool", page="row"),
        Pool("host", "token_to_kv_pool_host", page="host page"),
    )
    return {pool.key: pool for pool in known}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A fault, its page and all that claim it (CHECK-13); `interfaces.memory_checker.Report`.

    With a ledger it says who had the page, what lost it, and its history. What nobody kept is None
    or empty.
    """

    kind: ReportKind
    clauses: tuple[str, ...]
    """All that are broken, as the text names them; the most special one first."""
    pool: str
    page: int | None
    what: str
    """The sentence, without clause."""
    owners: tuple[str, ...] = ()
    row: int | None = None
    """The row that names the page, and the first position where it does."""
    position: int | None = None
    last_owner: str | None = None
    lost_by: HistoryStep | None = None
    history: tuple[HistoryStep, ...] = ()
    """The newest first."""

    @property
    def clause(self) -> str:
        """The most special one, `CHECK-15`."""
        return self.clauses[0]

    def __str__(self) -> str:
        """A line, and one for each step of the history below it."""
        line = f"{', '.join(self.clauses)}: {self.what}"
        if self.last_owner is not None:
            line += f"; last owner: {self.last_owner}"
        if self.lost_by is not None:
            line += f"; {self._verb()} by {_told(self.lost_by)}"
        return "\n".join([line, *_columns(self.history)])

    def as_json(self) -> dict[str, object]:
        """The same for a program; `from_json` makes it a report again (CHECK-20)."""
        return {
            "kind": self.kind,
            "clause": self.clause,
            "clauses": list(self.clauses),
            "pool": self.pool,
            "page": self.page,
            "what": self.what,
            "owners": list(self.owners),
            "row": self.row,
            "position": self.position,
            "last_owner": self.last_owner,
            "lost_by": None if self.lost_by is None else self.lost_by._asdict(),
            "history": [step._asdict() for step in self.history],
        }

    def _verb(self) -> str:
        """What the action did that was the last to move the page."""
        if "CHECK-23" in self.clauses:
            return "taken"
        return "lost" if self.kind == "leak" else "last moved"

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """The report that `as_json` told of (CHECK-20)."""
        given = {name: value for name, value in told.items() if name != "clause"}
        lost_by = given["lost_by"]
        given["lost_by"] = None if lost_by is None else _step(lost_by)
        given["history"] = tuple(map(_step, given["history"]))
        for name in ("clauses", "owners"):
            given[name] = tuple(given[name])
        return cls(**given)

    def attributed(self, attribution: Attribution | None, pool: Pool) -> "Report":
        """With what a ledger knows of the page; the same without one."""
        if attribution is None or self.page is None:
            return self
        return replace(
            self,
            last_owner=attribution.last_owner(pool.key, self.page),
            lost_by=attribution.lost_by(pool.key, self.page),
            history=tuple(attribution.history(pool.key, self.page)),
        )


def owner_name(owner: Owner) -> str:
    """How a report calls an owner of the ledger."""
    if owner.kind == "request" and owner.who < 0:
        return "a request whose row was given back"
    if owner.kind == "request":
        return f"the request in row {owner.who}"
    return f"copy {owner.who}" if owner.kind == "copy" else owner.kind


def report_of(
    fault: Fault, attribution: Attribution | None = None, *, windows: bool = False
) -> Report:
    """What an action did that could not be right, as a ledger saw it (CHECK-13).

    `windows` says that the first pool has a second one beside it.
    """
    pool = pools(windows=windows)[fault.pool]
    owners = (fault.owner, fault.other)
    report = Report(
        kind=fault.kind,
        clauses=(*pool.clauses, "CHECK-4" if pool.key == "rows" else _CLAUSES[fault.kind]),
        pool=pool.name,
        page=fault.page,
        what=f"{pool.page} {fault.page} of {pool.name} {_happened(fault)}",
        owners=() if fault.kind == "sentinel" else tuple(dict.fromkeys(map(owner_name, owners))),
        row=None if fault.row < 0 else fault.row,
    ).attributed(attribution, pool)
    action = next((step for step in report.history if step.action == fault.action), report.lost_by)
    last_owner, known = owner_name(fault.owner), report.last_owner
    if fault.owner.kind in ("free", "pending") or (known or "").startswith(last_owner):
        return replace(report, lost_by=action)
    return replace(report, last_owner=last_owner, lost_by=action)


_CLAUSES: dict[str, str] = {
    "leak": "CHECK-1",
    "double free": "CHECK-14",
    "alias": "CHECK-2",
    "use after free": "CHECK-15",
    "dangling row": "CHECK-16",
    "sentinel": "CHECK-18",
}


def _happened(fault: Fault) -> str:
    """The end of the sentence: what was done to the page, and why that could not be right."""
    if fault.kind == "sentinel":
        why = "is the sink" if fault.page == 0 else "does not exist"
        return f"{why}, but was {f'named by row {fault.row}' if fault.row >= 0 else 'used'}"
    if fault.kind == "leak":
        return f"was left behind when row {fault.row} was given back"
    if fault.kind == "double free":
        return f"was given back, but was {owner_name(fault.owner)} already"
    if fault.kind != "dangling row":
        return f"{_became(fault)}, but {_was(fault)}"
    if fault.pool == "rows":
        return "was written, but was free"
    if fault.other.kind == "request":
        return f"was written to row {fault.row}, but was {fault.owner.kind}"
    return f"{_became(fault)}, but row {fault.row} still names it"


def _became(fault: Fault) -> str:
    """What the action did to the page, by the owner that it has now."""
    return {
        "free": "was given back",
        "pending": "was given back",
        "reserved": "was handed out",
        "tree": "was taken into the tree",
        "copy": "was given back while copied",
        "request": f"was written to row {fault.other.who}",
    }[fault.other.kind]


def _was(fault: Fault) -> str:
    """Who had the page before."""
    if fault.pool == "rows":
        return "was live already"
    if fault.owner.kind == "copy":
        return f"{owner_name(fault.owner)} of it was in flight"
    if fault.owner.kind in ("free", "pending", "reserved"):
        return f"was {fault.owner.kind}"
    return f"was that of {'the ' * (fault.owner.kind == 'tree')}{owner_name(fault.owner)}"


def _step(told: Mapping[str, Any]) -> HistoryStep:
    return HistoryStep(**told)


def _told(step: HistoryStep) -> str:
    """`cache_finished_req at engine/scheduler.py:212 process_batch (action 1841)`."""
    return f"{step.name}{f' at {step.site}' if step.site else ''} (action {step.action})"


def _columns(history: tuple[HistoryStep, ...]) -> list[str]:
    """A line for each step, the columns as wide as the widest."""
    numbers = ["start" if step.action < 0 else str(step.action) for step in history]
    widths = [
        max(map(len, column), default=0)
        for column in (numbers, [s.name for s in history], [s.site for s in history])
    ]
    return [
        f"  {number:>{widths[0]}}  {step.name:<{widths[1]}}  {step.site:<{widths[2]}}  ->"
        f" {step.owner}"
        for number, step in zip(numbers, history, strict=True)
    ]
