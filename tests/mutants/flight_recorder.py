"""Broken recorders and readers. Each must fail on the clause it breaks."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

import kvspec.flight_recorder
import kvspec.oracle
from kvspec.conformance.flight_recorder import FlightRecorderConformance
from kvspec.conformance.mutants import Registry
from kvspec.flight_recorder import FlightRecorder, LogError
from kvspec.flight_recorder.events import Effects, Event, Key, Start
from kvspec.flight_recorder.log import LogWriter
from kvspec.prefix_key import key_parts, key_words, page_hashes

registry = Registry(FlightRecorderConformance, kvspec.oracle)


@registry.mutant("REC-1", replaces="FlightRecorder")
class NumbersWhatIsNoEvent(FlightRecorder):
    """So the log of what follows has a hole."""

    def record(self, event: Any) -> Any:
        try:
            return super().record(event)
        except (TypeError, OverflowError):
            self._recorded += 1
            raise


@registry.mutant("REC-1", "REC-2", "REC-4", "REC-5", "REC-6", replaces="FlightRecorder")
class KeepsTheNumberOfAnEventThatHasOne(FlightRecorder):
    def record(self, event: Any) -> Any:
        if event.n:
            self._recorded = event.n
        return super().record(event)


def _read(path: Path) -> Iterator[Event]:
    return kvspec.flight_recorder.read_log(path)


@registry.mutant("REC-2", replaces="read_log")
def forgets_the_window_slots_that_a_call_gave_back(path: Path) -> Iterator[Event]:
    for event in _read(path):
        did = event.did
        yield replace(event, did=did and replace(did, swa_freed=Effects().swa_freed))


@registry.mutant("REC-2", replaces="read_log")
def reads_a_refusal_as_an_empty_result(path: Path) -> Iterator[Event]:
    for event in _read(path):
        refused = getattr(event, "slots", ()) is None
        yield replace(event, slots=[]) if refused else event


@registry.mutant("REC-2", replaces="FlightRecorder")
class ForgetsWhoCalled(FlightRecorder):
    def record(self, event: Any) -> Any:
        return super().record(replace(event, at=""))


@registry.mutant("REC-3", replaces="FlightRecorder")
class LosesTheNamespace(FlightRecorder):
    def key(self, tokens: Any, page_size: int, extra_key: Any = None) -> Key:
        return super().key(key_parts(tokens, extra_key)[0], page_size)


@registry.mutant("REC-3", "REC-9", replaces="FlightRecorder")
class HashesEachPageAlone(FlightRecorder):
    """Two pages of the same tokens have one id, whatever stands before them."""

    def key(self, tokens: Any, page_size: int, extra_key: Any = None) -> Key:
        key = super().key(tokens, page_size, extra_key)
        words = key_words(key_parts(tokens)[0]).tolist()
        pages = [words[at : at + page_size] for at in range(0, len(words), page_size)]
        name = getattr(tokens, "extra_key", extra_key)
        hashes = [page_hashes(page, page_size, name) for page in pages]
        return replace(key, ids=b"".join(digest[0][:16] for digest in hashes if digest))


@registry.mutant("REC-3", "REC-9", replaces="FlightRecorder")
class TakesAKeyForTheOneItBeginsAs(FlightRecorder):
    """Remembers by the first page, and compares no other."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._remembered: dict[bytes, Key] = {}

    def key(self, tokens: Any, page_size: int, extra_key: Any = None) -> Key:
        key = super().key(tokens, page_size, extra_key)
        known = self._remembered.setdefault(key.ids[:16], key)
        return replace(key, ids=known.ids[: len(key.ids)]) if len(known.ids) > 16 else key


@registry.mutant("REC-3", replaces="FlightRecorder")
class GivesTokensEachTime(FlightRecorder):
    def record(self, event: Any) -> Any:
        recorded = super().record(event)
        if self._named:
            self._named.clear()
        return recorded


@registry.mutant("REC-3", replaces="FlightRecorder")
class GivesTokensWithTheFirstKey(FlightRecorder):
    """Which is not always the first that is recorded."""

    def key(self, tokens: Any, page_size: int, extra_key: Any = None) -> Key:
        key = super().key(tokens, page_size, extra_key)
        if self._named is not None:
            self._named.update(key.ids[16 * page :][:16] for page in key.tokens)
        return key

    def record(self, event: Any) -> Any:
        named, self._named = self._named, None
        try:
            return super().record(event)
        finally:
            self._named = named


@registry.mutant("REC-4", "REC-7", replaces="FlightRecorder")
class KeepsOneEventMore(FlightRecorder):
    def __init__(self, *given: Any, ring: int = 65536, **options: Any) -> None:
        super().__init__(*given, ring=ring, **options)
        self._ring = deque(maxlen=ring + 1)


@registry.mutant("REC-4", replaces="FlightRecorder")
class DumpsAsIfNothingWentBefore(FlightRecorder):
    def dump(self, path: Any) -> None:
        self._starts = [replace(start, n=0, first=1) for start in self._starts]
        encode = self._encode
        self._encode = lambda event: encode(replace(event, first=1))
        try:
            super().dump(path)
        finally:
            self._encode = encode


@registry.mutant("REC-4", "REC-2", replaces="FlightRecorder")
class HoldsTheListsOfTheCaller(FlightRecorder):
    """What he changes afterwards changes what happened."""

    def __init__(self, *given: Any, ring: int = 65536, **options: Any) -> None:
        super().__init__(*given, ring=ring, **options)
        self._events: deque[Event] = deque(maxlen=ring)

    def record(self, event: Any) -> Any:
        self._events.append(super().record(event))
        return self._events[-1]

    def events(self) -> tuple[Event, ...]:
        return tuple(self._events)


@registry.mutant("REC-5", "REC-7", replaces="FlightRecorder")
class FlushesOneEventLate(FlightRecorder):
    def __init__(self, *given: Any, flush_every: int = 1, **options: Any) -> None:
        super().__init__(*given, flush_every=flush_every, **options)
        if self._file is not None:
            self._file._flush_every = flush_every + 1


@registry.mutant("REC-5", replaces="FlightRecorder")
class FlushesAtTheEndAlone(FlightRecorder):
    def flush(self) -> None:
        """Left to `close`."""


@registry.mutant("REC-6", "REC-5", replaces="read_log")
def ends_where_it_cannot_read_on(path: Path) -> Iterator[Event]:
    try:
        yield from _read(path)
    except LogError:
        return


@registry.mutant("REC-6", "REC-5", replaces="read_log")
def gives_nothing_of_what_is_broken(path: Path) -> Iterator[Event]:
    yield from list(_read(path))


@registry.mutant("REC-6", "REC-5", replaces="read_log")
def tells_where_the_broken_record_ends(path: Path) -> Iterator[Event]:
    try:
        yield from _read(path)
    except LogError as error:
        size = os.path.getsize(path)
        raise LogError(size, error.record, error.reason) from None


@registry.mutant("REC-6", "REC-5", replaces="read_log")
def counts_the_records_from_one(path: Path) -> Iterator[Event]:
    try:
        yield from _read(path)
    except LogError as error:
        raise LogError(error.position, error.record + 1, error.reason) from None


@registry.mutant("REC-7", replaces="FlightRecorder")
class RaisesWhatTheDiskSays(FlightRecorder):
    def record(self, event: Any) -> Any:
        recorded = super().record(event)
        if self.dropped:
            raise OSError("No space left on device")
        return recorded


@registry.mutant("REC-7", replaces="FlightRecorder")
class CountsTheLossOnce(FlightRecorder):
    @property
    def dropped(self) -> int:
        return min(super().dropped, 1)


class _Silent(LogWriter):
    def _give_up(self, records: list[bytes], written: int, error: OSError) -> None:
        self.dropped += len(records)
        self.close()


@registry.mutant("REC-7", replaces="FlightRecorder")
class SaysNothingOfAFullDisk(FlightRecorder):
    def __init__(
        self, path: Any = None, *, format: Any = "ndjson", flush_every: int = 1, **options: Any
    ) -> None:
        super().__init__(format=format, flush_every=flush_every, **options)
        self._file = _Silent(path, self._format, flush_every) if path is not None else None


@registry.mutant("REC-8", "REC-7", replaces="FlightRecorder")
class Overwrites(FlightRecorder):
    def __init__(self, path: Any = None, **options: Any) -> None:
        if path is not None and Path(path).is_file():
            os.unlink(path)
        super().__init__(path, **options)


@registry.mutant("REC-8", replaces="FlightRecorder")
class RecordsAfterItsEnd(FlightRecorder):
    """Into the ring alone, and the file lacks it."""

    def close(self) -> None:
        super().close()
        self._closed = False


@registry.mutant("REC-8", replaces="FlightRecorder")
class TakesAnyRing(FlightRecorder):
    def __init__(self, *given: Any, ring: int = 65536, **options: Any) -> None:
        super().__init__(*given, ring=max(ring, 1), **options)


@registry.mutant("REC-9", replaces="FlightRecorder")
class RemembersNoKey(FlightRecorder):
    def key(self, tokens: Any, page_size: int, extra_key: Any = None) -> Key:
        self._ids._roots.clear()
        return super().key(tokens, page_size, extra_key)


@registry.mutant("REC-9", replaces="FlightRecorder")
class KeepsEveryStart(FlightRecorder):
    """For a dump that needs one of them."""

    def _keep_start(self, start: Start) -> None:
        self._starts = [*self._starts, start, *[replace(start) for _ in range(20)]]
