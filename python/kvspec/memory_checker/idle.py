"""What is left over when nothing runs. Spec: CHECK-23."""

from collections.abc import Iterator, Mapping

from kvspec.interfaces.memory_checker import Claims, ReportKind, SystemView
from kvspec.memory_checker.report import Pool, Report

__all__ = ["leftovers"]


def leftovers(
    view: SystemView, claims: Claims, named: Mapping[str, Pool]
) -> Iterator[tuple[Report, Pool]]:
    """A report for each live row, reserved page, copy in flight and locked page, of a system in
    which nothing should be (CHECK-23).
    """
    full, rows, host = named["full"], named["rows"], named["host"]
    for row in sorted(view.rows.rows):
        yield _left(rows, row, "leak", "is live", f"the request in row {row}")
    for page in sorted(claims.reserved):
        yield _left(full, page, "leak", "is reserved", "reserved")
    for pool, copies in ((full, claims.copies), (host, claims.host_copies)):
        for page in sorted(copies):
            yield _left(pool, page, "leak", "has a copy in flight", "a copy in flight")
    for page, owners in sorted(_locked(view, claims).items()):
        yield _left(full, page, "lock imbalance", f"is locked by {'; '.join(owners)}", *owners)


def _left(pool: Pool, page: int, kind: ReportKind, what: str, *owners: str) -> tuple[Report, Pool]:
    report = Report(
        kind=kind,
        clauses=("CHECK-23",),
        pool=pool.name,
        page=page,
        what=f"{pool.page} {page} of {pool.name} {what}, but nothing runs",
        owners=owners,
    )
    return report, pool


def _locked(view: SystemView, claims: Claims) -> dict[int, tuple[str, ...]]:
    """The last page of each path with an open lock, and who holds it; if nobody kept count, every
    page with locks.
    """
    if claims.open_locks is None:
        return {
            resident.page: (f"{resident.locks} unknown",)
            for resident in view.tree.pages.values()
            if resident.locks
        }
    return {
        view.tree.pages[path].page: holders
        for path, holders in claims.open_locks.items()
        if holders and path in view.tree.pages
    }
