"""One client connection: HTTP/1.1 requests in, an ASGI application's answers out.

One task serves a connection for its whole life: it reads a request, runs the application, writes
the answer.  While the application runs nobody reads, so what the client sends then is its next
request and waits in the kernel, where it costs nothing and is never mixed up; that the client
has left is noticed by :mod:`.departures`.

One cancel scope serves a connection, too.  It is cancelled at most once, and whatever the reason
(the client has left, time is up, the server drains), the connection ends.

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
from citadel_gateway.io.deadlines import Deadline, Deadlines
from citadel_gateway.io.departures import MOST_AHEAD, Departures, ReadAhead, socket_of
from citadel_gateway.io.http1_exchange import App, Exchange, Fate, Message, http_date
from citadel_gateway.io.lingering import linger
from citadel_gateway.io.record import CLIENT_CLOSED_REQUEST
from citadel_gateway.io.tcp_stream import TcpStream
from citadel_gateway.wire.http1_request import RequestParser
from citadel_gateway.wire.http1_response import encode_response_head
from citadel_gateway.wire.http1_rules import BadRequest
from citadel_gateway.wire.incoming_request import IncomingRequest

_READ = 64 * 1024
_WRITE = 64 * 1024  # how much a client must take within `write_timeout`
_MOST_READS_AHEAD = 64  # at once: others want a turn


def ignore(*_: object) -> None:
    """Nobody wants to know."""


class Awaited(enum.Enum):
    """What the client owes us; each has a clock of its own."""

    NOTHING = enum.auto()
    REQUEST = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


# That a kept connection is not used again, is nothing to count.
_CLOCKS = {Awaited.HEAD: "client_header", Awaited.BODY: "client_body"}


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
    :param on_timeout: told which clock the client has let run out: ``client_header``,
        ``client_body`` or ``client_write``.
    """

    app: App
    stream: trio.abc.Stream
    limits: ConnectionLimits
    deadlines: Deadlines
    departures: Departures
    on_crash: Callable[[Exception], None]
    client: tuple[str, int] | None = None
    server: tuple[str, int] | None = None
    scheme: str = "http"
    state: Message = attrs.field(factory=dict)
    on_unserved: Callable[[int, str], None] = ignore
    on_timeout: Callable[[str], None] = ignore
    served: int = attrs.field(default=0, init=False)
    _parser: RequestParser = attrs.field(factory=RequestParser, init=False)
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _deadline: Deadline = attrs.field(init=False)
    _plain: TcpStream | None = attrs.field(default=None, init=False)  # not through TLS
    _exchange: Exchange | None = attrs.field(default=None, init=False)
    _refusal: BadRequest | None = attrs.field(default=None, init=False)
    _awaited: Awaited | None = attrs.field(default=None, init=False)
    _ahead: bytes = attrs.field(default=b"", init=False)
    _is_deaf: bool = attrs.field(default=False, init=False)  # too much came ahead, and was dropped
    _blocked: float = attrs.field(default=0.0, init=False)  # seconds that the client let us wait
    _taken: int = attrs.field(default=0, init=False)  # bytes that it has taken meanwhile
    _left: bool = attrs.field(default=False, init=False)
    _torn: bool = attrs.field(default=False, init=False)  # a write is not, or never, complete
    _draining: bool = attrs.field(default=False, init=False)
    _promises: bool = attrs.field(default=True, init=False)

    def __attrs_post_init__(self) -> None:
        self._plain = self.stream if isinstance(self.stream, TcpStream) else None
        self._deadline = self.deadlines.add(self._time_is_up)

    async def run(self) -> None:
        """Serve until either side closes.  Application errors are reported, not raised."""
        try:
            sock = socket_of(self.stream)
            if sock is not None:
                with self.departures.watching(sock, self):
                    await self._serve()
            else:
                self.stream = ahead = ReadAhead(self.stream, self)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ahead.read_ahead)
                    await self._serve()
                    nursery.cancel_scope.cancel()
        finally:
            self.deadlines.discard(self._deadline)
            await trio.aclose_forcefully(self.stream)

    def promise_nothing(self) -> None:
        """Tell the client with the next answer that it is the last one here."""
        self._promises = False

    def drain(self) -> None:
        """Answer what has been asked, promise nothing more, and close.

        What has arrived counts as asked, also if nobody has come to read it yet.
        """
        self._draining, self._promises = True, False
        if self.is_idle and not self._has_unread():
            self._scope.cancel(reason="the server drains")

    @property
    def is_idle(self) -> bool:
        return self._exchange is None and not self._parser.in_head

    def _has_unread(self) -> bool:
        stream = self.stream
        if isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream
        return isinstance(stream, TcpStream) and stream.has_unread()

    @property
    def _gone(self) -> bool:
        """Nothing can be said to the client any more."""
        return self._left or self._torn

    # The client leaves, or is too slow.

    def pass_on_leave(self) -> None:
        self._left = True
        if self._exchange is not None:
            self._exchange.pass_on_leave()

    def leave(self) -> None:
        self._left = True
        if self._exchange is not None:  # else we are reading, and come to the end ourselves
            self.give_up()

    def _time_is_up(self) -> None:
        if self._awaited in _CLOCKS:
            self.on_timeout(_CLOCKS[self._awaited])
        if self._parser.in_head or self._parser.in_body:
            self._reject(BadRequest(408, "the request did not arrive in time"))
        self._scope.cancel(reason="the client is too slow")

    def read_ahead(self) -> None:
        """Take what waits while the application runs, or its end would never be seen.

        It belongs to the next request.  If it is more than anybody has reason to send ahead, the
        connection ends with this answer.
        """
        if self._plain is None or self._exchange is None or not self._exchange.request.complete:
            return
        for _ in range(_MOST_READS_AHEAD):
            if not (data := self._plain.receive_now()):
                return
            if len(self._ahead) < MOST_AHEAD:
                self._ahead += data
            else:
                self._is_deaf, self._promises = True, False

    def _set_clock(self, awaited: Awaited) -> None:
        """Only a change of what is awaited starts a clock: bytes alone never put it back."""
        if awaited is self._awaited:
            return
        self._awaited = awaited
        limits = self.limits
        match awaited:
            case Awaited.NOTHING:
                self._deadline.due = math.inf
                return
            case Awaited.REQUEST:
                within = limits.keep_alive_timeout
            case Awaited.HEAD:
                within = limits.header_timeout
            case Awaited.BODY:
                within = limits.body_timeout
        self.deadlines.move(self._deadline, trio.current_time() + within)

    # Serving.

    async def _serve(self) -> None:
        fate = Fate.KEEP
        with self._scope:
            while fate is Fate.KEEP and (request := await self._next_request()) is not None:
                fate = await self._run(request)
        if self._scope.cancelled_caught and self._exchange is not None:
            fate = self._exchange.fate
            if fate is Fate.SKIP:
                fate = Fate.CLOSE  # it has its answer, whatever became of the rest
        await self._say_goodbye(fate)

    async def _run(self, request: IncomingRequest) -> Fate:
        self.served += 1
        self._set_clock(Awaited.NOTHING if request.complete else Awaited.BODY)
        exchange = self._exchange = Exchange(self, request)
        fate = await exchange.run()
        if fate is Fate.SKIP:
            fate = await self._skip_body(request)
        self._exchange = None
        return fate

    async def _skip_body(self, request: IncomingRequest) -> Fate:
        """Read what is left of a body without keeping it; its answer has been sent."""
        self._set_clock(Awaited.BODY)
        while not request.complete:
            request.take_body()
            if self._refusal is not None or not await self._read():
                return Fate.CLOSE
        request.take_body()
        return Fate.KEEP

    async def _next_request(self) -> IncomingRequest | None:
        """The next request whose turn it is; ``None`` when there will be none."""
        pending = self._parser.requests
        while not pending:
            if self._refusal is not None or (self._draining and not self._parser.in_head):
                return None
            waits_for_head = self._parser.in_head or not self.served
            self._set_clock(Awaited.HEAD if waits_for_head else Awaited.REQUEST)
            if not await self._read():
                return None
        if self._left or (self._refusal is not None and not pending[0].complete):
            return None
        if self.served and self._awaited is Awaited.NOTHING:
            await trio.lowlevel.checkpoint()  # it was pipelined: others may want a turn as well
        return pending.popleft()

    async def _say_goodbye(self, fate: Fate) -> None:
        """After the last answer: refuse what was no request, and let the client read it all."""
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

    async def _refuse(self, refusal: BadRequest) -> None:
        headers, body = bad_http_request(str(refusal), status=refusal.status).response()
        headers.append((b"date", http_date()))
        with suppress(trio.BrokenResourceError):
            head = encode_response_head(refusal.status, headers)
            await self.write(head if refusal.to_head else head + body)

    async def _linger(self) -> None:
        """Let the client read our last answer before the connection goes."""
        if isinstance(self.stream, ReadAhead):
            await linger(self.stream.stream, self.stream)
        else:
            await linger(self.stream)

    # Reading.

    async def _read(self) -> bool:
        """Feed the parser with what comes next; false when nothing more will."""
        data, self._ahead = self._ahead, b""
        if not data:
            try:
                data = bytes(await self.stream.receive_some(_READ))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
        if not data or self._is_deaf:
            self._left = True
            return False
        try:
            self._parser.feed(data)
        except BadRequest as exc:
            self._reject(exc)
        return True

    def _reject(self, refusal: BadRequest) -> None:
        self._refusal = refusal
        if self._exchange is not None:
            self._exchange.fail_body(refusal)

    # For the exchange.

    async def read_more(self) -> None:
        """Wait for more of the request's body.

        The exchange is cancelled when the client leaves instead, or sends what is no body.
        """
        exchange = self._exchange
        is_alive = await self._read()
        if exchange is not None and exchange.request.complete:
            self._set_clock(Awaited.NOTHING)
            return  # whatever came behind it
        if is_alive and self._refusal is None:
            return
        if self._left and self._exchange is not None:
            self._exchange.pass_on_leave()
        self.give_up()
        await trio.lowlevel.checkpoint()

    def want_no_more(self) -> None:
        """The answer begins, and nobody waits for the rest of the request any more."""
        self._set_clock(Awaited.NOTHING)

    def give_up(self) -> None:
        self._scope.cancel(reason="the client has left")

    async def write(self, data: bytes) -> None:
        """Raises ``trio.BrokenResourceError`` when the client is gone or takes nothing."""
        sent = self.write_now(data)
        if sent < len(data):
            await self._write_rest(data, sent)

    @property
    def takes_at_once(self) -> bool:
        """Whether :meth:`write_now` may do anything at all."""
        return self._plain is not None

    def write_now(self, data: bytes) -> int:
        """How much of *data* was taken without waiting; raises as :meth:`write`."""
        if self._left or self._torn:
            raise trio.BrokenResourceError("the client is gone")
        if self._plain is None:
            return 0
        try:
            sent = self._plain.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise trio.BrokenResourceError(str(exc)) from exc
        self._taken += sent
        return sent

    async def _write_rest(self, data: bytes, sent: int) -> None:
        if not sent:
            await trio.lowlevel.checkpoint_if_cancelled()  # later, it would leave a part written
        self._torn = True
        for start in range(sent, len(data), _WRITE):
            await self._send_patiently(data[start : start + _WRITE])
        self._torn = False

    async def _send_patiently(self, data: bytes) -> None:
        """The client may let us wait for `write_timeout` in all until it has taken 64 KiB."""
        if self._taken >= _WRITE:
            self._blocked, self._taken = 0.0, 0
        began = trio.current_time()
        with trio.move_on_after(self.limits.write_timeout - self._blocked) as patience:
            await self.stream.send_all(data)
        if patience.cancelled_caught:
            self.on_timeout("client_write")
            raise trio.BrokenResourceError("the client does not read")
        self._blocked += trio.current_time() - began
        self._taken += len(data)

    def may_keep_alive(self) -> bool:
        pending = self._parser.requests
        return (
            self._promises
            and not self._gone
            and self.served < self.limits.max_requests
            and (self._refusal is None or bool(pending and pending[0].complete))
        )
