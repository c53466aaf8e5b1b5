"""A stream on its way from an upstream to a client: looked into, held back, not rewritten.

Only where it goes on with what another upstream began, its events are changed to fit.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Protocol

import attrs
import trio

from citadel_gateway.io.attempt import AFTER_DONE, MAX_ERROR_BODY, Attempt, read_all
from citadel_gateway.io.connection import Connection, Interrupted
from citadel_gateway.io.failures import UpstreamFailure
from citadel_gateway.io.pump import Pump
from citadel_gateway.io.record import Phase
from citadel_gateway.wire.headers import first
from citadel_gateway.wire.http1_response import BadResponse, CutShort
from citadel_gateway.wire.openai_answer import EngineError, NotAnAnswer, raise_if_error
from citadel_gateway.wire.openai_stream import EventKind, StreamReader
from citadel_gateway.wire.seam import Diverged, Seam
from citadel_gateway.wire.sse import DONE, EventSplitter

_MAX_HELD_EVENTS = 64
_MAX_HELD_BYTES = 256 * 1024


class Sink(Protocol):
    """Where a stream goes: the client, or whoever stands in for it."""

    @property
    def takes_at_once(self) -> bool:
        """Whether :meth:`write_now` is of use."""
        ...

    def write_now(self, data: bytes) -> bytes:
        """Send what can be sent without waiting; returns the rest, for :meth:`write_rest`."""
        ...

    async def write_rest(self, rest: bytes) -> None: ...

    async def start_early(self, data: bytes) -> None:
        """Send the head before there is an answer; :meth:`start` follows if there is one."""
        ...

    async def start(self, data: bytes) -> None:
        """Commit the answer: send the head and the first events."""
        ...

    async def write(self, data: bytes) -> None: ...

    async def finish(self, data: bytes) -> None:
        """Send the last bytes and end the body."""
        ...


@attrs.define(eq=False)
class StreamRelay:
    """One stream.  Nothing reaches the sink before the first event with content.

    Until then another endpoint may still be asked, and the client need never know.

    :param seam: it goes on with a stream of which *sink* has had the beginning.
    """

    attempt: Attempt
    sink: Sink
    reader: StreamReader
    pump: Pump
    seam: Seam | None = None
    _splitter: EventSplitter = attrs.field(factory=EventSplitter, init=False)
    _has_content: bool = attrs.field(default=False, init=False)
    _held: list[bytes] = attrs.field(factory=list, init=False)
    _held_bytes: int = attrs.field(default=0, init=False)
    _held_events: int = attrs.field(default=0, init=False)
    _error: Exception | None = attrs.field(default=None, init=False)
    _unsent: bytes = attrs.field(default=b"", init=False)

    async def run(self, connection: Connection) -> None:
        """Relay until the answer is whole; raises what the upstream did wrong."""
        await check_is_stream(connection)
        attempt, reader = self.attempt, self.reader
        attempt.expect_first_token()
        try:
            await self._read(connection)
        except Diverged:
            raise  # whole as that may be, it is another answer
        except (BadResponse, OSError, Interrupted, UpstreamFailure, EngineError, NotAnAnswer):
            if not (self._has_content and reader.is_whole):
                raise
            # All has been said, so nobody will miss what would have come behind it.
            await self._finish(connection)
            return
        if not reader.is_whole:
            if self._has_content:
                await self._flush(connection)
            raise CutShort("the upstream ended the stream before its answer did", started=True)
        await self._finish(connection)
        await read_to_end(connection)

    async def _read(self, connection: Connection) -> None:
        attempt, reader = self.attempt, self.reader
        while data := await connection.read_body():
            self._error = self._take_in(self._splitter.feed(data))
            if self._has_content and not reader.done:
                await self._flush(connection)
                attempt.expect_more()
                await self._be_carried(connection)
            elif self.seam is not None and reader.content_events and not reader.done:
                attempt.expect_more()  # it repeats what the client has already
            if reader.done:
                return
            if self._error is not None:
                raise self._error
        self._take_in_rest()

    async def _be_carried(self, connection: Connection) -> None:
        """Let the pump move chunks for as long as that is all there is to do."""
        sock = connection.socket
        if sock is None or not self.sink.takes_at_once:
            return
        attempt = self.attempt
        while self._error is None and not self.reader.done and connection.is_flowing:
            began = trio.current_time()
            await self.pump.carry(sock, partial(self._step, connection))
            connection.waited += trio.current_time() - began
            if self._unsent or self._held:
                attempt.pause_clock()
                rest, self._unsent = self._unsent, b""
                await self.sink.write_rest(rest)
                await self._flush(connection)
                attempt.expect_more()

    def _step(self, connection: Connection, now: float) -> bool:
        """Relay what has arrived; false when that was not all there is to do."""
        data = connection.receive_now()
        if not data:
            return connection.is_flowing
        event = connection.response.whole_chunk(data)
        if event and self._splitter.is_empty and self.seam is None and self.reader.knows(event):
            self._unsent = self.sink.write_now(event)
            self.attempt.has_more(now)
            return not self._unsent
        self._error = self._take_in(self._splitter.feed(connection.take_in(data)))
        if self._error is not None or self.reader.done:
            return False
        if self._held:
            self._unsent = self.sink.write_now(self._take_out())
        self.attempt.has_more(now)
        return not self._unsent and connection.is_flowing

    def _take_in(self, events: list[bytes]) -> Exception | None:
        """Hold events back for the next write; returns the error that one of them is, if any."""
        reader = self.reader
        for event in events:
            try:
                kind = reader.read(event)
                if kind is EventKind.DONE:
                    return None  # written by us, when it is known to be true
                if kind is not EventKind.CONTENT and not self._passes(kind):
                    continue
                chunk, reader.chunk = reader.chunk, None
                if self.seam is not None and chunk is not None:
                    event = self.seam.join(chunk)
                    if not event:
                        continue
            except (EngineError, NotAnAnswer) as exc:
                return exc
            if kind is EventKind.CONTENT:
                self._has_content = True
            if chunk is not None and reader.delivered is not None:
                reader.delivered.note(chunk)
                if self.seam is not None:
                    self.seam.count(reader.delivered)
            self._held.append(event)
            self._held_bytes += len(event)
            self._held_events += not event.startswith(b":")  # pings while a long prompt is read
        too_much = self._held_events > _MAX_HELD_EVENTS or self._held_bytes > _MAX_HELD_BYTES
        if too_much and not self._has_content:
            return NotAnAnswer("the upstream sent many events and no content")
        return None

    def _passes(self, kind: EventKind) -> bool:
        match kind:
            case EventKind.MALFORMED:
                return False
            case EventKind.USAGE:
                return self.attempt.call.request.wants_usage
            case _:
                return True

    def _take_in_rest(self) -> None:
        """The upstream hung up: a last event may lack its blank line."""
        rest = self._splitter.rest().strip()
        if rest:
            error = self._take_in([rest + b"\n\n"])
            if error is not None:
                raise error

    async def _flush(self, connection: Connection) -> None:
        attempt = self.attempt
        data = self._take_out()
        if not attempt.committed:
            attempt.stop_clock()
            attempt.committed = True
            attempt.note_wait(connection)
            attempt.progress.phase = Phase.STREAMING
            await self.sink.start(data)
            return
        attempt.pause_clock()
        if data:
            await self.sink.write(data)

    def _take_out(self) -> bytes:
        """What was held back until now."""
        data = self._held[0] if len(self._held) == 1 else b"".join(self._held)
        self._held.clear()
        self._held_bytes = self._held_events = 0
        return data

    async def _finish(self, connection: Connection) -> None:
        self._held.append(DONE)
        if not self.attempt.committed:
            await self._flush(connection)
        self.attempt.pause_clock()
        await self.sink.finish(b"".join(self._held))


async def read_to_end(connection: Connection) -> None:
    """Let a body come to its end, so that its connection can be used again.

    The client has its answer: whatever goes wrong now costs the connection and nothing else.  Where
    the end can be read by whoever uses the connection next, nobody waits for it.
    """
    if connection.leave_the_end():
        return
    # Shielded: clients hang up on [DONE], which must not turn a success into a cancellation.
    with trio.move_on_after(AFTER_DONE, shield=True), suppress(BadResponse, OSError, Interrupted):
        await connection.read_body()


async def check_is_stream(connection: Connection) -> None:
    """Raises what the upstream has answered with instead."""
    content_type = (first(connection.response.headers, b"content-type") or b"").lower()
    if content_type.startswith(b"text/event-stream"):
        return
    if content_type.startswith(b"application/json"):
        body = await read_all(connection, MAX_ERROR_BODY)
        raise_if_error(body)
    kind = content_type.decode("latin-1") or "no content type"
    raise NotAnAnswer(f"the upstream answered a stream request with {kind}")
