"""Recognising a request whose head is that of the last one on its connection.

A client that keeps its connection sends the same head again and again, but for the length of the
body.  What was parsed and found good once need not be parsed again when every other byte is the
same, and the whole request has come in one piece.
"""

from __future__ import annotations

import re

import attrs

from citadel_gateway.wire.headers import Fields
from citadel_gateway.wire.incoming_request import IncomingRequest

_NAME = b"\r\ncontent-length:"
_LENGTH = re.compile(rb"[1-9]\d{0,8}\Z")
_LONGEST = 9  # digits


@attrs.define(eq=False)
class FamiliarHead:
    """A head that was parsed, around the digits of its ``Content-Length``."""

    _before: bytes
    _digits: bytes
    _after: bytes
    _method: str
    _target: bytes
    _fields: Fields

    @classmethod
    def of(cls, request: IncomingRequest, head: bytes) -> FamiliarHead | None:
        """The *head* of *request* to the byte; ``None`` if there is more to it than fields."""
        fields, length = request.fields, request.content_length
        plain = (
            request.complete
            and request.keep_alive
            and request.version == "1.1"
            and length
            and not (b"upgrade" in fields or b"expect" in fields)
        )
        if not plain:
            return None
        start = head.lower().find(_NAME) + len(_NAME)
        digits = fields[b"content-length"]
        start = head.find(digits, start)
        end = start + len(digits)
        return cls(head[:start], digits, head[end:], request.method, request.target, fields)

    def repeated(self, data: bytes) -> IncomingRequest | None:
        """The request in *data*, if that is just one with this head, and whole."""
        before, after = self._before, self._after
        if not data.startswith(before):
            return None
        start = len(before)
        end = data.find(b"\r", start, start + _LONGEST + 1)
        digits = data[start:end]
        if end < 0 or not data.startswith(after, end) or not _LENGTH.match(digits):
            return None
        length, body_at = int(digits), end + len(after)
        if len(data) != body_at + length:
            return None
        if digits != self._digits:
            self._digits, self._fields = digits, self._fields.with_length(digits)
        request = IncomingRequest(
            method=self._method,
            target=self._target,
            version="1.1",
            fields=self._fields,
            keep_alive=True,
            has_body=True,
            content_length=length,
            complete=True,
        )
        request.add(data[body_at:])
        return request
