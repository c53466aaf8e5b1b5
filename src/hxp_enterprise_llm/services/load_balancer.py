"""The load balancer."""

from citadel_gateway.app.load_balancer import LoadBalancer

__all__ = ["LoadBalancer"]
