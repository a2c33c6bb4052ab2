"""What libc and the kernel do, and that the judgement is of what they did. Spec: CHAIN-14 to
CHAIN-24.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import kvspec.allocation_chain as room
from kvspec.allocation_chain.claims import Claim, Facts
from kvspec.conformance import clause
from kvspec.conformance.allocation_chain.recordings import MIB, PAGE, facts
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import watch_function

__all__ = ["ClaimsConformance"]

KIB = 1024
THRESHOLD = 128 * KIB
OVERHEAD = 23
"""A header of 8 bytes, and rounding up to 16: the threshold less this is the first mapped."""


class ClaimsConformance(Conformance):
    """Each test looks at the facts, then turns them round: the judgement has to turn too."""

    def call(self, name: str) -> Callable[..., Any]:
        own: Callable[..., Any] = getattr(room, name)
        if self.impl_name == MUTANT:
            return getattr(self.impl, name, own)
        return watch_function(self.impl_name, own, "allocation_chain")

    def judged(self, given: Facts, id_: str, claimed: str = "") -> Claim:
        found: list[Claim] = self.call("claims")(given)
        return next(c for c in found if c.clause == id_ and claimed in c.claimed)

    @clause("CHAIN-14")
    def test_a_small_request_is_of_the_heap(self) -> None:
        malloc = _malloc()
        assert malloc["heap_break_grew"] >= malloc["heap_request"]
        assert (malloc["heap_own_mapping"], malloc["heap_lies_below_break"]) == (0, 1)
        assert self.judged(facts(), "CHAIN-14").holds is True
        assert self.judged(_malloc_with(heap_own_mapping=1), "CHAIN-14").holds is False
        assert self.judged(_malloc_with(heap_lies_below_break=0), "CHAIN-14").holds is False
        assert self.judged(facts()._replace(malloc=None), "CHAIN-14").holds is None

    @clause("CHAIN-15")
    def test_the_threshold_moves_up_and_never_down(self) -> None:
        malloc, first = _malloc(), THRESHOLD - OVERHEAD
        assert malloc["smallest_mapped"] == first
        chunk = MIB + malloc["page"]  # its header takes a page more
        assert malloc["smallest_mapped_after_free_of_1MiB"] == chunk - OVERHEAD
        largest = 32 * MIB - malloc["page"]
        moved = malloc["smallest_mapped_after_free_of_32MiB_less_a_page"]
        assert moved == largest - OVERHEAD
        assert malloc["smallest_mapped_after_free_of_32MiB"] == first
        assert malloc["smallest_mapped_fixed_after_free_of_1MiB"] == first
        assert malloc["large_request_is_mapped_though_heap_has_room"] == 0

    @clause("CHAIN-15")
    def test_the_threshold_is_told_as_it_was_found(self) -> None:
        found = self.judged(facts(), "CHAIN-15")
        assert found.holds is False
        assert f"{THRESHOLD - OVERHEAD:,}" in found.observed
        same = {"smallest_mapped": THRESHOLD, "smallest_mapped_after_free_of_1MiB": THRESHOLD}
        assert self.judged(_malloc_with(**same), "CHAIN-15").holds is True
        same["smallest_mapped_after_free_of_1MiB"] += 1
        assert self.judged(_malloc_with(**same), "CHAIN-15").holds is False

    @clause("CHAIN-16")
    def test_free_gives_mapped_chunks_back_and_trims_the_top(self) -> None:
        malloc = _malloc()
        assert malloc["mapped_after_free"] == -1
        assert malloc["break_fell_after_free_of_512KiB"] >= THRESHOLD
        assert malloc["break_fell_after_free_of_64KiB"] == 0
        assert malloc["break_fell_with_large_trim_threshold"] == 0
        found = self.judged(facts(), "CHAIN-16")
        assert found.holds is None
        assert f"{malloc['break_fell_after_free_of_512KiB']:,}" in found.observed
        told = self.judged(_malloc_with(break_fell_after_free_of_512KiB=7777), "CHAIN-16")
        assert "7,777" in told.observed
        kept = self.judged(_malloc_with(mapped_after_free=256), "CHAIN-16")
        assert "stays" in kept.observed

    @clause("CHAIN-17")
    def test_mmap_and_brk_reserve_addresses_alone(self) -> None:
        given, malloc = facts(), _malloc()
        size = given.kernel["bytes"]
        mapped, written = given.look("private", "mapped"), given.look("private", "written")
        assert (mapped.mapping.size, mapped.mapping.rss, mapped.mincore) == (size, 0, 0)
        assert mapped.faults < 64
        assert (written.mapping.rss, written.mincore) == (size, size)
        assert size // PAGE <= written.faults < size // PAGE + 64
        assert malloc["brk_resident_pages"] == 0
        assert malloc["brk_resident_pages_after_ten_touched"] == 10
        assert malloc["heap_resident_pages"] == 0
        assert malloc["heap_resident_pages_touched"] == malloc["heap_inner_pages"]
        assert malloc["mapped_resident_pages"] == 1  # that of the header
        assert malloc["mapped_resident_pages_touched"] == MIB // PAGE + 1

    @clause("CHAIN-17")
    def test_pages_at_mmap_and_brk_are_told_by_what_is_resident(self) -> None:
        assert self.judged(facts(), "CHAIN-17", "mmap()").holds is False
        assert self.judged(facts(), "CHAIN-17", "brk()").holds is False
        full = _kernel_with("private", "mapped", facts().kernel["populated"]["mapped"])
        assert self.judged(full, "CHAIN-17", "mmap()").holds is True
        all_of_it = _malloc()["brk_bytes"] // _malloc()["page"]
        filled = _malloc_with(brk_resident_pages=all_of_it)
        assert self.judged(filled, "CHAIN-17", "brk()").holds is True

    @clause("CHAIN-18")
    def test_populate_fills_at_once(self) -> None:
        given = facts()
        size = given.kernel["bytes"]
        filled, written = given.look("populated", "mapped"), given.look("populated", "written")
        assert (filled.mapping.rss, filled.mincore) == (size, size)
        assert written.faults < 64
        assert self.judged(given, "CHAIN-18").holds is True
        bare = _kernel_with("populated", "mapped", given.kernel["private"]["mapped"])
        assert self.judged(bare, "CHAIN-18").holds is False

    @clause("CHAIN-19")
    def test_a_page_that_is_read_first_is_the_page_of_zeros(self) -> None:
        given = facts()
        size = given.kernel["bytes"]
        read, written = given.look("read_first", "read"), given.look("read_first", "written")
        assert (read.mapping.rss, read.mincore) == (0, size)
        assert read.faults >= size // PAGE
        assert written.mapping.rss == size
        assert written.faults >= size // PAGE
        found = self.judged(given, "CHAIN-19")
        assert found.observed.startswith(f"{read.faults:,} faults, 0 bytes resident")
        turned = _kernel_with("read_first", "read", given.kernel["read_first"]["written"])
        assert f"{size:,} bytes resident" in self.judged(turned, "CHAIN-19").observed

    @clause("CHAIN-20")
    def test_ftruncate_reserves_nothing_and_fallocate_all(self) -> None:
        given = facts()
        tmpfs, size = given.kernel["tmpfs"], given.kernel["bytes"]
        assert (tmpfs["truncated"], tmpfs["reserved"], tmpfs["written_blocks"]) == (0, size, size)
        assert given.look("tmpfs", "mapped").mapping.rss == 0
        assert given.look("tmpfs", "mapped").mapping.kind == "shared memory"
        assert given.look("tmpfs", "reserved_mapped").mapping.rss == 0
        assert given.look("tmpfs", "written").mapping.rss == size
        assert 0.9 * size <= tmpfs["shared_grew"] <= 1.1 * size
        assert self.judged(given, "CHAIN-20").holds is False
        turned = given._replace(kernel={**given.kernel, "tmpfs": {**tmpfs, "truncated": size}})
        assert self.judged(turned, "CHAIN-20").holds is True

    @clause("CHAIN-21")
    def test_huge_pages_come_with_the_advice(self) -> None:
        """Where the machine has them at all: a kernel without them refuses the advice."""
        given = facts()
        huge, small = given.look("huge", "advised"), given.look("huge", "advised_against")
        assert small.mapping.anonymous_huge == 0
        assert small.faults >= small.mapping.size // PAGE
        if _has_huge_pages(given):
            assert huge.mapping.anonymous_huge in range(2 * MIB, huge.mapping.size + 1)
            assert huge.faults < small.faults
        assert given.kernel["huge"]["explicit_error"] in (0, 12, 22)
        told = f"{huge.mapping.anonymous_huge:,} bytes in huge pages with MADV_HUGEPAGE"
        assert told in self.judged(given, "CHAIN-21").observed
        turned = _kernel_with("huge", "advised", given.kernel["huge"]["advised_against"])
        assert self.judged(turned, "CHAIN-21").observed.startswith("0 bytes in huge pages")

    @clause("CHAIN-22")
    def test_torch_calls_posix_memalign(self) -> None:
        found = facts().torch
        assert found is not None
        calls = [c for c in found.library_calls or () if c.result == found.address]
        assert [(c.function, c.arguments) for c in calls] == [("posix_memalign", (64, MIB))]
        symbols = [frame.symbol or "" for frame in calls[0].stack]
        assert any(symbol.startswith("c10::alloc_cpu") for symbol in symbols)
        assert "libc10.so" in str(calls[0].stack[0].library)
        assert not any(symbol.startswith("TH") for symbol in symbols if "THP" not in symbol)

    @clause("CHAIN-22")
    def test_torch_is_told_by_the_call_that_gave_the_address(self) -> None:
        given = facts()
        found = self.judged(given, "CHAIN-22")
        assert found.holds is False
        assert found.observed.endswith("c10::alloc_cpu > posix_memalign")
        assert given.torch is not None
        calls = given.torch.library_calls or ()
        call = next(c for c in calls if c.result == given.torch.address)
        frame = msgspec.structs.replace(call.stack[0], symbol="THAllocator_allocate(long)")
        old = msgspec.structs.replace(call, function="malloc", stack=(frame,))
        turned = given._replace(torch=msgspec.structs.replace(given.torch, library_calls=(old,)))
        assert self.judged(turned, "CHAIN-22").holds is True
        blind = msgspec.structs.replace(given.torch, library_calls=None)
        assert self.judged(given._replace(torch=blind), "CHAIN-22").holds is None

    @clause("CHAIN-23")
    def test_shm_open_is_an_open_that_strace_has_no_name_for(self) -> None:
        given = facts()
        assert given.shm is not None
        functions = [c.function for c in given.shm.library_calls or ()]
        assert "shm_open" in functions
        assert given.refused is None or "invalid system call 'shm_open'" in given.refused
        assert self.judged(given, "CHAIN-23", "shm_open is").holds is True
        none = msgspec.structs.replace(given.shm, system_calls=())
        assert self.judged(given._replace(shm=none), "CHAIN-23", "shm_open is").holds is False
        blind = msgspec.structs.replace(given.shm, system_calls=None)
        assert self.judged(given._replace(shm=blind), "CHAIN-23", "shm_open is").holds is None
        refused = given._replace(refused="strace: invalid system call 'shm_open'")
        assert self.judged(refused, "CHAIN-23", "strace -e").holds is False
        assert self.judged(given._replace(refused=None), "CHAIN-23", "strace -e").holds is None

    @clause("CHAIN-24")
    def test_pinned_memory_is_locked_and_cuda_is_told_if_seen(self) -> None:
        given = facts()
        assert given.pinned is not None
        states = given.pinned.states
        locked = [states[name].locked or 0 for name in ("before", "allocated", "freed")]
        calls = [c for c in given.pinned.library_calls or () if c.function.startswith("cuda")]
        if not calls:
            assert locked[1] - locked[0] == given.pinned.mapped_bytes
            assert locked[2] == locked[0]
            assert self.judged(given, "CHAIN-24").holds is None
        call = (given.pinned.library_calls or ())[0]
        cuda = msgspec.structs.replace(call, function="cudaHostAlloc", phase="allocate")
        pinned = msgspec.structs.replace(given.pinned, library_calls=(cuda,))
        assert self.judged(given._replace(pinned=pinned), "CHAIN-24").holds is True
        register = msgspec.structs.replace(cuda, function="cudaHostRegister")
        pinned = msgspec.structs.replace(given.pinned, library_calls=(register,))
        assert self.judged(given._replace(pinned=pinned), "CHAIN-24").holds is False


def _malloc() -> dict[str, int]:
    found = facts().malloc
    if found is None:
        pytest.fail("the program that asks malloc was not built")
    return found


def _malloc_with(**changed: int) -> Facts:
    return facts()._replace(malloc={**_malloc(), **changed})


def _kernel_with(what: str, when: str, look: Any) -> Facts:
    given = facts()
    turned = {**given.kernel[what], when: look}
    return given._replace(kernel={**given.kernel, what: turned})


def _has_huge_pages(given: Facts) -> bool:
    assert given.pinned is not None
    setting = given.pinned.machine["transparent_huge_pages"]
    return setting in ("always", "madvise") and given.kernel["huge"]["advised"]["error"] == 0
