"""Somebody else's memory system: no `view()`, no refusals, the source document's attributes.

It is written to be looked at, and to be wrong when a test wants it to be.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Node", "StrangersAllocator", "StrangersCache", "StrangersPool", "StrangersRequest"]


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


class StrangersAllocator:
    """Hands out pages from the head of a list, and takes back whatever it is given."""

    def __init__(self, size: int, page_size: int) -> None:
        self.size, self.page_size = size, page_size
        self.clear()

    def clear(self) -> None:
        self.free_pages = torch.arange(1, self.size // self.page_size + 1)
        self.release_pages = _empty()
        self.is_not_in_free_group = True
        self.free_group: list[Tensor] = []

    def alloc(self, need_size: int) -> Tensor | None:
        count = need_size // self.page_size
        if count > len(self.free_pages):
            return None
        pages, self.free_pages = self.free_pages[:count], self.free_pages[count:]
        return (pages[:, None] * self.page_size + torch.arange(self.page_size)).reshape(-1)

    def free(self, free_index: Any) -> None:
        slots = torch.as_tensor(free_index, dtype=torch.int64)
        if not self.is_not_in_free_group:
            self.free_group.append(slots)
        elif len(slots):
            pages = torch.unique_consecutive(slots // self.page_size)
            self.free_pages = torch.cat((self.free_pages, pages))

    def free_group_begin(self) -> None:
        self.is_not_in_free_group, self.free_group = False, []

    def free_group_end(self) -> None:
        self.is_not_in_free_group = True
        if self.free_group:
            self.free(torch.cat(self.free_group))

    def backup_state(self) -> object:
        return self.free_pages, self.release_pages

    def restore_state(self, state: Any) -> None:
        self.free_pages, self.release_pages = state

    def available_size(self) -> int:
        return len(self.free_pages) * self.page_size


class StrangersPool:
    """Rows in a table, and a list of the free ones."""

    def __init__(self, size: int, max_context_len: int) -> None:
        self.req_to_token = torch.zeros((size, max_context_len), dtype=torch.int32)
        self.free_slots = list(range(size))

    def alloc(self, need_size: int) -> list[int] | None:
        if need_size > len(self.free_slots):
            return None
        rows, self.free_slots = self.free_slots[:need_size], self.free_slots[need_size:]
        return rows

    def free(self, free_index: int | list[int]) -> None:
        self.free_slots += [free_index] if isinstance(free_index, int) else free_index

    def write(self, indices: Any, values: Any) -> None:
        self.req_to_token[indices] = torch.as_tensor(values, dtype=torch.int32)

    def available_size(self) -> int:
        return len(self.free_slots)


@dataclass(eq=False)
class Node:
    """Of a tree, with what a window and a next tier add."""

    key: list[int] = field(default_factory=list)
    value: Any = None
    parent: "Node | None" = None
    children: dict[Any, "Node"] = field(default_factory=dict)
    lock_ref: int = 0
    last_access_time: float = 0
    id: int = 0
    swa_tombstone: bool = False
    host_value: Any = None

    def extended(self, key: list[int], value: Any, **more: Any) -> "Node":
        """A child of this node."""
        child = Node(key, value, self, **more)
        self.children[key[0]] = child
        return child


@dataclass(eq=False)
class StrangersRequest:
    """What the cache reads and writes of a request."""

    origin_input_ids: list[int]
    req_pool_idx: int | None = None
    last_node: Any = None
    output_ids: list[int] = field(default_factory=lambda: [0])
    fill_ids: list[int] = field(default_factory=list)
    prefix_indices: Tensor = field(default_factory=_empty)


class StrangersCache:
    """Puts a finished request below the root, whole pages of it, as a node of its own."""

    def __init__(self, pool: StrangersPool, allocator: StrangersAllocator) -> None:
        self.req_to_token_pool, self.token_to_kv_pool_allocator = pool, allocator
        self.page_size, self.disable = allocator.page_size, False
        self.root_node = Node(lock_ref=1)

    def cache_unfinished_req(self, req: StrangersRequest) -> None:
        count = len(req.fill_ids) - len(req.fill_ids) % self.page_size
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
        self.dec_lock_ref(req.last_node)
        value = row[:count].to(torch.int64)
        req.last_node = self.root_node.extended(list(req.fill_ids[:count]), value)
        self.inc_lock_ref(req.last_node)

    def cache_finished_req(self, req: StrangersRequest) -> None:
        count = len(req.origin_input_ids) + len(req.output_ids) - 1
        whole = count - count % self.page_size
        assert req.req_pool_idx is not None
        slots = self.req_to_token_pool.req_to_token[req.req_pool_idx, :count].to(torch.int64)
        self.dec_lock_ref(req.last_node)
        self.root_node.extended([*req.origin_input_ids, *req.output_ids][:whole], slots[:whole])
        self.token_to_kv_pool_allocator.free(slots[whole:])
        self.req_to_token_pool.free(req.req_pool_idx)

    def evict(self, num_tokens: int) -> None:
        for first, node in list(self.root_node.children.items()):
            if num_tokens > 0 and not node.lock_ref:
                del self.root_node.children[first]
                self.token_to_kv_pool_allocator.free(node.value)
                num_tokens -= len(node.key)

    def inc_lock_ref(self, node: Node) -> int:
        node.lock_ref += 1
        return 0

    def dec_lock_ref(self, node: Node) -> int:
        node.lock_ref -= 1
        return 0
