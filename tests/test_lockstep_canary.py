"""Does lockstep find what it is for? A planted difference is found soon, and its history is short.

Each canary stands in the place of the core: the oracle with one thing wrong, of the kind that a
fast implementation gets wrong.
"""

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import kvspec.oracle
from kvspec.conformance.lockstep import Failure, explore, reproducer, run, shrink
from kvspec.conformance.lockstep.__main__ import app
from kvspec.oracle import PagedTokenToKVPoolAllocator, RadixCache, TokenToKVPoolAllocator

MOST_OPERATIONS = 4000
EACH_SEED = 500
LONGEST_REPRODUCER = 15

canaries: list[SimpleNamespace] = []


def canary(*classes: type[Any]) -> None:
    """The oracle with these subclasses in the places of their bases."""
    names = {name: getattr(kvspec.oracle, name) for name in kvspec.oracle.__all__}
    changed = {class_.__bases__[0].__name__: class_ for class_ in classes}
    canaries.append(SimpleNamespace(**{**names, **changed, "__name__": classes[0].__name__}))


class FreeGoesToTheOtherEnd(TokenToKVPoolAllocator):
    """Of slots freed in one call, the last one comes first."""

    def _given_back(self, slots: list[int]) -> list[int]:
        return super()._given_back(slots)[::-1]


class PagesInOrderOfTheirNaming(PagedTokenToKVPoolAllocator):
    """Pages freed in one call are not sorted."""

    def _given_back(self, slots: list[int]) -> list[int]:
        super()._given_back(slots)
        return list(dict.fromkeys(slot // self.page_size for slot in slots))


class RefusedAllocMerges(PagedTokenToKVPoolAllocator):
    """An allocation that is refused has merged the release list already."""

    def _take(self, page_count: int) -> list[int] | None:
        if page_count > len(self.free_list) and self.release:
            self._merge()
        return super()._take(page_count)


class TieGoesToTheNewest(RadixCache):
    """Among leaves that were hit equally often, the one used last is evicted."""

    def _order(self, page: Any) -> tuple[int, ...]:
        first, *rest = super()._order(page)
        return (first, *(-number for number in rest))


class SplitLeaksALock(RadixCache):
    """A locked run that is left in its middle keeps one lock too many above."""

    def _adopt(self, claim: Any, priority: int) -> Any:
        if claim.resident and len(claim.resident) < len(claim.pages):
            above = claim.resident[-1]
            if any(page.before is above and page in self._locks for page in self._tree.values()):
                self._locks[above] += 1
        return super()._adopt(claim, priority)


class SplitLosesHits(RadixCache):
    """What lies below the place where a match left a run is counted anew."""

    def _hit(self, path: Any) -> None:
        super()._hit(path)
        below = [page for page in self._tree.values() if path and page.before is path[-1]]
        if len(below) == 1:
            below[0].hits = 0


class StaleHandleRevives(RadixCache):
    """A handle is live again when its path has been inserted again."""

    def _is_live(self, node: Any) -> bool:
        known = {page.name for page in self._tree.values()}
        return super()._is_live(node) or node.name in known


class ResetForgetsReceipts(RadixCache):
    """A reset while a receipt is open is carried out."""

    def reset(self) -> None:
        self._open.clear()
        self._locks.clear()
        super().reset()


class FreeIsReportedInPieces(TokenToKVPoolAllocator):
    """What is freed in one call is reported slot by slot."""

    def _report_moved(self, name: str, pages: Sequence[int]) -> None:
        for part in [[page] for page in pages] if name == "free" else [pages]:
            super()._report_moved(name, part)


class EvictFallsOver(RadixCache):
    """An empty tree is evicted from with an IndexError."""

    def evict(self, num_tokens: int) -> int:
        if not self._tree:
            raise IndexError("pop from empty heap")
        return super().evict(num_tokens)


canary(FreeGoesToTheOtherEnd)
canary(PagesInOrderOfTheirNaming)
canary(RefusedAllocMerges)
canary(TieGoesToTheNewest)
canary(SplitLeaksALock)
canary(SplitLosesHits)
canary(StaleHandleRevives)
canary(ResetForgetsReceipts)
canary(FreeIsReportedInPieces)
canary(EvictFallsOver)


def first_failure(broken: SimpleNamespace) -> Failure:
    """The first divergence, over short runs of the first seeds."""
    for seed in range(MOST_OPERATIONS // EACH_SEED):
        history = explore(seed, EACH_SEED, kvspec.oracle, broken)
        if history.failure:
            return history.failure
    raise AssertionError(f"{broken.__name__} survives {MOST_OPERATIONS} operations")


@pytest.mark.parametrize("broken", canaries, ids=lambda broken: broken.__name__)
def test_planted_difference_is_found_and_shrinks(broken: SimpleNamespace) -> None:
    failure = first_failure(broken)

    small = shrink(failure, kvspec.oracle, broken)

    assert len(small.operations) <= LONGEST_REPRODUCER, reproducer(small)
    assert run(small.config, small.operations, kvspec.oracle, kvspec.oracle) is None
    assert run(small.config, small.operations, kvspec.oracle, broken) is not None


def pasted(text: str, core: object) -> Callable[[], None]:
    """The test in a reproducer, with `core` for kvspec's own."""
    names: dict[str, Any] = {}
    exec(text, names)
    attributes = {**vars(core), "oracle": kvspec.oracle}
    names["kvspec"] = SimpleNamespace(**attributes)
    test: Callable[[], None] = next(names[name] for name in names if name.startswith("test_"))
    return test


def test_reproducer_can_be_pasted() -> None:
    broken = canaries[-1]
    text = reproducer(shrink(first_failure(broken), kvspec.oracle, broken))

    with pytest.raises(AssertionError, match="IndexError: pop from empty heap"):
        pasted(text, broken)()
    pasted(text, kvspec.oracle)()


def test_command_line_fails_with_a_reproducer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "canary", canaries[-1])

    options = ["--core", "canary", "--operations", "600", "--seeds", "0:2"]
    result = CliRunner().invoke(app, options)

    assert result.exit_code == 1
    assert "seed 0, operation" in result.output
    assert "def test_lockstep_seed_0() -> None:" in result.output
