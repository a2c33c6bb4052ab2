"""The allocator of a full and a window pool: the books of each, and the pairs. Spec: SWA.

full page:    free or pending        held, with a pair        held, without
window page:  free or pending        held, of one full page
"""

from collections.abc import Collection

from torch import Tensor, dtype

from kvspec.errors import ContractError
from kvspec.interfaces.slot_allocator import AllocatorView, Slots
from kvspec.oracle.boundary import tensor
from kvspec.oracle.digest import START, mix
from kvspec.oracle.page_allocator import PagedTokenToKVPoolAllocator
from kvspec.oracle.slot_allocator import Clauses

__all__ = ["SWATokenToKVPoolAllocator"]


class _Books(PagedTokenToKVPoolAllocator):
    """Of one pool: a queue of slots at page size 1, pages above (SWA-22)."""

    room = "swa_allocator"
    clauses = Clauses(
        books="SWA-1",
        sink="SWA-1",
        amount="SWA-5",
        requests="SWA-7",
        given_back="SWA-9",
        group="SWA-15",
        ticket="SWA-18",
        argument="SWA-21",
    )

    @property
    def queue(self) -> bool:
        """See the base."""
        return self.page_size == 1


class _WindowBooks(_Books):
    size_name = "size_swa"


class SWATokenToKVPoolAllocator(_Books):
    """The full pool's books, which take the window pool's along (SWA-1, SWA-2)."""

    def __init__(
        self,
        size: int,
        size_swa: int,
        dtype: dtype,
        device: str,
        kvcache: object,
        need_sort: bool,
        page_size: int = 1,
    ) -> None:
        self.window = _WindowBooks(size_swa, page_size, dtype, device, kvcache, need_sort)
        super().__init__(size, page_size, dtype, device, kvcache, need_sort)

    @property
    def size_full(self) -> int:
        """Slots of the full pool, as given."""
        return self.size

    @property
    def size_swa(self) -> int:
        """Slots of the window pool, as given."""
        return self.window.size

    @property
    def full_to_swa_index_mapping(self) -> Tensor:
        """The window slot of every full slot, 0 where there is none."""
        return tensor([self._window_slot(slot) for slot in self._slots(range(self.page_count + 1))])

    def available_size(self) -> int:
        """How many slots `alloc` can hand out now (SWA-19)."""
        return min(self.full_available_size(), self.swa_available_size())

    def full_available_size(self) -> int:
        """Slots that are free or released in the full pool (SWA-19)."""
        return super().available_size()

    def swa_available_size(self) -> int:
        """Slots that are free or released in the window pool (SWA-19)."""
        return self.window.available_size()

    def swa_pending_size(self) -> int:
        """Window slots that wait for the open group's end (SWA-25)."""
        return self.window.pending_size()

    def free(self, free_index: Slots, swa_index: Slots = ()) -> None:
        """Give back pages with their pairs, and pairs alone, or refuse (SWA-8, SWA-9)."""
        self._guard("free")
        given, alone = self._numbers(free_index, swa_index)
        pages = self._given_back(given)
        self._give_back("free", pages, self._paired("free", alone, "SWA-9", taken=pages))

    def free_swa(self, free_index: Slots) -> None:
        """Give back pairs; the pages stay held (SWA-10, SWA-11)."""
        self._guard("free_swa")
        (slots,) = self._numbers(free_index)
        self._give_back("free_swa", [], self._paired("free_swa", slots, "SWA-11"))

    def move_swa(self, tgt_loc: Slots, src_loc: Slots) -> None:
        """Make the pairs of the sources those of the targets (SWA-12, SWA-13)."""
        self._guard("move_swa")
        targets, sources = self._numbers(tgt_loc, src_loc)
        if len(targets) != len(sources):
            counts = f"{len(targets)} targets and {len(sources)} sources"
            raise ContractError(f"SWA-13: move_swa names {counts}")
        held = self.held
        targets = self._named(
            "move_swa",
            targets,
            lambda page: self._unheld(page, held) or self._pair_of(page),
            clause="SWA-13",
            once=True,
        )
        sources = self._paired("move_swa", sources, "SWA-13", once=True)
        if targets:
            for target, source in zip(targets, sources, strict=True):
                self.pairs[target] = self.pairs.pop(source)
            self._end_epoch(f"window {self.unit}s were moved")
            self._report_moved("move_swa", targets)

    def translate_loc_from_full_to_swa(self, kv_indices: Slots) -> Tensor:
        """The window slot of each full slot, 0 for none, -1 for -1 (SWA-20, SWA-21)."""
        (slots,) = self._numbers(kv_indices)
        end = self.size + self.page_size
        for slot in slots:
            if not -1 <= slot < end:
                raise ContractError(f"SWA-21: slot {slot} is out of range -1 .. {end - 1}")
        return tensor([self._window_slot(slot) for slot in slots]).int()

    def view(self) -> AllocatorView:
        """The abstract state of both pools."""
        pairs = tuple(sorted(self.pairs.items()))
        return super().view()._replace(swa=self.window.view(), pairs=pairs)

    def digest(self) -> int:
        """64 bits that stand for the view (SWA-24)."""
        pairs = [page for pair in sorted(self.pairs.items()) for page in pair]
        return mix(START, super().digest(), self.window.digest(), len(self.pairs), *pairs)

    def check(self) -> None:
        """The books of either pool, then the pairs (SWA-24)."""
        super().check()
        self.window.check()
        if not self.held >= self.pairs.keys():
            raise ContractError(f"SWA-2: a {self.unit} with a pair is not held")
        if sorted(self.pairs.values()) != sorted(self.window.held):
            raise ContractError(f"SWA-2: a window {self.unit} is not the pair of exactly one")

    def counters(self) -> dict[str, int]:
        """Of both pools together (SWA-23)."""
        window = self.window.counters()
        return {name: count + window[name] for name, count in super().counters().items()}

    def _paired(
        self,
        call: str,
        slots: list[int],
        clause: str,
        *,
        taken: Collection[int] = (),
        once: bool = False,
    ) -> list[int]:
        """The pages that slots name, which have to be held, with a pair and none of `taken`."""
        held = self.held

        def fault(page: int) -> str:
            if page in taken:
                return " twice"
            without = "" if page in self.pairs else f", which has no window {self.unit}"
            return self._unheld(page, held) or without

        return self._named(call, slots, fault, clause=clause, once=once or self.queue)

    def _pair_of(self, page: int) -> str:
        return f", which has a window {self.unit}" if page in self.pairs else ""

    def _give_back(self, call: str, pages: list[int], alone: list[int]) -> None:
        """Full pages and their pairs, and the pairs alone of others."""
        named = pages + alone
        window = [self.pairs.pop(page) for page in named if page in self.pairs]
        self.window._put_back(self.window._in_order(window))
        self._put_back(pages)
        if named:
            self._end_epoch(f"{'' if pages else 'window '}{self.unit}s were freed")
            self._report_moved(call, named)

    def _window_slot(self, slot: int) -> int:
        page, offset = divmod(slot, self.page_size)
        return self.pairs[page] * self.page_size + offset if page in self.pairs else min(slot, 0)

    def _fault(self, prefix: int, length: int, slot: int) -> str:
        page = slot // self.page_size
        continued = prefix % self.page_size and prefix < length and page not in self.pairs
        without = f"continues slot {slot}, but page {page} has no window page"
        return super()._fault(prefix, length, slot) or (without if continued else "")

    def _start(self) -> None:
        super()._start()
        self.window._start()
        self.pairs = dict[int, int]()

    def _take(self, page_count: int) -> list[int] | None:
        if page_count * self.page_size > self.available_size():
            return None
        pages = super()._take(page_count) or []
        self.pairs.update(zip(pages, self.window._take(page_count) or [], strict=True))
        return pages

    def _take_back(self, taken: int) -> list[int]:
        pages = super()._take_back(taken)
        self.window._take_back(taken)
        for page in pages:
            del self.pairs[page]
        return pages

    def _open_group(self) -> None:
        super()._open_group()
        self.window._open_group()

    def _close_group(self) -> list[int]:
        self.window._close_group()
        return super()._close_group()

    def _end_epoch(self, reason: str) -> None:
        super()._end_epoch(reason)
        self.window._end_epoch(reason)
