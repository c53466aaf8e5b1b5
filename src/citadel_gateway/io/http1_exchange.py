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
from citadel_gateway.wire.http1_request import BadRequest, IncomingRequest
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


class ResponseAborted(Exception):
    """Raised by an application to cut its answer: the body ends without its proper end."""


class Fate(enum.Enum):
    """What becomes of a connection after an exchange."""

    KEEP = "keep"
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

    async def write(self, data: bytes) -> None: ...

    async def read_more(self) -> None: ...

    def want_no_more(self) -> None: ...

    def give_up(self) -> None: ...

    def may_keep_alive(self) -> bool: ...


@attrs.define(eq=False)
class Exchange:
    """One request and its answer, as the application sees them.

    The connection cancels the application when the client leaves.
    """

    connection: Client
    request: IncomingRequest
    _continued: bool = attrs.field(default=False, init=False)
    _continuing: trio.Event | None = attrs.field(default=None, init=False)
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

    async def run(self) -> Fate:
        """Run the application; returns what becomes of the connection."""
        try:
            await self.connection.app(self._make_scope(), self.receive, self.send)
            if not self._finished and not self._body_failed:
                raise RuntimeError("the application returned without a complete answer")
        except ResponseAborted:
            return Fate.CLOSE
        except Exception as exc:  # the boundary: one request, not the server
            self.connection.on_crash(exc)
            if not self._started and not self._body_failed:
                await self._answer_500()
            return Fate.CLOSE
        return self.fate

    @property
    def fate(self) -> Fate:
        """What becomes of the connection now that the application has ended, or was cancelled."""
        if self._body_failed and not self._started:
            return Fate.UNANSWERED
        kept = self._finished and self._keep and self.request.complete
        return Fate.KEEP if kept else Fate.CLOSE

    def pass_on_leave(self) -> None:
        """Tell the application's own peer, in this very moment, that nobody listens any more."""
        if (on_leave := self._news.get("on_leave")) is not None:
            on_leave()

    def fail_body(self, refusal: BadRequest) -> None:
        """The rest of the body will not come, and the application must not wait for it."""
        if not self.request.complete and not self._finished:
            self._body_failed = True
            self._news["refusal"] = refusal

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
            self._status, self._headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body" and not self._finished:
            await self._send_body(message.get("body", b""), last=not message.get("more_body"))

    async def _send_body(self, body: bytes, *, last: bool) -> None:
        if self._continuing is not None:
            await self._continuing.wait()  # applications may read in one task and answer in another
        data = b"" if self._started else self._make_head(body, last=last)
        if not self._started and not self.request.complete:
            self.connection.want_no_more()
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
        if data:
            await self._write(data)

    async def _write(self, data: bytes) -> None:
        try:
            await self.connection.write(data)
        except trio.BrokenResourceError:
            self.connection.give_up()  # the same as being told that it has left
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
            self._continuing = trio.Event()
            try:
                await self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
            finally:
                self._continuing.set()

    async def _answer_500(self) -> None:
        error = internal_error()
        self._status = error.status
        self._headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await self._send_body(error.body(), last=True)

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
