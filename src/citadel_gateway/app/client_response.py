"""The client's side of a request: the head, the body, the errors, and what is noted about them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import attrs
import trio

from citadel_gateway.errors import GatewayError
from citadel_gateway.io.http1_exchange import ResponseAborted
from citadel_gateway.io.record import Outcome, Phase, RequestRecord
from citadel_gateway.wire.headers import Headers
from citadel_gateway.wire.sse import encode_event

_JSON: Headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
_EVENTS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Client(Protocol):
    """Who is answered; the headers are those that say something about the answer itself."""

    @property
    def takes_at_once(self) -> bool: ...

    def write_now(self, data: bytes) -> bytes: ...

    async def write_rest(self, rest: bytes) -> None: ...

    async def answer(self, status: int, headers: Headers, body: bytes) -> None: ...

    async def begin(self, status: int, headers: Headers, data: bytes) -> None: ...

    async def write(self, data: bytes, *, last: bool = False) -> None: ...


@attrs.define(eq=False)
class AsgiClient:
    """A client behind somebody else's server."""

    send: Callable[[dict[str, Any]], Awaitable[None]]
    takes_at_once: bool = False

    def write_now(self, data: bytes) -> bytes:
        return data

    async def write_rest(self, rest: bytes) -> None:
        await self.write(rest)

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.write(body, last=True)

    async def begin(self, status: int, headers: Headers, data: bytes) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.write(data)

    async def write(self, data: bytes, *, last: bool = False) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": not last})


@attrs.define(eq=False)
class ClientResponse:
    """Answers one request, exactly once; also the sink of streams.

    :param routing_headers: tell the client which endpoint answered, and why.
    """

    client: Client
    record: RequestRecord
    routing_headers: bool
    headers: Headers = attrs.field(factory=list)  # that every answer carries
    started: bool = attrs.field(default=False, init=False)
    ending: bool = attrs.field(default=False, init=False)  # the last bytes are on their way

    async def whole(self, body: bytes) -> None:
        """A complete JSON answer with status 200."""
        self.record.phase = Phase.ANSWERING
        await self._answer(200, _JSON + self._commit(200), body)
        self.record.outcome = Outcome.OK

    async def error(self, error: GatewayError, *, by_upstream: bool = False) -> None:
        """An error instead of an answer."""
        headers = _JSON + self._commit(error.status) + error.all_headers()
        self.record.refuse(
            status=error.status, code=error.code, message=error.message, by_upstream=by_upstream
        )
        await self._answer(error.status, headers, error.body())

    async def start_early(self, data: bytes) -> None:
        """Send the head of a stream of which nothing is there yet."""
        await self._begin(self._commit(200), data)

    async def start(self, data: bytes) -> None:
        """Commit a stream: its head, unless that was sent early, and its first events."""
        if self.started:
            self.record.commit(200, trio.current_time())
            await self.write(data)
        else:
            await self._begin(self._commit(200), data)

    async def _begin(self, headers: Headers, data: bytes) -> None:
        self.record.bytes_out += len(data)
        await self.client.begin(200, _EVENTS + headers, data)

    async def write(self, data: bytes) -> None:
        self.record.bytes_out += len(data)
        await self.client.write(data)

    @property
    def takes_at_once(self) -> bool:
        return self.client.takes_at_once

    def write_now(self, data: bytes) -> bytes:
        self.record.bytes_out += len(data)
        return self.client.write_now(data)

    async def write_rest(self, rest: bytes) -> None:
        if rest:
            await self.client.write_rest(rest)

    async def finish(self, data: bytes) -> None:
        self.ending = True
        self.record.bytes_out += len(data)
        await self.client.write(data, last=True)
        self.record.outcome = Outcome.OK

    async def break_off(self, error: GatewayError, outcome: Outcome) -> None:
        """Tell the client within the stream that it is cut, and cut it: no end, no ``[DONE]``.

        Raises :class:`ResponseAborted`.
        """
        self.record.outcome, self.record.error_code = outcome, error.code
        self.record.error = error.message
        await self.write(encode_event(error.body()))
        raise ResponseAborted

    async def _answer(self, status: int, headers: Headers, body: bytes) -> None:
        self.ending = True
        self.record.bytes_out += len(body)
        await self.client.answer(status, headers, body)

    def _commit(self, status: int) -> Headers:
        """Note that the answer begins; returns the headers that are the same for all kinds."""
        self.started = True
        self.record.commit(status, trio.current_time())
        record = self.record
        found = [(b"x-request-id", record.request_id.encode("ascii")), *self.headers]
        if not self.routing_headers:
            return found
        found.append((b"x-citadel-attempts", b"%d" % record.attempts))
        if record.model:
            found.append((b"x-citadel-model", record.model.encode()))
        if record.endpoint:
            found.append((b"x-citadel-backend", record.endpoint.encode()))
        if record.route_reason:
            found.append((b"x-citadel-route-reason", record.route_reason.encode()))
        if record.overhead is not None:
            found.append((b"x-citadel-overhead-ms", b"%.2f" % (record.overhead * 1000)))
        return found
