"""A stand-in that does it right, so that it is known that a scenario can be passed.

It is no gateway: it knows the two engines, asks one after the other, keeps nothing in mind and
serves one request for each connection.  A stream that breaks off is continued from the text so
far, or, where that is refused, repeated and the text so far left out.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import attrs
import trio

from tests.scenarios.client import CHAT
from tests.scenarios.scenario import CLOCKS, Stage
from tests.support.raw_client import NoResponseError, RawClient, http_request, parse_head

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class _Refused(Exception):
    pass


class _Broken(Exception):
    pass


async def serve_reference(stage: Stage, nursery: trio.Nursery) -> int:
    """Serve *stage* for the nursery's life; the port."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(_Broken, trio.BrokenResourceError):  # the client has left
                await _Answer(stage, stream, await _read_request(stream)).give()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, serve, listeners)
    port: int = listeners[0].socket.getsockname()[1]
    return port


async def _read_request(stream: trio.SocketStream) -> dict[str, Any]:
    data = b""
    while b"\r\n\r\n" not in data:
        data += await _more(stream)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(dict(parse_head(head)[1])["content-length"])
    while len(body) < length:
        body += await _more(stream)
    asked: dict[str, Any] = json.loads(body)
    return asked


async def _more(stream: trio.SocketStream) -> bytes:
    if data := bytes(await stream.receive_some()):
        return data
    raise _Broken


@attrs.define(eq=False)
class _Answer:
    stage: Stage
    stream: trio.SocketStream
    asked: dict[str, Any]
    _text: str = attrs.field(default="", init=False)
    _leave_out: int = attrs.field(default=0, init=False)
    _finished: bool = attrs.field(default=False, init=False)

    async def give(self) -> None:
        assert self.stage.backup is not None
        primary, backup = self.stage.primary.port, self.stage.backup.port
        for port, prefill in [(primary, False), (backup, True), (backup, False)]:
            try:
                await self._relay(port, prefill=prefill and bool(self._text))
            except (_Refused, _Broken, NoResponseError, OSError, trio.TooSlowError):
                continue
            return

    async def _relay(self, port: int, *, prefill: bool) -> None:
        messages = self.asked["messages"]
        if prefill:
            messages = [*messages, {"role": "assistant", "content": self._text}]
        self._leave_out = 0 if prefill else len(self._text)
        request = http_request("POST", CHAT, {**self.asked, "messages": messages})
        silence = self.stage.seconds(CLOCKS.silence)
        with trio.fail_after(silence):
            client = await RawClient.connect(port)
        async with client:
            await client.send(request)
            with trio.fail_after(silence):
                head = await client.read_head("POST")
            if head.status != 200:
                raise _Refused
            if not self.asked["stream"]:
                await self._pass_on_whole(await client.read_piece())
                return
            events = client.read_events(head)
            while not self._finished:
                with trio.fail_after(silence):
                    data = await anext(events, None)
                    while data is not None and self._says_nothing(data):
                        data = await anext(events, None)
                if data is None:
                    raise _Broken
                await self._pass_on(json.loads(data))

    def _says_nothing(self, data: str) -> bool:
        try:
            event = json.loads(data)
        except ValueError:
            return True
        if "error" in event:
            raise _Broken
        (choice,) = event["choices"]
        return not choice["delta"].get("content") and not choice["finish_reason"]

    async def _pass_on(self, event: dict[str, Any]) -> None:
        (choice,) = event["choices"]
        new = choice["delta"].get("content", "")
        known, self._leave_out = new[: self._leave_out], max(0, self._leave_out - len(new))
        choice["delta"]["content"] = new = new[len(known) :]
        if not self._text:
            await self.stream.send_all(_HEAD)
        self._text += new
        if new or choice["finish_reason"]:
            await self._send(json.dumps(event).encode())
        if choice["finish_reason"]:
            await self._send(b"[DONE]")
            await self.stream.send_all(b"0\r\n\r\n")
            self._finished = True

    async def _send(self, data: bytes) -> None:
        event = b"data: " + data + b"\n\n"
        await self.stream.send_all(b"%x\r\n%b\r\n" % (len(event), event))

    async def _pass_on_whole(self, body: bytes) -> None:
        if "error" in json.loads(body):
            raise _Refused
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        await self.stream.send_all(head % len(body) + body)
