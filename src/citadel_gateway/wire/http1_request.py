"""HTTP/1.1 requests from bytes, strictly.

llhttp does the parsing; what it tolerates and a gateway must not is refused by :mod:`.http1_rules`
and here.  No I/O: bytes in, requests out.
"""

from __future__ import annotations

from collections import deque

import attrs
import httptools

from citadel_gateway.wire.familiar_head import FamiliarHead
from citadel_gateway.wire.headers import Fields, Headers
from citadel_gateway.wire.http1_rules import (
    VERSIONS,
    BadRequest,
    check_fields,
    check_line,
    says_close,
)
from citadel_gateway.wire.incoming_request import IncomingRequest

MAX_TARGET = 8 * 1024
MAX_HEADER_BYTES = 16 * 1024
MAX_HEADERS = 100
_MAX_PENDING = MAX_TARGET + MAX_HEADER_BYTES + 256  # a whole head with its request line
_MAX_EXTENSIONS = 1024  # bytes around the chunks of one body that are none of its data
_FRAME = 12  # bytes that a chunk may have around it at no charge: its size and line ends
_SLICE = 256  # what is fed at once where such bytes must be told from data


@attrs.define(eq=False)
class RequestParser:
    """Turns the bytes of one connection into requests, in order.

    A request appears in :attr:`requests` when its head is complete; its body follows.
    """

    requests: deque[IncomingRequest] = attrs.field(factory=deque, init=False)
    _parser: httptools.HttpRequestParser = attrs.field(init=False)
    _current: IncomingRequest | None = attrs.field(default=None, init=False)
    _error: BadRequest | None = attrs.field(default=None, init=False)
    _target: bytes = attrs.field(default=b"", init=False)
    _headers: Headers = attrs.field(factory=list, init=False)
    _header_bytes: int = attrs.field(default=0, init=False)
    _pending: int = attrs.field(default=0, init=False)  # fed since the last sign of progress
    _raw: bytes = attrs.field(default=b"", init=False)  # what is fed, or a head so far
    _line_at: int = attrs.field(default=0, init=False)  # where in it a request line is due
    _head_size: int = attrs.field(default=0, init=False)  # of the head at its very beginning
    _behind_chunks: bool = attrs.field(default=False, init=False)
    _chunked: bool = attrs.field(default=False, init=False)  # the body that is being read
    _excess: int = attrs.field(default=0, init=False)  # bytes of it that are not data
    _in_head: bool = attrs.field(default=False, init=False)
    _replaying: bool = attrs.field(default=False, init=False)
    _upgrade: bool = attrs.field(default=False, init=False)
    _familiar: FamiliarHead | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)

    @property
    def in_head(self) -> bool:
        """Whether a head has begun and is not complete."""
        return self._in_head

    @property
    def in_body(self) -> bool:
        return self._current is not None

    def feed(self, data: bytes) -> None:
        """Raises :class:`BadRequest`; the parser is of no use afterwards."""
        if self._familiar is not None and self._current is None and not self._in_head:
            if (request := self._familiar.repeated(data)) is not None:
                self.requests.append(request)
                return
            self._familiar = None
        try:
            if self._chunked or (self._current is None and b"chunked" in data.lower()):
                for start in range(0, len(data), _SLICE):
                    self._feed_slice(data[start : start + _SLICE])
            else:
                self._feed(data)
        except BadRequest as refusal:
            refusal.to_head = self._in_head and self._parser.get_method() == b"HEAD"
            raise

    def _feed_slice(self, data: bytes) -> None:
        was_chunked = self._chunked
        self._feed(data)
        if not (was_chunked and self._chunked):
            self._excess = 0
            return
        self._excess += len(data)
        if self._excess > _MAX_EXTENSIONS:
            raise BadRequest(400, f"the chunk extensions are longer than {_MAX_EXTENSIONS} bytes")

    def _feed(self, data: bytes) -> None:
        self._pending += len(data)
        self._raw += data
        while data:
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._ignore_upgrade()
            except httptools.HttpParserError as exc:
                raise self._error or _explain(exc) from None
        if not self._in_head:
            if self._head_size and self._line_at == len(self._raw):
                self._familiar = FamiliarHead.of(self.requests[-1], self._raw[: self._head_size])
            self._line_at = max(0, self._line_at - len(self._raw))
            self._raw, self._head_size = b"", 0
        # A header or trailer that never ends is accumulated inside the parser: count what goes in.
        if self._pending > _MAX_PENDING and self._in_head:
            raise BadRequest(431, "the request head is too large")
        if self._pending > _MAX_PENDING:
            raise BadRequest(400, "too many bytes that are neither a head nor a body")

    # What llhttp calls.

    def on_message_begin(self) -> None:
        if not self._replaying:
            self._target, self._headers, self._header_bytes = b"", [], 0
            self._in_head, self._pending = True, 0

    def on_url(self, url: bytes) -> None:
        if self._replaying:
            return
        self._target += url
        if len(self._target) > MAX_TARGET:
            self._refuse(414, f"the request target is longer than {MAX_TARGET} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: ignored, never merged
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > MAX_HEADER_BYTES or len(self._headers) >= MAX_HEADERS:
            self._refuse(
                431, f"more than {MAX_HEADERS} headers, or more than {MAX_HEADER_BYTES} bytes"
            )
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._replaying:
            return
        parser, fields = self._parser, Fields(self._headers)
        method, version = parser.get_method(), parser.get_http_version()
        try:
            line = check_line(method, self._target, version)
            if not self._is_line(line):
                raise BadRequest(400, "the request line is not 'METHOD /target HTTP/1.1'")
            content_length, chunked = check_fields(fields, version)
        except BadRequest as exc:
            self._error = exc
            raise
        self._upgrade = parser.should_upgrade()
        if self._upgrade and fields.get(b"upgrade", b"").lower() == b"websocket":
            self._refuse(400, "WebSocket is not served here")
        self._in_head, self._pending, self._chunked = False, 0, chunked
        head_ends = self._raw.find(b"\r\n\r\n", self._line_at) + 4
        self._head_size = 0 if self._line_at else head_ends
        self._line_at = head_ends + (content_length or 0)
        self._behind_chunks = chunked
        self._current = IncomingRequest(
            method=method.decode("ascii"),
            target=self._target,
            version=version,
            fields=fields,
            keep_alive=parser.should_keep_alive() and not says_close(fields),
            has_body=chunked or bool(content_length),
            content_length=content_length,
        )
        self.requests.append(self._current)

    def on_chunk_header(self) -> None:
        self._excess -= _FRAME

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        self._excess -= len(body)
        if self._current is not None:
            self._current.add(body)

    def on_message_complete(self) -> None:
        if self._current is None or (self._upgrade and self._current.has_body):
            return  # see _ignore_upgrade: the body is still to come
        self._current.complete = True
        self._current, self._chunked = None, False

    # What llhttp leaves to us.

    def _is_line(self, line: bytes) -> bool:
        """Whether *line* stands where it is due: llhttp takes more spaces, and RTSP."""
        at = _skip_empty_lines(self._raw, self._line_at)
        # Where a body of chunks ends is not told, so a line behind one is looked for.
        return self._raw.startswith(line, at) or (self._behind_chunks and line in self._raw)

    def _refuse(self, status: int, message: str) -> None:
        self._error = BadRequest(status, message)
        raise self._error

    def _ignore_upgrade(self) -> None:
        """Go on in plain HTTP/1.1 after a client offered another protocol (say, h2c).

        llhttp stops there and takes the body for the other protocol's.  A fresh parser is told
        the framing by a made-up head, and reads the body into the request that we have.
        """
        self._parser = httptools.HttpRequestParser(self)
        request, self._upgrade = self._current, False
        if request is not None and request.has_body:
            framing = (
                b"Transfer-Encoding: chunked"
                if request.content_length is None
                else b"Content-Length: %d" % request.content_length
            )
            self._replaying = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")
            self._replaying = False


def _explain(exc: httptools.HttpParserError) -> BadRequest:
    message = str(exc)
    if "Invalid HTTP version" in message or "PRI" in message:
        return BadRequest(505, VERSIONS)
    if "Transfer-Encoding" in message and "Content-Length" not in message:
        return BadRequest(501, "the only Transfer-Encoding understood is 'chunked'")
    return BadRequest(400, f"not a valid HTTP request: {message}")


def _skip_empty_lines(data: bytes, at: int) -> int:
    while data[at : at + 1] in {b"\r", b"\n"}:
        at += 1
    return at
