"""What one call of `generate` holds: rows, locks and pages of its sequences. Spec: GEN.

The columns of a sequence, as the model's attention reads them:

    [0 .... pads) [pads ........ reused) [reused ........ columns) [columns ... columns + new)
    slot 0, zeros  KV of the tree         computed in this call     the forward that runs

What the tree has of a sequence up to its last whole page is read where it is, under a lock. Where
rows of a batch are padded differently, what is reused may end inside a page for some of them: the
rest of it is copied into a page of their own.
"""

from collections import Counter
from collections.abc import Sequence as Sequenced
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kvspec.errors import ContractError
from kvspec.interfaces.kv_storage import MHATokenToKVPool
from kvspec.interfaces.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.interfaces.prefix_cache import LockReceipt, NodeHandle
from kvspec.interfaces.prefix_key import ExtraKey
from kvspec.interfaces.radix_cache import RadixCache
from kvspec.interfaces.request_pool import ReqToTokenPool

__all__ = ["Call", "Pools", "Sequence", "Tokens"]

Tokens = list[int]

_SINK = 0


class Pools(NamedTuple):
    """Where the KV of all layers is, and who has which of it."""

    kvcache: MHATokenToKVPool
    allocator: PagedTokenToKVPoolAllocator
    rows: ReqToTokenPool
    tree: RadixCache
    counts: Counter[str]


@dataclass(eq=False)
class Sequence:
    """A row of the batch, as a cache reads and writes it: `interfaces.prefix_cache.Req`."""

    pads: int
    extra_key: ExtraKey
    tokens: Tokens = field(default_factory=list)
    """Those that have KV in every layer, from the first that is no padding."""
    slots: list[int] = field(default_factory=list)
    """Of its row: those of these tokens, and any that were taken for tokens given up since."""
    coming: Tokens = field(default_factory=list)
    """The tokens of the forward that runs."""
    req_pool_idx: int | None = None
    prefix_indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    last_node: NodeHandle | None = None
    cache_protected_len: int = 0
    lock_receipt: LockReceipt | None = None
    origin_input_ids: Sequenced[int] = ()
    """The tokens, once the sequence is at its end."""
    output_ids: Sequenced[int] = ()
    """Always empty: what was sampled and not computed has no KV and is not known here."""
    fill_ids: Sequenced[int] = ()


class Call:
    """From the first forward of a call to its end. Nothing is held before and after."""

    def __init__(self, pools: Pools, extra_key: ExtraKey) -> None:
        self.pools, self.extra_key = pools, extra_key
        self.sequences: list[Sequence] = []
        self.columns = 0
        """Those that have KV in every layer."""
        self.coming = 0
        """Columns of the forward that runs; 0 between forwards."""
        self._cached: int | None = None
        """Tokens that the first forward did not compute, until it has run to its end."""
        self._seen: list[int] = []
        """Of each layer, how many columns it has been given."""
        self._slots = torch.empty(0, 0, dtype=torch.int64)
        """[batch, columns and coming ones]: the sink for padding."""
        self._read: Tensor | int = 0
        """What attention reads: all of these slots, or the first of a run of them."""
        self._written = torch.empty(0, dtype=torch.int64)
        """Where the KV of the coming columns goes, without padding."""
        self._real: Tensor | None = None
        """Which of the coming columns, row after row, are no padding; None: all."""

    @property
    def started(self) -> bool:
        return bool(self.sequences)

    @property
    def batch(self) -> int:
        return len(self.sequences)

    @property
    def pads(self) -> list[int]:
        """Columns of padding that each row begins with."""
        return [sequence.pads for sequence in self.sequences]

    # The first forward

    def start(self, prompts: Sequenced[Tokens], pads: Sequenced[int], computed: int) -> int:
        """Find, lock and take what the tree has; how many columns need not be computed (GEN-3).

        `prompts` are without padding; the last `computed` columns are computed in any case, one at
        least. What is refused leaves nothing behind (GEN-8).
        """
        width = pads[0] + len(prompts[0])
        found = [self._lookup(prompt, computed) for prompt in prompts]
        reused = min(pad + len(slots) for pad, slots in zip(pads, found, strict=True))
        reused = max(min(reused, width - computed), 0)
        try:
            for prompt, pad in zip(prompts, pads, strict=True):
                self._admit(prompt, pad, max(reused - pad, 0))
            self._share(prompts, reused)
        except BaseException:
            self.end()
            raise
        self.columns = reused
        self._slots = self._columns_of(range(reused))
        self._seen = [reused] * self.pools.kvcache.layer_num
        self._cached = sum(len(sequence.tokens) for sequence in self.sequences)
        return reused

    def _lookup(self, prompt: Tokens, computed: int) -> Tensor:
        """The slots that the tree has of a prompt, but of its last `computed` tokens."""
        key = prompt[: max(len(prompt) - computed, 0)]
        tree = self.pools.tree
        return tree.match_prefix(key, extra_key=self.extra_key, touch=False).device_indices

    def _admit(self, prompt: Tokens, pads: int, reused: int) -> None:
        """Lock the whole pages of the reused tokens and name them in a row (GEN-5, GEN-8)."""
        tree, rows = self.pools.tree, self.pools.rows
        sequence = Sequence(pads, self.extra_key)
        whole = reused - reused % tree.page_size
        match = tree.match_prefix(prompt[:whole], extra_key=self.extra_key)
        assert match.last_device_node is not None
        self.sequences.append(sequence)
        sequence.lock_receipt = tree.inc_lock_ref(match.last_device_node)
        row = rows.alloc(1)
        if row is None:
            raise ContractError(
                f"GEN-8: a row for each of the batch: all {rows.size} are in use (max_batch_size)"
            )
        sequence.req_pool_idx = row[0]
        rows.write((row[0], slice(0, whole)), match.device_indices)
        sequence.slots = match.device_indices.tolist()
        sequence.tokens = prompt[:whole]
        sequence.prefix_indices, sequence.last_node = match.device_indices, match.last_device_node
        sequence.cache_protected_len = whole

    def _share(self, prompts: Sequenced[Tokens], reused: int) -> None:
        """Copy what is reused of a page that is not reused as a whole (GEN-6)."""
        partial = [
            (sequence, prompt, reused - sequence.pads)
            for sequence, prompt in zip(self.sequences, prompts, strict=True)
            if reused - sequence.pads > sequence.cache_protected_len
        ]
        if not partial:
            return
        tree, receipts, sources = self.pools.tree, [], list[int]()
        try:
            for sequence, prompt, stop in partial:
                at = sequence.cache_protected_len
                match = tree.match_prefix(prompt[: at + tree.page_size], extra_key=self.extra_key)
                assert match.last_device_node is not None
                receipts.append(tree.inc_lock_ref(match.last_device_node))
                sources += match.device_indices[at:stop].tolist()
            self._take([(sequence, stop) for sequence, _, stop in partial])
            targets = [slot for s, *_ in partial for slot in s.slots[s.cache_protected_len :]]
            self.pools.kvcache.move_kv_cache(targets, sources)
            for sequence, prompt, stop in partial:
                sequence.tokens = prompt[:stop]
        finally:
            for receipt in receipts:
                tree.dec_lock_ref(receipt)

    # Every forward

    def extend(self, coming: Sequenced[Tokens], new: int) -> None:
        """Take slots for a forward of `new` columns that brings these tokens (GEN-4, GEN-8)."""
        self._forget_coming()
        self._take(
            [
                (sequence, len(sequence.tokens) + len(tokens))
                for sequence, tokens in zip(self.sequences, coming, strict=True)
            ]
        )
        for sequence, tokens in zip(self.sequences, coming, strict=True):
            sequence.coming = tokens
        columns = self._columns_of(range(self.columns, self.columns + new))
        self._slots, self.coming = torch.cat((self._slots, columns), dim=1), new
        written = columns.flatten()
        padded = any(sequence.pads > self.columns for sequence in self.sequences)
        self._real = written != _SINK if padded else None
        self._written = written if self._real is None else written[self._real]
        self._read = self._slots.flatten() if len(self._slots) > 1 else _run(self._slots[0])

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's KV [batch, heads, new, dim]; that of all columns (GEN-16, GEN-17)."""
        kvcache = self.pools.kvcache
        batch, heads, new, dim = keys.shape
        expected = (len(self.sequences), kvcache.head_num, self.coming, kvcache.head_dim)
        if tuple(keys.shape) != expected or values.shape != keys.shape or not self.coming:
            raise ContractError(
                f"GEN-9: layer {layer} gives KV of {list(keys.shape)} and {list(values.shape)},"
                f" but the forward that runs brings {list(expected)}"
            )
        kvcache.set_kv_buffer(layer, self._written, self._rows_of(keys), self._rows_of(values))
        self._seen[layer] = self.columns + new
        width = self._slots.shape[1]
        key_buffer, value_buffer = kvcache.get_kv_buffer(layer)
        if isinstance(self._read, int):
            stop = self._read + width
            key_rows, value_rows = key_buffer[self._read : stop], value_buffer[self._read : stop]
        else:
            key_rows = key_buffer.index_select(0, self._read)
            value_rows = value_buffer.index_select(0, self._read)
        shape = batch, width, heads, dim
        return key_rows.view(shape).transpose(1, 2), value_rows.view(shape).transpose(1, 2)

    def commit(self) -> None:
        """The forward has run to its end: its tokens have KV in every layer (GEN-4)."""
        after = self.columns + self.coming
        behind = [layer for layer, seen in enumerate(self._seen) if seen != after]
        if behind:
            self._forget_coming()
            raise ContractError(
                f"GEN-9: a forward gave no KV to layers {behind}: not a whole model"
            )
        counts, computed = self.pools.counts, sum(len(s.coming) for s in self.sequences)
        counts["computed_tokens"] += computed
        if self._cached is not None:
            counts["cached_tokens"] += self._cached
            counts["prompt_tokens"] += self._cached + computed
            self._cached = None
        for sequence in self.sequences:
            sequence.tokens.extend(sequence.coming)
            sequence.coming = []
        self.columns, self.coming = after, 0

    def length(self, layer: int) -> int:
        """How many columns a layer has been given, those of the forward that runs included."""
        return self._seen[layer] if self._seen else 0

    # What decoding does with its rows

    def crop(self, count: int) -> None:
        """Forget the last `count` columns, which this call has computed (GEN-10, GEN-12)."""
        own = [len(s.tokens) - s.cache_protected_len for s in self.sequences]
        if self.coming or count < 0 or count > min(own, default=0):
            raise ContractError(
                f"GEN-12: crop of {count} columns, but a row has computed {min(own, default=0)}"
                f"{' and a forward runs' if self.coming else ''}"
            )
        if count:
            for sequence in self.sequences:
                del sequence.tokens[-count:]
            self.columns -= count
            self._slots = self._slots[:, : self.columns]
            self._seen = [self.columns] * len(self._seen)

    def reorder(self, beams: Sequenced[int]) -> None:
        """Row i goes on where row beams[i] was: copies what is not shared (GEN-11, GEN-12)."""
        sequences = self.sequences
        if self.coming:
            raise ContractError("GEN-12: rows cannot be reordered while a forward runs")
        if len(beams) != len(sequences) or not all(0 <= b < len(sequences) for b in beams):
            raise ContractError(f"GEN-12: beams are {list(beams)} of {len(sequences)} rows")
        moved = [(sequences[i], sequences[beam]) for i, beam in enumerate(beams) if i != beam]
        for row, other in moved:
            shared = row.cache_protected_len
            same = row.tokens[:shared] == other.tokens[:shared]
            if row.pads != other.pads or shared != other.cache_protected_len or not same:
                raise ContractError("GEN-12: a row cannot go on where another prompt's row was")
        targets, sources = [], []
        for row, other in moved:
            own = slice(row.cache_protected_len, len(row.tokens))
            targets += row.slots[own]
            sources += other.slots[own]
        tokens = [list(other.tokens) for _, other in moved]
        self.pools.kvcache.move_kv_cache(targets, sources)
        for (row, _), theirs in zip(moved, tokens, strict=True):
            row.tokens = theirs

    # The end

    def end(self) -> None:
        """Cache what was computed, and give back everything (GEN-5, GEN-7)."""
        self._forget_coming()
        tree, sequences = self.pools.tree, self.sequences
        self.sequences, self.columns, self._seen = [], 0, []
        self._slots = torch.empty(0, 0, dtype=torch.int64)
        with ExitStack() as stack:  # which goes on where one of them raises
            for sequence in reversed(sequences):
                if sequence.req_pool_idx is not None:
                    sequence.origin_input_ids = sequence.tokens
                    stack.callback(tree.cache_finished_req, sequence)
                elif sequence.lock_receipt is not None:
                    stack.callback(tree.dec_lock_ref, sequence.lock_receipt)

    # Slots

    def _take(self, wanted: Sequenced[tuple[Sequence, int]]) -> None:
        """Let each of these rows have so many slots, evicting for it; all or nothing (GEN-8)."""
        lacking = [(sequence, stop) for sequence, stop in wanted if stop > len(sequence.slots)]
        if not lacking:
            return
        allocator, tree = self.pools.allocator, self.pools.tree
        page = allocator.page_size
        pages = sum(-(-stop // page) - -(-len(s.slots) // page) for s, stop in lacking)
        free, evictable = allocator.available_size(), tree.evictable_size()
        if pages * page > free + evictable:
            raise ContractError(
                f"GEN-8: {sum(stop - len(s.slots) for s, stop in lacking)} tokens more need {pages}"
                f" pages of {page}: {free // page} are free, {evictable // page} could be evicted"
                f" and the others of {allocator.size // page} are in use (max_total_tokens)"
            )
        if pages * page > free:
            evicted = tree.evict(pages * page - free)
            assert isinstance(evicted, int)
            self.pools.counts["evicted_tokens"] += evicted
        starts, stops = [len(s.slots) for s, _ in lacking], [stop for _, stop in lacking]
        last = [s.slots[-1] if s.slots else -1 for s, _ in lacking]
        taken = allocator.alloc_extend(starts, stops, last, sum(stops) - sum(starts))
        assert taken is not None
        counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
        for (sequence, stop), slots in zip(lacking, taken.split(counts), strict=True):
            assert sequence.req_pool_idx is not None
            self.pools.rows.write((sequence.req_pool_idx, slice(len(sequence.slots), stop)), slots)
            sequence.slots.extend(slots.tolist())

    def _columns_of(self, columns: range) -> Tensor:
        """[batch, columns]: the slot that each row has in these columns, the sink for padding."""
        rows = [
            [_SINK] * (min(sequence.pads, columns.stop) - min(sequence.pads, columns.start))
            + sequence.slots[
                max(columns.start - sequence.pads, 0) : max(columns.stop - sequence.pads, 0)
            ]
            for sequence in self.sequences
        ]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(columns))

    def _rows_of(self, states: Tensor) -> Tensor:
        """[batch, heads, new, dim] as [tokens, heads, dim], without padding."""
        rows = states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
        return rows if self._real is None else rows[self._real]

    def _forget_coming(self) -> None:
        """A forward that did not run to its end has computed nothing (GEN-4)."""
        if self.coming:
            for sequence in self.sequences:
                sequence.coming = []
            self.coming = 0
            self._slots = self._slots[:, : self.columns]
            self._seen = [self.columns] * len(self._seen)


def _run(slots: Tensor) -> Tensor | int:
    """The first of slots that follow one another, which are read where they are; else these."""
    first, last = int(slots[0]), int(slots[-1])
    straight = last - first == len(slots) - 1 and bool((slots.diff() == 1).all())
    return first if straight else slots
