"""Making a history up, repeating it, and shrinking one that diverges."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvspec.conformance.lockstep.config import NAMESPACES, Config, Operation, configuration
from kvspec.conformance.lockstep.driver import Driver
from kvspec.conformance.lockstep.faults import FAULTS, commit_fault
from kvspec.conformance.lockstep.pair import Divergence
from kvspec.conformance.lockstep.window_faults import OF_A_TREE, WINDOW_FAULTS
from kvspec.conformance.lockstep.windows import WindowDriver

__all__ = ["Failure", "History", "explore", "reproducer", "run", "shrink"]

VIEWS_EVERY = 1000
_ANY = 1 << 16


class Failure(NamedTuple):
    """A history that diverges, and where."""

    seed: int
    config: Config
    step: int
    operations: list[Operation]
    divergence: Divergence


class History(NamedTuple):
    """What a seed led to."""

    seed: int
    operations: list[Operation]
    counts: Counter[str]
    messages: dict[str, tuple[str, str]]
    failure: Failure | None

    @property
    def operation_count(self) -> int:
        """How many operations were made up."""
        return len(self.operations)


def client(config: Config, oracle: Any, core: Any) -> Driver:
    """The driver for a kind of memory."""
    return (WindowDriver if config.windowed else Driver)(config, oracle, core)


def apply(driver: Driver, operation: Operation) -> None:
    """Carry out one operation, legal or not, and compare."""
    if operation[0] == "fault":
        _, name, first, second = operation
        fault = {**FAULTS, **WINDOW_FAULTS}[str(name)]
        commit_fault(driver, fault, int(first), int(second))
    else:
        driver.apply(operation)
    driver.compare()


class _Imagination:
    """Makes operations up, with an eye on what the driver could do with them."""

    illegal = 0.13
    """Somewhat above one in ten: some have nothing to be illegal with."""
    hot_count = 4
    """How many documents are popular."""
    other = 0.6
    """How often a document goes on differently."""
    shortness = 1.7
    """The higher, the fewer long ones."""
    home = 4
    """How much of what happens is in the first namespace, against once in each other."""

    def __init__(self, seed: int, config: Config) -> None:
        self.rng, self.config = random.Random(f"operations of {seed}"), config
        self.hot = [
            self.rng.randrange(config.symbols**config.request_pages) for _ in range(self.hot_count)
        ]

    def document(self) -> int:
        """A document that begins as a popular one does, and often goes on differently."""
        document, symbols = self.rng.choice(self.hot), self.config.symbols
        if self.rng.random() < self.other:
            place = symbols ** self.rng.randrange(self.config.request_pages)
            rest = self.rng.randrange(symbols**self.config.request_pages)
            document = document % place + rest // place * place
        return document

    def length(self) -> int:
        """Mostly few pages, sometimes the largest; whole pages or not."""
        page_size, pages = self.config.page_size, self.config.request_pages
        if self.rng.random() < 0.06:
            return pages * page_size
        length = 1 + int(pages * self.rng.random() ** self.shortness)
        return length * page_size - self.rng.choice((0, 0, self.rng.randrange(page_size)))

    def path(self) -> tuple[int, int, int]:
        namespace = self.rng.choice((*[0] * self.home, *range(1, len(NAMESPACES))))
        return self.document(), self.length(), namespace

    def any(self) -> int:
        return self.rng.randrange(_ANY)

    def chance(self, probability: float) -> int:
        return int(self.rng.random() < probability)

    def operation(self, driver: Driver) -> Operation:
        """The next operation: one in ten illegal."""
        if self.rng.random() < self.illegal:
            names = self._faults()
            return "fault", self.rng.choice(names), self.any(), self.any()
        weights = self._weights(driver)
        (name,) = self.rng.choices(list(weights), list(weights.values()))
        make: Callable[[], tuple[int, ...]] = getattr(self, f"_{name}")
        return name, *make()

    def _faults(self) -> list[str]:
        return [*FAULTS, *["stale_handle"] * 3]

    def _weights(self, driver: Driver) -> dict[str, float]:
        running, unstarted = driver.running, any(r.allocated < r.prompt for r in driver.running)
        raw = len(driver.receipts) - sum(receipt.running is not None for receipt in driver.receipts)
        return {
            "admit": 14 if len(running) < self.config.rows else 1,
            "extend": 22 if unstarted else 0,
            "decode": 8 if running else 0,
            "cache": 3 if running else 0,
            "finish": 6 if running else 0,
            "abort": 3 if running else 0,
            "match": 13,
            "insert": 12,
            "lock": 4 if raw < 3 else 1,
            "unlock": 8 if raw else 0,
            "unlock_node": 4 if raw else 0,
            "evict": 5,
            "flush": 0.25,
            "take": 3 if len(driver.reserved) < 2 else 0.3,
            "give": 5 if driver.reserved else 0,
            "group": 20 if driver.group else 4,
            "restore": 3,
        }

    def _admit(self) -> tuple[int, ...]:
        return *self.path(), self.chance(0.5)

    def _extend(self) -> tuple[int, ...]:
        pages = self.rng.choice((1, 2, 2, 4))
        length = self.rng.randrange(pages * self.config.page_size)
        return self.any(), self.chance(0.3), length, self.chance(0.8), self.chance(0.8)

    def _decode(self) -> tuple[int, ...]:
        return self.any(), self.rng.randrange(3), self.chance(0.8), self.chance(0.8)

    def _cache(self) -> tuple[int, ...]:
        return self.any(), self.any()

    def _finish(self) -> tuple[int, ...]:
        return self.any(), self.chance(0.4)

    def _abort(self) -> tuple[int, ...]:
        return self.any(), self.rng.randrange(6), self.chance(0.4)

    def _match(self) -> tuple[int, ...]:
        return *self.path(), self.chance(0.75)

    def _insert(self) -> tuple[int, ...]:
        return *self.path(), self.chance(0.4), self.rng.randrange(-1, 3)

    def _lock(self) -> tuple[int, ...]:
        return (self.any(),)

    _unlock = _unlock_node = _lock

    def _evict(self) -> tuple[int, ...]:
        page_size = self.config.page_size
        return (self.rng.choice((0, 1, page_size, self.rng.randrange(4 * page_size))),)

    def _flush(self) -> tuple[int, ...]:
        return self.chance(0.5), self.any()

    def _take(self) -> tuple[int, ...]:
        return (self.rng.choice((0, 1, 1, 2, 99)),)

    def _give(self) -> tuple[int, ...]:
        return self.rng.randrange(4), self.any()

    def _group(self) -> tuple[int, ...]:
        return ()

    def _restore(self) -> tuple[int, ...]:
        length = self.rng.randrange(2 * self.config.page_size)
        return self.rng.randrange(1, 4), self.rng.randrange(3), length


class _WindowImagination(_Imagination):
    """Also makes up what a client with a window pool does, with longer paths that meet more."""

    illegal, hot_count, other, shortness, home = 0.16, 2, 0.3, 1.1, 20

    def _faults(self) -> list[str]:
        names = [*super()._faults(), *WINDOW_FAULTS, *["handle_without_window"] * 6]
        return names if self.config.memory == "swa" else [n for n in names if n not in OF_A_TREE]

    def _weights(self, driver: Driver) -> dict[str, float]:
        assert isinstance(driver, WindowDriver)
        paired, starved = len(driver.paired()), 2.5 if driver.starved else 1
        weights = super()._weights(driver)
        weights |= {
            "extend": weights["extend"] * 1.4,
            "finish": 5 * starved if driver.running else 0,
            "leave": 12 * starved if driver.running else 0,
            "resume": 8 if driver.retracted else 0,
            "abort": 2.5 * starved if driver.running else 0,
            "insert": 15,
            "evict": 7 * starved,
            "take": 5 if len(driver.reserved) < 4 else 0.3,
            "give": 2 * starved if driver.reserved else 0,
            "drop": 7 if paired > 1 else 0.3,
            "move": 12 if 0 < paired < len(driver.reserved) else 0.3,
            "translate": 2,
        }
        return weights if driver.shares else weights | {"insert": 3, "match": 3, "lock": 0.3}

    def _extend(self) -> tuple[int, ...]:
        return *super()._extend()[:-1], self.chance(0.25)

    def _leave(self) -> tuple[int, ...]:
        back = self.rng.choice((0, 0, 0, 1, self.config.page_size, self.rng.randrange(9)))
        window = self.rng.choice((0, 0, self.config.window, 1 + self.rng.randrange(9)))
        chunk = self.rng.choice((self.config.window, 1 + self.rng.randrange(9)))
        return self.any(), back, window, chunk * self.chance(0.5)

    def _resume(self) -> tuple[int, ...]:
        return self.any(), self.chance(0.5)

    def _insert(self) -> tuple[int, ...]:
        left = self.rng.choice((0, 0, 1, 3, self.any())) if self.config.memory == "swa" else 0
        return *super()._insert(), left

    def _evict(self) -> tuple[int, ...]:
        page_size = self.config.page_size
        window = self.rng.choice((1, page_size, self.rng.randrange(4 * page_size)))
        full = super()._evict()[0] * self.chance(0.3)
        return full, window * self.chance(0.8)

    def _give(self) -> tuple[int, ...]:
        return *super()._give(), self.rng.randrange(3)

    def _drop(self) -> tuple[int, ...]:
        return self.rng.randrange(1, 4), self.any()

    _move = _drop

    def _translate(self) -> tuple[int, ...]:
        return self.any(), self.rng.randrange(3 * self.config.page_size)


def explore(
    seed: int, operation_count: int, oracle: Any, core: Any, config: Config | None = None
) -> History:
    """Make a history up from a seed and carry it out, until it diverges or is long enough."""
    config = config or configuration(seed)
    imagination = (_WindowImagination if config.windowed else _Imagination)(seed, config)
    operations = list[Operation]()
    driver: Driver | None = None
    failure = None
    try:
        driver = client(config, oracle, core)
        for index in range(operation_count):
            operations.append(imagination.operation(driver))
            apply(driver, operations[-1])
            if (index + 1) % VIEWS_EVERY == 0:
                driver.compare_views()
        driver.compare_views()
    except Divergence as divergence:
        failure = Failure(seed, config, len(operations) - 1, operations, divergence)
    counts = driver.coverage.counts if driver else Counter[str]()
    messages = driver.pair.messages if driver else {}
    return History(seed, operations, counts, messages, failure)


def run(
    config: Config, operations: Sequence[Operation], oracle: Any, core: Any
) -> Divergence | None:
    """Carry out a history as it is written; the divergence, if there is one."""
    try:
        driver = client(config, oracle, core)
        for operation in operations:
            apply(driver, operation)
        driver.compare_views()
    except Divergence as divergence:
        return divergence
    return None


def shrink(failure: Failure, oracle: Any, core: Any) -> Failure:
    """A shorter history that diverges as well: fewer operations first, then smaller numbers."""

    def fails(operations: Sequence[Operation]) -> Divergence | None:
        return run(failure.config, operations, oracle, core)

    operations = _fewer(failure.operations, fails)
    operations = _fewer(_smaller(operations, fails), fails)
    divergence = fails(operations)
    if divergence is None:
        return failure
    return failure._replace(step=len(operations) - 1, operations=operations, divergence=divergence)


def _fewer(
    operations: list[Operation], fails: Callable[[Sequence[Operation]], Divergence | None]
) -> list[Operation]:
    """Leave out ever smaller stretches, from the end, as long as it still diverges."""
    stretch = max(len(operations) // 2, 1)
    while True:
        stop, shorter = len(operations), False
        while stop > 0:
            start = max(stop - stretch, 0)
            rest = operations[:start] + operations[stop:]
            if fails(rest) is not None:
                operations, shorter = rest, True
            stop = start
        if stretch == 1 and not shorter:
            return operations
        stretch = max(stretch // 2, 1)


def _smaller(
    operations: list[Operation], fails: Callable[[Sequence[Operation]], Divergence | None]
) -> list[Operation]:
    """Make each number smaller, as long as it still diverges."""
    for index, operation in enumerate(operations):
        for place, number in enumerate(operation):
            if isinstance(number, str):
                continue
            for less in (0, 1, *range(2, 8), number % 16, number // 256):
                changed = list(operations[index])
                if abs(less) >= abs(number):
                    continue
                changed[place] = less
                trial = [*operations[:index], tuple(changed), *operations[index + 1 :]]
                if fails(trial) is not None:
                    operations = trial
                    break
    return operations


def reproducer(failure: Failure) -> str:
    """A test that a person can paste."""
    lines = "\n".join(f"        {operation!r}," for operation in failure.operations)
    return f"""import kvspec
from kvspec.conformance.lockstep import Config, run


def test_lockstep_seed_{failure.seed}() -> None:
    config = {failure.config!r}
    operations = [
{lines}
    ]
    divergence = run(config, operations, kvspec.oracle, kvspec)
    assert divergence is None, divergence
"""
