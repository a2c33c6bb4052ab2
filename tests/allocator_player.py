"""Plays calls on an allocator, to compare two implementations of it."""

from typing import Any

import torch

from kvspec.errors import ContractError

__all__ = ["Player"]


class Player:
    """An allocator, the one ticket that its client keeps, and one request that grows."""

    def __init__(self, subject: Any) -> None:
        self.subject, self.ticket = subject, subject.backup_state()
        self.seen: list[Any] = []
        subject.attach(lambda operation: self.seen.append((*operation[:2], operation[2].tolist())))
        self.row = [-1]

    def play(self, name: str, *given: Any) -> Any:
        """What a call gave, as values: slots, None, or the text of its refusal."""
        try:
            result = (getattr(self, name, None) or getattr(self.subject, name))(*given)
        except ContractError as error:
            return str(error)
        return (result.dtype, result.tolist()) if isinstance(result, torch.Tensor) else result

    def alloc(self, pages: int) -> Any:
        return self.subject.alloc(pages * self.subject.page_size)

    def alloc_extend(self, requests: list[tuple[int, int, int]], tokens: int) -> Any:
        prefixes, new, last = ([request[i] for request in requests] for i in range(3))
        lengths = [prefix + more for prefix, more in zip(prefixes, new, strict=True)]
        return self.subject.alloc_extend(prefixes, lengths, last, sum(new) if tokens else tokens)

    def alloc_decode(self, requests: list[tuple[int, int, int]]) -> Any:
        return self.subject.alloc_decode([r[1] for r in requests], [r[2] for r in requests])

    def grow(self, tokens: int) -> Any:
        """Legal as long as the request's last page is held, with its pair if it has pairs."""
        prefix = len(self.row) - 1
        slots = self.subject.alloc_extend([prefix], [prefix + tokens], [self.row[-1]], tokens)
        self.row += [] if slots is None else slots.tolist()
        return slots

    def backup(self) -> None:
        self.ticket = self.subject.backup_state()

    def restore(self) -> None:
        self.subject.restore_state(self.ticket)

    def clear(self) -> None:
        self.row = [-1]
        self.subject.clear()
