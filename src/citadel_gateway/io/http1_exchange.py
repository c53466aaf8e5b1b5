"""One request and its answer, as an ASGI application sees them."""

from __future__ import annotations

import enum
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any, Protocol, TypeAlias
from urllib.parse import unquote

import attrs
import trio

from citadel_gateway.errors import internal_error
from citadel_gateway.wire.headers import Headers
from citadel_gateway.wire.http1_response import encode_chunk, encode_response_head
from citadel_gateway.wire.http1_rules import BadRequest
from citadel_gateway.wire.incoming_request import IncomingRequest

Message: TypeAlias = dict[str, Any]
App: TypeAlias = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]

EXCHANGE = "citadel.exchange"
"""ASGI extension: the :class:`Exchange` itself.

An application that knows it answers through it, and is cancelled when the client leaves.
"""

BODILESS = frozenset({204, 304})
_CLOSES = (b"connection", b"close")
_LARGE = 2**20


class ResponseAborted(Exception):
    """Raised by an application to cut its answer: the body ends without its proper end."""


class Fate(enum.Enum):
    """What becomes of a connection after an exchange."""

    KEEP = "keep"
    SKIP = "skip"  # keep it, once the rest of a small body has come that nobody wants
    CLOSE = "close"
    UNANSWERED = "unanswered"  # the request turned out to be no request: say so, then close


class Client(Protocol):
    """What an exchange needs of its connection."""

    app: App
    on_crash: Callable[[Exception], None]
    client: tuple[str, int] | None
    server: tuple[str, int] | None
    scheme: str
    state: Message

    @property
    def takes_at_once(self) -> bool: ...

    def write_now(self, data: bytes) -> int: ...

    async def write(self, data: bytes) -> None: ...

    async def read_more(self) -> None: ...

    def want_no_more(self) -> None: ...

    def give_up(self) -> None: ...

    def may_keep_alive(self) -> bool: ...


@attrs.define(eq=False)
class Exchange:
    """One request and its answer.

    ASGI's :meth:`receive` and :meth:`send` are for any application; :meth:`answer`, :meth:`begin`
    and :meth:`write` do the same for one that knows this class, at less cost.  The connection
    cancels the application when the client leaves.

    :param on_leave: called in the instant in which the client leaves: cancelling many tasks takes
        a while.
    :param refusal: why the rest of the request is none, if the application was cancelled for that;
        the connection answers it then.
    """

    connection: Client
    request: IncomingRequest
    on_leave: Callable[[], None] | None = attrs.field(default=None, init=False)
    refusal: BadRequest | None = attrs.field(default=None, init=False)
    _continued: bool = attrs.field(default=False, init=False)
    _continuing: trio.Event | None = attrs.field(default=None, init=False)
    _body_read: bool = attrs.field(default=False, init=False)
    _announced: Message | None = attrs.field(default=None, init=False)
    _started: bool = attrs.field(default=False, init=False)
    _chunked: bool = attrs.field(default=False, init=False)
    _bodiless: bool = attrs.field(default=False, init=False)
    _keep: bool = attrs.field(default=False, init=False)
    _finished: bool = attrs.field(default=False, init=False)

    async def run(self) -> Fate:
        """Run the application; returns what becomes of the connection."""
        try:
            await self.connection.app(self._make_scope(), self.receive, self.send)
            if not self._finished and self.refusal is None:
                raise RuntimeError("the application returned without a complete answer")
        except ResponseAborted:
            return Fate.CLOSE
        except Exception as exc:  # the boundary: one request, not the server
            self.connection.on_crash(exc)
            if not self._started and self.refusal is None:
                await self._answer_500()
            return Fate.CLOSE
        return self.fate

    @property
    def fate(self) -> Fate:
        """What becomes of the connection now that the application has ended, or was cancelled."""
        if self.refusal is not None and not self._started:
            return Fate.UNANSWERED
        if not (self._finished and self._keep):
            return Fate.CLOSE
        return Fate.KEEP if self.request.complete else Fate.SKIP

    def pass_on_leave(self) -> None:
        """Tell the application's own peer, in this very moment, that nobody listens any more."""
        if self.on_leave is not None:
            self.on_leave()

    def fail_body(self, refusal: BadRequest) -> None:
        """The rest of the body will not come, and the application must not wait for it."""
        if not self.request.complete and not self._finished:
            self.refusal = refusal

    def take_body(self) -> bytes:
        """The whole body of a request that is complete, instead of :meth:`receive`."""
        self._body_read = True
        return self.request.take_body()

    async def receive(self) -> Message:
        request = self.request
        if self._body_read:
            await trio.sleep_forever()  # until the client leaves, which cancels us
        await self._continue()
        while not request.buffered and not request.complete:
            await self.connection.read_more()
        data = request.take_body()
        self._body_read = request.complete
        return {"type": "http.request", "body": data, "more_body": not request.complete}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._announced = message
        elif message["type"] == "http.response.body" and not self._finished:
            body, last = message.get("body", b""), not message.get("more_body")
            if self._started:
                await self.write(body, last=last)
            else:
                await self._begin_announced(body, last=last)

    async def _begin_announced(self, body: bytes, *, last: bool) -> None:
        """The framing, and what depends on the connection, are ours: drop what is said of them."""
        if self._announced is None:
            raise RuntimeError("the application sent a body before its status")
        headers, sized, keep = [], False, True
        for name, value in self._announced.get("headers", ()):
            match name.lower():
                case b"connection":
                    keep = value.lower() != b"close"
                case b"transfer-encoding":
                    pass
                case lowered:
                    sized = sized or lowered == b"content-length"
                    headers.append((lowered, value))
        status = self._announced["status"]
        if last and not sized and status not in BODILESS:
            headers.append((b"content-length", b"%d" % len(body)))
            sized = True
        await self._start(status, headers, body, sized=sized, keep=keep, last=last)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole answer.

        :param headers: in lower case, without any about framing or the connection.
        """
        headers.append((b"content-length", b"%d" % len(body)))
        await self._start(status, headers, body, sized=True, keep=True, last=True)

    async def begin(self, status: int, headers: Headers, data: bytes) -> None:
        """An answer's head and the first piece of its body; *headers* as for :meth:`answer`."""
        await self._start(status, headers, data, sized=False, keep=True, last=False)

    async def write(self, data: bytes, *, last: bool = False) -> None:
        """More of the body, and its end if it is the *last*."""
        if self._chunked:
            if data:
                data = encode_chunk(data)
            if last:
                data += b"0\r\n\r\n"
        elif self._bodiless:
            data = b""
        if last:
            self._finished = True
        if data:
            await self._write(data)

    @property
    def takes_at_once(self) -> bool:
        """Whether :meth:`write_now` may do anything at all."""
        return self.connection.takes_at_once

    def write_now(self, data: bytes) -> bytes:
        """More of the body, at least a byte, as far as it can be sent without waiting.

        Returns what is left, for :meth:`write_rest`; nothing else may be written before.
        """
        if self._chunked:
            data = encode_chunk(data)
        elif self._bodiless:
            return b""
        try:
            sent = self.connection.write_now(data)
        except trio.BrokenResourceError:
            return data  # it is raised again by whoever may wait
        return b"" if sent == len(data) else data[sent:]

    async def write_rest(self, rest: bytes) -> None:
        await self._write(rest)

    async def _start(
        self, status: int, headers: Headers, body: bytes, *, sized: bool, keep: bool, last: bool
    ) -> None:
        if self._continuing is not None:
            await self._continuing.wait()  # applications may read in one task and answer in another
        request = self.request
        if not request.complete:
            self.connection.want_no_more()
        self._bodiless = request.method == "HEAD" or status in BODILESS
        self._chunked = False
        if sized or status in BODILESS:
            pass
        elif request.version == "1.1":
            headers.append((b"transfer-encoding", b"chunked"))
            self._chunked = not self._bodiless
        else:
            keep = False  # HTTP/1.0: the end of the connection is the end of the body
        self._keep = (
            keep
            and request.keep_alive
            and (request.complete or (request.ends_soon and _CLOSES not in headers))
            and self.connection.may_keep_alive()
        )
        headers.append((b"date", http_date()))
        if not self._keep:
            headers.append(_CLOSES)
        elif request.version == "1.0":
            headers.append((b"connection", b"keep-alive"))
        head = encode_response_head(status, headers)
        self._started, self._finished = True, last
        if self._bodiless:
            body = b""
        elif self._chunked and body:
            body = encode_chunk(body)
        if len(body) > _LARGE:
            await self._write(head)  # a copy of it all would cost more than another write
            await self._write(body)
        else:
            await self._write(head + body)

    async def _write(self, data: bytes) -> None:
        try:
            await self.connection.write(data)
        except trio.BrokenResourceError:
            self.connection.give_up()  # the same as being told that it has left
            await trio.lowlevel.checkpoint()

    async def _continue(self) -> None:
        """Ask for the body, if the client waits to be asked: only now does anybody want it."""
        request = self.request
        if (
            request.expects_continue
            and request.version == "1.1"
            and not (self._continued or self._started or request.complete)
        ):
            self._continued = True
            self._continuing = trio.Event()
            try:
                await self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
            finally:
                self._continuing.set()

    async def _answer_500(self) -> None:
        error = internal_error()
        body = error.body()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        await self._start(error.status, headers, body, sized=True, keep=False, last=True)

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
            "headers": request.fields.headers,
            "client": connection.client,
            "server": connection.server,
            "state": connection.state,
            "extensions": {EXCHANGE: self},
        }


_date: tuple[int, bytes] = (0, b"")


def http_date() -> bytes:
    """The Date header's value, made once a second."""
    global _date  # a cache of one

    now = int(time.time())
    if _date[0] != now:
        _date = (now, formatdate(now, usegmt=True).encode("ascii"))
    return _date[1]
