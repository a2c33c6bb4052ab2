"""In what order requests are looked at. Spec: SCHED-9, SCHED-10."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvspec.interfaces.prefix_cache import BasePrefixCache
from kvspec.scheduler.req import Req
from kvspec.scheduler.server_args import Policy

__all__ = ["IN_BATCH_PREFIX_TOKENS", "MOST_WAITING_FOR_LPM", "Queue", "SchedulePolicy"]

MOST_WAITING_FOR_LPM = 128
"""Beyond it looking at every request's prefix costs more than it gives."""
IN_BATCH_PREFIX_TOKENS = 32
"""A prefix as long as this, which another one is about to compute, is worth waiting for."""


class _Looked(NamedTuple):
    """A request and what the cache has of it."""

    req: Req
    tokens: list[int]
    found: int

    @property
    def path(self) -> tuple[object, ...]:
        """The namespace and the tokens that the cache has."""
        return (self.req.extra_key, *self.tokens[: self.found])


@dataclass
class _Node:
    """A prefix that the cache has of some requests."""

    arrival: int
    """That of the first request below it."""
    looked: list[_Looked] = field(default_factory=list)
    children: list["_Node"] = field(default_factory=list)
    weight: int = 0
    """Requests below it."""


class Queue(NamedTuple):
    """The requests in order, and the ids of those that had better not be admitted yet."""

    order: list[Req]
    behind: frozenset[str] = frozenset()


class SchedulePolicy:
    """Orders the waiting requests by what the cache has of them, without touching it (SCHED-9)."""

    def __init__(self, policy: Policy, tree_cache: BasePrefixCache) -> None:
        self.policy, self.tree_cache = policy, tree_cache

    def calc_priority(self, waiting: Sequence[Req], chunked_req: Req | None = None) -> Queue:
        """The same requests, in the order in which they are to be admitted.

        O(waiting log waiting), and O(tokens) of each where the cache is asked.
        """
        arrived = sorted(waiting, key=lambda req: req.arrival)
        if self.policy == "fcfs" or not arrived:
            return Queue(arrived)
        if self.policy == "lpm" and len(arrived) > MOST_WAITING_FOR_LPM:
            return Queue(arrived)
        looked = [self._look(req) for req in arrived]
        if self.policy == "dfs-weight":
            return Queue([each.req for each in _depth_first(looked)])
        looked.sort(key=lambda each: -each.found)
        behind = _computed_by_others(looked, chunked_req)
        return Queue([each.req for each in looked], behind)

    def _look(self, req: Req) -> _Looked:
        tokens = req.tokens
        found = self.tree_cache.match_prefix(tokens[:-1], extra_key=req.extra_key, touch=False)
        return _Looked(req, tokens, found.device_indices.numel())


def _computed_by_others(looked: Sequence[_Looked], chunked_req: Req | None) -> frozenset[str]:
    """Those that another one, before them, will compute a prefix for (SCHED-10)."""
    begun: set[tuple[object, ...]] = set()
    behind: set[str] = set()
    chunked = (chunked_req.extra_key, *chunked_req.tokens) if chunked_req else ()
    for req, tokens, found in looked:
        enough = found + IN_BATCH_PREFIX_TOKENS
        if len(tokens) <= enough:
            continue
        first = (req.extra_key, *tokens[:enough])
        if first in begun or first == chunked[: len(first)]:
            behind.add(req.rid)
        begun.add(first)
    return frozenset(behind)


def _depth_first(looked: Sequence[_Looked]) -> list[_Looked]:
    """Along the tree of what the cache has, the heavier child first."""
    root = _Node(arrival=0)
    line: list[tuple[tuple[object, ...], _Node]] = [((), root)]
    for each in sorted(looked, key=_by_path):
        path, arrival = each.path, each.req.arrival
        while line[-1][0] != path[: len(line[-1][0])]:
            line.pop()
        if line[-1][0] != path:
            node = _Node(arrival)
            line[-1][1].children.append(node)
            line.append((path, node))
        line[-1][1].looked.append(each)
        for _, node in line:
            node.weight += 1
            node.arrival = min(node.arrival, arrival)
    return _walk(root)


def _by_path(each: _Looked) -> tuple[str, list[int]]:
    return repr(each.req.extra_key), each.tokens[: each.found]


def _walk(root: _Node) -> list[_Looked]:
    """A prefix's own requests after those of longer ones."""
    backwards: list[_Looked] = []
    left = [root]
    while left:
        node = left.pop()
        own = sorted(node.looked, key=lambda each: each.req.arrival)
        backwards += reversed(own)
        left += sorted(node.children, key=lambda child: (-child.weight, child.arrival))
    return backwards[::-1]
