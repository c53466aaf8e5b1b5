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
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, TypeAlias
from urllib.parse import unquote

import attrs
import trio

from citadel_gateway.errors import error_body
from citadel_gateway.wire.headers import Headers
from citadel_gateway.wire.http1_request import BadRequest, IncomingRequest, RequestParser
from citadel_gateway.wire.http1_response import encode_response_head

Message: TypeAlias = dict[str, Any]
App: TypeAlias = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]

CANCELS = "citadel.cancels"
"""ASGI extension: the server cancels the application itself when the client leaves.

It is a dictionary.  An application may put a function under ``on_leave``, to be called in the
instant in which the client leaves: cancelling many tasks takes a while.  When the server cancels
because the request turned out to be broken, and answers it itself, ``refusal`` is the
:class:`BadRequest` that says how.
"""

_READ = 64 * 1024
_WRITE = 64 * 1024  # how much a client must take within `write_timeout`
_MOST_BUFFERED = 256 * 1024  # of a body that the application does not read, or not yet
_MOST_PIPELINED = 16
_LINGER_BYTES = 32 * 2**20
_LINGER_SECONDS = 2.0


class ResponseAborted(Exception):
    """Raised by an application to cut its answer: the body ends without its proper end."""


class Awaited(enum.Enum):
    """What the client owes us; each has a clock of its own."""

    NOTHING = enum.auto()
    REQUEST = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class Fate(enum.Enum):
    """What becomes of a connection after an exchange."""

    KEEP = "keep"
    CLOSE = "close"
    UNANSWERED = "unanswered"  # the request turned out to be no request: say so, then close


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
    """

    app: App
    stream: trio.abc.Stream
    limits: ConnectionLimits
    on_crash: Callable[[Exception], None]
    client: tuple[str, int] | None = None
    server: tuple[str, int] | None = None
    scheme: str = "http"
    state: Message = attrs.field(factory=dict)
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
            await self._refuse(self._refusal)
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
        body = error_body(str(refusal), "invalid_request_error", "bad_http_request")
        headers: Headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"date", http_date()),
            (b"connection", b"close"),
        ]
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
                    await self._exchange.wait_for_room()

    def _take_in(self, data: bytes) -> None:
        if self._lingering:
            self._lingering += len(data)
        elif not self._is_deaf:
            try:
                self._parser.feed(data)
            except BadRequest as exc:
                self._reject(exc)
            pending = self._parser.requests
            if len(pending) > _MOST_PIPELINED or sum(r.buffered for r in pending) > _MOST_BUFFERED:
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


@attrs.define(eq=False)
class Exchange:
    """One request and its answer, as the application sees them."""

    connection: HttpConnection
    request: IncomingRequest
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _room: trio.Event | None = attrs.field(default=None, init=False)
    _continued: bool = attrs.field(default=False, init=False)
    _body_read: bool = attrs.field(default=False, init=False)
    _body_failed: bool = attrs.field(default=False, init=False)
    _news: dict[str, Any] = attrs.field(factory=dict, init=False)
    _status: int = attrs.field(default=0, init=False)
    _headers: Headers = attrs.field(factory=list, init=False)
    _started: bool = attrs.field(default=False, init=False)
    _chunked: bool = attrs.field(default=False, init=False)
    _bodiless: bool = attrs.field(default=False, init=False)
    _keep: bool = attrs.field(default=False, init=False)
    _finished: bool = attrs.field(default=False, init=False)
    _over: bool = attrs.field(default=False, init=False)

    async def run(self) -> Fate:
        """Run the application; returns what becomes of the connection."""
        try:
            with self._scope:
                await self.connection.app(self._make_scope(), self.receive, self.send)
                if not self._finished and not self._scope.cancel_called:
                    raise RuntimeError("the application returned without a complete answer")
        except ResponseAborted:
            return Fate.CLOSE
        except Exception as exc:  # the boundary: one request, not the server
            self.connection.on_crash(exc)
            if not self._started and not self._body_failed:
                await self._answer_500()
            return Fate.CLOSE
        finally:
            self._over = True
            self._make_room()
        if self._body_failed and not self._started:
            return Fate.UNANSWERED
        kept = self._finished and self._keep and self.request.complete
        return Fate.KEEP if kept else Fate.CLOSE

    def cancel(self) -> None:
        """The client has left: stop working for it."""
        self._scope.cancel()

    def pass_on_leave(self) -> None:
        """Tell the application's own peer, in this very moment, that nobody listens any more."""
        if (on_leave := self._news.get("on_leave")) is not None:
            on_leave()

    def fail_body(self, refusal: BadRequest) -> None:
        """The rest of the body will not come, and the application must not wait for it."""
        if not self.request.complete and not self._finished:
            self._body_failed = True
            self._news["refusal"] = refusal
            self._scope.cancel()

    async def wait_for_room(self) -> None:
        """Hold the reader while the application has much of the body still to read."""
        while self.request.buffered > _MOST_BUFFERED and not (self._finished or self._over):
            self._room = trio.Event()
            await self._room.wait()

    async def receive(self) -> Message:
        request = self.request
        if self._body_read:
            await trio.sleep_forever()  # until the client leaves, which cancels us
        await self._continue()
        while not request.buffered and not request.complete:
            await self.connection.wait_for_bytes()
        data = request.take_body()
        self._make_room()
        self._body_read = request.complete
        return {"type": "http.request", "body": data, "more_body": not request.complete}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status, self._headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body" and not self._finished:
            await self._send_body(message.get("body", b""), last=not message.get("more_body"))

    async def _send_body(self, body: bytes, *, last: bool) -> None:
        data = b"" if self._started else self._make_head(body, last=last)
        if not self._bodiless:
            if not self._chunked:
                data += body
            elif body:
                data += b"%x\r\n%s\r\n" % (len(body), body)
            if self._chunked and last:
                data += b"0\r\n\r\n"
        self._started = True
        if last:
            self._finished = True
            self._make_room()
        if data:
            await self._write(data)

    async def _write(self, data: bytes) -> None:
        try:
            await self.connection.write(data)
        except trio.BrokenResourceError:
            self._scope.cancel()  # the same as being told by the reader
            await trio.lowlevel.checkpoint()

    def _make_head(self, body: bytes, *, last: bool) -> bytes:
        """The head, with the framing and the fate of the connection decided."""
        request, status = self.request, self._status
        if not status:
            raise RuntimeError("the application sent a body before its status")
        headers: Headers = []
        sized, keep = status in {204, 304}, True
        for name, value in self._headers:
            match name.lower():
                case b"connection":
                    keep = value.lower() != b"close"
                case b"transfer-encoding":
                    pass  # the framing is ours
                case lowered:
                    sized = sized or lowered == b"content-length"
                    headers.append((lowered, value))
        self._bodiless = request.method == "HEAD" or status in {204, 304}
        self._chunked = False
        if not sized and last:
            headers.append((b"content-length", b"%d" % len(body)))
        elif not sized and request.version == "1.1":
            headers.append((b"transfer-encoding", b"chunked"))
            self._chunked = not self._bodiless
        elif not sized:
            keep = False  # HTTP/1.0: the end of the connection is the end of the body
        self._keep = (
            keep and request.keep_alive and request.complete and self.connection.may_keep_alive()
        )
        headers.append((b"date", http_date()))
        if not self._keep:
            headers.append((b"connection", b"close"))
        elif request.version == "1.0":
            headers.append((b"connection", b"keep-alive"))
        return encode_response_head(status, headers)

    async def _continue(self) -> None:
        """Ask for the body, if the client waits to be asked: only now does anybody want it."""
        request = self.request
        if (
            request.expects_continue
            and request.version == "1.1"
            and not (self._continued or self._started or request.complete)
        ):
            self._continued = True
            await self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def _answer_500(self) -> None:
        status = HTTPStatus.INTERNAL_SERVER_ERROR
        self._status = status.value
        self._headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        body = error_body(
            "The gateway failed while handling the request.", "server_error", "internal_error"
        )
        with trio.CancelScope() as self._scope:  # the first one has been used up
            await self._send_body(body, last=True)

    def _make_room(self) -> None:
        if self._room is not None:
            self._room.set()
            self._room = None

    def _make_scope(self) -> Message:
        request, connection = self.request, self.connection
        path, _, query = request.target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.version,
            "method": request.method,
            "scheme": connection.scheme,
            "path": unquote(path.decode("ascii")) if b"%" in path else path.decode("ascii"),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": request.headers,
            "client": connection.client,
            "server": connection.server,
            "state": connection.state,
            "extensions": {CANCELS: self._news},
        }


_date: tuple[int, bytes] = (0, b"")


def http_date() -> bytes:
    """The Date header's value, made once a second."""
    global _date  # a cache of one

    now = int(time.time())
    if _date[0] != now:
        _date = (now, formatdate(now, usegmt=True).encode("ascii"))
    return _date[1]
