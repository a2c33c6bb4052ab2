"""Radix caches with one clause broken each."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.radix_cache import RadixCacheConformance
from kvspec.errors import ContractError
from kvspec.interfaces.prefix_cache import InsertResult, LockReceipt, MatchResult
from kvspec.oracle import RadixCache
from kvspec.oracle.boundary import tensor
from kvspec.oracle.digest import mix
from kvspec.oracle.radix_cache import POLICIES, Claim, Page, Root
from kvspec.prefix_key import namespace_frame, unframe_namespace

registry = Registry(RadixCacheConformance, oracle)


class TellsOrphans(RadixCache):
    """A page without the one before it is a broken tree, and no accident of the test."""

    def view(self) -> Any:
        try:
            return super().view()
        except KeyError:
            raise AssertionError("RADIX-5: a page without the one before it") from None


# Match


@registry.mutant("RADIX-1", reports=("OV-3722",))
class ComparesASumInsteadOfTokens(RadixCache):
    def _walk(self, root: Root, pages: Any) -> list[Page]:
        path: list[Page] = []
        node: Page | Root = root
        for tokens in pages:
            found = [p for (at, t), p in self._tree.items() if at is node and sum(t) == sum(tokens)]
            if not found:
                break
            path.append(found[0])
            node = found[0]
        return path


@registry.mutant("RADIX-1")
class ForgetsTheLastPageOfALongMatch(RadixCache):
    def match_prefix(self, key: Any, *, extra_key: Any = None, touch: bool = True) -> MatchResult:
        found = super().match_prefix(key, extra_key=extra_key, touch=touch)
        if len(found.device_indices) > 2 * self.page_size and touch:
            return found._replace(device_indices=found.device_indices[: -self.page_size])
        return found


@registry.mutant("RADIX-1", reports=("SG-10637",))
class WalksTheTreeWithAKeyBelowAPage(RadixCache):
    def match_prefix(self, key: Any, *, extra_key: Any = None, touch: bool = True) -> MatchResult:
        found = super().match_prefix(key, extra_key=extra_key, touch=touch)
        if 0 < len(key) < self.page_size and self._tree:
            first = next(iter(self._tree.values()))
            return found._replace(device_indices=tensor(self._slots_in([first.number])))
        return found


@registry.mutant("RADIX-2", "RADIX-17", reports=("KT-2184",))
class DropsTheNamespace(RadixCache):
    def _parse(self, key: Any, extra_key: Any) -> tuple[list[int], bytes]:
        return super()._parse(key, extra_key)[0], b""


@registry.mutant("RADIX-2", reports=("VL-44701", "SEED-31"))
class ConcatenatesThePartsOfAName(RadixCache):
    def _parse(self, key: Any, extra_key: Any) -> tuple[list[int], bytes]:
        tokens, frame = super()._parse(key, extra_key)
        name = unframe_namespace(frame)
        if isinstance(name, tuple):
            frame = namespace_frame("".join(str(part) for part in name if part is not None))
        return tokens, frame


@registry.mutant("RADIX-3", "RADIX-13", reports=("SG-18843",))
class NeverCountsAHit(RadixCache):
    def _hit(self, path: Sequence[Page]) -> None:
        super()._hit(path)
        for page in path:
            page.hits = 0


@registry.mutant("RADIX-3", "RADIX-13", reports=("MINI-124",))
class LeavesTheUpperHalfOfASplitOld(RadixCache):
    def _hit(self, path: Sequence[Page]) -> None:
        before = [page.last for page in path]
        super()._hit(path)
        if path and any(page.before is path[-1] for page in self._tree.values()):
            for page, last in zip(path, before, strict=True):
                page.last = last


@registry.mutant("RADIX-3", "RADIX-13")
class SplitLosesHits(RadixCache):
    def _hit(self, path: Sequence[Page]) -> None:
        if path and any(page.before is path[-1] for page in self._tree.values()):
            for page in path:
                page.hits = 0
        super()._hit(path)


@registry.mutant("RADIX-3", "RADIX-13")
class SplitRenewsTheTimeOfBirth(RadixCache):
    def _hit(self, path: Sequence[Page]) -> None:
        super()._hit(path)
        if path and any(page.before is path[-1] for page in self._tree.values()):
            for page in path:
                page.born = self._tick


@registry.mutant("RADIX-3", reports=("SE-24",))
class TouchesWhenItMustNot(RadixCache):
    def match_prefix(self, key: Any, *, extra_key: Any = None, touch: bool = True) -> MatchResult:
        found = super().match_prefix(key, extra_key=extra_key)
        return found if touch else found._replace(last_device_node=None, last_host_node=None)


# Insert


@registry.mutant("RADIX-4", "RADIX-13")
class InsertCountsHits(RadixCache):
    def _adopt(self, claim: Claim, priority: int) -> Page | Root:
        for page in claim.resident:
            page.hits += 1
        return super()._adopt(claim, priority)


@registry.mutant("RADIX-4", "RADIX-13")
class InsertLowersAPriority(RadixCache):
    def _adopt(self, claim: Claim, priority: int) -> Page | Root:
        node = super()._adopt(claim, priority)
        for page in claim.resident:
            page.priority = priority
        return node


@registry.mutant("RADIX-4", "RADIX-13")
class InsertRenewsTheTimeOfBirth(RadixCache):
    def _adopt(self, claim: Claim, priority: int) -> Page | Root:
        node = super()._adopt(claim, priority)
        for page in claim.resident:
            page.born = self._tick
        return node


# Structure


@registry.mutant(
    *("RADIX-5", "RADIX-8", "RADIX-9", "RADIX-10", "RADIX-11", "RADIX-13", "RADIX-16"),
    reports=("TRT-13571",),
)
class EvictsPagesThatOthersExtend(TellsOrphans):
    def _victims(self, num_tokens: int) -> list[list[Page]]:
        runs = super()._victims(num_tokens)
        above = runs[0][0].before if len(runs) == 1 else None
        if isinstance(above, Page) and above not in self._locks:
            return [[above]]
        return runs


@registry.mutant("RADIX-6", "RADIX-7", "RADIX-8", "RADIX-11", "RADIX-16", reports=("SEED-7",))
class SplitDropsALock(TellsOrphans):
    def _adopt(self, claim: Claim, priority: int) -> Page | Root:
        node = super()._adopt(claim, priority)
        if len(claim.resident) < len(claim.pages) and claim.resident:
            self._locks.pop(claim.resident[-1], None)
        return node

    def _unlock(self, receipt: LockReceipt) -> list[Page]:
        path = self._path(self._open.pop(receipt))
        for page in path:
            count = self._locks.pop(page, 1) - 1
            if count:
                self._locks[page] = count
        return [page for page in path if page not in self._locks]


@registry.mutant("RADIX-6", "RADIX-7", "RADIX-8", "RADIX-11", "RADIX-16", reports=("INV-031",))
class LocksTheLastPageAlone(RadixCache):
    def _lock(self, node: Page | Root) -> Any:
        before = dict(self._locks)
        receipt = super()._lock(node)
        self._locks = before
        if isinstance(node, Page):
            self._locks[node] = before.get(node, 0) + 1
        return receipt

    def _unlock(self, receipt: LockReceipt) -> list[Page]:
        node = self._open.pop(receipt)
        if not isinstance(node, Page):
            return []
        self._locks[node] -= 1
        if not self._locks[node]:
            del self._locks[node]
        return [node]


@registry.mutant("RADIX-7", "RADIX-16", reports=("SG-10637",))
class CountsInWithOneLengthAndOutWithAnother(RadixCache):
    drift = 0

    def insert(self, key: Any, value: Any, **options: Any) -> InsertResult:
        result = super().insert(key, value, **options)
        self.drift += sum(stop - start for start, stop in result.tail)
        return result

    def evictable_size(self) -> int:
        return super().evictable_size() + self.drift


# Evict


@registry.mutant("RADIX-8", "RADIX-10", "RADIX-13", reports=("SE-23",))
class EvictsAWholeRunForOnePage(RadixCache):
    def _run(self, leaf: Page) -> list[Page]:
        run = super()._run(leaf)
        if self.eviction_granularity == "page" and isinstance(leaf.before, Page):
            siblings = sum(page.before is leaf.before for page in self._tree.values())
            if leaf.before not in self._locks and siblings == 1:
                return [leaf, leaf.before]
        return run


@registry.mutant("RADIX-8", "RADIX-9", "RADIX-11", "RADIX-16")
class StopsAtALockedLeaf(RadixCache):
    def _victims(self, num_tokens: int) -> list[list[Page]]:
        extended = {page.before for page in self._tree.values()}
        leaves = [page for page in self._tree.values() if page not in extended]
        if leaves and min(leaves, key=self._order) in self._locks:
            return []
        return super()._victims(num_tokens)


@registry.mutant("RADIX-8", "RADIX-10")
class RoundsTheAmountDown(RadixCache):
    def _victims(self, num_tokens: int) -> list[list[Page]]:
        return super()._victims(num_tokens // self.page_size * self.page_size)


class NeverEvictsALockedPage(TellsOrphans):
    """Keeps the next two from breaking RADIX-11 as well."""

    def _run(self, leaf: Page) -> list[Page]:
        return list(takewhile(lambda page: page not in self._locks, super()._run(leaf)))


@registry.mutant("RADIX-9", "RADIX-3")
class MatchCutsNothing(NeverEvictsALockedPage):
    def _hit(self, path: Sequence[Page]) -> None:
        cuts = [page.cut for page in path]
        super()._hit(path)
        for page, cut in zip(path, cuts, strict=True):
            page.cut = cut


@registry.mutant("RADIX-9", "RADIX-10")
class InsertCutsNothingWhereItLeaves(NeverEvictsALockedPage):
    def _adopt(self, claim: Claim, priority: int) -> Page | Root:
        cuts = [page.cut for page in claim.resident]
        node = super()._adopt(claim, priority)
        if len(claim.resident) < len(claim.pages):
            for page, cut in zip(claim.resident, cuts, strict=True):
                page.cut = cut
        return node


@registry.mutant("RADIX-10")
class GivesBackInOrderOfSlots(RadixCache):
    def _give_back(self, pages: Sequence[int]) -> None:
        super()._give_back(sorted(pages))


@registry.mutant("RADIX-10")
class KeepsTheSlotsItEvicted(RadixCache):
    def _give_back(self, pages: Sequence[int]) -> None:
        """Forgotten."""


@registry.mutant("RADIX-11", "RADIX-8", "RADIX-7", "RADIX-6", "RADIX-16", reports=("INV-033",))
class EvictsLockedPages(RadixCache):
    def _is_free_leaf(self, page: Page, extensions: Mapping[Page | Root, int]) -> bool:
        return not extensions[page]

    def evict(self, num_tokens: int) -> int:
        evicted = super().evict(num_tokens)
        gone = [page for page in self._locks if not self._is_live(page)]
        for page in gone:
            del self._locks[page]
        self._open = {r: n for r, n in self._open.items() if self._is_live(n)}
        return evicted


@registry.mutant("RADIX-12")
class TakesANegativeAmountForNothing(RadixCache):
    def evict(self, num_tokens: int) -> int:
        return super().evict(max(num_tokens, 0))


@registry.mutant("RADIX-13", reports=("TSP-248",))
class BreaksTiesByTheNumberOfThePage(RadixCache):
    def _order(self, page: Page) -> tuple[int, ...]:
        return (*super()._order(page)[:1], page.number)


@registry.mutant("RADIX-13", "RADIX-9", "RADIX-10")
class ProtectsOnlyAfterTheSecondHit(RadixCache):
    def _order(self, page: Page) -> tuple[int, ...]:
        if self.eviction_policy == "slru":
            return page.hits >= 2, page.last, page.born
        return super()._order(page)


@registry.mutant("RADIX-13", "RADIX-8", "RADIX-9", "RADIX-10", reports=("SG-22759",))
class EvictsTheMostRecentFirst(RadixCache):
    def _order(self, page: Page) -> tuple[int, ...]:
        key = super()._order(page)
        return tuple(-part for part in key) if self.eviction_policy == "lru" else key


@registry.mutant("RADIX-14")
class TakesAnUnknownPolicyForLru(RadixCache):
    def __init__(self, **options: Any) -> None:
        if options["eviction_policy"] not in POLICIES:
            options["eviction_policy"] = "lru"
        super().__init__(**options)


# Reading


@registry.mutant("RADIX-16")
class CriesWolf(RadixCache):
    def check(self) -> None:
        if any(isinstance(node, Root) for node in self._open.values()):
            raise ContractError("RADIX-6: an open receipt locks nothing")


@registry.mutant("RADIX-17")
class DigestHasTheSlotsInIt(RadixCache):
    def digest(self) -> int:
        return mix(super().digest(), *sorted(self._held))


@registry.mutant("RADIX-17")
class DigestHasNoReceipts(RadixCache):
    def digest(self) -> int:
        locks, receipts = self._locks, self._open
        self._locks, self._open = {}, {}
        digest = super().digest()
        self._locks, self._open = locks, receipts
        return digest


@registry.mutant("RADIX-17", "RADIX-2")
class DigestHasNoNamespaces(RadixCache):
    def _root(self, frame: bytes) -> Root:
        root = super()._root(frame)
        root.name = 1
        return root
