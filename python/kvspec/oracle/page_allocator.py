"""The allocator of KV pages. Spec: PAGE; the books are those of the slot allocator."""

from torch import Tensor

from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import Slots
from kvspec.oracle.boundary import numbers, tensor
from kvspec.oracle.slot_allocator import BaseTokenToKVPoolAllocator, Clauses

__all__ = ["PagedTokenToKVPoolAllocator"]


class PagedTokenToKVPoolAllocator(BaseTokenToKVPoolAllocator):
    """Whole pages, of which page 0 is the sink (PAGE-1, PAGE-2)."""

    room = "page_allocator"
    clauses = Clauses(
        books="PAGE-1",
        sink="PAGE-2",
        amount="PAGE-5",
        requests="PAGE-8",
        given_back="PAGE-10",
        group="PAGE-12",
        ticket="PAGE-15",
        argument="PAGE-17",
    )

    def alloc_extend(
        self, prefix_lens: Slots, seq_lens: Slots, last_loc: Slots, extend_num_tokens: int
    ) -> Tensor | None:
        """Slots for positions [prefix, seq) of each request, or None (PAGE-4, PAGE-6, PAGE-8)."""
        self._guard("alloc_extend")
        prefixes, lengths, last = self._numbers(prefix_lens, seq_lens, last_loc)
        return self._extend("alloc_extend", prefixes, lengths, last, extend_num_tokens)

    def alloc_decode(self, seq_lens: Slots, last_loc: Slots) -> Tensor | None:
        """A slot for position seq - 1 of each request, or None (PAGE-4, PAGE-7, PAGE-8)."""
        self._guard("alloc_decode")
        lengths, last = self._numbers(seq_lens, last_loc)
        prefixes = [length - 1 for length in lengths]
        return self._extend("alloc_decode", prefixes, lengths, last, len(lengths))

    def _numbers(self, *arguments: Slots) -> list[list[int]]:
        return [numbers(argument, self.clauses.argument) for argument in arguments]

    def _extend(
        self, name: str, prefixes: list[int], lengths: list[int], last: list[int], tokens: int
    ) -> Tensor | None:
        self._refuse_bad_requests(prefixes, lengths, last, tokens)
        positions = zip(prefixes, lengths, strict=True)
        firsts = sum(self._pages(length) - self._pages(prefix) for prefix, length in positions)
        pages = self._take(firsts)
        if pages is None:
            return None
        slots = self._place(prefixes, lengths, last, pages)
        self._report_moved(name, pages)
        return tensor(slots)

    def _place(
        self, prefixes: list[int], lengths: list[int], last: list[int], pages: list[int]
    ) -> list[int]:
        following, slots = iter(pages), list[int]()
        for prefix, length, slot in zip(prefixes, lengths, last, strict=True):
            for position in range(prefix, length):
                aligned = position % self.page_size == 0
                slot = next(following) * self.page_size if aligned else slot + 1
                slots.append(slot)
        return slots

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _refuse_bad_requests(
        self, prefixes: list[int], lengths: list[int], last: list[int], tokens: int
    ) -> None:
        if not len(prefixes) == len(lengths) == len(last):
            raise ContractError(
                f"{self.clauses.requests}: the lists of requests have"
                f" {len(prefixes)}, {len(lengths)} and {len(last)} entries"
            )
        continued = dict[int, int]()
        for request, (prefix, length, slot) in enumerate(zip(prefixes, lengths, last, strict=True)):
            fault = self._fault(prefix, length, slot)
            if fault:
                raise ContractError(f"{self.clauses.requests}: request {request} {fault}")
            if prefix % self.page_size and prefix < length:
                page = slot // self.page_size
                if page in continued:
                    both = f"requests {continued[page]} and {request} continue the same page"
                    raise ContractError(f"{self.clauses.requests}: {both} {page}")
                continued[page] = request
        new = sum(lengths) - sum(prefixes)
        if new != tokens:
            what = f"extend_num_tokens is {tokens}, but {new} are new"
            raise ContractError(f"{self.clauses.requests}: {what}")

    def _fault(self, prefix: int, length: int, slot: int) -> str:
        page, offset = divmod(slot, self.page_size)
        if not 0 <= prefix <= length:
            return f"goes from {prefix} to {length} tokens"
        if prefix == 0:
            return "" if slot == -1 else f"has no prefix, but last_loc {slot}"
        if page not in self.held:
            return f"continues slot {slot}, but page {page} is not held"
        if offset != (prefix - 1) % self.page_size:
            return f"continues slot {slot}, where token {prefix - 1} cannot be"
        return ""
