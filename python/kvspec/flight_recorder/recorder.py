"""The recorder: a ring of the last events, and a file of all of them. Spec: REC."""

from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, cast

from msgspec.structs import replace

from kvspec.errors import ContractError
from kvspec.flight_recorder.events import Event, Key, Start
from kvspec.flight_recorder.keys import ID_BYTES, PageIds
from kvspec.flight_recorder.log import Chain, FormatName, LogWriter, Path, create, format_of

if TYPE_CHECKING:
    from kvspec.interfaces.prefix_key import ExtraKey, Tokens

__all__ = ["FlightRecorder"]

E = TypeVar("E", bound=Event)


class FlightRecorder:
    """Numbers events, keeps the last `ring` of them, and writes all to a file if it has one.

    The file is flushed after each `flush_every` events; what was flushed outlives the process
    (REC-5). It is new: a path that exists is refused, save a device or a pipe (REC-8). One that
    cannot be made raises OSError here; one that cannot be written later raises nowhere (REC-7).
    With `tokens` the keys carry the tokens of their pages, once a file, for which the recorder
    keeps the ids of the pages that the file names. Not for several threads at once.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        format: FormatName = "ndjson",
        tokens: bool = False,
        ring: int = 65536,
        flush_every: int = 1,
    ) -> None:
        if ring < 1:
            raise ContractError(f"REC-8: a ring of {ring} events holds none")
        if flush_every < 1:
            raise ContractError(f"REC-8: flush_every is {flush_every}, not positive")
        self._format = format_of(format)
        self._encode = self._format.encode
        self._ring: deque[bytes] = deque(maxlen=ring)
        self._starts: list[Start] = []
        self._named: set[bytes] | None = set() if tokens else None
        self._ids = PageIds()
        self._closed = False
        self._recorded = 0
        self._file = LogWriter(path, self._format, flush_every) if path is not None else None

    @property
    def recorded(self) -> int:
        """Events so far; the number that the next one gets."""
        return self._recorded

    @property
    def dropped(self) -> int:
        """Events that the file lacks because it could not be written; 0 without one (REC-7)."""
        return self._file.dropped if self._file is not None else 0

    @property
    def hashed_pages(self) -> int:
        """Pages that `key` had to hash, as no key of late had them (REC-9)."""
        return self._ids.hashed

    def record(self, event: E) -> E:
        """Number an event and keep it; returns it as it was kept (REC-1, REC-4).

        O(runs and ids of the event) (REC-9). Fails, and keeps nothing, after `close` (REC-8) and
        for an event with values that its fields do not have. What is no Unicode in the call site
        or the error, the name of a file for example, is escaped.
        """
        if self._closed:
            raise ContractError("REC-8: the recorder is closed")
        number = self._recorded
        if type(event) is Start:
            event = replace(event, n=number, first=number + 1)
        elif event.n != number:
            event = replace(event, n=number)
        if self._named is not None:
            event = _without_tokens_of(event, self._named)
        try:
            body = self._encode(event)
        except UnicodeEncodeError:
            event = replace(event, at=_as_unicode(event.at), error=_as_unicode(event.error))
            body = self._encode(event)
        if type(event) is Start:
            self._keep_start(cast("Start", event))
        if self._named is not None:
            self._named.update(_pages_with_tokens(event).values())
        self._recorded = number + 1
        self._ring.append(body)
        if self._file is not None:
            self._file.append(body)
        return event

    def _keep_start(self, start: Start) -> None:
        """Keep what `dump` needs: the starts that the ring holds, and the last one before it."""
        oldest = self._recorded - len(self._ring)
        before = [kept for kept in self._starts if kept.n < oldest]
        self._starts = [*before[-1:], *self._starts[len(before) :], start]

    def key(self, tokens: "Tokens", page_size: int, extra_key: "ExtraKey" = None) -> Key:
        """What a cache is asked for: the ids of the whole pages, and the tokens' number (REC-3).

        Refuses what `page_hashes` refuses (KEY-1, KEY-3). O(tokens); hashes only pages that no key
        of late begins with, for which it remembers up to 64 MiB.
        """
        ids, words, frame = self._ids.of(tokens, page_size, extra_key)
        named = self._named
        if named is None:
            return Key(ids=ids, count=len(words))
        new = {
            page: words[page * page_size : (page + 1) * page_size].tolist()
            for page in range(len(ids) // ID_BYTES)
            if ids[page * ID_BYTES : (page + 1) * ID_BYTES] not in named
        }
        return Key(ids=ids, count=len(words), tokens=new, namespace=frame)

    def events(self) -> tuple[Event, ...]:
        """The last `ring` events, the oldest first (REC-4). O(ring)."""
        return tuple(map(self._format.decode, self._ring))

    def dump(self, path: Path) -> None:
        """Write a new log of the ring, in the recorder's format (REC-4). O(ring).

        It begins with `start`, whose `first` is the number of the oldest event that follows. A path
        that exists is refused (REC-8); one that cannot be written raises OSError.
        """
        oldest = self._recorded - len(self._ring)
        record = Chain(self._format).record
        with open(create(path), "wb") as file:
            file.write(self._format.magic)
            before = [start for start in self._starts if start.n <= oldest]
            if before and before[-1].n < oldest:
                file.write(record(self._encode(replace(before[-1], first=oldest))))
            file.writelines(map(record, self._ring))

    def flush(self) -> None:
        """Give the system what the file lacks (REC-5)."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Flush, and let go of the file; the ring can still be read. Again: nothing."""
        self._closed = True
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _as_unicode(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _key_of(event: Event) -> Key:
    """The key that an event names, or one without pages."""
    key = getattr(event, "key", None)
    return key if isinstance(key, Key) else Key()


def _pages_with_tokens(event: Event) -> dict[int, bytes]:
    """Page of the event's key -> its id, for those that come with tokens."""
    key = _key_of(event)
    return {page: key.ids[page * ID_BYTES : (page + 1) * ID_BYTES] for page in key.tokens}


def _without_tokens_of(event: E, named: set[bytes]) -> E:
    """The event without the tokens of pages that were named before it (REC-3)."""
    ids = _pages_with_tokens(event)
    if named.isdisjoint(ids.values()):
        return event
    key = _key_of(event)
    new = {page: key.tokens[page] for page, id_ in ids.items() if id_ not in named}
    return replace(event, key=replace(key, tokens=new))
