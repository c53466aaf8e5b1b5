"""The client's side of a request: the head, the body, the errors, and what is noted about them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

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


@attrs.define(eq=False)
class ClientResponse:
    """Answers one request, exactly once; also the sink of streams.

    :param routing_headers: tell the client which endpoint answered, and why.
    """

    send: Callable[[dict[str, Any]], Awaitable[None]]
    record: RequestRecord
    routing_headers: bool
    headers: Headers = attrs.field(factory=list)  # that every answer carries
    started: bool = attrs.field(default=False, init=False)
    ending: bool = attrs.field(default=False, init=False)  # the last bytes are on their way

    async def whole(self, body: bytes) -> None:
        """A complete JSON answer with status 200."""
        self.record.phase = Phase.ANSWERING
        self._commit(200)
        headers = [*_JSON, (b"content-length", b"%d" % len(body)), *self._common_headers()]
        await self._send_whole(200, headers, body)
        self.record.outcome = Outcome.OK

    async def error(self, error: GatewayError, *, by_upstream: bool = False) -> None:
        """An error instead of an answer."""
        record = self.record
        self._commit(error.status)
        body = error.body()
        headers = [*_JSON, (b"content-length", b"%d" % len(body)), *self._common_headers()]
        record.refuse(
            status=error.status, code=error.code, message=error.message, by_upstream=by_upstream
        )
        await self._send_whole(error.status, headers + error.all_headers(), body)

    async def start(self, data: bytes) -> None:
        """Commit a stream: its head and its first events."""
        self._commit(200)
        await self.send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [*_EVENTS, *self._common_headers()],
            }
        )
        await self.write(data)

    async def write(self, data: bytes) -> None:
        self.record.bytes_out += len(data)
        await self.send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes) -> None:
        self.ending = True
        self.record.bytes_out += len(data)
        await self.send({"type": "http.response.body", "body": data})
        self.record.outcome = Outcome.OK

    async def break_off(self, error: GatewayError, outcome: Outcome) -> None:
        """Tell the client within the stream that it is cut, and cut it: no end, no ``[DONE]``.

        Raises :class:`ResponseAborted`.
        """
        self.record.outcome, self.record.error_code = outcome, error.code
        self.record.error = error.message
        await self.write(encode_event(error.body()))
        raise ResponseAborted

    def _commit(self, status: int) -> None:
        self.started = True
        self.record.commit(status, trio.current_time())

    async def _send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        self.ending = True
        self.record.bytes_out += len(body)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def _common_headers(self) -> Headers:
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
