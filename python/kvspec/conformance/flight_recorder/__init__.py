"""Conformance of the flight recorder. Spec: REC."""

import inspect
import itertools
import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import pytest

import kvspec.flight_recorder
from kvspec.clauses import spec_folder
from kvspec.conformance import clause
from kvspec.conformance.flight_recorder.samples import KINDS, START, drawing, misfit, samples
from kvspec.conformance.suite import MUTANT, Conformance
from kvspec.conformance.watch import watch, watch_function
from kvspec.errors import ContractError
from kvspec.flight_recorder import LogError
from kvspec.flight_recorder.events import (
    SCHEMA,
    Alloc,
    Clear,
    Event,
    Evict,
    Free,
    Insert,
    Key,
    MatchPrefix,
    Start,
)
from kvspec.flight_recorder.log import MAGIC, Chain, format_of
from kvspec.prefix_key import RadixKey, namespace_frame, page_hashes

__all__ = ["FORMATS", "START", "FlightRecorderConformance", "misfit", "samples"]

FORMATS = ("ndjson", "msgpack")
SMALL = (Evict(num_tokens=3), Clear(at="f"), Free(slots=[(4, 8)]))


class View(NamedTuple):
    """What the antecedents of REC talk about."""

    ring: int
    dropped: int


@contextmanager
def unraisable() -> Iterator[list[BaseException | None]]:
    """What reaches `sys.unraisablehook` inside."""
    told: list[BaseException | None] = []
    hook = sys.unraisablehook
    sys.unraisablehook = lambda seen: told.append(seen.exc_value)
    try:
        yield told
    finally:
        sys.unraisablehook = hook


@contextmanager
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


def record_on(recorder: Any, event: Event) -> None:
    """Record, where an error of the file is none of the caller's."""
    try:
        recorder.record(event)
    except OSError as error:
        pytest.fail(f"the caller is told {error!r}")


def boundaries(content: bytes, format: str) -> list[int]:
    """Where each record of a log begins, and where the last one ends."""
    ends = [len(MAGIC) if format == "msgpack" else 0]
    while ends[-1] < len(content):
        at = ends[-1]
        if format == "msgpack":
            ends.append(at + 8 + int.from_bytes(content[at : at + 4], "little"))
        else:
            ends.append(content.index(b"\n", at) + 1)
    return ends


class FlightRecorderConformance(Conformance):
    """`impl` may hold a `FlightRecorder` or a `read_log`, which then stand in for kvspec's."""

    def make(self, path: Path | None = None, **options: Any) -> Any:
        """A recorder, watched."""
        given = getattr(self.impl, "FlightRecorder", None)
        cls: Any = given if inspect.isclass(given) else kvspec.flight_recorder.FlightRecorder
        if self.impl_name == MUTANT:
            return cls(path, **options)

        def view(recorder: Any) -> View:
            return View(options.get("ring", 65536), recorder.dropped)

        viewed = type("Viewed", (cls,), {"view": view})
        return watch(self.impl_name, viewed, cls, "flight_recorder", path=path, **options)

    def read(self, path: Path) -> tuple[list[Event], LogError | None]:
        """The events of a log, and what it was refused for."""
        given = getattr(self.impl, "read_log", None)
        function = given if inspect.isfunction(given) else kvspec.flight_recorder.read_log
        events: list[Event] = []

        def read_log(path: Path) -> None:
            for event in function(path):
                events.append(event)  # they are kept where the next one raises

        try:
            watch_function(self.impl_name, read_log, "flight_recorder")(path)
        except LogError as error:
            return events, error
        return events, None

    def whole(self, path: Path) -> list[Event]:
        events, error = self.read(path)
        assert error is None
        return events

    def written(self, path: Path, format: str, *events: Event) -> list[Event]:
        """A log of these events, as they were recorded."""
        with closing(self.make(path, format=format)) as recorder:
            return [recorder.record(event) for event in events]

    @clause("REC-1")
    @pytest.mark.parametrize("format", FORMATS)
    def test_events_are_numbered_as_they_come(self, format: str) -> None:
        with folder() as here:
            recorded = self.written(here / "log", format, START, *samples(), *samples())
            assert [event.n for event in recorded] == list(range(1 + 2 * len(KINDS)))
            assert [type(event) for event in recorded] == [Start, *KINDS, *KINDS]
            assert [event.n for event in self.whole(here / "log")] == list(range(len(recorded)))

    @clause("REC-1")
    def test_what_is_no_event_takes_no_number(self) -> None:
        recorder = self.make(format="msgpack")
        recorder.record(START)
        wrong_numbers: tuple[Any, ...] = (object(), 2**70)
        for wrong in wrong_numbers:
            with pytest.raises((TypeError, OverflowError)):
                recorder.record(Evict(num_tokens=wrong))
        assert recorder.record(Clear()).n == 1
        assert [event.n for event in recorder.events()] == [0, 1]

    @clause("REC-2")
    @pytest.mark.parametrize("format", FORMATS)
    def test_what_is_read_is_what_was_recorded(self, format: str) -> None:
        drawn = itertools.chain.from_iterable(samples(drawing(seed)) for seed in range(5))
        with folder() as here:
            recorded = self.written(here / "log", format, START, *samples(), *drawn)
            assert self.whole(here / "log") == recorded
            assert recorded[2] == msgspec.structs.replace(samples()[1], n=2)

    @clause("REC-2")
    @pytest.mark.parametrize("format", FORMATS)
    def test_texts_that_are_no_unicode_are_escaped(self, format: str) -> None:
        with folder() as here:
            recorded = self.written(here / "log", format, Clear(at="\udcff.py:1 f", error="\ud800"))
            assert recorded == [Clear(at="\\udcff.py:1 f", error="\\ud800")]
            assert self.whole(here / "log") == recorded

    @clause("REC-2")
    def test_what_is_written_is_valid_by_the_schema(self) -> None:
        text = (spec_folder() / "flight_recorder.schema.json").read_text(encoding="utf-8")
        schema = json.loads(text)
        drawn = itertools.chain.from_iterable(samples(drawing(seed)) for seed in range(5))
        with folder() as here:
            self.written(here / "log", "ndjson", *samples(), *drawn)
            lines = (here / "log").read_text(encoding="utf-8").split("\n")
        assert lines.pop() == ""
        for line in lines:
            value = json.loads(line)
            assert isinstance(value.pop("crc"), int)
            part = schema["discriminator"]["mapping"][value["op"]]
            assert misfit(value, {"$ref": part}, schema["$defs"]) == ""

    @clause("REC-2")
    def test_the_formats_are_those_of_the_text(self) -> None:
        """Bytes by hand, with checksums of another implementation of CRC-32, bit by bit."""
        with folder() as here:
            events = (Evict(num_tokens=3), Alloc(need_size=4, slots=[(4, 8)]))
            for format in FORMATS:
                with closing(self.make(here / format, format=format)) as recorder:
                    for event in events:
                        recorder.record(event)
            assert (here / "ndjson").read_bytes() == (
                b'{"crc":2673510699,"op":"evict","num_tokens":3}\n'
                b'{"crc":1354241441,"op":"alloc","n":1,"need_size":4,"slots":[[4,8]]}\n'
            )
            assert (
                (here / "msgpack")
                .read_bytes()
                .startswith(
                    b"kvspec01\x16\0\0\0\x9b\xac\x4c\x7c\x82\xa2op\xa5evict\xaanum_tokens\x03"
                )
            )

    @clause("REC-3")
    def test_ids_are_the_first_halves_of_page_hashes(self) -> None:
        draw, recorder, named = drawing(1), self.make(), 0
        for _ in range(400):
            name = (None, "a", b"a", 7, ("a", None))[draw(5)]
            page_size = 1 + draw(3)
            tokens = [7] * (draw(2) * 12) + [draw(2) for _ in range(draw(16))]
            key = recorder.key(tokens, page_size, name)
            ids = b"".join(digest[:16] for digest in page_hashes(tokens, page_size, name))
            assert key == Key(ids=ids, count=len(tokens))
            assert recorder.key(RadixKey(tokens, name), page_size) == key
            named += len(key.ids) // 16
        assert named > 1000

    @clause("REC-3")
    def test_what_has_no_hash_has_no_id(self) -> None:
        recorder = self.make()
        for tokens, page_size in (([2**31], 1), ([1.5], 1), ([1, 2], 0)):
            with pytest.raises(ContractError, match=r"^KEY-[13]: "):
                recorder.key(tokens, page_size)
        assert recorder.key([], 1) == Key()

    @clause("REC-3")
    @pytest.mark.parametrize("format", FORMATS)
    def test_tokens_come_once_a_file_with_the_first_event_that_names_the_page(
        self, format: str
    ) -> None:
        tokens, frame = list(range(9)), namespace_frame("a")
        with folder() as here:
            with closing(self.make(here / "log", format=format, tokens=True)) as recorder:
                early = recorder.key(tokens, 4, "a")
                for key in (
                    recorder.key(tokens[:4], 4, "a"),
                    early,
                    recorder.key(tokens, 4, "a"),
                    recorder.key(tokens[:6], 4),
                ):
                    recorder.record(MatchPrefix(key=key))
                recorder.record(Insert(key=recorder.key(tokens[:4], 4), slots=[(4, 8)]))
            events = self.whole(here / "log")
        keys = [event.key for event in events if isinstance(event, MatchPrefix | Insert)]
        carried = [{0: [0, 1, 2, 3]}, {1: [4, 5, 6, 7]}, {}, {0: [0, 1, 2, 3]}, {}]
        assert [key.tokens for key in keys] == carried
        assert [key.namespace for key in keys] == [frame, frame, frame, b"", b""]
        assert [key.count for key in keys] == [4, 9, 9, 6, 4]

    @clause("REC-3")
    def test_an_event_that_failed_names_no_page(self) -> None:
        recorder = self.make(tokens=True)
        wrong: Any = [object()]
        with pytest.raises(TypeError):
            recorder.record(Insert(key=recorder.key([1, 2], 1), slots=wrong))
        event = recorder.record(Insert(key=recorder.key([1, 2], 1), slots=[]))
        assert event.key.tokens == {0: [1], 1: [2]}

    @clause("REC-4")
    @pytest.mark.parametrize("ring", [1, 4])
    def test_the_ring_holds_the_last_events(self, ring: int) -> None:
        recorder = self.make(ring=ring)
        recorded = [recorder.record(START)]
        for step in range(9):
            recorded.append(recorder.record(Alloc(need_size=step)))
            assert recorder.events() == tuple(recorded[-ring:])

    @clause("REC-4")
    def test_the_ring_holds_what_an_event_was(self) -> None:
        recorder, slots = self.make(), [(4, 8)]
        recorder.record(Free(slots=slots))
        slots.clear()
        assert recorder.events() == (Free(slots=[(4, 8)]),)

    @clause("REC-4")
    @pytest.mark.parametrize("format", FORMATS)
    def test_a_dump_tells_how_many_events_went_before(self, format: str) -> None:
        with folder() as here:
            recorder = self.make(format=format, ring=4)
            recorded = [recorder.record(START)]
            for step in range(7):
                recorder.dump(here / str(step))
                begin, *rest = self.whole(here / str(step))
                held = recorded[-4:]
                first = max(1, len(recorded) - 4)
                assert begin == msgspec.structs.replace(recorded[0], first=first)
                assert rest == [event for event in held if event.n]
                recorded.append(recorder.record(Evict(num_tokens=step)))

    @clause("REC-4")
    def test_a_dump_begins_with_the_start_that_its_first_event_follows(self) -> None:
        with folder() as here:
            recorder = self.make(ring=4)
            for step in range(14):
                recorder.record(START if step % 5 == 0 else Clear())
                recorder.dump(here / str(step))
                numbers = [event.n for event in self.whole(here / str(step))]
                last = max(0, step - 3)
                expected = [last - last % 5] if last % 5 else []
                assert numbers == [*expected, *range(last, step + 1)]

    @clause("REC-5")
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("flush_every", [1, 3])
    def test_what_was_flushed_can_be_read_while_the_file_is_open(
        self, flush_every: int, format: str
    ) -> None:
        with folder() as here:
            path = here / "log"
            with closing(self.make(path, format=format, flush_every=flush_every)) as recorder:
                recorded = []
                for step in range(8):
                    recorded.append(recorder.record(Evict(num_tokens=step) if step else START))
                    flushed = len(recorded) - len(recorded) % flush_every
                    assert self.whole(path) == recorded[:flushed]
                recorder.flush()
                assert self.whole(path) == recorded
                recorder.record(Clear())
            assert len(self.whole(path)) == 9

    @clause("REC-5", "REC-6")
    @pytest.mark.parametrize("format", FORMATS)
    def test_a_log_that_ends_anywhere_gives_what_is_whole(self, format: str) -> None:
        with folder() as here:
            path = here / "log"
            recorded = self.written(path, format, *SMALL)
            content = path.read_bytes()
            ends = boundaries(content, format)
            for length in range(len(content)):
                path.write_bytes(content[:length])
                events, error = self.read(path)
                whole = sum(end <= length for end in ends[1:])
                assert events == recorded[:whole]
                if length in ends or length == 0:
                    assert error is None
                else:
                    assert error is not None
                    assert error.reason.startswith("truncated: ")
                    position = ends[whole] if length > ends[0] else 0
                    assert (error.position, error.record) == (position, whole)

    @clause("REC-6")
    @pytest.mark.parametrize("format", FORMATS)
    def test_a_changed_byte_is_found(self, format: str) -> None:
        with folder() as here:
            path = here / "log"
            recorded = self.written(path, format, *SMALL)
            content = path.read_bytes()
            ends = boundaries(content, format)
            for at in range(len(content)):
                changed = bytearray(content)
                changed[at] ^= 1 << at % 8
                path.write_bytes(changed)
                events, error = self.read(path)
                record = max(0, sum(end <= at for end in ends) - 1)
                assert events == recorded[:record]
                assert error is not None
                position = ends[record] if at >= ends[0] else 0
                assert (error.position, error.record) == (position, record)
                assert str(error) == f"REC-6: record {record}, at byte {position}: {error.reason}"

    @clause("REC-6")
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize(
        ("order", "good"),
        [((0, 2, 3), 1), ((0, 2, 1, 3), 1), ((0, 1, 1, 2), 2), ((1, 2, 3), 0), ((0, 3), 1)],
        ids=["lost", "swapped", "twice", "beginning lost", "two lost"],
    )
    def test_a_record_out_of_place_is_found(
        self, order: tuple[int, ...], good: int, format: str
    ) -> None:
        with folder() as here:
            path = here / "log"
            recorded = self.written(path, format, START, *[Evict(num_tokens=1)] * 3)
            content = path.read_bytes()
            ends = boundaries(content, format)
            records = [content[ends[at] : ends[at + 1]] for at in order]
            path.write_bytes(content[: ends[0]] + b"".join(records))
            events, error = self.read(path)
        assert events == recorded[:good]
        assert error is not None
        assert error.record == good
        assert error.position == ends[0] + sum(map(len, records[:good]))
        assert "checksum" in error.reason

    @clause("REC-6")
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [
            (lambda body: body, "event 1 stands where 2 is due"),
            (lambda body: body.replace(b"evict", b"evade"), "not an event: "),
            (lambda body: body.replace(b"num_tokens", b"num_blocks"), "not an event: "),
            (lambda body: body[:-1], "not an event: "),
            (lambda body: body + body, "not an event: "),
            (lambda body: b"", "not an event: "),
            (lambda body: b"\xff" * 9, "not an event: "),
            (lambda body: b'{"op":' + b"[" * 100_000, "not an event: "),
        ],
        ids=["again", "op", "field", "cut", "two", "none", "noise", "deep"],
    )
    def test_a_record_that_is_no_event_is_found(
        self, wrong: Callable[[bytes], bytes], reason: str, format: str
    ) -> None:
        layout = format_of(format)
        body = layout.encode(Evict(num_tokens=9, n=1))
        chain = Chain(layout)
        good = layout.magic + chain.record(layout.encode(START)) + chain.record(body)
        with folder() as here:
            (here / "log").write_bytes(good + chain.record(wrong(body)))
            events, error = self.read(here / "log")
        assert events == [START, Evict(num_tokens=9, n=1)]
        assert error is not None
        assert (error.position, error.record) == (len(good), 2)
        assert error.reason.startswith(reason)

    @clause("REC-6")
    @pytest.mark.parametrize("format", FORMATS)
    def test_another_schema_is_refused(self, format: str) -> None:
        layout = format_of(format)
        later = msgspec.structs.replace(START, schema=SCHEMA + 1)
        with folder() as here:
            (here / "log").write_bytes(layout.magic + Chain(layout).record(layout.encode(later)))
            events, error = self.read(here / "log")
        assert not events
        assert error is not None
        assert error.reason == f"its schema is {SCHEMA + 1}, and {SCHEMA} what is read here"

    @clause("REC-6")
    @pytest.mark.parametrize("content", [b"kvspec", b"\n", b"{}\n", b"\x1f\x8b\x08", b"op"])
    def test_another_file_is_refused(self, content: bytes) -> None:
        with folder() as here:
            (here / "log").write_bytes(content)
            events, error = self.read(here / "log")
        assert not events
        assert error is not None
        assert (error.position, error.record) == (0, 0)

    @clause("REC-7")
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("flush_every", [1, 4])
    def test_a_full_disk_is_told_once_and_counted(self, flush_every: int, format: str) -> None:
        options = {"format": format, "flush_every": flush_every, "ring": 3}
        with unraisable() as told, closing(self.make(Path("/dev/full"), **options)) as recorder:
            for step in range(9):
                record_on(recorder, Evict(num_tokens=step))
                assert recorder.dropped == (step + 1 if step + 1 >= flush_every else 0)
            recorder.flush()
            recorder.close()
            assert recorder.dropped == 9
            assert [type(error) for error in told] == [OSError]
            assert [event.num_tokens for event in recorder.events()] == [6, 7, 8]

    @clause("REC-7")
    def test_a_reader_that_went_is_an_error_of_the_file(self) -> None:
        with folder() as here, unraisable() as told:
            os.mkfifo(here / "pipe")
            reader = os.open(here / "pipe", os.O_RDONLY | os.O_NONBLOCK)
            with closing(self.make(here / "pipe")) as recorder:
                record_on(recorder, START)
                assert recorder.dropped == 0
                os.close(reader)
                record_on(recorder, Clear())
                record_on(recorder, Clear())
            assert recorder.dropped == 2
            assert [type(error) for error in told] == [BrokenPipeError]

    @clause("REC-8")
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"ring": 0}, "a ring of 0 events"),
            ({"ring": -1}, "a ring of -1 events"),
            ({"flush_every": 0}, "flush_every is 0"),
            ({"format": "json"}, "the format 'json'"),
        ],
    )
    def test_what_cannot_be_recorded_with_is_refused(
        self, options: dict[str, Any], reason: str
    ) -> None:
        with folder() as here:
            with pytest.raises(ContractError, match=f"^REC-8: {reason}"):
                self.make(here / "log", **options)
            assert not (here / "log").exists()

    @clause("REC-8")
    def test_nothing_is_recorded_after_close(self) -> None:
        with folder() as here:
            recorder = self.make(here / "log")
            recorder.record(START)
            recorder.close()
            recorder.close()
            with pytest.raises(ContractError, match=r"^REC-8: the recorder is closed"):
                recorder.record(Clear())
            assert self.whole(here / "log") == list(recorder.events()) == [START]

    @clause("REC-8")
    def test_a_file_is_not_overwritten(self) -> None:
        with folder() as here:
            path = here / "log"
            path.write_bytes(b"mine")
            recorder = self.make()
            recorder.record(START)
            with pytest.raises(ContractError, match=r"^REC-8: .* exists, and is not overwritten"):
                self.make(path)
            with pytest.raises(ContractError, match=r"^REC-8: .* exists, and is not overwritten"):
                recorder.dump(path)
            assert path.read_bytes() == b"mine"

    @clause("REC-9")
    def test_only_what_grew_is_hashed(self) -> None:
        recorder = self.make()
        tokens = [step % 5 for step in range(400)]
        for length in range(0, 401, 7):
            recorder.key(tokens[:length], 4)
        recorder.key(tokens, 4)
        assert recorder.hashed_pages == 100
        recorder.key(tokens[:200] + [9] * 200, 4)
        recorder.key(tokens[:240] + [8] * 40, 4)
        assert recorder.hashed_pages == 100 + 50 + 10
        recorder.key(tokens[:200] + [9] * 200, 4)
        recorder.key(tokens, 4)
        assert recorder.hashed_pages == 160

    @clause("REC-9")
    def test_what_is_kept_is_bounded_by_the_ring(self) -> None:
        recorder = self.make(ring=8)
        tracemalloc.start()
        try:
            for step in range(600):
                recorder.record(START if step % 50 == 0 else Free(slots=[(step, step + 4)]))
                if step == 200:
                    before = tracemalloc.get_traced_memory()[0]
            assert tracemalloc.get_traced_memory()[0] - before < 10_000
        finally:
            tracemalloc.stop()
