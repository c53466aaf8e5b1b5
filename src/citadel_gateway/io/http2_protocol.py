"""Hypercorn's HTTP/2, with an end to every wait.

Frames, header compression and flow control are Hypercorn's ``H2Protocol`` on the h2 library.  As
it comes, it writes from whichever task has something to say, so that cancelling one loses bytes of
all; its buffers let go of whoever waits for a window that stays closed, and grow; data for a
stream that is gone ends the connection by an exception.  What is changed here is that: one task
writes, buffers wait and run out of patience, and streams are those of :mod:`.http2_stream`.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio
from hypercorn.config import Config
from hypercorn.events import Event as ConnectionEvent
from hypercorn.protocol.h2 import BufferCompleteError, H2Protocol, StreamBuffer
from hypercorn.trio.worker_context import EventWrapper, WorkerContext
from hypercorn.typing import ConnectionState
from hyperframe.frame import GoAwayFrame

from citadel_gateway.wire.http2_request import LARGEST_LIST

MAX_STREAMS = 100  # at once; what most clients assume before they are told
LARGEST_BLOCK = 64 * 1024  # bytes of a header block as it is sent
_STREAM_WINDOW = 512 * 1024  # bytes of a body that may be on their way, or wait to be read
_CONNECTION_WINDOW = 2**20
_HIGH, _LOW = 64 * 1024, 16 * 1024  # bytes of an answer that wait for the client
_ROOM = 64 * 1024  # bytes that wait for the socket; above it nobody adds more
_LAST_STREAM = 2**31 - 1
_EARNED_BY_DATA = 2  # frames that a client sends for one of data: it opens two windows

Pairs = list[tuple[bytes, bytes]]


class AnswerBuffer(StreamBuffer):
    """What is still to be sent of one answer.

    :param patience: seconds that the client may let us wait, in all, until it has taken 64 KiB.
    """

    def __init__(self, patience: float) -> None:
        super().__init__(EventWrapper)
        self.ended = False  # its end has been sent, too
        self._patience, self._blocked, self._taken = patience, 0.0, 0
        self._gone = False
        self._news = trio.Event()

    async def push(self, data: bytes) -> None:
        """Raises ``trio.BrokenResourceError`` when the client takes nothing."""
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        if len(self.buffer) >= _HIGH:
            await self._wait_until_below(_LOW)

    async def drain(self) -> None:
        """Wait until the end has been sent; raises as :meth:`push`."""
        await self._wait_until_below(-1)

    def take(self, size: int) -> bytes:
        data = bytes(self.buffer[:size])
        if data:
            del self.buffer[:size]
            self._taken += len(data)
        return data

    def tell(self) -> None:
        """Something was sent, or nothing more will be."""
        self._news.set()
        self._news = trio.Event()

    def drop(self) -> None:
        self._complete = self._gone = True
        self.buffer.clear()
        self.tell()

    async def _wait_until_below(self, size: int) -> None:
        while not (self.ended or self._gone) and len(self.buffer) > size:
            if self._taken >= _HIGH:
                self._blocked, self._taken = 0.0, 0
            began = trio.current_time()
            with trio.move_on_after(self._patience - self._blocked) as patience:
                await self._news.wait()
            if patience.cancelled_caught:
                raise trio.BrokenResourceError("the client does not read")
            self._blocked += trio.current_time() - began


class Owner(Protocol):
    """The connection, as its protocol sees it."""

    def begin(self, stream_id: int, pairs: Pairs, *, complete: bool) -> None: ...

    def add_body(self, stream_id: int, data: bytes) -> None: ...

    def end_body(self, stream_id: int) -> None: ...

    def reset(self, stream_id: int, *, by_client: bool) -> None: ...

    def refuse_more(self) -> None: ...

    def spawn(self, func: Any, *args: Any) -> None: ...

    async def on_event(self, event: ConnectionEvent) -> None: ...


class Http2Protocol(H2Protocol):
    """One connection's frames; :attr:`outbound` is what waits to be written, by :meth:`take`."""

    stream_buffers: dict[int, AnswerBuffer]  # type: ignore[assignment]  # ours instead

    def __init__(self, owner: Owner, config: Config, patience: float) -> None:
        super().__init__(
            None,  # type: ignore[arg-type]  # its own streams would call it
            config,
            WorkerContext(None),
            owner,  # type: ignore[arg-type]  # all that is asked of it is to spawn
            ConnectionState({}),
            True,
            None,
            None,
            owner.on_event,
        )
        self.owner, self.patience = owner, patience
        self.outbound = bytearray()
        self.earned = 0
        self._written, self._filled = trio.Event(), trio.Event()
        codes = h2.settings.SettingCodes
        self.connection.local_settings = h2.settings.Settings(
            client=False,
            initial_values={
                codes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                codes.MAX_HEADER_LIST_SIZE: LARGEST_LIST,
                codes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
            },
        )
        # A little above what we say, so that most of those who send too much can be told.
        self.connection.decoder.max_header_list_size = 2 * LARGEST_LIST

    async def start(self) -> None:
        await self.initiate()
        self.connection.increment_flow_control_window(_CONNECTION_WINDOW - 65_535)
        self.collect()

    # What comes in.

    async def receive(self, data: bytes) -> None:
        """Raises ``h2.exceptions.ProtocolError``; then :attr:`outbound` ends in why."""
        try:
            events = self.connection.receive_data(data)
        except h2.exceptions.ProtocolError:
            self.collect()
            raise
        await self._handle_events(events)

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        """Priorities are advice that nobody has to take (RFC 9113, section 5.3.2)."""
        owner = self.owner
        for event in events:
            match event:
                case h2.events.RequestReceived():
                    complete = event.stream_ended is not None
                    owner.begin(event.stream_id, list(event.headers), complete=complete)
                case h2.events.DataReceived():
                    padding = event.flow_controlled_length - len(event.data)
                    self.acknowledge(event.stream_id, padding)
                    owner.add_body(event.stream_id, event.data)
                case h2.events.StreamEnded():
                    owner.end_body(event.stream_id)
                case h2.events.StreamReset():
                    if (buffer := self.stream_buffers.get(event.stream_id)) is not None:
                        buffer.drop()
                    owner.reset(event.stream_id, by_client=event.remote_reset)
                case h2.events.WindowUpdated():
                    await self._window_updated(event.stream_id)
                case h2.events.RemoteSettingsChanged():
                    await self._window_updated(None)
                case h2.events.ConnectionTerminated():
                    self._take_leave(event)
        await self._flush()

    def _take_leave(self, event: h2.events.ConnectionTerminated) -> None:
        """The client will ask for nothing more, and may still wait for its answers."""
        if event.error_code == h2.errors.ErrorCodes.NO_ERROR and self.stream_buffers:
            # h2 takes it for the end, after which nothing can be said or heard.
            self.connection.state_machine.state = h2.connection.ConnectionState.SERVER_OPEN
            self.owner.refuse_more()
        else:
            self.closed = True

    def acknowledge(self, stream_id: int, size: int) -> None:
        """Let the client send *size* bytes more: so many have been read, or never will be."""
        if size:
            with suppress(h2.exceptions.ProtocolError):
                self.connection.acknowledge_received_data(size, stream_id)
                self.collect()

    # Streams.

    def open(self, stream_id: int) -> AnswerBuffer:
        buffer = self.stream_buffers[stream_id] = AnswerBuffer(self.patience)
        self.priority.insert_stream(stream_id)
        self.priority.block(stream_id)
        return buffer

    def end(self, stream_id: int, *, request_complete: bool) -> None:
        """Forget the stream; unless both sides have said all, it is reset.

        What an answer that is cut has said so far is still sent, if the client takes it at once:
        it may say why.
        """
        buffer = self.stream_buffers.pop(stream_id)
        self.priority.remove_stream(stream_id)
        sent = 0
        while not buffer.ended and sent < _HIGH and (more := self._send_some(stream_id, buffer)):
            sent += more
        buffer.drop()
        codes = h2.errors.ErrorCodes
        if not buffer.ended:
            self.reset(stream_id, codes.INTERNAL_ERROR)
        elif not request_complete:
            self.reset(stream_id, codes.NO_ERROR)  # the answer is good, and the rest not wanted

    def reset(self, stream_id: int, code: h2.errors.ErrorCodes) -> None:
        with suppress(h2.exceptions.ProtocolError):  # it has been by now, or all is over
            self.connection.reset_stream(stream_id, code)
        self.collect()

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers[stream_id]
        if not self._send_some(stream_id, buffer) or buffer.ended:
            self.priority.block(stream_id)
        buffer.tell()
        await self._flush()

    def _send_some(self, stream_id: int, buffer: AnswerBuffer) -> int:
        """Send a frame, if there is anything to be sent now; returns how much data it has."""
        try:
            window = self.connection.local_flow_control_window(stream_id)
            data = buffer.take(max(0, min(window, self.connection.max_outbound_frame_size)))
            ends = buffer.complete
            if data or ends:
                self.connection.send_data(stream_id, data, end_stream=ends)
                self.earned += _EARNED_BY_DATA
        except h2.exceptions.ProtocolError:  # it ended before we came to it
            buffer.drop()
            return 0
        buffer.ended = ends
        return len(data)

    # What goes out.

    def collect(self) -> None:
        """Take over what h2 has to say; the order is kept, whoever is cancelled meanwhile."""
        data = self.connection.data_to_send()
        if data:
            self.outbound += data
            self._filled.set()

    async def _flush(self) -> None:
        self.collect()
        while len(self.outbound) > _ROOM and not self.closed:
            await self._written.wait()

    async def take(self) -> bytes:
        """The next bytes to be written, at most 64 KiB; none at the end."""
        while not self.outbound and not self.closed:
            self._filled = trio.Event()
            await self._filled.wait()
        data = bytes(self.outbound[:_ROOM])
        del self.outbound[:_ROOM]
        self._written.set()
        self._written = trio.Event()
        return data

    def announce_end(self) -> None:
        """Ask for no new streams; those that come all the same are served (RFC 9113, 6.8)."""
        self.outbound += GoAwayFrame(0, last_stream_id=_LAST_STREAM).serialize()
        self._filled.set()

    def say_goodbye(self, code: h2.errors.ErrorCodes = h2.errors.ErrorCodes.NO_ERROR) -> None:
        with suppress(h2.exceptions.ProtocolError):
            self.connection.close_connection(code)
        self.collect()

    async def close(self) -> None:
        """Nothing more will be said; what waits is still written.  Does not wait."""
        self.closed = True
        self._filled.set()
        self._written.set()
        await self.has_data.set()
