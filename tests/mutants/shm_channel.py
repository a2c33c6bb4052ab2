"""Broken channels. Each must fail on the clause it breaks."""

import atexit
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import kvspec.oracle
from kvspec.conformance.mutants import Registry
from kvspec.conformance.shm_channel import ShmChannelConformance
from kvspec.errors import ContractError, PeerDiedError
from kvspec.oracle import ShmChannel
from kvspec.oracle.shm_channel import ATTACHED, LEFT, ReadBlock, WriteBlock

registry = Registry(ShmChannelConformance, kvspec.oracle)


class Impatient(ShmChannel):
    """For ever is a moment: a mutant that loses a message, or hangs, is killed all the same."""

    def _wait(
        self, ready: Callable[[], bool], over: Callable[[], bool], timeout: float | None
    ) -> bool:
        return super()._wait(ready, over, 0.1 if timeout is None else timeout)


@registry.mutant(
    "CHAN-1", "CHAN-4", "CHAN-7", "CHAN-9", "CHAN-15", "CHAN-20", "CHAN-22", "CHAN-27", "CHAN-28"
)
class ForgetsTheSlowest(Impatient):
    def _room(self, timeout: float | None) -> bool:
        fastest = max((self._read(r) for r in self._counted()), default=-self.block_count)
        return self._written - fastest < self.block_count or super()._room(timeout)


@registry.mutant("CHAN-1", "CHAN-7", "CHAN-9", "CHAN-4", "CHAN-15", "CHAN-20", "CHAN-27")
class HasOneBlockTooMany(Impatient):
    def _room(self, timeout: float | None) -> bool:
        self.block_count += 1
        try:
            return super()._room(timeout)
        finally:
            self.block_count -= 1


@registry.mutant("CHAN-2")
class HasEverySegmentTwice(Impatient):
    """The name of the segment outlives the channel."""

    def close(self) -> None:
        name = self.name
        super().close()
        if self.reader is not None and not Path("/dev/shm", name).exists():
            Path("/dev/shm", name).touch()
            _LEFT_BEHIND.append(name)


_LEFT_BEHIND: list[str] = []


@atexit.register
def _remove() -> None:
    for name in _LEFT_BEHIND:
        Path("/dev/shm", name).unlink(missing_ok=True)


@registry.mutant("CHAN-3")
class MakesTheSmallestOfNone(Impatient):
    @classmethod
    def create(cls, label: str, block_bytes: int, block_count: int, reader_count: int) -> Self:
        return super().create(label, max(block_bytes, 1), max(block_count, 1), max(reader_count, 1))


@registry.mutant("CHAN-4", "CHAN-9", "CHAN-18")
class StartsWithTheNextMessage(Impatient):
    @classmethod
    def attach(cls, name: str, reader: int) -> Self:
        self = super().attach(name, reader)
        while self._left():
            self._advance()
        return self


@registry.mutant("CHAN-5")
class LetsAPlaceBeTakenAgain(Impatient):
    @classmethod
    def attach(cls, name: str, reader: int) -> Self:
        try:
            return super().attach(name, reader)
        except ContractError as error:
            if "is left" not in str(error):
                raise
        return super().attach(name, 1 - reader)


@registry.mutant("CHAN-5")
class BelievesWhatTheSegmentSays(Impatient):
    @classmethod
    def attach(cls, name: str, reader: int) -> Self:
        try:
            return super().attach(name, reader)
        except ContractError as error:
            raise (
                error if "no channel" not in str(error) else PeerDiedError("CHAN-21: no")
            ) from None


@registry.mutant("CHAN-6", "CHAN-9", "CHAN-11", "CHAN-15", "CHAN-30")
class SendsAFullBlockAByteShort(Impatient):
    def send(self, data: Any, timeout: float | None = None) -> bool:
        if isinstance(data, bytes) and len(data) == self.block_bytes:
            super().send(memoryview(data)[:-1], timeout)
            return True
        return super().send(data, timeout)


@registry.mutant("CHAN-6")
class SendsWhatIsNotACopy(Impatient):
    """What it was given is looked at when the message is received."""

    _given: Any = None

    def send(self, data: Any, timeout: float | None = None) -> bool:
        sent = super().send(data, timeout)
        if isinstance(data, bytearray):
            ShmChannel._given = data
        return sent

    def receive(self, timeout: float | None = None) -> bytes | None:
        message = super().receive(timeout)
        given, ShmChannel._given = getattr(ShmChannel, "_given", None), None
        return message if given is None or message is None else bytes(given)


@registry.mutant("CHAN-7", "CHAN-4", "CHAN-9", "CHAN-15", "CHAN-20")
class SaysThatItWasSent(Impatient):
    """A message that found no room is lost, and nobody is told."""

    def send(self, data: Any, timeout: float | None = None) -> bool:
        return super().send(data, timeout) or True


@registry.mutant("CHAN-8")
class CutsWhatIsTooLong(Impatient):
    def send(self, data: Any, timeout: float | None = None) -> bool:
        if isinstance(data, bytes):
            data = data[: self.block_bytes]
        return super().send(data, timeout)


@registry.mutant("CHAN-8", "CHAN-6", "CHAN-9", reports=("VL-29389",))
class PublishesBeforeItLooks(Impatient):
    """The message counts as sent while its bytes are on the way, and they never come."""

    def send(self, data: Any, timeout: float | None = None) -> bool:
        try:
            return super().send(data, timeout)
        except ContractError as error:
            if error.clause == "CHAN-8":
                self._publish(0)
            raise


@registry.mutant("CHAN-9", "CHAN-1", "CHAN-4", "CHAN-11", "CHAN-15", "CHAN-18", "CHAN-7")
class ReceivesTheNewest(Impatient):
    def _offset(self, number: int) -> int:
        return super()._offset(number if self.reader is None else self._written - 1)


@registry.mutant("CHAN-10")
class CountsWhatDidNotCome(Impatient):
    def read_block(self, timeout: float | None = None) -> ReadBlock | None:
        block = super().read_block(timeout)
        if block is None and timeout and not self._closed:
            self._advance()
        return block


@registry.mutant("CHAN-11")
class SaysHowLongTheBufferIs(Impatient):
    def receive_into(self, buffer: Any, timeout: float | None = None) -> int | None:
        nbytes = super().receive_into(buffer, timeout)
        return nbytes if nbytes is None or not isinstance(buffer, bytearray) else len(buffer)


@registry.mutant("CHAN-11")
class ClearsTheRestOfTheBuffer(Impatient):
    def receive_into(self, buffer: Any, timeout: float | None = None) -> int | None:
        nbytes = super().receive_into(buffer, timeout)
        if nbytes is not None and isinstance(buffer, bytearray):
            buffer[nbytes:] = bytes(len(buffer) - nbytes)
        return nbytes


@registry.mutant("CHAN-12")
class DropsAMessageThatDoesNotFit(Impatient):
    def receive_into(self, buffer: Any, timeout: float | None = None) -> int | None:
        try:
            return super().receive_into(buffer, timeout)
        except ContractError as error:
            if error.clause == "CHAN-12" and "the message has" in str(error):
                self._advance()
            raise


class Unfinished(WriteBlock):
    def commit(self, nbytes: int) -> None:
        written = self._end._written
        super().commit(nbytes)
        self._end._words[128 // 8] = written


@registry.mutant(
    "CHAN-13", "CHAN-14", "CHAN-16", "CHAN-17", "CHAN-21", "CHAN-26", reports=("VL-29389",)
)
class PublishesBeforeTheData(Impatient):
    """A reader sees that a message is there before its bytes are."""

    def write_block(self, timeout: float | None = None) -> WriteBlock | None:
        with self._turn("write_block", True, timeout):
            if not self._room(timeout):
                return None
            self._block = block = Unfinished(self, self.block_bytes, True)
            self._publish(self.block_bytes)
            return block


class Always(WriteBlock):
    def give_up(self) -> None:
        if self._end._block is self:
            self.commit(len(self._bytes))


@registry.mutant("CHAN-14", "CHAN-26")
class SendsWhatWasGivenUp(Impatient):
    def write_block(self, timeout: float | None = None) -> WriteBlock | None:
        block = super().write_block(timeout)
        if block is not None:
            block.__class__ = Always
        return block


class Early(ReadBlock):
    def release(self) -> None:
        self._require_open()
        self._let_go()


@registry.mutant("CHAN-15", "CHAN-16", "CHAN-26", reports=("VL-29389",))
class GivesABlockBackBeforeItIsRead(Impatient):
    """The writer writes to a block that a reader looks at."""

    def read_block(self, timeout: float | None = None) -> ReadBlock | None:
        block = super().read_block(timeout)
        if block is not None:
            block.__class__ = Early
            self._advance()
        return block


class Blind(WriteBlock):
    def _let_go(self) -> None:
        with contextlib.suppress(ContractError):
            super()._let_go()
        self._end._block = None


@registry.mutant("CHAN-16")
class ReusesABlockThatIsLookedAt(Impatient):
    def write_block(self, timeout: float | None = None) -> WriteBlock | None:
        block = super().write_block(timeout)
        if block is not None:
            block.__class__ = Blind
        return block


class Clamping(WriteBlock):
    def commit(self, nbytes: int) -> None:
        super().commit(min(max(nbytes, 0), len(self._bytes)))


@registry.mutant("CHAN-17")
class CommitsWhatFits(Impatient):
    def write_block(self, timeout: float | None = None) -> WriteBlock | None:
        block = super().write_block(timeout)
        if block is not None:
            block.__class__ = Clamping
        return block


@registry.mutant("CHAN-18", "CHAN-14")
class EndsBeforeWhatIsLeft(Impatient):
    def _message(self, timeout: float | None) -> bool:
        return not self._closed and super()._message(timeout)


@registry.mutant("CHAN-18", "CHAN-27")
class NeverEnds(Impatient):
    @property
    def ended(self) -> bool:
        return False


@registry.mutant("CHAN-19", "CHAN-5", "CHAN-20", "CHAN-23", "CHAN-24", "CHAN-29")
class IsMissedAfterItsClose(Impatient):
    def _set_state(self, reader: int, state: int) -> None:
        if state != LEFT:
            super()._set_state(reader, state)


@registry.mutant("CHAN-20", "CHAN-27", reports=("VL-45644",))
class WaitsForTheDead(Impatient):
    """A reader that was killed never gives its block back, and the writer waits for it."""

    def _notice_the_dead(self) -> bool:
        return False


@registry.mutant("CHAN-21", "CHAN-27", reports=("VL-45644",))
class WaitsForADeadWriter(Impatient):
    def _message(self, timeout: float | None) -> bool:
        try:
            return super()._message(timeout)
        except PeerDiedError:
            return False


@registry.mutant("CHAN-21")
class LosesWhatADeadWriterSent(Impatient):
    def _message(self, timeout: float | None) -> bool:
        if self._is_gone(0) and not self._closed:
            raise PeerDiedError("CHAN-21: the writer is gone")
        return super()._message(timeout)


@registry.mutant("CHAN-22", "CHAN-5", "CHAN-23", "CHAN-24", reports=("VL-45644",))
class CannotGoOnWithoutAReader(Impatient):
    def drop_reader(self, reader: int) -> None:
        super().drop_reader(reader)
        super()._set_state(reader, ATTACHED)


@registry.mutant("CHAN-23")
class DropsTheLiving(Impatient):
    def drop_reader(self, reader: int) -> None:
        try:
            super().drop_reader(reader)
        except ContractError as error:
            if "is alive" not in str(error):
                raise
            self._set_state(reader, 3)


@registry.mutant("CHAN-24")
class SendsToNobody(Impatient):
    def _room(self, timeout: float | None) -> bool:
        return not self._counted() or super()._room(timeout)


@registry.mutant("CHAN-25")
class DoesNotWaitForReaders(Impatient):
    def wait_for_readers(self, timeout: float | None = None) -> bool:
        return super().wait_for_readers(timeout) or True


@registry.mutant("CHAN-26")
class TakesANegativeTimeForNone(Impatient):
    def _require(self, name: str, writes: bool, timeout: float | None) -> None:
        super()._require(name, writes, 0)


@registry.mutant("CHAN-26")
class OpensASecondBlock(Impatient):
    def _require(self, name: str, writes: bool, timeout: float | None) -> None:
        block, self._block = self._block, None
        super()._require(name, writes, timeout)
        self._block = block


@registry.mutant("CHAN-28")
class ChecksNothing(Impatient):
    def check(self) -> None:
        with self._turn("check"):
            pass
