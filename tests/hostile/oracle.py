"""What a stream of bytes means as HTTP/1.1 requests, by a strict reading and by h11.

Written from RFC 9112 and the gateway's own promises, independently of its code: one pass over all
the bytes, and no thought for speed or for bytes that are still to come.
"""

from __future__ import annotations

import re
from typing import Literal

import attrs
import h11

End = Literal["clean", "incomplete", "closed", "refused"]

MAX_TARGET = 8 * 1024
MAX_HEAD = 16 * 1024
MAX_FIELDS = 100

_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_REQUEST_LINE = re.compile(rb"([^ ]+) ([^ ]+) (HTTP/\d\.\d)")
_TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]+)(?::(\d{1,5}))?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})([\t ]*;[\t\x20-\x7e\x80-\xff]*)?")


@attrs.frozen
class Request:
    method: bytes
    target: bytes
    body: bytes

    @property
    def path(self) -> bytes:
        return self.target.partition(b"?")[0]


@attrs.frozen
class Reading:
    """The whole requests in a stream, in order, and what follows the last of them.

    clean: nothing. incomplete: the beginning of one more. closed: the last one closes the
    connection, so the rest is nobody's. refused: something that must not be served.
    """

    requests: tuple[Request, ...]
    end: End
    why: str = ""
    spans: tuple[tuple[int, int], ...] = ()


class _Refuse(Exception):
    pass


class _Incomplete(Exception):
    pass


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def line(self) -> bytes:
        """Up to CRLF. A CR or LF elsewhere is refused: the two must agree on where lines end."""
        end = self.data.find(b"\r\n", self.at)
        line = self.data[self.at : end if end >= 0 else len(self.data)]
        if b"\n" in line or b"\r" in line[:-1] or (end >= 0 and b"\r" in line):
            raise _Refuse("a bare CR or LF")
        if end < 0:
            raise _Incomplete
        self.at = end + 2
        return line

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise _Incomplete
        self.at += size
        return self.data[self.at - size : self.at]


def read_strictly(data: bytes) -> Reading:
    found: list[Request] = []
    spans: list[tuple[int, int]] = []
    end, why = _read_all(_Cursor(data), found, spans)
    return Reading(tuple(found), end, why, tuple(spans))


def _read_all(
    cursor: _Cursor, found: list[Request], spans: list[tuple[int, int]]
) -> tuple[End, str]:
    try:
        while True:
            while cursor.data[cursor.at : cursor.at + 1] in {b"\r", b"\n"}:
                cursor.at += 1  # empty lines before a request move no boundary
            start = cursor.at
            if start >= len(cursor.data):
                return "clean", ""
            request, closes = _request(cursor)
            found.append(request)
            spans.append((start, cursor.at))
            if closes:
                return "closed", ""
    except _Refuse as exc:
        return "refused", str(exc)
    except _Incomplete:
        return "incomplete", ""


def _request(cursor: _Cursor) -> tuple[Request, bool]:
    method, target, version = _start(cursor)
    fields = _fields(cursor)
    _check_host(fields, version)
    expect = _values(fields, b"expect")
    if expect and (len(expect) > 1 or expect[0].lower() != b"100-continue"):
        raise _Refuse("an expectation")
    body = _body(cursor, fields, version)
    options = {
        option.strip().lower()
        for value in _values(fields, b"connection")
        for option in value.split(b",")
    }
    closes = b"close" in options or (version == b"HTTP/1.0" and b"keep-alive" not in options)
    return Request(method, target, body), closes


def _start(cursor: _Cursor) -> tuple[bytes, bytes, bytes]:
    line = cursor.line()
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise _Refuse("no request line")
    method, target, version = match.groups()
    if not _TOKEN.fullmatch(method) or method in {b"CONNECT", b"TRACE", b"PRI"}:
        raise _Refuse("the method")
    if version not in {b"HTTP/1.0", b"HTTP/1.1"}:
        raise _Refuse("the version")
    if not _TARGET.fullmatch(target) or len(target) > MAX_TARGET:
        raise _Refuse("the target")
    return method, target, version


def _fields(cursor: _Cursor) -> list[tuple[bytes, bytes]]:
    """A header section or a trailer section, its empty line included."""
    fields: list[tuple[bytes, bytes]] = []
    began = cursor.at
    while line := cursor.line():
        name, colon, value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise _Refuse(f"the field {line[:40]!r}")
        fields.append((name.lower(), value.strip(b"\t ")))
    if len(fields) > MAX_FIELDS or cursor.at - began > MAX_HEAD:
        raise _Refuse("too many fields")
    return fields


def _values(fields: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in fields if key == name]


def _check_host(fields: list[tuple[bytes, bytes]], version: bytes) -> None:
    hosts = _values(fields, b"host")
    if not hosts and version == b"HTTP/1.0":
        return
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if match is None or int(match[2] or 0) > 65535:
        raise _Refuse("Host")


def _body(cursor: _Cursor, fields: list[tuple[bytes, bytes]], version: bytes) -> bytes:
    encodings, lengths = _values(fields, b"transfer-encoding"), _values(fields, b"content-length")
    if encodings:
        if version == b"HTTP/1.0" or lengths or [e.lower() for e in encodings] != [b"chunked"]:
            raise _Refuse("Transfer-Encoding")
        return _chunks(cursor)
    if not lengths:
        return b""
    if len(lengths) > 1 or not re.fullmatch(rb"\d{1,16}", lengths[0]):
        raise _Refuse("Content-Length")
    return cursor.take(int(lengths[0]))


def _chunks(cursor: _Cursor) -> bytes:
    body = b""
    while True:
        match = _CHUNK_SIZE.fullmatch(cursor.line())
        if match is None:
            raise _Refuse("the size of a chunk")
        if not (size := int(match[1], 16)):
            break
        body += cursor.take(size)
        rest = cursor.data[cursor.at : cursor.at + 2]
        if rest != b"\r\n":
            raise _Incomplete if b"\r\n".startswith(rest) else _Refuse("the end of a chunk")
        cursor.at += 2
    _fields(cursor)
    return body


def read_one_with_h11(data: bytes) -> tuple[Request, int] | str:
    """The first request in *data* and its length in bytes, or why h11 finds none."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
    connection.receive_data(data)
    method, target, body = b"", b"", b""
    try:
        while True:
            match connection.next_event():
                case h11.Request() as head:
                    method, target = bytes(head.method), bytes(head.target)
                case h11.Data() as piece:
                    body += bytes(piece.data)
                case h11.EndOfMessage():
                    left = connection.trailing_data[0]
                    return Request(method, target, body), len(data) - len(left)
                case _:
                    return "it sees no end"
    except h11.RemoteProtocolError as exc:
        return str(exc)


def read(data: bytes) -> Reading:
    """The strict reading, as far as h11 agrees on every request; from there on, refused.

    A gateway must not serve what two careful parsers take for different things.
    """
    strict = read_strictly(data)
    for i, (request, (start, end)) in enumerate(zip(strict.requests, strict.spans, strict=True)):
        found = read_one_with_h11(data[start:])
        if found != (request, end - start):
            why = found if isinstance(found, str) else f"{found[0]}, {found[1]} bytes"
            return Reading(strict.requests[:i], "refused", f"h11 disputes it: {why}")
    return strict
