"""HTTP/1.1 responses: an upstream's from bytes, ours to bytes.  No I/O."""

from __future__ import annotations

import re
from http import HTTPStatus

import attrs
import httptools

from citadel_gateway.wire.headers import Headers, first, values

MAX_HEAD = 64 * 1024
MAX_INFORMATIONAL = 8
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,7})\r\n")

_STATUS_LINES = {
    status.value: b"HTTP/1.1 %d %s\r\n" % (status.value, status.phrase.encode())
    for status in HTTPStatus
}


class BadResponse(Exception):
    """The upstream broke the protocol; its connection must be closed."""


class CutShort(BadResponse):
    """The upstream closed the connection before its response was complete.

    :param started: whether any byte of the response had arrived.
    """

    def __init__(self, message: str, *, started: bool) -> None:
        super().__init__(message)
        self.started = started


@attrs.define(eq=False)
class ResponseParser:
    """One response after the other, each from its first byte to the end of its body."""

    status: int = attrs.field(default=0, init=False)
    headers: Headers = attrs.field(factory=list, init=False)
    started: bool = attrs.field(default=False, init=False)
    head_complete: bool = attrs.field(default=False, init=False)
    complete: bool = attrs.field(default=False, init=False)
    reusable: bool = attrs.field(default=False, init=False)  # what the head promises
    surplus: bool = attrs.field(default=False, init=False)  # bytes came behind the response
    http_version: str = attrs.field(default="1.1", init=False)
    _bodiless: bool = attrs.field(default=False, init=False)
    _parser: httptools.HttpResponseParser = attrs.field(init=False)
    _error: BadResponse | None = attrs.field(default=None, init=False)
    _body: list[bytes] = attrs.field(factory=list, init=False)
    _head_bytes: int = attrs.field(default=0, init=False)
    _pending: int = attrs.field(default=0, init=False)  # fed since the last bit of body
    _informational: int = attrs.field(default=0, init=False)
    _until_close: bool = attrs.field(default=False, init=False)
    _chunk_ended: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)

    def begin(self, *, bodiless: bool = False) -> None:
        """Expect the next response.  The last one, if any, must have been complete and clean.

        :param bodiless: the request was a HEAD, so there is no body whatever the head says.
        """
        self.headers = []
        self.started = self.head_complete = self.complete = self.surplus = False
        self._bodiless = bodiless
        self._head_bytes = self._pending = self._informational = 0

    def feed(self, data: bytes) -> None:
        """Raises :class:`BadResponse`."""
        if self.complete:
            self.surplus = True
            return
        self.started = True
        self._pending += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if self._is_complete():
                self.surplus = True  # what follows the response is not our business, nor parsed
                return
            raise self._error or BadResponse(f"not a valid HTTP response: {exc}") from None
        self._chunk_ended = self._chunk_ended and data.endswith(b"\r\n")
        if self._pending > MAX_HEAD and not self._is_complete():
            # An endless header or trailer is accumulated inside the parser: count what went in.
            where = "trailer" if self.head_complete else "head"
            raise BadResponse(f"the response {where} is larger than {MAX_HEAD} bytes")

    def whole_chunk(self, data: bytes) -> bytes:
        """The content of *data* if it is one whole chunk, as nearly all reads of a stream are.

        It must not be fed then: the parser stands between two chunks, before and after.
        """
        if self._chunk_ended and (size := _CHUNK_SIZE.match(data)) is not None:
            start = size.end()
            if len(data) == start + int(size[1], 16) + 2 and data.endswith(b"\r\n"):
                return data[start:-2]
        return b""

    def feed_eof(self) -> None:
        """The upstream closed the connection; that ends a body without framing."""
        if self._until_close and self.head_complete:
            self.complete = True
        if not self.complete:
            where = "its body" if self.head_complete else "its head"
            what = f"in the middle of {where}" if self.started else "without an answer"
            raise CutShort(f"the upstream closed the connection {what}", started=self.started)

    def take_body(self) -> bytes:
        """Everything of the body that has arrived since the last call."""
        if len(self._body) == 1:
            return self._body.pop()
        data = b"".join(self._body)
        self._body.clear()
        return data

    # What llhttp calls.

    def on_message_begin(self) -> None:
        if self.complete:
            self.surplus = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head_complete:
            self.headers.append((name.lower(), value))
            self._head_bytes += len(name) + len(value) + 4
            if self._head_bytes > MAX_HEAD:
                self._refuse(f"the response head is larger than {MAX_HEAD} bytes")

    def on_headers_complete(self) -> None:
        if self.surplus:
            return
        status = self._parser.get_status_code()
        if status == 101:
            self._refuse("the upstream switched protocols")
        if status < 200:
            self._informational += 1
            if self._informational > MAX_INFORMATIONAL or status < 100:
                self._refuse("the upstream sent too many 1xx responses")
            self.headers = []
            return
        if status > 599:
            self._refuse(f"the upstream sent the status {status}")
        self.status = status
        self.head_complete = True
        self._pending = 0
        self.http_version = self._parser.get_http_version()
        framed = (
            first(self.headers, b"content-length") is not None
            or b"chunked" in b",".join(values(self.headers, b"transfer-encoding")).lower()
        )
        without_body = self._bodiless or status in {204, 304}
        self._until_close = not framed and not without_body
        self.reusable = (
            self._parser.should_keep_alive() and not self._bodiless and (framed or without_body)
        )
        self.complete = self._bodiless

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        if not self.surplus and not self._bodiless:
            self._body.append(body)

    def on_chunk_header(self) -> None:
        self._chunk_ended = False

    def on_chunk_complete(self) -> None:
        self._chunk_ended = True

    def on_message_complete(self) -> None:
        self._chunk_ended = False
        if self.head_complete:
            self.complete = True

    def _is_complete(self) -> bool:
        """The same as :attr:`complete`, which type checkers believe unchanged by a callback."""
        return self.complete

    def _refuse(self, message: str) -> None:
        self._error = BadResponse(message)
        raise self._error


def encode_response_head(status: int, headers: Headers) -> bytes:
    """The status line and headers, with the blank line that ends them.

    Names and values are ours or were checked: nothing here can hold a line break.
    """
    line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
    return line + b"".join([b"%s: %s\r\n" % pair for pair in headers]) + b"\r\n"


def encode_chunk(data: bytes) -> bytes:
    """*data*, at least a byte, as one chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def encode_request(method: bytes, target: bytes, headers: Headers, body: bytes) -> bytes:
    """A whole request; the caller has put ``host`` and ``content-length`` among the headers."""
    head = b"".join([b"%s: %s\r\n" % pair for pair in headers])
    return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method, target, head, body)
