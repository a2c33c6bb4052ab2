"""Conformance of prefix reuse in transformers. Spec: GEN."""

from kvspec.conformance.generate_cache.calls import CallsConformance
from kvspec.conformance.generate_cache.driving import (
    FAMILIES,
    language_model,
    plain,
    words,
)
from kvspec.conformance.generate_cache.rows import RowsConformance

__all__ = [
    "FAMILIES",
    "GenerateCacheConformance",
    "language_model",
    "plain",
    "words",
]


class GenerateCacheConformance(CallsConformance, RowsConformance):
    """`impl` says which pools are used, or holds a class `KvspecCache` that stands in for it."""
