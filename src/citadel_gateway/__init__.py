"""Citadel Gateway: one OpenAI-compatible address in front of your own language-model servers."""

from __future__ import annotations

from citadel_gateway.app.gateway_orchestrator import GatewayOrchestrator
from citadel_gateway.app.hosted import create_app
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
