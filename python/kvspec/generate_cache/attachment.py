"""What stands on a model while a cache is open for it. Spec: GEN.

Two hooks and a `generate` of the instance, the same for all its caches and without state of their
own; the last cache that is closed takes them away.
"""

import inspect
from functools import wraps
from types import MethodType
from typing import Any, Protocol, cast

from torch import Tensor
from torch.nn import Module
from transformers import Cache, GenerationMixin
from transformers.utils.generic import ModelOutput

__all__ = ["CACHE", "Holder", "attach", "detach", "is_attached"]

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""What this transformers calls it; `past_key_values` is taken as well."""

_NAMES = ("past_key_values", "cache")
_PLACE = "_kvspec_attachment"
_GENERATE = "generate"


class Holder(Protocol):
    """What a model is given for a cache: a `CacheSession`."""

    def generate(self, model: Module, plain: Any, args: Any, kwargs: dict[str, Any]) -> object: ...

    def before_forward(self, model: Module, kwargs: dict[str, Any]) -> dict[str, Any]: ...

    def after_forward(self) -> None: ...


class _Attachment:
    def __init__(self, model: Module) -> None:
        self.users = 0
        self.before: Any = model.__dict__.get(_GENERATE)
        """A `generate` of the instance that was there before."""
        self.hooks = (
            model.register_forward_pre_hook(_before_forward, with_kwargs=True),
            model.register_forward_hook(_after_forward, with_kwargs=True),
        )
        setattr(model, _GENERATE, MethodType(_generate, model))


def attach(model: Module) -> None:
    """One cache more stands on the model (GEN-13)."""
    if _PLACE not in model.__dict__:
        setattr(model, _PLACE, _Attachment(model))
    model.__dict__[_PLACE].users += 1


def detach(model: Module) -> None:
    """One cache less; with the last one the model is as it was (GEN-13)."""
    attachment = model.__dict__.get(_PLACE)
    if attachment is None:
        return
    attachment.users -= 1
    if attachment.users:
        return
    for hook in attachment.hooks:
        hook.remove()
    ours = getattr(model.__dict__.get(_GENERATE), "__func__", None) is _generate
    if ours and attachment.before is not None:
        setattr(model, _GENERATE, attachment.before)
    elif ours:
        delattr(model, _GENERATE)
    delattr(model, _PLACE)


def is_attached(model: Module) -> bool:
    """Whether a cache stands on it."""
    return _PLACE in model.__dict__


def _holder(kwargs: dict[str, Any]) -> Holder | None:
    """The session among the arguments, whatever it is called."""
    for name in _NAMES:
        if isinstance(kwargs.get(name), Cache) and hasattr(kwargs[name], "before_forward"):
            return cast(Holder, kwargs[name])
    return None


@wraps(GenerationMixin.generate)
def _generate(model: Any, *args: Any, **kwargs: Any) -> object:
    attachment = model.__dict__.get(_PLACE)
    before = None if attachment is None else attachment.before
    plain = MethodType(type(model).generate, model) if before is None else before
    holder = _holder(kwargs)
    if holder is None:
        return plain(*args, **kwargs)
    return holder.generate(model, plain, args, _renamed(kwargs, holder))


def _renamed(kwargs: dict[str, Any], holder: Holder) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in _NAMES} | {CACHE: holder}


def _before_forward(
    model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    names = list(inspect.signature(model.forward).parameters)[: len(args)] if args else []
    given = dict(zip(names, args, strict=True)) | kwargs
    holder = _holder(given)
    if holder is None:
        return None
    return (), holder.before_forward(model, _renamed(given, holder))


def _after_forward(
    model: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | ModelOutput
) -> None:
    holder = _holder(kwargs)
    if holder is not None:
        holder.after_forward()
