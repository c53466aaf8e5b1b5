"""The circuit breaker."""

from citadel_gateway.policy.circuit_breaker import (
    BreakerPolicy,
    CircuitBreaker,
    Permit,
    State,
    Transition,
    Verdict,
)

__all__ = ["BreakerPolicy", "CircuitBreaker", "Permit", "State", "Transition", "Verdict"]
