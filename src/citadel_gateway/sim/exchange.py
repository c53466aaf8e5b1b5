"""One request and its answer over ASGI, and the rule that nothing outlives the client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import attrs
import orjson
import trio

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

SIMULATED = {"system_fingerprint": "simulated"}


@attrs.define(eq=False)
class Refusal(Exception):
    """The engine's own no, in vLLM's words: the shape is OpenAI's, ``code`` is the status."""

    message: str
    status: int = 400
    kind: str = "BadRequestError"
    param: str | None = None
    headers: tuple[Header, ...] = ()

    def as_json(self) -> dict[str, Any]:
        error = {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.status
        }  # fmt: skip
        return {"error": error}


@attrs.define(eq=False)
class Exchange:
    scope: Message
    _receive: Receive
    _send: Send
    request_id: str = ""
    _ending: bool = attrs.field(default=False, init=False)

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @property
    def method(self) -> str:
        return str(self.scope["method"])

    def header(self, name: bytes) -> str | None:
        for key, value in self.scope["headers"]:
            if key.lower() == name:
                return bytes(value).decode("latin-1")
        return None

    async def read_body(self) -> bytes | None:
        """The whole body, or None if the client left before its end."""
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body", False):
                return bytes(body)

    async def while_connected(self, work: Callable[[], Awaitable[object]]) -> None:
        """Run *work*, and cancel it the moment the client leaves.

        What *work* raises comes out bare, not in a group.
        """
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_gone, nursery.cancel_scope)
            try:
                await work()
            except Exception as exc:  # raised again below, outside the nursery
                failure = exc
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _cancel_when_gone(self, scope: trio.CancelScope) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._ending:  # servers report the end of an answer as a disconnect, too
            scope.cancel()

    async def send_head(
        self,
        status: int,
        content_type: bytes,
        *,
        length: int | None = None,
        headers: Iterable[Header] = (),
    ) -> None:
        found = [
            (b"content-type", content_type),
            (b"server", b"citadel-sim"),
            (b"x-simulated", b"true"),
            (b"x-request-id", self.request_id.encode("latin-1")),
            *headers,
        ]
        if length is not None:
            found.append((b"content-length", b"%d" % length))
        await self._send({"type": "http.response.start", "status": status, "headers": found})

    async def send_chunk(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        self._ending = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def send_whole(
        self, status: int, content_type: bytes, body: bytes, headers: Iterable[Header] = ()
    ) -> None:
        await self.send_head(status, content_type, length=len(body), headers=headers)
        await self.end(body)

    async def send_json(
        self, body: dict[str, Any], *, status: int = 200, headers: Iterable[Header] = ()
    ) -> None:
        """Send *body* with the mark that it is simulated."""
        data = orjson.dumps(body | SIMULATED)
        await self.send_whole(status, b"application/json", data, headers)

    async def refuse(self, refusal: Refusal) -> None:
        await self.send_json(refusal.as_json(), status=refusal.status, headers=refusal.headers)


Handler = Callable[[Exchange, bytes], Awaitable[None]]
