"""Broken memory checkers. Each must fail on the clause it breaks."""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import kvspec
import kvspec.oracle
from kvspec.conformance.memory_checker import MemoryCheckerConformance
from kvspec.conformance.mutants import Registry
from kvspec.errors import MemoryLeakError
from kvspec.memory_checker import Report, find_faults, raise_faults, report_of
from kvspec.memory_checker.self_test import SelfTestResult, self_test

registry = Registry(MemoryCheckerConformance, kvspec.oracle)


def _report(arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Report]:
    """The faults that a correct checker names at level sets; other levels raise as they do."""
    try:
        kvspec.check_memory(*arguments, **options)
    except MemoryLeakError as error:
        if options["level"] != "sets":
            raise
        return [*error.reports]
    return []


def _changed(
    clause: str, change: Callable[[Report], Report | None], *, name: str
) -> Callable[..., None]:
    """A checker that changes or drops what breaks a clause before all others."""

    def check_memory(*arguments: Any, **options: Any) -> None:
        reports = _report(arguments, options)
        changed = [change(each) if each.clause == clause else each for each in reports]
        raise_faults([each for each in changed if each is not None])

    check_memory.__name__ = name
    return check_memory


def _blind_to(clause: str) -> Callable[..., None]:
    return _changed(clause, lambda report: None, name=f"blind_to_{clause}")


registry.mutant("CHECK-1", "CHECK-6", "CHECK-7", "CHECK-9", "CHECK-13", replaces="check_memory")(
    _blind_to("CHECK-1")
)
for _clause in ("CHECK-2", "CHECK-3", "CHECK-4"):
    registry.mutant(_clause, "CHECK-7", "CHECK-9", replaces="check_memory")(_blind_to(_clause))
for _clause, _reports in (("CHECK-9", ("INV-009",)), ("CHECK-10", ()), ("CHECK-11", ())):
    registry.mutant(_clause, replaces="check_memory", reports=_reports)(_blind_to(_clause))


@registry.mutant("CHECK-2", "CHECK-7", "CHECK-9", "CHECK-14", replaces="check_memory")
def names_one_owner_only(*arguments: Any, **options: Any) -> None:
    faults = _report(arguments, options)
    raise_faults([replace(fault, what=fault.what.split("; ")[0]) for fault in faults])


@registry.mutant("CHECK-3", replaces="check_memory")
def compares_the_first_slot_of_a_page_only(*arguments: Any, **options: Any) -> None:
    faults = _report(arguments, options)
    raise_faults([fault for fault in faults if fault.clause != "CHECK-3" or not fault.position])


@registry.mutant("CHECK-5", "CHECK-6", "CHECK-8", "CHECK-12", "CHECK-21", replaces="check_memory")
def takes_running_requests_for_leaks(*arguments: Any, **options: Any) -> None:
    if options["level"] == "counts":
        options["reqs"] = ()
    kvspec.check_memory(*arguments, **options)


@registry.mutant("CHECK-5", "CHECK-6", "CHECK-12", "CHECK-21", replaces="check_memory")
def counts_nothing(*arguments: Any, **options: Any) -> None:
    if options["level"] != "counts":
        kvspec.check_memory(*arguments, **options)


@registry.mutant("CHECK-6", "CHECK-21", replaces="check_memory")
def takes_pending_pages_for_lost(allocator: Any, *arguments: Any, **options: Any) -> None:
    kvspec.check_memory(allocator, *arguments, **options)
    if options["level"] == "sets":
        for page in allocator.view().pending:
            raise MemoryLeakError(f"CHECK-1: page {page} is in no list")


@registry.mutant("CHECK-7", "CHECK-9", replaces="check_memory")
def a_deficit_hides_the_surplus(*arguments: Any, **options: Any) -> None:
    faults = _report(arguments, options)
    deficits = [fault for fault in faults if fault.clause == "CHECK-1"]
    raise_faults(deficits or faults)


@registry.mutant("CHECK-8", replaces="check_memory")
def counts_by_looking_at_everything(
    allocator: Any, rows: Any, cache: Any, *arguments: Any, **options: Any
) -> None:
    if options["level"] == "counts":
        allocator.view()
    kvspec.check_memory(allocator, rows, cache, *arguments, **options)


@registry.mutant("CHECK-9", replaces="check_memory")
def takes_the_window_pool_for_the_full_one(*arguments: Any, **options: Any) -> None:
    faults = _report(arguments, options)
    raise_faults(
        [
            replace(fault, what=fault.what.replace("window pool of", "full pool of"))
            for fault in faults
        ]
    )


@registry.mutant("CHECK-9", replaces="check_memory")
def takes_a_surplus_of_windows_for_a_deficit(*arguments: Any, **options: Any) -> None:
    raise_faults(
        [
            replace(fault, clauses=("CHECK-9", "CHECK-1")) if "CHECK-9" in fault.clauses else fault
            for fault in _report(arguments, options)
        ]
    )


@registry.mutant("CHECK-10", "CHECK-11", "CHECK-9", "CHECK-6", replaces="check_memory")
def expects_every_page_of_the_tree_to_be_live(
    allocator: Any, rows: Any, cache: Any, *arguments: Any, **options: Any
) -> None:
    kvspec.check_memory(allocator, rows, cache, *arguments, **options)
    if options["level"] == "sets" and any(p.tombstone for p in cache.view().pages.values()):
        raise MemoryLeakError("CHECK-10: a tombstone")


@registry.mutant("CHECK-11", "CHECK-6", "CHECK-9", "CHECK-10", "CHECK-12", replaces="check_memory")
def expects_every_page_of_a_row_to_have_its_pair(
    allocator: Any, rows: Any, cache: Any, *arguments: Any, **options: Any
) -> None:
    kvspec.check_memory(allocator, rows, cache, *arguments, **options)
    if options["level"] == "sets" and hasattr(cache, "sliding_window_size"):
        for req in options["reqs"]:
            slots = rows.row(req.req_pool_idx)
            if not allocator.translate_loc_from_full_to_swa(slots).all():
                raise MemoryLeakError("CHECK-11: a page without a pair")


@registry.mutant("CHECK-12", replaces="check_memory")
def counts_the_full_pool_alone(*arguments: Any, **options: Any) -> None:
    try:
        kvspec.check_memory(*arguments, **options)
    except MemoryLeakError as error:
        if "swa_tokens_per_layer" not in str(error) or _used(str(error), "full"):
            raise


def _used(message: str, pool: str) -> bool:
    """Whether the numbers of a pool do not add up, by the text of the error."""
    (line,) = (part for part in message.splitlines() if f"{pool}_tokens_per_layer" in part)
    total, *parts = (int(number) for number in re.findall(r"=(\d+)", line))
    return total != sum(parts)


@registry.mutant("CHECK-12", "CHECK-6", "CHECK-9", "CHECK-10", "CHECK-11", replaces="check_memory")
def counts_a_window_page_for_every_page_of_a_row(
    allocator: Any, rows: Any, cache: Any, *arguments: Any, **options: Any
) -> None:
    kvspec.check_memory(allocator, rows, cache, *arguments, **options)
    if options["level"] == "counts" and hasattr(allocator, "size_swa"):
        slots = [int(slot) for req in options["reqs"] for slot in rows.row(req.req_pool_idx)]
        if not allocator.translate_loc_from_full_to_swa(slots).all():
            raise MemoryLeakError("a request has a page without a pair")


@registry.mutant("CHECK-12", replaces="get_swa_token_info")
def swaps_available_and_evictable(allocator: Any, cache: Any) -> kvspec.SWATokenInfo:
    info = kvspec.get_swa_token_info(allocator, cache)
    return info._replace(
        swa_available_size=info.swa_evictable_size, swa_evictable_size=info.swa_available_size
    )


# ------------------------------------------------------------------------- reports


@registry.mutant("CHECK-13", "CHECK-19", "CHECK-20", "CHECK-23", replaces="find_faults")
def asks_no_ledger(*arguments: Any, attribution: object = None, **options: Any) -> list[Report]:
    return find_faults(*arguments, **options)


@registry.mutant("CHECK-13", "CHECK-1", "CHECK-4", "CHECK-9", replaces="check_memory")
def guesses_who_lost_a_page(*arguments: Any, **options: Any) -> None:
    reports = _report(arguments, options)
    raise_faults(
        [replace(r, last_owner="the last request") if r.kind == "leak" else r for r in reports]
    )


def _as_alias(report: Report) -> Report:
    return replace(report, kind="alias", clauses=("CHECK-2",))


for _clause, _also in (
    ("CHECK-14", ()),
    ("CHECK-15", ("CHECK-2", "CHECK-7", "CHECK-20")),
    ("CHECK-16", ("CHECK-2", "CHECK-3", "CHECK-20")),
):
    registry.mutant(_clause, *_also, replaces="check_memory")(
        _changed(_clause, _as_alias, name=f"takes_{_clause}_for_an_alias")
    )


@registry.mutant("CHECK-14", replaces="report_of")
def takes_what_is_given_twice_for_lost(*arguments: Any) -> Report:
    return replace(report_of(*arguments), kind="leak", clauses=("CHECK-1",))


@registry.mutant("CHECK-16", "CHECK-2", replaces="check_memory")
def names_the_first_position_of_the_row(*arguments: Any, **options: Any) -> None:
    reports = _report(arguments, options)
    raise_faults([replace(r, position=0) if r.kind == "dangling row" else r for r in reports])


registry.mutant("CHECK-17", replaces="check_memory")(_blind_to("CHECK-17"))


@registry.mutant("CHECK-17", replaces="check_memory")
def takes_more_locks_for_fewer(*arguments: Any, **options: Any) -> None:
    reports = _report(arguments, options)
    raise_faults([replace(r, what=r.what.replace(" more ", " fewer ")) for r in reports])


@registry.mutant("CHECK-17", replaces="find_faults")
def counts_the_locks_of_the_tree_alone(*arguments: Any, **options: Any) -> list[Report]:
    found = find_faults(*arguments, **options)
    return [report for report in found if report.kind != "lock imbalance" or options.get("idle")]


@registry.mutant("CHECK-18", replaces="find_faults")
def lets_the_sink_go_round(*arguments: Any, **options: Any) -> list[Report]:
    found = find_faults(*arguments, **options)
    return [report for report in found if (report.kind, report.page) != ("sentinel", 0)]


@registry.mutant("CHECK-18", replaces="find_faults")
def looks_at_rows_of_requests_alone(*arguments: Any, **options: Any) -> list[Report]:
    found = find_faults(*arguments, **options)
    return [report for report in found if report.kind != "sentinel" or report.row is None]


@registry.mutant("CHECK-19", replaces="find_faults")
def overlooks_the_next_tier(view: Any, *arguments: Any, **options: Any) -> list[Report]:
    return find_faults(view._replace(host=None), *arguments, **options)


@registry.mutant("CHECK-19", replaces="find_faults")
def takes_a_copy_to_the_host_for_an_orphan(
    view: Any, claims: Any, *arguments: Any, **options: Any
) -> list[Report]:
    return find_faults(view, claims._replace(host_copies=frozenset()), *arguments, **options)


class _Forgetful(Report):
    def as_json(self) -> dict[str, object]:
        return {**super().as_json(), "owners": [], "history": []}


@registry.mutant("CHECK-20", replaces="check_memory")
def tells_a_program_less_than_a_person(*arguments: Any, **options: Any) -> None:
    reports = _report(arguments, options)
    names = [field.name for field in fields(Report)]
    raise_faults([_Forgetful(**{name: getattr(r, name) for name in names}) for r in reports])


@registry.mutant("CHECK-21", replaces="find_faults")
def takes_copies_in_flight_for_lost(
    view: Any, claims: Any, *arguments: Any, **options: Any
) -> list[Report]:
    if options.get("idle"):
        return find_faults(view, claims, *arguments, **options)
    return find_faults(view, claims._replace(copies=frozenset()), *arguments, **options)


@registry.mutant("CHECK-21", replaces="check_memory")
def counts_nothing_as_pending(allocator: Any, *arguments: Any, **options: Any) -> None:
    if options["level"] == "counts" and allocator.pending_size():
        raise MemoryLeakError("token_to_kv_pool_allocator memory leak detected!")
    kvspec.check_memory(allocator, *arguments, **options)


@registry.mutant("CHECK-21", replaces="check_memory")
def counts_nothing_in_a_free_group(allocator: Any, *arguments: Any, **options: Any) -> None:
    if options["level"] != "counts" or not allocator.pending_size():
        kvspec.check_memory(allocator, *arguments, **options)


@registry.mutant("CHECK-22", replaces="self_test")
def calls_everything_seen(*arguments: Any, **options: Any) -> list[SelfTestResult]:
    return [result._replace(seen=True) for result in self_test(*arguments, **options)]


@registry.mutant("CHECK-22", replaces="self_test")
def plants_no_alias(*arguments: Any, **options: Any) -> list[SelfTestResult]:
    return [result for result in self_test(*arguments, **options) if result.planted != "alias"]


@registry.mutant("CHECK-22", replaces="self_test")
def plants_under_the_cache_that_shares_alone(
    *arguments: Any, **options: Any
) -> list[SelfTestResult]:
    return [result for result in self_test(*arguments, **options) if "Chunk" not in result.cache]


@registry.mutant("CHECK-23", replaces="find_faults")
def is_always_busy(*arguments: Any, idle: bool = False, **options: Any) -> list[Report]:
    return find_faults(*arguments, **options)


@registry.mutant("CHECK-23", replaces="find_faults")
def forgets_locks_when_idle(*arguments: Any, **options: Any) -> list[Report]:
    found = find_faults(*arguments, **options)
    return [report for report in found if not (options.get("idle") and report.kind != "leak")]
