"""One client connection: HTTP/1.1 requests in, an ASGI application's answers out.

Two tasks share a connection for its whole life.  One reads: it feeds the parser, and because it
never stops reading it sees at once that a client has left, and cancels the request.  The other
runs the application for one request after the other.  What the reader reads while a request is
running belongs to the next request, never to nobody.

A half-closed connection counts as closed: a client that sends FIN is not going to read a stream.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from contextlib import suppress

import attrs
import trio

from citadel_gateway.errors import bad_http_request
from citadel_gateway.io.http1_exchange import (
    MOST_BUFFERED,
    App,
    Exchange,
    Fate,
    Message,
    http_date,
)
from citadel_gateway.io.record import CLIENT_CLOSED_REQUEST
from citadel_gateway.wire.http1_request import BadRequest, IncomingRequest, RequestParser
from citadel_gateway.wire.http1_response import encode_response_head

_READ = 64 * 1024
_WRITE = 64 * 1024  # how much a client must take within `write_timeout`
_MOST_PIPELINED = 16
_LINGER_BYTES = 32 * 2**20
_LINGER_SECONDS = 2.0


def ignore(*_: object) -> None:
    """Nobody wants to know."""


class Awaited(enum.Enum):
    """What the client owes us; each has a clock of its own."""

    NOTHING = enum.auto()
    REQUEST = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


@attrs.frozen(kw_only=True)
class ConnectionLimits:
    """Deadlines in seconds, and how many requests one connection may carry."""

    header_timeout: float = 5.0
    body_timeout: float = 60.0
    keep_alive_timeout: float = 75.0
    write_timeout: float = 30.0
    max_requests: int = 1000


@attrs.define(eq=False)
class HttpConnection:
    """A client's connection.

    :param stream: any Trio stream; closed when :meth:`run` returns.
    :param on_crash: told of exceptions that the application let escape.
    :param on_unserved: told of what the application never saw: status (499: the client left
        before its turn), and why.
    """

    app: App
    stream: trio.abc.Stream
    limits: ConnectionLimits
    on_crash: Callable[[Exception], None]
    client: tuple[str, int] | None = None
    server: tuple[str, int] | None = None
    scheme: str = "http"
    state: Message = attrs.field(factory=dict)
    on_unserved: Callable[[int, str], None] = ignore
    served: int = attrs.field(default=0, init=False)
    _parser: RequestParser = attrs.field(factory=RequestParser, init=False)
    _wake: trio.Event = attrs.field(factory=trio.Event, init=False)
    _clock: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _exchange: Exchange | None = attrs.field(default=None, init=False)
    _refusal: BadRequest | None = attrs.field(default=None, init=False)
    _awaited: Awaited | None = attrs.field(default=None, init=False)
    _left: bool = attrs.field(default=False, init=False)
    _torn: bool = attrs.field(default=False, init=False)  # a write is not, or never, complete
    _draining: bool = attrs.field(default=False, init=False)
    _promises: bool = attrs.field(default=True, init=False)
    _overrun: bool = attrs.field(default=False, init=False)  # more was pipelined than we keep
    _lingering: int = attrs.field(default=0, init=False)

    async def run(self) -> None:
        """Serve until either side closes.  Application errors are reported, not raised."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_loop)
                await self._serve_loop()
                nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(self.stream)

    def promise_nothing(self) -> None:
        """Tell the client with the next answer that it is the last one here."""
        self._promises = False

    def drain(self) -> None:
        """Answer what has been asked, promise nothing more, and close."""
        self._draining, self._promises = True, False
        self._notify()

    @property
    def _gone(self) -> bool:
        """Nothing can be said to the client any more."""
        return self._left or self._torn

    @property
    def is_idle(self) -> bool:
        return self._exchange is None and not self._parser.in_head

    # The serving task.

    async def _serve_loop(self) -> None:
        fate = Fate.KEEP
        while fate is Fate.KEEP and (request := await self._next_request()) is not None:
            self.served += 1
            exchange = self._exchange = Exchange(self, request)
            try:
                fate = await exchange.run()
            finally:
                self._exchange = None
            self._set_clock()
        if self._refusal is not None and fate is not Fate.CLOSE and not self._gone:
            if fate is not Fate.UNANSWERED:  # else the application has been told
                self.on_unserved(self._refusal.status, str(self._refusal))
            await self._refuse(self._refusal)
        for request in self._parser.requests:
            if self._left and request.complete:
                self.on_unserved(
                    CLIENT_CLOSED_REQUEST, "the client left before its request had its turn"
                )
        if not self._gone:
            await self._linger()

    async def _next_request(self) -> IncomingRequest | None:
        pending = self._parser.requests
        while not self._gone:
            if pending and (pending[0].complete or not self._is_deaf):
                request = pending.popleft()
                self._set_clock(request)
                return request
            if self._is_deaf or (self._draining and not self._parser.in_head):
                return None
            await self._wait()
        return None

    @property
    def _is_deaf(self) -> bool:
        """What arrives from now on is thrown away: no more of a request can become complete."""
        return self._overrun or self._refusal is not None

    async def _refuse(self, refusal: BadRequest) -> None:
        headers, body = bad_http_request(str(refusal), status=refusal.status).response()
        headers.append((b"date", http_date()))
        with suppress(trio.BrokenResourceError):
            await self.write(encode_response_head(refusal.status, headers) + body)

    async def _linger(self) -> None:
        """Let the client read our last answer before the connection goes.

        Closing a socket with unread bytes in it sends a reset, which may destroy what is on its
        way to the client.  So say that we are done, and read on for a moment.
        """
        self._lingering = 1
        stream = self.stream
        if isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream  # TLS itself cannot be closed by halves
        with trio.move_on_after(_LINGER_SECONDS):
            if isinstance(stream, trio.abc.HalfCloseableStream):
                try:
                    await stream.send_eof()
                except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                    return
                while not self._gone and self._lingering < _LINGER_BYTES:
                    await self._wait()

    async def _wait(self) -> None:
        await self._wake.wait()
        self._wake = trio.Event()

    def _notify(self) -> None:
        self._wake.set()

    # The reading task.

    async def _read_loop(self) -> None:
        self._set_clock()
        with self._clock:
            await self._read_until_the_end()
        if self._clock.cancelled_caught and (self._parser.in_head or self._parser.in_body):
            self._reject(BadRequest(408, "the request did not arrive in time"))
            self._notify()
            await self._read_until_the_end()
        self._left = True
        if self._exchange is not None:
            self._exchange.pass_on_leave()
            # Clients often leave together.  Cleaning up after one takes longer than passing on
            # that ten have left, so let the other readers have their turn first.
            await trio.lowlevel.checkpoint()
        if self._exchange is not None:
            self._exchange.cancel()
        self._notify()

    async def _read_until_the_end(self) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await self.stream.receive_some(_READ):
                self._take_in(bytes(data))
                if self._exchange is not None:
                    await self._exchange.wait_for_room(next_waits=bool(self._parser.requests))

    def _take_in(self, data: bytes) -> None:
        if self._lingering:
            self._lingering += len(data)
        elif not self._is_deaf:
            try:
                self._parser.feed(data)
            except BadRequest as exc:
                self._reject(exc)
            pending = self._parser.requests
            if len(pending) > _MOST_PIPELINED or sum(r.buffered for r in pending) > MOST_BUFFERED:
                # Answer what is complete, then close; go on reading, to see the client leave.
                self._overrun = True
            self._set_clock()
        self._notify()

    def _reject(self, refusal: BadRequest) -> None:
        self._refusal = refusal
        if self._exchange is not None:
            self._exchange.fail_body(refusal)

    def _set_clock(self, request: IncomingRequest | None = None) -> None:
        """Start the clock of what is awaited now; *request* is just being taken up.

        Only a change of what is awaited starts a clock: bytes alone never put it back.
        """
        limits = self.limits
        current = request or (self._exchange.request if self._exchange is not None else None)
        if current is not None and not current.complete:
            awaited, within = Awaited.BODY, limits.body_timeout
        elif current is not None or self._parser.requests:
            awaited, within = Awaited.NOTHING, math.inf
        elif self._parser.in_head or not self.served:
            awaited, within = Awaited.HEAD, limits.header_timeout
        else:
            awaited, within = Awaited.REQUEST, limits.keep_alive_timeout
        if awaited is not self._awaited:
            self._awaited = awaited
            self._clock.deadline = trio.current_time() + within

    # For the exchange.

    async def write(self, data: bytes) -> None:
        """Raises ``trio.BrokenResourceError`` when the client is gone or takes nothing."""
        if self._gone:
            raise trio.BrokenResourceError("the client is gone")
        await trio.lowlevel.checkpoint_if_cancelled()  # from here on, it would leave a part written
        self._torn = True
        for start in range(0, len(data), _WRITE):
            with trio.move_on_after(self.limits.write_timeout) as patience:
                await self.stream.send_all(data[start : start + _WRITE])
            if patience.cancelled_caught:
                raise trio.BrokenResourceError("the client does not read")
        self._torn = False

    async def wait_for_bytes(self) -> None:
        await self._wait()

    def may_keep_alive(self) -> bool:
        pending = self._parser.requests
        return (
            self._promises
            and not self._gone
            and self.served < self.limits.max_requests
            and (not self._is_deaf or bool(pending and pending[0].complete))
        )
