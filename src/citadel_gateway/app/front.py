"""The ASGI application: inference goes straight to the relay, everything else to Quart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs

from citadel_gateway.app.generation import Generation
from citadel_gateway.app.relay import ROUTES, Receive, Send
from citadel_gateway.errors import method_not_allowed
from citadel_gateway.io.http1_exchange import EXCHANGE, Exchange
from citadel_gateway.wire.headers import Fields, Headers, request_id

_SECURITY: Headers = [(b"x-content-type-options", b"nosniff")]


@attrs.define(eq=False)
class Front:
    """Dispatches by path, answers CORS preflights, and gives every answer a request id.

    :param generation: the configuration by which requests are served that begin now.
    :param on_end: told, as fields of a log line, of every answer that the relay does not give.
    """

    generation: Generation
    quart: Callable[..., Awaitable[None]]
    on_end: Callable[[dict[str, Any]], None]

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            raise RuntimeError(f"cannot serve {scope['type']!r}")
        exchange: Exchange | None = (scope.get("extensions") or {}).get(EXCHANGE)
        fields = Fields(scope["headers"]) if exchange is None else exchange.request.fields
        generation, method = self.generation, scope["method"]
        if method == "OPTIONS" and b"access-control-request-method" in fields:
            await _respond(send, 204, generation.cors.preflight(fields))
        elif scope["path"] not in ROUTES:
            await self.quart(scope, receive, self._decorate(scope, fields, send))
        elif method == "POST":
            await generation.relay(scope, fields, receive, send, generation.cors.headers(fields))
        else:
            error = method_not_allowed(method, scope["path"], "POST")
            await _respond(self._decorate(scope, fields, send), error.status, *error.response())

    def _decorate(self, scope: dict[str, Any], fields: Fields, send: Send) -> Send:
        generation, name = self.generation, request_id(fields)
        extra = [
            (b"x-request-id", name.encode("ascii")),
            *_SECURITY,
            *generation.cors.headers(fields),
        ]

        async def decorated(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *extra]}
                if scope["path"] not in generation.unlogged:
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
