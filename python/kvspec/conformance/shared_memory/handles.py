"""What handles on a segment do: create, attach, close (SHM-1 to SHM-12)."""

import fcntl
import gc
import itertools
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import NoneType

import pytest
import torch

from kvspec.conformance import clause
from kvspec.conformance.shared_memory.bench import (
    FOLDER,
    SegmentBench,
    descriptor_count,
    error_of,
    in_child,
    names_of,
    planted,
    refused_with,
    serials,
    start_time,
)
from kvspec.errors import ContractError, HostMemoryError

__all__ = ["HandlesConformance"]


class HandlesConformance(SegmentBench):
    # -- creating --------------------------------------------------------------------------------

    @clause("SHM-1")
    def test_a_name_says_who_created_it(self) -> None:
        def named() -> str:
            with self.create() as segment:
                kvspec, label, pid, start, serial = segment.name.split(".")
                assert (kvspec, label) == ("kvspec", self.label)
                assert (int(pid), start) == (os.getpid(), start_time(os.getpid()))
                assert serial.isdigit()
                name: str = segment.name
                return name

        assert len({named() for _ in range(3)}) == 3
        in_child(named)

    @clause("SHM-2")
    @pytest.mark.parametrize("nbytes", [1, 4096, 4097, 1_000_001])
    def test_a_segment_is_zeros(self, nbytes: int) -> None:
        with self.left_as_it_was(), self.create(nbytes) as segment:
            found = os.stat(FOLDER / segment.name)
            assert segment.nbytes == found.st_size == nbytes
            assert found.st_mode & 0o777 == 0o600
            assert found.st_uid == os.geteuid()
            tensor = segment.tensor()
            assert not tensor.any()
            del tensor

    @clause("SHM-2")
    def test_never_on_what_was_there(self) -> None:
        with self.create() as first:
            stem, _, serial = first.name.rpartition(".")
            places = [FOLDER / f"{stem}.{int(serial) + ahead}" for ahead in (1, 2, 3)]
            kept = [os.open(place, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600) for place in places]
            for fd in kept:
                os.write(fd, b"somebody's")
                fcntl.flock(fd, fcntl.LOCK_SH)
            try:
                with self.create() as second:
                    assert FOLDER / second.name not in places
                assert [place.read_bytes() for place in places] == [b"somebody's"] * 3
            finally:
                for place, fd in zip(places, kept, strict=True):
                    os.close(fd)
                    place.unlink(missing_ok=True)

    @clause("SHM-3")
    @pytest.mark.parametrize("populate", [False, True])
    @pytest.mark.parametrize("nbytes", [1, 4097, 5_000_000])
    def test_all_of_it_is_reserved(self, nbytes: int, populate: bool) -> None:
        with self.create(nbytes, populate=populate) as segment:
            assert os.stat(FOLDER / segment.name).st_blocks * 512 >= nbytes

    @clause("SHM-4")
    @pytest.mark.parametrize(
        ("label", "nbytes"),
        [("a/b", 1), ("a.b", 1), ("é", 1), ("a\n", 1), ("a" * 65, 1), ("a", 0), ("a", -1)],
    )
    def test_what_is_no_label_or_no_size(self, label: str, nbytes: int) -> None:
        with self.left_as_it_was():
            refused_with(ContractError, "SHM-4", lambda: self.create(nbytes, label))

    @clause("SHM-4")
    def test_labels(self) -> None:
        for label in ("a" * 64, f"A-z_9-{os.getpid()}"):
            with self.create(label=label) as segment:
                assert names_of(label) == [segment.name]

    @clause("SHM-5")
    def test_more_than_the_machine_has(self) -> None:
        with self.left_as_it_was():
            text = refused_with(HostMemoryError, "SHM-5", lambda: self.create(2**50))
            assert str(2**50) in text
            assert "free" in text

    @clause("SHM-5")
    def test_more_than_a_file_may_have(self) -> None:
        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            with self.left_as_it_was():
                refused_with(HostMemoryError, "SHM-5", lambda: self.create(4097))
                self.create(4096).close()

        in_child(limited)

    @clause("SHM-5")
    def test_without_descriptors(self) -> None:
        def exhausted() -> None:
            self.create().close()  # what is imported late is there
            held = self.create()
            calls: list[Callable[[], None]] = [
                lambda: self.create().close(),
                lambda: self.attach(held.name).close(),
            ]
            before, refused = descriptor_count(), 0
            resource.setrlimit(resource.RLIMIT_NOFILE, (before + 40, before + 40))
            taken: list[int] = []
            with suppress(OSError):
                while True:
                    taken.append(os.dup(1))
            for _ in range(4):
                for call in calls:
                    error = error_of(call)
                    assert type(error) in (HostMemoryError, NoneType), repr(error)
                    assert str(error or "SHM-5: ").startswith("SHM-5: "), str(error)
                    refused += error is not None
                os.close(taken.pop())
            for fd in taken:
                os.close(fd)
            assert refused >= 2
            assert (names_of(self.label), descriptor_count()) == ([held.name], before)
            held.close()

        in_child(exhausted)

    # -- attaching -------------------------------------------------------------------------------

    @clause("SHM-6")
    def test_one_memory(self) -> None:
        with self.left_as_it_was(), self.create(5000) as first, self.attach(first.name) as second:
            assert (second.name, second.nbytes) == (first.name, 5000)
            assert second.address != first.address
            here, there = first.tensor(), second.tensor()
            here[4999] = 7
            there[0] = 9
            assert (here[0], there[4999]) == (9, 7)
            del here, there

    @clause("SHM-7")
    @pytest.mark.parametrize(
        "name",
        [
            *("", "kvspec", "../etc/passwd", "/kvspec.a.1.1.1", "kvspec.a.1.1", "kvspec.a.1.1.x"),
            *("kvspec.a.1.1.1.1", "kvspec.a/b.1.1.1", "kvspec..1.1.1", "kvspec.a.1.1.1\n"),
            *("kvspec.a.1.1.", "kvspec.nobody.1.1.1", "kvspec.a.1.1." + "9" * 21),
        ],
    )
    def test_names_of_no_segment(self, name: str) -> None:
        with self.left_as_it_was():
            refused_with(ContractError, "SHM-7", lambda: self.attach(name))

    @clause("SHM-7")
    def test_a_segment_that_nobody_holds(self) -> None:
        with self.left_as_it_was(), planted(self.label) as (name, fd):
            self.attach(name).close()
            fcntl.flock(fd, fcntl.LOCK_UN)
            refused_with(ContractError, "SHM-7", lambda: self.attach(name))

    @clause("SHM-7")
    def test_a_segment_that_is_not_complete(self) -> None:
        with self.left_as_it_was(), planted(self.label, nbytes=0) as (name, _):
            text = refused_with(ContractError, "SHM-7", lambda: self.attach(name))
            assert "not complete" in text
            assert name in names_of(self.label)

    @clause("SHM-7")
    def test_what_is_no_segment_of_this_user(self) -> None:
        place = FOLDER / f"kvspec.{self.label}.1.1.{next(serials)}"
        makers: list[Callable[[], object]] = [
            place.mkdir,
            lambda: os.mkfifo(place, 0o600),
            lambda: place.symlink_to("/etc/passwd"),
        ]
        for make in makers:
            with self.left_as_it_was():
                make()
                try:
                    refused_with(ContractError, "SHM-7", lambda: self.attach(place.name))
                    assert os.path.lexists(place)
                finally:
                    place.rmdir() if place.is_dir() else place.unlink()

    @clause("SHM-7")
    def test_a_segment_of_another_user(self) -> None:
        with planted(self.label) as (name, fd):
            if os.geteuid() == 0:  # nobody else can give a file away, or open it
                os.fchown(fd, 12345, 12345)
                refused_with(ContractError, "SHM-7", lambda: self.attach(name))

    # -- closing ---------------------------------------------------------------------------------

    @clause("SHM-8", "SHM-9")
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_the_last_takes_the_name(self, order: tuple[int, ...]) -> None:
        with self.left_as_it_was():
            first = self.create()
            owners = [first, self.attach(first.name), self.attach(first.name)]
            for position, index in enumerate(order):
                assert first.name in names_of(self.label)
                owners[index].close()
                for other in order[position + 1 :]:
                    owners[other].check()
                    assert owners[other].view().linked
            assert first.name not in names_of(self.label)
            assert first.name not in Path("/proc/self/maps").read_text()

    @clause("SHM-8")
    @pytest.mark.parametrize("closes", [False, True])
    def test_an_attacher_comes_and_goes(self, closes: bool) -> None:
        def visit() -> None:
            visitor = self.attach(segment.name)
            visitor.tensor()[3] = 5
            gc.collect(1)
            if closes:
                visitor.close()

        with self.left_as_it_was(), self.create() as segment:
            in_child(visit)
            segment.check()
            late = self.attach(segment.name)
            assert late.tensor()[3] == 5
            late.close()
            segment.check()

    @clause("SHM-9")
    def test_a_name_that_leads_elsewhere_stays(self) -> None:
        segment = self.create()
        place = FOLDER / segment.name
        place.unlink()
        place.write_bytes(b"somebody's")
        try:
            segment.close()
            assert place.exists()
            assert place.read_bytes() == b"somebody's"
        finally:
            place.unlink(missing_ok=True)

    @clause("SHM-9")
    def test_a_handle_that_is_dropped_is_closed(self) -> None:
        with self.left_as_it_was():
            segment = self.create()
            name = segment.name
            del segment
            gc.collect(1)
            assert name not in names_of(self.label)

    @clause("SHM-10")
    def test_a_closed_handle(self) -> None:
        segment = self.create()
        other = self.attach(segment.name)
        segment.close()
        segment.close()
        assert segment.view() == (True, True, 0, True)
        assert segment.nbytes == 100
        for call in (segment.tensor, lambda: segment.address, lambda: self.pickled(segment)):
            assert segment.name in refused_with(ContractError, "SHM-10", call)
        other.close()
        assert not segment.view().linked

    @clause("SHM-11")
    def test_no_tensor_is_left_without_memory(self) -> None:
        with self.left_as_it_was(), self.create() as segment:
            first = segment.tensor()
            second = segment.tensor()[10:20].view(2, 5)
            for count in (2, 1):
                before = segment.view()
                assert before == (False, True, count, True)
                text = refused_with(ContractError, "SHM-11", segment.close)
                assert f"{count} tensor" in text
                assert segment.view() == before
                second[1, 4] = 7
                del first
                first = second
            del first, second
            gc.collect(1)
            assert segment.view().tensors == 0

    @clause("SHM-12")
    def test_a_tensor_is_the_memory(self) -> None:
        with self.create(70_000) as segment:
            tensor = segment.tensor()
            assert (tensor.dtype, tensor.shape) == (torch.uint8, (70_000,))
            assert (str(tensor.device), tensor.data_ptr()) == ("cpu", segment.address)
            tensor[69_999] = 7
            assert (FOLDER / segment.name).read_bytes()[69_999] == 7
            del tensor

    @clause("SHM-12")
    def test_a_tensor_holds_the_segment(self) -> None:
        with self.left_as_it_was():
            segment = self.create()
            name, tensor = segment.name, segment.tensor()[50:]
            del segment
            gc.collect(1)
            self.reap()
            assert name in names_of(self.label)
            other = self.attach(name)
            other.tensor()[50] = 3
            gc.collect(1)
            other.close()
            assert tensor[0] == 3
            del tensor
            gc.collect(1)
            assert name not in names_of(self.label)
