"""Runs a decoder of transformers over KV in slots: the model behind a scheduler. Spec: RUN.

    model, tokenizer = load_smollm2()
    runner = ModelRunner(model, page_size=16, max_running_requests=8, context_length=2048)
    rows, allocator = runner.get_memory_pool()
    result = runner.forward_batch_generation(batch)

`decoder` is the model's copy, `attention` what its layers are answered by, `pools` and `sizing`
what KV lies in, `reference` says whether what was sampled is right, `models` has some to run.
transformers is loaded when a model is made or run; `pip install 'kvspec[models]'` brings it.
"""

from kvspec.interfaces.model_runner import ForwardBatch, GenerationBatchResult, ModelWorker
from kvspec.model_runner.models import TinyKind, tiny_model
from kvspec.model_runner.pools import packed
from kvspec.model_runner.reference import (
    Comparison,
    Mismatch,
    compare_with_reference,
    reference_logits,
    reference_model,
)
from kvspec.model_runner.runner import Implementation, ModelRunner
from kvspec.model_runner.sizing import MemoryFigures, PoolSizes, memory_figures, pool_sizes
from kvspec.model_runner.weights import (
    Loaded,
    MissingPackageError,
    load_model,
    load_smollm2,
    written_once,
)

__all__ = [
    "Comparison",
    "ForwardBatch",
    "GenerationBatchResult",
    "Implementation",
    "Loaded",
    "MemoryFigures",
    "Mismatch",
    "MissingPackageError",
    "ModelRunner",
    "ModelWorker",
    "PoolSizes",
    "TinyKind",
    "compare_with_reference",
    "load_model",
    "load_smollm2",
    "memory_figures",
    "packed",
    "pool_sizes",
    "reference_logits",
    "reference_model",
    "tiny_model",
    "written_once",
]
