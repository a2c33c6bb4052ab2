"""Illegal calls. Both systems must refuse each for the same clause, and not change.

A fault takes the driver and two numbers, makes one illegal call and returns True; where the objects
that it needs do not exist it returns False. What it had to change to get there it changes back by
legal calls.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from kvspec.conformance.lockstep.driver import Driver, Running
from kvspec.conformance.lockstep.pair import Request, Twin

__all__ = ["FAULTS", "Fault", "commit_fault", "fault_of"]

Fault: TypeAlias = Callable[[Driver, int, int], bool]
FAULTS: dict[str, Fault] = {}


def fault_of(registry: dict[str, Fault]) -> Callable[[Fault], Fault]:
    """Enter a function into a registry, under its name."""

    def enter(function: Fault) -> Fault:
        registry[function.__name__.strip("_")] = function
        return function

    return enter


_fault = fault_of(FAULTS)


def commit_fault(driver: Driver, fault: Fault, first: int, second: int) -> bool:
    """Make an illegal call, and count it; False if there was nothing to make it with."""
    made = fault(driver, first, second)
    driver.coverage.counts["illegal"] += made
    return made


# -- the allocator


@_fault
def _alloc(driver: Driver, first: int, second: int) -> bool:
    page_size = driver.config.page_size
    misaligned = page_size * (first % 3) + 1 + second % max(page_size - 1, 1)
    wrong = -1 - first % 5 if page_size == 1 or second % 4 == 0 else misaligned
    driver.pair.refused(driver.pair.allocator, "alloc", wrong)
    return True


def _extend_arguments(driver: Driver, first: int, second: int) -> tuple[Any, ...] | None:
    page_size, free = driver.config.page_size, driver.free_pages()
    started = [one for one in driver.running if one.allocated % page_size]
    wrong: list[tuple[Any, ...] | None] = [
        ([0, 0], [1], [-1, -1], 2),
        ([2], [1], [-1], -1),
        ([-1], [1], [-1], 2),
        ([0], [3], [-1], 4),
        ([0], [1], [page_size], 1),
        ([1], [2], [-1], 1),
        ([1], [2], [free[0] * page_size], 1) if free else None,
        ([1], [2], [0], 1),
        ([1], [2], [(driver.config.page_count + 9) * page_size], 1),
    ]
    if started:
        one = started[second % len(started)]
        last, start = driver.row(one)[-1], one.allocated
        wrong.append(([start] * 2, [start + 1] * 2, [last] * 2, 2))
        wrong.append(([start + 1], [start + 2], [last], 1))
    return wrong[first % len(wrong)]


@_fault
def _alloc_extend(driver: Driver, first: int, second: int) -> bool:
    arguments = None if driver.by_count else _extend_arguments(driver, first, second)
    if arguments is None:
        return False
    *lists, count = arguments
    given = [driver.slots(numbers) for numbers in lists]
    driver.pair.refused(driver.pair.allocator, "alloc_extend", *given, count)
    return True


@_fault
def _alloc_decode(driver: Driver, first: int, second: int) -> bool:
    if driver.by_count:
        return False
    wrong = [([1, 1], [-1]), ([0], [-1]), ([2], [-1]), ([2], [0]), ([1], [second % 9])]
    lists = map(driver.slots, wrong[first % len(wrong)])
    driver.pair.refused(driver.pair.allocator, "alloc_decode", *lists)
    return True


@_fault
def _free(driver: Driver, first: int, second: int) -> bool:
    page_size, view = driver.config.page_size, driver.pair.allocator.oracle.view()
    pages = [0, -1, driver.config.page_count + 1]
    pages += [*view.free, *view.release, *view.pending]
    named = [pages[first % len(pages)] * page_size + second % page_size]
    held = sorted(view.held)
    if held and second % 2:
        named.insert(0, held[second % len(held)] * page_size)
    driver.pair.refused(driver.pair.allocator, "free", driver.slots(named))
    return True


@_fault
def _free_twice(driver: Driver, first: int, second: int) -> bool:
    held = sorted(driver.pair.allocator.oracle.view().held)
    if not held or driver.config.page_size > 1:
        return False
    slots = [held[first % len(held)], held[second % len(held)], held[first % len(held)]]
    driver.pair.refused(driver.pair.allocator, "free", driver.slots(slots))
    return True


@_fault
def _tensor(driver: Driver, first: int, second: int) -> bool:
    wrong = [torch.ones(2), torch.ones(1, 2, dtype=torch.int64)][first % 2]
    if second % 2:
        driver.pair.refused(driver.pair.cache, "match_prefix", wrong)
    else:
        driver.pair.refused(driver.pair.allocator, "free", wrong)
    return True


@_fault
def _group(driver: Driver, first: int, second: int) -> bool:
    name = "free_group_begin" if driver.group else "free_group_end"
    driver.pair.refused(driver.pair.allocator, name)
    return True


@_fault
def _restore(driver: Driver, first: int, second: int) -> bool:
    """A ticket of another allocator, or one that a restore or a group has spent."""
    pair = driver.pair
    ticket = pair.call(pair.other_allocator, "backup_state").given
    if first % 3:
        ticket = driver.allocator("backup_state").given
        if first % 3 == 1:
            driver.allocator("restore_state", ticket)
        else:
            driver.do_group()
            driver.do_group()
        pair.compare_states()
    pair.refused(pair.allocator, "restore_state", ticket)
    return True


@_fault
def _restore_after_free(driver: Driver, first: int, second: int) -> bool:
    ticket = driver.allocator("backup_state").given
    held = len(driver.reserved)
    driver.do_take(1)
    if len(driver.reserved) == held:
        return False
    driver.free([driver.reserved.pop() * driver.config.page_size])
    driver.pair.compare_states()
    driver.pair.refused(driver.pair.allocator, "restore_state", ticket)
    return True


# -- the rows


@_fault
def _rows(driver: Driver, first: int, second: int) -> bool:
    rows, free = driver.pair.rows, driver.pair.rows.oracle.free_slots
    wrong: list[int | list[int]] = [driver.config.rows, -1, [driver.config.rows + 3]]
    wrong += [free[0], free[:1] * 2] if free else []
    wrong += [[one.row, one.row] for one in driver.running]
    if second % 5 == 0:
        driver.pair.refused(rows, "alloc", -1 - first % 3)
    else:
        driver.pair.refused(rows, "free", wrong[first % len(wrong)])
    return True


@_fault
def _write(driver: Driver, first: int, second: int) -> bool:
    """Beyond the end, with a hole, too few values, the sink, a negative place, a free row."""
    end = driver.config.request_pages * driver.config.page_size
    free = driver.pair.rows.oracle.free_slots
    one = driver.running[second % len(driver.running)] if driver.running else None
    wrong: list[tuple[Any, list[int]]] = [((free[0], slice(0, 1)), [1])] if free else []
    if one is not None:
        wrong += [
            ((one.row, [end]), [1]),
            ((one.row, [one.allocated + 1]), [1]),
            ((one.row, [-1]), [1]),
            ((one.row, slice(0, 2)), [1]),
            ((one.row, slice(0, 1)), [0]),
            (([one.row, driver.config.rows], [0, 0]), [1, 1]),
            ((one.row, slice(0, end + 1)), [1] * (end + 1)),
        ]
    if not wrong:
        return False
    indices, values = wrong[first % len(wrong)]
    driver.pair.refused(driver.pair.rows, "write", indices, driver.slots(values))
    return True


# -- the tree


@_fault
def _insert(driver: Driver, first: int, second: int) -> bool:
    """Lengths that differ, slots across pages, the sink, a page twice, a token out of range."""
    size = driver.config.page_size
    key = driver.tokens(first, 2 * size + second % size)
    key = key if len(key) >= 2 * size else [1] * 2 * size
    pages = list(range(size, size + len(key)))
    wrong: list[tuple[list[int], list[int]]] = [
        (key, pages[:-1]),
        (key, [*pages, 1]),
        (key, [slot - size for slot in pages]),
        (key, [slot % size + size for slot in pages]),
        ([2**31, *key[1:]], pages),
    ]
    if size > 1:
        wrong.append((key, [slot + 1 for slot in pages]))
        wrong.append((key, [pages[1], pages[0], *pages[2:]]))
    if not driver.shares:
        wrong = [(key, pages[:-1]), (key, [*pages, 1])]
    key, value = wrong[second % len(wrong)]
    driver.pair.refused(driver.pair.cache, "insert", key, driver.slots(value))
    return True


@_fault
def _insert_elsewhere(driver: Driver, first: int, second: int) -> bool:
    """A page that the tree already holds, at another place."""
    pages = driver.pair.cache.oracle.view().pages
    if not pages:
        return False
    size = driver.config.page_size
    page = list(pages.values())[first % len(pages)].page
    value = driver.slots(range(page * size, (page + 1) * size))
    key = [second % 5 - 100] * size
    driver.pair.refused(driver.pair.cache, "insert", key, value, extra_key="elsewhere")
    return True


@_fault
def _key(driver: Driver, first: int, second: int) -> bool:
    wrong: list[tuple[list[int], Any]] = [
        ([2**31], None),
        ([-(2**31) - 1], "a"),
        ([1], 1.5),
        ([1], ("a", [2])),
    ]
    key, extra_key = wrong[first % len(wrong)]
    driver.pair.refused(driver.pair.cache, "match_prefix", key, extra_key=extra_key)
    return True


@_fault
def _evict(driver: Driver, first: int, second: int) -> bool:
    if not driver.shares:
        return False
    driver.pair.refused(driver.pair.cache, "evict", -1 - first % 70)
    return True


@_fault
def _stale_handle(driver: Driver, first: int, second: int) -> bool:
    stale = driver.stale()
    if not stale:
        return False
    name = "dec_lock_ref" if second % 4 == 0 else "inc_lock_ref"
    driver.pair.refused(driver.pair.cache, name, driver.handles[stale[first % len(stale)]])
    driver.coverage.counts["stale handles"] += 1
    return True


@_fault
def _unlocked_node(driver: Driver, first: int, second: int) -> bool:
    """A handle that is live, and has no receipt."""
    resolve = driver.pair.cache.oracle.resolve
    locked = [receipt.path for receipt in driver.receipts]
    paths = [(handle, resolve(handle.oracle)) for handle in driver.handles]
    free = [handle for handle, path in paths if path is not None and path not in locked]
    if not free:
        return False
    driver.pair.refused(driver.pair.cache, "dec_lock_ref", free[first % len(free)])
    return True


@_fault
def _consumed_receipt(driver: Driver, first: int, second: int) -> bool:
    if not driver.consumed:
        return False
    receipt = driver.consumed[first % len(driver.consumed)]
    driver.pair.refused(driver.pair.cache, "dec_lock_ref", receipt)
    return True


@_fault
def _other_cache(driver: Driver, first: int, second: int) -> bool:
    """A handle or a receipt of another cache."""
    if not driver.shares:
        return False
    pair, size = driver.pair, driver.config.page_size
    key, value = [1] * size, list(range(size, 2 * size))
    given = pair.call(pair.other_cache, "insert", key, value).given
    node = Twin(*(result.last_device_node for result in given))
    if first % 2:
        pair.refused(pair.cache, "inc_lock_ref", node)
        return True
    receipt = pair.call(pair.other_cache, "inc_lock_ref", node).given
    pair.refused(pair.cache, "dec_lock_ref", receipt)
    pair.call(pair.other_cache, "dec_lock_ref", receipt)
    return True


@_fault
def _reset(driver: Driver, first: int, second: int) -> bool:
    if not driver.receipts:
        return False
    driver.pair.refused(driver.pair.cache, "reset")
    return True


# -- requests


def _fields(request: Request) -> tuple[Any, ...]:
    names = ("req_pool_idx", "last_node", "cache_protected_len", "lock_receipt")
    return (*(getattr(request, name) for name in names), request.prefix_indices.tolist())


def _wrong_attributes(driver: Driver, running: Running, first: int) -> dict[str, Any]:
    size, document, end = driver.config.page_size, running.document, running.allocated
    spent = driver.consumed[0] if driver.consumed else None
    protected = running.protected
    wrong: list[dict[str, Any]] = [
        {"fill_ids": [*document[:end], 1], "output_ids": [0] * (end - running.prompt + 2)},
        {"cache_protected_len": end // size * size + size},
        {"cache_protected_len": -size},
        {"req_pool_idx": None},
        {"req_pool_idx": driver.config.rows},
    ]
    if not driver.shares:
        wrong = [wrong[0], *wrong[-2:]]
    elif size > 1:
        wrong.append({"cache_protected_len": protected + 1})
    if protected:
        wrong.append({"lock_receipt": None})
        wrong.append({"cache_protected_len": protected - size})
        wrong.append({"fill_ids": document[: protected - 1], "req_pool_idx": None})
        if spent:
            wrong.append({"lock_receipt": spent})
    return wrong[first % len(wrong)]


@_fault
def _request(driver: Driver, first: int, second: int) -> bool:
    """A request whose attributes do not fit its row or its lock."""
    started = [one for one in driver.running if one.allocated >= one.prompt]
    if not started:
        return False
    one = started[second % len(started)]
    before = [_fields(request) for request in one.sides]
    name = ("cache_unfinished_req", "cache_finished_req")[first % 2]
    wrong = {"fill_ids": one.document[: one.allocated]}
    with one.posing(**{**wrong, **_wrong_attributes(driver, one, first // 2)}):
        driver.pair.refused(driver.pair.cache, name, one.sides)
    after = [_fields(request) for request in one.sides]
    driver.pair.compare("request after an illegal call", lambda side: after[side] == before[side])
    assert after == before
    return True


@_fault
def _early_finish(driver: Driver, first: int, second: int) -> bool:
    """A request that has not computed its prompt."""
    early = [one for one in driver.running if one.allocated < one.prompt]
    if not early:
        return False
    name = ("cache_unfinished_req", "cache_finished_req")[first % 2]
    one = early[second % len(early)]
    with one.posing(fill_ids=one.document[: one.prompt]):
        driver.pair.refused(driver.pair.cache, name, one.sides)
    return True
