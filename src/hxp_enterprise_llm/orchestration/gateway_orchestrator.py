"""The orchestrator."""

from citadel_gateway.app.gateway_orchestrator import GatewayOrchestrator

__all__ = ["GatewayOrchestrator"]
