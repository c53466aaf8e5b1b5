"""One stream of an HTTP/2 connection: a request and its answer, as on HTTP/1.1."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import attrs
import trio
from hypercorn.protocol.events import Body, EndBody, InformationalResponse, Response

from citadel_gateway.errors import bad_http_request
from citadel_gateway.io.deadlines import Deadline, Deadlines
from citadel_gateway.io.http1_exchange import BODILESS, App, Exchange, Fate, Message
from citadel_gateway.io.http2_protocol import Http2Protocol
from citadel_gateway.wire.headers import Headers
from citadel_gateway.wire.http1_rules import BadRequest
from citadel_gateway.wire.incoming_request import IncomingRequest


@attrs.define(eq=False)
class Http2Exchange(Exchange):
    """An exchange whose answer goes out in frames."""

    stream: Http2Stream

    def take_body(self) -> bytes:
        data = super().take_body()
        self.stream.acknowledge(len(data))
        return data

    async def receive(self) -> Message:
        message = await super().receive()
        self.stream.acknowledge(len(message["body"]))
        return message

    async def write(self, data: bytes, *, last: bool = False) -> None:
        self._finished = last
        await self.stream.send_body(b"" if self._bodiless else data, last=last)

    async def write_rest(self, rest: bytes) -> None:
        await self.stream.send_body(rest, last=False)

    async def _start(  # frames tell where a body ends, and that a connection is kept
        self,
        status: int,
        headers: Headers,
        body: bytes,
        *,
        sized: bool,  # noqa: ARG002
        keep: bool,  # noqa: ARG002
        last: bool,
    ) -> None:
        request = self.request
        if not request.complete:
            self.stream.want_no_more()
        self._bodiless = request.method == "HEAD" or status in BODILESS
        self._started = True
        await self.stream.send_head(status, headers)
        await self.write(body, last=last)

    async def _continue(self) -> None:
        request = self.request
        if request.expects_continue and not (self._continued or self._started or request.complete):
            self._continued = True
            await self.stream.ask_for_body()


@attrs.define(eq=False, kw_only=True)
class Http2Stream:
    """Serves one request in a task of its own; whoever reads the connection tells it what comes.

    :param body_timeout: seconds within which the body must have arrived.
    """

    app: App
    protocol: Http2Protocol
    id: int
    request: IncomingRequest
    deadlines: Deadlines
    body_timeout: float
    on_crash: Callable[[Exception], None]
    client: tuple[str, int] | None
    server: tuple[str, int] | None
    scheme: str
    state: Message
    exchange: Http2Exchange = attrs.field(init=False)
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _news: trio.Event = attrs.field(factory=trio.Event, init=False)
    _deadline: Deadline = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.exchange = Http2Exchange(self, self.request, self)
        self._deadline = self.deadlines.add(self._body_is_late)
        if not self.request.complete:
            self.deadlines.move(self._deadline, trio.current_time() + self.body_timeout)

    async def serve(self) -> None:
        """Answer the request; application errors are reported, not raised."""
        exchange = self.exchange
        try:
            with self._scope:
                fate = await exchange.run()
            if self._scope.cancelled_caught:
                fate = exchange.fate
            if fate is Fate.UNANSWERED and exchange.refusal is not None:
                await refuse(self.protocol, self.id, exchange.refusal)
        finally:
            self.deadlines.discard(self._deadline)
            self.acknowledge(self.request.buffered)

    # What comes from the client.

    def add_body(self, data: bytes) -> None:
        if data:
            self.request.add(data)
            self._tell()

    def end_body(self) -> None:
        self.request.complete = True
        self._deadline.due = math.inf
        self._tell()

    def pass_on_leave(self) -> None:
        self.exchange.pass_on_leave()

    def _body_is_late(self) -> None:
        self.exchange.fail_body(BadRequest(408, "the request did not arrive in time"))
        self.give_up()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    # For the exchange, which takes us for its connection.

    @property
    def takes_at_once(self) -> bool:
        return False

    def write_now(self, data: bytes) -> int:  # noqa: ARG002  # it has to wait its turn
        return 0

    async def write(self, data: bytes) -> None:
        await self.send_body(data, last=False)

    async def read_more(self) -> None:
        await self._news.wait()

    def want_no_more(self) -> None:
        self._deadline.due = math.inf

    def give_up(self) -> None:
        self._scope.cancel(reason="the client has left, or does not read")

    def may_keep_alive(self) -> bool:
        return True

    def acknowledge(self, size: int) -> None:
        self.protocol.acknowledge(self.id, size)

    async def ask_for_body(self) -> None:
        await self.protocol.stream_send(InformationalResponse(self.id, [], 100))

    async def send_head(self, status: int, headers: Headers) -> None:
        """Of *headers*, h2 leaves out what concerns a connection of HTTP/1.1."""
        await self.protocol.stream_send(Response(self.id, headers, status))

    async def send_body(self, data: bytes, *, last: bool) -> None:
        try:
            if data:
                await self.protocol.stream_send(Body(self.id, data))
            if last:
                await self.protocol.stream_send(EndBody(self.id))
        except trio.BrokenResourceError:
            self.give_up()  # the same as being told that it has left
            await trio.lowlevel.checkpoint()


async def refuse(protocol: Http2Protocol, stream_id: int, refusal: BadRequest) -> None:
    """Answer what is no request that we take."""
    headers, body = bad_http_request(str(refusal), status=refusal.status).response()
    with suppress(trio.BrokenResourceError):
        await protocol.stream_send(Response(stream_id, headers, refusal.status))
        if not refusal.to_head:
            await protocol.stream_send(Body(stream_id, body))
        await protocol.stream_send(EndBody(stream_id))
