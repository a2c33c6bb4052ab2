"""The two namespaces that have the classes of the specification under the same names."""

import importlib
from types import ModuleType

from kvspec import has_native

__all__ = ["implementation"]

_MODULES = {"native": "kvspec", "oracle": "kvspec.oracle"}


def implementation(name: str) -> ModuleType:
    """`native` or `oracle`; ImportError if that is the extension and it is absent."""
    if name == "native" and not has_native():
        raise ImportError("the native core is absent: only the oracle can run")
    return importlib.import_module(_MODULES[name])
