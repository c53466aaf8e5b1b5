"""Which headers pass, and which are made anew.

Requests to an upstream are built from an allow-list and never copied, so neither a client's
credentials nor anything hop-by-hop can reach it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import TypeAlias

Headers: TypeAlias = list[tuple[bytes, bytes]]
"""Names in lower case, in the order received."""

_TRACING = (b"traceparent", b"tracestate")
_REQUEST_ID_SOURCES = (b"x-request-id", b"x-correlation-id", b"x-trace-id", b"request-id")
_ids = random.Random()  # unique, not secret: the operating system's randomness costs a system call
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}\Z")


class Fields(dict[bytes, bytes]):
    """Headers by name, for those who ask for many of them; of several values, the first.

    *findings* is for whoever has looked at them, and may see them again in the next request of
    the same connection.
    """

    __slots__ = ("findings", "headers")

    def __init__(self, headers: Headers) -> None:
        super().__init__(reversed(headers))
        self.headers = headers
        self.findings: object = None

    def with_length(self, value: bytes) -> Fields:
        """The same but for ``Content-Length``, on which no finding may depend."""
        name = b"content-length"
        other = Fields([(n, value if n == name else v) for n, v in self.headers])
        other.findings = self.findings
        return other

    def values(self, name: bytes) -> list[bytes]:  # type: ignore[override]  # as HTTP has it
        """All values of *name*, in the order received."""
        if len(self) == len(self.headers):
            return [self[name]] if name in self else []
        return values(self.headers, name)


def first(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of *name*, which is in lower case."""
    for key, value in headers:
        if key == name:
            return value
    return None


def values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


def request_id(fields: Fields) -> str:
    """The caller's own id if it sent a sane one, else a new one of 32 hexadecimal digits."""
    for source in _REQUEST_ID_SOURCES:
        value = fields.get(source)
        if value is not None and _REQUEST_ID.match(value):
            return value.decode("ascii")
    return f"{_ids.getrandbits(128):032x}"


def tracing(fields: Fields, session: bytes) -> Headers:
    """The W3C trace context, and the header that names the *session*, pass through unchanged."""
    passing = [(session, fields[session])] if session in fields else []
    if b"traceparent" in fields:
        passing += [(name, fields[name]) for name in _TRACING if name in fields]
    return passing


def duration_ms(seconds: float) -> bytes:
    """A duration as rate limit headers write it: ``250ms``, ``1s``, ``6m0s``."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return b"%dms" % milliseconds
    minutes, rest = divmod(round(seconds), 60)
    return b"%dm%ds" % (minutes, rest) if minutes else b"%ds" % rest
