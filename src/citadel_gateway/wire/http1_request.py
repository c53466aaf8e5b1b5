"""HTTP/1.1 requests from bytes, strictly.

llhttp does the parsing; what it tolerates and a gateway must not (RFC 9112 sections 3, 6 and 11,
request smuggling) is refused here.  No I/O: bytes in, requests out.
"""

from __future__ import annotations

import re
from collections import deque

import attrs
import httptools

from citadel_gateway.wire.headers import Headers, first, values

MAX_TARGET = 8 * 1024
MAX_HEADER_BYTES = 16 * 1024
MAX_HEADERS = 100
_MAX_PENDING = MAX_TARGET + MAX_HEADER_BYTES + 256  # a whole head with its request line

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]+)(:\d{1,5})?\Z")
_TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*\Z")  # origin-form, visible ASCII, no fragment
_LENGTH = re.compile(rb"(0|[1-9]\d{0,15})\Z")


_VERSIONS = "only HTTP/1.0 and HTTP/1.1 are spoken here"


class BadRequest(Exception):
    """Bytes that are not a request we accept; the connection must be closed.

    :param status: what to answer before closing.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@attrs.define(eq=False)
class IncomingRequest:
    """One request as it arrives: the head at once, the body piece by piece."""

    method: str
    target: bytes
    version: str
    headers: Headers
    keep_alive: bool
    has_body: bool
    content_length: int | None
    complete: bool = False
    buffered: int = 0
    _body: list[bytes] = attrs.field(factory=list, init=False)

    @property
    def expects_continue(self) -> bool:
        return self.has_body and first(self.headers, b"expect") is not None

    def take_body(self) -> bytes:
        """Everything of the body that has arrived since the last call."""
        match self._body:
            case []:
                return b""
            case [only]:
                data = only
            case pieces:
                data = b"".join(pieces)
        self._body.clear()
        self.buffered = 0
        return data

    def add(self, data: bytes) -> None:
        self._body.append(data)
        self.buffered += len(data)


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
    _in_head: bool = attrs.field(default=False, init=False)
    _replaying: bool = attrs.field(default=False, init=False)
    _upgrade: bool = attrs.field(default=False, init=False)

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
        self._pending += len(data)
        while data:
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._ignore_upgrade()
            except httptools.HttpParserError as exc:
                raise self._error or _explain(exc) from None
        if self._pending > _MAX_PENDING:
            # A header, trailer or chunk extension that never ends.  The parser accumulates those
            # inside, or skips them, so what went in is counted.
            if self._in_head:
                raise BadRequest(431, "the request head is too large")
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
        self._in_head, self._pending = False, 0
        method = self._parser.get_method().decode("ascii")
        version = self._parser.get_http_version()
        if version not in {"1.0", "1.1"}:
            self._refuse(505, _VERSIONS)
        self._check_target(method)
        content_length, chunked = self._check_framing(version)
        self._check_host(version)
        expect = first(self._headers, b"expect")
        if expect is not None and expect.lower() != b"100-continue":
            self._refuse(417, "only 'Expect: 100-continue' is understood")
        self._upgrade = self._parser.should_upgrade()
        if self._upgrade and (first(self._headers, b"upgrade") or b"").lower() == b"websocket":
            self._refuse(400, "WebSocket is not served here")
        self._current = IncomingRequest(
            method=method,
            target=self._target,
            version=version,
            headers=self._headers,
            keep_alive=self._parser.should_keep_alive(),
            has_body=chunked or bool(content_length),
            content_length=content_length,
        )
        self.requests.append(self._current)

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        if self._current is not None:
            self._current.add(body)

    def on_message_complete(self) -> None:
        if self._current is None or (self._upgrade and self._current.has_body):
            return  # see _ignore_upgrade: the body is still to come
        self._current.complete = True
        self._current = None

    # What llhttp leaves to us.

    def _check_target(self, method: str) -> None:
        if method in {"CONNECT", "TRACE"}:
            self._refuse(405, f"{method} is not allowed")
        if not _TARGET.match(self._target):
            self._refuse(400, "the request target is not a path")

    def _check_framing(self, version: str) -> tuple[int | None, bool]:
        encodings = values(self._headers, b"transfer-encoding")
        if encodings:
            if version == "1.0":
                self._refuse(400, "Transfer-Encoding does not exist in HTTP/1.0")
            if len(encodings) > 1 or encodings[0].lower() != b"chunked":
                self._refuse(501, "the only Transfer-Encoding understood is 'chunked'")
            return None, True
        length = first(self._headers, b"content-length")
        if length is None:
            return None, False
        if not _LENGTH.match(length):
            self._refuse(400, "Content-Length is not a plain number")
        return int(length), False

    def _check_host(self, version: str) -> None:
        hosts = values(self._headers, b"host")
        if not hosts and version == "1.0":
            return
        if len(hosts) != 1 or not _HOST.match(hosts[0]):
            self._refuse(400, "there must be one valid Host header")
        port = hosts[0].rpartition(b"]")[2].partition(b":")[2]
        if port and int(port) > 65535:
            self._refuse(400, "the port in the Host header is out of range")

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
        return BadRequest(505, _VERSIONS)
    if "Transfer-Encoding" in message and "Content-Length" not in message:
        return BadRequest(501, "the only Transfer-Encoding understood is 'chunked'")
    return BadRequest(400, f"not a valid HTTP request: {message}")
