"""Clients that do nothing wrong, meanwhile. They must not notice anything."""

from __future__ import annotations

import json
import math
from collections import defaultdict

import attrs
import trio

from tests.hostile.engines import digest
from tests.hostile.report import Report
from tests.hostile.wire import CHAT, chat_body
from tests.support.raw_client import NoResponseError, RawClient, http_request

PATIENCE = 10.0


@attrs.define(eq=False)
class Healthy:
    """Some ask for whole answers, some for streams; each keeps its connection as long as it may."""

    port: int
    model: str
    report: Report
    whole: int = 2
    streamed: int = 2
    pause: float = 0.03
    latencies: dict[str, list[float]] = attrs.field(factory=lambda: defaultdict(list))
    _resting: bool = attrs.field(default=False, init=False)
    _busy: int = attrs.field(default=0, init=False)
    _changed: trio.Event = attrs.field(factory=trio.Event, init=False)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for i in range(self.whole):
                nursery.start_soon(self._visit, f"whole-{i}", False)
            for i in range(self.streamed):
                nursery.start_soon(self._visit, f"stream-{i}", True)

    async def rest(self) -> None:
        """Let everybody finish and close, so that what the gateway holds can be compared."""
        self._resting = True
        while self._busy:
            await self._changed.wait()

    def resume(self) -> None:
        self._resting = False
        self._tell()

    def quantiles(self, phase: str) -> str:
        took = sorted(self.latencies[phase])
        if not took:
            return "none"
        at = [took[min(len(took) - 1, math.ceil(len(took) * q) - 1)] for q in (0.5, 0.99, 1)]
        p50, p99, most = (f"{1000 * value:.1f}" for value in at)
        return f"{len(took)} healthy requests, p50 {p50} p99 {p99} max {most} ms"

    def worst(self, phase: str) -> float:
        took = sorted(self.latencies[phase])
        return took[math.ceil(len(took) * 0.99) - 1] if took else 0.0

    async def _visit(self, name: str, stream: bool) -> None:
        number = 0
        while True:
            while self._resting:
                await self._changed.wait()
            self._busy += 1
            try:
                async with await RawClient.connect(self.port) as client:
                    keeps = True
                    while keeps and not self._resting:
                        number += 1
                        keeps = await self._ask(client, f"{name}-{number}", stream)
                        await trio.sleep(self.pause)
            finally:
                self._busy -= 1
                self._tell()

    async def _ask(self, client: RawClient, user: str, stream: bool) -> bool:
        """Whether the connection is to be kept."""
        body = chat_body(self.model, user, **({"stream": True} if stream else {}))
        began = trio.current_time()
        with trio.move_on_after(PATIENCE) as patience:
            try:
                await client.send(http_request("POST", CHAT.decode(), body=body, headers=_JSON))
                answer = await client.read_response("POST")
            except (NoResponseError, trio.BrokenResourceError, ValueError) as exc:
                self.report.found(user, f"a healthy client was let down: {exc!r}", body)
                return False
        if patience.cancelled_caught:
            self.report.found(user, f"a healthy client had no answer in {PATIENCE} s", body)
            return False
        self.latencies[self.report.phase].append(trio.current_time() - began)
        text = _streamed_text(answer.body) if stream else _whole_text(answer.body)
        source = digest(user.encode())
        want = "".join(f"{source}.{i} " for i in range(3)) if stream else digest(body)
        if (answer.status, answer.complete, text) != (200, True, want):
            self.report.found(user, f"a healthy client got {text!r}", body, answer.body)
        return answer.header("connection") != "close"

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


_JSON = [("content-type", "application/json")]


def _whole_text(body: bytes) -> str:
    try:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError):
        return repr(body)


def _streamed_text(body: bytes) -> str:
    text = ""
    for event in body.split(b"\n\n"):
        data = event.removeprefix(b"data: ")
        if data and data != b"[DONE]":
            try:
                for choice in json.loads(data)["choices"]:
                    text += choice["delta"].get("content", "")
            except (ValueError, LookupError, TypeError):
                return repr(body)
    return text if body.endswith(b"data: [DONE]\n\n") else f"{text} (no [DONE])"
