"""Whom to admit, and how much of a prompt to compute. Spec: SCHED-11, SCHED-12, SCHED-14."""

from collections.abc import Iterable

from kvspec.interfaces.prefix_cache import MatchResult
from kvspec.scheduler.req import Req
from kvspec.scheduler.server_args import ServerArgs
from kvspec.scheduler.slots import Extension, Memory

__all__ = ["CLIP_MAX_NEW_TOKENS", "NewTokenRatio", "PrefillAdder"]

CLIP_MAX_NEW_TOKENS = 4096
"""No request is expected to need more than this: it would keep all others out."""


class NewTokenRatio:
    """The share of the tokens that running requests may still need which admission keeps for them.

    It falls with every decode step, and rises when requests had to be retracted.
    """

    RETRACT_DECODE_STEPS = 20

    def __init__(self, conservativeness: float) -> None:
        self.first = min(0.7 * conservativeness, 1.0)
        self.least = self.first * 0.14
        self.fall = (self.first - self.least) / 600
        self.value = self.first

    def decoded(self) -> None:
        self.value = max(self.value - self.fall, self.least)

    def retracted(self, running: Iterable[Req]) -> None:
        """Keep what those that are left would take at their pace, and 20 steps more."""
        reqs = list(running)
        decoded = sum(len(req.output_ids) for req in reqs)
        asked = sum(req.max_new_tokens for req in reqs)
        expected = decoded + self.RETRACT_DECODE_STEPS * len(reqs)
        self.value = min(1.0, expected / asked) if asked else self.first

    def reset(self) -> None:
        self.value = self.first


class PrefillAdder:
    """Fills one prefill step, within what is free or can be evicted.

    `taken_pages` are those of the requests that it has added, which are taken together afterwards;
    `expected` tokens are kept for what the running ones may still need.
    """

    def __init__(
        self, memory: Memory, args: ServerArgs, running: Iterable[Req], new_token_ratio: float
    ) -> None:
        self.memory, self.args = memory, args
        self.running = list(running)
        self.extensions: list[Extension] = []
        self.taken_pages = 0
        self.rem_chunk_tokens = args.chunked_prefill_size
        self.rem_input_tokens = args.max_prefill_tokens
        self.expected = sum(self._expected(req, new_token_ratio) for req in self.running)

    def _expected(self, req: Req, new_token_ratio: float) -> int:
        """What a running request may still need: at least the page that its next token begins, or
        who is admitted now would be retracted for it at once.
        """
        share = int(min(req.remaining, CLIP_MAX_NEW_TOKENS) * new_token_ratio)
        begins = self.memory.new_pages(req, req.kv_allocated_len + 1) if req.remaining > 0 else 0
        return max(share, begins * self.memory.page_size)

    @property
    def is_alone(self) -> bool:
        """Whether nobody else is live: then what fits is admitted, whatever is expected."""
        return not self.running and not self.extensions

    def add_chunked_req(self, req: Req) -> bool:
        """Go on with the prompt that was begun; False if there is no room for any more of it."""
        length = self._fitting(req, req.length - req.kv_committed_len)
        if not self.is_alone:
            length = min(length, self._pages_left() * self.memory.page_size)
        if length <= 0:
            return False
        self._extend(req, length)
        return True

    def add_one_req(self, req: Req) -> bool:
        """Admit a waiting request, or leave it as it was, without lock and row (SCHED-11)."""
        if self.rem_input_tokens <= 0 or (self.rem_chunk_tokens or 1) <= 0:
            return False
        if not self.memory.rows.available_size():
            return False
        found = self._match(req)
        cached = found.device_indices.numel()
        length = req.length - cached
        node = found.last_device_node
        receipt = None if node is None else self.memory.tree_cache.inc_lock_ref(node)
        req.kv_committed_len = req.kv_allocated_len = cached
        wanted = length + min(req.remaining, CLIP_MAX_NEW_TOKENS) - 1  # the last has no KV
        length = self._fitting(req, length)
        if length <= 0 or not (self.is_alone or self._has_room_for(wanted, length)):
            req.kv_committed_len = req.kv_allocated_len = 0
            if receipt is not None:
                self.memory.tree_cache.dec_lock_ref(receipt)
            return False
        rows = self.memory.rows.alloc(1)
        assert rows is not None, "SCHED-11: there was a row"
        self.memory.rows.write((rows[0], slice(0, cached)), found.device_indices)
        req.req_pool_idx, req.prefix_indices = rows[0], found.device_indices
        req.last_node, req.lock_receipt, req.cache_protected_len = node, receipt, cached
        self._extend(req, length)
        return True

    def _match(self, req: Req) -> MatchResult:
        """What the cache has of all its tokens but the last, so that one at least is computed
        (SCHED-12, SCHED-21).
        """
        return self.memory.tree_cache.match_prefix(req.tokens[:-1], extra_key=req.extra_key)

    def _fitting(self, req: Req, length: int) -> int:
        """How many of its next tokens a step can compute: as many as the chunk's budget and the
        pool allow, and without chunks all or none.
        """
        room = self.memory.room()
        pages = room.full - self.taken_pages
        if room.swa is not None:
            pages = min(pages, room.swa - self.taken_pages)
        most = (self.memory.pages(req.kv_allocated_len) + pages) * self.memory.page_size
        fits = min(length, most - req.kv_committed_len)
        if self.rem_chunk_tokens is not None:
            fits = min(fits, self.rem_chunk_tokens)
        elif fits < length and not self.memory.is_hybrid:
            return 0
        return fits

    def _has_room_for(self, wanted: int, length: int) -> bool:
        """Whether there is room for all that it will want beside what the others may; of a window
        pool for its first chunk and the window that it moves on with.
        """
        swa = self.memory.room().swa
        if swa is not None and self.memory.sliding_window_size is not None:
            most = min(wanted, length + self.memory.sliding_window_size)
            if self.memory.pages(most) + 1 > swa - self.taken_pages:
                return False
        return self.memory.pages(wanted) <= self._pages_left()

    def _pages_left(self) -> int:
        """What is left when the running requests had what they may still need."""
        return self.memory.room().full - self.taken_pages - self.memory.pages(self.expected)

    def _extend(self, req: Req, length: int) -> None:
        stop = req.kv_committed_len + length
        token_ids = req.tokens[req.kv_committed_len : stop]
        sampled = range(length - 1, length) if stop == req.length else range(0)
        extension = Extension(req, req.kv_committed_len, token_ids, sampled, reserve=stop)
        self.extensions.append(extension)
        self.taken_pages += self.memory.new_pages(req, stop)
        self.rem_input_tokens -= length
        if self.rem_chunk_tokens is not None:
            self.rem_chunk_tokens -= length
        if stop == req.length:
            self.expected += min(req.remaining, CLIP_MAX_NEW_TOKENS) - 1
