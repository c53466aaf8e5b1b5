"""One connection to an upstream: a request at a time, over an anyio byte stream."""

from __future__ import annotations

import select
from collections.abc import Callable

import anyio
import attrs
from anyio.abc import ByteStream, SocketAttribute

from citadel_gateway.io.dial import Origin
from citadel_gateway.wire.http1_response import CutShort, ResponseParser

_READ = 64 * 1024


@attrs.define(eq=False)
class Connection:
    """A stream and the response that is being read from it.

    A connection is good for another request only when the last response was complete, nothing
    followed it, and both sides meant to keep the connection.  In any doubt it is closed: a
    response must never reach the wrong request.
    """

    origin: Origin
    stream: ByteStream
    clock: Callable[[], float]
    idle_since: float = attrs.field(default=0.0, init=False)
    requests: int = attrs.field(default=0, init=False)
    waited: float = attrs.field(default=0.0, init=False)  # seconds, for the upstream to speak
    response: ResponseParser = attrs.field(init=False)
    _descriptor: int = attrs.field(default=-1, init=False)
    _busy: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        raw = self.stream.extra(SocketAttribute.raw_socket, None)
        self._descriptor = -1 if raw is None else raw.fileno()

    @property
    def is_reused(self) -> bool:
        """Whether an earlier request went over it, so that the upstream may just have hung up."""
        return self.requests > 1

    async def send(self, request: bytes, *, bodiless: bool = False) -> None:
        """Write a whole request; raises ``OSError``.

        :param bodiless: the response has no body, whatever its head says (HEAD).
        """
        self.begin(bodiless=bodiless)
        try:
            await self.stream.send(request)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            raise ConnectionResetError("the upstream closed the connection") from exc

    def begin(self, *, bodiless: bool = False) -> None:
        """Expect a new response."""
        self.response = ResponseParser(bodiless=bodiless)
        self.requests += 1
        self.waited = 0.0
        self._busy = True

    async def read_head(self) -> ResponseParser:
        """Wait for the head of the response.

        Raises ``BadResponse`` (``CutShort`` when the upstream left) or ``OSError``.
        """
        response = self.response
        while not response.head_complete:
            await self._read_some()
        return response

    async def read_body(self) -> bytes:
        """Some of the body as soon as there is some; ``b""`` at its end.  Raises as the head."""
        response = self.response
        while True:
            if data := response.take_body():
                return data
            if response.complete:
                self._busy = False
                return b""
            await self._read_some()

    def is_reusable(self) -> bool:
        """Whether another request may follow, as far as the last response tells."""
        response = self.response
        return not self._busy and response.complete and response.reusable and not response.surplus

    def is_stale(self) -> bool:
        """Whether something arrived while it was idle: an end of stream, or bytes nobody asked for.

        One system call, and only where there is a descriptor to ask about.
        """
        if self._descriptor < 0:
            return False
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(0))

    async def aclose(self) -> None:
        """Hang up at once, even while being cancelled; never waits for the peer."""
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(self.stream)

    async def _read_some(self) -> None:
        before = self.clock()
        try:
            data = await self.stream.receive(_READ)
        except anyio.EndOfStream:
            self.response.feed_eof()
            return
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as exc:
            raise CutShort(
                "the upstream reset the connection", started=self.response.started
            ) from exc
        self.waited += self.clock() - before
        self.response.feed(data)
