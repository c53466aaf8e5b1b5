"""One client connection that speaks HTTP/2: many requests at once, each in a task of its own.

The frames are Hypercorn's (:mod:`.http2_protocol`); the clocks and the limits are those of an
HTTP/1.1 connection, with a few more for what a client can do with frames alone.  One task reads
and one writes.  The writer outlives a cancellation, so that streams which are cut can say so, and
ends within a moment.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import attrs
import h2.errors
import h2.exceptions
import trio
from hypercorn.config import Config
from hypercorn.events import Event as ConnectionEvent

from citadel_gateway.io.deadlines import Deadline, Deadlines
from citadel_gateway.io.departures import Departures, socket_of
from citadel_gateway.io.http1_exchange import App, Message
from citadel_gateway.io.http1_server import ConnectionLimits, ignore
from citadel_gateway.io.http2_protocol import LARGEST_BLOCK, Http2Protocol, Pairs
from citadel_gateway.io.http2_stream import Http2Stream, refuse
from citadel_gateway.io.lingering import linger
from citadel_gateway.io.tcp_stream import TcpStream
from citadel_gateway.policy.rate_limit import TokenBucket
from citadel_gateway.wire.http1_rules import BadRequest
from citadel_gateway.wire.http2_frames import LARGEST_FRAME, FrameCounter
from citadel_gateway.wire.http2_request import read_request

_READ = 64 * 1024
_LAST_WORDS = 1.0  # seconds for what waits to be written when the connection ends
_RESETS = 50.0, 200.0  # a second, and at once: streams that a client opens and gives up
_IDLE = 100.0, 1000.0  # the same for frames that carry nothing
_MOST_EARNED = 1000.0  # idle frames that are answers to data of ours


class _Awaited(enum.Enum):
    """What the client owes us; each has a clock of its own."""

    NOTHING = enum.auto()
    FIRST_REQUEST = enum.auto()
    REQUEST = enum.auto()
    HEAD = enum.auto()


@attrs.define(eq=False, kw_only=True)
class Http2Connection:
    """A client's connection.

    :param stream: any Trio stream on which both sides have agreed on HTTP/2; closed when
        :meth:`run` returns.
    :param config: Hypercorn's; of it, headers that all answers carry.
    :param on_crash: told of exceptions that the application let escape.
    :param on_unserved: told of what the application never saw: status, and why.
    """

    app: App
    stream: trio.abc.Stream
    limits: ConnectionLimits
    config: Config
    deadlines: Deadlines
    departures: Departures
    on_crash: Callable[[Exception], None]
    client: tuple[str, int] | None = None
    server: tuple[str, int] | None = None
    scheme: str = "https"
    state: Message = attrs.field(factory=dict)
    on_unserved: Callable[[int, str], None] = ignore
    served: int = attrs.field(default=0, init=False)
    _protocol: Http2Protocol = attrs.field(init=False)
    _streams: dict[int, Http2Stream] = attrs.field(factory=dict, init=False)
    _machinery: trio.Nursery = attrs.field(init=False)
    _serving: trio.Nursery = attrs.field(init=False)
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _writing: trio.CancelScope = attrs.field(init=False)
    _deadline: Deadline = attrs.field(init=False)
    _awaited: _Awaited | None = attrs.field(default=None, init=False)
    _frames: FrameCounter = attrs.field(factory=FrameCounter, init=False)
    _resets: TokenBucket = attrs.field(factory=lambda: TokenBucket(*_RESETS), init=False)
    _idle: TokenBucket = attrs.field(factory=lambda: TokenBucket(*_IDLE), init=False)
    _left: bool = attrs.field(default=False, init=False)
    _failed: bool = attrs.field(default=False, init=False)
    _promises: bool = attrs.field(default=True, init=False)
    _told: bool = attrs.field(default=False, init=False)  # the client, that we drain
    _refusing: bool = attrs.field(default=False, init=False)
    _running: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._protocol = Http2Protocol(self, self.config, self.limits.write_timeout)
        self._writing = trio.CancelScope(shield=True)
        self._deadline = self.deadlines.add(self._time_is_up)

    async def run(self) -> None:
        """Serve until either side closes.  Application errors are reported, not raised."""
        sock = socket_of(self.stream)
        try:
            with self.departures.watching(sock, self) if sock is not None else nullcontext():
                await self._run()
        finally:
            self.deadlines.discard(self._deadline)
            await trio.aclose_forcefully(self.stream)

    async def _run(self) -> None:
        async with trio.open_nursery() as self._machinery:
            self._machinery.start_soon(self._write)
            await self._protocol.start()
            self._running = True
            try:
                with self._scope:
                    async with trio.open_nursery() as self._serving:
                        await self._read()
                        self._scope.cancel(reason="nothing more is to come")
            finally:
                await self._finish()
        if not self._left:
            await linger(self.stream)

    async def _finish(self) -> None:
        """Say what is still to be said, within a moment."""
        if not self._failed:
            self._protocol.say_goodbye()
        await self._protocol.close()
        if self._left:
            self._writing.cancel(reason="nobody reads it")
        self._writing.deadline = trio.current_time() + _LAST_WORDS

    # For the server.

    @property
    def is_idle(self) -> bool:
        return not self._protocol.stream_buffers and not self._frames.in_head

    def promise_nothing(self) -> None:
        """End as soon as all is answered that has been asked.

        Nothing is said before: some clients (httpx) take that for the end of what is running.
        """
        self._promises = False
        self._end_if_idle()

    def drain(self) -> None:
        """Ask the client to open no more streams, and end when those that it has are answered.

        What it had opened before it was told is served; with the next call, that time is up.
        """
        first, self._promises = not self._told, False
        self._told = True
        if first and self._running and (not self.is_idle or self._has_unread()):
            self._protocol.announce_end()
        else:
            self._refusing = True
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self.is_idle and (self._refusing or (self.served and not self._promises)):
            self._scope.cancel(reason="the server drains")

    def _has_unread(self) -> bool:
        stream = self.stream
        if isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream
        return isinstance(stream, TcpStream) and stream.has_unread()

    # The client leaves, or is too slow.

    def pass_on_leave(self) -> None:
        self._left = True
        for stream in self._streams.values():
            stream.pass_on_leave()

    def leave(self) -> None:
        self._left = True
        self._scope.cancel(reason="the client has left")

    def read_ahead(self) -> None:
        """There is always somebody who reads."""

    def _time_is_up(self) -> None:
        self._scope.cancel(reason="the client is too slow")

    def _set_clock(self) -> None:
        """Only a change of what is awaited starts a clock: bytes alone never put it back."""
        limits = self.limits
        if self._frames.in_head:
            awaited, within = _Awaited.HEAD, limits.header_timeout
        elif self._protocol.stream_buffers:
            awaited, within = _Awaited.NOTHING, math.inf
        elif self.served:
            awaited, within = _Awaited.REQUEST, limits.keep_alive_timeout
        else:
            awaited, within = _Awaited.FIRST_REQUEST, limits.header_timeout
        if awaited is not self._awaited:
            self._awaited = awaited
            self.deadlines.move(self._deadline, trio.current_time() + within)

    # Reading and writing.

    async def _read(self) -> None:
        protocol = self._protocol
        self._set_clock()
        while not protocol.closed:
            try:
                data = bytes(await self.stream.receive_some(_READ))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                self.pass_on_leave()
                self.leave()
                return
            if (why := self._find_flood(data)) is not None:
                self._fail(why)
                return
            try:
                await protocol.receive(data)
            except h2.exceptions.ProtocolError as exc:
                self._failed = True  # the client has been told why
                self.on_unserved(400, f"not valid HTTP/2: {exc}")
                return
            self._set_clock()
            self._end_if_idle()

    def _find_flood(self, data: bytes) -> str | None:
        """What is wrong with the frames in *data*, if they are too many for what they carry."""
        frames, now = self._frames, trio.current_time()
        tally = frames.feed(data)
        if frames.longest > LARGEST_FRAME:
            return f"a frame of more than {LARGEST_FRAME} bytes"
        if frames.block > LARGEST_BLOCK:
            return f"a header block of more than {LARGEST_BLOCK} bytes"
        if not self._take(self._resets, tally.resets, now):
            return "too many streams that are opened and reset"
        protocol = self._protocol
        earned = min(tally.idle, protocol.earned)
        protocol.earned = min(protocol.earned - earned, int(_MOST_EARNED))
        if not self._take(self._idle, tally.idle - earned, now):
            return "too many frames that carry nothing"
        return None

    @staticmethod
    def _take(bucket: TokenBucket, cost: int, now: float) -> bool:
        if cost:
            if bucket.wait(now, cost) > 0:
                return False
            bucket.spend(now, cost)
        return True

    def _fail(self, why: str) -> None:
        self._failed = True
        self._protocol.say_goodbye(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
        self.on_unserved(400, f"HTTP/2: {why}")
        self._scope.cancel(reason=why)

    async def _write(self) -> None:
        """Write what there is.  A client must take 64 KiB within `write_timeout`."""
        with self._writing:
            while data := await self._protocol.take():
                with trio.move_on_after(self.limits.write_timeout) as patience:
                    try:
                        await self.stream.send_all(data)
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        break
                if patience.cancelled_caught:
                    break
            else:
                return
        self.pass_on_leave()
        self.leave()
        await self._protocol.close()

    # For the protocol.

    def spawn(self, func: Any, *args: Any) -> None:
        self._machinery.start_soon(self._shielded, func, *args)

    async def _shielded(self, func: Any, *args: Any) -> None:
        with trio.CancelScope(shield=True):  # until the protocol is closed
            await func(*args)

    async def on_event(self, event: ConnectionEvent) -> None:
        """What Hypercorn says of the connection as a whole, we find out ourselves."""

    def begin(self, stream_id: int, pairs: Pairs, *, complete: bool) -> None:
        if self._refusing:
            self._protocol.reset(stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
            return
        self.served += 1
        if self.served >= self.limits.max_requests:
            self._promises = False
        self._protocol.open(stream_id)
        try:
            request = read_request(pairs, complete=complete)
        except BadRequest as refusal:
            self.on_unserved(refusal.status, str(refusal))
            self._serving.start_soon(self._refuse, stream_id, refusal, complete)
            return
        stream = Http2Stream(
            app=self.app,
            protocol=self._protocol,
            id=stream_id,
            request=request,
            deadlines=self.deadlines,
            body_timeout=self.limits.body_timeout,
            on_crash=self.on_crash,
            client=self.client,
            server=self.server,
            scheme=self.scheme,
            state=self.state,
        )
        self._streams[stream_id] = stream
        self._serving.start_soon(self._serve, stream)

    async def _serve(self, stream: Http2Stream) -> None:
        try:
            await stream.serve()
        finally:
            del self._streams[stream.id]
            self._end(stream.id, request_complete=stream.request.complete)

    async def _refuse(self, stream_id: int, refusal: BadRequest, complete: bool) -> None:
        try:
            await refuse(self._protocol, stream_id, refusal)
        finally:
            self._end(stream_id, request_complete=complete)

    def _end(self, stream_id: int, *, request_complete: bool) -> None:
        self._protocol.end(stream_id, request_complete=request_complete)
        self._set_clock()
        self._end_if_idle()

    def refuse_more(self) -> None:
        self._refusing = True

    def add_body(self, stream_id: int, data: bytes) -> None:
        if (stream := self._streams.get(stream_id)) is not None:
            stream.add_body(data)
        else:
            self._protocol.acknowledge(stream_id, len(data))

    def end_body(self, stream_id: int) -> None:
        if (stream := self._streams.get(stream_id)) is not None:
            stream.end_body()

    def reset(self, stream_id: int, *, by_client: bool) -> None:
        """The stream is over; if it is our doing, the client has provoked it (CVE-2025-8671)."""
        if (stream := self._streams.get(stream_id)) is not None:
            stream.pass_on_leave()
            stream.give_up()
        if not by_client and not self._take(self._resets, 1, trio.current_time()):
            self._fail("too many streams that had to be reset")
