"""What every implementation of named shared memory must do. Spec: SHM.

Other processes are played by files and locks of this one, where it makes no difference: a lock
belongs to an open file description. The children that are forked hand over what they reached.
Processes outside the test may reap at any moment, so a dead segment is looked for and not counted.
"""

import fcntl
import gc
import os
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from kvspec.conformance import clause
from kvspec.conformance.shared_memory.bench import (
    FOLDER,
    NO_PROCESS,
    in_child,
    locked,
    names_of,
    planted,
    refused_with,
    serials,
    waits_for,
)
from kvspec.conformance.shared_memory.handles import HandlesConformance
from kvspec.errors import ContractError, HostMemoryError
from kvspec.interfaces.shared_memory import Reaped

__all__ = ["FOLDER", "SharedMemoryConformance", "names_of", "planted"]


class SharedMemoryConformance(HandlesConformance):
    # -- what the dead leave ---------------------------------------------------------------------

    @clause("SHM-13")
    @pytest.mark.parametrize("pid", [1, NO_PROCESS])
    @pytest.mark.parametrize("nbytes", [0, 5000])
    def test_the_dead_are_removed(self, pid: int, nbytes: int) -> None:
        for _ in range(20):
            with planted(self.label, nbytes, pid) as (name, fd):
                fcntl.flock(fd, fcntl.LOCK_UN)
                reaped = self.reap()
                assert name not in names_of(self.label)
                if Reaped(name, nbytes) in reaped:  # or a process beside this one was quicker
                    assert [found for found, _ in reaped] == sorted(found for found, _ in reaped)
                    return
        raise AssertionError("what was removed is not returned")

    @clause("SHM-13")
    def test_what_is_no_segment_of_this_user_stays(self) -> None:
        places = [
            FOLDER / f"kvspec.{self.label}",
            FOLDER / f"kvspec.{self.label}.1.1",
            FOLDER / f"kvspec.{self.label}.1.1.a",
            FOLDER / f"other.{self.label}.1.1.1",
        ]
        for place in places:
            place.write_bytes(b"somebody's")
        link = FOLDER / f"kvspec.{self.label}.1.1.{next(serials)}"
        link.symlink_to(places[0])
        try:
            with planted(self.label) as (name, fd):
                if os.geteuid() == 0:
                    os.fchown(fd, 12345, 12345)
                    fcntl.flock(fd, fcntl.LOCK_UN)
                reaped = [found for found, _ in self.reap()]
                assert not {name, link.name} & set(reaped)
                assert all(os.path.lexists(place) for place in (*places, link, FOLDER / name))
        finally:
            for place in (*places, link):
                place.unlink(missing_ok=True)

    @clause("SHM-14")
    @pytest.mark.parametrize("pid", [1, NO_PROCESS])
    def test_the_living_stay(self, pid: int) -> None:
        with planted(self.label, pid=pid) as (name, _), self.create() as segment:
            reaped = [found for found, _ in self.reap()]
            assert not {name, segment.name} & set(reaped)
            assert {name, segment.name} <= set(names_of(self.label))
            segment.check()
            self.create().close()
            assert {name, segment.name} <= set(names_of(self.label))

    @clause("SHM-15")
    @pytest.mark.parametrize("nbytes", [100, 2**50])
    def test_who_starts_removes_the_dead(self, nbytes: int) -> None:
        with planted(self.label) as (name, fd):
            fcntl.flock(fd, fcntl.LOCK_UN)
            with suppress(HostMemoryError, OSError):
                self.create(nbytes).close()
            assert name not in names_of(self.label)

    # -- other processes -------------------------------------------------------------------------

    @clause("SHM-16")
    @pytest.mark.parametrize("closes", [False, True])
    def test_a_forked_child_is_no_owner(self, closes: bool) -> None:
        def inherit() -> None:
            assert not segment.view().owned
            assert segment.view().linked
            segment.tensor()[1] = 7
            gc.collect(1)
            if closes:
                segment.close()
                assert segment.name not in Path("/proc/self/maps").read_text()
            assert segment.view().linked

        with self.left_as_it_was(), self.create() as segment:
            for _ in range(2):
                in_child(inherit)
                segment.check()
                assert locked(segment.name)
            assert segment.tensor()[1] == 7
            gc.collect(1)

    @clause("SHM-17")
    def test_a_pickle_read_three_times_gives_three_owners(self) -> None:
        with self.left_as_it_was():
            segment = self.create(1_000_000)
            tensor = segment.tensor()
            tensor[7] = 9
            data = self.pickled(segment)
            assert len(data) < 300
            del tensor
            gc.collect(1)
            owners = [self.unpickle(data) for _ in range(3)]
            segment.close()
            for owner in owners:
                assert (owner.name, owner.nbytes) == (segment.name, 1_000_000)
                assert owner.tensor()[7] == 9
                gc.collect(1)
                owner.check()
                owner.close()
            assert segment.name not in names_of(self.label)
            refused_with(ContractError, "SHM-7", lambda: self.unpickle(data))

    @clause("SHM-18")
    def test_the_resource_tracker_is_not_told(self) -> None:
        told: list[tuple[object, ...]] = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("register", "unregister", "ensure_running"):
                patch.setattr(resource_tracker, name, lambda *given: told.append(given))
            with self.create() as segment, self.attach(segment.name):
                self.unpickle(self.pickled(segment)).close()
        assert not told

    @clause("SHM-19")
    def test_check(self) -> None:
        segment = self.create()
        place = FOLDER / segment.name
        segment.check()
        os.truncate(place, 101)
        assert "101" in refused_with(ContractError, "SHM-2", segment.check)
        os.truncate(place, 100)
        segment.check()
        place.unlink()
        assert not segment.view().linked
        assert segment.name in refused_with(ContractError, "SHM-14", segment.check)
        place.write_bytes(bytes(100))
        refused_with(ContractError, "SHM-14", segment.check)
        place.unlink()
        segment.close()
        segment.check()

    @clause("SHM-7", "SHM-20")
    @pytest.mark.parametrize("call", ["attach", "create", "reap", "close"])
    @pytest.mark.parametrize("lock", [fcntl.LOCK_SH, fcntl.LOCK_EX])
    def test_nobody_waits(self, call: str, lock: int) -> None:
        """The other process has its lock for ever. One that excludes all others is a remover's."""
        segment = self.create()
        refused: list[str] = []

        def act() -> None:
            if call == "attach":
                try:
                    self.attach(name).close()
                except ContractError as error:
                    refused.append(error.clause)
            elif call == "create":
                self.create().close()
            elif call == "reap":
                self.reap()
            else:
                segment.close()

        with planted(self.label, lock=lock) as (name, fd):
            other = os.open(FOLDER / segment.name, os.O_RDONLY)
            if call == "close":
                fcntl.flock(other, fcntl.LOCK_SH)
            assert not waits_for(act, other if call == "close" else fd)
            assert refused == (["SHM-7"] if (call, lock) == ("attach", fcntl.LOCK_EX) else [])
            assert name in names_of(self.label) or lock == fcntl.LOCK_SH
            os.close(other)
        segment.close()
        (FOLDER / segment.name).unlink(missing_ok=True)
