"""A completion told token by token, as server-sent events."""

from __future__ import annotations

from typing import Any

import attrs
import orjson

from citadel_gateway.sim.exchange import Exchange
from citadel_gateway.sim.faults import AbortConnection, Fault, FaultKind, FaultStruck
from citadel_gateway.sim.job import Job

_DONE = b"data: [DONE]\n\n"


@attrs.define(eq=False)
class StreamWriter:
    """The head goes out when the request is accepted, as vLLM does, not with the first token.

    :param says_done: ends with ``[DONE]``.
    """

    exchange: Exchange
    job: Job
    says_done: bool = True

    async def open(self) -> None:
        await self.exchange.send_head(
            200, b"text/event-stream; charset=utf-8", headers=[(b"cache-control", b"no-cache")]
        )

    async def begin(self) -> None:
        if self.job.request.chat:
            for index in range(len(self.job.answers)):
                await self._event(self.job.role_chunk(index))

    async def tell(self, tokens: list[tuple[int, str]]) -> None:
        for index, token in tokens:
            await self._event(self.job.token_chunk(index, token))

    async def strike(self, fault: Fault) -> None:
        match fault.kind:
            case FaultKind.CUT:
                raise AbortConnection
            case FaultKind.CLEAN_CUT:
                await self.exchange.end()
                raise FaultStruck
            case FaultKind.ERROR_EVENT:
                error = {"message": "Simulated failure.", "type": "InternalServerError"}
                await self._event({"error": {**error, "param": None, "code": 500}})
                await self.exchange.end(_DONE)
                raise FaultStruck
            case FaultKind.MALFORMED_EVENT:
                await self.exchange.send_chunk(b'data: {"id": "chatcmpl-\n\n')

    async def close(self) -> None:
        for index in range(len(self.job.answers)):
            await self._event(self.job.finish_chunk(index))
        if self.job.request.include_usage:
            await self._event(self.job.usage_chunk())
        await self.exchange.end(_DONE if self.says_done else b"")

    async def _event(self, body: dict[str, Any]) -> None:
        await self.exchange.send_chunk(b"data: %b\n\n" % orjson.dumps(body))
