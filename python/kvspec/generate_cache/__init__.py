"""Prefix reuse across calls of transformers' `generate`. Spec: GEN.

    cache = kvspec.KvspecCache(model, max_total_tokens=8192)
    out = model.generate(ids, past_key_values=cache)
    out = model.generate(more_ids, past_key_values=cache)      # computes what the tree has not

Three parts: `session` is what transformers sees, `call` is what one call of `generate` holds of the
pools, and `attachment` is what stands on the model: hooks before and after its forward, where the
token ids are seen that are really computed, and a `generate` that knows when a call ends.
"""

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ImportError("kvspec.KvspecCache needs transformers: pip install 'kvspec[models]'")

from kvspec.generate_cache.session import CacheSession, KvspecCache

__all__ = ["CacheSession", "KvspecCache"]
