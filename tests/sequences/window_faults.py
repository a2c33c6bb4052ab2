"""What was wrong with windows, planted into the oracle; added to the faults of sequences.faults."""

from collections.abc import Mapping
from typing import Any

import torch

from kvspec import oracle
from sequences.faults import registry

__all__ = ["registry"]

fault = registry.mutant


@fault("SWA-8", reports=("SG-25805", "SEED-25"))
class RemembersAPair(oracle.SWATokenToKVPoolAllocator):
    """A page that has lost its pair gives back the window page once more, whoever has it."""

    def free_swa(self, free_index: Any) -> None:
        lost = {int(slot) // self.page_size for slot in free_index}
        self.__dict__.setdefault("_stale", {}).update({page: self.pairs[page] for page in lost})
        super().free_swa(free_index)

    def free(self, free_index: Any, swa_index: Any = ()) -> None:
        stale = self.__dict__.get("_stale", {})
        windows = {stale.pop(int(slot) // self.page_size, 0) for slot in free_index} - {0}
        self.pairs = {page: pair for page, pair in self.pairs.items() if pair not in windows}
        super().free(free_index, swa_index)
        self.window._put_back(sorted(windows))


@fault("SWA-11", reports=("SG-38269",))
class TakesNoPairForTheSink(oracle.SWATokenToKVPoolAllocator):
    def free_swa(self, free_index: Any) -> None:
        pages = dict.fromkeys(int(slot) // self.page_size for slot in free_index)
        self.window._put_back([self.pairs.pop(page, 0) for page in pages])


@fault("SWA-10", reports=("SG-27586",))
class LeavesTheMapping(oracle.SWATokenToKVPoolAllocator):
    """When a tombstone is revived, the window page that it had is given back, whoever has it."""

    _stale: Mapping[int, int] = {}

    def free(self, free_index: Any, swa_index: Any = ()) -> None:
        left = {int(slot) // self.page_size for slot in swa_index}
        self._stale = {**self._stale, **{page: self.pairs[page] for page in left}}
        super().free(free_index, swa_index)

    def move_swa(self, tgt_loc: Any, src_loc: Any) -> None:
        super().move_swa(tgt_loc, src_loc)
        lost = {self._stale.get(int(slot) // self.page_size) for slot in tgt_loc}
        self.window._put_back([pair for pair in self.pairs.values() if pair in lost])
        self.pairs = {page: pair for page, pair in self.pairs.items() if pair not in lost}


@fault("SWA-20", reports=("VL-42273",))
class TranslatesAsItOnceDid(oracle.SWATokenToKVPoolAllocator):
    def translate_loc_from_full_to_swa(self, kv_indices: Any) -> torch.Tensor:
        windows = super().translate_loc_from_full_to_swa(kv_indices).tolist()
        known = self.__dict__.setdefault("_known", {})
        known.update((s, w) for s, w in zip(map(int, kv_indices), windows, strict=True) if w)
        return torch.tensor([known.get(int(slot), 0) for slot in kv_indices], dtype=torch.int32)


@fault("SWARADIX-2", reports=("SE-03",))
class RenewsWhatItFallsBackFrom(oracle.SWARadixCache):
    def _usable(self, path: list[Any]) -> list[Any]:
        for page in path:
            page.last = self._tick + 1
        return super()._usable(path)


@fault("SWARADIX-9", reports=("SEED-6",))
class LocksNoTombstone(oracle.SWARadixCache):
    """A revival takes the window lock that other receipts do not know of."""

    def _adopt(self, claim: Any, priority: int) -> Any:
        before = set(self._tombstones)
        node = super()._adopt(claim, priority)
        for page in before - self._tombstones:
            if page in self._locks:
                self._window_locks[page] = self._window_locks.get(page, 0) + 1
        return node


@fault("CACHE-19", reports=("SEED-3", "SG-40681"))
class KeepsWhatTheNextTokenReads(oracle.SWARadixCache):
    """And not what a match of what is cached asks for."""

    def _first_read(self, prelen: int, chunk_size: Any, window_size: Any) -> int:
        if chunk_size is None and window_size is None:
            window_size = self.sliding_window_size
        return super(oracle.SWARadixCache, self)._first_read(prelen, chunk_size, window_size)


@fault("CACHE-19", reports=("SG-27789",))
class LeavesThePageAtTheEdge(oracle.SWARadixCache):
    def _first_read(self, *sizes: Any) -> int:
        return super()._first_read(*sizes) + 2 * self.page_size


@fault("SWARADIX-14", reports=("FKV-195",))
class KeepsTheOrderOfBirth(oracle.SWARadixCache):
    def _window_order(self, page: Any) -> tuple[int, int]:
        return page.born, len(self._path(page))


@fault("SWARADIX-7", reports=("FKV-195",))
class UncoversTombstones(oracle.SWARadixCache):
    def _victims(self, full_num_tokens: int, swa_num_tokens: int) -> Any:
        eviction = super()._victims(full_num_tokens, swa_num_tokens)
        eviction.gone = [page for page in eviction.gone if page not in self._tombstones]
        return eviction


@fault("SWARADIX-14", reports=("SG-35515",))
class TakesTheEndOfABranchFirst(oracle.SWARadixCache):
    def _window_order(self, page: Any) -> tuple[int, int]:
        extended = any(page is other.before for other in self._tree.values())
        return (page.last, -len(self._path(page)) if extended else 0)


@fault("SWARADIX-5", reports=("JAX-989",))
class RevivesAllOrNothing(oracle.SWARadixCache):
    def _revivals(self, claim: Any) -> list[tuple[int, int]]:
        dead = [page for page in claim.resident if page in self._tombstones]
        revivals = super()._revivals(claim)
        return revivals if len(revivals) == len(dead) else []
