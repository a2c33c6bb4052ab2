"""Random histories of a device pool and of a host pool, beside dicts."""

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from torch import Tensor

from kvspec.conformance import clause
from kvspec.conformance.kv_storage.subjects import StorageSubjects, raw, refused, rows
from kvspec.conformance.suite import fuzzing

SIZE, PAGE, LAYERS, HOST = 6, 2, 2, 8
SLOTS = range(PAGE, SIZE + PAGE)


class HistoryConformance(StorageSubjects):
    """One machine over both."""

    @clause(
        *(f"KV-{n}" for n in (9, 12, 14, 15, 16, 17, 18, 24, 25, 26, 27, 28, 29, 30, 31)),
    )
    def test_histories(self) -> None:
        class HistoriesOfThis(Histories):
            suite = self

        run_state_machine_as_test(
            HistoriesOfThis, settings=settings(fuzzing(60), stateful_step_count=15)
        )


class Histories(RuleBasedStateMachine):
    """A row is the bytes of its K and V; where is (layer, slot) of the device, or of the host."""

    suite: HistoryConformance
    slots = st.integers(-1, SIZE + PAGE)
    lists = st.lists(slots, max_size=4)
    proper = st.lists(st.sampled_from(SLOTS), max_size=4, unique=True)

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.suite.mha(size=SIZE, page_size=PAGE, dtype=torch.bfloat16)
        self.host = self.suite.host(self.pool, page_size=PAGE, host_size=HOST * 48e-9)
        self.row_count = 0
        empty = bytes(12), bytes(12)
        self.device = {(layer, slot): empty for layer in range(LAYERS) for slot in SLOTS}
        self.free = list(range(HOST))
        self.held: dict[int, list[tuple[bytes, bytes] | None]] = {}

    def new_rows(self, count: int) -> Tensor:
        self.row_count += 1
        return rows(count, dtype=torch.bfloat16, seed=self.row_count)

    def bad(self, slots: list[int], once: bool) -> bool:
        owned = [slot for slot in slots if slot >= PAGE]
        outside = any(not 0 <= slot < SIZE + PAGE for slot in slots)
        return outside or (once and len(set(owned)) < len(owned))

    @rule(slots=st.one_of(lists, proper), layer=st.integers(0, LAYERS - 1))
    def write(self, slots: list[int], layer: int) -> None:
        keys, values = self.new_rows(len(slots)), self.new_rows(len(slots))
        if self.bad(slots, once=True):
            refused("KV-12", self.pool.set_kv_buffer, layer, slots, keys, values)
            return
        self.pool.set_kv_buffer(layer, slots, keys, values)
        for slot, key, value in zip(slots, keys, values, strict=True):
            self.put(layer, slot, (raw(key), raw(value)))

    def put(self, layer: int, slot: int, row: tuple[bytes, bytes]) -> None:
        if slot >= PAGE:
            self.device[layer, slot] = row

    @rule(into=st.one_of(lists, proper), out_of=proper)
    def move(self, into: list[int], out_of: list[int]) -> None:
        if len(into) != len(out_of) or self.bad(into, once=True):
            refused("KV-15", self.pool.move_kv_cache, into, out_of)
            return
        self.pool.move_kv_cache(into, out_of)
        before = dict(self.device)
        for layer in range(LAYERS):
            for target, source in zip(into, out_of, strict=True):
                self.put(layer, target, before[layer, source])

    @rule(out_of=proper, into=st.one_of(lists, proper))
    def copy(self, out_of: list[int], into: list[int]) -> None:
        copy = self.pool.get_cpu_copy(out_of)
        if len(out_of) != len(into) or self.bad(into, once=True):
            refused("KV-18", self.pool.load_cpu_copy, copy, into)
            return
        self.pool.load_cpu_copy(copy, into)
        before = dict(self.device)
        for layer in range(LAYERS):
            for source, target in zip(out_of, into, strict=True):
                self.put(layer, target, before[layer, source])

    @rule(count=st.integers(-1, HOST + 2))
    def take(self, count: int) -> None:
        if count < 0 or count % PAGE:
            refused("KV-28", self.host.alloc, count)
        elif count > len(self.free):
            assert self.host.alloc(count) is None
        else:
            taken, self.free = self.free[:count], self.free[count:]
            assert self.host.alloc(count).tolist() == taken
            self.held |= {slot: [None] * LAYERS for slot in taken}

    @rule(pages=st.lists(st.integers(0, HOST // PAGE - 1), max_size=2), cut=st.booleans())
    def give_back(self, pages: list[int], cut: bool) -> None:
        slots = [PAGE * page + offset for page in pages for offset in range(PAGE)]
        slots = slots[:-1] if cut else slots
        whole = len(slots) % PAGE == 0 and len(set(slots)) == len(slots)
        if whole and set(slots) <= set(self.held):
            assert self.host.free(slots) == len(slots)
            self.free += slots
            for slot in slots:
                del self.held[slot]
        else:
            refused("KV-28", self.host.free, slots)

    @rule(data=st.data(), device=proper)
    def back_up(self, data: st.DataObject, device: list[int]) -> None:
        host = data.draw(st.lists(st.integers(0, HOST - 1), max_size=4, unique=True))
        given: tuple[Any, ...] = (self.pool, host, device, "kernel")
        if len(host) != len(device) or not set(host) <= set(self.held):
            refused("KV-31", self.host.backup_from_device_all_layer, *given)
            return
        self.host.backup_from_device_all_layer(*given)
        for here, there in zip(host, device, strict=True):
            self.held[here] = [self.device[layer, there] for layer in range(LAYERS)]

    @rule(data=st.data(), device=proper, layer=st.integers(0, LAYERS - 1))
    def load(self, data: st.DataObject, device: list[int], layer: int) -> None:
        known = [slot for slot, kept in self.held.items() if kept[layer] is not None]
        host = data.draw(st.lists(st.sampled_from([*known, 0]), max_size=4, unique=True))
        given: tuple[Any, ...] = (self.pool, host, device, layer, "kernel")
        if len(host) != len(device) or not set(host) <= set(self.held):
            refused("KV-31", self.host.load_to_device_per_layer, *given)
        elif set(host) <= set(known):
            self.host.load_to_device_per_layer(*given)
            for here, there in zip(host, device, strict=True):
                row = self.held[here][layer]
                assert row is not None
                self.put(layer, there, row)

    @rule()
    def clear(self) -> None:
        self.host.clear()
        self.free, self.held = list(range(HOST)), {}

    @invariant()
    def every_row_is_what_was_put_there(self) -> None:
        for layer, tensors in enumerate(self.pool.view().layers):
            for place, found in enumerate(tensors):
                assert found == b"".join(self.device[layer, slot][place] for slot in SLOTS)
        view = self.host.view()
        assert view.free == tuple(self.free)
        assert set(view.rows) == set(self.held)
        assert self.host.available_size() == len(self.free)
        for slot, found in view.rows.items():
            for layer, row in enumerate(self.held[slot]):
                if row is not None:
                    parts = [found[12 * at : 12 * at + 12] for at in (layer, LAYERS + layer)]
                    assert tuple(parts) == row
