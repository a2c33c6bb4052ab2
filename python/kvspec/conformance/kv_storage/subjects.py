"""The pools under test, and rows to put into them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kvspec.conformance.suite import Conformance
from kvspec.errors import ContractError
from kvspec.interfaces.kv_storage import HostKVCache, MHATokenToKVPool, MLATokenToKVPool, SWAKVPool

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "StorageSubjects",
    "dtypes",
    "layouts",
    "raw",
    "refused",
    "rows",
    "same",
    "some_dtypes",
]

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
)
LAYOUTS = ("layer_first", "page_first")


def _each(types: Sequence[torch.dtype]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", types, ids=lambda dtype: str(dtype).split(".")[1])


dtypes = _each(DTYPES)
some_dtypes = _each((torch.float32, torch.bfloat16, torch.float8_e4m3fn))
"""One of each way to store and to cast."""
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def rows(
    count: int,
    *row: int,
    dtype: torch.dtype = torch.float32,
    start: int = 1,
    seed: int | None = None,
) -> Tensor:
    """Rows [count, *row] of numbers that every type has, or of any bits if there is a seed."""
    shape = (count, *(row or (2, 3)))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator)
        return bits.to(torch.uint8).view(dtype).squeeze(-1)
    flat = torch.arange(start, start + torch.Size(shape).numel()) % 15
    return flat.reshape(shape).to(torch.float32).to(dtype)


def raw(tensor: Tensor) -> bytes:
    """Its bytes: a NaN is not equal to itself."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bit by bit."""
    return one.shape == other.shape and raw(one) == raw(other)


def refused(clause_id: str, call: Callable[..., object], *given: object) -> None:
    """It refuses what was given, and names the clause."""
    with pytest.raises(ContractError) as caught:
        call(*given)
    assert str(caught.value).startswith(f"{clause_id}: ")


class StorageSubjects(Conformance):
    """Small pools: 8 slots, 2 layers, rows [2, 3], unless told otherwise."""

    def mha(self, **given: Any) -> Any:
        """K and V of every head."""
        defaults = {"size": 8, "page_size": 1, "dtype": torch.float32, "device": "cpu"}
        defaults |= {"head_num": 2, "head_dim": 3, "layer_num": 2, "enable_memory_saver": False}
        return self.subject("MHATokenToKVPool", MHATokenToKVPool, "kv_storage", **defaults | given)

    def mla(self, **given: Any) -> Any:
        """A latent of 4 + 2."""
        defaults = {"size": 8, "page_size": 1, "dtype": torch.float32, "device": "cpu"}
        defaults |= {"kv_lora_rank": 4, "qk_rope_head_dim": 2, "layer_num": 2}
        defaults |= {"enable_memory_saver": False}
        return self.subject("MLATokenToKVPool", MLATokenToKVPool, "kv_storage", **defaults | given)

    def windows(self, mapping: object = (0, 2, 0, 1, 3, 0, 0, 0, 0), **given: Any) -> Any:
        """8 full and 3 window slots; layers 1 and 2 have a window; slots 1, 3 and 4 a pair."""
        defaults = {"size": 8, "size_swa": 3, "dtype": torch.float32, "device": "cpu"}
        defaults |= {"head_num": 2, "head_dim": 3, "page_size": 1, "enable_memory_saver": False}
        defaults |= {"swa_attention_layer_ids": [2, 1], "full_attention_layer_ids": [0, 3]}
        pool = self.subject("SWAKVPool", SWAKVPool, "kv_storage", **defaults | given)
        if mapping is not None:
            known = torch.tensor(mapping) if isinstance(mapping, tuple) else mapping
            pool.register_mapping(known)
        return pool

    def host(self, pool: Any = None, **given: Any) -> Any:
        """16 slots in pages of 4 for the 8 of a device pool."""
        pool = self.mha() if pool is None else pool
        name = "MLATokenToKVPoolHost" if hasattr(pool, "kv_lora_rank") else "MHATokenToKVPoolHost"
        defaults = {"device_pool": getattr(pool, "_subject", pool), "host_to_device_ratio": 2.0}
        defaults |= {"host_size": 0, "page_size": 4, "layout": "layer_first"}
        defaults |= {"pin_memory": False, "device": "cpu"}
        return self.subject(name, HostKVCache, "kv_storage", **defaults | given)

    def refuses(
        self, subject: Any, clause_id: str, call: Callable[..., object], *given: object
    ) -> None:
        """It refuses what was given, names the clause, and changes nothing."""
        before = subject.view()
        refused(clause_id, call, *given)
        assert subject.view() == before
