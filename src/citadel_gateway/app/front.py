"""The ASGI application: inference goes straight to the relay, everything else to Quart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs

from citadel_gateway.app.cors import Cors
from citadel_gateway.app.relay import ROUTES, Receive, Relay, Send
from citadel_gateway.errors import method_not_allowed
from citadel_gateway.io.http1_exchange import EXCHANGE, Exchange
from citadel_gateway.wire.headers import Fields, Headers, request_id

_SECURITY: Headers = [(b"x-content-type-options", b"nosniff")]


@attrs.define(eq=False)
class Front:
    """Dispatches by path, answers CORS preflights, and gives every answer a request id.

    :param on_end: told, as fields of a log line, of every answer that the relay does not give.
    :param unlogged: paths that are asked for too often to be worth a line each.
    """

    relay: Relay
    quart: Callable[..., Awaitable[None]]
    cors: Cors
    on_end: Callable[[dict[str, Any]], None]
    unlogged: frozenset[str]

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            raise RuntimeError(f"cannot serve {scope['type']!r}")
        exchange: Exchange | None = (scope.get("extensions") or {}).get(EXCHANGE)
        fields = Fields(scope["headers"]) if exchange is None else exchange.request.fields
        method = scope["method"]
        if method == "OPTIONS" and b"access-control-request-method" in fields:
            await _respond(send, 204, self.cors.preflight(fields))
        elif scope["path"] not in ROUTES:
            await self.quart(scope, receive, self._decorate(scope, fields, send))
        elif method == "POST":
            await self.relay(scope, fields, receive, send, self.cors.headers(fields))
        else:
            error = method_not_allowed(method, scope["path"], "POST")
            await _respond(self._decorate(scope, fields, send), error.status, *error.response())

    def _decorate(self, scope: dict[str, Any], fields: Fields, send: Send) -> Send:
        name = request_id(fields)
        extra = [
            (b"x-request-id", name.encode("ascii")),
            *_SECURITY,
            *self.cors.headers(fields),
        ]

        async def decorated(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *extra]}
                if scope["path"] not in self.unlogged:
                    self.on_end(
                        {
                            "request_id": name,
                            "method": scope["method"],
                            "route": scope["path"],
                            "status": message["status"],
                            "client": (scope.get("client") or ("unknown",))[0],
                        }
                    )
            await send(message)

        return decorated


async def _respond(send: Send, status: int, headers: Headers, body: bytes = b"") -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
