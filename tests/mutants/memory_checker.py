"""Broken memory checkers. Each must fail on the clause it breaks."""

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
        _raise([fault for fault in faults if not fault.startswith(f"{clause}:")])

    check_memory.__name__ = f"blind_to_{clause}"
    return check_memory


registry.mutant("CHECK-1", "CHECK-6", "CHECK-7", replaces="check_memory")(_blind_to("CHECK-1"))
for _clause in ("CHECK-2", "CHECK-3", "CHECK-4"):
    registry.mutant(_clause, "CHECK-7", replaces="check_memory")(_blind_to(_clause))


@registry.mutant("CHECK-2", "CHECK-7", replaces="check_memory")
def names_one_owner_only(*arguments: Any, **options: Any) -> None:
    _raise([fault.split("; ")[0] for fault in _report(arguments, options)])


@registry.mutant("CHECK-3", replaces="check_memory")
def compares_the_first_slot_of_a_page_only(*arguments: Any, **options: Any) -> None:
    faults = _report(arguments, options)
    _raise([fault for fault in faults if "CHECK-3" not in fault or "position 0" in fault])


@registry.mutant("CHECK-5", "CHECK-6", "CHECK-8", replaces="check_memory")
def takes_running_requests_for_leaks(*arguments: Any, **options: Any) -> None:
    if options["level"] == "counts":
        options["reqs"] = ()
    kvspec.check_memory(*arguments, **options)


@registry.mutant("CHECK-5", "CHECK-6", replaces="check_memory")
def counts_nothing(*arguments: Any, **options: Any) -> None:
    if options["level"] != "counts":
        kvspec.check_memory(*arguments, **options)


@registry.mutant("CHECK-6", replaces="check_memory")
def takes_pending_pages_for_lost(allocator: Any, *arguments: Any, **options: Any) -> None:
    kvspec.check_memory(allocator, *arguments, **options)
    if options["level"] == "sets":
        pending = allocator.view().pending
        _raise([f"CHECK-1: page {page} is in no list" for page in pending])


@registry.mutant("CHECK-7", replaces="check_memory")
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
