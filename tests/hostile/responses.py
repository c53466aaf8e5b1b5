"""What came back on a connection, taken apart strictly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import attrs

from tests.support.raw_client import (
    Chunked,
    Framing,
    Sized,
    UntilClose,
    parse_head,
    take_until,
)


@attrs.frozen
class Response:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    complete: bool

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def closes(self) -> bool:
        return self.header("connection") == "close"

    @property
    def error(self) -> dict[str, Any] | None:
        """OpenAI's error object, if that is what the body is."""
        try:
            error = json.loads(self.body)["error"]
        except (ValueError, KeyError, TypeError):
            return None
        return error if isinstance(error, dict) else None


def split_responses(data: bytes, methods: Sequence[bytes] = ()) -> list[Response]:
    """Every response in *data*, interim ones included; raises ValueError for anything else.

    *methods* are those of the requests in order: a response to HEAD has no body. The last one may
    be cut short, and then is not complete.
    """
    buffer = bytearray(data)
    found: list[Response] = []
    final = 0
    while buffer:
        if (block := take_until(buffer, b"\r\n\r\n")) is None:
            if not b"HTTP/1.1 ".startswith(bytes(buffer[:9])):
                raise ValueError(f"no response: {bytes(buffer[:80])!r}")
            break
        start, headers = parse_head(block)
        version, status, *_ = start.split(" ", 2)
        if version != "HTTP/1.1" or not (status.isdigit() and len(status) == 3):
            raise ValueError(f"no status line: {start!r}")
        code = int(status)
        method = methods[final] if final < len(methods) else b""
        framing = _framing(code, headers, method)
        body = bytearray()
        while not framing.finished and (piece := framing.take(buffer)):
            body += piece
        found.append(Response(code, tuple(headers), bytes(body), framing.finished))
        final += code >= 200
        if not framing.finished:
            break
    return found


def _framing(status: int, headers: Sequence[tuple[str, str]], method: bytes) -> Framing:
    if method == b"HEAD" or status < 200 or status in {204, 304}:
        return Sized(0)
    lengths = [value for name, value in headers if name == "content-length"]
    codings = [value for name, value in headers if name == "transfer-encoding"]
    if not lengths and not codings and ("connection", "close") in headers:
        return UntilClose()
    if len(lengths) + len(codings) != 1:
        raise ValueError(f"framed {len(lengths) + len(codings)} times: {headers!r}")
    return Chunked() if codings == ["chunked"] else Sized(int(lengths[0]))
