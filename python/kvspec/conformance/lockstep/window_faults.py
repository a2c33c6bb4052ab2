"""Illegal calls of a client with a window pool, besides those of `faults`."""

from typing import Any

from kvspec.conformance.lockstep.driver import Driver
from kvspec.conformance.lockstep.faults import Fault, fault_of

__all__ = ["OF_A_TREE", "WINDOW_FAULTS"]

WINDOW_FAULTS: dict[str, Fault] = {}
OF_A_TREE = frozenset(
    {
        *("insert_elsewhere", "evict", "evict_window", "stale_handle", "handle_without_window"),
        *("unlocked_node", "consumed_receipt", "other_cache", "reset"),
    }
)
"""Faults that cannot be made where nothing is shared."""


def _pages_of_kinds(driver: Driver) -> tuple[list[int], list[int], list[int]]:
    """Pages that are not held, pages with a pair and held pages without one."""
    view = driver.pair.allocator.oracle.view()
    absent = [0, -1, driver.config.page_count + 1, *view.free, *view.release, *view.pending]
    paired = [page for page, _ in view.pairs]
    return absent, paired, sorted(view.held - {*paired})


def _slots(driver: Driver, pages: list[int], offset: int) -> Any:
    size = driver.config.page_size
    return driver.slots([page * size + offset % size for page in pages])


@fault_of(WINDOW_FAULTS)
def _free_swa(driver: Driver, first: int, second: int) -> bool:
    """Pages that are not held or have no pair, alone or after one that has."""
    absent, paired, bare = _pages_of_kinds(driver)
    wrong = bare if bare and second % 2 else absent
    named = [*paired[: first % 3], wrong[first % len(wrong)]]
    driver.pair.refused(driver.pair.allocator, "free_swa", _slots(driver, named, second))
    return True


@fault_of(WINDOW_FAULTS)
def _free_swa_twice(driver: Driver, first: int, second: int) -> bool:
    """A slot twice in one call, or in two."""
    _, paired, _ = _pages_of_kinds(driver)
    reserved = [page for page in driver.reserved if page in paired]
    if second % 2 and reserved:
        pages = reserved[:1]
        driver.allocator("free_swa", _slots(driver, pages, first))
        driver.pair.compare_states()
    elif driver.config.page_size == 1 and paired:
        pages = [paired[first % len(paired)]] * 2
    else:
        return False
    driver.pair.refused(driver.pair.allocator, "free_swa", _slots(driver, pages, second))
    return True


@fault_of(WINDOW_FAULTS)
def _free_overlapping(driver: Driver, first: int, second: int) -> bool:
    """A page in both lists of `free`; a pair that is not there; one page that is not held."""
    absent, paired, bare = _pages_of_kinds(driver)
    if not paired:
        return False
    page, other = paired[first % len(paired)], paired[second % len(paired)]
    wrong = [([page, *bare[:1]], [page]), ([page], [absent[second % len(absent)]])]
    if page != other:
        wrong += [([page], [other, page]), ([absent[first % len(absent)]], [other])]
    if bare:
        wrong += [([page], bare[:1]), ([], [other, bare[-1]])]
    lists = wrong[(first + second) % len(wrong)]
    given = [_slots(driver, pages, second) for pages in lists]
    driver.pair.refused(driver.pair.allocator, "free", *given)
    return True


@fault_of(WINDOW_FAULTS)
def _move(driver: Driver, first: int, second: int) -> bool:
    """Unequal lists, targets with a pair, sources without, pages twice and pages not held."""
    absent, paired, bare = _pages_of_kinds(driver)
    gone = absent[second % len(absent)]
    wrong: list[tuple[list[int], list[int]]] = [([gone], paired[:1]), (bare[:1], [gone])]
    if paired:
        wrong += [(paired[-1:], paired[:1]), ([], paired[:1])]
    if bare:
        wrong += [(bare[:1], bare[-1:]), (bare[:1], [])]
    if paired and bare:
        wrong += [(bare[:1] * 2, paired[:2]), (bare[:2], paired[:1] * 2)]
    lists = wrong[first % len(wrong)]
    given = [_slots(driver, pages, second) for pages in lists]
    driver.pair.refused(driver.pair.allocator, "move_swa", *given)
    return True


@fault_of(WINDOW_FAULTS)
def _translate(driver: Driver, first: int, second: int) -> bool:
    end = (driver.config.page_count + 1) * driver.config.page_size
    slot = -2 - first % 9 if second % 2 else end + first % 9
    slots = driver.slots([-1, slot])
    driver.pair.refused(driver.pair.allocator, "translate_loc_from_full_to_swa", slots)
    return True


@fault_of(WINDOW_FAULTS)
def _continue_bare(driver: Driver, first: int, second: int) -> bool:
    """A request that continues a page without a pair."""
    size, (_, _, bare) = driver.config.page_size, _pages_of_kinds(driver)
    if not bare or size == 1:
        return False
    length = 1 + second % (size - 1)
    last = bare[first % len(bare)] * size + length - 1
    if first % 2:
        lists = map(driver.slots, ([length + 1], [last]))
        driver.pair.refused(driver.pair.allocator, "alloc_decode", *lists)
    else:
        lists = map(driver.slots, ([length], [length + 2], [last]))
        driver.pair.refused(driver.pair.allocator, "alloc_extend", *lists, 2)
    return True


@fault_of(WINDOW_FAULTS)
def _restore_after_window(driver: Driver, first: int, second: int) -> bool:
    """A ticket from before a `free_swa` or a `move_swa`."""
    _, paired, _ = _pages_of_kinds(driver)
    reserved = [page for page in driver.reserved if page in paired]
    bare = [page for page in driver.reserved if page not in paired]
    if not reserved:
        return False
    ticket = driver.allocator("backup_state").given
    if bare and first % 2:
        lists = _slots(driver, bare[:1], second), _slots(driver, reserved[:1], second)
        driver.allocator("move_swa", *lists)
    else:
        driver.allocator("free_swa", _slots(driver, reserved[:1], second))
    driver.pair.compare_states()
    driver.pair.refused(driver.pair.allocator, "restore_state", ticket)
    return True


@fault_of(WINDOW_FAULTS)
def _handle_without_window(driver: Driver, first: int, second: int) -> bool:
    """A lock of a live handle that a match would not give any more."""
    resolve = driver.pair.cache.oracle.resolve
    paths = [(handle, resolve(handle.oracle)) for handle in driver.handles]
    dead = [one for one, path in paths if path is not None and not driver.lockable(path)]
    if not dead:
        return False
    driver.pair.refused(driver.pair.cache, "inc_lock_ref", dead[first % len(dead)])
    driver.coverage.counts["handles without window"] += 1
    return True


@fault_of(WINDOW_FAULTS)
def _evict_window(driver: Driver, first: int, second: int) -> bool:
    """Less than nothing, of one pool or of both."""
    if driver.config.memory == "swachunk":
        return False
    numbers = [(-1 - first % 70, second % 9), (second % 9, -1 - first % 70), (-1, -1)]
    driver.pair.refused(driver.pair.cache, "evict", *numbers[second % 3])
    return True


@fault_of(WINDOW_FAULTS)
def _evict_swa(driver: Driver, first: int, second: int) -> bool:
    """A `prelen` beyond the row or below 0, two sizes, none, or one that is not positive."""
    if not driver.running:
        return False
    one, window = driver.running[second % len(driver.running)], driver.config.window
    length, width = one.allocated, {"sliding_window_size": window}
    wrong: list[tuple[int, dict[str, int]]] = [
        (length + 1 + second % 9, width),
        (-1 - second % 9, width),
        (length, {"attention_chunk_size": window, **width}),
        (length, {"attention_chunk_size": -(second % 3)}),
        (length, {"sliding_window_size": -(second % 3)}),
        (length + 1, {"attention_chunk_size": 1}),
    ]
    if driver.config.memory == "swachunk":
        wrong.append((length, {}))
    prelen, named = wrong[first % len(wrong)]
    driver.pair.refused(driver.pair.cache, "evict_swa", one.sides, prelen, **named)
    return True


@fault_of(WINDOW_FAULTS)
def _evict_swa_without_row(driver: Driver, first: int, second: int) -> bool:
    """A request that has given its row back, or never had one."""
    if not driver.running:
        return False
    one = driver.running[second % len(driver.running)]
    free = driver.pair.rows.oracle.free_slots
    with one.posing(req_pool_idx=free[0] if free and first % 2 else None):
        width = {"sliding_window_size": driver.config.window}
        driver.pair.refused(driver.pair.cache, "evict_swa", one.sides, 0, **width)
    return True
