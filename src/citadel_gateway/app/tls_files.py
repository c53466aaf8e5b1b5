"""What the TLS files that a configuration names hold."""

from __future__ import annotations

import ssl

import attrs
import trio

from citadel_gateway.app.server import make_tls
from citadel_gateway.config.loader import ConfigError
from citadel_gateway.config.schema import GatewayConfigSchema, TlsConfig
from citadel_gateway.io.dial import make_tls_contexts
from citadel_gateway.io.listening import Address


@attrs.frozen
class TlsFiles:
    """For endpoints, and for the listener."""

    upstream: dict[TlsConfig | None, ssl.SSLContext]
    listener: ssl.SSLContext | None


async def load_tls_files(config: GatewayConfigSchema) -> TlsFiles:
    """In a thread, if there is anything to be read.  Raises ``ConfigError``."""
    if not (config.service.tls_certfile or tls_settings(config)):
        return TlsFiles({}, None)
    return await trio.to_thread.run_sync(_read_tls_files, config, abandon_on_cancel=True)


def _read_tls_files(config: GatewayConfigSchema) -> TlsFiles:
    service = config.service
    try:
        listener = make_tls(api_address(config), service)
    except OSError as exc:
        raise ConfigError("TLS", [f"service.tls_certfile: {exc}"]) from exc
    try:
        return TlsFiles(make_tls_contexts(tls_settings(config)), listener)
    except OSError as exc:
        raise ConfigError("TLS", [f"tls of an endpoint: {exc}"]) from exc


def tls_settings(config: GatewayConfigSchema) -> list[TlsConfig | None]:
    """Those of the endpoints that are spoken to over TLS."""
    return [
        endpoint.tls for endpoint in config.all_endpoints() if endpoint.url.startswith("https:")
    ]


def api_address(config: GatewayConfigSchema) -> Address:
    """Where the API listens."""
    service = config.service
    return Address(service.host, service.port, service.tls_certfile, service.tls_keyfile)
