"""Observer: the suite over oracle and core, and that both report the same. Spec: OBS."""

import sys
from typing import Any

import pytest
import torch

import kvspec
from kvspec import oracle
from kvspec.conformance import clause
from kvspec.conformance.observer import ObserverConformance
from kvspec.interfaces.observer import Operation

IMPLS = pytest.mark.parametrize("impl", [oracle, kvspec], ids=lambda impl: impl.__name__)


class TestOracle(ObserverConformance):
    impl = oracle


class TestNative(ObserverConformance):
    impl = kvspec


def make(impl: Any) -> Any:
    return impl.PagedTokenToKVPoolAllocator(
        size=16, page_size=4, dtype=torch.float16, device="cpu", kvcache=None, need_sort=False
    )


@clause("OBS-1")
@IMPLS
def test_what_is_reported_is_an_operation(impl: Any) -> None:
    subject, seen = make(impl), list[Operation]()
    subject.attach(seen.append)
    subject.alloc(4)
    (operation,) = seen
    assert isinstance(operation, Operation)
    assert operation[:2] == ("page_allocator", "alloc")
    assert (operation.slots.dtype, operation.slots.tolist()) == (torch.int64, [4, 5, 6, 7])


@clause("OBS-1")
@IMPLS
def test_what_was_reported_is_not_changed_by_what_follows(impl: Any) -> None:
    subject, seen = make(impl), list[Operation]()
    subject.attach(seen.append)
    subject.alloc(4).fill_(0)
    subject.alloc(4)
    assert seen[0].slots.tolist() == [4, 5, 6, 7]


@clause("OBS-2")
@IMPLS
def test_even_an_interrupt_does_not_leave_the_observer(
    impl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda given: errors.append(given.exc_type))

    def observer(operation: Operation) -> None:
        raise KeyboardInterrupt

    subject = make(impl)
    subject.attach(observer)
    assert subject.alloc(4).tolist() == [4, 5, 6, 7]
    assert errors == [KeyboardInterrupt]
