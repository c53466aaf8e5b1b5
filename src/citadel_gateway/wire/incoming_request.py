"""A request as it arrives."""

from __future__ import annotations

import attrs

from citadel_gateway.wire.headers import Fields, Headers

_LITTLE = 2**20


@attrs.define(eq=False)
class IncomingRequest:
    """One request as it arrives: the head at once, the body piece by piece."""

    method: str
    target: bytes
    version: str
    fields: Fields
    keep_alive: bool
    has_body: bool
    content_length: int | None
    complete: bool = False
    buffered: int = 0
    _body: list[bytes] = attrs.field(factory=list, init=False)

    @property
    def headers(self) -> Headers:
        return self.fields.headers

    @property
    def expects_continue(self) -> bool:
        return self.has_body and b"expect" in self.fields

    @property
    def ends_soon(self) -> bool:
        """Whether to read on to its end costs less than another connection would.

        Clients that send head and body in two pieces are often answered between them.  One that
        waits to be asked for the body may send it or not.
        """
        length = self.content_length
        return length is not None and length <= _LITTLE and not self.expects_continue

    def take_body(self) -> bytes:
        """Everything of the body that has arrived since the last call."""
        body = self._body
        data = body[0] if len(body) == 1 else b"".join(body)
        body.clear()
        self.buffered = 0
        return data

    def add(self, data: bytes) -> None:
        self._body.append(data)
        self.buffered += len(data)
