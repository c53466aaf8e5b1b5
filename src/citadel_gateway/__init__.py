"""Citadel Gateway: one OpenAI-compatible address in front of your own language-model servers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from citadel_gateway.app.gateway_orchestrator import GatewayOrchestrator
    from citadel_gateway.app.hosted import HostedGateway
    from citadel_gateway.app.load_balancer import LoadBalancer
    from citadel_gateway.app.service import UnifiedAPIGatewayService
    from citadel_gateway.config import ConfigError, GatewayConfigSchema, load_config
    from citadel_gateway.config.flat import UnifiedAPIGatewayConfig
    from citadel_gateway.io.transport import AnyIOTransport
    from citadel_gateway.policy.circuit_breaker import BreakerPolicy, CircuitBreaker

__all__ = [
    "AnyIOTransport",
    "BreakerPolicy",
    "CircuitBreaker",
    "ConfigError",
    "GatewayConfigSchema",
    "GatewayOrchestrator",
    "LoadBalancer",
    "UnifiedAPIGatewayConfig",
    "UnifiedAPIGatewayService",
    "create_app",
    "load_config",
]

# Imported when asked for: a supervisor of workers needs few of them, and stays small.
_HOMES = {
    "AnyIOTransport": "io.transport",
    "BreakerPolicy": "policy.circuit_breaker",
    "CircuitBreaker": "policy.circuit_breaker",
    "ConfigError": "config",
    "GatewayConfigSchema": "config",
    "GatewayOrchestrator": "app.gateway_orchestrator",
    "LoadBalancer": "app.load_balancer",
    "UnifiedAPIGatewayConfig": "config.flat",
    "UnifiedAPIGatewayService": "app.service",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def create_app(path: str | None = None) -> HostedGateway:
    """The gateway for somebody else's server; see :func:`citadel_gateway.app.hosted.create_app`.

    Defined here, because servers look for it without asking.
    """
    from citadel_gateway.app import hosted

    return hosted.create_app(path)
