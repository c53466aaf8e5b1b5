"""Bugs that simulated runs have found, each by itself."""

from __future__ import annotations

import anyio.abc
import trio
from trio.testing import MockClock

from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.loader import parse
from citadel_gateway.io.dial import Origin
from tests.sim.wires import Wire, wire_pair
from tests.support.gateway import CapturedLog, fleet


async def test_a_probe_that_is_under_way_at_the_end_is_no_crash(autojump_clock: MockClock) -> None:
    to_engines, engines = trio.open_memory_channel[Wire](2)

    async def connect(_: Origin) -> anyio.abc.ByteStream:
        gateway, engine = wire_pair(direct=True)
        await to_engines.send(engine)
        return gateway

    log = CapturedLog()
    service = UnifiedAPIGatewayService(
        parse(fleet({"m": {}}), source="test"), connect=connect, log=log
    )
    async with service.open():
        at_start, silent = await engines.receive(), await engines.receive()
        await silent.receive_some()
    at_start.close()
    silent.close()

    assert [line["event"] for line in log.lines if "crash" in line["event"]] == []
