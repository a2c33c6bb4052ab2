"""Broken memory savers. Each must fail on the clause it breaks."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

import kvspec.oracle
from kvspec.conformance.memory_saver import MemorySaverConformance
from kvspec.conformance.mutants import Registry
from kvspec.errors import ContractError
from kvspec.oracle import HostArena, TorchMemorySaverAdapter
from kvspec.oracle.boundary import Capture
from kvspec.oracle.memory_saver import heard

registry = Registry(MemorySaverConformance, kvspec.oracle)


@registry.mutant("SAVER-1")
class IsANewOneEveryTime(TorchMemorySaverAdapter):
    """What one part of the engine allocates another cannot pause."""

    @classmethod
    def create(cls, enable: bool) -> TorchMemorySaverAdapter:
        return cls() if enable else super().create(enable)


@registry.mutant("SAVER-2")
class HasNoTwin(TorchMemorySaverAdapter):
    @classmethod
    def create(cls, enable: bool) -> TorchMemorySaverAdapter:
        return super().create(True)


class CopiesInsteadOfCaptures(Capture):
    """The result is left where it was."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        return made.clone() if func.overloadpacket.__name__ == "lift_fresh" else made


@registry.mutant("SAVER-3", "SAVER-4", "SAVER-6")
class MissesTensorsOfNumbers(TorchMemorySaverAdapter):
    def _mode(self) -> Capture:
        return CopiesInsteadOfCaptures(HostArena)


@registry.mutant("SAVER-3")
class CapturesForTheOutermost(TorchMemorySaverAdapter):
    def _capture(self, entry: Any, keep: bool, arena: Any) -> None:
        first = next(iter(self._tags.values()))
        super()._capture(first if first.regions else entry, keep, arena)


class MakesThemContiguous(Capture):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if made.dim() > 1 and made.data_ptr() % 4096 == 0 and made.device.type == "cpu":
            return made.as_strided(made.shape, torch.empty(made.shape, device="meta").stride())
        return made


@registry.mutant("SAVER-4", "SAVER-3")
class ForgetsStrides(TorchMemorySaverAdapter):
    def _mode(self) -> Capture:
        return MakesThemContiguous(HostArena)


@registry.mutant("SAVER-5", "SAVER-8")
class MissesSharedMemory(TorchMemorySaverAdapter):
    def _capture(self, entry: Any, keep: bool, arena: Any) -> None:
        if arena.kind != "shm":
            super()._capture(entry, keep, arena)


class CapturesWhateverComes(Capture):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket.__name__ in ("add", "cat"):
            self.kept = self.arenas("mmap", made.nbytes)
        return made


@registry.mutant("SAVER-6")
class CapturesArithmetic(TorchMemorySaverAdapter):
    def _mode(self) -> Capture:
        self.last = CapturesWhateverComes(HostArena)
        return self.last


class TakesPinnedForOrdinary(Capture):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return super().__torch_dispatch__(func, types, args, given)


@registry.mutant("SAVER-7")
class PinsNothingInSilence(TorchMemorySaverAdapter):
    def _mode(self) -> Capture:
        return TakesPinnedForOrdinary(HostArena)


@registry.mutant(
    *("SAVER-8", "SAVER-3", "SAVER-5", "SAVER-9", "SAVER-10", "SAVER-12", "SAVER-15", "SAVER-17"),
    *("SAVER-18", "SAVER-19", "SAVER-20"),
    reports=("TMS-83",),
)
class GivesNothingBack(TorchMemorySaverAdapter):
    """The books say paused, and the pages are where they were."""

    def pause(self, tag: str) -> None:
        entry = self._tags.get(tag)
        kept = [(arena, arena.tensor().clone()) for _, arena in entry.alive()] if entry else []
        super().pause(tag)
        for arena, contents in kept:
            arena.tensor().copy_(contents)


@registry.mutant(
    "SAVER-9",
    "SAVER-3",
    "SAVER-10",
    "SAVER-11",
    "SAVER-12",
    "SAVER-15",
    "SAVER-18",
    "SAVER-19",
    "SAVER-20",
)
class ForgetsTheBackup(TorchMemorySaverAdapter):
    def resume(self, tag: str) -> None:
        for each, _ in self._tags[tag].alive() if tag in self._tags else ():
            each.backup = None
        super().resume(tag)


@registry.mutant("SAVER-9", "SAVER-15", "SAVER-20")
class KeepsWhatWasWrittenMeanwhile(TorchMemorySaverAdapter):
    def resume(self, tag: str) -> None:
        alive = self._tags[tag].alive() if tag in self._tags else []
        written = [arena.tensor().clone() for each, arena in alive if each.backup is None]
        super().resume(tag)
        for (_, arena), contents in zip(
            [each for each in alive if contents_dropped(each)], written, strict=False
        ):
            arena.tensor().copy_(contents)


def contents_dropped(allocation: Any) -> bool:
    return not allocation[0].keep


@registry.mutant(
    "SAVER-10", "SAVER-11", "SAVER-12", "SAVER-13", "SAVER-15", "SAVER-19", reports=("TMS-90",)
)
class KeepsTheBackup(TorchMemorySaverAdapter):
    """Everything is there twice."""

    def resume(self, tag: str) -> None:
        alive = self._tags[tag].alive() if tag in self._tags else []
        kept = [(each, each.backup) for each, _ in alive]
        super().resume(tag)
        for each, backup in kept:
            each.backup = backup


@registry.mutant("SAVER-11", "SAVER-16", reports=("TMS-92", "VL-36651", "SEED-45"))
class HoldsWhatIsFreedWhilePaused(TorchMemorySaverAdapter):
    """A pause has released it already, so a free of it must be done later, and is done twice."""

    def pause(self, tag: str) -> None:
        super().pause(tag)
        self._held = [arena for _, arena in self._tags[tag].alive()]

    def resume(self, tag: str) -> None:
        super().resume(tag)
        self._held = []


@registry.mutant("SAVER-12", reports=("VL-36651", "SEED-45"))
class PausesTwice(TorchMemorySaverAdapter):
    """Gives back what is given back, and keeps a backup of nothing."""

    def pause(self, tag: str) -> None:
        if tag in self._tags and self._tags[tag].paused:
            self._tags[tag].paused = False
        super().pause(tag)


@registry.mutant("SAVER-12")
class PausesATagThatIsBeingFilled(TorchMemorySaverAdapter):
    def pause(self, tag: str) -> None:
        regions = self._tags[tag].regions if tag in self._tags else 0
        if tag in self._tags:
            self._tags[tag].regions = 0
        try:
            super().pause(tag)
        finally:
            if tag in self._tags:
                self._tags[tag].regions = regions


@registry.mutant("SAVER-12")
class TakesAnyWordForATag(TorchMemorySaverAdapter):
    def pause(self, tag: str) -> None:
        if tag in self._tags:
            super().pause(tag)


@registry.mutant("SAVER-13")
class ResumesWhatIsNotPaused(TorchMemorySaverAdapter):
    def resume(self, tag: str) -> None:
        with suppress(ContractError):
            super().resume(tag)


@registry.mutant("SAVER-13", "SAVER-9")
class DropsWhatIsNotPaused(TorchMemorySaverAdapter):
    def resume(self, tag: str) -> None:
        if tag in self._tags:
            self._tags[tag].paused = True
        super().resume(tag)


@registry.mutant("SAVER-14")
class AllocatesInAPausedTag(TorchMemorySaverAdapter):
    def _require_usable(self, tag: str) -> None:
        if not isinstance(tag, str) or not self._tags.get(tag) or not self._tags[tag].paused:
            super()._require_usable(tag)


@registry.mutant("SAVER-15", reports=("VL-34600", "SEED-45"))
class StopsHalfwayDown(TorchMemorySaverAdapter):
    """What was given back before the failure is lost."""

    def pause(self, tag: str) -> None:
        arenas = [arena for _, arena in self._tags[tag].alive()] if tag in self._tags else []
        stuck = ["discard" in vars(arena) for arena in arenas]
        for arena in arenas[: stuck.index(True)] if True in stuck else ():
            arena.discard()
        super().pause(tag)


@registry.mutant("SAVER-15", reports=("VL-34600", "SEED-45"))
class StopsHalfwayUp(TorchMemorySaverAdapter):
    """What was resumed before the failure is awake in a tag that is paused, with no backup."""

    def resume(self, tag: str) -> None:
        entry = self._tags.get(tag)
        for each, arena in entry.alive() if entry and entry.paused else ():
            if "discard" in vars(arena):
                break
            if any("discard" in vars(other) for _, other in entry.alive()):
                each.backup = None
        super().resume(tag)


@registry.mutant("SAVER-16", "SAVER-15", reports=("VL-34600",))
class TakesWithoutAsking(TorchMemorySaverAdapter):
    def resume(self, tag: str) -> None:
        for _, arena in self._tags[tag].alive() if tag in self._tags else ():
            arena.promise(None)
            arena._reserved.clear()
        super().resume(tag)


@registry.mutant("SAVER-17", "SAVER-3", "SAVER-12")
class StaysInARegionThatFailed(TorchMemorySaverAdapter):
    @contextmanager
    def _region(self, tag: str, keep: bool) -> Iterator[None]:
        self._require_usable(tag)
        entry = self._tags[tag]
        entry.regions += 1
        with heard(lambda arena: self._capture(entry, keep, arena)), self._mode():
            yield
        entry.regions -= 1


@registry.mutant("SAVER-18")
class ChecksNothing(TorchMemorySaverAdapter):
    def check(self) -> None:
        pass


@registry.mutant("SAVER-18")
class ChecksWhatIsMappedToo(TorchMemorySaverAdapter):
    def check(self) -> None:
        for entry in self._tags.values():
            if any(bool(arena.tensor().any()) for _, arena in entry.alive()):
                raise ContractError("SAVER-8: an allocation was written")


@registry.mutant("SAVER-19", "SAVER-9", "SAVER-12", "SAVER-13", "SAVER-18", "SAVER-20")
class PausesEveryTag(TorchMemorySaverAdapter):
    def pause(self, tag: str) -> None:
        super().pause(tag)
        for other in self._tags:
            with suppress(ContractError):
                super().pause(other)
