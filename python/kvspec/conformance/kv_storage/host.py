"""The pools of the host, their books and their copies: KV-22 to KV-33."""

from itertools import product
from typing import Any

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.kv_storage.subjects import (
    LAYOUTS,
    StorageSubjects,
    layouts,
    raw,
    refused,
    rows,
    same,
    some_dtypes,
)

KINDS = ("mha", "mla")
kinds = pytest.mark.parametrize("kind", KINDS)

BAD_TRANSFERS: dict[str, dict[str, Any]] = {
    "too few of the device": {"device_indices": [1, 2, 3]},
    "too many of the device": {"device_indices": [1, 2, 3, 4, 5]},
    "a slot of the host twice": {"host_indices": [4, 5, 6, 4]},
    "a slot of the device twice": {"device_indices": [1, 2, 3, 1]},
    "a slot below 0 of the host": {"host_indices": [4, 5, 6, -1]},
    "a slot beyond the host": {"host_indices": [4, 5, 6, 16]},
    "a slot of the host that is free": {"host_indices": [4, 5, 6, 8]},
    "a slot below 0 of the device": {"device_indices": [1, 2, 3, -1]},
    "a slot beyond the device": {"device_indices": [1, 2, 3, 9]},
    "the sink": {"device_indices": [1, 2, 3, 0]},
    "no such backend": {"io_backend": "teleport"},
    "no integers": {"host_indices": [4.0, 5.0, 6.0, 7.0]},
}

NO_PAGES: list[Any] = [
    [12, 13, 14, 15],
    [0, 1, 2, 3, 12, 13, 14, 15],
    [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3],
    [0, 0, 0, 0],
    [0, 1, 2],
    [0, 1, 2, 3, 4],
    [1, 2, 3, 4],
    [3, 2, 1, 0],
    [0, 1, 2, 4],
    [-4, -3, -2, -1],
    [16, 17, 18, 19],
    [2**32, 2**32 + 1, 2**32 + 2, 2**32 + 3],
    [0.0, 1.0, 2.0, 3.0],
    None,
]


class HostConformance(StorageSubjects):
    """Books and transfers."""

    def pair(self, kind: str, layout: str = "layer_first", **given: Any) -> tuple[Any, Any, Any]:
        """A device pool with any bits, a host pool of 16 slots, and slots 4 to 7 of it, held."""
        pool = getattr(self, kind)(start_layer=3, **given)
        for index, tensor in enumerate(self.device_tensors(pool)):
            tensor.view(pool.dtype)[:] = rows(*tensor.shape, dtype=pool.dtype, seed=index)
        host = self.host(pool, layout=layout)
        slots = host.alloc(8)
        host.free(slots[:4])
        return pool, host, slots[4:]

    def device_tensors(self, pool: Any) -> list[Any]:
        """Keys of all layers first."""
        return [*pool.kv_buffer] if hasattr(pool, "kv_buffer") else [*pool.k_buffer, *pool.v_buffer]

    def host_tensors(self, host: Any) -> list[Any]:
        """Keys of all layers first, [size, heads, dim] each."""
        halves = host.kv_buffer if host.kv_buffer.dim() == 5 else [host.kv_buffer]
        first = host.layout == "page_first"
        return [
            half[:, layer] if first else half[layer]
            for half in halves
            for layer in range(host.layer_num)
        ]

    # -- memory ----------------------------------------------------------------------------------

    @clause("KV-22")
    @some_dtypes
    @layouts
    def test_the_shape_of_a_layout(self, layout: str, dtype: torch.dtype) -> None:
        host = self.host(self.mha(dtype=dtype, start_layer=3), layout=layout)
        middle = (2, 16) if layout == "layer_first" else (16, 2)
        assert host.kv_buffer.shape == (2, *middle, 2, 3)
        store = torch.uint8 if dtype.itemsize == 1 else dtype
        assert (host.dtype, host.kv_buffer.dtype) == (store, store)
        assert (host.layer_num, host.start_layer, host.end_layer) == (2, 3, 4)
        assert (host.size, host.page_num, host.layout) == (16, 4, layout)
        assert host.size_per_token == host.get_size_per_token() == 2 * 2 * 6 * dtype.itemsize
        latents = self.host(self.mla(dtype=dtype), layout=layout)
        assert latents.kv_buffer.shape == (*middle, 1, 6)
        assert latents.get_size_per_token() == 2 * 6 * dtype.itemsize

    @clause("KV-22")
    @pytest.mark.parametrize(
        ("ratio", "gigabytes", "size"),
        [
            (2.0, 0, 16),
            (1.5, 0, 12),
            (2.4, 0, 16),
            (3.9, 0, 28),
            (9.0, 96e-9 * 13.5, 12),
            (0, 1930e-9, 20),
        ],
    )
    def test_how_many_slots(self, ratio: float, gigabytes: float, size: int) -> None:
        host = self.host(host_to_device_ratio=ratio, host_size=gigabytes)
        assert (host.size, host.available_size(), host.page_num) == (size, size, size // 4)

    @clause("KV-22")
    def test_pinned_where_that_is_possible(self) -> None:
        host = self.host(pin_memory=True)
        assert host.pin_memory
        assert host.kv_buffer.is_pinned() == torch.cuda.is_available()

    @clause("KV-23")
    @pytest.mark.parametrize(
        "given",
        [
            {"host_to_device_ratio": 1.0},
            {"host_to_device_ratio": 1.4},
            {"host_to_device_ratio": 0.0},
            {"host_to_device_ratio": -2.0},
            {"host_size": 96e-9 * 8},
            {"layout": "page_last"},
            {"layout": None},
        ],
    )
    @kinds
    def test_no_host_pool_of_what_cannot_be(self, kind: str, given: dict[str, Any]) -> None:
        pool = getattr(self, kind)()
        if "host_size" in given and kind == "mla":
            given = {"host_size": 48e-9 * 8}
        refused("KV-23", lambda: self.host(pool, **given))

    @clause("KV-23")
    def test_no_host_pool_for_a_pool_of_another_kind(self) -> None:
        windows = getattr(self.windows(), "_subject", None) or self.windows()
        refused("KV-23", self.host, windows)

    @clause("KV-2")
    @pytest.mark.parametrize("given", [{"page_size": 0}, {"page_size": -4}, {"device": "cuda"}])
    def test_no_host_pool_elsewhere(self, given: dict[str, Any]) -> None:
        refused("KV-2", lambda: self.host(**given))

    # -- books -----------------------------------------------------------------------------------

    @clause("KV-24")
    def test_a_slot_is_free_or_held(self) -> None:
        host = self.host()
        slots = host.alloc(8)
        host.free(slots[4:])
        free, held = host.view()
        assert sorted([*free, *held]) == list(range(16))
        assert host.available_size() == len(free) == 12
        for turn in range(20):
            taken = host.alloc(4 * (turn % 4))
            assert taken is not None
            host.free(taken)
        assert sorted([*host.view().free, *host.view().rows]) == list(range(16))

    @clause("KV-25", "KV-27")
    def test_slots_come_in_the_order_in_which_they_were_freed(self) -> None:
        host = self.host()
        taken = host.alloc(12)
        assert taken.tolist() == list(range(12))
        assert (taken.dtype, taken.device.type) == (torch.int64, "cpu")
        assert host.free(torch.cat([taken[8:], taken[:4]])) == 8
        assert host.free([4, 5, 6, 7]) == 4
        assert host.available_size() == 16
        assert host.alloc(16).tolist() == [*range(12, 16), *range(8, 12), *range(8)]
        assert host.alloc(0).tolist() == []

    @clause("KV-25")
    def test_slots_that_are_kept_keep_nothing_else(self) -> None:
        """A view of a free list would keep all of it alive."""
        host = self.host(host_to_device_ratio=16.0)
        kept = [host.alloc(4) for _ in range(8)]
        host.free(kept[3])
        kept[3] = host.alloc(8)
        assert [slots.untyped_storage().nbytes() for slots in kept] == [s.nbytes for s in kept]
        assert len({slots.untyped_storage().data_ptr() for slots in kept}) == 8
        kept[0].fill_(77)
        before = host.view()
        kept[1].fill_(78)
        assert host.view() == before
        assert len(host.alloc(host.available_size())) == 128 - 32 - 4

    @clause("KV-26")
    @pytest.mark.parametrize("count", [12, 16, 2**40])
    def test_too_many_slots_are_none(self, count: int) -> None:
        host = self.host()
        host.alloc(8)
        before = host.view()
        assert host.alloc(count) is None
        assert host.view() == before
        assert len(host.alloc(8)) == 8

    @clause("KV-27")
    def test_clear_frees_every_slot(self) -> None:
        host = self.host()
        host.free(host.alloc(16).flip(0).view(4, 4).flip(1).reshape(-1))
        host.alloc(8)
        host.clear()
        assert host.view() == (tuple(range(16)), {})
        assert host.available_size() == 16
        assert host.alloc(16).tolist() == list(range(16))

    @clause("KV-28")
    @pytest.mark.parametrize("count", [-4, -1, 1, 3, 5])
    def test_slots_are_taken_in_pages(self, count: int) -> None:
        host = self.host()
        host.alloc(4)
        self.refuses(host, "KV-28", host.alloc, count)

    @clause("KV-28")
    def test_slots_are_given_back_in_pages_once(self) -> None:
        host = self.host()
        host.alloc(12)
        for slots in NO_PAGES:
            self.refuses(host, "KV-28", host.free, slots)
        assert host.free(range(12)) == 12
        self.refuses(host, "KV-28", host.free, [4, 5, 6, 7])

    # -- transfers -------------------------------------------------------------------------------

    @clause("KV-29")
    @some_dtypes
    @layouts
    @kinds
    def test_rows_go_to_the_host(self, kind: str, layout: str, dtype: torch.dtype) -> None:
        pool, host, slots = self.pair(kind, layout, dtype=dtype)
        before, device = [raw(rows_[8:]) for rows_ in self.host_tensors(host)], pool.view()
        source = torch.tensor([8, 2, 3, 1])
        host.backup_from_device_all_layer(pool, slots, source, "kernel")
        for here, there in zip(self.host_tensors(host), self.device_tensors(pool), strict=True):
            assert same(here[slots], there[source])
        assert [raw(rows_[8:]) for rows_ in self.host_tensors(host)] == before
        assert pool.view() == device

    @clause("KV-30")
    @some_dtypes
    @layouts
    @kinds
    def test_rows_of_one_layer_come_back(self, kind: str, layout: str, dtype: torch.dtype) -> None:
        pool, host, slots = self.pair(kind, layout, dtype=dtype)
        host.backup_from_device_all_layer(pool, slots, [8, 2, 3, 1], "kernel")
        expected = [tensor.clone() for tensor in self.device_tensors(pool)]
        held = host.view()
        for tensor in expected[1::2]:
            tensor[[5, 1, 8, 7]] = tensor[[2, 3, 8, 1]].clone()
        picked = [int(slots[1]), int(slots[2]), int(slots[0]), int(slots[3])]
        host.load_to_device_per_layer(pool, picked, [5, 1, 8, 7], 4, "kernel")
        found = self.device_tensors(pool)
        assert [raw(tensor[1:]) for tensor in found] == [raw(tensor[1:]) for tensor in expected]
        assert host.view() == held

    @clause("KV-29", "KV-30")
    @pytest.mark.parametrize("page_size", [1, 4])
    def test_a_page_goes_and_comes_back(self, page_size: int) -> None:
        for kind, (layout, backend) in product(
            KINDS, [*((layout, "kernel") for layout in LAYOUTS), ("layer_first", "direct")]
        ):
            pool, host, slots = self.pair(kind, layout, page_size=page_size)
            page = list(range(4, 8))
            before = pool.view()
            host.backup_from_device_all_layer(pool, slots, page, backend)
            for tensor in self.device_tensors(pool):
                tensor[page] = 0
            for layer in (4, 3):
                host.load_to_device_per_layer(pool, slots, page, layer, backend)
            assert pool.view() == before

    @clause("KV-31")
    @kinds
    def test_a_transfer_is_refused_whole(self, kind: str) -> None:
        pool, host, _ = self.pair(kind)
        for why in BAD_TRANSFERS:
            self.refuses_transfer(pool, host, why)

    def refuses_transfer(self, pool: Any, host: Any, why: str) -> None:
        """In both directions."""
        given = {"host_indices": [4, 5, 6, 7], "device_indices": [1, 2, 3, 4]}
        given |= {"device_pool": pool, "io_backend": "kernel"} | BAD_TRANSFERS[why]
        before = pool.view()
        self.refuses(host, "KV-31", lambda: host.backup_from_device_all_layer(**given))
        self.refuses(host, "KV-31", lambda: host.load_to_device_per_layer(**given, layer_id=3))
        assert pool.view() == before

    @clause("KV-31")
    def test_pages_first_are_not_copied_directly(self) -> None:
        pool, host, slots = self.pair("mha", "page_first")
        given = (pool, slots, [1, 2, 3, 4])
        self.refuses(host, "KV-31", host.backup_from_device_all_layer, *given, "direct")
        self.refuses(host, "KV-31", host.load_to_device_per_layer, *given, 3, "direct")

    @clause("KV-31")
    @pytest.mark.parametrize(
        "other",
        [
            {"layer_num": 3},
            {"start_layer": 0},
            {"dtype": torch.float16},
            {"head_num": 1},
            {"size": 7},
            {"page_size": 2},
        ],
    )
    def test_a_transfer_is_with_such_a_pool(self, other: dict[str, Any]) -> None:
        _, host, slots = self.pair("mha")
        for stranger in (self.mha(**({"start_layer": 3} | other)), self.mla(start_layer=3)):
            given = (stranger, slots, [2, 3, 4, 5])
            self.refuses(host, "KV-31", host.backup_from_device_all_layer, *given, "kernel")
            self.refuses(host, "KV-31", host.load_to_device_per_layer, *given, 3, "kernel")

    # -- flat pages ------------------------------------------------------------------------------

    @clause("KV-32")
    @some_dtypes
    @layouts
    @kinds
    def test_a_flat_page_is_in_the_order_of_the_layout(
        self, kind: str, layout: str, dtype: torch.dtype
    ) -> None:
        pool, host, slots = self.pair(kind, layout, dtype=dtype)
        host.backup_from_device_all_layer(pool, slots, [1, 2, 3, 4], "kernel")
        page = host.get_flat_data_page(4)
        tensors = [tensor[1:5].unsqueeze(0) for tensor in self.device_tensors(pool)]
        halves = [torch.cat(tensors[at : at + 2]) for at in range(0, len(tensors), 2)]
        if layout == "page_first":
            halves = [half.transpose(0, 1) for half in halves]
        assert same(page, torch.cat([half.reshape(-1) for half in halves]))
        assert same(host.get_dummy_flat_data_page(), torch.zeros_like(page))
        held = host.view()
        page.fill_(0)
        assert host.view() == held

    @clause("KV-32", "KV-11")
    @layouts
    @kinds
    def test_a_flat_page_is_set_where_it_is_told(self, kind: str, layout: str) -> None:
        pool, host, slots = self.pair(kind, layout)
        host.backup_from_device_all_layer(pool, slots, [1, 2, 3, 4], "kernel")
        page = host.get_flat_data_page(4)
        other = host.alloc(4).tolist()
        before, given = host.view().rows, raw(page)
        host.set_from_flat_data_page(other[0], page)
        assert raw(page) == given
        after = host.view().rows
        assert [after[slot] for slot in other] == [before[slot] for slot in slots.tolist()]
        assert {slot: after[slot] for slot in slots.tolist()} == {
            slot: before[slot] for slot in slots.tolist()
        }
        assert same(host.get_flat_data_page(other[0]), page)

    @clause("KV-33")
    @kinds
    def test_no_page_begins_there(self, kind: str) -> None:
        _, host, _ = self.pair(kind)
        page = host.get_dummy_flat_data_page()
        for index in (-4, 1, 6, 16, 20, 8, 2**40):
            self.refuses(host, "KV-33", host.get_flat_data_page, index)
            self.refuses(host, "KV-33", host.set_from_flat_data_page, index, page)

    @clause("KV-33")
    @kinds
    def test_data_that_is_no_page(self, kind: str) -> None:
        _, host, _ = self.pair(kind)
        page = host.get_dummy_flat_data_page()
        wrong: list[Any] = [
            page[1:],
            page.double(),
            page.view(4, -1),
            page.tolist(),
            page.to("meta"),
        ]
        for data in wrong:
            self.refuses(host, "KV-33", host.set_from_flat_data_page, 4, data)
