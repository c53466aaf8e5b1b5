"""Several gateways in memory that share a store, their engines and one virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio.abc
import attrs
import trio

from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.config.loader import parse
from citadel_gateway.io.dial import Origin
from tests.support.gateway import PORT, CapturedLog, World, repeatable
from tests.support.memory_net import MemoryNet
from tests.support.memory_store import Memory, MemoryStore
from tests.support.scripted_engine import ScriptedEngine


@attrs.define(eq=False)
class Fellows:
    """The gateways, each with its own view of what they share."""

    worlds: list[World]
    stores: list[MemoryStore]
    memory: Memory
    engines: dict[str, ScriptedEngine]

    def __iter__(self) -> Any:
        return iter(self.worlds)

    def __getitem__(self, place: int) -> World:
        return self.worlds[place]


@asynccontextmanager
async def fellows(
    config: Mapping[str, Any], count: int, hosts: Iterable[str], seed: int = 0
) -> AsyncIterator[Fellows]:
    """*count* gateways, opened one after the other, in front of engines on *hosts*."""
    with repeatable(seed):
        async with trio.open_nursery() as nursery:
            net, memory = MemoryNet(nursery), Memory()

            async def connect(origin: Origin) -> anyio.abc.ByteStream:
                return await net.connect(origin.host, origin.port)

            engines = {host: ScriptedEngine() for host in hosts}
            for host, engine in engines.items():
                net.listen(host, PORT, engine.serve)
            made = Fellows([], [], memory, engines)
            async with AsyncExitStack() as opened:
                connections = await opened.enter_async_context(trio.open_nursery())
                for place in range(count):
                    store, log = MemoryStore(memory), CapturedLog()
                    service = UnifiedAPIGatewayService(
                        parse(dict(config), source="test"),
                        connect=connect,
                        rng=random.Random(seed + place),
                        log=log,
                        store=store,
                    )
                    await opened.enter_async_context(service.open())
                    made.stores.append(store)
                    made.worlds.append(World(service, net, log, engines, connections))
                yield made
                connections.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
