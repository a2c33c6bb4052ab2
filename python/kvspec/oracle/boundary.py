"""The oracle's border with torch: everything behind it is lists, sets and dicts."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvspec.errors import ContractError, HostMemoryError
from kvspec.interfaces.memory_saver import FACTORIES

KV_TYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
)
"""What KV is kept in; all but those of one byte can be cast to any of them."""

_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, *_UNSIGNED)


def numbers(given: "Sequence[int] | Tensor | memoryview", clause: str) -> list[int]:
    """The integers of a list, buffer or CPU tensor of one dimension; ContractError otherwise."""
    if isinstance(given, Tensor):
        if given.device.type != "cpu":
            raise ContractError(f"{clause}: a tensor on {given.device} was given, use .cpu()")
        if given.dim() != 1 or given.dtype not in _INTEGERS:
            raise ContractError(
                f"{clause}: a tensor of shape {list(given.shape)} and {given.dtype} was given,"
                " not integers in one dimension"
            )
        return [int(number) for number in given.tolist()]
    dimensions = getattr(given, "ndim", 1)
    if dimensions != 1:
        raise ContractError(f"{clause}: {type(given).__name__} has {dimensions} dimensions, not 1")
    try:
        return [operator.index(number) for number in given]
    except TypeError:
        raise ContractError(f"{clause}: {given!r} is not a sequence of integers") from None


def tensor(given: Sequence[int]) -> Tensor:
    """An int64 tensor on the CPU."""
    return torch.tensor(given, dtype=torch.int64)


def is_tensor(given: object) -> bool:
    """Whether torch can read it."""
    return isinstance(given, Tensor)


def stored_as(dtype: torch.dtype) -> torch.dtype:
    """What tensors of KV are made of: torch has few operations for types of one byte."""
    return torch.uint8 if dtype.itemsize == 1 else dtype


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU."""
    return torch.zeros(tuple(shape), dtype=dtype)


def raw(given: Tensor) -> bytes:
    """The bytes of its elements, in order."""
    return bytes(given.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def unsigned(numbers: Sequence[int]) -> Tensor:
    """A uint64 tensor on the CPU."""
    return torch.tensor(numbers, dtype=torch.uint64)


class Capture(TorchDispatchMode):
    """Inside, what factories of torch return on the CPU is copied into arenas (SAVER-3)."""

    def __init__(self, arenas: Any) -> None:
        """`arenas` is their class."""
        TorchDispatchMode.__init__(self)
        self.arenas = arenas

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports the compiler, for seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.overloadpacket.__name__, kwargs or {}
        if name not in FACTORIES or "out" in given:
            return func(*args, **given)
        of = next((each.device for each in args if isinstance(each, Tensor)), torch.device("cpu"))
        device = torch.device(given.get("device") or of)
        if device.type not in ("cpu", "meta"):
            raise ContractError(
                f"SAVER-7: {name} on {device} inside a region needs CUDA and the package"
                " torch_memory_saver"
            )
        if given.get("pin_memory"):
            raise ContractError(f"SAVER-7: {name} of pinned memory, which cannot be given back")
        made = func(*args, **given)
        if not _is_new_memory(made):
            return made
        storage = self.arenas("mmap", made.untyped_storage().nbytes()).tensor().untyped_storage()
        copy = torch.empty(0, dtype=made.dtype).set_(storage, 0, made.shape, made.stride())
        return copy.copy_(made)


def _is_new_memory(made: Tensor) -> bool:
    """Dense memory of the CPU, any of it, and not somebody else's, as a numpy array's is."""
    dense = made.layout == torch.strided and made.device.type == "cpu" and not made.is_quantized
    return dense and made.untyped_storage().resizable() and made.untyped_storage().nbytes() > 0


def memory_tensor(memory: Any) -> Tensor:
    """A uint8 tensor over the memory of an object that it keeps alive: something with a buffer."""
    return torch.frombuffer(memory, dtype=torch.uint8)


BYTES = torch.uint8


def torch_bytes(nbytes: int) -> tuple[int, Callable[[], None]]:
    """The address of bytes that torch allocates, and what lets them go (HOST-4)."""
    try:
        kept = [torch.empty(nbytes, dtype=BYTES)]
    except RuntimeError:
        raise HostMemoryError(
            f"HOST-4: torch cannot have {nbytes} bytes: Cannot allocate memory"
        ) from None
    return kept[0].data_ptr(), kept.clear


def tensor_over(memory: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor that holds the memoryview and lies over its bytes (HOST-13)."""
    if not memory:
        return torch.empty(list(shape), dtype=dtype)
    return memory_tensor(memory).view(dtype).view(list(shape))


def has_device() -> bool:
    """Whether torch has a CUDA device."""
    return torch.cuda.is_available()


def pin(address: int, nbytes: int) -> Callable[[], object] | None:
    """Register memory with the device; what undoes it, or None without a device (HOST-22)."""
    if not has_device():
        return None
    runtime = cast(Any, torch.cuda).cudart()
    code = int(runtime.cudaHostRegister(address, nbytes, 1))  # cudaHostRegisterPortable
    if code != 0:
        raise HostMemoryError(
            f"HOST-22: cudaHostRegister of {nbytes} bytes failed with error {code}"
        )
    return lambda: runtime.cudaHostUnregister(address)
