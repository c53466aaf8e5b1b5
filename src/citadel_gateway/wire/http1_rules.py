"""What the head of a request must be like, beyond what llhttp sees to.

What a gateway must not tolerate, as two readers could take it in two ways, is refused here
(RFC 9112 sections 3, 6 and 11, request smuggling).
"""

from __future__ import annotations

import re

from citadel_gateway.wire.headers import Fields

_HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~%!$&'()*+,;=-]+)(:\d{1,5})?\Z")
_TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*\Z")  # origin-form, visible ASCII, no fragment
_LENGTH = re.compile(rb"(0|[1-9]\d{0,15})\Z")
_SPOKEN = frozenset({"1.0", "1.1"})
_UNSAFE = frozenset({b"CONNECT", b"TRACE"})
_CONTINUE = {b"100-continue"}
VERSIONS = "only HTTP/1.0 and HTTP/1.1 are spoken here"


class BadRequest(Exception):
    """Bytes that are not a request we accept; the connection must be closed.

    :param status: what to answer before closing.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.to_head = False  # it was a HEAD, whose answer has no body


def check_line(method: bytes, target: bytes, version: str) -> bytes:
    """The request line as it must have been sent.  Raises :class:`BadRequest`."""
    if version not in _SPOKEN:
        raise BadRequest(505, VERSIONS)
    check_target(method, target)
    return b"%b %b HTTP/%b\r\n" % (method, target, version.encode())


def check_target(method: bytes, target: bytes) -> None:
    """What is asked for, in whichever version.  Raises :class:`BadRequest`."""
    if method in _UNSAFE:
        raise BadRequest(405, f"{method.decode()} is not allowed")
    if not _TARGET.match(target):
        raise BadRequest(400, "the request target is not a path")


def check_fields(fields: Fields, version: str) -> tuple[int | None, bool]:
    """How long the body is, if that is said, and whether it comes in chunks.

    Raises :class:`BadRequest`.
    """
    framing = _check_framing(fields, version)
    _check_host(fields, version)
    if b"expect" in fields and {v.lower() for v in fields.values(b"expect")} != _CONTINUE:
        raise BadRequest(417, "only 'Expect: 100-continue' is understood")
    return framing


def says_close(fields: Fields) -> bool:
    """Whether ``Connection`` says so, whatever else it says."""
    if b"connection" not in fields:
        return False
    options = b",".join(fields.values(b"connection")).lower().split(b",")
    return any(option.strip() == b"close" for option in options)


def _check_framing(fields: Fields, version: str) -> tuple[int | None, bool]:
    if b"transfer-encoding" in fields:
        encodings = fields.values(b"transfer-encoding")
        if version == "1.0":
            raise BadRequest(400, "Transfer-Encoding does not exist in HTTP/1.0")
        if len(encodings) > 1 or encodings[0].lower() != b"chunked":
            raise BadRequest(501, "the only Transfer-Encoding understood is 'chunked'")
        return None, True
    length = fields.get(b"content-length")
    if length is None:
        return None, False
    if not _LENGTH.match(length):
        raise BadRequest(400, "Content-Length is not a plain number")
    return int(length), False


def _check_host(fields: Fields, version: str) -> None:
    hosts = fields.values(b"host")
    if not hosts and version == "1.0":
        return
    match = _HOST.match(hosts[0]) if len(hosts) == 1 else None
    if match is None:
        raise BadRequest(400, "there must be one valid Host header")
    if match[2] and int(match[2][1:]) > 65535:
        raise BadRequest(400, "the port in the Host header is out of range")
