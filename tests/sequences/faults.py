"""What was wrong, planted into the oracle: each fault must be seen by the sequences of its reports.

A fault is declared with the clause that it breaks and what it stands for; every sequence with that
clause and one of those ids has to fail on it.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from kvspec import oracle
from kvspec.conformance.mutants import Registry
from kvspec.errors import ContractError, MemoryLeakError
from sequences import Sequences

__all__ = ["registry"]

registry = Registry(Sequences, oracle)
fault = registry.mutant

# ------------------------------------------------------------------------- allocators and rows


@fault("PAGE-10", reports=("SG-38941", "SEED-13", "SE-11", "VL-3347", "SG-38269", "UCM-1053"))
class FreesWhatItDoesNotHold(oracle.PagedTokenToKVPoolAllocator):
    def _unheld(self, page: int, held: frozenset[int]) -> str:
        return ""


@fault("PAGE-9", reports=("VL-42571", "VL-3347", "SEED-14"))
class CountsOccurrences(oracle.PagedTokenToKVPoolAllocator):
    def _given_back(self, slots: list[int]) -> list[int]:
        return sorted(slot // self.page_size for slot in slots)


@fault("PAGE-9", reports=("SEED-11", "SG-7112"))
class FreesThePageBefore(oracle.PagedTokenToKVPoolAllocator):
    def _given_back(self, slots: list[int]) -> list[int]:
        pages = {slot // self.page_size for slot in slots}
        return sorted(pages | {page - 1 for page in pages} & self.held)


@fault("SLOT-5", reports=("VL-42571", "UCM-1053", "SEED-14", "SE-12", "SG-40305", "JAX-982"))
class FreesBlindly(oracle.TokenToKVPoolAllocator):
    def _given_back(self, slots: list[int]) -> list[int]:
        return slots


@fault("PAGE-2", reports=("KVC-398", "SG-38269"))
class HandsOutTheSinkPage(oracle.PagedTokenToKVPoolAllocator):
    def _start(self) -> None:
        super()._start()
        self.free_list = list(range(self.page_count))


@fault("SLOT-1", reports=("KVC-398",))
class HandsOutTheSinkSlot(oracle.TokenToKVPoolAllocator):
    def _start(self) -> None:
        super()._start()
        self.free_list = list(range(self.page_count))


@fault("SLOT-7", reports=("VL-48489",))
class ReversesAGroup(oracle.TokenToKVPoolAllocator):
    def free_group_end(self) -> None:
        self.pending.reverse()
        super().free_group_end()


@fault("PAGE-11", reports=("SE-20", "VL-48489"))
class KeepsTheOrderOfCalls(oracle.PagedTokenToKVPoolAllocator):
    def _in_order(self, pages: Iterable[int]) -> list[int]:
        return list(pages)


@fault("PAGE-12", reports=("SE-20",))
class NestsGroups(oracle.PagedTokenToKVPoolAllocator):
    def free_group_begin(self) -> None:
        self.pending, self.group = [], True


@fault("PAGE-15", reports=("SE-20",))
class RestoresAfterAFree(oracle.PagedTokenToKVPoolAllocator):
    def restore_state(self, state: Any) -> None:
        super().restore_state(state._replace(epoch=self._epoch))


@fault("SLOT-4", reports=("SE-12",))
class TakesAllButTheLast(oracle.TokenToKVPoolAllocator):
    def alloc(self, need_size: int) -> torch.Tensor | None:
        if need_size < 0:
            return torch.tensor(self.free_list[:need_size])
        return super().alloc(need_size)


@fault("PAGE-5", reports=("SE-13",))
class RoundsDown(oracle.PagedTokenToKVPoolAllocator):
    def alloc(self, need_size: int) -> torch.Tensor | None:
        return super().alloc(need_size - need_size % self.page_size)


@fault("PAGE-4", reports=("SE-14", "SG-33794"))
class PromisesWhatItLacks(oracle.PagedTokenToKVPoolAllocator):
    def _take(self, page_count: int) -> list[int] | None:
        lacking = max(page_count - len(self.free_list), 0)
        return (super()._take(page_count - lacking) or []) + [1] * lacking


@fault("REQ-7", reports=("SG-26972", "SEED-12"))
class ClampsToTheRow(oracle.ReqToTokenPool):
    def write(self, indices: Any, values: Any) -> None:
        row, place = indices
        stop = min(place.stop, self.max_context_len)
        super().write((row, slice(place.start, stop)), values[: stop - place.start])


@fault("REQ-8", reports=("VL-42273",))
class SendsAPositionOnce(oracle.ReqToTokenPool):
    _known: frozenset[tuple[int, int]] = frozenset()

    def _send(self) -> int:
        self._unsent -= self._known
        self._known |= self._unsent
        return super()._send()


# ------------------------------------------------------------------------- requests


@fault("CACHE-2", reports=("SEED-2", "MINI-142", "SE-01"))
class KeepsTheOldRow(oracle.RadixCache):
    def _rewrite(self, *_: Any) -> None:
        """Leave the duplicates in the row."""


@fault("CACHE-2", reports=("SG-1858",))
class KeepsTheOldLock(oracle.RadixCache):
    def cache_unfinished_req(self, req: Any) -> None:
        if req.lock_receipt is not None:
            self.inc_lock_ref(req.lock_receipt.node)
        super().cache_unfinished_req(req)


@fault("CACHE-2", reports=("SG-40681",))
class CachesOnePairLess(oracle.RadixCache):
    def cache_unfinished_req(self, req: Any) -> None:
        req.fill_ids = req.fill_ids[:-1]
        super().cache_unfinished_req(req)


@fault("CACHE-4", reports=("JAX-1147", "SG-31616"))
class ForgetsWhatWasDrafted(oracle.RadixCache):
    def _private(self, req: Any, committed: list[int]) -> Any:
        row, frame = super()._private(req, committed)
        return row._replace(slots=row.slots[: len(row.tokens)]), frame


@fault("CACHE-4", reports=("SG-24745",))
class CachesTheSampledToken(oracle.RadixCache):
    def cache_finished_req(self, req: Any) -> None:
        req.output_ids = [*req.output_ids, 0]
        super().cache_finished_req(req)


@fault("CACHE-4", reports=("SG-10871",))
class ForgetsTheRow(oracle.RadixCache):
    def _dismiss(self, req: Any) -> None:
        req.req_pool_idx = None
        super()._dismiss(req)


@fault("CACHE-4", reports=("SG-37494",))
class UnlocksWhatWasNeverLocked(oracle.RadixCache):
    def cache_finished_req(self, req: Any) -> None:
        self._open_receipt(req.lock_receipt)
        super().cache_finished_req(req)


@fault("CACHE-5", reports=("JAX-971", "SEED-9", "SG-29471", "SG-28754"))
class PassesOverBadRequests(oracle.RadixCache):
    def cache_finished_req(self, req: Any) -> None:
        with suppress(ContractError):
            super().cache_finished_req(req)

    def cache_unfinished_req(self, req: Any) -> None:
        with suppress(ContractError):
            super().cache_unfinished_req(req)


@fault("RADIX-11", reports=("TRT-17926", "SEED-26", "SEED-40", "LMC-3130", "TRT-12542"))
class EvictsWhatIsLocked(oracle.RadixCache):
    def _is_free_leaf(self, page: Any, extensions: Mapping[Any, int]) -> bool:
        return not extensions[page]


@fault("CACHE-7", reports=("TRT-17926",))
class LetsCallsIn(oracle.RadixCache):
    def _guard(self, name: str) -> None:
        """Let everything in."""


@fault("OBS-1", reports=("SG-26387",))
class ReportsNothing(oracle.RadixCache):
    def _report(self, name: str, slots: Sequence[int] = ()) -> None:
        """Report nothing."""


# ------------------------------------------------------------------------- sharing and keys


@fault("CACHE-18", reports=("VLA-2083",))
class RemembersWhenDisabled(oracle.RadixCache):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": False})


@fault("CHUNK-2", reports=("SE-25",))
class FreesAllButTheLast(oracle.ChunkCache):
    def _row(self, req: Any, tokens: list[int]) -> Any:
        row = super()._row(req, tokens)
        return row._replace(slots=row.slots[: len(req.origin_input_ids) + len(req.output_ids) - 1])


@fault("CHUNK-1", reports=("SE-19",))
class GivesTheRowItself(oracle.ChunkCache):
    def cache_unfinished_req(self, req: Any) -> None:
        super().cache_unfinished_req(req)
        pool: Any = self.req_to_token_pool
        req.prefix_indices = pool.req_to_token[req.req_pool_idx, : len(req.fill_ids)]


@fault("CHUNK-3", reports=("SE-19",))
class FindsSomething(oracle.ChunkCache):
    def match_prefix(self, key: Any, **options: Any) -> Any:
        return super().match_prefix(key, **options)._replace(device_indices=torch.tensor([1]))


@fault("RADIX-2", reports=("KT-2184", "MILES-2783", "VL-42495", "SEED-31", "SE-18"))
class DropsTheNamespace(oracle.RadixCache):
    def _parse(self, key: Any, extra_key: Any) -> tuple[list[int], bytes]:
        return super()._parse(key, None)


@fault("CACHE-15", reports=("LMD-4917",))
class ResetsNothing(oracle.RadixCache):
    def reset(self) -> None:
        """Keep everything."""


@fault("KEY-2", replaces="namespace_frame", reports=("VL-44701", "SE-18", "SEED-31"))
def joined_names(extra_key: Any) -> bytes:
    parts = extra_key if isinstance(extra_key, tuple) else (extra_key,)
    return "".join(map(str, parts)).encode()


@fault("KEY-4", replaces="page_hashes", reports=("SG-26785", "VL-51640"))
def hashes_of_tokens_alone(token_ids: Any, page_size: int, extra_key: Any = None) -> list[bytes]:
    return oracle.page_hashes(token_ids, page_size)


@fault("KEY-6", replaces="page_hashes", reports=("VL-21161",))
def hashes_of_one_process(token_ids: Any, page_size: int, extra_key: Any = None) -> list[bytes]:
    seed = hash("seeded anew in every process").to_bytes(8, "little", signed=True)
    hashes = oracle.page_hashes(token_ids, page_size, extra_key)
    return [hashlib.sha256(seed + digest).digest() for digest in hashes]


@fault("KEY-3", replaces="page_hashes", reports=("SE-17",))
def hashes_without_position(token_ids: Any, page_size: int, extra_key: Any = None) -> list[bytes]:
    pages = [token_ids[i : i + page_size] for i in range(0, len(token_ids), page_size)]
    return [oracle.page_hashes(page, page_size, extra_key)[0] for page in pages]


# ------------------------------------------------------------------------- locks and handles


@fault("CACHE-12", reports=("SEED-7", "SG-36848", "SG-27147", "SEED-38", "LMC-1130"))
class UnlocksTheLastPageAlone(oracle.RadixCache):
    def _unlock(self, receipt: Any) -> Any:
        path = self._path(self._open[receipt])
        for page in path[:-1]:
            self._locks[page] += 1
        return super()._unlock(receipt)


@fault("RADIX-7", reports=("SEED-15", "TRT-12667"))
class CountsAnUnlockTwice(oracle.RadixCache):
    _surplus = 0

    def dec_lock_ref(self, node: Any) -> int:
        unlocked = super().dec_lock_ref(node)
        self._surplus += unlocked
        return unlocked

    def evictable_size(self) -> int:
        return super().evictable_size() + self._surplus


@fault("RADIX-7", reports=("SG-10637", "SG-38045", "SE-16"))
class AddsTokensAndRemovesPages(oracle.RadixCache):
    _surplus = 0

    def _claim(self, frame: bytes, tokens: Sequence[int], slots: Sequence[int]) -> Any:
        self._surplus += len(tokens) % self.page_size
        return super()._claim(frame, tokens, slots)

    def evictable_size(self) -> int:
        return super().evictable_size() + self._surplus


@fault("RADIX-7", reports=("SG-38045",))
class ForgetsTheProtected(oracle.RadixCache):
    def protected_size(self) -> int:
        return 0


@fault("RADIX-6", reports=("SEED-41", "VL-55227"))
class UnlocksAfterTheGroup(oracle.RadixCache):
    def _unlock(self, receipt: Any) -> Any:
        allocator: Any = self.token_to_kv_pool_allocator
        return super()._unlock(receipt) if allocator.is_not_in_free_group else []


@fault("CACHE-13", reports=("SE-15", "SE-29", "VL-18957", "VL-39702"))
class LocksAnything(oracle.RadixCache):
    def inc_lock_ref(self, node: Any) -> Any:
        with suppress(ContractError):
            return super().inc_lock_ref(node)

    def dec_lock_ref(self, node: Any) -> int:
        with suppress(ContractError):
            return super().dec_lock_ref(node)
        return 0


@fault("CACHE-14", reports=("DYN-11169", "TRT-16019"))
class FollowsStaleHandles(oracle.RadixCache):
    def resolve(self, node: Any) -> Any:
        return None, tuple(token for page in self._path(node.node) for token in page.tokens)


# ------------------------------------------------------------------------- trees


@fault("RADIX-3", reports=("SEED-8", "SEED-39", "SG-16067", "SG-21404", "LMC-1034", "LMC-3884"))
class PinsWhatItFinds(oracle.RadixCache):
    def match_prefix(self, key: Any, **options: Any) -> Any:
        found = super().match_prefix(key, **options)
        if len(found.device_indices) and found.last_device_node is not None:
            self.inc_lock_ref(found.last_device_node)
        return found


@fault("RADIX-3", reports=("SE-24",))
class TouchesUnasked(oracle.RadixCache):
    def match_prefix(self, key: Any, *, extra_key: Any = None, touch: bool = True) -> Any:
        return super().match_prefix(key, extra_key=extra_key)


@fault("RADIX-3", reports=("MINI-124", "FKV-195"))
class StaysOldWhenHit(oracle.RadixCache):
    def _hit(self, path: Sequence[Any]) -> None:
        for page in path:
            page.hits += 1


@fault("RADIX-13", reports=("SG-18843",))
class CountsNoHits(oracle.RadixCache):
    def _hit(self, path: Sequence[Any]) -> None:
        super()._hit(path)
        for page in path:
            page.hits = 0


@fault("RADIX-8", reports=("SE-23",))
class EvictsWholeLeaves(oracle.RadixCache):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "eviction_granularity": "node"})


@fault("RADIX-1", reports=("SEED-16", "KVC-362"))
class RemembersTheEvicted(oracle.RadixCache):
    def match_prefix(self, key: Any, *, extra_key: Any = None, touch: bool = True) -> Any:
        found = super().match_prefix(key, extra_key=extra_key, touch=touch)
        if touch:
            return found
        known = self.__dict__.setdefault("_known", {})
        results = found, known.get(tuple(key), found)
        known[tuple(key)] = max(results, key=lambda result: len(result.device_indices))
        return known[tuple(key)]


@fault("RADIX-1", reports=("OV-3722",))
class ComparesHashes(oracle.RadixCache):
    def _whole_pages(self, tokens: Sequence[int]) -> Any:
        return [tuple(map(hash, page)) for page in super()._whole_pages(tokens)]


@fault("CACHE-9", reports=("DYN-1785",))
class FreesDuplicates(oracle.RadixCache):
    def insert(self, key: Any, value: Any, **options: Any) -> Any:
        allocator: Any = self.token_to_kv_pool_allocator
        result = super().insert(key, value, **options)
        for start, stop in result.duplicate:
            allocator.free(value[start:stop])
        return result


@fault("CACHE-9", reports=("SE-04",))
class KeepsTheCallersTensor(oracle.RadixCache):
    def insert(self, key: Any, value: Any, **options: Any) -> Any:
        self._callers = value
        return super().insert(key, value, **options)

    def match_prefix(self, key: Any, **options: Any) -> Any:
        return super().match_prefix(key, **options)._replace(device_indices=self._callers)


@fault("CACHE-10", reports=("VL-3347",))
class InsertsAnything(oracle.RadixCache):
    def insert(self, key: Any, value: Any, **options: Any) -> Any:
        with suppress(ContractError):
            return super().insert(key, value, **options)


@fault("RADIX-5", reports=("TRT-13571",))
class EvictsBelowChildren(oracle.RadixCache):
    def _is_free_leaf(self, page: Any, extensions: Mapping[Any, int]) -> bool:
        return page not in self._locks

    def _order(self, page: Any) -> tuple[int, ...]:
        return (page.born, page.last)


@fault("RADIX-17", reports=("SEED-44", "TSP-248", "SG-22759"))
class EveryOtherReplicaTurnsRound(oracle.RadixCache):
    _made = itertools.count()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sign = 1 - 2 * (next(self._made) % 2)

    def _order(self, page: Any) -> tuple[int, ...]:
        return (self._sign * page.last,)


# ------------------------------------------------------------------------- checker


@fault("CHECK-7", replaces="check_memory", reports=("SG-28754",))
def names_one_fault(*pools: Any, **options: Any) -> None:
    try:
        oracle.check_memory(*pools, **options)
    except MemoryLeakError as error:
        raise MemoryLeakError(str(error).splitlines()[0]) from None


@fault("CHECK-1", replaces="check_memory", reports=("SG-22862", "JAX-1147"))
def compares_sums(*pools: Any, **options: Any) -> None:
    oracle.check_memory(*pools, **{**options, "level": "counts"})


@fault("CHECK-4", replaces="check_memory", reports=("JAX-984",))
def overlooks_rows(*pools: Any, **options: Any) -> None:
    try:
        oracle.check_memory(*pools, **options)
    except MemoryLeakError as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("CHECK-4")]
        raise MemoryLeakError("\n".join(lines)) from None


@fault("CHECK-6", replaces="check_memory", reports=("KVAI-44", "SG-22152"))
def expects_to_be_idle(*pools: Any, **options: Any) -> None:
    oracle.check_memory(*pools, **{**options, "reqs": ()})
