"""The gateway configuration by flat keywords."""

from citadel_gateway.config.flat import UnifiedAPIGatewayConfig

__all__ = ["UnifiedAPIGatewayConfig"]
