"""Configuration: parsed once, frozen, and never a dict again."""

from citadel_gateway.config.loader import ConfigError, load_config, parse
from citadel_gateway.config.schema import GatewayConfigSchema

__all__ = ["ConfigError", "GatewayConfigSchema", "load_config", "parse"]
