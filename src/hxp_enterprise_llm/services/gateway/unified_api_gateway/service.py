"""The gateway service."""

from citadel_gateway.app.service import UnifiedAPIGatewayService

__all__ = ["UnifiedAPIGatewayService"]
