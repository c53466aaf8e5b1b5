"""A completion told in one piece, when it is complete.

Faults of streams come out as the nearest thing: ``cut`` sends half the body and closes,
``clean_cut`` and ``malformed_event`` send half the body as if it were all, ``error_event`` is a
500, ``stall`` is silence before the head, and ``no_done`` is nothing.
"""

from __future__ import annotations

import attrs
import orjson

from citadel_gateway.sim.exchange import Exchange, Refusal
from citadel_gateway.sim.faults import AbortConnection, Fault, FaultKind, FaultStruck
from citadel_gateway.sim.job import Job

_JSON = b"application/json"


@attrs.define(eq=False)
class WholeWriter:
    exchange: Exchange
    job: Job

    async def open(self) -> None: ...

    async def begin(self) -> None: ...

    async def tell(self, tokens: list[tuple[int, str]]) -> None: ...

    async def strike(self, fault: Fault) -> None:
        body = orjson.dumps(self.job.whole())
        half = body[: len(body) // 2]
        match fault.kind:
            case FaultKind.CUT:
                await self.exchange.send_head(200, _JSON, length=len(body))
                await self.exchange.send_chunk(half)
                raise AbortConnection
            case FaultKind.CLEAN_CUT | FaultKind.MALFORMED_EVENT:
                await self.exchange.send_whole(200, _JSON, half)
                raise FaultStruck
            case FaultKind.ERROR_EVENT:
                failure = Refusal("Simulated failure.", 500, "InternalServerError")
                await self.exchange.refuse(failure)
                raise FaultStruck

    async def close(self) -> None:
        await self.exchange.send_json(self.job.whole())
