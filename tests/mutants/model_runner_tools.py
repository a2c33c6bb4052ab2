"""Broken arithmetic, references and folders. Each must fail on the clause it breaks."""

import shutil
from pathlib import Path
from typing import Any

import torch

import kvspec.oracle
from kvspec.conformance.model_runner import ModelRunnerToolsConformance
from kvspec.conformance.mutants import Registry
from kvspec.errors import ContractError, HostMemoryError
from kvspec.model_runner import reference, sizing, weights
from kvspec.model_runner.sizing import PoolSizes

registry = Registry(ModelRunnerToolsConformance, kvspec.oracle)


@registry.mutant("RUN-10", "RUN-12", replaces="pool_sizes")
def ignores_the_fraction(memory: Any, **given: Any) -> PoolSizes:
    return sizing.pool_sizes(memory, **{**given, "mem_fraction_static": 1.0})


@registry.mutant("RUN-10", "RUN-11", "RUN-12", replaces="pool_sizes")
def keeps_of_what_is_left(memory: Any, **given: Any) -> PoolSizes:
    """The fraction is of the total, whatever of it others have."""
    return sizing.pool_sizes(memory._replace(total=memory.available), **given)


@registry.mutant("RUN-10", "RUN-11", replaces="pool_sizes")
def takes_what_it_is_told(memory: Any, max_total_tokens: Any = None, **given: Any) -> PoolSizes:
    """Though there is not room for it."""
    if max_total_tokens is None:
        return sizing.pool_sizes(memory, **given)
    full = max_total_tokens // given["page_size"] * given["page_size"]
    return PoolSizes(full, full if given.get("window_layers") else None)


@registry.mutant("RUN-11", "RUN-10", replaces="pool_sizes")
def forgets_the_least_of_a_window(memory: Any, **given: Any) -> PoolSizes:
    """Whose pool is then full as soon as a window is across pages."""
    return sizing.pool_sizes(memory, **{**given, "window": given.get("window") and 1})


@registry.mutant("RUN-11", "RUN-10", replaces="pool_sizes")
def shares_evenly(memory: Any, **given: Any) -> PoolSizes:
    return sizing.pool_sizes(memory, **{**given, "swa_full_tokens_ratio": 1.0})


@registry.mutant("RUN-12", replaces="pool_sizes")
def gives_an_empty_pool(memory: Any, **given: Any) -> PoolSizes:
    try:
        return sizing.pool_sizes(memory, **given)
    except HostMemoryError:
        return PoolSizes(0, None)


@registry.mutant("RUN-15", replaces="reference_logits")
def is_as_exact_as_the_engine(model64: Any, tokens: Any, positions: Any = None) -> torch.Tensor:
    return reference.reference_logits(model64, tokens, positions).float()


@registry.mutant("RUN-15", replaces="reference_logits")
def counts_positions_from_the_end(model64: Any, tokens: Any, positions: Any = None) -> torch.Tensor:
    at = None if positions is None else [len(tokens) - 1 - each for each in positions]
    return reference.reference_logits(model64, tokens, at)


@registry.mutant("RUN-16", replaces="compare_with_reference")
def excuses_whatever_is_beside_a_tie(*, tolerance: float = 1e-3, **given: Any) -> Any:
    found = reference.compare_with_reference(tolerance=tolerance, **given)
    if found.smallest_margin < tolerance:
        return found._replace(near_ties=len(found.mismatches) + found.near_ties, mismatches=())
    return found


@registry.mutant("RUN-16", replaces="compare_with_reference")
def excuses_nothing(*, tolerance: float = 1e-3, **given: Any) -> Any:
    if not tolerance >= 0:
        raise ContractError("RUN-17: no tolerance")
    return reference.compare_with_reference(tolerance=0.0, **given)


@registry.mutant("RUN-16", "RUN-17", replaces="compare_with_reference")
def compares_the_first_token(*, output_ids: Any, logits: Any = None, **given: Any) -> Any:
    rest = None if logits is None else logits[:1]
    found = reference.compare_with_reference(output_ids=output_ids[:1], logits=rest, **given)
    return found._replace(tokens=len(output_ids))


@registry.mutant("RUN-17", replaces="compare_with_reference")
def takes_any_tolerance(*, tolerance: float = 1e-3, **given: Any) -> Any:
    known = tolerance if tolerance >= 0 else 0.0
    return reference.compare_with_reference(tolerance=known, **given)


@registry.mutant("RUN-18", replaces="written_once")
def writes_in_place(folder: Path, write: Any) -> None:
    """Whoever looks meanwhile, or after a fault, takes a half for the whole."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        write(folder)


@registry.mutant("RUN-18", replaces="written_once")
def writes_it_every_time(folder: Path, write: Any) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    weights.written_once(folder, write)


@registry.mutant("RUN-19", replaces="load_smollm2")
def makes_the_cache_first(cache_dir: Path, progress: Any) -> Any:
    cache_dir.mkdir()
    return weights.load_smollm2(cache_dir, progress)
