"""The gateway as an ASGI application for somebody else's server: its lifespan is the server's.

``hypercorn -k trio 'citadel_gateway:create_app()'`` serves it, with that server's own handling of
connections and signals; ``citadel-gateway serve`` is the better way.
"""

from __future__ import annotations

import os
from typing import Any

import attrs

from citadel_gateway.app.relay import Receive, Send
from citadel_gateway.app.service import UnifiedAPIGatewayService
from citadel_gateway.io.config_file import ConfigFile

CONFIG_VARIABLE = "CITADEL_CONFIG"
DEFAULT_CONFIG = "config/gateway.yaml"


@attrs.define(eq=False)
class HostedGateway:
    """Opens the service at the server's start-up and closes it at its shutdown."""

    service: UnifiedAPIGatewayService

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.service.app(scope, receive, send)
            return
        await receive()
        try:
            async with self.service.open():
                await send({"type": "lifespan.startup.complete"})
                await receive()
        finally:
            self.service.draining.set()  # not ready: stopped, or without its background tasks
        await send({"type": "lifespan.shutdown.complete"})


def create_app(path: str | None = None) -> HostedGateway:
    """The application for the configuration at *path*, or at ``$CITADEL_CONFIG``.

    Raises ``ConfigError``.
    """
    path = path or os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG
    file = ConfigFile(path)
    return HostedGateway(UnifiedAPIGatewayService(file.load(), file=file))
