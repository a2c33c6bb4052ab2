from collections.abc import Mapping
from typing import overload

import kvspec.interfaces.ownership_ledger
import kvspec.interfaces.shared_memory
import kvspec.interfaces.shm_channel
import kvspec.interfaces.slot_allocator
import torch


def cuda_at_build() -> bool: ...

class Ticket:
    """Worth one restore_state."""

class TokenToKVPoolAllocator:
    """A queue of slots. Spec: SLOT."""

    def __init__(self, size: int, dtype: object, device: object, kvcache: object | None, need_sort: bool) -> None: ...

    @property
    def size(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> str: ...

    @property
    def need_sort(self) -> bool: ...

    @property
    def is_not_in_free_group(self) -> bool: ...

    @property
    def free_pages(self) -> torch.Tensor: ...

    @property
    def release_pages(self) -> torch.Tensor: ...

    def available_size(self) -> int: ...

    def pending_size(self) -> int: ...

    def alloc(self, need_size: int) -> torch.Tensor | None: ...

    def free_group_begin(self) -> None: ...

    def free_group_end(self) -> None: ...

    def backup_state(self) -> Ticket: ...

    def restore_state(self, state: object | None) -> None: ...

    def clear(self) -> None: ...

    def get_kvcache(self) -> object: ...

    def attach(self, observer: object | None) -> None: ...

    def view(self) -> kvspec.interfaces.slot_allocator.AllocatorView: ...

    def digest(self) -> int: ...

    def check(self) -> None: ...

    def counters(self) -> dict[str, int]: ...

    def free(self, free_index: object | None) -> None: ...

class PagedTokenToKVPoolAllocator:
    """Whole pages. Spec: PAGE."""

    def __init__(self, size: int, page_size: int, dtype: object, device: object, kvcache: object | None, need_sort: bool) -> None: ...

    @property
    def size(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> str: ...

    @property
    def need_sort(self) -> bool: ...

    @property
    def is_not_in_free_group(self) -> bool: ...

    @property
    def free_pages(self) -> torch.Tensor: ...

    @property
    def release_pages(self) -> torch.Tensor: ...

    def available_size(self) -> int: ...

    def pending_size(self) -> int: ...

    def alloc(self, need_size: int) -> torch.Tensor | None: ...

    def free_group_begin(self) -> None: ...

    def free_group_end(self) -> None: ...

    def backup_state(self) -> Ticket: ...

    def restore_state(self, state: object | None) -> None: ...

    def clear(self) -> None: ...

    def get_kvcache(self) -> object: ...

    def attach(self, observer: object | None) -> None: ...

    def view(self) -> kvspec.interfaces.slot_allocator.AllocatorView: ...

    def digest(self) -> int: ...

    def check(self) -> None: ...

    def counters(self) -> dict[str, int]: ...

    def free(self, free_index: object | None) -> None: ...

    def alloc_extend(self, prefix_lens: object, seq_lens: object, last_loc: object, extend_num_tokens: int) -> torch.Tensor | None: ...

    def alloc_decode(self, seq_lens: object, last_loc: object) -> torch.Tensor | None: ...

class SWATokenToKVPoolAllocator:
    """
    Slots of a full pool, each page with its pair in a window pool. Spec: SWA.
    """

    def __init__(self, size: int, size_swa: int, dtype: object, device: object, kvcache: object | None, need_sort: bool, page_size: int = 1) -> None: ...

    @property
    def size(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> str: ...

    @property
    def need_sort(self) -> bool: ...

    @property
    def is_not_in_free_group(self) -> bool: ...

    @property
    def free_pages(self) -> torch.Tensor: ...

    @property
    def release_pages(self) -> torch.Tensor: ...

    def available_size(self) -> int: ...

    def pending_size(self) -> int: ...

    def alloc(self, need_size: int) -> torch.Tensor | None: ...

    def free_group_begin(self) -> None: ...

    def free_group_end(self) -> None: ...

    def backup_state(self) -> Ticket: ...

    def restore_state(self, state: object | None) -> None: ...

    def clear(self) -> None: ...

    def get_kvcache(self) -> object: ...

    def attach(self, observer: object | None) -> None: ...

    def view(self) -> kvspec.interfaces.slot_allocator.AllocatorView: ...

    def digest(self) -> int: ...

    def check(self) -> None: ...

    def counters(self) -> dict[str, int]: ...

    def alloc_extend(self, prefix_lens: object, seq_lens: object, last_loc: object, extend_num_tokens: int) -> torch.Tensor | None: ...

    def alloc_decode(self, seq_lens: object, last_loc: object) -> torch.Tensor | None: ...

    def free(self, free_index: object | None, swa_index: object | None = ()) -> None: ...

    def free_swa(self, free_index: object | None) -> None: ...

    def move_swa(self, tgt_loc: object | None, src_loc: object | None) -> None: ...

    @property
    def size_full(self) -> int: ...

    @property
    def size_swa(self) -> int: ...

    def full_available_size(self) -> int: ...

    def swa_available_size(self) -> int: ...

    def swa_pending_size(self) -> int: ...

    def translate_loc_from_full_to_swa(self, kv_indices: object) -> torch.Tensor: ...

    @property
    def full_to_swa_index_mapping(self) -> torch.Tensor: ...

class RequestRows:
    """The books of a request pool. Spec: REQ."""

    def __init__(self, size: int, pre_alloc_size: int, max_context_len: int) -> None: ...

    def available_size(self) -> int:
        """How many rows `alloc` can hand out. O(1)."""

    def alloc(self, need_size: int) -> list[int] | None:
        """
        Take the rows that have been free longest, or None (REQ-2, REQ-3, REQ-4).
        """

    def free(self, free_index: object | None) -> None:
        """Give rows back (REQ-4, REQ-5). O(rows named)."""

    def write(self, indices: object | None, values: object | None) -> None:
        """Set positions of rows to slots (REQ-6, REQ-7). O(positions named)."""

    def row(self, row: int) -> torch.Tensor:
        """The slots of a live row: int64, a copy, on the CPU. O(length)."""

    def row_length(self, row: int) -> int:
        """How many positions of a live row are written. O(1)."""

    def clear(self) -> None:
        """Make every row free (REQ-9). O(rows)."""

    @property
    def free_slots(self) -> list[int]:
        """The free rows, the next to be handed out first. O(rows)."""

    def attach(self, observer: object | None) -> None:
        """Report every operation from now on; None detaches (OBS-1)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far (REQ-13)."""

    def live_rows(self) -> list[int]:
        """The live rows, ascending. O(rows)."""

    def mirror(self, table: torch.Tensor) -> None:
        """Let `write` write to this table of zeros too (REQ-8)."""

    def guard(self, name: str) -> None:
        """Refuse a call from an observer (OBS-3)."""

    def unsent_count(self) -> int:
        """Positions that a device's table lacks."""

    def pack(self, packed: torch.Tensor) -> None:
        """
        Write them: their places in the flat table as int64, then their slots as int32.
        """

    def sent(self) -> None:
        """The table has what was packed."""

    def check_books(self, table: torch.Tensor | None) -> None:
        """Raise ContractError if books or table are broken (REQ-10)."""

class HostBlock:
    """The memory of an arena. Spec: HOST."""

    def __init__(self, kind: str, nbytes: int, alignment: int | None, populate: bool, huge_pages: str, numa_node: int | None, label: str, attach: str | None, node_folder: str) -> None: ...

    @property
    def address(self) -> int:
        """Of the first byte, a multiple of the alignment (HOST-1)."""

    @property
    def mapped_bytes(self) -> int:
        """Address space taken for it, 0 when closed (HOST-2)."""

    @property
    def pinned_bytes(self) -> int:
        """How many bytes are locked or registered for it (HOST-22)."""

    @property
    def page_bytes(self) -> int:
        """What `discard` goes by (HOST-20)."""

    @property
    def name(self) -> str | None:
        """Of the segment, for shm (HOST-24)."""

    def resident_bytes(self) -> int:
        """Of mapped_bytes, those on pages that have memory (HOST-21). O(pages)."""

    def numa_nodes(self) -> dict[int, int] | None:
        """Bytes on each node, None without NUMA (HOST-12). O(pages)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far: `pages_populated`, `populate_threads` (HOST-27)."""

    def check(self) -> None:
        """Raise ContractError if the memory is not as it must be (HOST-29)."""

    @property
    def wanted_bytes(self) -> int:
        """What open() will map (HOST-2)."""

    @property
    def closed(self) -> bool: ...

    @property
    def share_count(self) -> int:
        """How many tensors over it are alive."""

    def require_open(self, call: str) -> None:
        """Refuse a call of an arena that is closed (HOST-18)."""

    def open(self, lock: bool) -> None:
        """Map it; `lock` says whether pinned locks it."""

    def adopt(self, address: int, storage: object) -> None:
        """Take the memory of an object that is kept alive: kind torch."""

    def on_release(self, before: object | None, after: object | None) -> None:
        """Call these when the memory is about to go back, and when it has."""

    def share(self, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 over bytes of the memory, which live as long (HOST-13, HOST-15)."""

    def discard_range(self, offset: int, nbytes: int) -> None:
        """Give whole pages back (HOST-19, HOST-20)."""

    def populate_range(self, offset: int, nbytes: int, threads: int | None) -> None:
        """Give pages memory of their own (HOST-7, HOST-20)."""

    def give_back(self) -> None:
        """Give the memory back (HOST-16, HOST-17)."""

def numa_node_lists(folder: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The NUMA nodes that have memory, and those that have CPUs (HOST-25)."""

def populates_on_request() -> bool:
    """Whether the kernel populates pages on request (HOST-25)."""

def huge_page_bytes() -> int:
    """Of the default huge pages."""

class KVStorage:
    """Tensors of rows that slots name. Spec: KV."""

    def __init__(self, row_count: int, sink_count: int, checked: bool) -> None: ...

    def add(self, tensor: torch.Tensor) -> None:
        """One more tensor, of row_count rows."""

    def write(self, clause: str, slots: object | None, tensor: int, given: object) -> None:
        """Rows of one tensor (KV-9, KV-12, KV-13)."""

    def write_two(self, clause: str, slots: object | None, tensor: int, given: object, other_tensor: int, other_given: object) -> None:
        """Rows of two tensors, or of none (KV-9, KV-12, KV-13)."""

    def read(self, clause: str, slots: object | None, tensor: int, out: object) -> None:
        """Copy rows (KV-16, KV-18)."""

    def move(self, clause: str, targets: object | None, sources: object | None, tensor_count: int) -> None:
        """Rows of the first tensors (KV-14, KV-15)."""

    def require_move(self, clause: str, targets: object | None, sources: object | None) -> None:
        """Refuse slots that a move cannot take (KV-15)."""

    def require_targets(self, clause: str, slots: object | None) -> int:
        """
        Refuse a slot out of range or named twice beyond the sink; how many there are.
        """

    def require_rows(self, clause: str, slots: object | None) -> int:
        """Refuse a slot out of range; how many there are."""

    @property
    def rows_copied(self) -> int:
        """Exact cost so far (KV-34)."""

class HostSlots:
    """The books of a host pool. Spec: KV."""

    def __init__(self, size: int, page_size: int, device_first: int, device_end: int) -> None: ...

    def available_size(self) -> int:
        """How many slots `alloc` can hand out."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """
        Take the slots that have been free longest, or None (KV-25, KV-26, KV-28).
        """

    def free(self, indices: object | None) -> int:
        """Give whole pages back; how many slots (KV-27, KV-28)."""

    def clear(self) -> None:
        """Make every slot free (KV-27)."""

    def require_transfer(self, host: object | None, device: object | None) -> int:
        """Refuse slots that do not fit each other (KV-31); how many there are."""

    def require_page(self, slot: int) -> None:
        """Refuse where no held page begins (KV-33)."""

    def free_slots(self) -> list[int]:
        """The next to be handed out first. O(size)."""

    def held_slots(self) -> list[int]:
        """Ascending. O(size)."""

def copy_rows(to: object, to_slots: object, from_: object, from_slots: object) -> None:
    """
    Rows of one tensor into another that does not share memory (KV-29, KV-30).
    """

class SharedSegment:
    """A handle on a named segment of shared memory. Spec: SHM."""

    @staticmethod
    def create(label: str, nbytes: int, populate: bool = False) -> SharedSegment:
        """
        A new segment of exactly `nbytes` zeros under a name that nobody had (SHM-1 to SHM-5).
        """

    @staticmethod
    def attach(name: str) -> SharedSegment:
        """Another handle on a segment that somebody holds (SHM-6, SHM-7)."""

    @staticmethod
    def reap() -> list[kvspec.interfaces.shared_memory.Reaped]:
        """Remove every segment of ours that no process holds (SHM-13, SHM-14)."""

    def close(self) -> None:
        """Give the handle back; the last takes the name (SHM-8, SHM-9)."""

    def __enter__(self) -> SharedSegment: ...

    def __exit__(self, kind: object, error: object, traceback: object) -> None: ...

    def __getstate__(self) -> str:
        """What a pickle has of it: its name (SHM-17)."""

    def __setstate__(self, arg: str, /) -> None: ...

    @property
    def name(self) -> str:
        """In /dev/shm, without the slash (SHM-1)."""

    @property
    def nbytes(self) -> int:
        """Exactly what was asked for (SHM-2)."""

    @property
    def address(self) -> int:
        """Where it is mapped in this process."""

    def tensor(self) -> torch.Tensor:
        """uint8 [nbytes] over the mapping, without a copy, on the CPU (SHM-12)."""

    def view(self) -> kvspec.interfaces.shared_memory.SharedSegmentView:
        """The abstract state."""

    def check(self) -> None:
        """
        Raise ContractError if the name leads elsewhere, or the size changed (SHM-19).
        """

class ShmChannelEnd:
    """The core of one end of a channel. Spec: CHAN."""

    @overload
    def __init__(self, label: str, block_bytes: int, block_count: int, reader_count: int) -> None:
        """The writer's end of a new channel (CHAN-2, CHAN-3)."""

    @overload
    def __init__(self, name: str, reader: int) -> None:
        """The end of one reader (CHAN-4, CHAN-5)."""

    @property
    def name(self) -> str:
        """Of the segment: what `attach` is given."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def block_count(self) -> int: ...

    @property
    def reader_count(self) -> int: ...

    @property
    def reader(self) -> int | None:
        """Whose end this is; None for the writer's."""

    @property
    def death_check(self) -> float:
        """Seconds after which a waiting end looks again whether its peers live."""

    @death_check.setter
    def death_check(self, arg: float, /) -> None: ...

    @property
    def ended(self) -> bool:
        """
        Whether the writer has closed and this reader has everything (CHAN-18).
        """

    def send(self, data: kvspec.interfaces.shm_channel.Bytes, timeout: float | None = None) -> bool:
        """
        Send a copy of the bytes; False if no room came (CHAN-6, CHAN-7, CHAN-8, CHAN-24).
        """

    def receive(self, timeout: float | None = None) -> bytes | None:
        """
        The next message; None if none came, or none will (CHAN-9, CHAN-10, CHAN-18).
        """

    def receive_into(self, buffer: kvspec.interfaces.shm_channel.Bytes, timeout: float | None = None) -> int | None:
        """As `receive`, into a buffer; how many bytes (CHAN-11, CHAN-12)."""

    def wait_for_readers(self, timeout: float | None = None) -> bool:
        """Whether no place is absent any more (CHAN-20, CHAN-25)."""

    def drop_reader(self, reader: int) -> None:
        """Go on without a reader that is gone, or never came (CHAN-22, CHAN-23)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far (CHAN-30)."""

    def check(self) -> None:
        """Raise ContractError if cursors or description are broken (CHAN-28)."""

    def hold_room(self, timeout: float | None = None) -> tuple[int, int] | None:
        """
        Address and length of the next block, open from now on; None if no room came.
        """

    def hold_message(self, timeout: float | None = None) -> tuple[int, int] | None:
        """
        Address and length of the next message, its block open from now on; None if none came.
        """

    def let_go(self) -> None:
        """The block is not open any more."""

    def publish(self, nbytes: int) -> None:
        """The first bytes of the next block are the last message (CHAN-13)."""

    def advance(self) -> None:
        """The message was received (CHAN-15)."""

    def close_end(self) -> None:
        """The channel ends, or the reader leaves (CHAN-18, CHAN-19)."""

    @property
    def closed(self) -> bool: ...

    def seen(self) -> tuple[str, int, tuple[int, ...], tuple[str, ...]]:
        """Of `view()`: writer, written, read, readers. REQUIRES: not closed."""

class NodeHandle:
    """Names a path and the incarnation of its last page (CACHE-14)."""

    def __eq__(self, other: object, /) -> bool: ...

    def __hash__(self) -> int: ...

class LockReceipt:
    """One lock, worth one unlock (CACHE-11, CACHE-12)."""

    @property
    def delta(self) -> int: ...

    @property
    def node(self) -> NodeHandle: ...

    @property
    def swa_uuid(self) -> int | None: ...

class InsertPlan:
    """What an insert will do (CACHE-8); carried out once."""

    @property
    def prefix_len(self) -> int: ...

    @property
    def reach_len(self) -> int: ...

    @property
    def shared(self) -> list[tuple[int, int]]: ...

    @property
    def adopted(self) -> list[tuple[int, int]]: ...

    @property
    def duplicate(self) -> list[tuple[int, int]]: ...

    @property
    def tail(self) -> list[tuple[int, int]]: ...

    def duplicate_slots(self) -> torch.Tensor:
        """The caller's slots in whose place the tree holds others."""

    def own_slots(self, start: int, stop: int) -> torch.Tensor:
        """The caller's, by position, to the end of the last page."""

    def tree_slots(self, start: int) -> torch.Tensor:
        """What the tree will hold along the key from a position on."""

    def gained_slots(self) -> torch.Tensor:
        """Those adopted, then those of the tree's tombstones that are revived."""

    def named_slots(self) -> torch.Tensor:
        """
        Whose pairs `add_pairs` asks for: the whole pages' first slots, then the tail's.
        """

    def revived_slots(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        The first slots of the tree's pages that revive, if any do, and of the caller's (SWARADIX-5).
        """

    def pair_ranges(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
        """
        Of the caller's window slots those shared, adopted, duplicate and tail (SWARADIX-6).
        """

class RadixTree:
    """Which pages hold the KV of which tokens. Spec: RADIX."""

    def __init__(self, page_size: int, eviction_policy: str, eviction_granularity: str, sliding_window_size: int = 0) -> None: ...

    def match(self, frame: bytes, tokens: object) -> tuple[torch.Tensor, NodeHandle]:
        """The longest resident prefix, touched (RADIX-1, RADIX-3)."""

    def plan_insert(self, frame: bytes, tokens: object, value: object) -> InsertPlan:
        """What an insert would do, and its memory (CACHE-8, CACHE-10)."""

    def plan_row(self, frame: bytes, tokens: object, row: object, protected_len: int, receipt: LockReceipt | None, locks: bool) -> InsertPlan:
        """What caching a request's row would do (CACHE-5)."""

    def add_pairs(self, plan: InsertPlan, pairs: object | None) -> None:
        """
        Say which window slots the caller has, None for all (SWARADIX-3 to SWARADIX-6).
        """

    def commit_insert(self, plan: InsertPlan, priority: int) -> NodeHandle:
        """Carry a plan out (CACHE-9, RADIX-4)."""

    def commit_row(self, plan: InsertPlan) -> LockReceipt:
        """Carry one out and lock what it reaches (CACHE-2)."""

    def lock(self, node: NodeHandle) -> LockReceipt:
        """Lock a path (CACHE-11, CACHE-13, SWARADIX-11)."""

    @overload
    def unlock(self, node: LockReceipt) -> int:
        """Consume a receipt (CACHE-12, CACHE-13)."""

    @overload
    def unlock(self, node: NodeHandle) -> int:
        """Consume the oldest open receipt of a node (CACHE-12, CACHE-13)."""

    def evict(self, num_tokens: int, swa_num_tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """
        The first slot of each page evicted and of each tombstone made, if one is, and how many window tokens went (RADIX-8 to RADIX-13, SWARADIX-12 to SWARADIX-14).
        """

    def evict_commit(self) -> None:
        """Let the last eviction's memory go."""

    def evict_undo(self) -> None:
        """Take the last eviction back."""

    def reset(self) -> None:
        """Forget every page (CACHE-15, CACHE-16)."""

    def peek(self, frame: bytes, tokens: object) -> torch.Tensor:
        """The longest resident prefix, untouched (RADIX-3)."""

    def resolve(self, node: NodeHandle) -> tuple[bytes, tuple[int, ...]] | None:
        """Frame and tokens of a handle's path (CACHE-14)."""

    def path_slots(self, node: NodeHandle) -> torch.Tensor:
        """The slots of a live handle's path."""

    def resident_slots(self) -> torch.Tensor:
        """All resident slots, ascending."""

    def require_no_receipt(self) -> None:
        """Refuse if one is open (CACHE-16)."""

    def evictable_size(self) -> int: ...

    def protected_size(self) -> int: ...

    def swa_evictable_size(self) -> int: ...

    def swa_protected_size(self) -> int: ...

    def first_slots(self, tombstones: bool) -> torch.Tensor:
        """The first slot of each live page, or of each tombstone."""

    def pages(self) -> list[tuple[tuple[bytes, tuple[int, ...]], tuple[int, int, int, int, int, int, bool, bool, int]]]:
        """
        Of each resident page its path, and page, locks, last, born, hits, priority, cut, tombstone and window locks.
        """

    def open_receipts(self) -> list[tuple[bytes, tuple[int, ...]]]:
        """Paths of the open receipts, oldest first."""

    def digest(self) -> int:
        """RADIX-17."""

    def check(self) -> None:
        """RADIX-16."""

    def counters(self) -> dict[str, int]:
        """RADIX-15."""

def whole_pages(row: object, page_size: int, clause: str) -> torch.Tensor:
    """
    The slots of every page that a row has slots of, each page once, in order.
    """

class OwnershipLedger:
    """Who has every page, and since when. Spec: LEDGER."""

    def __init__(self, page_size: int, page_counts: Mapping[str, int], row_count: int, step_count: int = 65536) -> None: ...

    def begin(self, action: int) -> None:
        """An action begins (LEDGER-14). O(1)."""

    def end(self, by_hand: bool = False) -> list[kvspec.interfaces.ownership_ledger.Fault]:
        """It has ended: its faults (LEDGER-6, LEDGER-7, LEDGER-12)."""

    def take(self, pool: str, slots: object | None) -> None:
        """An allocator handed these out (LEDGER-2). O(slots)."""

    def give(self, pool: str, slots: object | None) -> None:
        """These were given back (LEDGER-3). O(slots)."""

    def adopt_slots(self, slots: object | None) -> None:
        """The tree has the pages of these slots (LEDGER-5). O(slots)."""

    def copy_begin(self, pool: str, slots: object | None) -> int:
        """A copy of these is in flight (LEDGER-9). O(slots)."""

    def copy_end(self, copy: int) -> None:
        """It is done (LEDGER-9). O(pages)."""

    def open_group(self, pool: str) -> None:
        """What is given back from here on is pending (LEDGER-3). O(1)."""

    def close_group(self, pool: str) -> None:
        """What is pending is free (LEDGER-8). O(pending pages)."""

    def clear(self, pool: str) -> None:
        """Everything is free, and no group is open (LEDGER-8). O(pages)."""

    def take_rows(self, rows: object | None) -> None:
        """These rows are live, and name nothing (LEDGER-11). O(rows named)."""

    def give_rows(self, rows: object | None) -> None:
        """These rows are free (LEDGER-7, LEDGER-11). O(pages they name)."""

    def clear_rows(self) -> None:
        """Every row is free (LEDGER-8). O(rows)."""

    def write(self, row: int, start: int, slots: object | None) -> None:
        """The positions from start on of a row name these (LEDGER-4). O(slots)."""

    def adopt(self, row: int, stop: int) -> None:
        """
        The tree has the request's whole pages in [0, stop) of the row (LEDGER-5). O(pages).
        """

    def owner(self, pool: str, page: int) -> kvspec.interfaces.ownership_ledger.Owner:
        """Who has a page, or a row of the pool `rows` (LEDGER-1). O(1)."""

    def counts(self, pool: str) -> dict[str, int]:
        """How many pages each kind of owner has. O(1)."""

    def history(self, pool: str, page: int) -> list[kvspec.interfaces.ownership_ledger.Step]:
        """What became of a page, the newest first (LEDGER-13). O(steps)."""

    def row_pages(self, row: int) -> list[int]:
        """
        The page of each page-sized stretch of a live row, from position 0. O(pages).
        """

    def view(self) -> kvspec.interfaces.ownership_ledger.LedgerView:
        """The abstract state. O(pages)."""

    def counters(self) -> dict[str, int]:
        """Exact costs so far (LEDGER-15)."""

    def check(self) -> None:
        """Raise ContractError if the books are broken (LEDGER-1). O(pages)."""

def slot_runs(slots: object) -> list[tuple[int, int]]:
    """
    Slots as runs [start, stop), in their order, as few as can be. O(slots).
    """
