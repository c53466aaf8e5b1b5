"""Call an ASGI application in memory, message by message, and hang up when it suits the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import orjson
import trio
from trio.testing import wait_all_tasks_blocked

Message = MutableMapping[str, Any]
App = Callable[..., Any]


@attrs.define(eq=False)
class Reply:
    """What came back, and when.

    :param complete: the body was ended properly.
    :param error: what left the application.
    """

    status: int = 0
    headers: dict[str, str] = attrs.field(factory=dict)
    chunks: list[tuple[float, bytes]] = attrs.field(factory=list)
    complete: bool = False
    error: Exception | None = None

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.chunks)

    def json(self) -> Any:
        return orjson.loads(self.body)

    def events(self) -> list[Any]:
        """The data of each event, parsed unless it is [DONE]."""
        found = [part.removeprefix(b"data: ") for part in self.body.split(b"\n\n") if part]
        return ["[DONE]" if data == b"[DONE]" else orjson.loads(data) for data in found]


@attrs.define(eq=False)
class Call:
    """A request under way."""

    reply: Reply
    done: trio.Event
    _inbox: trio.MemorySendChannel[Message]

    def end(self) -> None:
        """Report the end as Hypercorn does: as a disconnect, before the last send returns."""
        self._inbox.send_nowait({"type": "http.disconnect"})

    async def hang_up(self) -> None:
        """Leave, and wait until the application has noticed."""
        await self._inbox.send({"type": "http.disconnect"})
        await self.done.wait()


@asynccontextmanager
async def calling(
    app: App,
    path: str,
    body: object = b"",
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
) -> AsyncIterator[Call]:
    """Start a request that runs beside the body; what is left at the end is cancelled."""
    inbox, app_inbox = trio.open_memory_channel[Message](2)
    call = Call(Reply(), trio.Event(), inbox)
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
    }  # fmt: skip

    async def run() -> None:
        try:
            await app(scope, app_inbox.receive, _recorder(call))
        except Exception as exc:  # the server's part: note it and close
            call.reply.error = exc
        call.done.set()

    async with trio.open_nursery() as nursery:
        await inbox.send({"type": "http.request", "body": data, "more_body": False})
        nursery.start_soon(run)
        yield call
        nursery.cancel_scope.cancel()


async def fetch(app: App, path: str, body: object = b"", **options: Any) -> Reply:
    """The whole reply; waits as long as it takes."""
    async with calling(app, path, body, **options) as call:
        await call.done.wait()
    return call.reply


async def get(app: App, path: str) -> Reply:
    return await fetch(app, path, method="GET")


def _recorder(call: Call) -> Callable[[Message], Any]:
    reply = call.reply

    async def send(message: Message) -> None:
        await trio.lowlevel.checkpoint()
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            return
        if message.get("body"):
            reply.chunks.append((trio.current_time(), bytes(message["body"])))
        if not message.get("more_body", False):
            reply.complete = True
            call.end()
            await wait_all_tasks_blocked()

    return send
