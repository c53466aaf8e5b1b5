"""Health checks."""

from citadel_gateway.io.health_monitoring import HealthChecker
from citadel_gateway.policy.health_tracker import HealthTracker

__all__ = ["HealthChecker", "HealthTracker"]
