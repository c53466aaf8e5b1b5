"""What the TLS files that a configuration names hold."""

from __future__ import annotations

import ssl

import attrs

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


def names_tls_files(config: GatewayConfigSchema) -> bool:
    """Whether there is anything to be read; also by default for ``https`` endpoints."""
    return bool(config.service.tls_certfile or tls_settings(config))


def read_tls_files(config: GatewayConfigSchema) -> TlsFiles:
    """Raises ``ConfigError``."""
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
