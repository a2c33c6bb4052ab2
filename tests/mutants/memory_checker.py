"""Broken memory checkers. Each must fail on the clause it breaks."""

import re
from collections.abc import Callable
from typing import Any

import kvspec
import kvspec.oracle
from kvspec.conformance.memory_checker import MemoryCheckerConformance
from kvspec.conformance.mutants import Registry
from kvspec.errors import MemoryLeakError

registry = Registry(MemoryCheckerConformance, kvspec.oracle)


def _report(arguments: tuple[Any, ...], options: dict[str, Any]) -> list[str]:
    """The faults that a correct checker names at level sets; other levels raise as they do."""
    try:
        kvspec.check_memory(*arguments, **options)
    except MemoryLeakError as error:
        if options["level"] != "sets":
            raise
        return str(error).splitlines()
    return []


def _raise(faults: list[str]) -> None:
    if faults:
        raise MemoryLeakError("\n".join(faults))


def _blind_to(clause: str) -> Callable[..., None]:
    def check_memory(*arguments: Any, **options: Any) -> None:
        faults = _report(arguments, options)
        _raise([fault for fault in faults if not fault.startswith((f"{clause}:", f"{clause},"))])

    check_memory.__name__ = f"blind_to_{clause}"
    return check_memory


registry.mutant("CHECK-1", "CHECK-6", "CHECK-7", "CHECK-9", replaces="check_memory")(
    _blind_to("CHECK-1")
)
for _clause in ("CHECK-2", "CHECK-3", "CHECK-4"):
    registry.mutant(_clause, "CHECK-7", "CHECK-9", replaces="check_memory")(_blind_to(_clause))
for _clause, _reports in (("CHECK-9", ("INV-009",)), ("CHECK-10", ()), ("CHECK-11", ())):
    registry.mutant(_clause, replaces="check_memory", reports=_reports)(_blind_to(_clause))


@registry.mutant("CHECK-2", "CHECK-7", "CHECK-9", replaces="check_memory")
def names_one_owner_only(*arguments: Any, **options: Any) -> None:
    _raise([fault.split("; ")[0] for fault in _report(arguments, options)])


@registry.mutant("CHECK-3", replaces="check_memory")
def compares_the_first_slot_of_a_page_only(*arguments: Any, **options: Any) -> None:
    faults = _report(arguments, options)
    _raise([fault for fault in faults if "CHECK-3" not in fault or "position 0" in fault])


@registry.mutant("CHECK-5", "CHECK-6", "CHECK-8", "CHECK-12", replaces="check_memory")
def takes_running_requests_for_leaks(*arguments: Any, **options: Any) -> None:
    if options["level"] == "counts":
        options["reqs"] = ()
    kvspec.check_memory(*arguments, **options)


@registry.mutant("CHECK-5", "CHECK-6", "CHECK-12", replaces="check_memory")
def counts_nothing(*arguments: Any, **options: Any) -> None:
    if options["level"] != "counts":
        kvspec.check_memory(*arguments, **options)


@registry.mutant("CHECK-6", replaces="check_memory")
def takes_pending_pages_for_lost(allocator: Any, *arguments: Any, **options: Any) -> None:
    kvspec.check_memory(allocator, *arguments, **options)
    if options["level"] == "sets":
        pending = allocator.view().pending
        _raise([f"CHECK-1: page {page} is in no list" for page in pending])


@registry.mutant("CHECK-7", "CHECK-9", replaces="check_memory")
def a_deficit_hides_the_surplus(*arguments: Any, **options: Any) -> None:
    faults = _report(arguments, options)
    deficits = [fault for fault in faults if fault.startswith("CHECK-1:")]
    _raise(deficits or faults)


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
    _raise([re.sub("(CHECK-9.*)window pool", r"\1full pool", fault) for fault in faults])


@registry.mutant("CHECK-9", replaces="check_memory")
def takes_a_surplus_of_windows_for_a_deficit(*arguments: Any, **options: Any) -> None:
    faults = _report(arguments, options)
    _raise([fault.replace("CHECK-9, CHECK-2", "CHECK-9, CHECK-1") for fault in faults])


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
            _raise(["CHECK-11"] * (not allocator.translate_loc_from_full_to_swa(slots).all()))


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
