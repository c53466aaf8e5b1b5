"""The listeners of one process: the API's, and that of monitoring if it has one of its own."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Sequence

import attrs
import trio

from citadel_gateway.app.server import Server
from citadel_gateway.config.schema import ServiceConfig
from citadel_gateway.io.listening import API, MONITORING_LISTENER
from citadel_gateway.io.logs import JsonLog
from citadel_gateway.policy.watermarks import Level

NAMES = (API, MONITORING_LISTENER)


@attrs.frozen
class Listeners:
    """Opened together, and closed one after the other: whoever looks on is served longest.

    :param api: where requests come in.
    :param monitoring: where metrics and health are looked at, besides.
    """

    api: Server
    monitoring: Server | None
    log: JsonLog

    @property
    def all(self) -> list[Server]:
        return [self.api] if self.monitoring is None else [self.api, self.monitoring]

    @property
    def open_connections(self) -> int:
        return sum(server.open_connections for server in self.all)

    @property
    def sockets(self) -> dict[str, socket.socket]:
        """By the names that a successor knows them by."""
        return {name: server.listener for name, server in zip(NAMES, self.all, strict=False)}

    def take_less(self, level: Level) -> None:
        """Whoever looks at metrics and health is always welcome."""
        self.api.take_less(level)

    def renew(self, config: ServiceConfig, tls: ssl.SSLContext | None) -> None:
        """Whoever connects from now on is served as *config* says."""
        self.api.renew(config, tls)
        if self.monitoring is not None:
            self.monitoring.renew(config, None)

    def share(self) -> None:
        """Somebody else listens, too, and will when we do not."""
        for server in self.all:
            server.share()

    def own(self) -> None:
        """Nobody else listens, even if the sockets were inherited."""
        for server in self.all:
            server.own()

    async def drain(self, config: ServiceConfig) -> None:
        """Let what is running end, within the time that *config* gives; then :meth:`cut`."""
        self.log.event(logging.INFO, "draining", within=config.drain_timeout)
        self.api.promise_nothing()
        if self.api.is_shared:
            self.api.stop_accepting()  # whoever comes now is the next process's
        if self.monitoring is not None and self.monitoring.is_shared:
            await _end(self.monitoring)
        if self.api.open_connections:
            await trio.sleep(config.lame_duck)
        await self.api.stop(config.drain_timeout)

    async def cut(self) -> None:
        """End what is left."""
        await self.api.cut()
        if self.monitoring is not None and not self.monitoring.is_shared:
            await _end(self.monitoring)
        self.log.event(logging.INFO, "stopped")


async def _end(server: Server) -> None:
    await server.stop(0.0)
    await server.cut()


def say_unused(log: JsonLog, sockets: Sequence[str]) -> None:
    """Sockets were passed on that nobody listens to."""
    for unused in sockets:
        log.event(
            logging.WARNING,
            "a socket was passed on that is nobody's: name it api or monitoring, or give it "
            "an address of the configuration",
            socket=unused,
        )
