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

    config: Mapping[str, Any]
    seed: int
    net: MemoryNet
    engines: dict[str, ScriptedEngine]
    opened: AsyncExitStack
    connections: trio.Nursery
    memory: Memory = attrs.field(factory=Memory)
    worlds: list[World] = attrs.field(factory=list)
    stores: list[MemoryStore] = attrs.field(factory=list)

    def __iter__(self) -> Any:
        return iter(self.worlds)

    def __getitem__(self, place: int) -> World:
        return self.worlds[place]

    async def join(
        self,
        host: str | None = None,
        restored: Iterable[tuple[str, str]] = (),
        *,
        is_out: bool = False,
    ) -> World:
        """One more, on *host* if that matters.

        :param restored: what its supervisor has it cordon, by model and URL.
        :param is_out: for it, the store cannot be asked.
        """

        async def connect(origin: Origin) -> anyio.abc.ByteStream:
            return await self.net.connect(origin.host, origin.port)

        store, log = MemoryStore(self.memory, is_out=is_out), CapturedLog()
        service = UnifiedAPIGatewayService(
            parse(dict(self.config), source="test"),
            connect=connect,
            rng=random.Random(self.seed + len(self.worlds)),
            log=log,
            store=store,
        )
        if host is not None and service.peers is not None:
            service.peers.findings.host = host
        service.operations.restore(restored)
        await self.opened.enter_async_context(service.open())
        world = World(service, self.net, log, self.engines, self.connections)
        self.stores.append(store)
        self.worlds.append(world)
        return world


@asynccontextmanager
async def fellows(
    config: Mapping[str, Any], count: int, hosts: Iterable[str], seed: int = 0
) -> AsyncIterator[Fellows]:
    """*count* gateways, opened one after the other, in front of engines on *hosts*."""
    with repeatable(seed):
        async with trio.open_nursery() as nursery:
            net, engines = MemoryNet(nursery), {host: ScriptedEngine() for host in hosts}
            for host, engine in engines.items():
                net.listen(host, PORT, engine.serve)
            async with AsyncExitStack() as opened:
                connections = await opened.enter_async_context(trio.open_nursery())
                made = Fellows(config, seed, net, engines, opened, connections)
                for _ in range(count):
                    await made.join()
                yield made
                connections.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
