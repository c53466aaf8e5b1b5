"""The configuration schema."""

from citadel_gateway.config.schema import GatewayConfigSchema

__all__ = ["GatewayConfigSchema"]
