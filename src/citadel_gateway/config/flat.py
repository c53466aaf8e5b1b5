"""The seed's flat keywords, for programs that configure the gateway without a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import attrs

from citadel_gateway.config.environment import endpoint_variable
from citadel_gateway.config.loader import parse
from citadel_gateway.config.schema import GatewayConfigSchema

_SEED_MODELS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {"weight": 1.0, "max_concurrent": 10, "cost_per_request": 0.1},
    "hermes-2": {"weight": 0.8, "max_concurrent": 20, "cost_per_request": 0.05},
    "openchat-3.5": {"weight": 0.6, "max_concurrent": 50, "cost_per_request": 0.02},
    "phi-3-mini": {"weight": 0.4, "max_concurrent": 100, "cost_per_request": 0.01},
}
_FIRST_PORT = 11400


def default_models() -> dict[str, dict[str, Any]]:
    """The four models, at the endpoints of the environment, else on loopback as in the demo."""
    return {
        name: {
            "endpoint": os.environ.get(endpoint_variable(name) or "")
            or f"http://127.0.0.1:{_FIRST_PORT + i}",
            **model,
        }
        for i, (name, model) in enumerate(_SEED_MODELS.items())
    }


@attrs.frozen(kw_only=True)
class UnifiedAPIGatewayConfig:
    """One keyword for each setting; :meth:`schema` is the same as a checked configuration.

    :param models: as in the file's ``models`` section; the four models by default.
    """

    port: int = 8000
    host: str = "0.0.0.0"  # noqa: S104  # the seed's
    workers: int | None = None
    memory_gb: float = 2
    cpu_cores: int = 4
    default_model: str = "mixtral-8x7b"
    model_routing_enabled: bool = True
    intelligent_routing: bool = True
    cost_optimization_enabled: bool = True
    load_balancer_algorithm: str = "round_robin"
    health_check_interval: float = 30
    circuit_breaker_threshold: int = 5
    circuit_breaker_timeout: float = 60
    request_timeout_seconds: float = 30
    max_concurrent_requests: int = 100
    rate_limiting_enabled: bool = True
    rate_limit_rps: float = 50
    prometheus_port: int | None = 9090
    models: Mapping[str, Any] = attrs.field(factory=default_models)

    def __attrs_post_init__(self) -> None:
        self.schema()  # so that a wrong value is told where it is given

    def schema(self) -> GatewayConfigSchema:
        """Raises ``ConfigError`` that names every wrong keyword's place in the schema."""
        raw = {
            "service": {"port": self.port, "host": self.host, "workers": self.workers},
            "gateway": {
                "default_model": self.default_model,
                "model_routing_enabled": self.model_routing_enabled,
                "intelligent_routing": self.intelligent_routing,
                "cost_optimization_enabled": self.cost_optimization_enabled,
            },
            "load_balancer": {
                "algorithm": self.load_balancer_algorithm,
                "health_check_interval": self.health_check_interval,
                "circuit_breaker_threshold": self.circuit_breaker_threshold,
                "circuit_breaker_timeout": self.circuit_breaker_timeout,
            },
            "performance": {
                "request_timeout_seconds": self.request_timeout_seconds,
                "max_concurrent_requests": self.max_concurrent_requests,
                "rate_limiting_enabled": self.rate_limiting_enabled,
                "rate_limit_rps": self.rate_limit_rps,
                "memory_limit_gb": self.memory_gb,
                "cpu_cores": self.cpu_cores,
            },
            "monitoring": {"prometheus_port": self.prometheus_port},
            "models": dict(self.models),
        }
        return parse(raw, source="UnifiedAPIGatewayConfig")


AnyConfig: TypeAlias = GatewayConfigSchema | UnifiedAPIGatewayConfig


def as_schema(config: AnyConfig) -> GatewayConfigSchema:
    """Either kind of configuration as the schema."""
    return config.schema() if isinstance(config, UnifiedAPIGatewayConfig) else config
